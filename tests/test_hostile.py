"""1,000 mutated checkpoints, meta.json and .bin files against the programs, in children with little memory and time:
each works or is refused in one line. test_checkpoints.py and test_prepare.py have single, chosen damages."""

import base64
import copy
import gzip
import json
import random
import shutil
import zipfile
from collections import Counter, deque

import pytest
import torch
from conftest import ROOT, TOY, ZYGOTE, flags, trained

from inkling.checkpoint import LATER_ENTRIES, RESUME_ENTRIES, build_model
from prepare import write_set
from train import GPT

MEMORY, SECONDS = 1 << 30, 30                   # bytes beyond what importing took; until it is killed
SERIES = 25                                     # programs in turn in one child
TUNED = dict(max_iters=1, eval_iters=1, sample_tokens=4, eval_interval=1)
POSITIONS = dict(char="learned", bpe="rope")
NUMBERS = [-1, 0, 1, 255, 10**6, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30, -2**40, 0.5, -1e300, 1e300,
           float("nan"), float("inf")]


def nested(depth: int, value=None):
    for _ in range(depth):
        value = [value]
    return value


ODD = [None, True, "", "x", "\x1b[2J", "9" * 5000, "\ud800", [], {}, [1, 2], {"a": 1}, nested(50), *NUMBERS]


@pytest.fixture(scope="module")
def home(data_dir, tmp_path_factory):
    """A folder with two sets, of characters and of a BPE, and a finished run of each."""
    folder = tmp_path_factory.mktemp("home")
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in
             enumerate([*(bytes([value]) for value in range(256)), b"th", b"the", b" a", b"nd"])]
    (folder / "small.tiktoken").write_text("\n".join(lines))
    shutil.copytree(data_dir / "toy", folder / "sets" / "char")
    write_set(folder / "sets" / "bpe", [data_dir / "toy.txt"], str(folder / "small.tiktoken"), 0.1)
    for name in ("char", "bpe"):
        settings = TUNED | dict(dataset=name, max_iters=2, positions=POSITIONS[name])
        done = trained(folder / "sets", folder / name, **settings)
        assert done.returncode == 0, done.stderr
    return folder


class Trials:
    """Programs in series of SERIES in a child, two children at a time; `wrong` tells of those that did anything but
    work or be refused in one line. Who kills the child is judged by its death, and the next start in a new one."""

    def __init__(self, folder, codes=(0, 2)):
        self.folder, self.codes, self.cases, self.running, self.wrong = folder, codes, [], deque(), []
        self.count, self.ends, self.children = 0, Counter(), 0

    def start(self, what, program: str, *words, folder):
        self.cases.append((what, (program, list(map(str, words)), str(folder))))
        self.count += 1
        if len(self.cases) == SERIES:
            self.start_series()

    def start_series(self):
        path = self.folder / f"series{self.count}"
        path.write_text(json.dumps([case for _, case in self.cases]))
        self.running.append((path, self.cases, self.child(path, 0)))
        self.cases = []
        if len(self.running) > 1:
            self.judge()

    def child(self, path, first: int):
        self.children += 1
        return ZYGOTE.start("forks:series", path, first, SECONDS, folder=self.folder, seconds=SECONDS, memory=MEMORY)

    def judge(self):
        path, cases, child = self.running.popleft()
        ends = path.with_name(f"{path.name}.ends")
        while True:
            code = child.wait().returncode
            if code:
                with open(ends, "a") as file:
                    file.write(f"{code}\n")                 # of the one that it was at
            codes = list(map(int, ends.read_text().split()))
            if len(codes) == len(cases):
                break
            child = self.child(path, len(codes))
        for number, ((what, (program, words, folder)), code) in enumerate(zip(cases, codes, strict=True)):
            out, err = (path.with_name(f"{path.name}.{number}.{name}").read_text(encoding="utf-8", errors="replace")
                        for name in ("out", "err"))
            self.ends[code] += 1
            if self.is_wrong(code, out, err):
                alone = ZYGOTE.run(program, *words, folder=folder, seconds=SECONDS, memory=MEMORY)
                self.wrong.append((what, words, code, err.splitlines()[-3:], "and in a child of its own",
                                   alone.returncode, alone.stderr.splitlines()[-3:]))

    def is_wrong(self, code: int, out: str, err: str) -> bool:
        return (code not in self.codes or "Traceback" in err or code == 2 and len(err.strip().splitlines()) != 1
                or "\x1b" in out + err)

    def none_wrong(self):
        if self.cases:
            self.start_series()
        while self.running:
            self.judge()
        assert self.wrong == [], "\n\n".join(map(str, [len(self.wrong), *self.wrong[:20]]))
        assert self.ends[0] < self.ends[2]              # most are noticed


def given(trials: Trials, what, content, home, folder, program: int):
    """Try a checkpoint, bytes or something to save, with one of the programs that read them: 0 samples, 1 starts a run
    from its weights, 2 resumes."""
    folder.mkdir()
    path, tokens = folder / "run" / "last.pt", "bpe" if what[0] == "bpe" else "char"
    path.parent.mkdir()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    sets = f"--data_dir={home / 'sets'}"
    tuned = flags(**TOY | TUNED | dict(dataset=tokens, positions=POSITIONS[tokens], out_dir="new"))
    words = {0: ["sample.py", f"--ckpt={path}", "--max_new_tokens=4", "--start=the", "--device=cpu"],
             1: ["train.py", *tuned, sets, f"--init_from={path}"],
             2: ["train.py", "--out_dir=run", "--init_from=resume", "--max_iters=3", sets]}[program]
    trials.start(what, *words, folder=folder)


def mutated(chance: random.Random, raw: bytes) -> bytes:
    """Bytes with a few flipped bits, cut off, or with a stretch overwritten, left out or put in twice."""
    at, size = chance.randrange(len(raw)), chance.choice([1, 4, 100, 5000])
    other = chance.randrange(len(raw))
    kind = chance.choice(["flip", "flip", "cut", "overwrite", "leave out", "insert"])
    if kind == "flip":
        raw = bytearray(raw)
        for _ in range(chance.choice([1, 3, 30])):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        return bytes(raw)
    stretch = raw[other:other + size]
    return {"cut": raw[:at], "overwrite": raw[:at] + stretch + raw[at + size:], "leave out": raw[:at] + raw[at + size:],
            "insert": raw[:at] + stretch + raw[at:]}[kind]


def repacked(path, chance: random.Random) -> bytes:
    """The archive at `path` with an entry mutated, mostly its pickle, and its checksums right again."""
    into = path.with_name("repacked")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(into, "w") as new:
        pickled = next(name for name in old.namelist() if name.endswith("data.pkl"))
        name = chance.choice([pickled, pickled, pickled, *old.namelist()])
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, mutated(chance, content) if entry.filename == name and content else content)
    return into.read_bytes()


@pytest.mark.parametrize("tokens", ["char", "bpe"])
def test_125_mutated_archives(home, tmp_path, tokens):
    """Found out by their checksums, or by what reads an archive."""
    chance, trials = random.Random(tokens), Trials(tmp_path)
    raw = (home / tokens / "last.pt").read_bytes()
    for number in range(125):
        given(trials, (tokens, "archive", number), mutated(chance, raw), home, tmp_path / str(number), number % 3)
    trials.none_wrong()


@pytest.mark.parametrize("tokens", ["char", "bpe"])
def test_125_mutated_pickles(home, tmp_path, tokens):
    """Their checksums are right, as an attacker's would be."""
    chance, trials = random.Random(tokens), Trials(tmp_path, (0, 2, 3))
    for number in range(125):
        content = repacked(home / tokens / "last.pt", chance)
        given(trials, (tokens, "pickle", number), content, home, tmp_path / str(number), number % 3)
    trials.none_wrong()


def places(node, path=()) -> list:
    """The path of every entry in nested dicts and lists; of long ones of the first few."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path + (key,) for key, _ in entries] + [deeper for key, value in list(entries)
                                                    for deeper in places(value, path + (key,))]


def changed(node, path: tuple, value):
    """A copy of nested dicts and lists with another value at `path`; without it for "missing"."""
    node = copy.copy(node)
    if len(path) > 1:
        node[path[0]] = changed(node[path[0]], path[1:], value)
    elif isinstance(value, str) and value == "missing":
        del node[path[0]]
    else:
        node[path[0]] = value
    return node


def test_200_mutated_meta_json(home, tmp_path):
    chance, trials = random.Random(0), Trials(tmp_path)
    for number in range(200):
        name = chance.choice(["char", "bpe"])
        shutil.copytree(home / "sets" / name, tmp_path / str(number) / "sets" / name)
        path = tmp_path / str(number) / "sets" / name / "meta.json"
        meta, what = json.loads(path.read_text(encoding="utf-8")), None
        if number % 5 == 0:
            path.write_bytes(mutated(chance, path.read_bytes()))
        else:
            for _ in range(chance.choice([1, 1, 2])):
                what = chance.choice(places(meta)), chance.choice([*ODD, "missing", nested(300)])
                meta = changed(meta, *what)
            text = json.dumps(meta, ensure_ascii=chance.random() < 0.5)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        words = [["train.py", *flags(**TOY | TUNED | dict(dataset=name, out_dir="new")), "--data_dir=sets"],
                 ["prepare.py", "--check", name, "--data_dir=sets"],
                 ["prepare.py", "--decode", name, "--data_dir=sets"],
                 ["prepare.py", str(ROOT / "README.md"), "--name=new", f"--tokenizer={path}", "--data_dir=new"]]
        trials.start((number, str(what)[:200]), *words[number % 4], folder=tmp_path / str(number))
    trials.none_wrong()


def test_50_mutated_bin_files(home, tmp_path):
    chance, trials = random.Random(0), Trials(tmp_path)
    for number in range(50):
        name, split = chance.choice(["char", "bpe"]), chance.choice(["train", "val"])
        shutil.copytree(home / "sets" / name, tmp_path / str(number) / "sets" / name)
        path = tmp_path / str(number) / "sets" / name / f"{split}.bin"
        raw = path.read_bytes()
        path.write_bytes(chance.randbytes(len(raw)) if number % 5 == 0 else mutated(chance, raw))
        words = [["train.py", *flags(**TOY | TUNED | dict(dataset=name, out_dir="new")), "--data_dir=sets"],
                 ["prepare.py", "--check", name, "--data_dir=sets"]]
        trials.start((name, split, number), *words[number % 2], folder=tmp_path / str(number))
    trials.none_wrong()


# -- well-formed, and hostile ----------------------------------------------------------------------------

def big(*shape):
    """A tensor that claims to be large and is not."""
    return torch.zeros(1).expand(*shape)


SIZES = ["n_layer", "n_embd", "block_size", "ffn_dim", "pad_vocab_to", "n_head", "n_kv_head"]
TENSORS = {
    "another shape": lambda t: torch.zeros(3), "no shape": lambda t: torch.zeros(()), "a number": lambda t: 1.5,
    "a text": lambda t: "x", "none": lambda t: None, "integers": lambda t: t.long(), "booleans": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64), "16 bits": lambda t: t.half(), "64 bits": lambda t: t.double(),
    "nan": lambda t: t * float("nan"), "inf": lambda t: t + float("inf"), "huge": lambda t: t + 1e38,
    "sparse": lambda t: t.to_sparse(), "meta": lambda t: t.to("meta"), "claims": lambda t: big(10**6, 10**6),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "a parameter": lambda t: torch.nn.Parameter(t), "a nested list": lambda t: nested(300, t),
    "with a gradient": lambda t: t.clone().requires_grad_(),
}
BPE = {
    "a huge rank": lambda s: s | dict(ranks=s["ranks"] + "\nYWFh 99999999999"),
    "no ranks": lambda s: s | dict(ranks=""),
    "a negative rank": lambda s: s | dict(ranks=s["ranks"].replace(" 259", " -5")),
    "a rank twice": lambda s: s | dict(ranks=s["ranks"].replace(" 259", " 258")),
    "a byte missing": lambda s: s | dict(ranks=s["ranks"].replace("\ndA== 116", "\neHh4 116")),
    "a token twice": lambda s: s | dict(ranks=s["ranks"].replace("dGhl 257", "dGg= 257")),
    "an empty token": lambda s: s | dict(ranks=s["ranks"].replace("dGhl 257", "=== 257")),
    "a huge special": lambda s: s | dict(special={"<|endoftext|>": 2**40}),
    "a special that is no number": lambda s: s | dict(special={"<|endoftext|>": "x"}),
    "an infinite special": lambda s: s | dict(special={"<|endoftext|>": float("inf")}),
    "a special that is no text": lambda s: s | dict(special={5: 260}),
    "a special that is a token": lambda s: s | dict(special={"<|endoftext|>": 3}),
    "no special": lambda s: s | dict(special={}), "special as a list": lambda s: s | dict(special=[260]),
    "no pattern": lambda s: s | dict(pattern=""), "an empty match": lambda s: s | dict(pattern=r"(?=h)|[\s\S]"),
    "a broken pattern": lambda s: s | dict(pattern="(["),
    "a slow pattern": lambda s: s | dict(pattern=r"(?=(a+a+)+\1b)|(x*)*y|((t|h|e|th|he)*)*\3z|\s"),
    "a pattern that is no text": lambda s: s | dict(pattern=7), "a name that is no text": lambda s: s | dict(name=[7]),
    "a name with control characters": lambda s: s | dict(name="\x1b[2J"),
}
CHARS = {
    "twice the same": lambda s: s | dict(chars=s["chars"][0] * len(s["chars"])), "none": lambda s: s | dict(chars=""),
    "a list": lambda s: s | dict(chars=list(s["chars"])), "bytes": lambda s: s | dict(chars=s["chars"].encode()),
    "surrogates": lambda s: s | dict(chars="\ud800" * len(s["chars"])), "bytes too": lambda s: s | dict(bytes=True),
    "many": lambda s: s | dict(chars="a" * 5_000_000), "control": lambda s: s | dict(chars="\x1b" * len(s["chars"])),
}


def hostile(good: dict, tokens: str):
    """Yield (what, content) of checkpoints that load and lie."""
    for field in SIZES:
        for value in (0, -5, 10**6, 2**31, 2**31 + 1, 2**62, 10**30, 1e300, "x", None, nested(50)):
            yield (field, value), good | dict(config=good["config"] | {field: value})
    for value in (0, -5, 10**6, 2**31, 2**62, True):
        yield ("vocab_size", value), good | dict(vocab_size=value)
    for name in ("wte.weight", "blocks.1.mlp.up.weight"):
        for what, change in TENSORS.items():
            yield (name, what), good | dict(model=good["model"] | {name: change(good["model"][name])})
    for what, change in (BPE if tokens == "bpe" else CHARS).items():
        yield ("tokenizer", what), good | dict(tokenizer=change(good["tokenizer"]))
    everything = {name: big(*(10**4, 10**4)) for name in good["model"]}
    yield ("all tensors", "claim"), good | dict(model=everything)
    yield ("all tensors", "claim what the config does"), good | dict(
        config=good["config"] | dict(n_embd=2**16, ffn_dim=2**20), model={
            name: big(*(2**20 if size == 128 else 2**16 if size == 32 else size for size in tensor.shape))
            for name, tensor in good["model"].items()})
    yield ("layers", "share their tensors"), good | dict(config=good["config"] | dict(n_layer=2000), model={
        **good["model"], **{name.replace(".1.", f".{layer}."): tensor for layer in range(2, 2000)
                            for name, tensor in good["model"].items() if ".1." in name}})
    yield ("keys", "numbers"), good | dict(model={number: t for number, t in enumerate(good["model"].values())})
    yield ("config", "numbers"), good | dict(config={1: 2})
    for place in [("config", "rope_fraction"), ("config", "dropout"), ("config", "norm_eps"), ("config", "logit_cap"),
                  ("config", "wandb_project"), ("config", "sample_start"), ("config", "mlp"), ("step",),
                  ("evaluated",), ("best_step",), ("best_val_loss",), ("losses",), ("losses", "val"), ("seconds",),
                  ("text",), ("threads",), ("scaler",), ("optimizers",), ("optimizers", 0), ("optimizers", 1),
                  ("optimizers", 0, "state"), ("optimizers", 0, "state", 0), ("optimizers", 0, "state", 0, "exp_avg"),
                  ("optimizers", 0, "state", 0, "step"), ("optimizers", 0, "param_groups"),
                  ("optimizers", 0, "param_groups", 0), ("optimizers", 0, "param_groups", 0, "params"),
                  ("optimizers", 0, "param_groups", 0, "lr"), ("optimizers", 0, "param_groups", 0, "betas"),
                  ("optimizers", 1, "state", 0, "average"), ("plan",), ("plan", "breakpoints"),
                  ("plan", "evaluations"), ("plan", "dtype"),
                  ("plan", "compile"), ("plan", "device"), ("plan", "sequences"), ("plan", "fit_to_time"),
                  ("plan", "most_steps"), ("plan", "ngram_decay"), ("plan", "expected"), ("plan", "resumed_at"),
                  ("optimizers", 2),
                  ("optimizers", 2, "state", 0, "mean_square"), ("optimizers", 2, "state", 0, "steps")]:
        for value in (None, -1, 2**62, float("nan"), "\x1b[2J", nested(50), {}, torch.zeros(3), "missing"):
            yield (place, value), changed(good, place, value)
    for what, change in TENSORS.items():
        for place in (("optimizers", 0, "state", 0, "exp_avg"), ("optimizers", 1, "state", 0, "average"),
                      ("optimizers", 2, "state", 0, "mean_square")):
            old = good["optimizers"][place[1]]["state"][0][place[-1]]
            yield (place, what), changed(good, place, change(old))


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_400_checkpoints_that_lie(home, tmp_path):
    trials = Trials(tmp_path, (0, 2, 3))
    for tokens in ("char", "bpe"):
        good = torch.load(home / tokens / "last.pt")
        for number, (what, content) in enumerate(hostile(good, tokens)):
            about_the_run = what[0][0] in (*RESUME_ENTRIES, *LATER_ENTRIES, "step")
            if tokens == "char" or what[0] == "tokenizer":          # all else is the same
                program = 2 if about_the_run else 0 if what[0] == "tokenizer" else number % 3
                given(trials, (tokens, *what), content, home, tmp_path / str(trials.count), program)
    assert trials.count > 400
    trials.none_wrong()


# -- what a file names is not opened ---------------------------------------------------------------------

def test_sampling_opens_no_path_that_a_checkpoint_names(home, tmp_path):
    """Every text in it names a file that is there; an audit hook in a child tells what is opened."""
    def named(value, path, place=""):
        if isinstance(value, dict):
            return {key: named(inner, path, f"{place}.{key}") for key, inner in value.items()}
        return path if isinstance(value, str) and place not in needed else value

    target, seen = tmp_path / "target", []
    target.write_text("the")
    needed = {f".tokenizer.{key}" for key in ("kind", "ranks", "pattern")} | {f".config.{name}" for name in (
        "sampling", "positions", "rope_scaling", "norm", "mlp", "qkv_bias", "init", "optimizer", "ngram_optimizer",
        "ngram_decay", "schedule", "dtype", "compile", "backend", "breakpoints")} | {".plan.dtype", ".plan.device"}
    for prefix in ("", "FILE:"):
        good = torch.load(home / "bpe" / "last.pt")
        torch.save(named(good, f"{prefix}{target}"), tmp_path / "ckpt.pt")
        for words in (["--start=the"], ["--interactive"], [f"--score={home / 'small.tiktoken'}"], ["--json"]):
            done = ZYGOTE.run("forks:audited", "sample", f"--ckpt={tmp_path / 'ckpt.pt'}", "--device=cpu",
                              "--max_new_tokens=4", *words, folder=tmp_path)
            assert done.returncode == 0, done.stderr
            seen += [line for line in done.stderr.splitlines() if line.startswith("opened ")]
    assert any("ckpt.pt" in line for line in seen)
    assert not [line for line in seen if str(target) in line]


def test_a_gzip_bomb_takes_no_memory_for_what_it_holds(tmp_path):
    """80 MB of one letter in 80 kB, with less room than twice as much, which bytes and text of it would take."""
    with gzip.open(tmp_path / "bomb.txt.gz", "wb", 1) as file:
        for _ in range(80):
            file.write(b"a" * 10**6)
    words = ["bomb.txt.gz", "--tokenizer=byte", "--data_dir=sets", "--workers=1"]
    done = ZYGOTE.run("prepare.py", *words, folder=tmp_path, memory=150_000_000)
    assert (done.returncode, done.stderr) == (0, "")
    assert "80,000,000 characters" in done.stdout


def test_a_model_is_built_only_for_weights_that_are_there(toy):
    """Before that its shapes alone are worked out, on PyTorch's device without memory."""
    devices, cfg = [], toy(n_embd=64)

    def build():
        devices.append(torch.empty(0).device.type)
        return GPT(cfg, 59)

    good = GPT(cfg, 59).state_dict()
    for stored in (good | {"wte.weight": torch.zeros(59, 32)}, good | {"wte.weight": big(58, 64)}, good | dict(x=1)):
        with pytest.raises(ValueError, match="wte|'x'"):
            build_model(build, stored, cfg.n_layer)
    with pytest.raises(ValueError, match="more numbers than it holds"):
        build_model(build, {name: big(*tensor.shape) for name, tensor in good.items()}, cfg.n_layer)
    assert devices == ["meta"] * 4
    assert torch.equal(build_model(build, good, cfg.n_layer).wte.weight, good["wte.weight"])
