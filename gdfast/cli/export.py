"""`gdfast export`."""

from __future__ import annotations

import argparse

from gdfast.cli.train import text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast export` to a parser."""
    add = parser.add_argument
    add("run", type=text, metavar="RUN", help="a run's folder, or a file of its weights")
    add("--out", type=text, metavar="FILE", help="default: model.onnx beside the weights")


def main(args: argparse.Namespace) -> int:
    """Export; returns 0."""
    from gdfast.train import export

    path, error = export(args.run, args.out)
    print(f"{path}: checked with onnxruntime, largest difference {error:.1e} of the largest output")
    return 0
