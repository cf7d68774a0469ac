"""A folder of images for each class, as most classification data comes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gdfast.data import decode
from gdfast.data.errors import DataError
from gdfast.data.images import ImageData
from gdfast.data.problems import DEFAULT_SHARE, Problems

_TRAIN, _TESTS = "train", ("test", "val")
_EVERY = 5  # without a split of its own, the data's every fifth image of a class is for testing
_CACHE_BYTES = 1 << 30


class FileSet:
    """Labelled image files, decoded when asked for and kept while they fit into 1 GiB.

    `paths` [N], `labels` [N] int64; `mode` is "RGB" or "L".
    """

    def __init__(self, root: Path, paths: Sequence[Path], labels: Tensor, mode: str) -> None:
        self.root = root
        self.paths = list(paths)
        self.labels = labels
        self.mode = mode
        self._cache: dict[int, np.ndarray] = {}
        self._room = _CACHE_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as bytes [H, W, C].

        Raises:
            DataError: the file is damaged.
        """
        if index in self._cache:
            return self._cache[index]
        image = decode.read(self.paths[index], self.mode)
        if image.nbytes <= self._room:
            self._cache[index] = image
            self._room -= image.nbytes
        return image

    def digest(self) -> bytes:
        """SHA-256 over the names, sizes and labels of all files."""
        digest = hashlib.sha256(self.mode.encode())
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            name = path.relative_to(self.root).as_posix()
            digest.update(os.fsencode(f"{name} {path.stat().st_size} {label}\n"))
        return digest.digest()


def load(folder: str | Path, *, mode: str = "RGB", max_bad: float = DEFAULT_SHARE) -> ImageData:
    """Images from `folder/train/CLASS/` and `folder/test/CLASS/` (or `val`), or `folder/CLASS/`.

    Without a split, every fifth image of each class, in the order of the names, is for testing.

    Raises:
        DataError: no such folder, fewer than two classes, or more than `max_bad` of the images bad.
    """
    root = Path(folder).expanduser()
    problems = Problems()
    data, total = read(root, problems, mode)
    problems.refuse_beyond(max_bad, total, f"folder:{root}")
    return data


def read(root: Path, problems: Problems, mode: str = "RGB") -> tuple[ImageData, int]:
    """The good images of a folder, and how many there are with the bad ones.

    Only headers are read: a file that is damaged further on shows when it is decoded.

    Raises:
        DataError: no such folder, or fewer than two classes with images.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise DataError(f"data: folder:{root}: expected a folder for each class, found {found}")
    train = root / _TRAIN
    test = next((root / name for name in _TESTS if (root / name).is_dir()), None)
    if train.is_dir() != (test is not None):
        missing = "test (or val)" if train.is_dir() else _TRAIN
        raise DataError(
            f"data: folder:{root}: expected both train and test (or val), or neither of them, "
            f"found no {missing}"
        )
    parts = [train, test] if test is not None else [root]
    classes = sorted({entry.name for part in parts if part for entry in _folders(part)})
    if len(classes) < 2:
        raise DataError(
            f"data: folder:{root}: expected two folders or more, one for each class, found "
            f"{', '.join(classes) or 'none'}"
        )
    total = 0
    found_in: list[dict[str, list[Path]]] = []
    for part in parts:
        assert part is not None
        each: dict[str, list[Path]] = {}
        for name in classes:
            good, seen = _images(part / name, problems)
            total += seen
            each[name] = good
            if not good:
                problems.add(part / name, "expected images of this class, found none", item=False)
        found_in.append(each)
    if len(found_in) == 1:
        found_in = [
            {name: [p for n, p in enumerate(paths) if (n % _EVERY == 2) is test_part]
             for name, paths in found_in[0].items()}
            for test_part in (False, True)
        ]  # fmt: skip
    sets = []
    for each in found_in:
        paths = [path for name in classes for path in each[name]]
        labels = [number for number, name in enumerate(classes) for _ in each[name]]
        sets.append(FileSet(root, paths, torch.tensor(labels, dtype=torch.int64), mode))
    for kind, part_set in zip(("train on", "test with"), sets, strict=True):
        if not len(part_set):
            raise DataError(f"data: folder:{root}: expected an image to {kind}, found none")
    return ImageData(root.name, sets[0], sets[1], tuple(classes), epochs=30), total


def _folders(part: Path) -> list[Path]:
    return [entry for entry in part.iterdir() if entry.is_dir() and entry.name[0] != "."]


def _images(folder: Path, problems: Problems) -> tuple[list[Path], int]:
    """The files that begin like images, sorted by name, and how many were looked at."""
    good: list[Path] = []
    seen = 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in decode.SUFFIXES:
            problems.add(path, f"no image: its name ends in {path.suffix or 'nothing'}", item=False)
            continue
        seen += 1
        try:
            decode.size(path)
            good.append(path)
        except DataError as error:
            problems.add(path, str(error).removeprefix(f"data: {path}: "))
    return good, seen
