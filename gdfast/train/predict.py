"""Trained models, read back from a run's weights to answer for new images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from gdfast import models
from gdfast.data import DataError, decode
from gdfast.train import weights
from gdfast.train.errors import RunError
from gdfast.train.tasks import TASKS

_LARGEST = 8192  # of an image's side
BEST, WEIGHTS = "best.safetensors", "weights.safetensors"


class Predictor(Protocol):
    """What a trained model of one task says of an image, bytes [H, W, C]."""

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """The answer, in plain values."""

    def draw(self, image: np.ndarray, answer: dict[str, Any]) -> bytes:
        """A PNG of the image with the answer."""


class Trained:
    """A model with its trained weights, in eval mode, and what its run said of it."""

    def __init__(self, model: nn.Module, metadata: dict[str, str], path: Path) -> None:
        self.model = model
        self.metadata = metadata
        self.path = path

    @property
    def task(self) -> str:
        """The task that it was trained for."""
        return self.metadata["task"]

    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it was trained on; raises RunError."""
        try:
            numbers = [int(each) for each in json.loads(self.metadata["shape"])[:3]]
            if len(numbers) != 3 or not all(0 < number <= _LARGEST for number in numbers):
                raise ValueError(numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.path}: expected the shape of its images in its metadata, found {error}"
            ) from None
        return numbers[0], numbers[1], numbers[2]

    def predictor(self, **options: Any) -> Predictor:
        """What answers for images; `options` are the task's own."""
        return TASKS[self.task].load().predictor(self.model, self.metadata, **options)


def find_weights(run: str | Path) -> Path:
    """The file with the best weights of a run's folder; a file is taken as it is.

    Raises:
        RunError: neither a file nor a folder with weights.
    """
    path = Path(run).expanduser()
    if path.is_file():
        return path
    for name in (BEST, WEIGHTS):
        if (path / name).is_file():
            return path / name
    found = "a folder without them" if path.is_dir() else "no such file or folder"
    raise RunError(f"{path}: expected a run's folder or a file of weights, found {found}")


def load(run: str | Path, device: torch.device | str = "cpu") -> Trained:
    """Read a run's best weights, and build their model.

    Raises:
        RunError: no weights there, damaged ones, or ones that no run of gdfast wrote.
        MissingExtraError: safetensors is not installed.
    """
    path = find_weights(run)
    tensors, metadata = weights.read(path)
    try:
        name, options = metadata["model"], json.loads(metadata["options"])
        if metadata["task"] not in TASKS:
            raise ValueError(f"task {metadata['task']!r}")
        # Without memory, until the weights are seen to be there in the sizes that were asked for.
        _refuse_oversized(options, len(tensors))
        with torch.device("meta"):
            model = models.create(name, **options)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise RunError(
            f"{path}: expected weights that gdfast train wrote, with their model's name, found "
            f"others ({reason[:80]})"
        ) from None
    weights.load(model, tensors, path, assign=True)
    return Trained(model.to(device).eval(), metadata, path)


def _refuse_oversized(options: dict[str, Any], tensors: int) -> None:
    """Raise ValueError for numbers that no model with so many tensors can have."""
    for name, value in options.items():
        # Layers have tensors each; channels and features have not.
        most = {"num_classes": 1_000_000, "depth": tensors}.get(name, 8192)
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > 64 or any(isinstance(n, (int, float)) and n > most for n in numbers):
            raise ValueError(f"{name} {str(value)[:40]}")


def image_files(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The image files among paths and in the folders among them, sorted within each folder.

    Raises:
        DataError: a path that is not there.
    """
    for each in paths:
        path = Path(each).expanduser()
        if path.is_dir():
            found = (file for file in path.rglob("*") if file.suffix.lower() in decode.SUFFIXES)
            yield from sorted(file for file in found if file.is_file())
        elif path.exists():
            yield path
        else:
            raise DataError(f"data: {path}: expected an image or a folder, found no such file")
