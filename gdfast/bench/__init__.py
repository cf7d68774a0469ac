"""`gdfast bench`: our kernels beside the best that native PyTorch has, in one table.

Nothing heavy is imported before a benchmark runs, so that `gdfast.bench.cases` stays a pure table.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

_PASSES = ("forward", "grad_input", "grad_weight")
_SUITES = (
    "quick", "all", "simple_cnn", "resnet20", "resnet18", "resnet50", "yolo", "mobilenet",
    "winograd", "norm", "sgd", "step",
)  # fmt: skip
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast bench` to a parser."""
    parser.add_argument(
        "--suite", choices=_SUITES, default="quick",
        help="what to measure (default: quick, a selection that takes under two minutes)",
    )  # fmt: skip
    parser.add_argument(
        "--only", default="", metavar="TEXT",
        help="only what has this in its name: --suite step --only resnet18",
    )  # fmt: skip
    parser.add_argument(
        "--passes", nargs="+", choices=_PASSES, default=list(_PASSES), metavar="PASS",
        help=f"passes of the layers: {', '.join(_PASSES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="threads for both sides (default: torch's)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=15, metavar="N",
        help="rounds, each timing every variant twice (default: 15)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="backend of ours (default: auto)"
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="native training steps through torch.compile too (slow to start)",
    )  # fmt: skip
    parser.add_argument(
        "--recorded", action="store_true", help="our training steps by gdfast.GraphedStep"
    )
    parser.add_argument(
        "--memory", action="store_true",
        help="peak memory of training steps too, each side in a process of its own",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), metavar="DIR",
        help="folder for the JSON file and the plot (default: runs/bench)",
    )  # fmt: skip
    parser.add_argument(
        "--explain", action="store_true",
        help="measure nothing; tell how each convolution is run, and by which times it was chosen",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark that the options ask for.

    Returns 0, or 1 when a result was wrong. The table (or JSON) goes to stdout, progress to stderr.

    Raises:
        OSError: the folder for the results cannot be made or written to.
        BackendError: the backend asked for by name cannot run something.
        UserError: `--only` finds nothing.
    """
    from dataclasses import replace

    import torch

    from gdfast import backends
    from gdfast.bench import explain, machine, memory, peak, plot, report, suites
    from gdfast.bench.result import Result, measure
    from gdfast.errors import UserError
    from gdfast.extras import MissingExtraError
    from gdfast.files import write_atomic

    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    try:
        planned = suites.plan(
            args.suite, args.passes, dtype, args.compile, args.only, args.recorded
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.explain:
        with backends.backend(args.backend), _Progress() as progress:
            rows, facts = explain.collect(planned, dtype, progress.show), machine.describe()
        print(explain.to_json(rows, facts) if args.json else explain.table(rows, facts))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if unfair := machine.unfair():
        print(unfair, file=sys.stderr)

    results: list[Result] = []
    with backends.backend(args.backend), _Progress() as progress:
        progress.show("measuring the machine's peak")
        facts, limits = machine.describe(), peak.measure(dtype)
        for position, item in enumerate(planned, 1):
            progress.show(f"[{position}/{len(planned)}] {item.label}")
            result = measure(item.build(), args.rounds)
            if args.memory and item.step is not None and result.times is not None:
                layouts = result.best_ours.split()[0], result.best_native.split()[0]
                result = replace(result, memory=memory.compare(item.step, dtype, *layouts))
            results.append(result)
        progress.show("measuring the machine's peak again")
        limits = limits.better(peak.measure(dtype))

    settings = {
        "suite": args.suite,
        "only": args.only,
        "passes": args.passes,
        "rounds": args.rounds,
        "dtype": args.dtype,
        "backend": args.backend,
        "compile": args.compile,
        "recorded": args.recorded,
    }
    document = report.to_json(results, facts, limits, settings)
    parts = [machine.slug(), args.suite, machine.slug_of(args.only), args.dtype]
    parts += ["recorded"] * args.recorded
    stem = "-".join(filter(None, [*parts, f"{facts['threads']}t", machine.held()]))
    title = f"{facts['cpu']}, threads: {facts['threads']}, torch {facts['torch']}, {args.dtype}"
    # Saved before it is printed, so that `| head` loses nothing; printed even if saving fails.
    try:
        saved = args.out / f"{stem}.json"
        write_atomic(saved, f"{document}\n".encode())
        print(f"saved {saved}", file=sys.stderr)
        plot.save(results, title, saved.with_suffix(".png"))
        print(f"saved {saved.with_suffix('.png')}", file=sys.stderr)
    except MissingExtraError as error:
        print(f"no plot: {error}", file=sys.stderr)
    finally:
        print(document if args.json else report.table(results, facts, limits, args.dtype))
    return 0 if all(result.check.ok for result in results) else 1


class _Progress:
    """One line on stderr that is replaced on a terminal, a line for each step elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        line = f"{time.monotonic() - self._start:4.0f} s  {text}"
        if self._terminal:
            print(f"\r\033[K{line[:79]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        # Whatever comes next, an error too, starts on an empty line.
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value
