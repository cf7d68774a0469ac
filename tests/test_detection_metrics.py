"""Mean average precision against values found by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gdfast.metrics import Found, Truth, detection

pytest.importorskip("pycocotools", reason="needs pycocotools")

BOX = [10.0, 10, 50, 50]


def truth(*rows: tuple[list[float], int], ignored: tuple[int, ...] = ()) -> Truth:
    boxes = np.array([box for box, _ in rows], dtype=np.float32).reshape(-1, 4)
    labels = np.array([label for _, label in rows], dtype=np.int64)
    return Truth(boxes, labels, np.isin(np.arange(len(rows)), ignored))


def found(*rows: tuple[list[float], float, int]) -> Found:
    return Found(
        np.array([box for box, *_ in rows], dtype=np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in rows]),
        np.array([label for *_, label in rows], dtype=np.int64),
    )


def test_perfect_boxes() -> None:
    score = detection([truth((BOX, 0), ([60.0, 60, 90, 90], 1))],
                      [found((BOX, 0.9, 0), ([60.0, 60, 90, 90], 0.8, 1))], 2)  # fmt: skip
    assert score.map50 == pytest.approx(1) and score.map == pytest.approx(1)
    assert score.precision.shape == (2, 101)


def test_a_wide_box_counts_up_to_its_iou() -> None:
    # 40 x 50 around 40 x 40: IoU 0.8, good for 0.5 to 0.75, six of ten thresholds, and for 0.8.
    score = detection([truth((BOX, 0))], [found(([10.0, 10, 50, 59], 0.9, 0))], 1)
    assert score.map50 == pytest.approx(1) and score.map == pytest.approx(0.7)


def test_a_wrong_box_ahead_halves_the_precision() -> None:
    score = detection([truth((BOX, 0))], [found(([70.0, 70, 90, 90], 0.9, 0), (BOX, 0.5, 0))], 1)
    assert score.map50 == pytest.approx(0.5)


def test_a_missed_box_bounds_the_recall() -> None:
    score = detection([truth((BOX, 0), ([60.0, 60, 90, 90], 0))], [found((BOX, 0.9, 0))], 1)
    assert score.map50 == pytest.approx(51 / 101)
    np.testing.assert_allclose(score.precision[0], [1.0] * 51 + [0.0] * 50)


def test_a_box_of_another_class_or_image_is_wrong() -> None:
    score = detection([truth((BOX, 0)), truth((BOX, 1))], [found((BOX, 0.9, 1)), found()], 2)
    assert score.map50 == 0 and score.map == 0


def test_classes_without_a_box_do_not_count() -> None:
    score = detection([truth((BOX, 1))], [found((BOX, 0.9, 1), (BOX, 0.9, 0))], 3)
    assert score.map50 == pytest.approx(1)
    assert np.isnan(score.ap50[[0, 2]]).all() and score.ap50[1] == pytest.approx(1)


def test_ignored_boxes_are_neither_right_nor_wrong() -> None:
    hidden = [60.0, 60, 90, 90]
    shown = truth((BOX, 0), (hidden, 0), ignored=(1,))
    for boxes in ([(BOX, 0.5, 0)], [(hidden, 0.9, 0), (BOX, 0.5, 0)]):
        assert detection([shown], [found(*boxes)], 1).map50 == pytest.approx(1)


def test_an_ignored_box_excuses_one_detection_that_fits_it_and_a_crowd_all_within() -> None:
    hidden = [60.0, 60, 100, 100]
    inside = ([60.0, 60, 78, 78], 0.9, 0), ([80.0, 80, 98, 98], 0.8, 0)  # IoU 0.2
    hit = (BOX, 0.5, 0)
    alone = detection([truth((BOX, 0))], [found(*inside, hit)], 1)
    shown = truth((BOX, 0), (hidden, 0), ignored=(1,))
    assert detection([shown], [found(*inside, hit)], 1).map50 == alone.map50 < 0.4
    twice = found((hidden, 0.9, 0), (hidden, 0.8, 0), hit)
    assert detection([shown], [twice], 1).map50 == pytest.approx(0.5)
    crowd = replace(shown, crowds=shown.ignored)
    for each in (found(*inside, hit), twice):
        assert detection([crowd], [each], 1).map50 == pytest.approx(1)


@pytest.mark.parametrize("shown", [truth((BOX, 0)), truth()])
def test_nothing_found_or_nothing_shown(shown: Truth, capsys: pytest.CaptureFixture[str]) -> None:
    for boxes in (found(), found((BOX, 0.3, 0))):
        score = detection([shown], [boxes], 2)
        expected = float(bool(len(shown.boxes) and len(boxes.boxes)))
        assert score.map50 == pytest.approx(expected) and np.isfinite(score.map)
    assert capsys.readouterr().out == ""


def test_unlike_lists() -> None:
    with pytest.raises(ValueError, match="expected what was found in each of 1 images, got 2"):
        detection([truth((BOX, 0))], [found(), found()], 1)
