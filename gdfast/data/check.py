"""Going through data item by item, for what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gdfast.data import boxes, decode, digits, faces, folder, identities, lfw, mnist
from gdfast.data.errors import DataError
from gdfast.data.images import ImageData
from gdfast.data.problems import Problems

# For each kind of data: reads it, notes the problems, and gives the image files and a summary.
Reader = Callable[[str, Problems], tuple[list[Path], str]]


def check(spec: str, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[
    Problems, str
]:  # fmt: skip
    """Everything that is wrong with the data that `spec` names, and a summary of what is there.

    Each image file is decoded; `progress(done, total)` is told of each.

    Raises:
        DataError: data of no known kind, or none at all.
    """
    kind, _, where = spec.partition(":")
    if kind not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"data: spec: expected one that begins with {known}, got {spec!r}")
    if bool(where) is (kind in _WITHOUT_PATH):
        raise DataError(f"data: spec: expected {_form(kind)}, got {spec!r}")
    problems = Problems()
    try:
        paths, summary = READERS[kind](where, problems)
    except DataError as error:
        if not len(problems):
            raise
        # Too little is left to use: the reasons have been noted already.
        problems.add(Path(where), str(error), item=False)
        return problems, "no data to use"
    seen: dict[bytes, Path] = {}
    for number, path in enumerate(paths, 1):
        try:
            pixels = decode.read(path)
            if path.suffix.lower() not in decode.suffixes(path):
                problems.add(
                    path, f"its content is {decode.kind(path)}, which its name denies", item=False
                )
            content = np.ascontiguousarray(pixels).data
            key = hashlib.sha256(repr(pixels.shape).encode() + content).digest()
            if (first := seen.setdefault(key, path)) != path:
                problems.add(path, f"the same picture as {first}", item=False)
        except DataError as error:
            problems.add(path, str(error).removeprefix(f"data: {path}: "))
        progress(number, len(paths))
    return problems, summary


def _digits(where: str, problems: Problems) -> tuple[list[Path], str]:
    return [], _summary(digits.load())


def _mnist(where: str, problems: Problems) -> tuple[list[Path], str]:
    data = mnist.load(where)
    _count_classes(data, Path(where), problems)
    return [], _summary(data)


def _folder(where: str, problems: Problems) -> tuple[list[Path], str]:
    data, _ = folder.read(Path(where).expanduser(), problems)
    paths = [
        path
        for part in (data.train, data.test)
        if isinstance(part, folder.FileSet)
        for path in part.paths
    ]
    return paths, _summary(data)


def _identities(where: str, problems: Problems) -> tuple[list[Path], str]:
    data = identities.load()
    return [], f"{len(data.photos):,} drawings of {len(data.classes):,} synthetic people"


def _faces(where: str, problems: Problems) -> tuple[list[Path], str]:
    folder = Path(where).expanduser()
    people = faces.person_folders(folder, f"faces:{where}", problems)
    for name, files in people.items():
        if len(files) == 1:
            problems.add(folder / name, "expected 2 photographs or more, found 1", item=False)
    return _photographs(people)


def _lfw(where: str, problems: Problems) -> tuple[list[Path], str]:
    folder = Path(where).expanduser()
    _, people = lfw.find_people(folder, problems)
    paths, summary = _photographs(people)
    names = [f"{path.parent.name}/{path.stem}" for path in paths]
    pairs = lfw.read_pairs(folder / lfw.PAIRS, names, problems, max_bad=1.0)
    return paths, f"{summary}; {len(pairs.same):,} pairs"


def _photographs(people: dict[str, list[Path]]) -> tuple[list[Path], str]:
    paths = [path for files in people.values() for path in files]
    return paths, f"{len(paths):,} photographs of {len(people):,} people"


def _boxes(kind: str) -> Reader:
    def read(where: str, problems: Problems) -> tuple[list[Path], str]:
        data = boxes.read(f"{kind}:{where}" if where else kind, problems)
        records = [*data.train, *data.test]
        paths = [record.path for record in records if record.image is None]
        count = sum(len(record.boxes) for record in records)
        return paths, f"{_summary(data)}; {count:,} boxes"

    return read


def _summary(data: ImageData | boxes.Detections) -> str:
    return (
        f"{len(data.train):,} images to train on, {len(data.test):,} to test, "
        f"{len(data.classes)} classes: {', '.join(data.classes[:20])}"
        f"{', ...' if len(data.classes) > 20 else ''}"
    )


def _count_classes(data: ImageData, path: Path, problems: Problems) -> None:
    for part, labels in (("train", data.train.labels), ("test", data.test.labels)):
        counts = np.bincount(labels.numpy(), minlength=len(data.classes))
        for name, count in zip(data.classes, counts, strict=True):
            if not count:
                problems.add(path, f"no image of class {name} in {part}", item=False)


_WITHOUT_PATH = ("digits", "scenes", "identities")


def _form(kind: str) -> str:
    return kind if kind in _WITHOUT_PATH else f"{kind}:PATH"


READERS: dict[str, Reader] = {
    "digits": _digits,
    "mnist": _mnist,
    "folder": _folder,
    "identities": _identities,
    "faces": _faces,
    "lfw": _lfw,
    **{kind: _boxes(kind) for kind in boxes.KINDS},
}
