"""The command that the user probably meant, for a word on the command line that is not a config file."""

import os
import re
from pathlib import Path
from shlex import quote


def command_for_training(word: str) -> str:
    """The command for a text, a data set or a model given to train.py; empty for any other word."""
    path = Path(word)
    folder = path.parent if path.name in ("meta.json", "train.bin") else path
    if os.path.isfile(folder / "meta.json"):
        place = folder.resolve()
        return f"python train.py --dataset={quote(place.name)} --data_dir={quote(str(place.parent))}"
    if word.endswith(".pt") or os.path.isfile(path / "config.json"):
        return f"python train.py --init_from={quote(word)} --dataset=NAME"
    if os.path.exists(word):
        name = re.sub("[^A-Za-z0-9._-]+", "_", path.resolve().stem).strip("._-") or "text"
        return f"python prepare.py {quote(word)} --name={name} && python train.py --dataset={name}"
    return ""


def command_for_sampling(word: str) -> str:
    """The command for a model or a text given to sample.py; empty for any other word."""
    if word.endswith(".pt") or os.path.isdir(word):
        return f"python sample.py --ckpt={quote(word)}"
    if os.path.isfile(word):
        return f"python sample.py --start={quote('FILE:' + word)}"
    return ""
