"""Losses of boxes: values by hand, gradients by finite differences, and which cells answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gdfast.losses import YoloLoss, ciou, iou
from gdfast.losses.yolo import assign
from gdfast.models.yolo_head import decode


def maps(
    images: int = 2, classes: int = 3, sizes: tuple[int, ...] = (6, 3), scale: float = 0.3
) -> list[Tensor]:
    return [scale * torch.randn(images, 5 + classes, n, n + 1, dtype=torch.float64) for n in sizes]


def targets() -> tuple[Tensor, Tensor]:
    boxes = torch.tensor(
        [[[4.0, 3, 30, 22], [20, 18, 50, 45], [0, 0, 0, 0]], [[1, 30, 17, 47], *[[0.0] * 4] * 2]]
    )
    return boxes, torch.tensor([[0, 2, -1], [1, -1, -1]])


def test_iou_by_hand() -> None:
    box = torch.tensor([0.0, 0, 4, 2])
    others = torch.tensor([[0.0, 0, 4, 2], [2, 0, 6, 2], [5, 5, 6, 6], [4, 2, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(iou(box, others), torch.tensor([1, 4 / 12, 0, 0, 0]))


def test_ciou_by_hand() -> None:
    box = torch.tensor([0.0, 0, 4, 2], dtype=torch.float64)
    assert ciou(box, box).item() == pytest.approx(1)
    other = torch.tensor([2.0, 0, 4, 4], dtype=torch.float64)
    overlap = 4 / (8 + 8 - 4)
    v = 4 / math.pi**2 * (math.atan(2 / 4) - math.atan(4 / 2)) ** 2
    expected = overlap - (1 + 1) / (16 + 16) - v**2 / (1 - overlap + v)
    assert ciou(box, other).item() == pytest.approx(expected, rel=1e-6)
    apart = torch.tensor([6.0, 0, 10, 2], dtype=torch.float64)
    assert ciou(box, apart).item() == pytest.approx(-36 / 104)


def test_ciou_s_gradient() -> None:
    corner = torch.rand(12, 2, dtype=torch.float64) * 10
    boxes = torch.cat((corner, corner + 1 + 8 * torch.rand(12, 2, dtype=torch.float64)), 1)
    others = boxes.roll(1, 0).clone()
    boxes.requires_grad_()
    assert torch.autograd.gradcheck(ciou, (boxes, others))


@pytest.mark.parametrize(
    "box", [[3.0, 3, 3, 3], [3, 3, 3, 9], [9, 9, 1, 1], [0, 0, 1e6, 1e-6], [-1e5, -1e5, 1e5, 1e5]]
)
@pytest.mark.parametrize("target", [[3.0, 3, 3, 3], [2, 2, 8, 8]])
def test_degenerate_boxes_stay_finite(box: list[float], target: list[float]) -> None:
    boxes = torch.tensor(box, dtype=torch.float32, requires_grad=True)
    value = ciou(boxes, torch.tensor(target))
    value.backward()
    assert value.isfinite() and -3 < value <= 1
    assert boxes.grad is not None and boxes.grad.isfinite().all()


def test_apart_boxes_are_drawn_together() -> None:
    boxes = torch.tensor([0.0, 0, 2, 2], requires_grad=True)
    ciou(boxes, torch.tensor([10.0, 0, 12, 2])).backward()
    assert boxes.grad is not None and boxes.grad[0] + boxes.grad[2] > 0


def test_the_loss_s_gradient() -> None:
    boxes, classes = targets()
    loss = YoloLoss((8, 16), label_smoothing=0.1)
    given = maps()
    # The cells are chosen by what the maps say; the same ones for every finite difference.
    chosen = assign(decode(given, (8, 16)), boxes.double(), classes)

    def total(*levels: Tensor) -> Tensor:
        predictions = decode(levels, (8, 16))
        return torch.stack(
            list(loss._parts(predictions, boxes.double(), classes, chosen).values())
        ).sum()

    inputs = [level.requires_grad_() for level in given]
    assert torch.autograd.gradcheck(total, inputs)
    for level in inputs:
        level.grad = None
    sum(loss(inputs, boxes, classes)[name] / loss.weights[name] for name in loss.weights).backward()
    expected = torch.autograd.grad(total(*inputs), inputs)
    for level, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(level.grad, gradient)


def test_the_parts_make_the_loss() -> None:
    boxes, classes = targets()
    parts = YoloLoss((8, 16))(maps(), boxes, classes)
    assert set(parts) == {"loss", "box", "confidence", "class"}
    rest = [value for name, value in parts.items() if name != "loss"]
    torch.testing.assert_close(parts["loss"], torch.stack(rest).sum())
    assert all(value > 0 for value in rest)


@pytest.mark.parametrize("rows", [0, 3])
def test_images_without_boxes_teach_confidence_alone(rows: int) -> None:
    given = [level.requires_grad_() for level in maps()]
    parts = YoloLoss((8, 16))(
        given, torch.zeros(2, rows, 4), torch.full((2, rows), -1, dtype=torch.int64)
    )
    assert parts["box"] == 0 and parts["class"] == 0 and parts["confidence"] > 0
    parts["loss"].backward()
    for level in given:
        assert level.grad is not None
        assert (level.grad[:, 4] > 0).all() and (level.grad[:, [0, 1, 2, 3, 5, 6, 7]] == 0).all()


def test_half_types_and_autocast_compute_in_float32() -> None:
    boxes, classes = targets()
    given = [level.bfloat16() for level in maps()]
    expected = YoloLoss((8, 16))([level.float() for level in given], boxes, classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = YoloLoss((8, 16))(given, boxes, classes)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value)


def test_filling_rows_change_nothing() -> None:
    boxes, classes = targets()
    given = maps()
    more = torch.cat((boxes, torch.full((2, 4, 4), 9.0)), 1)
    filled = torch.cat((classes, torch.full((2, 4), -1)), 1)
    one, other = YoloLoss((8, 16))(given, boxes, classes), YoloLoss((8, 16))(given, more, filled)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0)


def test_only_cells_within_a_box_answer_for_it() -> None:
    boxes, classes = targets()
    predictions = decode(maps(), (8, 16))
    assigned = assign(predictions, boxes.double(), classes)
    for image, cell in assigned.chosen.nonzero().tolist():
        left, top, right, bottom = boxes[image, assigned.box[image, cell]].tolist()
        x, y = predictions.centres[cell].tolist()
        assert left < x < right and top < y < bottom
        assert classes[image, assigned.box[image, cell]] >= 0
    answered = {
        (image, int(assigned.box[image, cell]))
        for image, cell in assigned.chosen.nonzero().tolist()
    }
    assert answered == {(0, 0), (0, 1), (1, 0)}
    assert (assigned.quality[~assigned.chosen] == 0).all() and assigned.quality.max() <= 1


def test_a_box_between_all_centres_gets_the_nearest_cell() -> None:
    boxes = torch.tensor([[[21.0, 13, 23, 15]]])
    predictions = decode(maps(1), (8, 16))
    assigned = assign(predictions, boxes.double(), torch.zeros(1, 1, dtype=torch.int64))
    (cell,) = assigned.chosen[0].nonzero().flatten().tolist()
    assert predictions.centres[cell].tolist() == [20, 12] and predictions.strides[cell] == 8


def test_a_contested_cell_goes_to_the_box_that_it_covers_best() -> None:
    # One level whose cells all predict boxes of 16 x 16 around their centres.
    level = torch.zeros(1, 6, 4, 4, dtype=torch.float64)
    predictions = decode([level], (8,))
    boxes = torch.tensor([[[0.0, 0, 32, 32], [4, 4, 20, 20]]]).double()
    assigned = assign(predictions, boxes, torch.zeros(1, 2, dtype=torch.int64))
    middle = 4 + 1  # its box is 4, 4, 20, 20
    assert assigned.box[0, middle] == 1 and assigned.quality[0, middle] == pytest.approx(1)


def test_the_best_cell_is_asked_for_its_iou() -> None:
    predictions = decode(maps(), (8, 16))
    boxes, classes = targets()
    assigned = assign(predictions, boxes.double(), classes)
    for image, box in ((0, 0), (0, 1), (1, 0)):
        mine = assigned.chosen[image] & (assigned.box[image] == box)
        overlaps = iou(predictions.boxes[image, mine], boxes[image, box].double())
        torch.testing.assert_close(assigned.quality[image, mine].max(), overlaps.max())
