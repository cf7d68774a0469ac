"""Readers of annotated images: what they read, and what they say of bad data."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gdfast.data import DataError, boxes
from gdfast.data.boxes import scenes
from gdfast.data.boxes.records import Detections, Record
from gdfast.data.check import check

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

OBJECTS = [("cell", (10, 5, 30, 25)), ("dust", (0, 20, 8, 40))]
NAMES = [f"a{number}" for number in range(8)]


def picture(path: Path, number: int = 0, size: tuple[int, int] = (48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 20, 50, 90)).save(path)


def xml(objects: list[tuple[str, tuple]], before: str = "", after: str = "") -> str:
    rows = "".join(
        f"<object><name>{name}</name>{after}<bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in
                  zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>\n"
        for name, box in objects
    )  # fmt: skip
    return f"{before}<annotation>\n<folder>x</folder>\n{rows}</annotation>"


def voc(root: Path) -> str:
    for number, name in enumerate(NAMES):
        picture(root / "JPEGImages" / f"{name}.png", number)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(xml(OBJECTS))
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for part, names in (("train", NAMES[:4]), ("val", NAMES[4:6]), ("test", NAMES[6:])):
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
    return f"voc:{root}"


def annotations(numbers: range) -> dict:
    return {
        "images": [
            {"id": n, "file_name": f"a{n}.png", "height": 40, "width": 48} for n in numbers
        ],
        "categories": [{"id": 7, "name": "dust"}, {"id": 3, "name": "cell"}],
        "annotations": [
            {"id": 10 * n + k, "image_id": n, "category_id": {"cell": 3, "dust": 7}[name],
             "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "iscrowd": 0}
            for n in numbers
            for k, (name, box) in enumerate(OBJECTS)
        ],
    }  # fmt: skip


def coco(root: Path) -> str:
    for number, name in enumerate(NAMES):
        picture(root / "images" / f"{name}.png", number)
    (root / "train.json").write_text(json.dumps(annotations(range(6))))
    (root / "test.json").write_text(json.dumps(annotations(range(6, 8))))
    return f"coco:{root}/train.json,{root}/images,{root}/test.json,{root}/images"


def yolo(root: Path) -> str:
    for number, name in enumerate(NAMES):
        part = "train" if number < 6 else "val"
        picture(root / part / "images" / f"{name}.png", number)
        label = root / part / "labels" / f"{name}.txt"
        label.parent.mkdir(exist_ok=True)
        rows = [
            f"{('cell', 'dust').index(kind)} {(b[0] + b[2]) / 96} {(b[1] + b[3]) / 80} "
            f"{(b[2] - b[0]) / 48} {(b[3] - b[1]) / 40}"
            for kind, b in OBJECTS
        ]
        label.write_text("\n".join(rows) + "\n")
    (root / "data.yaml").write_text(
        "train: train/images\nval: val/images\nnames:\n  0: cell\n  1: dust\n"
    )
    return f"yolo:{root}/data.yaml"


KINDS: dict[str, Callable[[Path], str]] = {"voc": voc, "coco": coco, "yolo": yolo}


def said(spec: str) -> list[str]:
    return [str(problem) for problem in check(spec)[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_all_formats_say_the_same(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    data = boxes.load(spec)
    assert data.classes == ("cell", "dust") and data.name == spec
    assert (len(data.train), len(data.test)) == (6, 2)
    assert not list(data.problems) and not said(spec)
    for number, record in enumerate([*data.train, *data.test]):
        assert record.path.stem == f"a{number}" and record.size == (40, 48)
        np.testing.assert_allclose(record.boxes, [box for _, box in OBJECTS], atol=1e-4)
        assert record.boxes.dtype == np.float32 and record.classes.tolist() == [0, 1]
        sample = record.read()
        assert sample.image.shape == (40, 48, 3) and sample.image[0, 0, 0] == number * 20


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_tell_data_apart_wherever_it_lies(kind: str, tmp_path: Path) -> None:
    one, other = (boxes.load(KINDS[kind](tmp_path / name)) for name in ("one", "two"))
    assert one.fingerprint() == other.fingerprint()
    moved = Record(one.test[0].path, (40, 48), one.test[0].boxes + 1, *(
        getattr(one.test[0], name) for name in ("classes", "ignored")))  # fmt: skip
    changed = Detections(one.name, one.train, [moved, *one.test[1:]], one.classes)
    assert changed.fingerprint() != one.fingerprint()


def test_without_a_test_list_val_tests(tmp_path: Path) -> None:
    spec = voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "test.txt").unlink()
    data = boxes.load(spec)
    assert [record.path.stem for record in data.test] == NAMES[4:6] and len(data.train) == 4


def test_one_json_is_split(tmp_path: Path) -> None:
    coco(tmp_path)
    data = boxes.load(f"coco:{tmp_path}/train.json,{tmp_path}/images")
    assert [record.path.stem for record in data.test] == ["a4"] and len(data.train) == 5


def test_difficult_objects_and_crowds_are_ignored(tmp_path: Path) -> None:
    spec = voc(tmp_path / "voc")
    text = xml(OBJECTS[:1], after="<difficult>1</difficult>").replace("</annotation>", "")
    (tmp_path / "voc" / "Annotations" / "a0.xml").write_text(
        text + xml(OBJECTS[1:]).partition("<folder>x</folder>\n")[2]
    )
    first = boxes.load(spec).train[0]
    assert first.ignored.tolist() == [True, False] and first.read().classes.tolist() == [1]

    spec = coco(tmp_path / "coco")
    content = annotations(range(6))
    content["annotations"][1]["iscrowd"] = 1
    (tmp_path / "coco" / "train.json").write_text(json.dumps(content))
    assert boxes.load(spec).train[0].ignored.tolist() == [False, True]


def test_outlines_become_boxes(tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    (tmp_path / "train" / "labels" / "a0.txt").write_text("1 0.25 0.5 0.5 0.25 0.75 0.75\n")
    first = boxes.load(spec).train[0]
    assert first.boxes.tolist() == [[12, 10, 36, 30]] and first.classes.tolist() == [1]


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


@pytest.mark.parametrize("part", ["training", "testing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_one_part_lacks(kind: str, part: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    numbers = range(6) if part == "training" else range(6, 8)
    if kind == "voc" and part == "training":
        pytest.skip("Pascal VOC's classes are those of the training boxes")
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
        ("train: 3\nval: val/images\nnames: [a, b]", "train: expected a folder"),
        ("train: nowhere\nval: val/images\nnames: [a, b]", "nowhere: expected a file"),
        ("train: !!python/object/apply:os.system ['true']", "expected YAML"),
    ],
)
def test_bad_yaml(text: str, words: str, tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        boxes.load(spec)


@pytest.mark.parametrize("row", ["0 0.5 0.5", "zero 0.5 0.5 0.1 0.1", "0.5 0.5 0.5 0.1 0.1",
                                 "nan 0.5 0.5 0.1 0.1", "-1 0.5 0.5 0.1 0.1"])  # fmt: skip
def test_bad_lines(row: str, tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    path = tmp_path / "train" / "labels" / "a1.txt"
    path.write_text(path.read_text() + row)
    (line,) = said(spec)
    assert line.startswith(f"{path}:3: ")


def test_repeats_are_used_once(tmp_path: Path) -> None:
    spec = voc(tmp_path / "voc")
    with (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").open("a") as file:
        file.write("a0\na7\n")
    data = boxes.load(spec)
    assert len(data.train) == 6 and len(list(data.problems)) == 2

    spec = yolo(tmp_path / "yolo")
    path = tmp_path / "yolo" / "train" / "labels" / "a1.txt"
    path.write_text(path.read_text() * 2)
    assert len(boxes.load(spec).train[1].boxes) == 2
    assert all("again" in line for line in said(spec))


@pytest.mark.parametrize("spec", ["voc", "voc:", "boxes:x", "scenes:x", "coco:one.json"])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(DataError, match=r"^data: "):
        boxes.load(spec)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_folders(kind: str, tmp_path: Path) -> None:
    spec = f"{kind}:{tmp_path}/none" + (",x" if kind == "coco" else "")
    with pytest.raises(DataError, match=r"[Nn]o such file"):
        boxes.load(spec)


def test_scenes_are_the_same_always() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    data = boxes.load("scenes")
    assert (len(data.train), len(data.test)) == (1000, 200)
    again = scenes._record("test", 3, scenes.digits.load().test)
    assert (again.image == data.test[3].image).all() and (again.boxes == data.test[3].boxes).all()
    for record in data.test[:20]:
        assert record.image is not None and record.image.shape == (96, 96, 3)
        assert 1 <= len(record.boxes) <= 5
        assert (record.boxes >= 0).all() and (record.boxes <= 96).all()
        assert ((record.boxes[:, 2:] - record.boxes[:, :2]).max(1) >= 16).all()
    assert {int(label) for record in data.test for label in record.classes} == set(range(10))


def test_the_blood_cells(test_data: Path) -> None:
    root = test_data / "bccd" / "BCCD"
    if not root.is_dir():
        pytest.skip(f"needs BCCD: no folder {root}")
    data = boxes.load(f"voc:{root}")
    assert (len(data.train), len(data.test)) == (292, 72)
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert ["empty" in str(problem) for problem in data.problems] == [True, True]
    assert sum(len(record.boxes) for record in (*data.train, *data.test)) == 4886
