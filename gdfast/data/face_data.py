"""Faces by name: `load("identities")`, `load("faces:DIR")`, `load("lfw:DIR")`."""

from __future__ import annotations

from gdfast.data import faces, identities, lfw
from gdfast.data.errors import DataError
from gdfast.data.faces import HEIGHT, WIDTH, FaceData
from gdfast.data.problems import DEFAULT_SHARE

KINDS = ("identities", "faces", "lfw")


def load(
    spec: str,
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    colour: bool = False,
    max_bad: float = DEFAULT_SHARE,
) -> FaceData:
    """Load the faces that `spec` names, as images of `height` x `width`, in `colour` or grey.

    `identities` are synthetic people, drawn; `faces:DIR` has a folder of photographs for each
    person; `lfw:DIR` is Labeled Faces in the Wild with its pairs.txt. Up to a share `max_bad` of
    the photographs may be bad.

    Raises:
        DataError: an unknown name, or data that is missing or bad.
        MissingExtraError: Pillow is not installed.
    """
    kind, colon, where = spec.partition(":")
    if kind == "identities" and not colon:
        return identities.load(height=height, width=width, colour=colour)
    if kind == "faces" and where:
        return faces.load(where, height=height, width=width, colour=colour, max_bad=max_bad)
    if kind == "lfw" and where:
        return lfw.load(where, height=height, width=width, colour=colour, max_bad=max_bad)
    raise DataError(f"data: spec: expected identities, faces:DIR or lfw:DIR, got {spec!r}")
