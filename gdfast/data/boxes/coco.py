"""COCO's annotations (https://cocodataset.org/#format-data): one JSON file for many images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gdfast.data import decode
from gdfast.data.boxes import files
from gdfast.data.boxes.records import Boxes, Detections, Record, Seen, is_empty
from gdfast.data.errors import DataError
from gdfast.data.problems import Problems

_LARGEST_SIDE = 1 << 20
_TEST_EVERY = 5


def load(where: str, problems: Problems) -> Detections:
    """The images of `JSON,IMAGES`, every fifth (by id) for testing, or of two such pairs, the
    second for testing.

    Classes are the categories of the first file in the order of their ids. Crowds are ignored. An
    image file that comes twice is used once; one of both pairs is for testing.

    Raises:
        DataError: another form of `where`, or a file that is missing or no COCO JSON.
    """
    places = [Path(part).expanduser() for part in where.split(",") if part]
    if len(places) not in (2, 4):
        raise DataError(
            f"data: coco:{where}: expected coco:JSON,IMAGES or coco:JSON,IMAGES,JSON,IMAGES"
        )
    content = _read(places[0])
    categories = _categories(places[0], content)
    classes = tuple(categories[key] for key in sorted(categories))
    seen = Seen()
    if len(places) == 4:
        test = _records(places[2], places[3], _read(places[2]), classes, problems, seen)
        train = _records(places[0], places[1], content, classes, problems, seen)
    else:
        records = _records(places[0], places[1], content, classes, problems, seen)
        test = records[_TEST_EVERY - 1 :: _TEST_EVERY]
        train = [record for i, record in enumerate(records) if i % _TEST_EVERY != _TEST_EVERY - 1]
    return Detections(f"coco:{where}", train, test, classes, problems=problems)


def _read(path: Path) -> dict[str, Any]:
    text = files.read(path, files.MAX_JSON)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"data: {path}:{error.lineno}: expected JSON, found: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"data: {path}: expected JSON, found: {type(error).__name__}") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DataError(f"data: {path}: expected COCO's JSON, found none with a list {name!r}")
    return content


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for place, entry in enumerate(content["categories"]):
        key, name = _get(entry, "id"), _get(entry, "name")
        if type(key) is not int or not isinstance(name, str) or key in categories:
            raise DataError(
                f"data: {path}: categories[{place}]: expected a name and an id of its own, "
                f"found {str(entry)[:80]}"
            )
        categories[key] = name
    if len(set(categories.values())) < len(categories):
        raise DataError(f"data: {path}: categories: expected different names, found one twice")
    return categories


def _records(
    path: Path,
    folder: Path,
    content: dict[str, Any],
    classes: tuple[str, ...],
    problems: Problems,
    met: Seen,
) -> list[Record]:
    """The images in the order of their ids; every bad one is noted under its own file."""
    names = _categories(path, content)
    boxes: dict[int, Boxes] = {}
    images: dict[int, Path] = {}
    earlier = Seen()  # of this file
    reason: str | None
    for place, entry in enumerate(content["images"]):
        key, name = _get(entry, "id"), _get(entry, "file_name")
        size = _get(entry, "height"), _get(entry, "width")
        what = f"images[{place}]"
        if type(key) is not int or not isinstance(name, str):
            problems.add(path / what, "expected an id and a file_name")
        elif key in images:
            problems.add(path / what, f"id {key}: a second image with this id")
        elif not all(type(side) is int and 0 < side < _LARGEST_SIDE for side in size):
            problems.add(path / what, f"expected a height and a width, found {size}")
        elif not _is_within(name):
            problems.add(path / what, f"expected a file within {folder}, found {name!r}")
        elif earlier.again(folder / name):
            problems.add(path / what, f"file_name {name!r}: a second image of this file")
        elif met.again(folder / name):
            problems.add(
                folder / name,
                f"for testing already: not trained on ({what} of {path})",
                item=False,
            )
        else:
            reason = _why_not(folder / name, size)
            if reason:
                problems.add(folder / name, f"{reason} ({what} of {path})")
            else:
                images[key] = folder / name
                boxes[key] = Boxes(size)

    known = {_get(entry, "id") for entry in content["images"]}
    bad: set[int] = set()
    seen: set[int] = set()
    for place, entry in enumerate(content["annotations"]):
        image, key = _get(entry, "image_id"), _get(entry, "id")
        what = f"annotations[{place}] of {path}"
        if image not in known:
            problems.add(
                path, f"annotations[{place}]: image_id {image!r}: no such image", item=False
            )
            continue
        if image not in images:
            continue  # said above
        if key is not None and key in seen:
            reason = f"id {key}: a second annotation with this id"
        else:
            reason = _add(boxes[image], entry, names, classes)
        if type(key) is int:
            seen.add(key)
        if reason:
            problems.add(images[image], f"{what}: {reason}", item=not is_empty(reason))
            if not is_empty(reason):
                bad.add(image)
    return [boxes[key].record(images[key]) for key in sorted(images) if key not in bad]


def _add(boxes: Boxes, entry: Any, names: dict[int, str], classes: tuple[str, ...]) -> str | None:
    category, box = _get(entry, "category_id"), _get(entry, "bbox")
    name = names.get(category) if type(category) is int else None
    if name not in classes:
        return f"category {category!r}: not among the training classes"
    if not isinstance(box, list) or len(box) != 4:
        return f"bbox: expected 4 numbers, found {str(box)[:40]}"
    numbers = [float(v) if type(v) in (int, float) and abs(v) < 1e18 else math.nan for v in box]
    left, top, width, height = numbers
    return boxes.add(
        (left, top, left + width, top + height),
        classes.index(name),
        crowd=bool(_get(entry, "iscrowd")),
    )


def _why_not(image: Path, size: tuple[int, int]) -> str | None:
    try:
        found = decode.size(image)
    except DataError as error:
        return str(error).removeprefix(f"data: {image}: ")
    if found != size:
        return f"expected {size[1]} x {size[0]} pixels, found {found[1]} x {found[0]}"
    return None


def _get(entry: Any, name: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    return None if isinstance(value, (dict, list)) and name != "bbox" else value


def _is_within(name: str) -> bool:
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
