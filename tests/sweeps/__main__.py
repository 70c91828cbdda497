"""``python -m tests.sweeps [ops] [modules] [families] [--only PATTERN]``: every case, and the tally."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from fnmatch import fnmatchcase

from .tally import report

SWEEPS = ("ops", "modules", "families")


def main() -> int:
    """Run the sweeps that were asked for, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps", description=__doc__)
    parser.add_argument("sweeps", nargs="*", choices=SWEEPS, default=SWEEPS)
    parser.add_argument("--only", default="*", help="a pattern of case names, such as 'ops/*conv*'")
    options = parser.parse_args()
    # The material is other people's, and so are its warnings.
    warnings.simplefilter("ignore")
    cases = (c for s in options.sweeps for c in importlib.import_module(f".{s}", __package__).cases(whole=True))
    findings = (c.check() for c in cases if fnmatchcase(c.name, options.only))
    return 0 if report(findings, complete=options.sweeps if options.only == "*" else ()) else 1


if __name__ == "__main__":
    sys.exit(main())
