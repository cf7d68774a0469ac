"""`gdfast train yolo`: a run end to end, what it leaves, and what its model finds in images."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gdfast.data import DataError, boxes
from gdfast.data.boxes import BoxSource
from gdfast.metrics import Found
from gdfast.models.yolo_head import decode
from gdfast.train import Recipe, RunError, Settings, SettingsError, predict, train, weights
from gdfast.train.detect import Detect
from gdfast.train.detections import DetectPredictor, detect, draw, select, to_json
from gdfast.train.tasks import settle

for name in ("pycocotools", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(name, reason=f"needs {name}")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

CLASSES = ("disc", "square")


def scene(rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """A bright square or a dark one on noise, and its label in YOLO's text form."""
    image = rng.integers(90, 140, (48, 64, 3), dtype=np.uint8)
    side, label = int(rng.integers(14, 24)), int(rng.integers(2))
    left, top = int(rng.integers(0, 64 - side)), int(rng.integers(0, 48 - side))
    image[top : top + side, left : left + side] = (230, 20)[label]
    values = ((left + side / 2) / 64, (top + side / 2) / 48, side / 64, side / 48)
    return image, [f"{label} {' '.join(map(str, values))}"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 6)):
        (root / part / "images").mkdir(parents=True)
        (root / part / "labels").mkdir()
        for number in range(count):
            image, rows = scene(rng)
            Image.fromarray(image).save(root / part / "images" / f"{part}{number}.png")
            (root / part / "labels" / f"{part}{number}.txt").write_text("\n".join(rows))
    (root / "data.yaml").write_text(
        f"train: train/images\nval: val/images\nnames: [{', '.join(CLASSES)}]\n"
    )
    return f"yolo:{root}/data.yaml"


@pytest.fixture(scope="module")
def run(spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(
        lr=0.03, batch_size=8, epochs=3, warmup=2, ema=0.5, clip=10.0, weight_decay=5e-4
    )
    settings = Settings(task="yolo", data=spec, recipe=recipe, options={"strides": "8,16"})
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(settings, out=out, stream=io.StringIO()).folder


def test_a_run_leaves_everything(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "args.yaml", "best.safetensors", "curves.png", "detections.png", "metrics.json",
        "precision_recall.png", "results.csv", "weights.safetensors",
    }  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["canvas"] == [64, 64] and metrics["classes"] == list(CLASSES)
    assert set(metrics["ap"]) == set(metrics["ap50"]) == set(CLASSES)
    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= {
        "train_loss", "train_box", "train_confidence", "train_class",
        "test_loss", "test_box", "test_confidence", "test_class", "map50", "map",
    }  # fmt: skip
    assert len(rows) == 3
    for row in rows:
        parts = sum(float(row[f"train_{name}"]) for name in ("box", "confidence", "class"))
        assert float(row["train_loss"]) == pytest.approx(parts) and parts < 20


def test_a_trained_detector_answers(run: Path, spec: str) -> None:
    trained = predict.load(run)
    assert trained.task == "yolo" and trained.shape() == (3, 64, 64)
    image, _ = scene(np.random.default_rng(5))
    predictor = trained.predictor(threshold=0.0)
    answer = predictor(image)
    assert json.loads(json.dumps(answer)) == answer
    assert 1 <= len(answer["boxes"]) <= 100
    scores = [box["score"] for box in answer["boxes"]]
    assert scores == sorted(scores, reverse=True)
    for box in answer["boxes"]:
        left, top, right, bottom = box["box"]
        assert 0 <= left <= right <= 64 and 0 <= top <= bottom <= 48 and box["class"] in CLASSES
    picture = np.asarray(Image.open(io.BytesIO(predictor.draw(image, answer))))
    assert picture.shape == image.shape and (picture != image).any()
    assert trained.predictor(threshold=1.0)(image) == {"boxes": [], "summary": "nothing"}


def test_training_can_begin_with_trained_weights(run: Path, spec: str) -> None:
    file = run / "weights.safetensors"
    settings = settle(
        Settings(task="yolo", data=spec, options={"strides": "8,16", "weights": str(file)})
    )
    data = boxes.load(spec)
    trained, _ = weights.read(file)
    task = Detect(settings, data)
    task.begin()
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    more = replace(data, classes=(*CLASSES, "third"))
    other = Detect(settings, more)
    other.begin()
    for name, value in other.model.state_dict().items():
        is_new = name.startswith("heads.") and ".classes." in name
        assert is_new or torch.equal(value, trained[name]), name


def test_other_options_and_metadata_are_refused(run: Path) -> None:
    trained = predict.load(run)
    with pytest.raises(SettingsError, match="gallery"):
        trained.predictor(gallery="x")
    for change in ({"classes": "[]"}, {"classes": "7"}, {"shape": "x"}, {"shape": "[3]"}):
        with pytest.raises(RunError, match="predict: expected"):
            DetectPredictor(trained.model, {**trained.metadata, **change})


class Fixed(nn.Module):
    """A detector that sees the same whatever it is shown: one box at stride 8."""

    strides = (8,)
    num_classes = 2

    def __init__(self, row: int, column: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.maps = torch.full((1, 7, *size), -9.0)
        self.maps[0, :4, row, column] = torch.tensor([1.0, 0.5, 2, 1]).log()
        self.maps[0, 4:, row, column] = torch.tensor([9.0, -9, 3])

    def forward(self, images: Tensor) -> list[Tensor]:
        assert images.shape == (1, 3, self.maps.shape[2] * 8, self.maps.shape[3] * 8)
        return [self.maps]


def test_boxes_come_back_in_the_image_s_pixels() -> None:
    # 100 x 50 on a canvas of 64 x 64 is scaled by 0.64, with 16 rows of grey above and below.
    found = detect(Fixed(4, 2, (8, 8)), np.zeros((50, 100, 3), np.uint8), (64, 64))
    assert found.classes.tolist() == [1] and found.scores[0] == pytest.approx(0.952, abs=1e-3)
    expected = (np.array([20 - 8, 36 - 4 - 16, 20 + 16, 36 + 8 - 16])) / 0.64
    np.testing.assert_allclose(found.boxes[0], expected, rtol=1e-5)
    assert to_json(found, CLASSES) == [
        {"class": "square", "score": 0.9525, "box": [18.75, 25.0, 56.25, 43.75]}
    ]


def test_overlapping_boxes_of_one_class_are_one() -> None:
    maps = torch.full((1, 7, 1, 3), 0.0)
    maps[0, 4, 0] = torch.tensor([1.0, 3, 2])
    maps[0, :4] = 2.0  # far larger than the distance of the cells
    maps[0, 5:, 0] = torch.tensor([[4.0, 4, -4], [-4, -4, 4]])
    (found,) = select(decode([maps], (8,)), 0.2, 0.5)
    assert found.classes.tolist() == [0, 1]
    np.testing.assert_allclose(found.boxes[:, 0] + found.boxes[:, 2], [24, 40], rtol=1e-5)


def test_drawing_leaves_the_image_alone() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    boxes = np.array([[5, 5, 30, 30], [50, 30, 80, 60]], np.float32)
    picture = draw(image, boxes, np.array([0, 1]), CLASSES, np.array([0.9, 0.5]))
    assert picture.shape == image.shape and picture.any() and not image.any()
    empty = Found(boxes[:0], np.zeros(0), np.zeros(0, np.int64))
    assert not draw(image, empty.boxes, empty.classes, CLASSES).any()


def test_bad_images_are_left_out_and_counted(spec: str, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    source = Path(spec.partition(":")[2]).parent
    for path in sorted(source.rglob("*")):
        if path.is_file():
            (root / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (root / path.relative_to(source)).write_bytes(path.read_bytes())
    for name in ("train/images/train3.png", "val/images/val2.png"):
        (root / name).write_bytes((root / name).read_bytes()[:500])  # truncated
    settings = Settings(
        task="yolo",
        data=f"yolo:{root}/data.yaml",
        recipe=Recipe(lr=0.01, batch_size=8, epochs=1),
        max_bad=0.2,
    )
    result = train(settings, out=tmp_path / "run", stream=io.StringIO())
    assert result.metrics["skipped_images"] == 2 and result.metrics["test_images"] == 5
    with pytest.raises(DataError, match=r"at most 1.0% bad items, found 1 of .*val2\.png"):
        train(replace(settings, max_bad=0.01), out=tmp_path / "again", stream=io.StringIO())


def test_the_source_reads_what_does_not_fit_in_memory(spec: str) -> None:
    data = boxes.load(spec)
    held, read = (BoxSource(data.test, (64, 64), cache=cache) for cache in (1 << 20, 0))
    for index in range(len(data.test)):
        (_, one), (_, other) = (
            each.item(index, 0, np.random.default_rng(0)) for each in (held, read)
        )
        assert (one.image == other.image).all() and (one.boxes == other.boxes).all()
