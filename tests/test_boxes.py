"""Readers of annotated images: what they read of each format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from box_files import KINDS, NAMES, OBJECTS, annotations, coco, said, voc, xml, yolo

from gdfast.data import boxes
from gdfast.data.boxes import scenes
from gdfast.data.boxes.records import Detections, Record


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
    path = other.train[0].path
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert other.fingerprint() != one.fingerprint()


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
    crowded = boxes.load(spec).train[0]
    assert crowded.ignored.tolist() == crowded.crowds.tolist() == [False, True]
    assert first.crowds is None


def test_outlines_become_boxes(tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    (tmp_path / "train" / "labels" / "a0.txt").write_text("1 0.25 0.5 0.5 0.25 0.75 0.75\n")
    first = boxes.load(spec).train[0]
    assert first.boxes.tolist() == [[12, 10, 36, 30]] and first.classes.tolist() == [1]


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


def test_a_file_of_coco_under_two_ids_is_used_once(tmp_path: Path) -> None:
    spec = coco(tmp_path)
    content = annotations(range(6))
    content["images"].append({**content["images"][4], "id": 90, "file_name": "./a4.png"})
    (tmp_path / "train.json").write_text(json.dumps(content))
    for each, trained in ((spec, 6), (f"coco:{tmp_path}/train.json,{tmp_path}/images", 5)):
        data = boxes.load(each, max_bad=0.2)
        assert len(data.train) == trained
        assert "images[6]: file_name './a4.png': a second image of" in str(
            next(iter(data.problems))
        )


def test_an_image_of_both_pairs_is_not_trained_on(tmp_path: Path) -> None:
    spec = coco(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(annotations(range(7))))
    data = boxes.load(spec)
    assert [record.path.stem for record in data.train] == NAMES[:6]
    assert [record.path.stem for record in data.test] == NAMES[6:]
    (problem,) = data.problems
    assert "a6.png: for testing already: not trained on" in str(problem)


def test_an_image_that_yolo_lists_by_two_paths_is_used_once(tmp_path: Path) -> None:
    spec = yolo(tmp_path)
    (tmp_path / "list.txt").write_text("train/images/a0.png\ntrain/../val/images/a7.png\na\0b.png")
    path = tmp_path / "data.yaml"
    path.write_text(path.read_text().replace("train: train/images", "train: list.txt"))
    data = boxes.load(spec, max_bad=0.5)
    assert [record.path.stem for record in data.train] == ["a0"] and len(data.test) == 2
    assert "a7.png: listed twice, the second time in train" in str(next(iter(data.problems)))


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
