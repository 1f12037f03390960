"""One file fetched from an address: resumed, verified."""

import hashlib
import http.client
import os
import re
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

from inkling.cli import UserError
from inkling.files import Progress, sync_folder

BLOCK = 1 << 20                         # bytes read at a time
TRIES = 3                               # of a download


def is_address(word: str) -> bool:
    return word.startswith(("http://", "https://"))


class FirstHeaders(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of the first answer: Hugging Face's tells checksum and commit, and sends on to the bytes."""

    headers = None

    def redirect_request(self, request, file, code, message, headers, url):
        self.headers = self.headers or headers
        return super().redirect_request(request, file, code, message, headers, url)


def download(url: str, path: Path, sha256: str = "") -> tuple[str, str]:
    """Fetch `url` to `path`, with a time-out and three tries that go on where the last one, or the last process, was
    cut off: at the end of PATH.part. The file takes its place only when it has as many bytes as the server announced
    (if it did) and the SHA-256 that is given, or else the one that the server tells, as Hugging Face does of large
    files. Without a SHA-256, that a file changed between two tries is noticed only if its server knows when it did and
    the clocks agree; otherwise its new end is joined to its old beginning. Returns "" or what went wrong, and the
    server's commit or ""."""
    part, reason = path.with_name(path.name + ".part"), ""
    path.parent.mkdir(parents=True, exist_ok=True)      # also so that a person can put the file there
    print(f"downloading {url}", flush=True)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(attempt)
        have = part.stat().st_size if part.is_file() else 0
        wanted = {"User-Agent": "inkling"}
        if have:
            since = formatdate(part.stat().st_mtime, usegmt=True)
            wanted |= {"Range": f"bytes={have}-", "If-Unmodified-Since": since}
        first, progress = FirstHeaders(), Progress("downloading the rest," if have else "downloading")
        try:
            request = urllib.request.Request(url, headers=wanted)
            with urllib.request.build_opener(first).open(request, timeout=30) as answer:
                have = have if answer.status == 206 else 0          # some servers send all of it again
                if have and not (answer.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
                    part.unlink()
                    raise ValueError("other bytes than those asked for arrived")
                size, headers = answer.headers["Content-Length"], first.headers or answer.headers
                if size is not None:
                    progress.total = int(size)
                    size = have + progress.total
                with open(part, "ab" if have else "wb") as file:
                    while have != size and (block := answer.read1(BLOCK)):  # read would lose what came before it stalls
                        file.write(block)
                        have += len(block)
                        progress.advance(len(block))
                    file.flush()
                    os.fsync(file.fileno())
            if size not in (None, have):                # a read in pieces does not notice by itself
                raise ValueError(f"{have:,} of {size:,} bytes arrived")
            told = re.fullmatch('"?([0-9a-f]{64})"?', headers["X-Linked-Etag"] or "")
            if not (digest := sha256 or (told and told[1])):
                expected = "how many to expect was not said" if size is None else "as announced"
                print(f"         {have:,} bytes, {expected}; no SHA-256 of it is known to compare with")
            elif sha256(part) != digest:
                part.unlink()
                raise ValueError(f"{have:,} bytes with another SHA-256 than {digest[:12]}... arrived")
            os.replace(part, path)
            sync_folder(path.parent)
            return "", headers["X-Repo-Commit"] or ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            code = getattr(error, "code", "")
            reason = f"{code} {getattr(error, 'reason', '') or error}".strip() or type(error).__name__
            if code in (412, 416):                      # changed since; nothing after what is here
                part.unlink(missing_ok=True)
        finally:
            progress.end()
    return reason, ""


def fetch_address(url: str, folder: Path, again: bool) -> Path:
    """The file that an address names, kept in `folder`: downloaded once, unless `again`."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(urlsplit(url).path).name)[-100:] or "download"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"     # two addresses may end alike
    if path.is_file() and not again:
        print(f"note     {url} is there already as {path} (--force downloads it again)")
    elif reason := download(url, path)[0]:
        raise UserError(f"could not download {url} ({reason}); put that file at {path} by hand and try again")
    return path
