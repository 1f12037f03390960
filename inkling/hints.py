"""What the user probably meant: the names that exist, nearest first, and the command for a word out of place."""

import difflib
import os
import re
import unicodedata
from pathlib import Path
from shlex import quote

CLOSE = 0.6                             # likeness from which a name may be what was meant
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


def likeness(word: str, name: str) -> float:
    """How much alike two words are, whatever their case: 0 to 1, and 1 for the same."""
    return difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio()


def nearest_first(word: str, names) -> list:
    """The names, those most like `word` first; equally near ones in alphabetical order."""
    return sorted(sorted(names), key=lambda name: -likeness(word, name))


def closest(word: str, names) -> str:
    """The one name that was probably meant; empty if none comes close."""
    nearest = nearest_first(word, names)
    return nearest[0] if nearest and likeness(word, nearest[0]) >= CLOSE else ""


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
    return closest(name, known)


def column_hint(column: str, names) -> str:
    """The columns or fields that there are, and the flag that names the one that was probably meant: the nearest
    first if one comes close, else in their own order."""
    meant = closest(column, names)
    ordered = nearest_first(column, names) if meant else names
    listed = ", ".join(ordered)[:300] or "no fields"
    return f"{listed} (--text_column={quote(meant) if meant else ''})"


def files_near(word: str, most: int = 3) -> list:
    """The files and folders beside the one that `word` names whose names come close to its own, with their
    suffixes or without."""
    path = Path(word)
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except (OSError, ValueError):           # no such folder, or no name that a folder can have
        return []
    likenesses = {name: max(likeness(path.name, name), likeness(path.stem, Path(name).stem)) for name in names}
    near = [name for name in names if likenesses[name] >= CLOSE]
    return [str(path.parent / name) for name in sorted(near, key=lambda name: (-likenesses[name], name))[:most]]


def fits_set_name(char: str) -> bool:
    """Whether a character may stand in the name of a data set. Marks, such as the vowel signs of Hindi,
    belong to the letters before them."""
    return char.isalnum() or char in "._-" or unicodedata.category(char)[0] == "M"


def set_name_like(text: str) -> str:
    """A name for a data set that comes close to `text`: my_book for my book."""
    name = "".join(char if fits_set_name(char) else " " for char in text)
    name = "_".join(name.split())
    while name and not name[0].isalnum():
        name = name[1:]
    return name or "text"


def sets_in(folder: Path) -> list:
    """The names of the data sets in a folder such as data/."""
    return [path.parent.name for path in paths_in(folder, "*/meta.json")]


def paths_in(folder: Path, pattern: str) -> list:
    """The paths that match; none in a folder that cannot be read, or whose name is too long for one."""
    try:
        return list(Path(folder).glob(pattern))
    except (OSError, ValueError):
        return []


def runs_in(folder: Path = Path("out"), file: str = "ckpt.pt") -> list:
    """The folders of the runs below `folder`, those that hold `file`."""
    return [str(path.parent) for path in paths_in(folder, f"**/{file}")]


def runs_like(word: str, file: str = "ckpt.pt") -> list:
    """The folders of the runs that hold `file`, under out/ and beside the run that `word` names by its folder
    or its checkpoint; those with the most similar names first."""
    path = Path(word)
    wanted = path.parent if path.suffix == ".pt" and path.parent.name else path
    beside = [str(found.parent) for found in paths_in(wanted.parent, f"*/{file}")]
    runs = sorted({*runs_in(file=file), *beside})
    return sorted(runs, key=lambda run: -likeness(wanted.stem, Path(run).name))


def checkpoints_like(word: str, file: str = "ckpt.pt", most: int = 4) -> str:
    """`; there is out/a/ckpt.pt, ...`: the checkpoints that exist, those of the most similar runs first."""
    runs = runs_like(word, file)
    if not runs:
        return ""
    more = f" and {len(runs) - most} more" if len(runs) > most else ""
    return f"; there is {', '.join(f'{run}/{file}' for run in runs[:most])}{more}"


def tokenizer_meant(word: str, encodings, models: dict) -> str:
    """The value of --tokenizer that was probably meant; empty if none comes close. encodings: tiktoken's names;
    models: {name of a model: its encoding}."""
    if match := re.fullmatch(r"bpe\W?(\d+)", word, re.IGNORECASE):
        return f"bpe:{match[1]}"
    if os.path.isfile(Path(word, "meta.json")):
        return f"{word}/meta.json"
    if run := run_meant(word):
        return f"{run}/ckpt.pt"
    if os.path.isfile(Path(word, "ckpt.pt")):
        return f"{word}/ckpt.pt"
    if os.path.isfile(Path("data", word, "meta.json")):
        return f"data/{word}/meta.json"
    if word.lower() in models:
        return models[word.lower()]
    begun = [name for name in encodings if name.startswith(word.lower())]
    return begun[0] if begun else closest(word, ["char", "byte", *encodings])


def run_meant(word: str) -> str:
    """The folder of the run that `word` names: out/book for book, and for out/bok, which comes close; else
    empty."""
    if os.path.isfile(Path("out", word, "ckpt.pt")):
        return str(Path("out", word))
    if os.sep not in word:
        return ""
    return closest(word, [run for run in runs_like(word) if Path(run).parent == Path(word).parent])


def command_for_training(word: str, built_in=()) -> str:
    """The command for a text, a data set, a run or a model given to train.py, or for the nearest one if there is
    none of that name; empty for any other word. built_in: the names of the built-in sets."""
    path = Path(word)
    folder = path.parent if path.name in ("meta.json", "train.bin") else path
    if os.path.isfile(folder / "meta.json"):
        place = folder.resolve()
        return f"python train.py --dataset={quote(place.name)} --data_dir={quote(str(place.parent))}"
    if word.endswith(".pt") or os.path.isfile(path / "config.json"):
        return f"python train.py --init_from={quote(word)} --dataset=NAME"
    if word in built_in or os.path.isfile(Path("data", word, "meta.json")):
        return f"python train.py --dataset={quote(word)}"
    if os.path.isfile(path / "ckpt.pt"):
        return f"python train.py --init_from={quote(word)} --dataset=NAME"
    if os.path.isdir(word) and paths_in(path, "*.py"):
        return ""                           # of configs, such as config/
    if os.path.exists(word):
        name = set_name_like(path.resolve().stem)
        return f"python prepare.py {quote(word)} --name={name} && python train.py --dataset={name}"
    if name := closest(word, [*built_in, *sets_in(Path("data"))]):
        return f"python train.py --dataset={quote(name)}"
    if near := [file for file in files_near(word) if Path(file).suffix != ".py"]:
        return command_for_training(near[0])
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
    if run := run_meant(word):
        return f"python sample.py --out_dir={quote(run)}"
    if not word.startswith("-") and not word.endswith(".py") and "=" not in word and word.strip():
        return f"python sample.py --start={quote(word)}"
    return ""
