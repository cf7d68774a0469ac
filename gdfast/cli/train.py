"""`gdfast train`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from gdfast.train import SCHEDULES, TASKS, InterruptedRun, Recipe, Settings, SettingsError
from gdfast.train.tasks import Option, TaskInfo

# Options that decide a run's outcome. None means that the user left it to the recipe; a resumed
# run has its own, so none of them may be given then.
_RECIPE_OPTIONS = (
    "epochs", "lr", "momentum", "nesterov", "weight_decay", "schedule", "warmup", "batch_size",
    "accumulate", "clip", "amp", "ema", "label_smoothing", "patience",
)  # fmt: skip
_SETTINGS = ("data", "seed", "device", "backend", "workers", "max_bad")
_OWN_OPTIONS = ("recipe", *_RECIPE_OPTIONS, "seed", "device", "backend", "max_bad", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast train` to a parser."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, info in TASKS.items():
        task = tasks.add_parser(
            name,
            help=info.summary,
            description=f"Train {info.summary}.",
            allow_abbrev=False,
        )
        _add_options(task, name, info)


def _add_options(parser: argparse.ArgumentParser, task: str, info: TaskInfo) -> None:
    add = parser.add_argument_group("data and run").add_argument
    add("--data", type=text, metavar="SPEC", help=f"{info.data_help} (default: {info.data})")
    if "mnist" in info.data_help:
        add("--download", action="store_true", help="fetch what mnist:DIR lacks from the network")
    add("--max-bad", type=float, metavar="SHARE", help="of items that may be bad (default: 0.01)")
    add("--workers", type=int, metavar="N", help="processes that read images (default: 0)")
    add(
        "--seed", type=int, metavar="N", help="decides weights, order and augmentation (default: 0)"
    )
    add(
        "--device", type=text, metavar="NAME",
        help="cpu, cuda, cuda:1, ... (default: cuda if there, or cpu)",
    )  # fmt: skip
    add(
        "--backend", type=text, metavar="NAME",
        help="auto (default): the fastest; native: plain PyTorch; `gdfast doctor` lists them all",
    )  # fmt: skip
    add(
        "--out", type=text, metavar="DIR",
        help=f"new folder for the results (default: runs/{task}-1, runs/{task}-2, ...)",
    )  # fmt: skip
    add(
        "--resume", type=text, metavar="RUN",
        help="go on with the interrupted run in this folder, with its own settings",
    )  # fmt: skip
    add(
        "--find-lr", action="store_true",
        help="try rising learning rates instead, and draw the losses",
    )  # fmt: skip
    add("--tensorboard", action="store_true", help="write curves for TensorBoard too")
    _add_recipe(parser, info)
    if info.options:
        own = parser.add_argument_group(f"of {task} alone")
        for name, option in info.options.items():
            _add_option(own, name, option)


def _add_recipe(parser: argparse.ArgumentParser, info: TaskInfo) -> None:
    default = info.recipes["default"]
    group = parser.add_argument_group("gradient descent (what is not given is the recipe's)")
    add = group.add_argument
    recipes = "; ".join(f"{name}: {_in_words(recipe)}" for name, recipe in info.recipes.items())
    add("--recipe", type=text, metavar="NAME", help=recipes)
    add("--epochs", type=int, metavar="N", help="passes over the data")
    add("--lr", type=float, help=f"learning rate, at its peak (default: {default.lr:g})")
    add("--momentum", type=float, help="share of the last step that the next one keeps")
    add("--nesterov", action=argparse.BooleanOptionalAction, default=None,
        help="look ahead along the momentum")  # fmt: skip
    add("--weight-decay", type=float, metavar="X", help="pull of weights to zero; not of biases")
    add("--schedule", metavar="NAME", help=f"of the learning rate: {' or '.join(SCHEDULES)}")
    add("--warmup", type=int, metavar="N", help="steps until the learning rate is at its peak")
    add("--batch-size", type=int, metavar="N",
        help=f"images per step (default: {default.batch_size})")  # fmt: skip
    add("--accumulate", type=int, metavar="N", help="parts that a step's images are taken in")
    add("--clip", type=float, metavar="NORM", help="most that all gradients together may have")
    add("--amp", metavar="TYPE", help="bf16: compute in bfloat16 where that is safe")
    add("--ema", type=float, metavar="DECAY", help="measure and save a running mean of weights")
    add("--label-smoothing", type=float, metavar="X", help="share of a target that all classes get")
    add("--patience", type=int, metavar="N", help="stop after N epochs without a better score")


def _add_option(group: Any, name: str, option: Option) -> None:
    flag = f"--{name.replace('_', '-')}"
    told = f"{option.help} (default: {'none' if option.default == '' else option.default})"
    if isinstance(option.default, bool):
        group.add_argument(
            flag, dest=f"option_{name}", action=argparse.BooleanOptionalAction, default=None,
            help=option.help,
        )  # fmt: skip
        return
    known = "|".join(map(str, option.choices))
    group.add_argument(
        flag, dest=f"option_{name}", type=type(option.default) if option.default != "" else str,
        metavar=known or {int: "N", float: "X"}.get(type(option.default), "TEXT"), help=told,
    )  # fmt: skip


def _in_words(recipe: Recipe) -> str:
    words = [f"lr {recipe.lr:g}", recipe.schedule]
    words += [f"momentum {recipe.momentum:g}"] if recipe.momentum else ["no momentum"]
    if recipe.weight_decay:
        words.append(f"weight decay {recipe.weight_decay:g}")
    if recipe.epochs:
        words.append(f"{recipe.epochs} epochs")
    return ", ".join(words)


def main(args: argparse.Namespace) -> int:
    """Train, or go on with a run; returns 0, or 128 and the signal's number if interrupted."""
    from gdfast.train import find_learning_rate, resume, train

    try:
        if args.resume is not None:
            _refuse_options(args)
            resume(args.resume, data_spec=args.data, tensorboard=args.tensorboard)
            return 0
        settings, download = _settings(args), getattr(args, "download", False)
        if args.find_lr and args.tensorboard:
            raise SettingsError(
                "train: --tensorboard: expected no such option with --find-lr, which draws its plot"
            )
        if args.find_lr:
            find_learning_rate(settings, out=args.out, download=download)
        else:
            train(settings, out=args.out, download=download, tensorboard=args.tensorboard)
    except InterruptedRun as stop:
        if os.environ.get("RANK", "0") == "0":
            command = f"gdfast train {args.task} --resume {shlex.quote(str(stop.folder))}"
            print(f"gdfast: {stop}; go on with: {command}", file=sys.stderr)
        return 128 + stop.signal
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from dataclasses import replace

    recipes = TASKS[args.task].recipes
    name = "default" if args.recipe is None else args.recipe
    if name not in recipes:
        known = " or ".join(recipes)
        raise SettingsError(f"train: recipe: expected {known}, got {name!r}")
    recipe = replace(recipes[name], **_given(args, _RECIPE_OPTIONS))
    options = {
        name: value
        for name in TASKS[args.task].options
        if (value := getattr(args, f"option_{name}")) is not None
    }
    settings = Settings(task=args.task, recipe=recipe, device="auto", options=options)
    return replace(settings, **_given(args, _SETTINGS))


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def text(value: str) -> str:
    """The type of an option whose value is text.

    Raises:
        ArgumentTypeError: an empty value, most often a shell variable that was never set.
    """
    if not value:
        raise argparse.ArgumentTypeError("expected a value, got an empty one")
    return value


def _refuse_options(args: argparse.Namespace) -> None:
    own = [f"option_{name}" for name in TASKS[args.task].options]
    given = list(_given(args, (*_OWN_OPTIONS, "workers", *own)))
    given += [name for name in ("download", "find_lr") if getattr(args, name, False)]
    if given:
        option = f"--{given[0].removeprefix('option_').replace('_', '-')}"
        raise SettingsError(
            f"train: {option}: expected no such option with --resume, which goes on with the "
            "run's own settings (--data alone may say where the data lies now)"
        )
