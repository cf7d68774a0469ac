"""What a kind of training has of its own; the loop, the run folder and the rest are shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from gdfast.data.loader import Batch, Source, Table
from gdfast.train.folder import RunFolder
from gdfast.train.predict import Predictor
from gdfast.train.recipe import Settings


class Data(Protocol):
    """What a task trains and tests on."""

    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str:
        """A digest: two runs with different ones saw different data."""


class Task(ABC):
    """One kind of training: its data, its model, its loss, its measures and its pictures.

    Built anew for every run and for every continuation, right after the seeds are set: the model's
    weights are drawn in the constructor. `settings` have nothing open but for the number of epochs.
    """

    score: ClassVar[str]
    """The column of `evaluate` by which the best epoch is chosen, the higher the better."""
    terms: ClassVar[tuple[str, ...]] = ()
    """What `loss` gives beside "loss": parts of it, or measures of the batch."""

    model: nn.Module
    source: Source | Table
    """What it trains on."""

    @classmethod
    @abstractmethod
    def load(cls, settings: Settings, *, download: bool = False) -> Data:
        """Read the data of `settings.data`; raises DataError."""

    @abstractmethod
    def __init__(self, settings: Settings, data: Any) -> None: ...

    @property
    @abstractmethod
    def epochs(self) -> int:
        """How many epochs a training needs whose recipe does not say."""

    @abstractmethod
    def sizes(self) -> tuple[int, int]:
        """How many images it trains on and how many it tests with."""

    def skipped(self) -> int:
        """How many test items were found to be bad, and left out."""
        return 0

    def begin(self) -> None:  # noqa: B027  (most have nothing to do)
        """Whatever only a new run does, not one that goes on, before the first step."""

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
        """Draw the pictures of the last evaluation into `folder`.

        Returns what else `metrics.json` should hold.
        """

    def exported(self, model: nn.Module) -> nn.Module:
        """The part of the model that predicts: what is saved as weights."""
        return model

    @classmethod
    @abstractmethod
    def predictor(cls, model: nn.Module, metadata: Mapping[str, str], **options: Any) -> Predictor:
        """What answers for new images with the `exported` part of a trained model.

        `metadata` is what the method of that name gave. Raises RunError for one that is damaged,
        SettingsError for options that the task does not have.
        """

    @abstractmethod
    def metadata(self) -> Mapping[str, str]:
        """What building the model again takes, and predicting with it: "model" is its name for
        `models.create`, "options" its options and "shape" the channels, height and width of its
        images, in JSON; the rest is the task's own, plain strings."""
