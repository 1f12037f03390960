"""Turn raw text into the token files that train.py reads.

    python prepare.py shakespeare_char          # built-in, downloaded once
    python prepare.py book.txt --name=book      # a token per character
    python prepare.py book.txt --name=words --tokenizer=bpe:4096
    python prepare.py texts/ more.jsonl.gz https://host/a.txt --name=all
    python prepare.py chats.jsonl --text_column=messages.text
    python prepare.py --check book              # every count, checksum and id
    python prepare.py --decode book > book.txt  # its text, train and then val
    python prepare.py --anchors book            # what a model has to beat
    python prepare.py --adopt FOLDER --tokenizer=gpt2   # of nanoGPT

The built-in sets are fables, fables_zh (in Chinese, a token per character) and fables_zh_cl100k
(the same text with OpenAI's cl100k_base), which are part of the repository, shakespeare_char,
shakespeare, verdict and tinystories. Any other input is a file, a folder, a glob, an address, a
pipe or - for standard input: plain text, .csv, .tsv, .json, .jsonl or .parquet, each also as .gz,
.xz, .bz2 or .zst, or in a .zip or .tar.

Writes data/NAME/train.bin and val.bin, raw arrays of token ids without a header (uint8 up to 256
different tokens, uint16 up to 65,536, else uint32), and meta.json with the tokenizer, counts and
checksums. The text is split first and tokenized afterwards, so that no token spans both sides.
Everything is read and written in pieces. A set of the same name stays usable until the new one is
complete: there is the old one or the new one, whatever happens.
"""

import codecs
import glob
import hashlib
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from inkling.anchors import anchor_lines, measure_anchors
from inkling.cli import FilePath, NonNegativeInt, UserError, at_least, check, parse, quoted, run, unescape
from inkling.dataset import (
    SPLITS,
    check_ids,
    commit_replacement,
    data_folder,
    finish_replacement,
    has_set,
    is_set_name,
    open_split,
    read_chunks,
    read_meta,
    remove_unfinished,
    split_files,
    token_dtype,
    write_meta,
)
from inkling.dedup import dedup_lines, find_duplicates
from inkling.download import DownloadFailed, download, fetch_address, is_address
from inkling.encode import SplitWriter, cores, encode_pieces
from inkling.files import ROOT, hold_folder, sha256
from inkling.format import counted, shell_word
from inkling.hints import (
    closest,
    command_for_training,
    files_near,
    flag_meant,
    nearest_first,
    set_name_like,
    sets_in,
    there_is,
)
from inkling.inputs import describe_source, expand, is_stream, plain_name, spool
from inkling.leaks import Leaks, find_leaks, leak_lines
from inkling.output import outlive_output
from inkling.readers import Reader, cut_pieces
from inkling.split import Survey, keeps_documents_whole, split_documents, survey_documents
from inkling.tokenizer import (
    BOUNDED,
    END_OF_TEXT,
    PATTERN,
    Tokenizer,
    bpe_size,
    stored_tokenizer,
    train_bpe,
)
from inkling.tokenizer_choice import MANY_CHARACTERS, best_tokenizer, choose_tokenizer

SHAKESPEARE = {
    "url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
VERDICT = {
    "url": "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
    "sha256": "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
}
# No SHA-256 of these stories is known here. Your own text may take their place:
# prepare.py TEXT --name=tinystories
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4"
STORIES = {"url": f"{TINYSTORIES}-train.txt", "val_url": f"{TINYSTORIES}-valid.txt"}
# The built-in sets: fields of Options, and where the text comes from. Without a url it is part of the
# repository: data/NAME/input.txt, or `file` in data/.
SETS = {
    "fables": {"tokenizer": "char"},
    "fables_zh": {"tokenizer": "char", "file": "fables_zh/input.csv"},
    "fables_zh_cl100k": {"tokenizer": "cl100k_base", "file": "fables_zh/input.csv"},
    "shakespeare_char": {"tokenizer": "char", **SHAKESPEARE},
    "shakespeare": {"tokenizer": "gpt2", **SHAKESPEARE},
    "verdict": {"tokenizer": "gpt2", **VERDICT},
    "tinystories": {"tokenizer": "bpe:32000", "separator": END_OF_TEXT, **STORIES},
}
Count = Annotated[int, at_least(0)]     # of bytes, characters or tokens, which may be more than 2**31
PositiveCount = Annotated[int, at_least(1)]


class TextEncodings:
    """The rule that a setting names an encoding of text."""

    def __contains__(self, name: str) -> bool:
        try:
            "".encode(name)             # refuses the codecs that are not for text
            codec = codecs.lookup(name)
        except (LookupError, ValueError):
            return False
        return codec.incrementaldecoder is not None and codec.name not in ("idna", "punycode")      # of host names

    def __str__(self) -> str:
        return "a text encoding, such as utf-8, latin-1 or gb18030"


@dataclass
class Options:
    # -- what to prepare
    name: str = ""                  # name of the set, a folder under data/; empty: the set's or the
                                    # file's own name
    tokenizer: FilePath = ""        # char | byte | auto: what suits the text | gpt2 | cl100k_base |
                                    # o200k_base | any other name that tiktoken knows | bpe:VOCAB,
                                    # trained on this text | a .tiktoken file | another set's
                                    # meta.json | a ckpt.pt; empty: the built-in set's own, char
                                    # for a file
    val_fraction: Annotated[float, at_least(0).below(1)] = 0.1  # fraction kept for validation: of a
                                    # single text, its last characters; of many documents, some
                                    # chosen by a seeded hash of their text
    val: FilePath = ""              # a separate text for validation; val_fraction is then ignored
    limit: Count = 0                # use only that many bytes of text, the first ones, for a trial;
                                    # 0: all
    seed: Annotated[int, at_least(0).below(2**63)] = 0  # of the hash that chooses documents for
                                    # validation
    data_dir: FilePath = ""         # folder that holds the sets; empty: data/ beside this file
    dedup: bool = False             # drop each document that is equal to an earlier one, or nearly so;
                                    # those of --val count as earlier
    force: bool = False             # prepare again although nothing has changed, and download again
    # -- how to read it
    format: Literal["auto", "text", "csv", "tsv", "json", "jsonl", "parquet"] = "auto"  # auto: by
                                    # the file's suffix
    text_column: str = ""           # column or field that holds the text, one document per row: a
                                    # name, a path of fields (messages.text), or the number of a
                                    # column in a table without a header; empty: a .csv or .tsv as
                                    # it is, and `text` of .json, .jsonl and .parquet
    delimiter: str = ""             # one character between the fields of a table; \t works; empty:
                                    # a tab in .tsv, in .csv a comma or what its first line shows
    separator: str = ""             # splits a plain text into documents and drops white space
                                    # around them; \n, \t, \r and \\ work
    encoding: Annotated[str, TextEncodings()] = "utf-8"  # of the text files
    newlines: Literal["convert", "keep"] = "convert"    # line ends of Windows (\r\n) and of old Macs
                                    # (\r): convert them to \n, or keep them
    errors: Literal["strict", "skip", "replace"] = "strict"  # what cannot be read: refuse it, leave
                                    # it out, or put U+FFFD for what is no character (rows are left
                                    # out)
    suffix: str = ""                # of the files to take from a folder, such as .py,.c; empty: all
                                    # known formats
    # -- tokenizers
    pattern: str = ""               # regular expression for a trained BPE or a .tiktoken file:
                                    # tokens stay within its matches; empty: GPT-4's
    bpe_sample: PositiveCount = 30_000_000  # characters of the training text to train a BPE on,
                                    # evenly spread over it
    min_count: PositiveCount = 1    # char: characters seen less often are rare
    rare: Literal["bytes", "refuse"] = "bytes"  # rare characters become the bytes of their UTF-8,
                                    # or are refused
    eot: bool = True                # put the end-of-text token between documents, where the
                                    # tokenizer has one
    joiner: str = r"\n"             # text between documents where no end-of-text token stands; \n, \t
                                    # work
    # -- how to write it
    shard_tokens: PositiveCount = 1_000_000_000  # a longer split is written as several files of
                                    # that many tokens, train_000.bin ...
    workers: NonNegativeInt = 0     # threads that tokenize; 0: one per core
    # -- something else instead
    check: bool = False             # verify the sets that are named: counts, types, checksums and
                                    # every id
    decode: bool = False            # write the text of the sets that are named to standard output
    anchors: bool = False           # measure the anchors of the sets that are named (how well simple
                                    # means predict val), and what of val stands in train; new sets
                                    # get both anyway
    adopt: bool = False             # take over folders with a train.bin and val.bin of uint16 ids
                                    # but no meta.json

    def rules(self) -> dict:
        takes_pattern = self.tokenizer.startswith("bpe:") or self.tokenizer.endswith(".tiktoken")
        return {
            f"min_count={self.min_count} must be 1 unless tokenizer=char":
                self.min_count == 1 or self.tokenizer in ("char", ""),
            f"pattern={self.pattern} must be given for bpe:VOCAB or a .tiktoken file only":
                not self.pattern or takes_pattern,
            f"delimiter={self.delimiter} must be a single character, no quote and no line break":
                len(self.delimiter) < 2 and self.delimiter not in tuple('"\r\n'),
        } | {
            f"{name}={getattr(self, name)} must be UTF-8": is_unicode(getattr(self, name))
            for name in ("text_column", "delimiter", "separator", "joiner", "pattern")
        }

    def remembered(self) -> dict:
        """What meta.json keeps beside the tokenizer and val_fraction: settings that shape the
        result and are not at their defaults."""
        names = ["limit", "dedup", "seed", "format", "text_column", "delimiter", "separator", "encoding", "newlines",
                 "errors", "pattern", "bpe_sample", "min_count", "rare", "eot", "joiner", "shard_tokens"]
        if self.tokenizer.endswith(("meta.json", ".pt")):   # what it holds may have the name of another
            names.append("tokenizer")
        return {field.name: getattr(self, field.name) for field in fields(self)
                if field.name in names and getattr(self, field.name) != field.default}


FIRST_IN_HELP = ("name", "tokenizer", "val_fraction", "text_column", "encoding", "limit", "check", "decode")


def is_unicode(text: str) -> bool:
    """Whether a text typed on the command line is one; bytes that are not UTF-8 arrive as half
    surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# -- built-in sets ---------------------------------------------------------------------------------

def set_options(name: str) -> dict:
    """The fields of Options that a built-in set has values for."""
    names = {field.name for field in fields(Options)}
    return {key: value for key, value in SETS[name].items() if key in names}


def is_pinned(name: str) -> bool:
    """Whether the text of a built-in set is known byte for byte, so that no other may have its
    name."""
    return "url" not in SETS[name] or "sha256" in SETS[name]


def fetch_set(name: str, folder: Path, again: bool = False) -> Path:
    """The raw text of a built-in set: part of the repository, already downloaded (for this set or
    for another with the same text), or downloaded now and compared with its SHA-256, where that is
    known."""
    source = SETS[name]
    if "url" not in source:
        return ROOT / "data" / source.get("file", f"{name}/input.txt")
    if "sha256" not in source:
        return fetch_unpinned(name, folder, source["url"], again)
    same_text = [folder.parent / other for other in SETS if SETS[other].get("url") == source["url"]]
    for path in [folder / "input.txt", *(other / "input.txt" for other in same_text)]:
        if not path.is_file():
            continue
        digest = sha256(path)
        if digest != source["sha256"]:
            raise UserError(f"{path} has SHA-256 {digest[:12]}..., the text of {name} has "
                            f"{source['sha256'][:12]}...: remove it, or prepare your own text with "
                            f"python prepare.py {path} --name=NAME")
        return path
    path = folder / "input.txt"
    try:
        download(source["url"], path, source["sha256"])
    except DownloadFailed as error:
        raise UserError(f"{error}; put that file at {path} by hand (after mkdir -p {folder}) and try again; python "
                        "train.py, which trains on the bundled fables, needs no network")
    return path


def fetch_unpinned(name: str, folder: Path, url: str, again: bool = False) -> Path:
    """A text whose SHA-256 is not known, in `folder`: there already, or downloaded."""
    path = folder / url.rpartition("/")[2]
    if path.is_file() and not again:
        print(f"note     {path} is there, {path.stat().st_size:,} bytes; no SHA-256 of it is known "
              "to compare with")
        return path
    try:
        download(url, path)
    except DownloadFailed as error:
        raise UserError(f"{error}; put that file at {path} by hand (after mkdir -p {folder}) and try again, or use "
                        f"your own text: python prepare.py TEXT --name={name}")
    return path


def prepare_named(name: str, /, data_dir: str = "", **typed):
    """Prepare a built-in set, with its own settings except those `typed` (fields of Options)."""
    target = typed.get("name") or name
    if target in SETS and target != name:
        raise UserError(f"name={target} belongs to a built-in set; choose another")
    given = {key: value for key, value in typed.items() if value != ""}
    options = Options(**set_options(name) | given | {"data_dir": data_dir})
    check(options)
    if options.val == "-" or is_address(options.val):
        raise UserError(f"val={options.val}: a built-in set takes a file")
    folder = data_folder(name, data_dir)
    with hold_folder(folder):
        text = fetch_set(name, folder, options.force)
        val = []
        if options.val:
            val = expand([options.val], options)
        elif "val_url" in SETS[name]:
            val = [fetch_unpinned(name, folder, SETS[name]["val_url"], options.force)]
    target_folder = data_folder(target, data_dir)
    with hold_folder(target_folder):
        write_set(target_folder, [text], options=options, val_sources=val)


def ensure_set(name: str, data_dir: str, ranks) -> Path:
    """The folder of a prepared set. If a built-in set is missing, the first of `ranks` prepares it
    and the others wait."""
    folder = data_folder(name, data_dir)
    missing = ranks.broadcast(not has_set(folder))
    if not missing:
        return folder
    if name not in SETS:
        raise UserError(f"no data set in {folder}: {way_to_a_set(name, folder.parent)}")
    if ranks.first:
        try:
            prepare_named(name, data_dir)
        except OSError as error:
            raise UserError(f"could not prepare {name} in {folder}: {error.strerror or error}")
    ranks.broadcast(None)               # it is there
    return folder


def way_to_a_set(name: str, folder: Path) -> str:
    """What to do where there is no set of that name in `folder`, which holds the sets."""
    there = sorted({*sets_in(folder), *SETS})
    listed = there_is(name, there, most=len(there))
    if os.path.isfile(name):
        return f"{name} is a file: {command_for_training(name)}{listed}"
    meant = closest(name, there)
    guess = f"did you mean --dataset={meant}? " if meant else ""
    return f"{guess}python prepare.py YOUR_TEXT_FILE --name={name} makes it{listed}"


# -- the documents ---------------------------------------------------------------------------------

@dataclass
class Corpus:
    """The documents of a set, surveyed; `pieces` reads them again from the files."""

    reader: Reader
    val_reader: Reader                  # of a separate text for validation, if there is one
    survey: Survey                      # of the text, with the character counts of both
    val_documents: int                  # in a separate text for validation
    val_fraction: float                 # 0 if there is a text for validation
    seed: int

    def pieces(self, doing: str):
        """Yield (split, document, piece) of the whole text. doing: what the progress line says."""
        self.reader.doing = doing
        self.val_reader.doing = doing
        yield from split_documents(self.reader, self.survey, self.val_fraction, self.seed)
        for number, _, piece, _ in self.val_reader:
            yield "val", number, piece

    def are_whole(self) -> bool:
        """Whether each document is whole in train or in val."""
        return self.val_documents > 0 or keeps_documents_whole(self.survey.documents, self.val_fraction)

    def has_joints(self) -> bool:
        """Whether documents may follow one another in a split."""
        return self.survey.documents > 1 or self.val_documents > 1

    def converted_line_ends(self) -> int:
        """How many line ends have become \\n."""
        return self.reader.line_ends.changed + self.val_reader.line_ends.changed


def survey_corpus(paths: list, val_paths: list, options: Options) -> Corpus:
    """Read everything once, to count what the split and the tokenizer depend on."""
    is_char = options.tokenizer in ("char", "", "auto")
    reader = Reader(paths, options)
    val_reader = Reader(val_paths, options)
    if options.dedup:
        drop_duplicates([val_reader, reader])
    survey = survey_text(reader, options, is_char)
    val_fraction = options.val_fraction
    val_documents = 0
    if val_paths:
        val_fraction = 0
        val_survey = survey_text(val_reader, options, is_char, "validation text")
        survey.counts += val_survey.counts
        val_documents = val_survey.documents
    corpus = Corpus(reader, val_reader, survey, val_documents, val_fraction, options.seed)
    if converted := corpus.converted_line_ends():
        # A limit may end the text before the end of what was read.
        count = "the" if options.limit else f"{converted:,}"
        print(f"note     {count} line ends \\r\\n or \\r became \\n (--newlines=keep leaves them)")
    return corpus


def survey_text(reader: Reader, options: Options, count_characters: bool, what: str = "text") -> Survey:
    """Read the documents of a reader once, and say what was noticed in them."""
    survey = survey_documents(reader, options.seed, count_characters)
    for line in reader.remarks.lines():
        print(f"note     {line}")
    if not survey.characters:
        raise UserError(f"{', '.join(map(str, reader.paths))}: no {what} in there")
    if reader.empty:
        print(f"note     {counted(reader.empty, 'empty document')} passed over")
    return survey


def drop_duplicates(readers: list):
    """--dedup: let the readers pass over documents that are equal or nearly equal to an earlier one."""
    for reader in readers:
        reader.doing = "comparing the documents of"
    duplicates = find_duplicates(readers)
    for reader, keep in zip(readers, duplicates.keep, strict=True):
        reader.keep = keep
        reader.doing = "reading"
    for line in dedup_lines(duplicates):
        print(f"note     {line}")


def note_same_content(paths: list, sources: list):
    """Say which files have the same content. sources: of each path, what describe_source says."""
    first = {}
    for path, source in zip(paths, sources, strict=True):
        other = first.setdefault(source["sha256"], path)
        if other is not path and source["bytes"]:
            print(f"note     {path} and {other} have the same content; both are taken")


# -- the tokenizer ---------------------------------------------------------------------------------

def existing_tokenizer(options: Options) -> Tokenizer | None:
    """The tokenizer that `options` name; None if it is made from the text."""
    if options.tokenizer in ("char", "", "auto") or bpe_size(options.tokenizer):
        return None
    return Tokenizer.build(options.tokenizer, "", options.pattern)


def settle_tokenizer(options: Options, survey: Survey) -> Options:
    """The options with a tokenizer in place of auto, which is said; where none was given, say which other one would
    serve the text better."""
    if options.tokenizer not in ("auto", ""):
        return options
    if options.tokenizer == "auto":
        name, reason = choose_tokenizer(survey.counts)
        print(f"note     --tokenizer=auto takes {name}: {reason}")
        return replace(options, tokenizer=name)
    name, reason = best_tokenizer(survey.counts)
    if name != "char" and np.count_nonzero(survey.counts) <= MANY_CHARACTERS:      # of more, another note says it
        print(f"note     --tokenizer=auto would take {name}: {reason}")
    return options


def make_tokenizer(corpus: Corpus, options: Options) -> Tokenizer:
    """The characters of the text, or a BPE trained on it."""
    if options.tokenizer in ("char", ""):
        return char_tokenizer(corpus.survey, options, unescape(options.joiner) if corpus.has_joints() else "")
    share = options.bpe_sample / corpus.survey.characters
    texts = sample_training_text(corpus.pieces("training the tokenizer on"), share)
    return train_bpe(options.tokenizer, texts, options.pattern or PATTERN)


def char_tokenizer(survey: Survey, options: Options, joiner: str) -> Tokenizer:
    """The tokenizer of the characters that occur often enough, and of those in `joiner`. Says what
    becomes of the rare ones."""
    tokenizer = Tokenizer.build("char", survey.characters_seen(options.min_count) + joiner)
    chars = tokenizer.stored["chars"]
    rare = sorted(set(survey.characters_seen()) - set(chars))
    if rare:
        times = sum(int(survey.counts[ord(char)]) for char in rare)
        examples = " ".join(map(repr, rare[:10])) + (" ..." if len(rare) > 10 else "")
        if options.rare == "refuse":
            raise UserError(f"{len(rare):,} characters occur less than "
                            f"min_count={options.min_count} times ({examples}): remove them, lower "
                            "--min_count, or let --rare=bytes spell them in bytes")
        print(f"note     {len(rare):,} rare characters ({times:,} times in all) are spelled in "
              f"bytes: {examples}")
        tokenizer = Tokenizer(tokenizer.stored | {"bytes": True})
    if len(chars) > MANY_CHARACTERS:
        hint = ", --min_count=5 spells rare characters in bytes" if options.min_count == 1 else ""
        print(f"note     {len(chars):,} different characters are a large vocabulary of mostly "
              f"rare tokens: --tokenizer=bpe:4096 learns a smaller one from this text{hint}")
    return tokenizer


def sample_training_text(split_pieces, share: float):
    """Yield an evenly spread share of the characters that go to train."""
    seen = 0
    taken = 0
    for split, _, piece in split_pieces:
        if split != "train":
            continue
        for text in cut_pieces(piece, BOUNDED):
            if taken <= seen * share:
                taken += len(text)
                yield text
            seen += len(text)


# -- writing a set ---------------------------------------------------------------------------------

def write_set(folder: Path, paths: list, tokenizer_name: str = "", val_fraction: float = 0.1,
              options: Options | None = None, val_sources: list = ()) -> dict:
    """Tokenize the files `paths` into `folder`; returns what meta.json says. Each file is one
    document, or as many as its rows or separators make; between documents stands the end-of-text
    token where the tokenizer has one, and else the joiner. `options` replaces tokenizer_name and
    val_fraction. val_sources: files for validation alone.

    Only one process at a time may do this in a folder (hold_folder)."""
    options = options or Options(tokenizer=tokenizer_name, val_fraction=val_fraction)
    finish_replacement(folder)
    tokenizer = existing_tokenizer(options)
    origin = describe_origin(paths, val_sources, options)
    if not options.force and is_unchanged(folder, origin, options.tokenizer or "char", tokenizer):
        print(f"{folder}: nothing has changed since it was prepared (--force prepares it again)",
              flush=True)
        meta = read_meta(folder)
        line_break = stored_tokenizer(folder, meta).line_break
        if options.newlines == "convert" and line_break != "\n":
            print(f"note     it has line ends {line_break!r}, as its text has: --force prepares it again "
                  "with \\n")
        return meta
    if not options.dedup:
        note_same_content([*paths, *val_sources], origin["sources"] + origin.get("val_sources", []))

    corpus = survey_corpus(paths, val_sources, options)
    options = settle_tokenizer(options, corpus.survey)
    if tokenizer is None:               # auto may have become byte
        tokenizer = existing_tokenizer(options) or make_tokenizer(corpus, options)
    joiner = choose_joiner(corpus, tokenizer, options)
    try:
        writers, used = write_token_files(folder, corpus, tokenizer, joiner, options)
        meta = {
            "format": 1,
            "dtype": token_dtype(tokenizer.vocab_size).name,
            "vocab_size": tokenizer.vocab_size,
            "val_fraction": options.val_fraction,
            "splits": {split: writer.entry() for split, writer in writers.items()},
            "tokenizer": tokenizer.stored,
        }
        meta |= {key: value for key, value in origin.items() if key not in meta}
        meta |= describe_text(corpus, joiner)
        if anchors := find_anchors(folder, meta, tokenizer, ".tmp"):
            meta["anchors"] = anchors
        leaks = find_leaks(folder, meta, tokenizer, ".tmp")
        commit_replacement(folder, meta)
    finally:
        remove_unfinished(folder)       # nothing, once the new set has been committed
    report(folder, meta, options.tokenizer or "char", len(corpus.survey.characters_seen()), used)
    report_documents(corpus, writers, tokenizer, joiner)
    print_judgement(anchors, leaks, meta)
    print_next(folder, meta, options.tokenizer)
    return meta


def find_anchors(folder: Path, meta: dict, tokenizer: Tokenizer, suffix: str = "") -> dict:
    """The anchors of the set in `folder`, which `meta` describes; empty if a split is. suffix: as
    `open_split` takes it."""
    data = {split: open_split(folder, meta, split, suffix) for split in SPLITS}
    return measure_anchors(data, meta, tokenizer)


def print_judgement(anchors: dict, leaks: Leaks | None, meta: dict):
    """What a model has to beat, and what makes val easier than it should be; nothing where a split is
    empty."""
    if anchors:
        print("\n".join(anchor_lines(anchors)), flush=True)
    if leaks:
        can_dedup = meta.get("whole_documents", False) and not meta.get("options", {}).get("dedup")
        print("\n".join(leak_lines(leaks, can_dedup)), flush=True)


def choose_joiner(corpus: Corpus, tokenizer: Tokenizer, options: Options) -> str | None:
    """The text between documents; None: the end-of-text token."""
    if options.eot and tokenizer.eot is not None:
        return None
    joiner = unescape(options.joiner)
    if corpus.has_joints():
        try:
            tokenizer.encode(joiner)
        except ValueError as error:
            raise UserError(f"the joiner {quoted(joiner)} cannot stand between documents: {error}; give another "
                            "--joiner, or none (--joiner=)")
    return joiner


def describe_text(corpus: Corpus, joiner: str | None) -> dict:
    """What meta.json says beside `describe_origin`, where there is something to say."""
    described = {}
    if corpus.converted_line_ends():
        described["newlines"] = "converted"
    if corpus.has_joints() and joiner is not None:
        described["joiner"] = joiner
    if corpus.has_joints() and corpus.are_whole():
        described["whole_documents"] = True             # none is cut between train and val
    return described


def report_documents(corpus: Corpus, writers: dict, tokenizer: Tokenizer, joiner: str | None):
    """Say how many documents there are, where they are, and what stands between them."""
    if not corpus.has_joints():
        return
    files = counted(len(corpus.reader.paths) + len(corpus.val_reader.paths), "file")
    total = corpus.survey.documents + corpus.val_documents
    between = text_between(tokenizer, joiner).decode("utf-8", "replace")
    if joiner is not None:
        between = quoted(joiner) if joiner else "nothing"
    if corpus.are_whole():
        where = f"{writers['train'].documents:,} in train, {writers['val'].documents:,} in val"
        if not corpus.val_documents:
            where += " by a seeded hash"
    elif corpus.val_fraction:
        where = "the end of each in val"
    else:
        where = "all in train"
    print(f"  {total:,} documents of {files}: {where}; between them stands {between}")


def describe_origin(paths: list, val_paths: list, options: Options) -> dict:
    """What a set is made of and how, as meta.json says it: if that is the same again, so is the
    set."""
    origin = {"val_fraction": options.val_fraction}
    origin["sources"] = [describe_source(path, options.limit) for path in paths]
    if val_paths:
        origin["val_sources"] = [describe_source(path, options.limit) for path in val_paths]
    if options.remembered():
        origin["options"] = options.remembered()
    return origin


def is_unchanged(folder: Path, origin: dict, tokenizer_name: str, tokenizer: Tokenizer | None) -> bool:
    """Whether `folder` holds a complete set of that origin."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        stored = meta["tokenizer"]
        if tokenizer:
            same_tokenizer = stored == tokenizer.stored
        else:
            same_tokenizer = tokenizer_name in ("auto", stored.get("name", stored["kind"]))
        keys = ("val_fraction", "sources", "val_sources")
        same_origin = all(meta.get(key) == origin.get(key) for key in keys) and same_options(meta, origin)
        item_size = np.dtype(meta["dtype"]).itemsize
        complete = all((folder / name).stat().st_size == tokens * item_size
                       for split in SPLITS for name, tokens, _ in split_files(meta, split))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return same_tokenizer and same_origin and complete


def same_options(meta: dict, origin: dict) -> bool:
    """Whether a set was made with the same settings. A set from before --newlines has the line ends of
    its text, as one made with --newlines=keep, and stays as it is with either."""
    stored = meta.get("options", {})
    wanted = origin.get("options", {})
    if "newlines" not in stored and "newlines" not in meta:
        wanted = {key: value for key, value in wanted.items() if key != "newlines"}
    return stored == wanted


def write_token_files(folder: Path, corpus: Corpus, tokenizer: Tokenizer, joiner: str | None,
                      options: Options) -> tuple:
    """Tokenize the corpus into new token files beside the old ones, NAME.bin.tmp. Returns (the
    SplitWriters, the fraction of the vocabulary that is used)."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)                           # left by a process that was killed
    used = np.zeros(tokenizer.vocab_size, bool)
    with ExitStack() as files:
        writers = {split: SplitWriter(folder, split, options.shard_tokens, files) for split in SPLITS}
        try:
            pieces = corpus.pieces("tokenizing")
            for encoded in encode_pieces(pieces, tokenizer, joiner, options.workers or cores()):
                writers[encoded.split].write(encoded)
                used[encoded.ids] = True
        except ValueError as error:  # the tokenizer lacks a character, or its pattern skips some
            way_out = ""
            if tokenizer.kind == "char":
                way_out = ("; replace them in the text, or prepare the first text anew with --tokenizer=byte, which "
                           "knows all")
            raise UserError(f"{', '.join(map(str, corpus.reader.paths))}: {error}{way_out}")
        for writer in writers.values():
            writer.finish()
    return writers, float(used.mean())


def report(folder: Path, meta: dict, tokenizer_name: str, distinct: int, used: float):
    """Say what was written. distinct: number of different characters, 0 if not known; used:
    fraction of the vocabulary that occurs."""
    splits = meta["splits"]
    total = {key: splits["train"][key] + splits["val"][key] for key in ("characters", "bytes", "tokens")}
    counts = f"{total['characters']:,} characters"
    if distinct:
        counts += f", {distinct:,} distinct"
    tokens = ", ".join(f"{files_in_words(split, splits[split])} {splits[split]['tokens']:,} tokens"
                       for split in SPLITS)
    print(f"{folder}: {counts}\n"
          f"  {tokens}, {meta['dtype']}\n"
          f"  tokenizer {tokenizer_name}: {meta['vocab_size']:,} tokens in the vocabulary, {used:.1%} of them "
          f"used, {total['bytes'] / total['tokens']:.2f} bytes per token", flush=True)
    ways_out = {"train": "bring more text", "val": "raise --val_fraction or give --val"}
    for split, way_out in ways_out.items():
        if not splits[split]["tokens"]:
            print(f"note     {split} is empty, and train.py needs both: {way_out}")


def print_next(folder: Path, meta: dict, tokenizer: str = ""):
    """Print the command that trains on this set; with a checkpoint's `tokenizer`, from its weights."""
    if not all(meta["splits"][split]["tokens"] for split in SPLITS):
        return
    place = folder.resolve()
    elsewhere = ""
    if place.parent != ROOT / "data":
        elsewhere = f" --data_dir={shell_word(str(place.parent))}"
    weights = ""
    if tokenizer.endswith(".pt"):
        weights = f" --init_from={shell_word(tokenizer)}"
    print(f"next     python train.py --dataset={place.name}{elsewhere}{weights}", flush=True)


def files_in_words(split: str, entry: dict) -> str:
    """train.bin, or train_000.bin to _004.bin."""
    if "shards" not in entry:
        return f"{split}.bin"
    return f"{split}_000.bin to _{len(entry['shards']) - 1:03}.bin"


# -- existing sets ---------------------------------------------------------------------------------

def text_sizes(tokenizer: Tokenizer) -> dict:
    """How many characters and bytes of the text each id stands for, (vocab_size,) each; end-of-text
    stands for none."""
    is_text = np.ones(tokenizer.vocab_size, bool)
    for value in (tokenizer.eot, tokenizer.bos):
        if value is not None:
            is_text[value] = False
    # A byte of the form 10xxxxxx continues a character; any other begins one.
    characters = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in tokenizer.pieces])
    return {"characters": characters * is_text, "bytes": tokenizer.lengths * is_text}


class Scan:
    """Reads the files of a split and adds up what is in them. sizes: from text_sizes."""

    def __init__(self, split: str, sizes: dict, vocab_size: int):
        self.split = split
        self.sizes = sizes
        self.counts = dict.fromkeys(sizes, 0)
        self.used = np.zeros(vocab_size, bool)          # which ids occur
        self.beginning = []                             # the first ids of the last file

    def read(self, path: Path, dtype: str) -> str:
        """Check and count every id of a file; returns its SHA-256."""
        digest = hashlib.sha256()
        self.beginning = []
        for ids in read_chunks(path, dtype):
            check_ids(ids, len(self.used), self.split)
            digest.update(ids)
            self.beginning = self.beginning or ids[:30].tolist()
            self.used[ids] = True
            for what, size in self.sizes.items():
                self.counts[what] += int(size[ids].sum())
        return digest.hexdigest()


def check_set(folder: Path):
    """Read a whole set and compare it with its meta.json."""
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    sizes = text_sizes(tokenizer)
    joiner = meta.get("joiner", "")
    joiner_sizes = {"characters": len(joiner), "bytes": len(joiner.encode("utf-8"))}
    for split in SPLITS:
        open_split(folder, meta, split)                 # checks the files' sizes
        scan = Scan(split, sizes, meta["vocab_size"])
        joiners = meta["splits"][split].get("joiners", 0)
        for name, tokens, expected in split_files(meta, split):
            if scan.read(folder / name, meta["dtype"]) != expected:
                raise UserError(f"{folder / name} differs from its checksum in meta.json: prepare "
                                f"{folder.name} again")
            print(f"{folder}/{name}: {tokens:,} tokens of {meta['dtype']}, as meta.json says; "
                  f"it begins {quoted(tokenizer.decode(scan.beginning)[:60])}")
        for what, count in scan.counts.items():
            stated = meta["splits"][split].get(what)
            of_documents = count - joiners * joiner_sizes[what]
            if tokenizer.exact and of_documents != stated:
                raise UserError(f"{folder / 'meta.json'} says {stated} {what} of {split}, its ids "
                                f"stand for {of_documents:,}: prepare {folder.name} again")


def renew_anchors(folder: Path):
    """--anchors: measure the anchors of a prepared set, add them to its meta.json, and say what of val
    stands in train."""
    read_meta(folder)                                   # before a folder that is none is made
    with hold_folder(folder):
        meta = read_meta(folder)
        tokenizer = stored_tokenizer(folder, meta)
        anchors = find_anchors(folder, meta, tokenizer)
        if not anchors:
            raise UserError(f"{folder}: anchors need text in train and in val: raise --val_fraction or give --val")
        write_meta(folder, meta | {"anchors": anchors})
    print_judgement(anchors, find_leaks(folder, meta, tokenizer), meta)


def text_between(tokenizer: Tokenizer, joiner: str | None) -> bytes:
    """What stands between documents: the joiner, or the end-of-text token."""
    if joiner is None:
        return b"" if tokenizer.eot is None else tokenizer.pieces[tokenizer.eot]
    return joiner.encode("utf-8")


def decode_set(folder: Path):
    """Write a set's text, train and then val, to standard output, as it was read, with what stands
    between documents."""
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    for split in SPLITS:
        both = all(meta["splits"][name]["tokens"] for name in SPLITS)
        if split == "val" and both and meta.get("whole_documents"):
            sys.stdout.buffer.write(text_between(tokenizer, meta.get("joiner")))
        open_split(folder, meta, split)                 # checks the files' sizes
        previous = None
        for name, _, _ in split_files(meta, split):
            for ids in read_chunks(folder / name, meta["dtype"]):
                check_ids(ids, meta["vocab_size"], split)
                sys.stdout.buffer.write(tokenizer.document_bytes(ids.tolist(), previous))
                previous = int(ids[-1])
    sys.stdout.buffer.flush()


def adopt_set(folder: Path, options: Options):
    """Write the meta.json of a folder that holds nanoGPT's train.bin and val.bin (uint16, without a
    header)."""
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder}{there_is(str(folder), files_near(str(folder)))}")
    place = folder.resolve()
    if has_set(folder) and not options.force:
        raise UserError(f"{folder} has a meta.json already: python prepare.py --check {place.name} "
                        f"--data_dir={place.parent} (--force writes it again)")
    tokenizer = existing_tokenizer(options)
    if tokenizer is None:
        raise UserError(f"tokenizer={options.tokenizer}: name the one that made the ids, such as "
                        "--tokenizer=gpt2; ids of characters or of a BPE trained elsewhere say "
                        "nothing without it (prepare the text again)")
    if token_dtype(tokenizer.vocab_size) != np.uint16:
        raise UserError(f"nanoGPT's ids are uint16, those of {options.tokenizer} are "
                        f"{token_dtype(tokenizer.vocab_size)}: prepare the text again")
    splits, used = count_adopted(folder, tokenizer)
    total = sum(entry["tokens"] for entry in splits.values())
    if not total:
        raise UserError(f"{folder}: no tokens in there")
    meta = {
        "format": 1,
        "dtype": "uint16",
        "vocab_size": tokenizer.vocab_size,
        "splits": splits,
        "val_fraction": splits["val"]["tokens"] / total,
        "tokenizer": tokenizer.stored,
        "sources": [],
    }
    write_meta(folder, meta)
    report(folder, meta, options.tokenizer, 0, used)
    beginning = tokenizer.decode(np.fromfile(folder / "train.bin", np.uint16, 30))[:60]
    print(f"  it begins {quoted(beginning)}: if that is not text, the ids are another tokenizer's\n"
          f"  python train.py --dataset={place.name} --data_dir={place.parent}")


def count_adopted(folder: Path, tokenizer: Tokenizer) -> tuple:
    """(what meta.json says of the splits, the fraction of the vocabulary that is used) of nanoGPT's
    files."""
    sizes = text_sizes(tokenizer)
    used = np.zeros(tokenizer.vocab_size, bool)
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size % 2:
            raise UserError(f"{path} is missing, or not an array of uint16")
        scan = Scan(split, sizes, tokenizer.vocab_size)
        digest = scan.read(path, "uint16")
        splits[split] = {"tokens": path.stat().st_size // 2, **scan.counts, "sha256": digest}
        used |= scan.used
    return splits, float(used.mean())


# -- the command -----------------------------------------------------------------------------------

def main(argv: list):
    parsed = parse(Options, argv, __doc__, takes="words", first=FIRST_IN_HELP)
    options = Options(**parsed.values)
    options.separator = unescape(options.separator)
    options.delimiter = unescape(options.delimiter)
    check(options)
    if not parsed.words:
        raise UserError(f"name a built-in set ({', '.join(SETS)}) or text files; see --help")
    if not (options.check or options.decode or options.anchors):
        outlive_output()
    try:
        follow(parsed.words, options, typed={name: getattr(options, name) for name in parsed.values})
    except OSError as error:  # a full disk, a name too long, a file where a folder should be
        raise UserError(f"{error.filename or 'could not write'}: {error.strerror or error}")


def follow(words: list, options: Options, typed: dict):
    """Do what the command says. typed: the settings that were given."""
    if options.adopt:
        for word in words:
            adopt_set(Path(word), options)
    elif options.check:
        for word in words:
            check_set(data_folder(word, options.data_dir))
    elif options.anchors:
        for word in words:
            renew_anchors(data_folder(word, options.data_dir))
    elif options.decode:
        for word in words:
            decode_set(data_folder(word, options.data_dir))
    elif len(words) == 1 and words[0] in SETS and not Path(words[0]).is_file():
        prepare_named(words[0], **typed)
    else:
        prepare_texts(words, options, typed)


def prepare_texts(words: list, options: Options, typed: dict):
    """Prepare a set from the user's own texts."""
    check_inputs(words, options)
    name = choose_name(words, options)
    if name in SETS:                    # its settings fit texts of its kind
        options = Options(**set_options(name) | typed)
    folder = data_folder(name, options.data_dir)
    with hold_folder(folder), ExitStack() as spooled:
        paths = resolve_inputs(words, folder, options, spooled)
        val_paths = resolve_inputs([options.val] if options.val else [], folder, options, spooled)
        write_set(folder, paths, options=options, val_sources=val_paths)


def check_inputs(words: list, options: Options):
    """Raise a UserError if an input cannot be one."""
    if "-" in words and options.val == "-":
        raise UserError("standard input is one text: INPUT or --val, not both")
    for word in words:
        if not (word == "-" or is_address(word) or os.path.lexists(word) or glob.glob(word, recursive=True)):
            if flag := flag_meant(word, {field.name for field in fields(Options)}):
                raise UserError(f"no file {word}; as a flag, write {flag}")
            phrase = " ".join(words)
            if os.path.exists(phrase):
                name = options.name or set_name_like(plain_name(phrase))
                raise UserError(f"no file {word}: a name with spaces goes in quotes: "
                                f"python prepare.py {shell_word(phrase)} --name={name}")
            there = there_is(word, files_near(word))
            raise UserError(f"no file {word}{there}; the built-in sets are {', '.join(nearest_first(word, SETS))}")


def choose_name(words: list, options: Options) -> str:
    """The name of the set: as given, or that of its only file."""
    name = options.name or plain_name(words[0])
    has_name = len(words) == 1 and is_set_name(name) and name not in SETS
    if not options.name and any(map(is_stream, words)):
        raise UserError("give the set a name: --name=NAME")
    command = f"python prepare.py {' '.join(map(shell_word, words))}"
    if not options.name and not has_name:
        example = "NAME"
        if len(words) == 1:
            example = f"my_{name}" if name in SETS else set_name_like(name)
        raise UserError(f"give the set a name: {command} --name={example}")
    if not is_set_name(name):
        raise UserError(f"{name!r} is not a valid data set name: use letters, digits and . _ -, starting with a "
                        f"letter or digit, such as {command} --name={set_name_like(name)}")
    if name in SETS and is_pinned(name):
        raise UserError(f"name={name} belongs to a built-in set; choose another")
    return name


def resolve_inputs(words: list, folder: Path, options: Options, spooled: ExitStack) -> list:
    """The files that the inputs name. Standard input, pipes and downloads become files in `folder`;
    when `spooled` closes, all but the last are removed."""
    files = []
    for word in words:
        if is_stream(word):
            path = spool(word, folder)
            spooled.callback(path.unlink, missing_ok=True)
            files.append(path)
        elif is_address(word):
            files.append(fetch_address(word, folder, options.force))
        else:
            files.append(word)
    return expand(files, options)


if __name__ == "__main__":
    run(main)
