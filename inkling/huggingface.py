"""Hugging Face's side of a conversion: tokenizer.json to a Tokenizer and back, and models of the
hub by their names.

Both sides split a text by a regular expression and merge bytes pair by pair. tiktoken's ranks are
the ids, and it may merge any two neighbours that form a token, the lowest rank first;
tokenizer.json lists the pairs.

The package huggingface_hub finds and downloads models; it is imported when a name is asked for.
"""

import json
import re
import sys
from math import inf
from pathlib import Path

from inkling.cli import UserError
from inkling.files import sha256
from inkling.tokenizer import END_OF_TEXT, Tokenizer, rank_lines
from inkling.tokenizer_json import BYTES, steps, to_bytes, to_letters

# OpenAI's models, at huggingface.co/openai-community/NAME, and what is needed of each.
NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "tokenizer.json", "model.safetensors")

# GPT-2's way to split a text, as tiktoken writes it.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def refuse_pointer(path: Path):
    """Raise UserError if a file is what Git leaves in a clone in place of a large file."""
    with open(path, "rb") as file:
        is_pointer = file.read(40).startswith(b"version https://git-lfs.github.com")
    if is_pointer:
        raise UserError(f"{path} is a pointer of Git LFS and not the file itself: run git lfs pull in "
                        f"{path.parent}, or download the file")


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {path}: {reason}; a Hugging Face directory has {', '.join(FILES)}")
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise UserError(f"{path} is not JSON: {str(error)[:100]}")
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


# -- merges --------------------------------------------------------------------------------------

def last_parts(token: bytes, ranks: dict) -> list:
    """What merging by ranks makes of `token` before the merge that completes it: two parts, or more
    if lower ranks never lead to it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    # The rank of what each part and its right neighbour would make.
    pair_ranks = [ranks.get(token[i:i + 2], inf) for i in range(len(token) - 1)]
    while len(parts) > 2:
        lowest = min(pair_ranks)
        if lowest >= ranks[token]:
            break
        place = pair_ranks.index(lowest)
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
        del pair_ranks[place]
        if place > 0:
            pair_ranks[place - 1] = ranks.get(parts[place - 1] + parts[place], inf)
        if place < len(pair_ranks):
            pair_ranks[place] = ranks.get(parts[place] + parts[place + 1], inf)
    return parts


def merge_pairs(ranks: dict) -> list:
    """[(left, right)] in the order of ranks (bytes -> id): the two parts that each token is merged
    from. They are the same in any text, since the inside of a token is merged first, and without
    regard to what surrounds it. Tokens that cannot be merged from two parts are only met as a
    whole; they have no pair."""
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        parts = last_parts(token, ranks)
        if len(parts) == 2:
            pairs.append(tuple(parts))
    return pairs


# -- patterns --------------------------------------------------------------------------------------

# Possessive repeats and anchors mean different things in the two dialects; all else that is in use
# means the same.
AMBIGUOUS = re.compile(r"([?*+]|\{\d+(,\d*)?\})\+|\\[zZAG]|(?<!\\)[$^]")


def pattern_to_json(pattern: str) -> str:
    """A pattern of tiktoken's in the dialect of the tokenizers library, where {1,3}+ repeats
    instead of being possessive and $ also matches before a line break."""
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)
    return re.sub(r"(?<!\\)\$(?=[|)]|$)", r"\\z", pattern)


def split_step(pattern: str) -> dict:
    """The step of a pre_tokenizer that splits a text by a pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def pattern_from_json(content: dict, exported: dict) -> str:
    """The pattern by which tokenizer.json's content splits a text, in tiktoken's dialect. Raises
    ValueError.

    Two forms are understood: ByteLevel alone, which is GPT-2's, and a Split followed by
    ByteLevel."""
    steps = [content.get("pre_tokenizer") or {"type": "nothing"}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    *first, last = steps
    byte_level = last["type"] == "ByteLevel" and not last.get("add_prefix_space")
    own_regex = last.get("use_regex", True)
    if byte_level and own_regex and not first:
        return GPT2_PATTERN
    if byte_level and not own_regex and len(first) == 1 and first[0]["type"] == "Split":
        pattern = first[0]["pattern"].get("Regex", "")
        if first[0] == split_step(pattern):
            return pattern_to_tiktoken(pattern, exported)
    types = ", ".join(str(step["type"]) for step in steps)
    raise ValueError(f"it prepares a text by {types}, unlike byte-level BPE")


def pattern_to_tiktoken(pattern: str, exported: dict) -> str:
    if pattern_to_json(exported.get("pattern", "")) == pattern:
        return exported["pattern"]
    if AMBIGUOUS.search(pattern.replace("[^", "")):
        raise ValueError(f"it splits a text by {pattern!r}, which tiktoken may read differently")
    return pattern


# -- a Tokenizer to tokenizer.json -----------------------------------------------------------------

def tokenizer_to_json(tokenizer: Tokenizer) -> dict:
    """tokenizer.json's content. It gives the same ids of any text, except that one that looks like
    a special token becomes that token. Raises ValueError for a kind of tokenizer that has no
    counterpart."""
    if tokenizer.kind == "json":
        return json.loads(tokenizer.stored["json"])
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
               "normalizer": None, "post_processor": None}
    if tokenizer.bos is not None:
        content["post_processor"] = bos_template(token_text(tokenizer, tokenizer.bos), tokenizer.bos)
    if tokenizer.kind == "char":
        return content | char_parts(tokenizer)
    if tokenizer.kind == "byte":
        return content | byte_parts()
    if tokenizer.kind == "bpe":
        return content | bpe_parts(tokenizer)
    raise ValueError(f"tokenizer.json has no counterpart of the kind {tokenizer.kind}")


def token_text(tokenizer: Tokenizer, value: int) -> str:
    """How tokenizer.json spells an id."""
    if tokenizer.kind == "json":
        return tokenizer.backend.first.id_to_token(value)
    special = tokenizer.bpe["special_tokens"] if tokenizer.kind == "bpe" else {}
    names = [text for text, special_id in special.items() if special_id == value]
    return names[0] if names else to_letters(tokenizer.pieces[value])


def bos_template(text: str, value: int) -> dict:
    """The post_processor that puts a token before every text."""
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second],
            "special_tokens": {text: {"id": text, "ids": [value], "tokens": [text]}}}


def char_parts(tokenizer: Tokenizer) -> dict:
    vocab = {char: value for value, char in enumerate(tokenizer.stored["chars"])}
    parts = {"pre_tokenizer": split_step(r"[\s\S]")}
    if tokenizer.fallback is None:
        parts["decoder"] = {"type": "Fuse"}
        parts["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        return parts
    for value in range(256):            # the bytes of rare characters
        vocab[f"<0x{value:02X}>"] = tokenizer.fallback + value
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    parts["decoder"] = {"type": "Sequence", "decoders": decoders}
    parts["model"] = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
    return parts


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}


def byte_parts() -> dict:
    return {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": bpe_model(dict(BYTES), [])}


def bpe_parts(tokenizer: Tokenizer) -> dict:
    ranks = tokenizer.bpe["mergeable_ranks"]
    special = tokenizer.bpe["special_tokens"]
    vocab = {to_letters(token): rank for token, rank in ranks.items()}
    vocab |= special                    # where a special token gets its id
    merges = [[to_letters(left), to_letters(right)] for left, right in merge_pairs(ranks)]
    steps = [split_step(pattern_to_json(tokenizer.bpe["pat_str"])), BYTE_LEVEL]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": BYTE_LEVEL,
            "added_tokens": [added_token(text, value) for text, value in special.items()],
            "model": bpe_model(vocab, merges)}


def bpe_model(vocab: dict, merges: list) -> dict:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True, "vocab": vocab, "merges": merges}


def added_token(text: str, value: int) -> dict:
    return {"id": value, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


# -- tokenizer.json to a Tokenizer -----------------------------------------------------------------

def tokenizer_from_json(content: dict, exported: dict) -> Tokenizer:
    """The tokenizer in tokenizer.json's content. `exported`: name and pattern, if Inkling exported
    it. Without a name it is called gpt2 if it is that, or else bpe. Raises ValueError naming what
    Inkling cannot express."""
    model = content["model"]
    kind = model.get("type", "BPE")     # absent before tokenizers 0.10, as in GPT-2's
    if kind not in ("BPE", "WordLevel"):
        raise ValueError(f"it is {kind}, not byte-level BPE")
    if model.get("byte_fallback") and model.get("merges"):
        raise ValueError(f"it is {kind} with byte_fallback, not byte-level BPE")
    if not model.get("merges"):
        return unmerged_tokenizer(content, kind)
    return bpe_tokenizer(content, exported)


def unmerged_tokenizer(content: dict, kind: str) -> Tokenizer:
    """The char or byte tokenizer that Inkling would write as `content`."""
    vocab = content["model"]["vocab"]
    characters = [text for text in vocab if len(text) == 1]
    stored = {"kind": "char", "chars": "".join(sorted(characters, key=vocab.get))}
    if content["model"].get("byte_fallback"):
        stored["bytes"] = True
    elif kind == "BPE":
        stored = {"kind": "byte"}
    tokenizer = Tokenizer(stored)
    expected = tokenizer_to_json(tokenizer)
    same = vocab == expected["model"]["vocab"] and not content.get("added_tokens")
    for part in ("pre_tokenizer", "normalizer"):
        same = same and content.get(part) == expected[part]
    if not same:
        raise ValueError(f"it is {kind} without merges, and was not exported by Inkling")
    return tokenizer


def bpe_tokenizer(content: dict, exported: dict) -> Tokenizer:
    """A byte-level BPE in tiktoken's form."""
    model = content["model"]
    added = content.get("added_tokens") or []
    refuse_extras(model, added, content.get("normalizer"))
    pattern = pattern_from_json(content, exported)
    special = {token["content"]: token["id"] for token in added}
    vocab = {letters: value for letters, value in model["vocab"].items() if letters not in special}
    unknown = {letter for letters in vocab for letter in letters} - BYTES.keys()
    if unknown:
        raise ValueError(f"its vocabulary is not byte-level: it has {min(unknown)!r}")
    ranks = {to_bytes(letters): value for letters, value in vocab.items()}
    for value in range(256):
        if bytes([value]) not in ranks:
            raise ValueError(f"its vocabulary lacks byte {value:#04x}")
    check_merges(model, vocab, ranks)
    # Data sets that were prepared with tiktoken's gpt2 must have the very same tokenizer.
    is_gpt2 = pattern == GPT2_PATTERN and special == {END_OF_TEXT: 50_256} and len(ranks) == 50_256
    name = exported.get("name", "gpt2" if is_gpt2 else "bpe")
    return Tokenizer({"kind": "bpe", "name": name, "pattern": pattern, "special": special,
                      "ranks": rank_lines(ranks)})


def refuse_extras(model: dict, added: list, normalizer: dict | None):
    """Raise ValueError naming what tiktoken does not have."""
    extras = []
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            extras.append(f"{key}={model[key]!r}")
    if normalizer:
        extras.append(f"the normalizer {normalizer['type']}")
    for token in added:
        if not token["special"]:
            extras.append(f"the added token {token['content']!r} that is not special")
    if extras:
        raise ValueError(f"it has {', '.join(extras[:5])}")


def check_merges(model: dict, vocab: dict, ranks: dict):
    """Raise ValueError unless merging by ids, as tiktoken does, is the same as merging by the list
    of pairs."""
    listed = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    order = [vocab[left + right] for left, right in listed]
    pairs = {(to_letters(left), to_letters(right)) for left, right in merge_pairs(ranks)}
    complete = len(pairs) == len(ranks) - 256 or model.get("ignore_merges")
    if order != sorted(order) or not pairs <= set(listed) or not complete:
        raise ValueError("its merges are not in the order of its ids, as tiktoken needs them")


# -- the tokenizer of a directory ------------------------------------------------------------------

def load_tokenizer(folder: Path, hf: dict | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, with the tokens that begin and end a text. hf: what
    its config.json holds; None: read it."""
    folder = Path(folder)
    if hf is None:
        hf = optional_json(folder / "config.json")
    settings = optional_json(folder / "tokenizer_config.json")
    content = tokenizer_content(folder, settings)
    if content is None and hf.get("model_type") == "gpt2" and hf.get("vocab_size") == 50_257:
        return Tokenizer.build("gpt2", "")
    try:
        if content is None:
            raise ValueError(why_no_tokenizer(folder))
        drop_tokens_without_rows(content, hf.get("vocab_size"), folder)
        tokenizer = whole_or_plain_tokenizer(content, dict(settings.get("inkling") or {}))
        return with_ends(tokenizer, content, folder, hf, settings)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = str(error)
        if not isinstance(error, ValueError):
            reason = f"damaged ({type(error).__name__}: {error})"
        raise UserError(f"the tokenizer in {folder} cannot be used: {reason[:300]}; name another "
                        "with --tokenizer=NAME, one that tiktoken knows, or the path of a meta.json "
                        "or ckpt.pt that has it")


def optional_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is no file."""
    return read_json(path) if path.is_file() else {}


def why_no_tokenizer(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return ("tokenizer.model alone is not read: let transformers write tokenizer.json beside it "
                "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))")
    return "neither tokenizer.json nor vocab.json with merges.txt is there"


def drop_tokens_without_rows(content: dict, rows, folder: Path):
    """Take out of tokenizer.json's content the special tokens that the model has no row for, such as a
    <pad> that a training program added: no text becomes one."""
    vocab = content["model"]["vocab"]
    added = content.get("added_tokens") or []
    dropped = [token for token in added if type(rows) is int and token["id"] >= rows and token["special"]
               and token["content"] not in vocab]
    if dropped:
        content["added_tokens"] = [token for token in added if token not in dropped]
        names = ", ".join(repr(token["content"]) for token in dropped[:5])
        print(f"note     the model in {folder} has no row for {names}, which is left out", file=sys.stderr, flush=True)


def whole_or_plain_tokenizer(content: dict, exported: dict) -> Tokenizer:
    """A tokenizer of Inkling's own kinds if one of them gives the same ids, or else tokenizer.json
    as it is. Raises ValueError."""
    try:
        tokenizer = tokenizer_from_json(content, exported)
        if tokenizer.kind == "bpe":
            tokenizer.encode("Once")    # tiktoken reads the pattern here
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
        if not isinstance(error, ValueError):
            reason = f"damaged ({type(error).__name__}: {error})"
    try:
        return Tokenizer({"kind": "json", "json": json.dumps(content, ensure_ascii=False)})
    except ValueError as error:
        raise ValueError(f"{reason}; {error}") from None
    except UserError as error:          # the package is missing
        raise UserError(f"{reason}: {error}")


def tokenizer_content(folder: Path, settings: dict) -> dict | None:
    """What the directory's tokenizer.json holds, or what the older vocab.json and merges.txt amount
    to."""
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json")
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        return None
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    names = {END_OF_TEXT, *special_names(folder, settings)}
    prefix_space = bool(settings.get("add_prefix_space"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True}
    return {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": merges},
            "added_tokens": [added_token(name, vocab[name]) for name in sorted(names & vocab.keys(), key=vocab.get)],
            "pre_tokenizer": byte_level,
            "decoder": byte_level}


# -- the tokens that begin and end a text ----------------------------------------------------------

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def token_name(token) -> str | None:
    """The text of a token as tokenizer_config.json has it: by itself, or in an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def special_names(folder: Path, settings: dict) -> set:
    """The texts of the special tokens that the directory names."""
    roles = optional_json(folder / "special_tokens_map.json") | settings
    names = {token_name(roles.get(role)) for role in ROLES}
    names |= {token_name(token) for token in (settings.get("added_tokens_decoder") or {}).values()}
    return names - {None}


def with_ends(tokenizer: Tokenizer, content: dict, folder: Path, hf: dict, settings: dict) -> Tokenizer:
    """The tokenizer with the model's own end-of-text tokens, the first of which separates documents,
    and with the token that it was trained to see first."""
    ids = known_ids(content)
    roles = optional_json(folder / "special_tokens_map.json") | settings
    generation = optional_json(folder / "generation_config.json")
    candidates = [ids.get(token_name(roles.get("eos_token")))]
    for stated in (hf.get("eos_token_id"), generation.get("eos_token_id")):
        candidates += stated if isinstance(stated, list) else [stated]
    ends = [value for value in dict.fromkeys(candidates) if is_id(value, tokenizer)]
    stored = dict(tokenizer.stored)
    if ends and ends != [tokenizer.eot]:
        stored["eot"] = ends
    bos = first_id(content)
    if "post_processor" not in content and settings.get("add_bos_token") is True:
        bos = ids.get(token_name(roles.get("bos_token")))       # of vocab.json
    if is_id(bos, tokenizer):
        stored["bos"] = bos
    return Tokenizer(stored) if stored != tokenizer.stored else tokenizer


def known_ids(content: dict) -> dict:
    """The id of each token by its text."""
    vocab = content["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {token: value for value, (token, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def is_id(value, tokenizer: Tokenizer) -> bool:
    return type(value) is int and 0 <= value < tokenizer.vocab_size


def first_id(content: dict) -> int | None:
    """The id that transformers puts before every text. add_bos_token of tokenizer_config.json does
    not count beside a tokenizer.json."""
    for step in steps(content.get("post_processor")):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return step["cls"][1]
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            name = step["single"][0]["SpecialToken"]["id"]
            return step["special_tokens"][name]["ids"][0]
    return None


# -- the hub ---------------------------------------------------------------------------------------

def model_folder(name: str) -> Path:
    """The directory of one of NAMES in the Hugging Face cache, downloaded if it is not there."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(f"{name} needs the package huggingface_hub: pip install huggingface_hub")
    return cached_folder(name) or download_folder(name)


def cached_folder(name: str) -> Path | None:
    """A named model in the cache, under its present or its former name, if it has its weights."""
    from huggingface_hub import try_to_load_from_cache

    for repository in (f"openai-community/{name}", name):
        config = try_to_load_from_cache(repository, "config.json")
        for file in ("model.safetensors", "pytorch_model.bin"):
            weights = try_to_load_from_cache(repository, file)
            if isinstance(config, str) and isinstance(weights, str):
                return Path(weights).parent
    return None


def download_folder(name: str) -> Path:
    """Download a named model to the cache. Its weights come last: once they are there, the copy is
    complete."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{name} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids a "
                        "download: unset it, or set HF_HUB_CACHE to a cache that has the model")
    logging.set_verbosity_error()       # warnings of retries would bury the one line of the error
    revision = "main"
    for file in FILES:
        path = download_file(f"openai-community/{name}", file, revision)
        revision = path.parent.name     # the commit, in case a new one is published meanwhile
    return path.parent


def download_file(repository: str, file: str, revision: str) -> Path:
    """The path in the cache of a file of the hub, which must have the SHA-256 that the hub says."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    address = hf_hub_url(repository, file, revision=revision)
    print(f"downloading {address}", flush=True)
    try:
        path = Path(hf_hub_download(repository, file, revision=revision))
        check_sha256(path, get_hf_file_metadata(address).etag)
        return path
    except Exception as error:          # the hub's HTTP library differs between its versions
        if isinstance(error, OSError) and error.errno:          # the file system, not the network
            raise UserError(f"cannot use the cache {constants.HF_HUB_CACHE}: {error.strerror}: set "
                            "HF_HUB_CACHE to a folder that can be written and has room")
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"could not download {address} ({lines[0][:200]}): try again, or bring a "
                        f"folder with {', '.join(FILES)} here by other means and name it: "
                        "python convert.py import FOLDER --out=out/NAME")


def check_sha256(path: Path, etag: str | None):
    """Delete a file that arrived damaged. Large files have their SHA-256 as ETag; the hub itself
    compares sizes."""
    if re.fullmatch("[0-9a-f]{64}", etag or "") and sha256(path) != etag:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(f"its SHA-256 is not {etag[:12]}...")
