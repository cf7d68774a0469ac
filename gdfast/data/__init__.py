"""Data by name: `load("digits")`, `load("mnist:DIR")`, `load("folder:DIR")`."""

from __future__ import annotations

from gdfast.data import datasets, digits, folder, mnist, transforms
from gdfast.data.errors import DataError
from gdfast.data.images import ImageData, ImageSet
from gdfast.data.loader import Batch, Loader
from gdfast.data.problems import DEFAULT_SHARE

__all__ = [
    "Batch",
    "DataError",
    "ImageData",
    "ImageSet",
    "Loader",
    "datasets",
    "load",
    "transforms",
]


def load(spec: str, *, download: bool = False, max_bad: float = DEFAULT_SHARE) -> ImageData:
    """Load the labelled images that `spec` names, split for training and testing.

    `digits` is scikit-learn's; `mnist:DIR` reads idx files from a folder, and `download`
    fetches those that it lacks; `folder:DIR` has a folder of images for each class, of which up to
    a share `max_bad` may be bad.

    Raises:
        DataError: an unknown name, or data that is missing or damaged.
        MissingExtraError: a package that the data needs is not installed.
    """
    kind, colon, where = spec.partition(":")
    if kind == "digits" and not colon:
        return digits.load()
    if kind == "mnist" and where:
        return mnist.load(where, download)
    if kind == "folder" and where:
        return folder.load(where, max_bad=max_bad)
    raise DataError(f"data: spec: expected digits, mnist:DIR or folder:DIR, got {spec!r}")
