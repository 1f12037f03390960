"""Other programs that train the same architecture on the same ids, as tasks of runners.py.

- nanogpt: the checkout's train.py, run whole in a temporary folder, on our ids as uint16. Only its
  seed is another.
- trainer: transformers' Trainer with GPT2LMHeadModel and nanoGPT's hyper-parameters, on random
  windows of block_size + 1 tokens, so that it learns as many predictions as the others.

What is added is bench/timing.py's timer and evaluation: to nanoGPT by hooks that PyTorch calls, to
the Trainer by its callbacks.
"""

import os
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from timing import StepTimer, count_parameters, full_loss, open_set, time_parts
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from inkling.cli import UserError


def tokens_per_step(settings: dict) -> int:
    return settings["batch_size"] * settings["block_size"] * settings.get("gradient_accumulation_steps", 1)


# -- nanoGPT -------------------------------------------------------------------------------------

def nanogpt(spec: dict) -> dict:
    """Run the checkout's train.py with spec["settings"] as its flags, and evaluate it
    spec["points"] times."""
    settings = spec["settings"]
    device = spec["device"]
    steps = settings["max_iters"]
    interval = max(1, steps // spec["points"])
    ids = open_set(spec)[0]["val"]
    timer = StepTimer(device, spec["launched"])
    trained = {}                        # "model": its GPT, uncompiled

    def before_first_step(module, args):
        first_call.remove()
        trained["model"] = getattr(module, "_orig_mod", module)
        timer.start()

    def val_loss():
        model = trained["model"]
        return full_loss(model, lambda x, y: model(x, y)[0], ids, spec["block_size"], device)

    def after_step(optimizer, args, kwargs):
        timer.end_step()
        step = len(timer.step_ends)
        if spec["evaluate"] and (step % interval == 0 or step == steps):
            timer.evaluate(step, val_loss)

    folder = plant_checkout(spec)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in nanogpt_flags(spec).items())]
    first_call = register_module_forward_pre_hook(before_first_step)
    hook = register_optimizer_step_post_hook(after_step)
    names = runpy.run_path("train.py", run_name="__main__")
    hook.remove()
    figures = timer.figures(spec["compile"], tokens_per_step=tokens_per_step(settings),
                            parameters=count_parameters(trained["model"]))
    if spec.get("split"):
        figures["parts"] = nanogpt_parts(names, spec["split"], device)
    return figures


def nanogpt_flags(spec: dict) -> dict:
    return spec["settings"] | {
        "dataset": "set",
        "out_dir": "out",
        "device": spec["device"],
        "compile": spec["compile"],
        "max_iters": spec["settings"]["max_iters"] - 1,         # after which it makes one more update
        "eval_interval": 10**9,
        "eval_iters": 0,                                        # its evaluation at step 0 reads no batch
        "always_save_checkpoint": False,
        "log_interval": 10**9,
    }


def plant_checkout(spec: dict) -> Path:
    """A folder with the checkout's program, its seed set to spec["seed"], and with our ids as its
    data set `set`."""
    folder = Path(spec["folder"], "nanogpt")
    data_folder = folder / "data" / "set"
    data_folder.mkdir(parents=True)
    for name in ("model.py", "configurator.py"):
        shutil.copyfile(Path(spec["checkout"], name), folder / name)
    program = Path(spec["checkout"], "train.py").read_text(encoding="utf-8")
    seeding = "torch.manual_seed(1337"                          # no flag sets it
    if program.count(seeding) != 1:
        raise UserError(f"{spec['checkout']}/train.py does not say {seeding} in one place, as nanoGPT's does")
    program = program.replace(seeding, f"torch.manual_seed({spec['seed']}")
    (folder / "train.py").write_text(program, encoding="utf-8")

    data, meta = open_set(spec)
    if meta["vocab_size"] > 65_536:
        raise UserError("nanoGPT's ids are uint16: it cannot take a vocabulary beyond 65,536")
    for split, ids in data.items():
        np.asarray(ids[:]).astype(np.uint16).tofile(data_folder / f"{split}.bin")
    if meta["vocab_size"] != 50257:     # without a meta.pkl it takes GPT-2's, padded to 50,304
        with open(data_folder / "meta.pkl", "wb") as file:
            pickle.dump({"vocab_size": meta["vocab_size"]}, file)
    return folder


def nanogpt_parts(names: dict, steps: int, device: str) -> dict:
    """Seconds of the parts of a step. names: those of its train.py after the run, such as model and
    optimizer."""
    model = names["model"]
    optimizer = names["optimizer"]
    current = {}                        # what one part hands to the next

    def fetch(step):
        current["batch"] = names["get_batch"]("train")

    def forward(step):
        with names["ctx"]:
            current["loss"] = model(*current["batch"])[1]

    def backward(step):
        current["loss"].backward()

    def optimize(step):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parts = {"data": fetch, "forward": forward, "backward": backward, "optimizer": optimize}
    return time_parts(parts, steps, device)


# -- Hugging Face --------------------------------------------------------------------------------

class Windows(torch.utils.data.Dataset):
    """Windows of block_size + 1 ids at random places."""

    def __init__(self, ids, block_size: int, count: int, seed: int):
        self.ids = ids
        self.block_size = block_size
        self.starts = np.random.default_rng(seed).integers(0, len(ids) - block_size, count)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, number):
        start = self.starts[number]
        window = torch.from_numpy(self.ids[start:start + self.block_size + 1].astype(np.int64))
        return {"input_ids": window, "labels": window}


def trainer(spec: dict) -> dict:
    """Train with transformers' Trainer in nanoGPT's settings and, for the rest, its own defaults."""
    from transformers import Trainer, TrainerCallback, set_seed

    settings = spec["settings"]
    device = spec["device"]
    steps = settings["max_iters"]
    interval = max(1, steps // spec["points"])
    data, meta = open_set(spec)
    set_seed(spec["seed"])
    model = trainer_model(settings, meta["vocab_size"])
    sequences = steps * settings["batch_size"] * settings.get("gradient_accumulation_steps", 1)
    windows = Windows(data["train"], settings["block_size"], sequences, spec["seed"])
    timer = StepTimer(device, spec["launched"])

    def val_loss():
        return full_loss(model, lambda x, y: model(input_ids=x).logits, data["val"],
                         settings["block_size"], device)

    class Timing(TrainerCallback):
        def on_train_begin(self, *_, **__):
            timer.start()

        def on_step_end(self, args, state, control, **_):
            timer.end_step()
            step = state.global_step
            if spec["evaluate"] and (step % interval == 0 or step == steps):
                timer.evaluate(step, val_loss)

    arguments = trainer_arguments(spec)
    Trainer(model=model, args=arguments, train_dataset=windows, callbacks=[Timing()]).train()
    return timer.figures(spec["compile"], parameters=count_parameters(model),
                         tokens_per_step=tokens_per_step(settings))


def trainer_model(settings: dict, vocab_size: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size,
        n_positions=settings["block_size"] + 1,
        n_layer=settings["n_layer"],
        n_head=settings["n_head"],
        n_embd=settings["n_embd"],
        resid_pdrop=settings["dropout"],
        embd_pdrop=settings["dropout"],
        attn_pdrop=settings["dropout"],
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    ))


def trainer_arguments(spec: dict):
    from transformers import TrainingArguments

    settings = spec["settings"]
    on_cpu = spec["device"] == "cpu"
    return TrainingArguments(
        output_dir=spec["folder"],
        max_steps=settings["max_iters"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings.get("gradient_accumulation_steps", 1),
        learning_rate=settings["learning_rate"],
        adam_beta2=settings["beta2"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=1.0,
        warmup_steps=settings["warmup_iters"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": settings["min_lr"]},
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=spec["seed"],
        use_cpu=on_cpu,
        bf16=not on_cpu,
        torch_compile=spec["compile"],
    )
