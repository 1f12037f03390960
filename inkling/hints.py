"""What the user probably meant: the names that exist, nearest first, and the command for a word out of place."""

import difflib
import math
import os
import re
import unicodedata
from pathlib import Path
from shlex import quote

CLOSE = 0.6                             # likeness from which a name may be what was meant
SURE = 0.75                             # likeness from which a command may begin with what was meant
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
    "resume": ["init_from=resume"],
    "continue": ["init_from=resume"],
    "start": ["sample_start"],
    "name": ["dataset", "out_dir"],
    "num": ["num_samples"],
    "o": ["out", "out_dir"],
    "p": ["start"],
    "hidden": ["n_embd"],
    "hidden_size": ["n_embd"],
    "emb_dim": ["n_embd"],
    "context": ["block_size"],
    "cpu": ["device=cpu"],
    "gpu": ["device=cuda"],
    "cuda": ["device=cuda"],
}
DASHES = r"\-\u2010-\u2015\u2212\u2500\ufe63\uff0d"     # and what editors and Chinese keyboards make of them
FLAG_LIKE = re.compile(rf"([{DASHES}/]*)(\w[\w{DASHES}]*)(?:\s*[=:\uff1d\ufe66\uff1a]\s*(.*))?", re.DOTALL)
QUOTES = "\u201c\u201d\u2018\u2019"     # no shell takes them for quotes
SCALES = {"k": 1000, "kb": 1000, "mb": 10**6, "gb": 10**9, "%": 0.01}
UNITS = (r"([msh]|min(ute)?s?|sec(ond)?s?|hours?|steps?|epochs?|tokens?"
         r"|\u5206\u949f?|\u79d2|\u5c0f\u65f6|\u6b65|\u8f6e)?")
# By the first character of a unit of time.
MINUTES = {"m": 1, "\u5206": 1, "s": 1 / 60, "\u79d2": 1 / 60, "h": 60, "\u5c0f": 60}


def likeness(word: str, name: str) -> float:
    """How much alike two words are, whatever their case: 0 to 1, and 1 for the same."""
    return difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio()


def nearest_first(word: str, names) -> list:
    """The names: first those that come close to `word`, the closest before the others, then the rest in
    their order."""
    names = list(names)
    near = [name for name in names if likeness(word, name) >= CLOSE]
    rest = [name for name in names if name not in near]
    return sorted(near, key=lambda name: -likeness(word, name)) + rest


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
    for meant in OTHER_NAMES.get(name.lower(), []):
        if meant.partition("=")[0] in known:
            return meant
    return closest(name, known)


def flag_meant(word: str, known) -> str:
    """--dataset=book for a word that spells it in another way: -dataset=book, dataset=book, --dataset:book, or
    with the dashes or the = of a Chinese keyboard; --help for -help; empty if no flag comes close."""
    match = FLAG_LIKE.fullmatch(word.strip(QUOTES))
    if not match or os.path.exists(word):
        return ""
    dashes, name, value = match.groups()
    name = re.sub(f"[{DASHES}]", "_", name).lower()
    if dashes and value is None and name in ("help", "h"):
        return "--help"
    meant = name if name in known else nearest_flag(name, known) if dashes.strip("/") else ""
    if not meant or not (dashes or value is not None):
        return ""
    return f"--{meant}" if value is None or "=" in meant else f"--{meant}={quote(value)}"


def number_meant(text: str, whole: bool, flag: str = "max_minutes") -> str:
    """The number that a text spells in another way: 1000 for 1,000, 0.5 for 0,5, 5 for 5min, 0.5 for 30s, 10000 for
    10k, 0.1 for 10%; empty if there is none, as for a time where the flag takes none."""
    spelled = text
    text = unicodedata.normalize("NFKC", text).replace("\u3002", ".").strip(" ,;.\u3001").lower()
    thousands = re.fullmatch(rf"([1-9]\d{{0,2}}(?:,\d{{3}})+)\s*{UNITS}", text)
    if thousands:                       # or a fraction, where that may be
        return thousands[1].replace(",", "") if whole else ""
    number = re.fullmatch(rf"(\d+(?:[.,]\d+)?(?:e[-+]?\d+)?)\s*([kmg]b|k|%|{UNITS})", text)
    if not number:
        return ""
    meant = number[1].replace(",", ".")
    scale = SCALES.get(number[2])
    if not scale and number[2][:1] in MINUTES and not number[2].startswith("step"):
        if flag != "max_minutes":
            return ""
        scale = MINUTES[number[2][0]]
    if scale:
        scaled = round(float(float(meant) * scale), 4)
        meant = str(int(scaled)) if scaled.is_integer() else f"{scaled:g}"
    is_whole = float(meant).is_integer()                # an infinite one is not
    return "" if meant == spelled or not math.isfinite(float(meant)) or (whole and not is_whole) else meant


def column_hint(column: str, names) -> str:
    """The columns or fields that there are, nearest first, and the flag that names one of them."""
    listed = ", ".join(nearest_first(column, names))[:300] or "no fields"
    meant = closest(column, names)
    return f"{listed} (--text_column={quote(meant) if meant else ''})"


def files_near(word: str, most: int = 3) -> list:
    """The files and folders beside the one that `word` names whose names come close to its own, with their
    suffixes or without."""
    path = Path(word)
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except (OSError, ValueError):           # no such folder, or no name that a folder can have
        names = []
    if "\\" in word and not names or path.name.count("\\"):         # a path as Windows writes it
        return files_near(word.rsplit("\\", 1)[1], most)
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
    """The paths that match, in alphabetical order; none in a folder that cannot be read, or whose name is
    too long for one."""
    try:
        return sorted(Path(folder).glob(pattern))
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
    spelled = {name.replace("-", ""): encoding for name, encoding in models.items()} | models
    if word.lower() in spelled:
        return spelled[word.lower()]
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
    if word == "resume" and not os.path.exists(word):
        return "the same command with --init_from=resume"
    folder = path.parent if path.name in ("meta.json", "train.bin") else path
    if os.path.isfile(folder / "meta.json"):
        place = folder.resolve()
        return f"python train.py --dataset={quote(place.name)} --data_dir={quote(str(place.parent))}"
    if word.endswith(".pt") or os.path.isfile(path / "config.json"):
        return f"python train.py --init_from={quote(word)} --dataset=NAME"
    if word in built_in or os.path.isfile(Path("data", word, "meta.json")):
        config = f"config/{word}.py"        # with the settings for that set
        return f"python train.py {config if os.path.isfile(config) else '--dataset=' + quote(word)}"
    if os.path.isfile(path / "ckpt.pt"):
        return f"python train.py --init_from={quote(word)} --dataset=NAME"
    if os.path.isdir(word) and paths_in(path, "*.py"):
        return ""                           # of configs, such as config/
    if os.path.exists(word):
        name = set_name_like(path.resolve().stem)
        return f"python prepare.py {quote(word)} --name={name} && python train.py --dataset={name}"
    if name := closest(word, [*built_in, *sets_in(Path("data"))]):
        return f"python train.py --dataset={quote(name)}"
    near = [file for file in files_near(word) if Path(file).suffix != ".py"]
    if near and max(likeness(Path(word).name, Path(near[0]).name), likeness(path.stem, Path(near[0]).stem)) >= SURE:
        return command_for_training(near[0])
    return ""


def command_for_sampling(word: str) -> str:
    """The command for a model or a text given to sample.py, or a prompt; empty for what
    looks like a flag. A word like out/bok, in a folder that is there, names a run and no prompt."""
    if os.path.isfile(Path(word) / "ckpt.pt"):
        return f"python sample.py --out_dir={quote(word)}"
    if word.endswith(".pt") or os.path.isdir(word):
        return f"python sample.py --ckpt={quote(word)}"
    if os.path.isfile(word):
        return f"python sample.py --start={quote('FILE:' + word)}"
    if run := run_meant(word) or run_meant(word.replace("\\", "/")):
        return f"python sample.py --out_dir={quote(run)}"
    looks_like_path = re.fullmatch(r"\S+/\S+", word) and os.path.isdir(Path(word).parent)
    if looks_like_path and (runs := runs_like(word)):
        return f"python sample.py --out_dir={quote(runs[0])}"
    if not word.startswith("-") and not word.endswith(".py") and "=" not in word and word.strip():
        return f"python sample.py --start={quote(word)}"
    return ""
