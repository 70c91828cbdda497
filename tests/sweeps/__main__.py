"""``python -m tests.sweeps [ops] [modules] [families] [--only PATTERN] [--coverage PAGE]``: every case, and the tally."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

from .coverage import page
from .tally import checked, report

SWEEPS = ("ops", "modules", "families")


def main() -> int:
    """Run the sweeps that were asked for, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps", description=__doc__)
    parser.add_argument("sweeps", nargs="*", help=f"of {', '.join(SWEEPS)}; by default all")
    parser.add_argument("--only", default="*", help="a pattern of case names, such as 'ops/*conv*'")
    parser.add_argument("--coverage", type=Path, help="also write the page of what was found, such as docs/coverage.md")
    options = parser.parse_args()
    sweeps = options.sweeps or SWEEPS
    if unknown := set(sweeps) - set(SWEEPS):
        parser.error(f"no such sweep: {', '.join(sorted(unknown))}")
    # The material is other people's, and so are its warnings.
    warnings.simplefilter("ignore")
    cases = (c for s in sweeps for c in importlib.import_module(f".{s}", __package__).cases(whole=True))
    found = checked(c for c in cases if fnmatchcase(c.name, options.only))
    if options.coverage:
        options.coverage.write_text(page(found), encoding="utf-8")
    return 0 if report(found, complete=sweeps if options.only == "*" else ()) else 1


if __name__ == "__main__":
    sys.exit(main())
