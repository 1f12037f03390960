"""The former place of `python -m inkling.plots`."""

import sys

print(f"support/report.py has moved: python -m inkling.plots {' '.join(sys.argv[1:])}".rstrip(), file=sys.stderr)
sys.exit(2)
