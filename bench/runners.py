"""One task in a process of its own: `python bench/runners.py TASK SPEC.json-text RESULT.json`.

The other scripts start it (run_task in common.py); a person does not. It imports nothing that its
task does not need, since start-up is measured as well.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inkling.cli import exit_code

MODULES = {                             # where each task's function is
    "ours": "ours",
    "loop": "ours",
    "memory": "ours",
    "nanogpt": "peers",
    "trainer": "peers",
    "matmul": "hardware",
    "card": "hardware",
}


def main(argv: list):
    task, spec, result = argv
    measure = getattr(importlib.import_module(MODULES[task]), task)
    figures = measure(json.loads(spec))
    Path(result).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
