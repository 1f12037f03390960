"""The five systems that Inkling must be able to run: expected and measured figures side by side.

    python bench/seeds.py                      # all of them: about 20 minutes on 2 cores
    python bench/seeds.py verdict lecture      # some of them
    python bench/seeds.py tinystories --stories=stories.txt --max_iters=300

Each run is the command in its config's header, in a folder under bench/out/. OpenAI's weights are
not needed: gpt2 checks the sizes and the decoding, tests/test_convert.py the logits.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, flags, run_program

from convert import settings_from_hf
from inkling.cli import PositiveInt, UserError, check, parse, run
from inkling.dataset import data_folder, open_split, read_meta
from inkling.plots import read_log
from sample import select_top_k
from train import GPT, Config, load

OUT = Path("bench", "out")              # seen from ROOT, where the programs run


@dataclass
class Options:
    # -- what to run
    stories: str = ""                   # story text for tinystories; empty: the prepared set, else the embedded fables
    max_iters: PositiveInt = 300        # steps of tinystories, whose two epochs would take a day on a CPU
    data_dir: str = ""                  # folder of the data sets; empty: data/


class Table:
    """Prints a row for each figure, and remembers which were not as expected."""

    def __init__(self):
        self.failed = []

    def head(self, title: str):
        print(f"\n{title}\n\n| figure | expected | measured | |\n|---|---|---|---|", flush=True)

    def row(self, figure: str, expected: str, measured, holds: bool | None):
        """holds: whether it is as expected; None: nothing is expected of it."""
        verdict = {True: "ok", False: "NOT AS EXPECTED", None: "-"}[holds]
        print(f"| {figure} | {expected} | {format_figure(measured)} | {verdict} |", flush=True)
        if holds is False:
            self.failed.append(figure)

    def row_between(self, figure: str, expected: str, low: float, measured: float, high: float):
        self.row(figure, expected, measured, low <= measured <= high)


def format_figure(value) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


# -- runs ----------------------------------------------------------------------------------------

@dataclass
class Trained:
    """A finished run of a config."""

    model: GPT
    tokenizer: object
    evaluations: list                   # rows of log.csv with step, train_loss, val_loss
    seconds: float                      # of training
    output: str

    @property
    def first(self) -> dict:
        return self.evaluations[0]

    @property
    def last(self) -> dict:
        return self.evaluations[-1]

    @property
    def best(self) -> dict:
        return min(self.evaluations, key=lambda row: row["val_loss"])


def show_and_run(*words) -> str:
    """Run one of the programs and return its output."""
    print("\n    python", *words, flush=True)
    return run_program(words, cwd=ROOT)


def data_words(options: Options) -> list:
    return flags(data_dir=options.data_dir) if options.data_dir else []


def train_config(config: str, options: Options, *words) -> Trained:
    """Run train.py with a config."""
    folder = OUT / config
    output = show_and_run("train.py", f"config/{config}.py", f"--out_dir={folder}", *data_words(options), *words)
    rows = read_log(ROOT / folder / "log.csv")
    evaluations = [row for row in rows if "val_loss" in row]
    model, tokenizer = load(ROOT / folder / "last.pt")
    return Trained(model, tokenizer, evaluations, rows[-1]["seconds"], output)


def count_parameters(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def parameters_of(settings: dict, vocab_size: int) -> int:
    """How many parameters a model has, without making it."""
    with torch.device("meta"):
        return count_parameters(GPT(Config(**settings), vocab_size))


# -- the systems ---------------------------------------------------------------------------------

def verdict(table: Table, options: Options):
    trained = train_config("verdict", options)
    splits = read_meta(data_folder("verdict", options.data_dir))["splits"]
    tokens = f"{splits['train']['tokens']:,} / {splits['val']['tokens']:,}"
    parameters = count_parameters(trained.model)
    first = trained.first
    fifth = trained.evaluations[1]
    last = trained.last
    best = trained.best
    table.head(f"verdict ({trained.seconds:.0f} s of training)")
    table.row("tokens", "4,612 / 534", tokens, tokens == "4,612 / 534")
    table.row("parameters", "162,419,712", parameters, parameters == 162_419_712)
    table.row("updates", "90", int(last["step"]), last["step"] == 90)
    table.row_between("untrained train loss", "about 10.98", 10.8, first["train_loss"], 11.2)
    table.row_between("train loss at update 5", "8.1-9.8", 7.8, fifth["train_loss"], 9.9)
    table.row_between("val loss at update 5", "8.3-9.9", 8.0, fifth["val_loss"], 10.0)
    table.row("final train loss", "0.569 (accept < 1)", last["train_loss"], last["train_loss"] < 1)
    table.row_between("best val loss", "6.12 (accept 6.0-6.4)", 6.0, best["val_loss"], 6.4)
    table.row_between("best at update", "near 50", 25, int(best["step"]), 75)
    has_risen = last["val_loss"] > best["val_loss"]
    table.row("val loss rises after it", "yes", last["val_loss"], has_risen)
    print(trained.output.split("--- sample at step 81")[-1][:400])


def lecture(table: Table, options: Options):
    trained = train_config("lecture", options)
    output = show_and_run("train.py", f"--out_dir={OUT / 'lecture'}", "--init_from=resume", "--eval_only",
                          "--eval_iters=0", "--sample_tokens=0")
    val_loss = float(output.split(" | val ")[1].split()[0])
    parameters = count_parameters(trained.model)
    first_loss = trained.first["val_loss"]
    table.head(f"lecture ({trained.seconds:.0f} s of training)")
    table.row("parameters", "209,729", parameters, parameters == 209_729)
    table.row_between("first val loss", "4.4", 4.2, first_loss, 4.6)
    table.row_between("val loss, full split, context 32", "1.82 (accept 1.79-1.85)", 1.79, val_loss, 1.85)


# OpenAI's sizes: n_layer, n_head, n_embd, parameters.
GPT2_SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


def gpt2(table: Table, _options: Options):
    table.head("gpt2")
    for name, (n_layer, n_head, n_embd, expected) in GPT2_SIZES.items():
        settings, vocab_size = settings_from_hf({
            "model_type": "gpt2",
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": n_embd,
            "vocab_size": 50257,
            "n_positions": 1024,
            "activation_function": "gelu_new",
        })
        parameters = parameters_of(settings, vocab_size)
        table.row(f"parameters of {name}", f"{expected:,}", parameters, parameters == expected)

    logits = torch.tensor([[4.51, .89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
    top_logits, top_ids = select_top_k(logits, 3)
    p = top_logits.softmax(-1)[0]
    found = ", ".join(f"{value:.4f}" for value in p)
    expected_p = torch.tensor([.0615, .5775, .3610])
    holds = torch.allclose(p, expected_p, atol=5e-5) and top_ids.tolist() == [[0, 3, 7]]
    table.row("top 3 of the toy logits", "0.0615, 0.5775, 0.3610 at 0, 3, 7", found, holds)
    cold = (logits / 0.1).softmax(-1)[0, 3].item()
    table.row("temperature 0.1 at index 3", ".9910", cold, abs(cold - .9910) < 5e-5)


def cl100k(table: Table, options: Options):
    trained = train_config("fables_zh_cl100k", options)
    folder = data_folder("fables_zh_cl100k", options.data_dir)
    meta = read_meta(folder)
    largest_id = int(open_split(folder, meta, "train").max())
    # It is decoded strictly, so all of it is UTF-8; U+FFFD stands for bytes that are no character.
    text = show_and_run("sample.py", f"--out_dir={OUT / 'fables_zh_cl100k'}", "--start=从前",
                        "--max_new_tokens=200")
    best_loss = trained.best["val_loss"]
    table.head(f"cl100k ({trained.seconds:.0f} s of training)")
    table.row("type of the ids", "uint32", meta["dtype"], meta["dtype"] == "uint32")
    vocab_size = trained.tokenizer.vocab_size
    table.row("vocabulary", "100,277", vocab_size, vocab_size == 100_277)
    table.row("largest id", "above 65,535", largest_id, 65_535 < largest_id < 100_277)
    table.row("val loss falls", f"from {trained.first['val_loss']:.2f}", best_loss, best_loss < 7)
    share = text.count("\ufffd") / len(text)
    table.row("U+FFFD among the characters of a sample", "-", share, None)


def tinystories(table: Table, options: Options):
    words = flags(max_iters=options.max_iters, eval_interval=max(1, options.max_iters // 3),
                  batch_size=1)         # a quarter of the config's, for CPUs
    name = "tinystories"
    if options.stories or not (data_folder(name, options.data_dir) / "meta.json").is_file():
        name = "bench_stories"          # not the user's own set
        text = ROOT / "data" / "fables" / "input.txt"
        if options.stories:
            text = Path(options.stories).resolve()
        show_and_run("prepare.py", text, f"--name={name}", "--tokenizer=bpe:32000", *data_words(options))
        words += flags(dataset=name)
    trained = train_config("tinystories_llama", options, *words)
    settings = parse(Config, [str(ROOT / "config" / "tinystories_llama.py")], "").values
    parameters = parameters_of(settings, 32_000)
    val = read_meta(data_folder(name, options.data_dir))["splits"]["val"]
    first_loss = trained.first["val_loss"]
    last_loss = trained.last["val_loss"]
    text_name = options.stories or name
    table.head(f"tinystories ({options.max_iters} steps on {text_name}, {trained.seconds:.0f} s of training)")
    table.row("parameters at a vocabulary of 32,000", "19,532,032", parameters, parameters == 19_532_032)
    table.row("vocabulary", "at most 32,000", trained.tokenizer.vocab_size, trained.tokenizer.vocab_size <= 32_000)
    has_fallen = last_loss < first_loss - 1
    table.row("val loss, nats per token", f"falls from {first_loss:.2f}", last_loss, has_fallen)
    bits_per_byte = last_loss / math.log(2) * val["tokens"] / val["bytes"]
    table.row("bits per byte on val", "-", bits_per_byte, None)


SYSTEMS = {
    "verdict": verdict,
    "gpt2": gpt2,
    "cl100k": cl100k,
    "tinystories": tinystories,
    "lecture": lecture,
}


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, takes="words")
    options = Options(**parsed.values)
    check(options)
    unknown = [word for word in parsed.words if word not in SYSTEMS]
    if unknown:
        raise UserError(f"no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    table = Table()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in parsed.words or SYSTEMS:
        SYSTEMS[name](table, options)
    if table.failed:
        print(f"\nnot as expected: {'; '.join(table.failed)}")
        return 1
    print("\nall as expected")
    return 0


if __name__ == "__main__":
    run(main)
