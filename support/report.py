"""This program has moved: python -m inkling.plots."""

import shlex
import sys

command = shlex.join(["python", "-m", "inkling.plots", *sys.argv[1:]])
print(f"support/report.py has moved: {command}", file=sys.stderr)
sys.exit(2)
