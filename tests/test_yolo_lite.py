"""YOLO-lite's detector: its maps, what they mean, and that it can be trained."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import gdfast
from gdfast import models
from gdfast.losses import YoloLoss
from gdfast.models.yolo_head import decode


@pytest.mark.parametrize("strides", [(8, 16, 32), (16, 32), (8, 16), (8,), (16,), (32,)])
def test_one_map_for_each_stride(strides: tuple[int, ...]) -> None:
    model = models.create("yolo_lite", num_classes=4, in_channels=1, strides=strides)
    assert sum(p.numel() for p in model.parameters()) < 5e6
    maps = model(torch.rand(2, 1, 96, 64))
    assert [tuple(each.shape) for each in maps] == [(2, 9, 96 // s, 64 // s) for s in strides]


def test_any_size_of_image() -> None:
    maps = models.create("yolo_lite", num_classes=1)(torch.rand(1, 3, 75, 130))
    assert [tuple(each.shape[2:]) for each in maps] == [
        (math.ceil(75 / s), math.ceil(130 / s)) for s in (8, 16, 32)
    ]


@pytest.mark.parametrize("strides", [(), (4, 8), (16, 8), (8, 8), (8, 24)])
def test_other_strides_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="yolo_lite: strides: expected some of"):
        models.create("yolo_lite", num_classes=1, strides=strides)


def test_cells_start_unsure_and_of_a_few_cells_width() -> None:
    model = models.create("yolo_lite", num_classes=3).eval()
    predictions = decode(model(torch.rand(1, 3, 96, 96)), model.strides)
    confidence = predictions.confidence.sigmoid()
    assert confidence.mean().item() == pytest.approx(0.01, rel=0.3)
    width = (predictions.boxes[..., 2] - predictions.boxes[..., 0]) / predictions.strides
    assert width.mean().item() == pytest.approx(4, rel=0.2)


def test_decoding_by_hand() -> None:
    fine, coarse = torch.zeros(1, 7, 2, 3), torch.zeros(1, 7, 1, 2)
    fine[0, :4, 1, 2] = torch.tensor([1.0, 2, 3, 4]).log()
    fine[0, 4:, 1, 2] = torch.tensor([0.5, -1, 2])
    coarse[0, :4, 0, 1] = torch.tensor([100.0, -100, 0, 0])
    predictions = decode([fine, coarse], (8, 16))
    assert predictions.centres.tolist() == [
        [4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]
    ]  # fmt: skip
    assert predictions.strides.tolist() == [8.0] * 6 + [16.0] * 2
    torch.testing.assert_close(
        predictions.boxes[0, 5], torch.tensor([20.0 - 8, 12 - 16, 20 + 24, 12 + 32])
    )
    assert predictions.boxes[0, 7, 2:].tolist() == [40, 24] and predictions.boxes.isfinite().all()
    expected = torch.tensor([0.5]).sigmoid() * torch.tensor([-1.0, 2]).sigmoid()
    torch.testing.assert_close(predictions.scores()[0, 5], expected)


def test_a_restored_detector_is_plain_pytorch_and_computes_the_same() -> None:
    ours = models.create("yolo_lite", num_classes=2, strides=(16, 32)).double()
    plain = copy.deepcopy(ours)
    gdfast.restore_(plain)
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(images), plain.train(mode)(images))


def test_it_learns_two_images_by_heart() -> None:
    torch.manual_seed(1)
    model = models.create("yolo_lite", num_classes=2, strides=(8, 16))
    loss = YoloLoss((8, 16))
    images = torch.rand(2, 3, 64, 64)
    boxes = torch.tensor([[[10.0, 8, 34, 30]], [[30, 36, 62, 60]]])
    classes = torch.tensor([[0], [1]])
    for image, (left, top, right, bottom) in zip(images, boxes[:, 0].int().tolist(), strict=True):
        image[:, top:bottom, left:right] *= 0.2
    optimizer = gdfast.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for _ in range(150):  # at this rate any seed gets there, whatever way a machine rounds
        optimizer.zero_grad()
        loss(model(images), boxes, classes)["loss"].backward()
        optimizer.step()
    predictions = decode(model(images), (8, 16))
    for image, label in enumerate((0, 1)):
        scores = predictions.scores()[image]
        best = scores[:, label].argmax()
        assert scores[best, label] > 0.5 and scores[:, 1 - label].max() < 0.2
        torch.testing.assert_close(predictions.boxes[image, best], boxes[image, 0], atol=8, rtol=0)
