"""How fast prepare.py tokenizes, beside tiktoken's own batch function and the way nanoGPT prepares its texts.

    python bench/prepare_speed.py [--megabytes=64] [--rounds=3] [--text=FILE] [--threads=0]

All take the same text (FILE again and again, to the size given) and the same number of threads or processes, in turns,
`rounds` times; the medians of the rates are printed, in megabytes of text a second. `datasets.map` is Hugging Face's
library, used as in nanoGPT's data/openwebtext/prepare.py: encode_ordinary in `map` over processes, then a copy into a
memmap. prepare.py's figure is for the whole command: reading, splitting, tokenizing, checksums and writing.
"""

import contextlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inkling.cli import fail, parse, run  # noqa: E402
from inkling.encode import cores, encode_pieces  # noqa: E402
from inkling.readers import cut_pieces  # noqa: E402
from inkling.tokenizer import Tokenizer  # noqa: E402
from prepare import Options as Preparing  # noqa: E402
from prepare import write_set  # noqa: E402

DOCUMENT = 5000                         # characters, about those of a web page


@dataclass
class Options:
    # -- what to measure
    megabytes: int = 64                 # of text; ten times as much for char and byte
    rounds: int = 3                     # of all of them in turn
    text: str = "data/fables/input.txt"  # what the text is made of
    threads: int = 0                    # or processes; 0: one per core


def batch(documents: list, threads: int, folder: Path):
    """tiktoken's encode_ordinary_batch alone."""
    tokenizer("gpt2").encode_ordinary_batch(documents, num_threads=threads)


def arrays(documents: list, threads: int, folder: Path):
    """What prepare.py's threads do, alone."""
    own = Tokenizer.build("gpt2")
    for _ in encode_pieces((("train", number, text) for number, text in enumerate(documents)), own, True, threads):
        pass


def mapped(documents: list, threads: int, folder: Path):
    """nanoGPT's way, with its settings: map, then a memmap written in 1024 batches (or fewer)."""
    import datasets
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    encoding = tokenizer("gpt2")

    def process(example):
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    table = datasets.Dataset.from_dict({"text": documents})
    done = table.map(process, remove_columns=["text"], num_proc=threads, load_from_cache_file=False)
    ids = np.memmap(folder / "train.bin", np.uint16, "w+", shape=(int(np.sum(done["len"], dtype=np.uint64)),))
    at, shards = 0, min(1024, len(done))
    for index in range(shards):
        part = done.shard(shards, index, contiguous=True).with_format("numpy")
        joined = np.concatenate(part["ids"])
        ids[at:at + len(joined)] = joined
        at += len(joined)
    ids.flush()


def whole(documents: list, threads: int, folder: Path, name: str = "gpt2"):
    """prepare.py from file to files."""
    write_set(folder / name, [folder / "text.txt"], options=Preparing(tokenizer=name, workers=threads, force=True))


def tokenizer(name: str):
    import tiktoken
    return tiktoken.get_encoding(name)


def rates(ways: dict, size: float, rounds: int) -> dict:
    """Median megabytes a second of each way, taken in turns."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                way()
            seconds[name].append(time.perf_counter() - start)
    return {name: size / 1e6 / median(taken) for name, taken in seconds.items()}


def main(argv: list):
    options = Options(**parse(Options, argv, __doc__, takes="words").values)
    threads = options.threads or cores()
    try:
        text = Path(options.text).read_text(encoding="utf-8")
    except OSError as error:
        fail(f"text={options.text}: {error.strerror}")
    text = text * (options.megabytes * 1_000_000 // len(text.encode()) + 1)
    documents = list(cut_pieces(text, DOCUMENT))
    size = len(text.encode())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
        ways = {f"encode_ordinary_batch, {threads} threads": lambda: batch(documents, threads, folder),
                f"prepare.py's threads alone, {threads}": lambda: arrays(documents, threads, folder),
                f"prepare.py gpt2, whole, {threads} threads": lambda: whole(documents, threads, folder)}
        try:
            import datasets  # noqa: F401
            ways[f"datasets.map as in nanoGPT, {threads} processes"] = lambda: mapped(documents, threads, folder)
        except ImportError:
            print("datasets is not installed: nanoGPT's way is left out (pip install datasets)")
        tokenizer("gpt2")
        found = rates(ways, size, options.rounds)
        base = next(iter(found.values()))
        print(f"gpt2 on {size / 1e6:,.0f} MB of {options.text} in {len(documents):,} documents, MB/s, medians of "
              f"{options.rounds}:")
        for way, rate in found.items():
            print(f"  {way:<46} {rate:7.1f}   {rate / base:5.2f} x")
        (folder / "text.txt").write_text(text * 10, encoding="utf-8", newline="")
        for name in ("char", "byte"):
            rate, = rates({name: lambda name=name: whole(documents, 1, folder, name)}, 10 * size, 1).values()
            print(f"  {f'prepare.py {name}, whole, 1 thread':<46} {rate:7.1f}")


if __name__ == "__main__":
    run(main)
