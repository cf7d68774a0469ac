"""Photographs of faces by person: a folder for each, held in memory at one size."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gdfast.data import decode
from gdfast.data.augment import to_array, to_pillow
from gdfast.data.errors import DataError
from gdfast.data.problems import DEFAULT_SHARE, Problems
from gdfast.extras import require

HEIGHT, WIDTH = 112, 92  # of ORL's photographs
MOST_BYTES = 16 << 30  # 1.6 million of ORL's size, in grey
_LEAST_PHOTOS = 2  # of a person: one to know the face by, one to recognise
_NOISE = (".ds_store", "thumbs.db", "desktop.ini")  # what file managers leave behind


@dataclass(frozen=True)
class FaceSet:
    """Photographs of faces: `images` [N, H, W, C] bytes, `people` [N] int64, `names` [N].

    `people` count into the data's classes; a name says which photograph it is.
    """

    images: np.ndarray
    people: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.people)

    def select(self, chosen: np.ndarray) -> FaceSet:
        """The photographs that `chosen` [N] bool, or [n] indices, picks."""
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        names = tuple(self.names[index] for index in indices)
        return FaceSet(self.images[indices], self.people[indices], names)


@dataclass(frozen=True)
class NamedPairs:
    """Pairs of photographs that a data set names for its test: `first` and `second` [P] index
    them, `same` [P] says if they show one person, `folds` [P] which of its folds a pair is of."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    folds: np.ndarray


@dataclass(frozen=True)
class FaceData:
    """Faces of the people `classes`, in natural order, each person's photographs together.

    `pairs` are the data's own for its test, if it has any. `problems` says what was left out.
    """

    name: str
    photos: FaceSet
    classes: tuple[str, ...]
    pairs: NamedPairs | None = None
    problems: Problems = field(default_factory=Problems, compare=False)

    def fingerprint(self) -> str:
        """SHA-256 over all images, people and pairs."""
        digest = hashlib.sha256()
        arrays = [self.photos.images, self.photos.people]
        if self.pairs is not None:
            arrays += [self.pairs.first, self.pairs.second, self.pairs.same, self.pairs.folds]
        for array in arrays:
            digest.update(f"{array.shape}{array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load(
    folder: str | Path,
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    colour: bool = False,
    max_bad: float = DEFAULT_SHARE,
) -> FaceData:
    """Faces from a folder that holds one folder per person.

    Files that are no images, images that cannot be read, second copies of an image, and people
    with fewer than 2 photographs are left out. Images are cut to the shape of `height` x `width`
    around their middle, then scaled to it.

    Raises:
        DataError: no such folder, fewer than 2 people, or more than `max_bad` (0 to 1) of the
            images bad.
        MissingExtraError: Pillow is not installed.
    """
    folder = Path(folder).expanduser()
    spec = f"faces:{folder}"
    problems = Problems()
    people = person_folders(folder, spec, problems)
    check_size(sum(map(len, people.values())), height, width, colour, spec)
    read = Reader(height, width, colour=colour, problems=problems)
    kept: dict[str, list[tuple[Path, np.ndarray]]] = {}
    total = 0
    for name, files in people.items():
        total += len(files)
        good = [(path, image) for path in files if (image := read(path)) is not None]
        if len(good) >= _LEAST_PHOTOS:
            kept[name] = good
        else:
            problems.add(
                folder / name,
                f"expected {_LEAST_PHOTOS} good photographs of a person or more, found "
                f"{len(good)}: left out",
                item=False,
            )
    problems.refuse_beyond(max_bad, total, spec)
    if len(kept) < 2:
        raise DataError(
            f"data: {spec}: expected 2 people or more with {_LEAST_PHOTOS} photographs each, "
            f"found {len(kept)}: {'; '.join(str(each) for each in list(problems)[:3])}"
        )
    photos = FaceSet(
        np.stack([image for good in kept.values() for _, image in good]),
        np.repeat(np.arange(len(kept)), [len(good) for good in kept.values()]),
        tuple(f"{name}/{path.name}" for name, good in kept.items() for path, _ in good),
    )
    return FaceData(f"faces:{folder.name}", photos, tuple(kept), problems=problems)


def person_folders(folder: Path, spec: str, problems: Problems) -> dict[str, list[Path]]:
    """The image files of each person, both in natural order; others are noted as problems.

    Raises:
        DataError: no such folder, or one without folders.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise DataError(
            f"data: {spec}: expected a folder with one folder per person, found {found}"
        )
    people = {}
    for entry in natural(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            people[entry.name] = image_files(entry, problems)
    if not people:
        raise DataError(f"data: {spec}: expected a folder for each person, found none")
    return people


def check_size(photos: int, height: int, width: int, colour: bool, spec: str) -> None:
    """Raises:
    DataError: so many photographs of this size are more than should be held in memory.
    """
    size = photos * height * width * (3 if colour else 1)
    if size > MOST_BYTES:
        raise DataError(
            f"data: {spec}: expected at most {MOST_BYTES >> 30} GiB of photographs, all in memory, "
            f"found {photos:,} of {height} x {width}, {size >> 30} GiB: fewer or smaller ones fit"
        )


def image_files(folder: Path, problems: Problems) -> list[Path]:
    """The files of a folder that go by an image's name, in natural order."""
    files = []
    for path in natural(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _NOISE:
            continue
        if path.suffix.lower() in decode.SUFFIXES and not path.is_dir():
            files.append(path)
        else:
            problems.add(
                path,
                f"expected an image file ({' '.join(decode.SUFFIXES)}), found "
                f"{'a folder' if path.is_dir() else 'another name'}: left out",
                item=False,
            )
    if not files:
        problems.add(folder, "expected image files, found none", item=False)
    return files


class Reader:
    """Reads photographs at one size; of those that are bad or came before it makes problems."""

    def __init__(
        self,
        height: int,
        width: int,
        *,
        colour: bool,
        problems: Problems,
        keep: float = 1.0,
        copies: bool = False,
    ) -> None:
        """`keep` is the share of an image's height and width that counts, around the middle; with
        `copies`, second copies are not bad."""
        self._size = (height, width)
        self._mode = "RGB" if colour else "L"
        self._problems = problems
        self._keep = keep
        self._copies = copies
        self._seen: dict[bytes, Path] = {}

    def __call__(self, path: Path) -> np.ndarray | None:
        """The photograph [height, width, C], or None."""
        try:
            pixels = decode.read(path, self._mode)
        except DataError as error:
            self._problems.add(path, str(error).removeprefix(f"data: {path}: "))
            return None
        shape = f"{pixels.shape}".encode()
        content = hashlib.sha256(shape + np.ascontiguousarray(pixels).data).digest()
        if content in self._seen and not self._copies:
            first = self._seen[content]
            self._problems.add(path, f"expected another photograph, found a copy of {first}")
            return None
        self._seen[content] = path
        return fit(pixels, *self._size, keep=self._keep)


def fit(image: np.ndarray, height: int, width: int, *, keep: float = 1.0) -> np.ndarray:
    """Cut bytes [H, W, C] to the shape of height x width around the middle, and scale them to it.

    `keep` is the share of the largest such cut that counts.
    """
    H, W = image.shape[:2]
    if (height, width) == (H, W) and keep == 1.0:
        return image
    scale = keep * min(H / height, W / width)
    tall, wide = height * scale, width * scale
    top, left = (H - tall) / 2, (W - wide) / 2
    pillow = require("PIL.Image", "train", "scaling images")
    scaled = to_pillow(image).resize(
        (width, height),
        pillow.Resampling.BILINEAR,  # with antialiasing, when it makes an image smaller
        box=(left, top, left + wide, top + tall),
    )
    return to_array(scaled)


def natural(paths: Iterable[Path]) -> list[Path]:
    """Paths by name, numbers in them by value: s2 before s10."""
    return sorted(paths, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """What to sort names by, so that s2 comes before s10."""
    parts = re.split(r"([0-9]+)", name)
    # Text stands at even places and numbers at odd ones: only like is compared with like.
    key = [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]
    return key, name
