"""What is measured, each in a process of its own: `python bench/runners.py TASK SPEC.json-text RESULT.json`.

The other scripts start it; a person does not. Every way of training is its own program, unchanged:

- ours: train.main with the flags given.
- nanogpt: the checkout's train.py, run in a temporary folder of links to it, on our ids as uint16.
- trainer: transformers' Trainer with GPT2LMHeadModel and nanoGPT's hyper-parameters, on random windows of
  block_size + 1 tokens, so that it learns as many predictions as the others.

What is added is a stopwatch that stands still during evaluations, and an evaluation that is the same for all three: the
whole val split in windows that follow on one another, in float32 (TF32 on a card), without dropout. The stopwatch is
hooked to what each program calls anyway: ours to Report and lr_factor; nanoGPT's to GPT.train (its estimate_loss
begins with eval() and ends with train()), torch.save (of its checkpoint, which is not written) and zero_grad (the end
of a step); the Trainer's to its callbacks.
"""

import json
import os
import pickle
import resource
import runpy
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inkling import dataset as dataset_module
from inkling import device as device_module
from inkling.cli import parse


class Stopwatch:
    """Seconds of training, without what happens between pause() and resume(); ticks are the ends of steps."""

    def __init__(self, device: str, launched: float):
        self.device, self.launched = device, launched
        self.before, self.since, self.startup = 0.0, None, None
        self.ticks, self.pauses, self.first_step = [], [], None

    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.since if self.since else 0)

    def pause(self):
        device_module.synchronize(self.device)
        if self.startup is None:
            self.startup = time.time() - self.launched
        elif self.since:
            self.before = self.seconds()
            self.pauses.append(len(self.ticks))
        self.since = None

    def resume(self):
        self.since = time.perf_counter()

    def tick(self):
        if not self.ticks:
            device_module.synchronize(self.device)       # the first step's end, for the start-up time
        self.ticks.append(self.seconds())


def settled(watch: Stopwatch, curve: list, end: float, compiled: bool, **more) -> dict:
    """The figures of a run. curve: (step, seconds, loss or None) at each evaluation; end: its seconds, with nothing
    left to do on a card. What the first step of compiled code takes beyond a median step is compilation, and counts as
    start-up. startup: from launch to the first step, without evaluations; first_step: to that step's end."""
    steps = np.diff(watch.ticks).tolist()
    step = median(steps) if steps else watch.ticks[0]
    compiling = max(0.0, watch.ticks[0] - step) if compiled else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.device(watch.device).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return dict(curve=[(at, max(0.0, seconds - compiling), loss) for at, seconds, loss in curve],
                steps=len(watch.ticks), step_seconds=step, mean_seconds=(end - watch.ticks[0]) / max(1, len(steps)),
                startup=watch.startup + compiling, first_step=watch.startup + watch.ticks[0], peak=peak, **more)


@torch.no_grad()
def full_loss(logits, ids, block_size: int, device: str, limit: int = 0) -> float:
    """Mean loss in nats over every whole window of `ids` (or the first `limit` ones). logits: x, y -> (B, T, vocab)."""
    count, total = (len(ids) - 1) // block_size, 0.0
    count = min(count, limit or count)
    for first in range(0, count, 16):
        at = np.arange(first, min(count, first + 16))[:, None] * block_size + np.arange(block_size + 1)
        window = torch.from_numpy(ids[at].astype(np.int64)).to(device)
        x, y = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        total += F.cross_entropy(logits(x, y).float().flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / (count * block_size)


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def opened(spec: dict) -> tuple:
    """({"train": ids, "val": ids}, meta) of the set in spec["data"]."""
    return dataset_module.open_data(Path(spec["data"]), spec["block_size"])


# -- ours ----------------------------------------------------------------------------------------------------------

def ours(spec: dict) -> dict:
    """train.main with spec["words"], for as many steps as spec["tokens"] make if that is given. It saves nothing, and
    its evaluation is replaced by the common one."""
    import train

    cfg = train.Config(**parse(train.Config, spec["words"], "").values)
    steps = cfg.max_iters
    if spec.get("tokens"):
        steps = max(1, round(spec["tokens"] / (cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size)))
    data, every = Path(spec["data"]), max(1, steps // spec["points"])
    words = [*spec["words"], f"--dataset={data.name}", f"--data_dir={data.parent}", f"--out_dir={spec['folder']}/run",
             f"--eval_interval={every}", "--sample_tokens=0", "--patience=0", "--save_interval=0",
             *([f"--max_iters={steps}"] if spec.get("tokens") else [])]
    found, curve, state = {}, [], dict(step=-1, evaluating=0.0)

    class Timed(train.Report):
        def __init__(self, *args):
            super().__init__(*args)
            cfg, model, device = args[0], args[3], args[6]
            found.update(report=self, model=model, cfg=cfg, watch=Stopwatch(device, spec["launched"]))
            found["watch"].seconds = self.seconds               # its own stopwatch, which stands still as ours

    def evaluate(model, ids, *_):
        loss, began = 0.0, time.time()
        if spec["evaluate"]:
            model.eval()
            loss = full_loss(lambda x, y: model(x)[0], ids["val"], spec["block_size"], found["watch"].device)
            model.train()
        curve.append((max(0, state["step"] + 1), found["report"].seconds(), loss))
        state["evaluating"] += time.time() - began
        return {"train": loss, "val": loss}

    def factor(step, cfg, real=train.lr_factor):
        if step > state["step"]:                                # the beginning of a step is the end of the one before
            state["step"] = step
            if step:
                found["watch"].tick()
            elif found["watch"].startup is None:
                found["watch"].startup = time.time() - spec["launched"] - state["evaluating"]
            for hook in spec.get("hooks", []):
                hook(step)
        return real(step, cfg)

    train.Report, train.estimate_loss, train.lr_factor = Timed, evaluate, factor
    train.runtime.save_checkpoint = lambda *_: ""
    code = train.main(words)
    if code:
        raise SystemExit(code)
    watch, cfg = found["watch"], found["cfg"]
    watch.ticks.append(curve[-1][1])                            # the last step ends where the last pause begins
    result = settled(watch, curve, watch.ticks[-1], bool(cfg.compile), parameters=parameters(found["model"]),
                     flops_per_token=found["report"].flops(found["model"]), dtype=cfg.dtype, compile=bool(cfg.compile),
                     tokens_per_step=cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size)
    if spec.get("split"):
        result["parts"] = split_ours(train, cfg, spec)
    return result


def timed_parts(parts: dict, steps: int, device: str) -> dict:
    """Median seconds of each part of a step over `steps`, after two that warm up; on a card each part is waited for."""
    seconds = {name: [] for name in parts}
    for number in range(steps + 2):
        for name, part in parts.items():
            device_module.synchronize(device)
            start = time.perf_counter()
            part(number)
            device_module.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times[2:]) for name, times in seconds.items()}


def split_ours(train, cfg, spec: dict) -> dict:
    """Seconds of the parts of a step of one micro-batch, with the calls of train.train's loop."""
    data, meta = opened(spec)
    device = device_module.choose_device(cfg.device)
    torch.manual_seed(cfg.seed)
    model = train.GPT(cfg, meta["vocab_size"]).to(device).train()
    now = {}

    def fetch(step):
        starts = train.window_starts(step, cfg, len(data["train"]))[:cfg.batch_size]
        now["batch"] = train.get_batch(data["train"], starts, cfg.block_size, meta["vocab_size"], "train", device)

    def forward(_, candidate=None):
        with device_module.autocast(device, cfg.dtype):
            now["loss"] = (candidate or step_model)(*now["batch"])[1]

    def optimize(_):
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def run_once(candidate):
        fetch(0)
        forward(0, candidate)
        now["loss"].backward()
        model.zero_grad(set_to_none=True)

    step_model = device_module.compile_model(bool(cfg.compile), model, run_once, device)[0]
    optimizers = train.make_optimizers(model, cfg, device, bool(cfg.compile))
    return timed_parts(dict(data=fetch, forward=forward, backward=lambda _: now["loss"].backward(), optimizer=optimize),
                       spec["split"], device)


def loop(spec: dict) -> dict:
    """ours(spec), with what happens from step spec["first"] to spec["last"] counted: synchronisations of host and
    device, as PyTorch's debug mode sees them (by place), and graphs compiled."""
    from torch._dynamo.utils import counters

    places, graphs = Counter(), {}
    cuda = torch.cuda.is_available()

    def note(message, category, filename, lineno, *_):
        if "called a synchronizing" in str(message):
            places[f"{Path(filename).name}:{lineno}"] += 1

    def hook(step):
        if step in (spec["first"], spec["last"]):
            graphs[step] = counters["stats"]["unique_graphs"]
            if cuda:
                torch.cuda.set_sync_debug_mode("warn" if step == spec["first"] else "default")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        result = ours(spec | dict(hooks=[hook]))
    return result | dict(places=places, graphs=graphs[spec["last"]],
                         recompilations=graphs[spec["last"]] - graphs[spec["first"]], counted=cuda)


# -- nanoGPT -------------------------------------------------------------------------------------------------------

def plant(spec: dict) -> Path:
    """A folder of links to the checkout's files, with our ids as its data set `set`."""
    tree = Path(spec["folder"], "nanogpt")
    (tree / "data" / "set").mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        os.symlink(Path(spec["checkout"], name), tree / name)
    data, meta = opened(spec)
    if meta["vocab_size"] > 65_536:
        raise SystemExit("nanoGPT's ids are uint16: it cannot take a vocabulary beyond 65,536")
    for split, ids in data.items():
        np.asarray(ids[:]).astype(np.uint16).tofile(tree / "data" / "set" / f"{split}.bin")
    if meta["vocab_size"] != 50257:             # without a meta.pkl it takes GPT-2's, padded to 50,304
        with open(tree / "data" / "set" / "meta.pkl", "wb") as file:
            pickle.dump({"vocab_size": meta["vocab_size"]}, file)
    return tree


def nanogpt(spec: dict) -> dict:
    """The checkout's train.py with spec["settings"] as its flags. At spec["points"] it evaluates in its own way, on one
    batch, which is not measured, and then in ours."""
    tree, settings, device = plant(spec), spec["settings"], spec["device"]
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    import model as nano

    steps, watch, curve, held = settings["max_iters"], Stopwatch(device, spec["launched"]), [], {}
    every = max(1, steps // spec["points"]) if spec["evaluate"] else 10**9
    ids = opened(spec)[0]["val"]

    def train(self, mode=True):
        held["model"] = self
        if not mode:
            watch.pause()
        torch.nn.Module.train(self, mode)
        if mode:
            watch.resume()
        return self

    def save(checkpoint, path):
        watch.pause()
        gpt = held["model"]
        torch.nn.Module.train(gpt, False)
        loss = full_loss(lambda x, y: gpt(x, y)[0], ids, spec["block_size"], device)
        torch.nn.Module.train(gpt, True)
        curve.append((checkpoint["iter_num"], watch.seconds(), loss))
        watch.resume()

    def seeded(_, real=torch.manual_seed):                      # train.py has its seed written into it
        torch.manual_seed = real
        return real(spec["seed"])

    def zero_grad(self, set_to_none=True, real=torch.optim.Optimizer.zero_grad):
        real(self, set_to_none)
        watch.tick()

    nano.GPT.train, torch.save, torch.manual_seed = train, save, seeded
    torch.optim.Optimizer.zero_grad = zero_grad
    flags = settings | dict(dataset="set", out_dir="out", device=device, compile=spec["compile"], eval_interval=every,
                            eval_iters=1, always_save_checkpoint=True, log_interval=10**9)
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in flags.items())]
    names = runpy.run_path("train.py", run_name="__main__")
    watch.pause()
    tokens = settings["batch_size"] * settings["block_size"] * settings.get("gradient_accumulation_steps", 1)
    end = watch.seconds()
    result = settled(watch, curve or [(len(watch.ticks), end, None)], end, spec["compile"], tokens_per_step=tokens,
                     parameters=parameters(held["model"]))
    if spec.get("split"):
        result["parts"] = split_nanogpt(names, spec)
    return result


def split_nanogpt(names: dict, spec: dict) -> dict:
    """Seconds of the parts of a step. names: those of its train.py after a run, such as model and optimizer."""
    model, optimizer, now = names["model"], names["optimizer"], {}

    def forward(_):
        with names["ctx"]:
            now["loss"] = model(*now["batch"])[1]

    def optimize(_):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parts = dict(data=lambda _: now.update(batch=names["get_batch"]("train")), forward=forward,
                 backward=lambda _: now["loss"].backward(), optimizer=optimize)
    return timed_parts(parts, spec["split"], spec["device"])


# -- Hugging Face --------------------------------------------------------------------------------------------------

def trainer(spec: dict) -> dict:
    """transformers' Trainer with nanoGPT's settings and, for the rest, its own defaults."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    settings, device = spec["settings"], spec["device"]
    data, meta = opened(spec)
    steps, block, batch = settings["max_iters"], settings["block_size"], settings["batch_size"]
    micro = settings.get("gradient_accumulation_steps", 1)
    set_seed(spec["seed"])
    drop = settings["dropout"]
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=meta["vocab_size"], n_positions=block + 1, n_layer=settings["n_layer"], n_head=settings["n_head"],
        n_embd=settings["n_embd"], resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=drop, bos_token_id=None,
        eos_token_id=None, use_cache=False))
    starts = np.random.default_rng(spec["seed"]).integers(0, len(data["train"]) - block, steps * batch * micro)

    class Windows(torch.utils.data.Dataset):
        def __len__(self):
            return len(starts)

        def __getitem__(self, number):
            ids = torch.from_numpy(data["train"][starts[number]:starts[number] + block + 1].astype(np.int64))
            return dict(input_ids=ids, labels=ids)

    watch, curve = Stopwatch(device, spec["launched"]), []
    every = max(1, steps // spec["points"])

    class Timer(TrainerCallback):
        def on_train_begin(self, *_, **__):
            watch.pause()
            watch.resume()

        def on_step_end(self, args, state, control, **_):
            watch.tick()
            if spec["evaluate"] and (state.global_step % every == 0 or state.global_step == steps):
                watch.pause()
                model.eval()
                loss = full_loss(lambda x, y: model(input_ids=x).logits, data["val"], block, device)
                model.train()
                curve.append((state.global_step, watch.seconds(), loss))
                watch.resume()

    arguments = TrainingArguments(
        output_dir=spec["folder"], max_steps=steps, per_device_train_batch_size=batch,
        gradient_accumulation_steps=micro, learning_rate=settings["learning_rate"], adam_beta2=settings["beta2"],
        weight_decay=settings["weight_decay"], max_grad_norm=1.0, warmup_steps=settings["warmup_iters"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs=dict(min_lr=settings["min_lr"]), save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, seed=spec["seed"], use_cpu=device == "cpu", bf16=device != "cpu",
        torch_compile=spec["compile"])
    Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[Timer()]).train()
    watch.pause()
    end = watch.seconds()
    return settled(watch, curve or [(len(watch.ticks), end, None)], end, spec["compile"],
                   parameters=parameters(model), tokens_per_step=batch * micro * block)


# -- the machine ---------------------------------------------------------------------------------------------------

def matmul(spec: dict) -> dict:
    """Operations a second of a large matrix product in spec["dtype"]: the median of nine."""
    device, size = spec["device"], spec["size"]
    a = torch.randn(size, size, device=device).to(getattr(torch, spec["dtype"]))
    seconds = []
    for _ in range(11):
        device_module.synchronize(device)
        start = time.perf_counter()
        a @ a
        device_module.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return dict(rate=2 * size ** 3 / median(seconds[2:]))


def card(spec: dict) -> dict:
    """The card's name, and its peak rate if it is known (0 otherwise)."""
    from support.report import PEAKS

    name = torch.cuda.get_device_name(spec["device"])
    return dict(name=name, peak=next((rate * 1e12 for part, rate in PEAKS.items() if part in name), 0))


TASKS = dict(ours=ours, loop=loop, nanogpt=nanogpt, trainer=trainer, matmul=matmul, card=card)

if __name__ == "__main__":
    task, given, result = sys.argv[1:]      # nanoGPT's train.py finds its own flags in sys.argv later
    figures = TASKS[task](json.loads(given))
    Path(result).write_text(json.dumps(figures), encoding="utf-8")
