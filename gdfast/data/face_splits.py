"""Who trains and who tests: the protocols of face recognition."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gdfast.data.errors import DataError
from gdfast.data.faces import FaceData, FaceSet, NamedPairs
from gdfast.metrics.verification import Pairs, pairs_of

PROTOCOLS = ("identify", "verify")


class FaceSplit(NamedTuple):
    """`train` to learn from, its people counted from 0. Of the test's photographs, `gallery`
    enrols the people to be found and `probes` are to be recognised; `pairs` are to be told apart,
    and index the gallery's photographs followed by the probes'. `folds` [P] is given where the
    data's own pairs have folds."""

    train: FaceSet
    gallery: FaceSet
    probes: FaceSet
    pairs: Pairs
    folds: np.ndarray | None = None

    def tested(self) -> FaceSet:
        """The photographs that `pairs` index."""
        first, second = self.gallery, self.probes
        return FaceSet(
            np.concatenate([first.images, second.images]),
            np.concatenate([first.people, second.people]),
            first.names + second.names,
        )


def split(data: FaceData, protocol: str, *, fold: int = 1, folds: int = 4) -> FaceSplit:
    """Split faces for training and testing.

    "identify": of every person, the first half of the photographs trains and enrols, the rest are
    probes, and all pairs of them are told apart. "verify": some people are never seen in training.
    They are those of the data's own pairs; without any, one of `folds` equal stretches of the
    natural order, `fold` from 1, and then all their pairs count. The first half of their
    photographs enrols, the rest are probes. Half is rounded up.

    Raises:
        DataError: no such fold, or too few people to train or to test with.
    """
    photos = data.photos
    first_half = _first_half(photos.people)
    if protocol == "identify":
        several = _of_several(photos.people)
        enrolled, probes = first_half & several, ~first_half
        train = _renumbered(photos.select(enrolled))
        pairs = pairs_of(photos.people[probes])
        offset = int(enrolled.sum())
        pairs = Pairs(pairs.first + offset, pairs.second + offset, pairs.same)
        return _checked(
            data,
            FaceSplit(train, photos.select(enrolled), photos.select(probes), pairs),
        )
    if data.pairs is not None:
        unseen = np.isin(photos.people, photos.people[_named(data.pairs)])
    else:
        unseen = _stretch(data, fold, folds)
    gallery, probes = unseen & first_half, unseen & ~first_half
    order = np.concatenate([np.flatnonzero(gallery), np.flatnonzero(probes)])
    train = _renumbered(photos.select(~unseen & _of_several(photos.people)))
    own_folds = None
    if data.pairs is None:
        pairs = pairs_of(photos.people[order])
    else:
        place = np.zeros(len(photos), dtype=np.int64)
        place[order] = np.arange(len(order))
        pairs = Pairs(place[data.pairs.first], place[data.pairs.second], data.pairs.same)
        own_folds = data.pairs.folds
    found = FaceSplit(train, photos.select(gallery), photos.select(probes), pairs, own_folds)
    return _checked(data, found)


def _stretch(data: FaceData, fold: int, folds: int) -> np.ndarray:
    """Which photographs show the people of a fold."""
    count = len(data.classes)
    if folds < 2 or count < 2 * folds:
        raise DataError(
            f"data: {data.name}: folds: expected 2 or more, with 2 people or more each, got "
            f"{folds} for {count} people"
        )
    if not 1 <= fold <= folds:
        raise DataError(f"data: {data.name}: fold: expected 1 to {folds}, got {fold}")
    people = data.photos.people
    return (people >= (fold - 1) * count // folds) & (people < fold * count // folds)


def _named(pairs: NamedPairs) -> np.ndarray:
    return np.union1d(pairs.first, pairs.second)


def _checked(data: FaceData, found: FaceSplit) -> FaceSplit:
    train = len(np.unique(found.train.people))
    test = len(np.unique(found.gallery.people))
    same = found.pairs.same
    if min(train, test) < 2 or not len(found.probes) or not same.any() or same.all():
        raise DataError(
            f"data: {data.name}: expected 2 people or more with 2 photographs each to train on, "
            f"and as many to test with, found {train} and {test}"
        )
    return found


def _of_several(people: np.ndarray) -> np.ndarray:
    """Which photographs show someone who is on another one too."""
    several: np.ndarray = np.bincount(people)[people] > 1
    return several


def _first_half(people: np.ndarray) -> np.ndarray:
    """Which photographs belong to the first half of their person's, who lie together."""
    starts = np.searchsorted(people, people)
    half: np.ndarray = (np.bincount(people)[people] + 1) // 2
    return np.arange(len(people)) - starts < half


def _renumbered(photos: FaceSet) -> FaceSet:
    _, people = np.unique(photos.people, return_inverse=True)
    return FaceSet(photos.images, people.astype(np.int64), photos.names)
