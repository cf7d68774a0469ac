"""`gdfast data`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gdfast.cli.train import text

_SHOWN = 8  # images in a row of the grid
_REFRESH_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast data` to a parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="draw images, and what each augmentation makes of them")
    show.add_argument("spec", type=text, metavar="SPEC", help="data, as for gdfast train --data")
    show.add_argument("--out", type=text, metavar="FILE", default="grid.png", help="a PNG file")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="decides what is drawn")
    check = actions.add_parser("check", help="list everything that is wrong with data")
    check.add_argument("spec", type=text, metavar="SPEC", help="data, as for gdfast train --data")


def main(args: argparse.Namespace) -> int:
    """Show, or check; returns 0, or 1 for data with problems."""
    return _show(args) if args.action == "show" else _check(args)


def _show(args: argparse.Namespace) -> int:
    from gdfast.data.problems import absolute
    from gdfast.errors import UserError
    from gdfast.files import write_atomic
    from gdfast.train import examples, plots

    if args.seed < 0:
        raise UserError(f"data: --seed: expected 0 or more, got {args.seed}")
    rows = examples.rows(absolute(args.spec), _SHOWN, args.seed)
    write_atomic(Path(args.out), plots.png(plots.grid(rows, args.spec)))
    print(f"{len(rows)} rows of images are in {args.out}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from gdfast.data.check import check
    from gdfast.data.problems import absolute

    live = sys.stderr.isatty()
    shown = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if live and (time.perf_counter() - shown > _REFRESH_SECONDS or done == total):
            shown = time.perf_counter()
            print(f"\r{done:,} of {total:,} images", end="", file=sys.stderr)

    problems, summary = check(absolute(args.spec), progress)
    if live:
        print("\r\x1b[K", end="", file=sys.stderr)
    for problem in problems:
        print(problem)
    print(summary)
    found = len(problems)
    print(f"{found:,} problem{'' if found == 1 else 's'}" if found else "nothing wrong was found")
    return 1 if found else 0
