"""The table of shapes: facts that can be known without it."""

from collections import Counter
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdfast import models
from gdfast.bench import cases

EVERY_LAYER = [case for table in cases.LAYERS.values() for case in table]


@pytest.mark.parametrize("case", [*cases.ODD, *EVERY_LAYER], ids=str)
def test_output_size_is_native_s(case):
    input, weight = (
        torch.empty(shape, device="meta") for shape in (case.input_shape, case.weight_shape)
    )
    assert tuple(F.conv2d(input, weight, **case.geometry).shape) == case.output_shape


def test_names_are_distinct():
    for table in (cases.ODD, *cases.LAYERS.values(), cases.SGD_CASES, cases.STEPS):
        names = [case.name for case in table]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "holds",
    [
        lambda c: c.N == 0,
        lambda c: c.N == 1,
        lambda c: c.N == 33,
        lambda c: c.stride == (2, 1),
        lambda c: (c.R, c.S) == (3, 2),
        lambda c: c.padding == (1, 0),
        lambda c: c.dilation == (2, 1),
        lambda c: c.groups == 2,
        lambda c: c.groups == c.C == c.K > 1,
        lambda c: c.groups == c.C > 1 and c.K == 2 * c.C,
        lambda c: c.C == 1,
        lambda c: c.padding[0] >= c.R and c.padding[1] >= c.S,
        lambda c: c.dilation[0] > c.H,
        lambda c: (c.R, c.S) == (c.H, c.W) and (c.P, c.Q) == (1, 1),
        lambda c: c.stride[0] > c.R and c.stride[1] > c.S,  # pixels that nothing reads
        lambda c: c.W == 1 and c.H > 1,
        lambda c: c.H == 1 and c.W > 1,
        lambda c: c.stride[0] != c.stride[1] and c.padding[0] != c.padding[1] and c.R != c.S
        and c.dilation[0] != c.dilation[1] and c.H != c.W and c.groups > 1,
    ],
)  # fmt: skip
def test_odd_cases_cover_the_edges(holds):
    assert any(holds(case) for case in cases.ODD)


def test_odd_cases_are_small():
    assert sum(case.flops for case in cases.ODD) < 20e6


# Multiply-adds of one 224 x 224 image as published for the whole models, the classifier included.
@pytest.mark.parametrize(
    ("model", "layers", "features", "published"),
    [("resnet18", 20, 512, 1.81e9), ("resnet50", 53, 2048, 4.09e9)],
)
def test_resnet_layers_make_the_published_model(model, layers, features, published):
    table = cases.LAYERS[model]
    assert sum(case.count for case in table) == layers
    multiply_adds = sum(case.count * case.with_batch(1).flops for case in table) / 2
    assert multiply_adds + features * 1000 == pytest.approx(published, rel=0.003)


@pytest.mark.parametrize(
    ("table", "step"),
    [
        ("simple_cnn", "cnn"),
        ("resnet20", "resnet20"),
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("yolo", "yolo_lite_backbone"),
        ("mobilenet", "mobilenet_v2"),
    ],
)
def test_layers_are_those_of_the_model(table, step):
    case = next(case for case in cases.STEPS if case.model == step)
    with torch.device("meta"):
        model = models.create(step, **case.options)
    found = Counter()

    def count(layer, inputs, output):
        (input,) = inputs
        found[tuple(input.shape), tuple(layer.weight.shape), layer.stride, layer.padding] += 1
        assert layer.dilation == (1, 1) and layer.groups * layer.weight.shape[1] == input.shape[1]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(case.N, case.C, case.H, case.W, device="meta"))
    expected = {(c.input_shape, c.weight_shape, c.stride, c.padding): c.count
                for c in cases.LAYERS[table]}  # fmt: skip
    assert found == expected


def test_resnet50_strides_on_the_3x3():
    assert not [c for c in cases.RESNET50 if c.R == 1 and c.stride != (1, 1) and c.K < c.C]
    assert len([c for c in cases.RESNET50 if c.R == 3 and c.stride == (2, 2)]) == 3


def test_layers_follow_one_another():
    for case in cases.YOLO_LITE:
        assert case.C == 3 or any(before.K == case.C and before.P == case.H
                                  for before in cases.YOLO_LITE)  # fmt: skip


def test_sgd_sizes():
    counts = [case.parameters for case in cases.SGD_CASES]
    assert min(counts) == 10_000 and max(counts) == 25_557_032  # ResNet-50's published count
    assert {len(case.sizes) for case in cases.SGD_CASES} == {1, 161}
    assert all(min(case.sizes) >= 1 for case in cases.SGD_CASES)


def test_flops_are_those_of_the_arithmetic():
    case = cases.Conv2dCase("", 2, 6, 7, 9, 4, 3, 2, (2, 1), (1, 0), (2, 1), groups=2)
    assert case.output_shape == (2, 4, 3, 8)
    assert case.flops == 2 * (2 * 4 * 3 * 8) * (3 * 3 * 2)
    elements = 2 * 6 * 7 * 9 + 4 * 3 * 3 * 2 + prod(case.output_shape)
    assert case.bytes == 4 * elements


def test_simple_cnn_s_layer_is_the_model_s():
    (case,) = cases.SIMPLE_CNN
    layer = nn.Conv2d(1, 32, 3)
    assert tuple(layer.weight.shape) == case.weight_shape
    assert case.output_shape == (64, 32, 26, 26)
