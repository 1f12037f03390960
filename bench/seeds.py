"""The five systems that Inkling must be able to run: expected and measured figures side by side.

    python bench/seeds.py                      # all of them: about 20 minutes on 2 cores
    python bench/seeds.py verdict lecture      # some of them
    python bench/seeds.py tinystories --stories=stories.txt --max_iters=300

Each run is the command in its config's header, in a folder under bench/out/. OpenAI's weights are not needed: gpt2
checks the sizes and the decoding, tests/test_convert.py the logits.
"""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert import settings_from_hf
from inkling import dataset as dataset_module
from inkling.cli import fail, parse, run
from sample import select_top_k
from train import GPT, Config, load

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("bench", "out")              # seen from ROOT, where the programs run


@dataclass
class Options:
    # -- what to run
    stories: str = ""                   # story text for tinystories; empty: the prepared set, else the embedded fables
    max_iters: int = 300                # steps of tinystories, whose two epochs would take a day on a CPU
    data_dir: str = ""                  # folder of the data sets; empty: data/


class Verdict:
    """Prints one figure after the other, and remembers whether all were as expected."""

    def __init__(self):
        self.failed = []

    def __call__(self, what: str, expected: str, measured, holds: bool | None):
        shown = f"{measured:,.4f}".rstrip("0").rstrip(".") if isinstance(measured, float) else \
            f"{measured:,}" if isinstance(measured, int) else str(measured)
        word = {True: "ok", False: "NOT AS EXPECTED", None: "-"}[holds]
        print(f"| {what} | {expected} | {shown} | {word} |", flush=True)
        if holds is False:
            self.failed.append(what)


def program(*words):
    """Run one of the programs and show its output; its failure is ours."""
    print("\n    python", *words, flush=True)
    process = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                             encoding="utf-8")
    if process.returncode:
        fail(f"{words[0]} ended with {process.returncode}: {process.stderr.strip()[-400:]}")
    return process.stdout


def trained(config: str, options: Options, *words) -> tuple:
    """(model, tokenizer, evaluations as [(step, train loss, val loss)], training seconds) of a config's run."""
    folder = OUT / Path(config).stem
    where = [f"--data_dir={options.data_dir}"] if options.data_dir else []
    output = program("train.py", f"config/{config}.py", f"--out_dir={folder}", *where, *words)
    (ROOT / folder / "output.txt").write_text(output, encoding="utf-8")
    with open(ROOT / folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    evaluations = [(int(row["step"]), float(row["train_loss"]), float(row["val_loss"])) for row in rows
                   if row["val_loss"]]
    model, tokenizer = load(ROOT / folder / "last.pt")
    return model, tokenizer, evaluations, float(rows[-1]["seconds"])


def parameters(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def heading(name: str, more: str = ""):
    print(f"\n{name}{more}\n\n| figure | expected | measured | |\n|---|---|---|---|", flush=True)


def verdict(check: Verdict, options: Options):
    model, _, rows, seconds = trained("verdict", options)
    meta = dataset_module.read_meta(dataset_module.data_folder("verdict", options.data_dir))
    tokens = tuple(meta["splits"][split]["tokens"] for split in ("train", "val"))
    best = min(rows, key=lambda row: row[2])
    heading("verdict", f" ({seconds:.0f} s of training)")
    check("tokens", "4,612 / 534", f"{tokens[0]:,} / {tokens[1]:,}", tokens == (4612, 534))
    check("parameters", "162,419,712", parameters(model), parameters(model) == 162_419_712)
    check("updates", "90", rows[-1][0], rows[-1][0] == 90)
    check("untrained train loss", "about 10.98", rows[0][1], 10.8 < rows[0][1] < 11.2)
    check("train loss at update 5", "8.1-9.8", rows[1][1], 7.8 < rows[1][1] < 9.9)
    check("val loss at update 5", "8.3-9.9", rows[1][2], 8.0 < rows[1][2] < 10.0)
    check("final train loss", "0.569 (accept < 1)", rows[-1][1], rows[-1][1] < 1)
    check("best val loss", "6.12 (accept 6.0-6.4)", best[2], 6.0 <= best[2] <= 6.4)
    check("best at update", "near 50", best[0], 25 <= best[0] <= 75)
    check("val loss rises after it", "yes", rows[-1][2], rows[-1][2] > best[2])
    print((ROOT / OUT / "verdict" / "output.txt").read_text(encoding="utf-8").split("--- sample at step 81")[-1][:400])


def lecture(check: Verdict, options: Options):
    model, _, rows, seconds = trained("lecture", options)
    output = program("train.py", f"--out_dir={OUT / 'lecture'}", "--init_from=resume", "--eval_only", "--eval_iters=0",
                     "--sample_tokens=0")
    val = float(output.split(" | val ")[1].split()[0])
    heading("lecture", f" ({seconds:.0f} s of training)")
    check("parameters", "209,729", parameters(model), parameters(model) == 209_729)
    check("first val loss", "4.4", rows[0][2], 4.2 < rows[0][2] < 4.6)
    check("val loss, full split, context 32", "1.82 (accept 1.79-1.85)", val, 1.79 <= val <= 1.85)


def gpt2(check: Verdict, _options: Options):
    heading("gpt2")
    sizes = {"gpt2": (12, 12, 768, 124_439_808), "gpt2-medium": (24, 16, 1024, 354_823_168),
             "gpt2-large": (36, 20, 1280, 774_030_080), "gpt2-xl": (48, 25, 1600, 1_557_611_200)}
    for name, (n_layer, n_head, n_embd, count) in sizes.items():
        settings, _ = settings_from_hf(dict(model_type="gpt2", n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                         vocab_size=50257, n_positions=1024, activation_function="gelu_new"))
        with torch.device("meta"):
            found = parameters(GPT(Config(**settings), 50257))
        check(f"parameters of {name}", f"{count:,}", found, found == count)
    logits = torch.tensor([[4.51, .89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
    top_logits, top_ids = select_top_k(logits, 3)
    p = top_logits.softmax(-1)[0]
    check("top 3 of the toy logits", ".0615, .5775, .3610 at 0, 3, 7", ", ".join(f"{x:.4f}" for x in p),
          torch.allclose(p, torch.tensor([.0615, .5775, .3610]), atol=5e-5) and top_ids.tolist() == [[0, 3, 7]])
    cold = (logits / 0.1).softmax(-1)[0, 3].item()
    check("temperature 0.1 at index 3", ".9910", cold, abs(cold - .9910) < 5e-5)


def cl100k(check: Verdict, options: Options):
    model, tokenizer, rows, seconds = trained("fables_zh_cl100k", options)
    meta = dataset_module.read_meta(dataset_module.data_folder("fables_zh", options.data_dir))
    ids = dataset_module.open_split(dataset_module.data_folder("fables_zh", options.data_dir), meta, "train")
    text = program("sample.py", f"--out_dir={OUT / 'fables_zh_cl100k'}", "--start=从前", "--max_new_tokens=200")
    heading("cl100k", f" ({seconds:.0f} s of training)")
    check("type of the ids", "uint32", meta["dtype"], meta["dtype"] == "uint32")
    check("vocabulary", "100,277", tokenizer.vocab_size, tokenizer.vocab_size == 100_277)
    check("largest id", "above 65,535", int(ids.max()), 65_535 < int(ids.max()) < 100_277)
    check("val loss falls", f"from {rows[0][2]:.2f}", min(row[2] for row in rows), min(row[2] for row in rows) < 7)
    # `program` has decoded it strictly, so all is UTF-8; U+FFFD stands for what the model says and is no character.
    check("U+FFFD among the characters of a sample", "-", text.count("\ufffd") / len(text), None)


def tinystories(check: Verdict, options: Options):
    words = [f"--max_iters={options.max_iters}", f"--eval_interval={max(1, options.max_iters // 3)}",
             "--batch_size=1"]          # a quarter of the config's, for CPUs
    name = "tinystories"
    if options.stories or not (dataset_module.data_folder(name, options.data_dir) / "meta.json").is_file():
        text = Path(options.stories).resolve() if options.stories else ROOT / "data/fables/input.txt"
        name = "bench_stories"              # not the user's own set
        program("prepare.py", text, f"--name={name}", "--tokenizer=bpe:32000",
                *([f"--data_dir={options.data_dir}"] if options.data_dir else []))
        words.append(f"--dataset={name}")
    model, tokenizer, rows, seconds = trained("tinystories_llama", options, *words)
    with torch.device("meta"):
        count = parameters(GPT(Config(**parse(Config, [str(ROOT / "config/tinystories_llama.py")], "").values), 32_000))
    val = dataset_module.read_meta(dataset_module.data_folder(name, options.data_dir))["splits"]["val"]
    heading("tinystories", f" ({options.max_iters} steps on {options.stories or name}, {seconds:.0f} s of training)")
    check("parameters at a vocabulary of 32,000", "19,532,032", count, count == 19_532_032)
    check("vocabulary", "at most 32,000", tokenizer.vocab_size, tokenizer.vocab_size <= 32_000)
    bits = rows[-1][2] / 0.6931471805599453 * val["tokens"] / val["bytes"]
    check("val loss, nats per token", f"falls from {rows[0][2]:.2f}", rows[-1][2], rows[-1][2] < rows[0][2] - 1)
    check("bits per byte on val", "-", bits, None)


SEEDS = {"verdict": verdict, "gpt2": gpt2, "cl100k": cl100k, "tinystories": tinystories, "lecture": lecture}


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, takes="words")
    options = Options(**parsed.values)
    if unknown := [word for word in parsed.words if word not in SEEDS]:
        fail(f"no seed {', '.join(unknown)}; there are {', '.join(SEEDS)}")
    check = Verdict()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in parsed.words or SEEDS:
        SEEDS[name](check, options)
    print(f"\n{'all as expected' if not check.failed else 'not as expected: ' + '; '.join(check.failed)}")
    return 1 if check.failed else 0


if __name__ == "__main__":
    run(main)
