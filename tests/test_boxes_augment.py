"""Augmentation of images with boxes: the boxes stay on what they mark, whatever happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gdfast.data.boxes import BoxSource, Record, Sample, letterbox
from gdfast.data.boxes.augment import Affine, Colour, Flip, Mixup, Mosaic, Turn, place
from gdfast.data.boxes.source import Augmentation, canvas_for, undo_letterbox
from gdfast.data.loader import Loader

RED, GREEN = (250, 20, 20), (20, 250, 20)
BLOCKS = np.array([[8, 4, 24, 20], [30, 22, 46, 38]], dtype=np.float32)


def blocks(height: int = 44, width: int = 60) -> Sample:
    """A red and a green block on black, each exactly in its box."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for (left, top, right, bottom), colour in zip(BLOCKS.astype(int), (RED, GREEN), strict=True):
        image[top:bottom, left:right] = colour
    return Sample(image, BLOCKS.copy(), np.array([0, 1]))


def measured(image: np.ndarray, channel: int) -> list[float]:
    """The box around what is red (0) or green (1)."""
    strong = (image[..., channel] > 120) & (image[..., 1 - channel] < 110) & (image[..., 2] < 110)
    rows, columns = strong.any(1).nonzero()[0], strong.any(0).nonzero()[0]
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def check_boxes(sample: Sample, within: float) -> None:
    height, width = sample.size
    assert sample.boxes.dtype == np.float32 and sample.classes.dtype == np.int64
    assert (sample.boxes >= 0).all() and (sample.boxes <= [width, height, width, height]).all()
    for box, label in zip(sample.boxes, sample.classes, strict=True):
        np.testing.assert_allclose(box, measured(sample.image, int(label)), atol=within)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("step", "within"),
    [(Flip(), 0), (Turn(), 0), (Affine((64, 96), shift=0.3), 1), (Colour(0.1, 0.1, 0.05), 0)],
    ids=lambda value: type(value).__name__,
)
def test_boxes_stay_on_their_blocks(step: object, within: float, seed: int) -> None:
    sample = step(blocks(), np.random.default_rng(seed))
    check_boxes(sample, within)


def test_every_turn_and_flip_occurs() -> None:
    seen = {
        step(blocks(), np.random.default_rng(seed)).boxes.tobytes()
        for step in (Flip(), Turn())
        for seed in range(30)
    }
    assert len(seen) == 5  # four turns, one of them none, and a mirror image


@pytest.mark.parametrize("seed", range(6))
def test_a_mosaic_shows_every_block_in_its_box(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = Mosaic((96, 128))([blocks() for _ in range(4)], rng)
    assert sample.size == (96, 128)
    height, width = sample.size
    assert (sample.boxes >= 0).all() and (sample.boxes <= [width, height, width, height]).all()
    assert len(sample.boxes) == len(sample.classes) >= 1
    for box, label in zip(sample.boxes.round().astype(int), sample.classes, strict=True):
        part = sample.image[box[1] + 1 : box[3] - 1, box[0] + 1 : box[2] - 1].reshape(-1, 3)
        assert (np.abs(part.astype(int) - (RED, GREEN)[label]) < 60).all(1).mean() > 0.9


def test_mixup_blends_and_keeps_both_lists() -> None:
    one, other = blocks(), Sample(np.full((44, 60, 3), 200, np.uint8), BLOCKS[:1], np.array([4]))
    sample = Mixup()((one, other), np.random.default_rng(0))
    assert sample.classes.tolist() == [0, 1, 4]
    share = 1 - sample.image[0, 0, 0] / 200
    assert 0.2 < share < 0.8
    assert sample.image[10, 12, 0] == pytest.approx(250 * share + 200 * (1 - share), abs=1)


def test_boxes_out_of_sight_go_and_cut_ones_are_clipped() -> None:
    sample = Sample(
        np.zeros((40, 40, 3), np.uint8),
        np.array([[0, 0, 10, 10], [15, 0, 25, 10], [18, 0, 38, 10], [30, 30, 40, 40]], np.float32),
        np.arange(4),
    )
    moved = place(sample, (40, 40), (1, 1), (-20, 0))
    # Of the second, half stays; of the third nine tenths; the first is gone.
    assert moved.classes.tolist() == [1, 2, 3]
    assert moved.boxes.tolist() == [[0, 0, 5, 10], [0, 0, 18, 10], [10, 30, 20, 40]]
    assert place(sample, (40, 40), (1, 1), (-23, 0)).classes.tolist() == [2, 3]


@pytest.mark.parametrize("size", [(44, 60), (60, 46), (100, 51)])
def test_letterboxing_can_be_undone(size: tuple[int, int]) -> None:
    sample = letterbox(blocks(*size), (64, 96))
    assert sample.size == (64, 96)
    check_boxes(sample, 1)
    np.testing.assert_allclose(undo_letterbox(sample.boxes, size, (64, 96)), BLOCKS, atol=1e-3)


def test_the_canvas_has_the_images_proportions() -> None:
    wide = [Record(Path(), (480, 640), *(np.zeros(0),) * 3)]
    assert canvas_for(wide, 320) == (256, 320)
    assert canvas_for(wide, 300) == (256, 320)
    assert canvas_for([Record(Path(), (640, 480), *(np.zeros(0),) * 3)], 416) == (416, 320)


def records(count: int = 6) -> list[Record]:
    nothing = np.zeros(2, dtype=bool)
    return [
        Record(Path(f"{at}"), (44, 60), BLOCKS, np.array([0, 1]), nothing,
               image=np.roll(blocks().image, 20 * at, axis=2))
        for at in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_can_be_had_again(workers: int) -> None:
    def batches(workers: int) -> list:
        how = Augmentation(flips="all", mosaic=0.5, mixup=0.5, closed=9)
        source = BoxSource(records(), (64, 64), how)
        return list(Loader(source, 4, seed=5, workers=workers).epoch(3))

    for one, other in zip(batches(0), batches(workers), strict=True):
        assert (one.images == other.images).all()
        for mine, theirs in zip(one.targets, other.targets, strict=True):
            assert (mine == theirs).all()


def test_the_last_epochs_show_one_image_at_a_time() -> None:
    source = BoxSource(records(), (64, 64), Augmentation(mosaic=1.0, closed=2))
    counts = [
        [len(source.item(0, epoch, np.random.default_rng(seed))[1].boxes) for seed in range(20)]
        for epoch in (1, 2)
    ]
    assert max(counts[0]) > 2 >= max(counts[1])


def test_ignored_boxes_are_not_trained_on() -> None:
    (record,) = records(1)
    marked = Record(record.path, record.size, record.boxes, record.classes, np.array([True, False]),
                    image=record.image)  # fmt: skip
    assert BoxSource([marked], (64, 64)).item(0, 0, np.random.default_rng(0))[1].classes == [1]


def test_a_batch_without_boxes() -> None:
    empty = Record(Path("x"), (44, 60), np.zeros((0, 4), np.float32), np.zeros(0, np.int64),
                   np.zeros(0, bool), image=blocks().image)  # fmt: skip
    source = BoxSource([empty] * 4, (64, 64), Augmentation(mosaic=0.5, mixup=0.9, closed=1))
    (batch,) = Loader(source, 4, seed=0).epoch()
    boxes, classes, indices = batch.targets
    assert boxes.shape == (4, 0, 4) and classes.shape == (4, 0) and len(indices) == 4
    assert (
        batch.images.shape == (4, 3, 64, 64) and 0 <= batch.images.min() <= batch.images.max() <= 1
    )
