"""MNIST's idx files: finding them in a folder, reading them, and fetching them when asked to."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path

import numpy as np
import torch

from gdfast.data import idx
from gdfast.data.errors import DataError
from gdfast.data.images import ImageData, ImageSet
from gdfast.files import write_atomic

SIZE = 28
CLASSES = 10
TRAIN, TEST = "train", "t10k"
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_SHA256 = {
    ("train", "images"): "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ("train", "labels"): "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ("t10k", "images"): "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ("t10k", "labels"): "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_LARGEST_FILE = 16 << 20
_TIMEOUT_SECONDS = 30


def load(folder: str | Path, download: bool = False) -> ImageData:
    """MNIST from a folder of idx files, gzip or not, or its subfolder `MNIST/raw`.

    With both pairs of files, train and t10k, they are the two splits. With one pair alone, its
    first 80 % of images train and the rest test: of t10k, the first 8,000 and the last 2,000.
    `download` fetches what is missing into the folder first.

    Raises:
        DataError: no such folder or files, or files that are damaged or do not belong together.
    """
    folder = Path(folder).expanduser()  # a shell leaves the ~ of mnist:~/data alone
    if download:
        fetch(folder, TRAIN, TEST)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise DataError(f"data: mnist:{folder}: expected a folder of idx files, found {found}")
    pairs = {split: read_pair(folder, split) for split in (TRAIN, TEST) if _any_of(folder, split)}
    if not pairs:
        raise DataError(
            f"data: mnist:{folder}: expected {_names(TRAIN, 'images')[0]} and "
            f"{_names(TRAIN, 'labels')[0]} (gzip or not), or the {TEST} pair, found neither; "
            "--download fetches them"
        )
    if len(pairs) == 2:
        train, test = pairs[TRAIN], pairs[TEST]
    else:
        train, test = _split_in_order(folder, next(iter(pairs.values())))
    classes = tuple(str(digit) for digit in range(CLASSES))
    return ImageData("mnist", train, test, classes, epochs=10)


def read_pair(folder: Path, split: str) -> ImageSet:
    """The images and labels of one split, `train` or `t10k`.

    Raises:
        DataError: a file is missing or damaged, or images and labels do not belong together.
    """
    images_path, labels_path = (_find(folder, split, part) for part in ("images", "labels"))
    for path, part in ((images_path, "images"), (labels_path, "labels")):
        if path is None:
            name = _names(split, part)[0]
            raise DataError(
                f"data: {folder}: expected {name} or {name}.gz, found neither; "
                "download=True (gdfast train: --download) fetches MNIST"
            )
    assert images_path is not None and labels_path is not None
    images, labels = idx.read(images_path, 3), idx.read(labels_path, 1)
    if images.shape[1:] != (SIZE, SIZE):
        found = f"{images.shape[1]} x {images.shape[2]}"
        raise DataError(f"data: {images_path}: expected {SIZE} x {SIZE} images, found {found}")
    if len(images) != len(labels):
        raise DataError(
            f"data: {labels_path}: expected {len(images):,} labels, one for each image of "
            f"{images_path.name}, found {len(labels):,}: do the two files belong together?"
        )
    outside = np.flatnonzero(labels >= CLASSES)
    if len(outside):
        raise DataError(
            f"data: {labels_path}: expected labels from 0 to {CLASSES - 1}, "
            f"found {labels[outside[0]]} for image {outside[0]}"
        )
    return ImageSet(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def fetch(folder: Path, *splits: str, into: str = ".") -> None:
    """Download those files of the splits that the folder lacks.

    Each file is checked, then put whole into `into`, a folder below `folder`.

    Raises:
        DataError: no mirror gave a file with the right checksum, or it could not be written.
    """
    for (split, part), checksum in _SHA256.items():
        if split not in splits or _find(folder, split, part) is not None:
            continue
        name = f"{_names(split, part)[0]}.gz"
        content = _download(name, checksum)
        target = folder / into / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, content)
        except OSError as error:
            raise DataError(f"data: {target}: expected a place to download to: {error}") from None


def _download(name: str, checksum: str) -> bytes:
    failures = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(mirror + name, timeout=_TIMEOUT_SECONDS) as response:
                content = response.read(_LARGEST_FILE)
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
            failures.append(f"{mirror}: {error}")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found == checksum:
            return content
        failures.append(f"{mirror}: SHA-256 {found[:12]}... instead of {checksum[:12]}...")
    raise DataError(f"data: {name}: expected a download, found: {'; '.join(failures)}")


def _find(folder: Path, split: str, part: str) -> Path | None:
    for place in (folder, folder / "MNIST" / "raw"):
        for name in _names(split, part):
            for path in (place / name, place / f"{name}.gz"):
                if path.exists():
                    return path
    return None


def _any_of(folder: Path, split: str) -> bool:
    # Half a pair counts: reading it then says which file is missing.
    return any(_find(folder, split, part) is not None for part in ("images", "labels"))


def _names(split: str, part: str) -> tuple[str, str]:
    dimensions = {"images": 3, "labels": 1}[part]
    # Some archives of MNIST write a dot before idx.
    return f"{split}-{part}-idx{dimensions}-ubyte", f"{split}-{part}.idx{dimensions}-ubyte"


def _split_in_order(folder: Path, data: ImageSet) -> tuple[ImageSet, ImageSet]:
    border = len(data) * 4 // 5
    if not border:
        raise DataError(f"data: mnist:{folder}: expected 2 images or more, found {len(data)}")
    return (
        ImageSet(data.images[:border], data.labels[:border]),
        ImageSet(data.images[border:], data.labels[border:]),
    )
