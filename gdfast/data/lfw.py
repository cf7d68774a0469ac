"""Labeled Faces in the Wild (Huang et al., 2007): its folders, and its pairs for verification."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gdfast.data import faces
from gdfast.data.errors import DataError
from gdfast.data.faces import HEIGHT, WIDTH, FaceData, FaceSet, NamedPairs, Reader
from gdfast.data.problems import DEFAULT_SHARE, Problems

PAIRS = "pairs.txt"
# Where the archives keep the folders of people; none of them: beside pairs.txt.
_PLACES = ("lfw", "lfw_funneled", "lfw-deepfunneled", ".")
_KEEP = 0.6  # of the 250 x 250 pixels, a face takes about as much of the middle


def load(
    folder: str | Path,
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    colour: bool = False,
    max_bad: float = DEFAULT_SHARE,
) -> FaceData:
    """LFW from a folder that holds pairs.txt and, in itself or in `lfw*`, a folder per person.

    Photographs are `Name/Name_0001.jpg`. Their middle, three fifths each way at the most, is cut to
    the shape of `height` x `width` and scaled to it. Bad photographs, and pairs that name one that
    is missing, are left out.

    Raises:
        DataError: missing or malformed files, or more than `max_bad` (0 to 1) of the photographs
            or of the pairs bad.
        MissingExtraError: Pillow is not installed.
    """
    folder = Path(folder).expanduser()
    spec = f"lfw:{folder}"
    problems = Problems()
    place, people = find_people(folder, problems)
    faces.check_size(sum(map(len, people.values())), height, width, colour, spec)
    read = Reader(height, width, colour=colour, problems=problems, keep=_KEEP, copies=True)
    images, owners, names = [], [], []
    classes: list[str] = []
    for name, files in people.items():
        good = [(path, image) for path in files if (image := read(path)) is not None]
        if not good:
            problems.add(place / name, "expected photographs, found none: left out", item=False)
            continue
        images += [image for _, image in good]
        names += [f"{name}/{path.stem}" for path, _ in good]
        owners += [len(classes)] * len(good)
        classes.append(name)
    problems.refuse_beyond(max_bad, sum(map(len, people.values())), spec)
    if not images:
        raise DataError(f"data: {spec}: expected photographs of people, found none")
    photos = FaceSet(np.stack(images), np.array(owners), tuple(names))
    pairs = read_pairs(folder / PAIRS, names, problems, max_bad=max_bad)
    return FaceData("lfw", photos, tuple(classes), pairs, problems)


def find_people(folder: Path, problems: Problems) -> tuple[Path, dict[str, list[Path]]]:
    """The folder that holds a folder per person, and each person's image files.

    Raises:
        DataError: no such folder, or one without folders.
    """
    spec = f"lfw:{folder}"
    if not folder.is_dir():
        raise DataError(f"data: {spec}: expected a folder, found {_what(folder)}")
    place = next(folder / name for name in _PLACES if (folder / name).is_dir())
    return place, faces.person_folders(place, spec, problems)


def read_pairs(
    path: Path, names: list[str], problems: Problems, *, max_bad: float = DEFAULT_SHARE
) -> NamedPairs:
    """The pairs of a file in LFW's format; `names` are the photographs, as `Name/Name_0001`.

    The first line says how many folds there are and how many pairs of each kind a fold has (a
    lone number is the latter, of one fold). Of each fold come first pairs of one person, `Name 1
    4`, then of two, `Name 1 Other 2`.

    Raises:
        DataError: no such file, another number of lines than the first one says, or more than
            `max_bad` of the pairs bad.
    """
    if not path.is_file():
        raise DataError(f"data: {path}: expected LFW's list of pairs, found {_what(path)}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"data: {path}: expected text in UTF-8, found other bytes: {error}"
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    head = lines[0].split() if lines else []
    if len(head) not in (1, 2) or not all(map(_is_count, head)):
        raise DataError(
            f"data: {path}:1: expected the number of folds and of pairs, as in 10 300, found "
            f"{lines[0][:40] if lines else 'an empty file'!r}"
        )
    folds, each = int(head[0]) if len(head) == 2 else 1, int(head[-1])
    total = folds * 2 * each
    if len(lines) - 1 != total:
        raise DataError(
            f"data: {path}: expected {total:,} pairs, 2 x {each:,} for each of {folds} folds, as "
            f"its first line says, found {len(lines) - 1:,} lines of them"
        )
    known = {name: index for index, name in enumerate(names)}
    found = []
    for number, line in enumerate(lines[1:]):
        same = number // each % 2 == 0
        try:
            found.append((*_pair(line, same, known), same, number // (2 * each)))
        except DataError as error:
            problems.add(path, str(error), line=number + 2, item=False)
    bad = total - len(found)
    if bad > max_bad * total or not found:
        first = next(str(each) for each in problems if each.path == path)
        raise DataError(
            f"data: {path}: expected at most {max_bad:.1%} bad pairs, found {bad:,} of {total:,}, "
            f"the first: {first}; --max-bad allows more"
        )
    first_, second, same_, fold = (np.array(column) for column in zip(*found, strict=True))
    return NamedPairs(first_, second, same_, fold)


def _pair(line: str, same: bool, known: dict[str, int]) -> tuple[int, int]:
    words = line.split()
    expected = "Name 1 4 (a pair of one person)" if same else "Name 1 Other 2 (a pair of two)"
    numbers = words[1:] if same else words[1::2]
    if len(words) != (3 if same else 4) or not all(map(_is_count, numbers)):
        raise DataError(f"expected {expected}, found {line[:60]!r}")
    first, second = (words[0], words[0]) if same else (words[0], words[2])
    wanted = [
        f"{name}/{name}_{int(n):04d}" for name, n in zip((first, second), numbers, strict=True)
    ]
    if (wanted[0] == wanted[1]) if same else (first == second):
        raise DataError(f"expected {expected}, found {line[:60]!r}")
    for name in wanted:
        if name not in known:
            raise DataError(f"expected the photograph {name}, found none that can be read")
    return known[wanted[0]], known[wanted[1]]


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 9 and int(word) > 0


def _what(path: Path) -> str:
    return "something else" if path.exists() else "none"
