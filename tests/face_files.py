"""Folders of faces on disk, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gdfast.data import identities

Image = pytest.importorskip("PIL.Image")


def write_people(
    folder: Path, photos: dict[str, int], name: str = "{n}.png", *, size: tuple[int, int] = (56, 46)
) -> dict[str, list[np.ndarray]]:
    """A folder for each of the people, with so many drawn photographs; returns what they hold."""
    drawn = identities.render(
        len(photos), max(photos.values()), height=size[0], width=size[1], seed=3
    )
    written = {}
    for index, (person, count) in enumerate(photos.items()):
        (folder / person).mkdir(parents=True)
        own = drawn.images[drawn.people == index][:count]
        for number, pixels in enumerate(own, 1):
            path = folder / person / name.format(n=number, person=person)
            Image.fromarray(pixels[:, :, 0]).save(path)
        written[person] = list(own)
    return written
