"""One file fetched from an address: resumed where it was cut off, and verified."""

import hashlib
import http.client
import os
import re
import time
import urllib.request
from dataclasses import dataclass
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

from inkling.cli import UserError
from inkling.files import sha256 as sha256_of
from inkling.files import sync_folder
from inkling.progress import Progress

BLOCK = 1 << 20                         # bytes read at a time
TRIES = 3                               # of a download
HUB = "https://huggingface.co/"
TIMEOUT = 30                            # seconds without an answer
CHANGED, NOTHING_LEFT = 412, 416  # HTTP: the file has changed since; it has no bytes from there on


def is_address(word: str) -> bool:
    return word.startswith(("http://", "https://"))


def hub_address(url: str) -> str:
    """The address at the server that HF_ENDPOINT names, for what Hugging Face's hub has."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if endpoint and url.startswith(HUB):
        return f"{endpoint}/{url.removeprefix(HUB)}"
    return url


@dataclass
class Transfer:
    """What a server said of a file that it has sent to the end."""

    bytes: int
    announced: int | None               # bytes; None: the server did not say
    headers: Message                    # of the first answer

    @property
    def sha256(self) -> str:
        """The checksum that Hugging Face tells of large files, or ""."""
        etag = re.fullmatch('"?([0-9a-f]{64})"?', self.headers["X-Linked-Etag"] or "")
        return etag[1] if etag else ""


class DownloadFailed(Exception):
    """A file could not be fetched. The message says why; what to do about it depends on the file."""


class FirstHeaders(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of the first answer: Hugging Face's has the checksum, and redirects
    to the bytes."""

    headers = None

    def redirect_request(self, request, file, code, message, headers, url):
        self.headers = self.headers or headers
        return super().redirect_request(request, file, code, message, headers, url)


def download(url: str, path: Path, sha256: str = ""):
    """Fetch `url` to `path`, or raise DownloadFailed. HF_ENDPOINT names another server for addresses
    of Hugging Face's hub.

    There are three tries, each with a time-out. Each resumes at the end of PATH.part, where the
    last try, or the last process, was cut off. The file takes its place only when it has as many
    bytes as the server announced (if it did) and the given SHA-256 or else the one that the server
    tells. Without a SHA-256, a file that changed between two tries is noticed only if its server
    knows when it changed and the clocks agree; otherwise its new end is joined to its old
    beginning."""
    url = hub_address(url)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)  # also so that a person can put the file there
    print(f"downloading {url}", flush=True)
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(attempt)
        try:
            transfer = fetch_rest(url, part)
            verify(part, transfer, sha256)
            os.replace(part, path)
            sync_folder(path.parent)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            code = getattr(error, "code", "")           # of HTTP
            said = getattr(error, "reason", "") or error
            reason = f"{code} {said}".strip() or type(error).__name__
            if code in (CHANGED, NOTHING_LEFT):
                part.unlink(missing_ok=True)
    raise DownloadFailed(f"could not download {url} ({reason})")


def fetch_rest(url: str, part: Path) -> Transfer:
    """Append to `part` what it lacks of the file at `url`. Raises ValueError, OSError or
    HTTPException."""
    first = FirstHeaders()
    request = request_rest(url, part)
    resuming = request.has_header("Range")
    progress = Progress("downloading the rest," if resuming else "downloading")
    try:
        with urllib.request.build_opener(first).open(request, timeout=TIMEOUT) as answer:
            start = 0                                   # some servers send all of it again
            if resuming and answer.status == http.HTTPStatus.PARTIAL_CONTENT:
                start = part.stat().st_size
                if not (answer.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
                    part.unlink()
                    raise ValueError("other bytes than those asked for arrived")
            announced = None
            if answer.headers["Content-Length"] is not None:
                progress.total = int(answer.headers["Content-Length"])
                announced = start + progress.total
            size = append(answer, part, start, announced, progress)
            headers = first.headers or answer.headers
    finally:
        progress.end()
    if announced not in (None, size):  # reading in blocks does not notice by itself
        raise ValueError(f"{size:,} of {announced:,} bytes arrived")
    return Transfer(size, announced, headers)


def request_rest(url: str, part: Path) -> urllib.request.Request:
    """Ask for what `part` lacks, if it has anything and the file has not changed since."""
    headers = {"User-Agent": "inkling"}
    size = part.stat().st_size if part.is_file() else 0
    if size:
        headers["Range"] = f"bytes={size}-"
        headers["If-Unmodified-Since"] = formatdate(part.stat().st_mtime, usegmt=True)
    return urllib.request.Request(url, headers=headers)


def append(answer, part: Path, size: int, announced: int | None, progress: Progress) -> int:
    """Write the bytes of `answer` after the first `size` bytes of `part`; returns its new size."""
    with open(part, "ab" if size else "wb") as file:
        while size != announced:
            block = answer.read1(BLOCK)                 # read would lose what came before a stall
            if not block:
                break
            file.write(block)
            size += len(block)
            progress.advance(len(block))
        file.flush()
        os.fsync(file.fileno())
    return size


def verify(part: Path, transfer: Transfer, sha256: str):
    """Compare `part` with its SHA-256, if that is known. Removes it and raises ValueError if they
    differ."""
    expected = sha256 or transfer.sha256
    if not expected:
        length = "as announced"
        if transfer.announced is None:
            length = "the server did not say how many to expect"
        print(f"         {transfer.bytes:,} bytes, {length}; no SHA-256 of it is known to compare "
              "with")
    elif sha256_of(part) != expected:
        part.unlink()
        raise ValueError(f"{transfer.bytes:,} bytes with another SHA-256 than {expected[:12]}... "
                         "arrived")


def fetch_address(url: str, folder: Path, again: bool) -> Path:
    """The file that an address names, kept in `folder`: downloaded once, or once more if
    `again`."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(urlsplit(url).path).name)[-100:] or "download"
    key = hashlib.sha256(url.encode()).hexdigest()[:8]  # two addresses may end alike
    path = folder / f"{key}-{name}"
    if path.is_file() and not again:
        print(f"note     {url} is there already as {path} (--force downloads it again)")
        return path
    try:
        download(url, path)
    except DownloadFailed as error:
        raise UserError(f"{error}; put that file at {path} by hand (after mkdir -p {folder}) and try again")
    return path
