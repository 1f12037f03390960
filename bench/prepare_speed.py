"""How fast prepare.py tokenizes, beside tiktoken's own batch function and nanoGPT's way.

    python bench/prepare_speed.py
    python bench/prepare_speed.py --megabytes=64 --rounds=3 --text=FILE --threads=2

All take the same text (FILE again and again, to the size given) and the same number of threads or
processes, in turns, `rounds` times; the medians of the rates are printed, in megabytes of text a
second. `datasets.map` is Hugging Face's library, used as in nanoGPT's data/openwebtext/prepare.py:
encode_ordinary in `map` over processes, then a copy into a memmap. prepare.py's figure is for the
whole command: reading, splitting, tokenizing, checksums and writing.
"""

import contextlib
import importlib.util
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tiktoken
from common import flags, read_options

import prepare
from inkling.cli import NonNegativeInt, PositiveInt, UserError, run
from inkling.encode import cores, encode_pieces
from inkling.readers import cut_pieces
from inkling.tokenizer import Tokenizer

DOCUMENT = 5000                         # characters, about those of a web page


@dataclass
class Options:
    # -- what to measure
    megabytes: PositiveInt = 64         # of text; ten times as much for char and byte
    rounds: PositiveInt = 3             # of all of them in turn
    text: str = "data/fables/input.txt"  # what the text is made of
    threads: NonNegativeInt = 0         # or processes; 0: one per core


# -- ways to tokenize ----------------------------------------------------------------------------

def tiktoken_batch(documents: list, threads: int):
    tiktoken.get_encoding("gpt2").encode_ordinary_batch(documents, num_threads=threads)


def prepare_threads(documents: list, threads: int):
    """What prepare.py's threads do, alone."""
    pieces = (("train", number, text) for number, text in enumerate(documents))
    for _ in encode_pieces(pieces, Tokenizer.build("gpt2"), joiner=None, workers=threads):
        pass


def prepare_whole(text: Path, tokenizer: str, threads: int):
    """prepare.py from file to files."""
    prepare.main([str(text), *flags(name=tokenizer, tokenizer=tokenizer, workers=threads, data_dir=text.parent),
                  "--force"])


def datasets_map(documents: list, threads: int, folder: Path):
    """nanoGPT's way, with its settings: map, then a memmap written in 1024 batches (or fewer)."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(example):
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    table = datasets.Dataset.from_dict({"text": documents})
    tokenized = table.map(tokenize, remove_columns=["text"], num_proc=threads, load_from_cache_file=False)
    count = int(np.sum(tokenized["len"], dtype=np.uint64))
    ids = np.memmap(folder / "train.bin", np.uint16, "w+", shape=(count,))
    batches = min(1024, len(tokenized))
    first = 0
    for number in range(batches):
        batch = tokenized.shard(batches, number, contiguous=True).with_format("numpy")
        batch_ids = np.concatenate(batch["ids"])
        ids[first:first + len(batch_ids)] = batch_ids
        first += len(batch_ids)
    ids.flush()


# -- measuring -----------------------------------------------------------------------------------

def median_rates(ways: dict, size: float, rounds: int) -> dict:
    """{name: median megabytes a second}; the ways take turns."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                way()
            seconds[name].append(time.perf_counter() - began)
    return {name: size / 1e6 / median(times) for name, times in seconds.items()}


def read_text(path: str, size: int) -> str:
    """The file's text again and again, to at least `size` bytes. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"text={path}: {error.strerror}")
    return text * (size // max(1, len(text.encode())) + 1)


def measure_gpt2(text: str, folder: Path, threads: int, options: Options):
    documents = list(cut_pieces(text, DOCUMENT))
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    ways = {
        f"encode_ordinary_batch, {threads} threads": lambda: tiktoken_batch(documents, threads),
        f"prepare.py's threads alone, {threads}": lambda: prepare_threads(documents, threads),
        f"prepare.py gpt2, whole, {threads} threads": lambda: prepare_whole(path, "gpt2", threads),
    }
    if importlib.util.find_spec("datasets"):
        ways[f"datasets.map as in nanoGPT, {threads} processes"] = lambda: datasets_map(documents, threads, folder)
    else:
        print("datasets is not installed: nanoGPT's way is left out (pip install datasets)")
    size = len(text.encode())
    rates = median_rates(ways, size, options.rounds)
    print(f"gpt2 on {size / 1e6:,.0f} MB of {options.text} in {len(documents):,} documents, MB/s, medians of "
          f"{options.rounds}:")
    base = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"  {name:<46} {rate:7.1f}   {rate / base:5.2f} x")


def measure_characters(text: str, folder: Path):
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    size = len(text.encode())
    for tokenizer in ("char", "byte"):
        name = f"prepare.py {tokenizer}, whole, 1 thread"
        rates = median_rates({name: lambda tokenizer=tokenizer: prepare_whole(path, tokenizer, 1)}, size, 1)
        print(f"  {name:<46} {rates[name]:7.1f}")


def main(argv: list):
    options = read_options(Options, argv, __doc__)
    text = read_text(options.text, options.megabytes * 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        measure_gpt2(text, Path(folder), options.threads or cores(), options)
        measure_characters(10 * text, Path(folder))


if __name__ == "__main__":
    run(main)
