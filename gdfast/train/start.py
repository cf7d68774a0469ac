"""Training runs begun, gone on with, and tried for a learning rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from gdfast import backends
from gdfast.backends import tuning
from gdfast.data import DataError
from gdfast.errors import UserError
from gdfast.extras import require
from gdfast.train import checkpoint, distributed, find_lr, rng
from gdfast.train.board import Board
from gdfast.train.errors import RunError
from gdfast.train.here import settle_here
from gdfast.train.recipe import Settings
from gdfast.train.run import Result, Run
from gdfast.train.task import Data
from gdfast.train.tasks import TASKS


def train(
    settings: Settings,
    *,
    out: str | Path | None = None,
    download: bool = False,
    tensorboard: bool = False,
    stream: TextIO | None = None,
) -> Result:
    """Train a model and leave everything in the run folder `out` (else a numbered one).

    Progress goes to `stream`, standard output if None. Data is read before the folder is made.
    Under torchrun each process takes its share of every batch, and the first writes the folder.

    Raises:
        DataError, SettingsError, RunError: bad data, settings or folder.
        MissingExtraError: a package that training needs is not installed.
        DivergedError: the loss is not finite any more.
        InterruptedRun: the user stopped it; `resume` goes on.
    """
    settings = settle_here(settings)
    _require_extras(tensorboard)
    data = _load(settings, download)
    with distributed.group(torch.device(settings.device)) as group:
        rng.seed_all(settings.seed)
        run = Run(settings, data, group, stream)
        run.board = Board(tensorboard)
        run.start(out)
        return run.finish()


def resume(
    run: str | Path,
    *,
    data_spec: str | None = None,
    tensorboard: bool = False,
    stream: TextIO | None = None,
) -> Result:
    """Go on with an interrupted run; its outcome is bit for bit that of one never interrupted.

    `run` is the run's folder or its checkpoint. `data_spec` says where the data lies now, if it has
    moved; it must be the same data. Raises what `train` raises.
    """
    _require_extras(tensorboard)
    path = Path(run)
    if path.is_dir():
        path = path / checkpoint.NAME
    content = checkpoint.load(path)
    with _misfits(path), contextlib.ExitStack() as stack:
        settings = Settings.from_dict(content["settings"])
        if settings.descent.epochs is None:
            raise ValueError("no number of epochs")
        here = settle_here(settings)  # the device and the backend may be gone
        if distributed.launched() and settings.device.startswith("cuda"):
            # What the checkpoint names is the first process's.
            settings = replace(settings, device=settle_here(replace(here, device="cuda")).device)
        spec = settings.data if data_spec is None else data_spec
        data = TASKS[settings.task].load().load(replace(settings, data=spec))
        if data.fingerprint() != content["data_fingerprint"]:
            raise DataError(
                f"data: {spec}: expected the data that the run in {path.parent} began with, "
                "found other images or labels"
            )
        resumed = Run(
            settings,
            data,
            stack.enter_context(distributed.group(torch.device(settings.device))),
            stream,
            fresh=False,
        )
        resumed.board = Board(tensorboard)
        resumed.restore(path.parent, content)
        # What goes wrong from here on is not the checkpoint's doing.
        stack_of_run = stack.pop_all()
    with stack_of_run:
        return resumed.finish()


def find_learning_rate(
    settings: Settings,
    *,
    out: str | Path | None = None,
    download: bool = False,
    stream: TextIO | None = None,
) -> float:
    """Try rising learning rates on a model that is then thrown away; returns the one to use.

    The losses and a plot of them are left in the run folder `out` (else a numbered one). Raises
    what `train` raises.
    """
    settings = settle_here(settings)
    _require_extras()
    data = _load(settings, download)
    with distributed.group(torch.device(settings.device)) as group:
        rng.seed_all(settings.seed)
        run = Run(settings, data, group, stream)
        run.create_folder(out)
        with backends.backend(settings.backend), tuning.recorded(run.choices):
            return find_lr.sweep(run.trainer(), run.folder, run.progress)


def _load(settings: Settings, download: bool) -> Data:
    return TASKS[settings.task].load().load(settings, download=download)


@contextlib.contextmanager
def _misfits(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a checkpoint's content into one line."""
    try:
        yield
    except UserError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        text = str(error) or type(error).__name__
        reason = f"no {text}" if isinstance(error, KeyError) else text.splitlines()[0]
        raise RunError(
            f"train: {path}: expected a whole checkpoint, found one that does not fit: {reason}"
        ) from error


def _require_extras(tensorboard: bool = False) -> None:
    # Before the first step, not after the last.
    for module in ("matplotlib", "safetensors", "yaml"):
        require(module, "train", "gdfast train")
    if tensorboard:
        require("tensorboard", "tensorboard", "gdfast train --tensorboard")
