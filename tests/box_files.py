"""Small data sets with boxes, written in every format: the same eight images in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
