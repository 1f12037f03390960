"""What the user probably meant: the names that exist, nearest first, and the command for a word out of place."""

import difflib
import os
import re
from pathlib import Path
from shlex import quote

# What other programs and newcomers call a flag, and its names here; each program has at most one of them.
OTHER_NAMES = {
    "lr": ["learning_rate"],
    "temp": ["temperature"],
    "prompt": ["start", "sample_start"],
    "length": ["max_new_tokens"],
    "max_length": ["max_new_tokens"],
    "tokens": ["max_new_tokens"],
    "n": ["num_samples"],
    "steps": ["max_iters"],
    "iters": ["max_iters"],
    "epochs": ["max_epochs"],
    "minutes": ["max_minutes"],
    "data": ["dataset"],
    "model": ["ckpt", "init_from"],
    "checkpoint": ["ckpt", "init_from"],
    "output": ["out_dir", "out"],
    "context_length": ["block_size"],
    "resume": ["init_from"],
}


def nearest_first(word: str, names) -> list:
    """The names, those most like `word` first; equally near ones in alphabetical order."""
    def distance(name: str) -> float:
        return -difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio()

    return sorted(sorted(names), key=distance)


def there_is(word: str, names, most: int = 6) -> str:
    """`; there is a, b, c` for the names that exist, nearest first; empty where there is none."""
    known = nearest_first(word, names)
    if not known:
        return ""
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"; there is {', '.join(known[:most])}{more}"


def nearest_flag(name: str, known) -> str:
    """The flag that was probably meant; empty if none comes close."""
    for meant in OTHER_NAMES.get(name, []):
        if meant in known:
            return meant
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else ""


def files_near(word: str) -> list:
    """The files and folders beside the one that `word` names whose names come close to its own."""
    path = Path(word)
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except (OSError, ValueError):           # no such folder, or no name that a folder can have
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3)]


def sets_in(folder: Path) -> list:
    """The names of the data sets in a folder such as data/."""
    return [path.parent.name for path in paths_in(folder, "*/meta.json")]


def paths_in(folder: Path, pattern: str) -> list:
    """The paths that match; none in a folder that cannot be read, or whose name is too long for one."""
    try:
        return list(Path(folder).glob(pattern))
    except (OSError, ValueError):
        return []


def runs_in(folder: Path = Path("out")) -> list:
    """The folders of the runs below `folder`."""
    return [str(path.parent) for path in paths_in(folder, "*/ckpt.pt")]


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
    """The command for a model or a text given to sample.py, or a prompt; empty for what
    looks like a flag."""
    if os.path.isfile(Path(word) / "ckpt.pt"):
        return f"python sample.py --out_dir={quote(word)}"
    if word.endswith(".pt") or os.path.isdir(word):
        return f"python sample.py --ckpt={quote(word)}"
    if os.path.isfile(word):
        return f"python sample.py --start={quote('FILE:' + word)}"
    if not word.startswith("-") and not word.endswith(".py") and "=" not in word and word.strip():
        return f"python sample.py --start={quote(word)}"
    return ""
