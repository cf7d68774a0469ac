"""`gdfast val`."""

from __future__ import annotations

import argparse
import json

from gdfast.cli.train import text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast val` to a parser."""
    add = parser.add_argument
    add("run", type=text, metavar="RUN", help="a run's folder")
    add("--data", type=text, metavar="SPEC", help="other data than the run's own")
    add("--weights", type=text, metavar="FILE", help="other weights than the run's best")
    add("--out", type=text, metavar="DIR", help="new folder for pictures and metrics.json")
    add("--device", type=text, default="auto", metavar="NAME", help="cpu, cuda, ...")
    add("--backend", type=text, metavar="NAME", help="auto, native, ... (default: the run's)")
    add("--json", action="store_true", help="print the measures as JSON")


def main(args: argparse.Namespace) -> int:
    """Measure a run's best weights on the test part of its data; returns 0."""
    from gdfast.train import validate

    measures, folder = validate(
        args.run, data_spec=args.data, weights_file=args.weights, out=args.out,
        device=args.device, backend=args.backend,
    )  # fmt: skip
    if args.json:
        print(json.dumps(measures, indent=2))
    else:
        width = max(map(len, measures))
        for name, value in measures.items():
            print(f"{name:<{width}}  {value:.4f}")
        if folder is not None:
            print(f"pictures and metrics.json are in {folder}")
    return 0
