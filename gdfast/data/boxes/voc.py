"""Pascal VOC's folders (http://host.robots.ox.ac.uk/pascal/VOC/): one XML file per image."""

from __future__ import annotations

import math
from pathlib import Path

from gdfast.data import decode
from gdfast.data.boxes import files
from gdfast.data.boxes.records import Boxes, Detections, Record, is_empty
from gdfast.data.errors import DataError
from gdfast.data.problems import Problems

_PARTS = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")


def load(where: str, problems: Problems) -> Detections:
    """The images that the lists in ImageSets/Main name, with the boxes of Annotations.

    test.txt is for testing, and train.txt with val.txt for training; without a test.txt, val.txt
    is for testing. Classes are those of the training boxes, in alphabetical order. A box's
    numbers are taken as edges in pixels, as most tools write them; the challenge itself counted
    pixels from 1. Boxes marked as difficult are ignored.

    Raises:
        DataError: no such folder, or lists that are missing or cannot be read.
    """
    root = Path(where).expanduser()
    lists = {name: root / "ImageSets" / "Main" / f"{name}.txt" for name in ("train", "val", "test")}
    if lists["test"].is_file():
        names = {"train": [*_names(lists["train"])], "test": _names(lists["test"])}
        if lists["val"].is_file():
            names["train"] += _names(lists["val"])
    else:
        names = {"train": _names(lists["train"]), "test": _names(lists["val"])}
    _refuse_repeats(names, lists, problems)

    images = _images(root / "JPEGImages")
    found = {
        part: [entry for name in each if (entry := _entry(root, name, images, problems))]
        for part, each in names.items()
    }
    known = sorted({label for entry in found["train"] for label, *_ in entry[2]})
    records = {
        part: [record for entry in entries if (record := _record(entry, known, problems))]
        for part, entries in found.items()
    }
    return Detections(
        name=f"voc:{where}",
        train=records["train"],
        test=records["test"],
        classes=tuple(known),
        problems=problems,
    )


# Of one image: its annotation, its file, and its objects' name, line, edges, difficulty.
_Object = tuple[str, int, list[float], bool]
_Entry = tuple[Path, Path, list[_Object], tuple[int, int]]


def _names(path: Path) -> list[str]:
    # The lists of one class have a second column.
    return [line.split()[0] for line in files.read_lines(path) if line]


def _refuse_repeats(
    names: dict[str, list[str]], lists: dict[str, Path], problems: Problems
) -> None:
    seen: set[str] = set()
    for part in ("test", "train"):
        once = []
        for name in names[part]:
            if name in seen:
                problems.add(lists[part], f"{name}: listed twice, used once", item=False)
            else:
                once.append(name)
            seen.add(name)
        names[part] = once


def _images(folder: Path) -> dict[str, Path]:
    try:
        return {
            path.stem: path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in decode.SUFFIXES
        }
    except OSError as error:
        raise DataError(
            f"data: {folder}: expected a folder of images, found: {error.strerror}"
        ) from None


def _entry(root: Path, name: str, images: dict[str, Path], problems: Problems) -> _Entry | None:
    path = root / "Annotations" / f"{name}.xml"
    if name not in images:
        problems.add(root / "JPEGImages" / name, "no such image")
        return None
    try:
        tree = files.read_xml(path)
        size = decode.size(images[name])
    except DataError as error:
        note(problems, error, path)
        return None
    objects: list[_Object] = []
    for element in tree.children:
        if element.name != "object":
            continue
        label = element.text_of("name")
        if not label:
            problems.add(path, "an object without a name", line=element.line)
            return None
        texts = [element.text_of(part) for part in _PARTS]
        objects.append(
            (label, element.line, [_number(text) for text in texts],
             element.text_of("difficult") == "1")
        )  # fmt: skip
    return path, images[name], objects, size


def _record(entry: _Entry, known: list[str], problems: Problems) -> Record | None:
    path, image, objects, size = entry
    boxes = Boxes(size)
    for label, line, edges, difficult in objects:
        if label not in known:
            problems.add(path, f"class {label!r}: not among the training classes", line=line)
            return None
        reason = boxes.add(edges, known.index(label), ignored=difficult)
        if reason:
            problems.add(path, reason, line=line, item=not is_empty(reason))
            if not is_empty(reason):
                return None
    return boxes.record(image)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def note(problems: Problems, error: DataError, path: Path) -> None:
    """Note what reading an item has raised."""
    text = str(error).removeprefix("data: ")
    problems.add(path, text.removeprefix(f"{path}:").lstrip())
