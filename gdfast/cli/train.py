"""`gdfast train`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdfast.train import Settings

# Options that decide a run's outcome. None means that the user left it to the recipe; a resumed
# run has its own, so none of them may be given then.
_RECIPE_OPTIONS = ("epochs", "lr", "momentum", "schedule", "warmup", "batch_size")
_OWN_OPTIONS = ("recipe", *_RECIPE_OPTIONS, "seed", "device", "backend", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast train` to a parser."""
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    cnn = models.add_parser(
        "cnn",
        help="a small convolutional network that reads handwritten digits",
        description="Train a small convolutional network to read handwritten digits: 3x3 "
        "convolution with 32 kernels, ReLU, max pooling, linear layer.",
        allow_abbrev=False,
    )
    add = cnn.add_argument
    add(
        "--data", type=_text, metavar="SPEC",
        help="digits (default; 1,797 images that come with scikit-learn) or mnist:DIR, a folder of "
        "idx files, gzip or not",
    )  # fmt: skip
    add("--download", action="store_true", help="fetch what mnist:DIR lacks from the network")
    add(
        "--recipe", type=_text, metavar="NAME",
        help="default (lr 0.1, momentum 0.9, cosine, 100 steps of warm-up) or article (lr 0.01, "
        "no momentum, constant)",
    )  # fmt: skip
    add("--epochs", type=int, metavar="N", help="passes over the data (digits: 20, MNIST: 5)")
    add("--lr", type=float, help="learning rate, at its peak")
    add("--momentum", type=float, help="share of the last step that the next one keeps")
    add("--schedule", metavar="NAME", help="of the learning rate: cosine or constant")
    add("--warmup", type=int, metavar="N", help="steps until the learning rate is at its peak")
    add("--batch-size", type=int, metavar="N", help="images per step (default: 64)")
    add("--seed", type=int, metavar="N", help="decides weights and order (default: 0)")
    add(
        "--device", type=_text, metavar="NAME",
        help="cpu, cuda, cuda:1, ... (default: cuda if there, or cpu)",
    )  # fmt: skip
    add(
        "--backend", type=_text, metavar="NAME",
        help="auto (default): the fastest; native: plain PyTorch; `gdfast doctor` lists them all",
    )  # fmt: skip
    add(
        "--out", type=_text, metavar="DIR",
        help="new folder for the results (default: runs/cnn-1, runs/cnn-2, ...)",
    )  # fmt: skip
    add(
        "--resume", type=_text, metavar="RUN",
        help="go on with the interrupted run in this folder, with its own settings",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Train, or go on with a run; returns 0, or 128 and the signal's number if interrupted."""
    from gdfast.train import InterruptedRun, resume, train

    try:
        if args.resume is None:
            train(_settings(args), out=args.out, download=args.download)
        else:
            _refuse_options(args)
            resume(args.resume, data_spec=args.data)
    except InterruptedRun as stop:
        command = f"gdfast train {args.model} --resume {shlex.quote(str(stop.folder))}"
        print(f"gdfast: {stop}; go on with: {command}", file=sys.stderr)
        return 128 + stop.signal
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from dataclasses import replace

    from gdfast.train import RECIPES, Settings, SettingsError

    name = "default" if args.recipe is None else args.recipe
    if name not in RECIPES:
        known = " or ".join(RECIPES)
        raise SettingsError(f"train: recipe: expected {known}, got {name!r}")
    recipe = replace(RECIPES[name], **_given(args, _RECIPE_OPTIONS))
    settings = Settings(model=args.model, recipe=recipe, device="auto")
    return replace(settings, **_given(args, ("data", "seed", "device", "backend")))


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _text(value: str) -> str:
    # An empty value is most often a shell variable that was never set.
    if not value:
        raise argparse.ArgumentTypeError("expected a value, got an empty one")
    return value


def _refuse_options(args: argparse.Namespace) -> None:
    from gdfast.train import SettingsError

    given = list(_given(args, _OWN_OPTIONS))
    if given or args.download:
        option = f"--{(given or ['download'])[0].replace('_', '-')}"
        raise SettingsError(
            f"train: {option}: expected no such option with --resume, which goes on with the "
            "run's own settings (--data alone may say where the data lies now)"
        )
