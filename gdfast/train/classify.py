"""Tasks that name what an image shows."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdfast.data
from gdfast import models
from gdfast.data import ImageData, augment
from gdfast.data.classified import Classified, Shape
from gdfast.data.images import ImageSet
from gdfast.data.loader import Batch, Loader, Source, Table
from gdfast.metrics import Classification, classification
from gdfast.train import plots, weights
from gdfast.train.errors import RunError, SettingsError
from gdfast.train.folder import RunFolder
from gdfast.train.recipe import Settings
from gdfast.train.task import Task

_EVALUATION_BATCH = 100
_SHOWN = 5
_SMALL, _LARGE = 32, 224
_CIFAR = ("resnet20", "resnet32", "resnet56")


class Classify(Task):
    """Cross entropy on labelled images; a subclass says which model, and in which shape."""

    score = "test_accuracy"
    terms = ("accuracy",)

    @classmethod
    def load(cls, settings: Settings, *, download: bool = False) -> ImageData:
        """`digits`, `mnist:DIR` or `folder:DIR`."""
        return gdfast.data.load(settings.data, download=download, max_bad=settings.max_bad)

    def __init__(self, settings: Settings, data: ImageData) -> None:
        self.settings = settings
        self.data = data
        self.device = torch.device(settings.device)
        self.shape = self._shape()
        self.model_name, self.model_options = self._model()
        self.model = models.create(self.model_name, **self.model_options)
        self.source = self._source()
        self.smoothing = settings.recipe.label_smoothing if settings.recipe else 0.0
        self._test = Loader(
            Classified(data.test, self.shape), self._evaluation_batch(), device=self.device
        )
        self._last: Classification | None = None
        self._measured: list[int] = []

    @abstractmethod
    def _shape(self) -> Shape:
        """What the model takes."""

    @abstractmethod
    def _model(self) -> tuple[str, dict[str, Any]]:
        """The model's name and its options."""

    @abstractmethod
    def _source(self) -> Source | Table:
        """The training images."""

    def _evaluation_batch(self) -> int:
        pixels = self.shape.size[0] * self.shape.size[1]
        return max(8, min(500, _EVALUATION_BATCH * _LARGE * 8 // pixels))

    @property
    def epochs(self) -> int:
        """The data's own number."""
        return self.data.epochs

    def sizes(self) -> tuple[int, int]:
        """Images to train on, images to test with."""
        return len(self.data.train), len(self.data.test)

    def skipped(self) -> int:
        """Test images that could not be decoded."""
        return len(self._test.skipped)

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Mean cross entropy, and the share of the images named correctly."""
        targets = batch.targets
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        right = (outputs.detach().argmax(1) == labels).to(torch.float64).mean()
        loss = F.cross_entropy(outputs.float(), targets, label_smoothing=self.smoothing)
        return {"loss": loss, "accuracy": right}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the test images; top-5 where there are more than five classes."""
        logits, labels = [], []
        for images, targets in self._test.epoch():
            logits.append(model(images).float())
            labels.append(targets)
        self._measured = [n for n in range(len(self.data.test)) if n not in self._test.skipped]
        self._last = result = classification(torch.cat(logits).cpu(), torch.cat(labels).cpu())
        measures = {"test_loss": result.loss, "test_accuracy": result.accuracy}
        return measures | ({"test_top5": result.top5} if len(self.data.classes) > 5 else {})

    def write_results(self, model: nn.Module, folder: RunFolder) -> dict[str, Any]:
        """The confusion matrix and the worst mistakes."""
        assert self._last is not None, "evaluate comes first"
        title = plots.title(self.settings.task, self.data.name, self.settings.seed)
        picture = plots.confusion(self._last, self.data.classes, title)
        folder.write_figure("confusion.png", picture)
        picture = plots.mistakes(
            self.data.test, self._measured, self._last, self.data.classes, title
        )
        folder.write_figure("mistakes.png", picture)
        return {"classes": list(self.data.classes)}

    @classmethod
    def predictor(
        cls, model: nn.Module, metadata: Mapping[str, str], **options: Any
    ) -> ClassPredictor:
        """Names what images show."""
        if options:
            raise SettingsError(
                f"predict: {min(options)}: expected no such option for a classifier, got one"
            )
        return ClassPredictor(model, metadata)

    def metadata(self) -> Mapping[str, str]:
        """The model's name and options, the names of the classes, and the shape of its images."""
        return {
            "model": self.model_name,
            "options": json.dumps(self.model_options),
            "classes": json.dumps(self.data.classes),
            "shape": json.dumps([self.shape.channels, *self.shape.size, self.shape.normalised]),
        }


class SimpleCNN(Classify):
    """The small convolutional network, on grey images of 28x28, unchanged."""

    def _shape(self) -> Shape:
        return Shape(1, (28, 28))

    def _model(self) -> tuple[str, dict[str, Any]]:
        return "cnn", {"num_classes": len(self.data.classes)}

    def _source(self) -> Source | Table:
        train = self.data.train
        if isinstance(train, ImageSet) and train.images.shape[1:] == (1, 28, 28):
            return train  # whole batches at once
        return Classified(train, self.shape)


class ResNet(Classify):
    """A residual network, on grey or coloured images of any size."""

    def begin(self) -> None:
        """Take the weights that were named; those of the last layer only where they fit."""
        if path := self.settings.options["weights"]:
            weights.load_matching(self.model, path, skip=("fc.",))

    def _shape(self) -> Shape:
        model, size = (self.settings.options[name] for name in ("model", "size"))
        if isinstance(self.data.train, ImageSet):
            channels, height, width = self.data.train.images.shape[1:]
            return Shape(channels, (size, size) if size else (height, width))
        size = size or (_SMALL if model in _CIFAR else _LARGE)
        return Shape(3, (size, size), normalised=True)

    def _model(self) -> tuple[str, dict[str, Any]]:
        name = self.settings.options["model"]
        return name, {"num_classes": len(self.data.classes), "in_channels": self.shape.channels}

    def _source(self) -> Source | Table:
        names = self.settings.options["augment"]
        photographs = not isinstance(self.data.train, ImageSet)
        if names == "auto":
            # Digits must not be mirrored.
            names = "flip,jitter" if photographs else "affine"
        changes, mixup = augment.parse(names)
        if photographs and changes:
            share = (0.25, 1.0) if max(self.shape.size) > _SMALL else (0.5, 1.0)
            changes.insert(0, augment.RandomResizedCrop(self.shape.size, share))
        return Classified(
            self.data.train, self.shape, changes, mixup=mixup, classes=len(self.data.classes)
        )


class ClassPredictor:
    """A trained classifier, asked for one image at a time."""

    def __init__(self, model: nn.Module, metadata: Mapping[str, str]) -> None:
        """Raises:
        RunError: metadata without classes or a shape.
        """
        try:
            self.classes: list[str] = [str(name) for name in json.loads(metadata["classes"])]
            channels, height, width, normalised = json.loads(metadata["shape"])
            self.shape = Shape(channels, (height, width), normalised)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"predict: expected weights with classes and a shape, found: {error}"
            ) from None
        self.model = model

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """The likeliest class, and the probabilities of the five likeliest."""
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            logits = self.model(self.shape.to_tensor([self.shape.fit(image)]).to(device))[0]
        chances = torch.softmax(logits.double().cpu(), 0)
        top = chances.topk(min(_SHOWN, len(self.classes)))
        shares = {
            self.classes[index]: chance
            for chance, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        }
        return {"class": next(iter(shares)), "probabilities": shares}

    def draw(self, image: np.ndarray, answer: dict[str, Any]) -> bytes:
        """The image beside bars of the probabilities."""
        return plots.png(plots.named(image, answer["probabilities"]))
