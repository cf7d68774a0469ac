"""What a kind of training has of its own; the loop, the run folder and the rest are shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from gdfast.data.loader import Batch, Loader
from gdfast.train.folder import RunFolder
from gdfast.train.recipe import Recipe, Settings


@dataclass(frozen=True)
class Option:
    """A setting that only one task has: its default (whose type it keeps), and what it means.

    `choices` are the values that it may have, all of its type if empty; `minimum` its least.
    """

    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    minimum: float | None = None


class Data(Protocol):
    """What `gdfast.data.load` gives: a training and a test part, each a source or an image set."""

    name: str
    classes: tuple[str, ...]

    def fingerprint(self) -> str: ...


class Task(ABC):
    """One kind of training: its data, its model, its loss, its measures and its pictures.

    Built anew for every run and for every continuation, right after the seeds are set: the model's
    weights are drawn in the constructor. `settings.options` holds a value for each of `options`.
    """

    name: ClassVar[str]
    """What `gdfast train` calls it; also the start of its run folders' names."""
    summary: ClassVar[str]
    """One line for the command line's help."""
    data: ClassVar[str]
    """The data that it trains on when none is named."""
    recipes: ClassVar[Mapping[str, Recipe]]
    """By name; "default" is there."""
    options: ClassVar[Mapping[str, Option]] = {}
    score: ClassVar[str]
    """The column of `evaluate` by which the best epoch is chosen, the higher the better."""
    terms: ClassVar[tuple[str, ...]] = ()
    """What `loss` gives beside "loss": parts of it, or measures of the batch."""

    model: nn.Module
    batches: Loader

    @classmethod
    @abstractmethod
    def load(cls, settings: Settings, *, download: bool = False) -> Data:
        """Read the data of `settings.data`; raises DataError."""

    @abstractmethod
    def __init__(self, settings: Settings, data: Any) -> None: ...

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs for a batch in training; a margin loss needs the targets too."""
        return model(batch.images)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The scalar "loss", a mean over the batch's images, and each of `terms`."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures of `model` (in eval mode, no gradients) on the test part, "test_..." and such.

        The same names every time, all finite.
        """

    @abstractmethod
    def write_results(self, model: nn.Module, folder: RunFolder) -> dict[str, Any]:
        """Draw the pictures of the last evaluation into `folder`; returns what else
        `metrics.json` should hold."""

    def metadata(self) -> dict[str, str]:
        """What `gdfast predict` needs beside the weights: plain strings, JSON where structured."""
        return {}
