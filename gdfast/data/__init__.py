"""Data by name, held in memory: `load("digits")`, `load("mnist:DIR")`."""

from __future__ import annotations

from gdfast.data import datasets, digits, mnist, transforms
from gdfast.data.errors import DataError
from gdfast.data.images import Batch, Batches, ImageData, ImageSet

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "ImageData",
    "ImageSet",
    "datasets",
    "load",
    "transforms",
]


def load(spec: str, *, download: bool = False) -> ImageData:
    """Load the data that `spec` names, split for training and testing.

    `digits` is scikit-learn's; `mnist:DIR` reads idx files from a folder, and `download`
    fetches those that it lacks.

    Raises:
        DataError: an unknown name, or data that is missing or damaged.
        MissingExtraError: a package that the data needs is not installed.
    """
    kind, colon, where = spec.partition(":")
    if kind == "digits" and not colon:
        return digits.load()
    if kind == "mnist" and where:
        return mnist.load(where, download)
    raise DataError(f"data: spec: expected digits or mnist:DIR, got {spec!r}")
