"""Readers of annotated images: what they say of bad data, with its file and line."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from box_files import (
    KINDS,
    OBJECTS,
    Image,
    annotations,
    coco,
    picture,
    said,
    voc,
    xml,
    yolo,
)

from gdfast.data import DataError, boxes
from gdfast.data.boxes import files

# What is changed in image a1 of every format, and what is said of it. A box as left, top, right,
# bottom in pixels of an image of 48 x 40.
BAD_BOXES = {
    "nan": ((float("nan"), 5, 30, 25), "finite"),
    "infinite": ((1, 5, float("inf"), 25), "finite"),
    "swapped": ((30, 5, 10, 25), "edges are swapped"),
    "negative": ((-20, 5, 10, 25), "outside the image of 48 x 40"),
    "beyond": ((10, 5, 30, 400), "outside the image of 48 x 40"),
}


def change_box(kind: str, root: Path, box: tuple, label: str = "cell") -> None:
    if kind == "voc":
        (root / "Annotations" / "a1.xml").write_text(xml([*OBJECTS, (label, box)]))
    elif kind == "coco":
        content = annotations(range(6))
        ids = {"cell": 3, "dust": 7}
        content["annotations"].append(
            {"id": 999, "image_id": 1, "category_id": ids.get(label, 55),
             "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        )  # fmt: skip
        (root / "train.json").write_text(json.dumps(content))
    else:
        left, top, right, bottom = box
        row = (
            f"{['cell', 'dust', 'moon'].index(label)} {(left + right) / 96} {(top + bottom) / 80} "
            f"{(right - left) / 48} {(bottom - top) / 40}\n"
        )
        path = root / "train" / "labels" / "a1.txt"
        path.write_text(path.read_text() + row)


@pytest.mark.parametrize("bad", BAD_BOXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_box_takes_its_image_out(kind: str, bad: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    box, words = BAD_BOXES[bad]
    change_box(kind, tmp_path, box)
    with pytest.raises(DataError, match=r"at most 1.0% bad items, found 1 of 8"):
        boxes.load(spec)
    data = boxes.load(spec, max_bad=0.2)
    assert [record.path.stem for record in data.train] == ["a0", "a2", "a3", "a4", "a5"]
    (line,) = said(spec)
    assert "a1" in line and words in line
    if kind == "voc":
        assert "a1.xml:5: " in line
    if kind == "yolo":
        assert "a1.txt:3: " in line
    if kind == "coco":
        assert "annotations[12]" in line


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_class(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    if kind == "voc":  # whose classes are those that it trains on
        (tmp_path / "Annotations" / "a7.xml").write_text(xml([("moon", (1, 1, 9, 9))]))
    else:
        change_box(kind, tmp_path, (1, 1, 9, 9), "moon")
    (line,) = said(spec)
    assert {"voc": "class 'moon'", "coco": "category 55", "yolo": "class 2"}[kind] in line


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_a_little_outside_are_clipped(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    change_box(kind, tmp_path, (-1, 5, 30, 41))
    data = boxes.load(spec)
    assert not list(data.problems)
    np.testing.assert_allclose(data.train[1].boxes[2], [0, 5, 30, 40], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_box_goes_alone_and_is_named(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    change_box(kind, tmp_path, (12, 12, 12, 12))
    data = boxes.load(spec)
    assert len(data.train) == 6 and len(data.train[1].boxes) == 2
    assert ["empty" in str(problem) for problem in data.problems] == [True]


# Pascal VOC's classes are those of the training boxes: none can be missing there.
@pytest.mark.parametrize(
    ("kind", "part"),
    [(kind, "testing") for kind in KINDS] + [("coco", "training"), ("yolo", "training")],
)
def test_a_class_that_one_part_lacks(kind: str, part: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    numbers = range(6) if part == "training" else range(6, 8)
    if kind == "coco":
        path = tmp_path / ("train.json" if part == "training" else "test.json")
        content = annotations(numbers)
        content["annotations"] = content["annotations"][::2]
        path.write_text(json.dumps(content))
    for number in numbers if kind != "coco" else ():
        if kind == "voc":
            (tmp_path / "Annotations" / f"a{number}.xml").write_text(xml(OBJECTS[:1]))
        else:
            folder = "train" if part == "training" else "val"
            path = tmp_path / folder / "labels" / f"a{number}.txt"
            path.write_text(path.read_text().splitlines()[0])
    assert said(spec) == [f"{spec}: class dust: no box for {part}"]
    assert len(boxes.load(spec).train) == 6


def image_of(kind: str, root: Path) -> Path:
    return next(root.rglob("a1.png"))


def claims(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", ["truncated", "bomb", "empty", "text", "missing", "other size"])
def test_bad_images(kind: str, bad: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    path = image_of(kind, tmp_path)
    if bad == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif bad == "bomb":
        path.write_bytes(claims(60_000, 60_000))
    elif bad == "empty":
        path.write_bytes(b"")
    elif bad == "text":
        path.write_text("no image at all")
    elif bad == "missing":
        path.unlink()
    else:
        picture(path, 1, (20, 20))
    lines = said(spec)
    if kind == "yolo" and bad in ("missing", "other size"):
        assert not lines or "outside" in lines[0]  # nothing else lists the image or its size
        return
    assert len(lines) == 1 and "a1" in lines[0], lines
    if bad == "truncated":
        return  # which comes to light when it is decoded
    with pytest.raises(DataError, match="a1"):
        boxes.load(spec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!DOCTYPE a [<!ENTITY b 'bbbb'>]><annotation>&b;</annotation>", "without DOCTYPE"),
        ("<annotation><object>", "expected XML"),
        ("", "expected XML"),
        ("<a>" * 5000, "nested"),
        ("<a>" + "<b/>" * 200_000 + "</a>", "at most 200,000 elements, found more"),
        ("\x00\x01", "expected XML"),
        ("<?xml version='1.0' encoding='nonsense'?><annotation/>", "expected XML"),
        (xml([("", (1, 2, 3, 4))]), "an object without a name"),
        (xml([("cell", ("one", 2, 3, 4))]), "finite"),
    ],
)
def test_bad_xml(text: str, words: str, tmp_path: Path) -> None:
    spec = voc(tmp_path)
    (tmp_path / "Annotations" / "a1.xml").write_text(text)
    (line,) = said(spec)
    assert "a1.xml" in line and words in line


def test_text_in_many_parts_is_put_together(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text("<a><b>" + "<c/>x&amp;\n" * 1000 + "</b></a>")
    root = files.read_xml(path)
    assert root.text_of("b") == ("x&\n" * 1000).strip()
    assert len(root.first("b").parts) > 1


def test_an_entity_bomb_in_utf_16_is_refused(tmp_path: Path) -> None:
    spec = voc(tmp_path)
    bomb = "<!DOCTYPE a [<!ENTITY b 'bbbb'><!ENTITY c '&b;&b;&b;'>]><annotation>&c;</annotation>"
    (tmp_path / "Annotations" / "a1.xml").write_bytes(bomb.encode("utf-16"))
    assert "without DOCTYPE" in said(spec)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"train.json:1: expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "a list 'images'"),
        ('{"images": [], "annotations": {}, "categories": []}', "a list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', r"categories\[0\]"),
        ('{"images": [], "annotations": [], "categories": [1]}', r"categories\[0\]"),
        ("\xff", "expected JSON"),
    ],
)
def test_bad_json(text: str, words: str, tmp_path: Path) -> None:
    spec = coco(tmp_path)
    (tmp_path / "train.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=words):
        boxes.load(spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["images"].append(c["images"][1]), "images[6]: id 1: a second image"),
        (lambda c: c["annotations"].append(c["annotations"][2]), "a second annotation"),
        (lambda c: c["images"][1].update(file_name="../a1.png"), "expected a file within"),
        (lambda c: c["images"][1].update(file_name=7), "expected an id and a file_name"),
        (lambda c: c["images"][1].update(width="48"), "expected a height and a width"),
        (lambda c: c["images"][1].update(width=1 << 40), "expected a height and a width"),
        (lambda c: c["images"].append(None), "images[6]: expected an id"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3]), "bbox: expected 4 numbers"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, "3", 4]), "finite"),
        (lambda c: c["annotations"][2].update(category_id=[3]), "not among"),
        (lambda c: c["annotations"].append({"image_id": 77}), "image_id 77: no such image"),
    ],
)
def test_bad_entries_of_coco(change: Callable[[dict], None], words: str, tmp_path: Path) -> None:
    spec = coco(tmp_path)
    content = annotations(range(6))
    change(content)
    (tmp_path / "train.json").write_text(json.dumps(content))
    lines = said(spec)
    assert any(words in line for line in lines), lines
    assert len(boxes.load(spec, max_bad=0.5).train) >= 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", r"data.yaml:\d: expected YAML"),
        ("- 1", "expected YAML with train"),
        ("train: train/images\nval: val/images", "names: expected the classes"),
        ("train: train/images\nval: val/images\nnames: {0: a, 2: b}", "names: expected"),
        ("train: train/images\nval: val/images\nnames: [a, a]", "different names"),
        ("train: [3, []]\nval: val/images\nnames: [a, b]", "train: expected a folder"),
        ("train: ~nobody-of-this-name\nval: val/images\nnames: [a, b]", "expected a path"),
        ('names: !!int ""', "names: expected the classes"),
        ("names: !!timestamp x", "names: expected the classes"),
        ("names: !!bool x", "names: expected the classes"),
        ("names: [a, {b: c}]", "expected a name for class 1, found a dict of others"),
        ("names: {[a]: b}", "expected YAML"),
        ("train: nowhere\nval: val/images\nnames: [a, b]", "nowhere: expected a file"),
        ("train: !!python/object/apply:os.system ['true']\nnames: [a]", "expected a folder or"),
    ],
)
def test_bad_yaml(text: str, words: str, tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        boxes.load(spec)


@pytest.mark.parametrize("value", ["[{0}, {0}]", "{{<<: [{0}, {0}]}}"])
def test_yaml_that_would_grow_without_bound_is_refused(value: str, tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    lines = ["a0: &a0 {b: c}"]
    lines += [f"a{n}: &a{n} {value.format(f'*a{n - 1}')}" for n in range(1, 60)]
    (tmp_path / "data.yaml").write_text("\n".join([*lines, "names: *a59"]))
    with pytest.raises(DataError, match="names: expected"):
        boxes.load(spec)


@pytest.mark.parametrize("row", ["0 0.5 0.5", "zero 0.5 0.5 0.1 0.1", "0.5 0.5 0.5 0.1 0.1",
                                 "nan 0.5 0.5 0.1 0.1", "-1 0.5 0.5 0.1 0.1"])  # fmt: skip
def test_bad_lines(row: str, tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    path = tmp_path / "train" / "labels" / "a1.txt"
    path.write_text(path.read_text() + row)
    (line,) = said(spec)
    assert line.startswith(f"{path}:3: ")


@pytest.mark.parametrize("spec", ["voc", "voc:", "boxes:x", "scenes:x", "coco:one.json"])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(DataError, match=r"^data: "):
        boxes.load(spec)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_folders(kind: str, tmp_path: Path) -> None:
    spec = f"{kind}:{tmp_path}/none" + (",x" if kind == "coco" else "")
    with pytest.raises(DataError, match=r"[Nn]o such file"):
        boxes.load(spec)
