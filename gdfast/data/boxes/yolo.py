"""Text labels with a YAML file that lists them, as YOLO's tools write them.

The YAML has `path` (else its own folder), `train` and `val`, each a folder of images or a text
file of their paths (or a list of such), and `names`, a list or a dictionary of class names. An
image's labels are in the file that its path names with `labels` for `images` and `.txt` at its end,
one object a line: its class's number, then its box's centre x, centre y, width and height, or
the corners of its outline, all in shares of the image's width and height.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gdfast.data import decode
from gdfast.data.boxes import files
from gdfast.data.boxes.records import Boxes, Detections, Record, Seen, is_empty
from gdfast.data.boxes.voc import note
from gdfast.data.errors import DataError
from gdfast.data.problems import Problems
from gdfast.extras import require

_MAX_YAML = 4 << 20
_NULLS = ("", "~", "null")


def load(where: str, problems: Problems) -> Detections:
    """Train on the images of `train`, test on those of `val`. An image without a label file shows
    nothing.

    Raises:
        DataError: a YAML file that is missing or lacks something, or lists that cannot be read.
    """
    path = Path(where).expanduser()
    content = _read(path)
    classes = _classes(path, content)
    root = path.parent
    place = content.get("path")
    if isinstance(place, str) and place not in _NULLS:
        root = root / _expanded(path, place)
    seen = Seen()
    parts: dict[str, list[Record]] = {}
    for part in ("val", "train"):
        records = []
        for image in _images(path, root, part, content.get(part)):
            if seen.again(image):
                problems.add(
                    image, f"listed twice, the second time in {part}: used once", item=False
                )
                continue
            if record := _record(image, classes, problems):
                records.append(record)
        parts[part] = records
    return Detections(f"yolo:{where}", parts["train"], parts["val"], classes, problems=problems)


def _read(path: Path) -> dict[str, Any]:
    yaml = require("yaml", "train", "--data yolo:YAML")
    text = files.read(path, _MAX_YAML)
    try:
        # It makes text of every value: no tag is followed, nothing is merged or computed.
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or type(error).__name__
        raise DataError(f"data: {place}: expected YAML, found: {problem}") from None
    if not isinstance(content, dict):
        raise DataError(f"data: {path}: expected YAML with train, val and names, found another one")
    return content


def _classes(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict) and set(names) == set(map(str, range(len(names)))):
        names = [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"data: {path}: names: expected the classes, as a list or numbered from 0, found "
            f"{_kind(names)}"
        )
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise DataError(
                f"data: {path}: names: expected a name for class {number}, found {_kind(name)}"
            )
    classes = tuple(names)
    if len(set(classes)) < len(classes):
        raise DataError(f"data: {path}: names: expected different names, found one twice")
    return classes


def _kind(value: Any) -> str:
    # Never what is in it: a few lines that refer to each other can be endless when written out.
    if isinstance(value, str):
        return repr(value[:60])
    return "none" if value is None else f"a {type(value).__name__} of others"


def _expanded(path: Path, place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise DataError(f"data: {path}: {place[:60]}: expected a path, found: {error}") from None


def _images(path: Path, root: Path, part: str, places: Any) -> list[Path]:
    listed = places if isinstance(places, list) else [places]
    if not listed or not all(isinstance(place, str) and place for place in listed):
        raise DataError(f"data: {path}: {part}: expected a folder or a list of images, found none")
    found: list[Path] = []
    for place in listed:
        where = root / _expanded(path, place)
        if where.is_dir():
            found += sorted(
                entry for entry in where.rglob("*") if entry.suffix.lower() in decode.SUFFIXES
            )
        else:
            lines = [line for line in files.read_lines(where) if line]
            # "./" starts from the list's own folder.
            found += [(where.parent if line.startswith("./") else root) / line for line in lines]
    return found


def _labels(image: Path) -> Path:
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _record(image: Path, classes: tuple[str, ...], problems: Problems) -> Record | None:
    try:
        boxes = Boxes(decode.size(image))
        path = _labels(image)
        lines = files.read_lines(path) if path.exists() else []
    except DataError as error:
        note(problems, error, image)
        return None
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        reason = (
            f"{line[:60]!r}: the same line again" if line in seen else _add(boxes, line, classes)
        )
        seen.add(line)
        if reason:
            slip = is_empty(reason) or (line in seen and reason.endswith("again"))
            problems.add(path, reason, line=number, item=not slip)
            if not slip:
                return None
    return boxes.record(image)


def _add(boxes: Boxes, line: str, classes: tuple[str, ...]) -> str | None:
    """Take the object of a line; returns what is wrong with it."""
    try:
        label, *values = (float(word) for word in line.split())
    except ValueError:
        return f"{line[:60]!r}: expected a class and numbers"
    if not math.isfinite(label) or label != int(label) or not 0 <= label < len(classes):
        return f"class {label:g}: expected 0 to {len(classes) - 1}"
    height, width = boxes.size
    if len(values) == 4:
        x, y, w, h = values
        edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        across, down = values[0::2], values[1::2]
        if not all(math.isfinite(value) for value in values):
            return f"{line[:60]!r}: expected finite numbers"
        edges = (min(across), min(down), max(across), max(down))
    else:
        count = len(values) + 1
        return f"{line[:60]!r}: expected 5 numbers, or 7 and more of an outline, found {count}"
    left, top, right, bottom = edges
    return boxes.add((left * width, top * height, right * width, bottom * height), int(label))
