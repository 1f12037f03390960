"""The long form of test_faults.py: random faults against runs of all kinds, chained over resumes, until the time is up.

    python tests/soak.py --minutes=30 --seed=1

A chain is one run that is disturbed again and again and resumes each time with --init_from=auto: by SIGKILL, SIGTERM,
SIGINT, SIGSTOP and SIGCONT, a full disk, and flipped bytes in last.pt, which has to be refused until a copy takes its
place. In the end last.pt, ckpt.pt and log.csv have to be those of the same run left alone. Prints a table of what was
done and found; exits with 1 on any violation.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT, TOY, ZYGOTE, flags, log_rows, one_line_error, pairwise, same_runs

from inkling.checkpoint import load_checkpoint
from inkling.cli import parse
from inkling.files import sha256
from inkling.plots import read_log
from prepare import write_set

RUN = TOY | dict(dataset="text", data_dir="sets", sample_tokens=0, max_iters=60)
KINDS = pairwise(optimizer=["muon", "adamw"], dtype=["float32", "bfloat16"], dropout=[0.2, 0.0],
                 attn_dropout=[False, True], sampling=["epoch", "random"], batches=[(4, 1), (2, 3)],
                 saves=[(10, 0), (40, 1), (30, 7)])     # of the last two: eval_interval and save_interval


def settings(kind: dict) -> dict:
    """Fields of Config for one of KINDS."""
    named = dict(zip(("batch_size", "gradient_accumulation_steps", "eval_interval", "save_interval"),
                     kind["batches"] + kind["saves"], strict=True))
    kept = {name: value for name, value in kind.items() if name not in ("batches", "saves")}
    return kept | named | dict(learning_rate=0.003 if kind["optimizer"] == "adamw" else 0.012)


@dataclass
class Options:
    # -- the soak
    minutes: float = 5.0                # how long to begin new chains
    seed: int = 0                       # of the faults; what they hit depends on the machine's speed, too


class Chain:
    """One run and what happens to it."""

    def __init__(self, folder: Path, number: int, settings: dict, chance: random.Random, counts: Counter):
        self.folder, self.chance, self.counts = folder, chance, counts
        self.out, self.settings = folder / f"run{number}", RUN | settings
        self.interval = self.settings["save_interval"] or self.settings["eval_interval"]

    def start(self, out: Path, **limits):
        words = flags(**self.settings | dict(out_dir=out.name, init_from="auto"))
        return ZYGOTE.start("train.py", *words, folder=self.folder, seconds=300, **limits)

    def saved(self) -> int:
        """The step in last.pt; what there is of checkpoints must be whole."""
        steps = [load_checkpoint(self.out / name)["step"] for name in ("ckpt.pt", "last.pt")
                 if (self.out / name).exists()]
        return steps[-1] if (self.out / "last.pt").exists() else 0

    def disturb(self, fault: str):
        """Resume the run and let something happen to it; returns how it ended."""
        limits = {}
        if fault == "full disk":
            size = (self.out / "last.pt").stat().st_size if (self.out / "last.pt").exists() else 300_000
            limits = dict(room=self.chance.randrange(size // 20, size))
        before = self.saved()
        child = self.start(self.out, **limits)
        time.sleep(self.chance.uniform(0, self.takes / 4))
        if fault == "SIGSTOP":
            child.send(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0, 0.5))
            child.send(signal.SIGCONT)
        elif fault.startswith("SIG"):
            child.send(getattr(signal, fault))
        elif fault == "full disk" and self.chance.random() < 0.5:
            child.send(signal.SIGKILL)
        done = child.wait()
        ends = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130,), "SIGSTOP": (), "nothing": (),
                "full disk": (4, -9)}[fault]
        assert done.returncode in (0, *ends), (fault, done.returncode, done.stderr)
        assert done.stderr == "", done.stderr
        self.counts[fault] += done.returncode != 0 or not ends
        if done.returncode in (-9, -15):                # SIGTERM kills before the run has begun
            self.counts["  of the kills, in the middle of a save"] += any(self.out.glob("*.tmp"))
        elif "writes " in done.stdout:                  # it came far enough to remove what a killed one left
            assert not list(self.out.glob("*.tmp")), "a temporary file is left"
        saved = self.saved()
        self.counts["checkpoints read"] += 2
        assert saved >= before, (saved, before)
        if fault == "full disk":
            self.counts["  of the full disks, some save failed"] += "could not write" in done.stdout
        elif "\nstep " in done.stdout:                  # else the log may still hold what a full disk kept from last.pt
            lost = max((int(row["step"]) for row in read_log(self.out / "log.csv")), default=0) - saved
            assert lost <= (self.interval if done.returncode == -9 else 0) or done.returncode == -15, (
                fault, lost, done.returncode, done.stdout[-500:])
            self.counts["steps lost"] += max(0, lost)
        return done

    def flip(self):
        """A flipped byte in last.pt is refused and changes nothing, until a copy takes the file's place."""
        path, copy = self.out / "last.pt", self.folder / "copy.pt"
        if not path.exists():
            return
        shutil.copy(path, copy)
        raw = bytearray(path.read_bytes())
        # In the content of entries: between them lies padding, which means nothing.
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.file_size]
        for _ in range(self.chance.choice([1, 8])):
            entry = self.chance.choice(entries)
            head = entry.header_offset
            names = sum(int.from_bytes(raw[head + at:head + at + 2], "little") for at in (26, 28))
            raw[head + 30 + names + self.chance.randrange(entry.file_size)] ^= 1 << self.chance.randrange(8)
        path.write_bytes(raw)
        files = {name: sha256(self.out / name) for name in ("last.pt", "ckpt.pt", "log.csv")
                 if (self.out / name).exists()}
        if raw != copy.read_bytes():
            one_line_error(self.start(self.out).wait(), "last.pt is damaged")
        assert files == {name: sha256(self.out / name) for name in files}
        shutil.copy(copy, path)
        self.counts["flipped bytes"] += 1

    def run(self):
        whole, begin = self.out.with_name("whole"), time.monotonic()
        shutil.rmtree(whole, ignore_errors=True)
        done = self.start(whole).wait()
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        self.takes = time.monotonic() - begin           # seconds of the whole run
        rows = len(log_rows(whole))
        assert rows > self.settings["max_iters"], rows
        faults = ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP", "full disk", "flip"]
        for _ in range(100):
            fault = self.chance.choice(faults)
            if fault == "flip":
                self.flip()
            elif self.disturb(fault).returncode == 0:
                break
        else:
            assert self.disturb("nothing").returncode == 0
        same_runs(self.out, whole)
        self.counts["runs that ended as the ones left alone"] += 1
        for path in self.folder.glob(f"{self.out.name}*"):
            shutil.rmtree(path)


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    folder, chance, counts = Path(tempfile.mkdtemp(prefix="soak")), random.Random(options.seed), Counter()
    text = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    write_set(folder / "sets" / "text", [folder / "text.txt"], "char", 0.1)
    until, number, violations = time.monotonic() + 60 * options.minutes, 0, 0
    while time.monotonic() < until:
        kind = KINDS[number % len(KINDS)]
        print(f"chain {number}: {' '.join(map(str, kind.values()))}", flush=True)
        try:
            Chain(folder, number, settings(kind), chance, counts).run()
        except Exception:      # whatever it is, the next chain begins
            violations += 1
            print(f"VIOLATION; the files are in {folder}\n{traceback.format_exc()}", flush=True)
        number += 1
    print(f"\n{'what happened':44} times")
    for what, count in sorted(counts.items()) + [("violations", violations)]:
        print(f"{what:44} {count:5}")
    if not violations:
        shutil.rmtree(folder)
    return violations > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
