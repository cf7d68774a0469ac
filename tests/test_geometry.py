"""Output sizes, padding, layouts and argument checks, against native PyTorch's own."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.errors import mismatch
from gdfast.geometry import (
    Conv2dGeometry,
    conv2d_is_channels_last,
    dense_strides,
    integer,
    is_channels_last,
    named_padding,
    pair,
)


def geometry_of(case: Conv2dCase) -> Conv2dGeometry:
    return Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2,
        case.dilation, case.groups,
    )  # fmt: skip


@pytest.mark.parametrize("case", ODD, ids=str)
def test_output_size_is_native_s(case: Conv2dCase) -> None:
    native = F.conv2d(
        torch.empty(case.input_shape, device="meta"),
        torch.empty(case.weight_shape, device="meta"),
        **case.geometry,
    )
    geometry = geometry_of(case)
    assert geometry.output_size == tuple(native.shape)
    assert geometry.input_size == case.input_shape
    assert geometry.weight_size == case.weight_shape
    assert geometry.flops == case.flops


def test_padding_on_one_side_only() -> None:
    geometry = Conv2dGeometry.of(
        "conv2d", (1, 2, 9, 8), (3, 2, 4, 2), (2, 3), (0, 2, 1, 0), (2, 1), 1
    )
    padded = F.pad(torch.empty(1, 2, 9, 8, device="meta"), (2, 0, 0, 1))
    weight = torch.empty(3, 2, 4, 2, device="meta")
    native = F.conv2d(padded, weight, stride=(2, 3), dilation=(2, 1))
    assert geometry.output_size == tuple(native.shape)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 1), (5, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3, 4)])
def test_same_padding_keeps_the_size(kernel: tuple[int, int], dilation: tuple[int, int]) -> None:
    sides = named_padding("same", kernel, (1, 1), dilation)
    geometry = Conv2dGeometry.of(
        "conv2d", (1, 1, 9, 7), (1, 1, *kernel), (1, 1), sides, dilation, 1
    )
    assert geometry.output_size[2:] == (9, 7)
    top, left, below, right = sides
    assert 0 <= below - top <= 1
    assert 0 <= right - left <= 1


def test_what_same_padding_refuses() -> None:
    for name, kernel, stride in (
        ("full", (3, 3), (1, 1)),
        ("same", (3,), (1, 1)),
        ("same", (3, 3), (1, 2)),
    ):
        with pytest.raises(RuntimeError, match=r"conv2d: (padding|weight): expected "):
            named_padding(name, kernel, stride, (1, 1))


def test_valid_padding_is_none() -> None:
    assert named_padding("valid", (3, 3), (2, 2), (1, 1)) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, (2, 2)),
        ((2, 3), (2, 3)),
        ([2, 3], (2, 3)),
        ((4,), (4, 4)),
        (np.int64(5), (5, 5)),
        ((np.int32(1), 2), (1, 2)),
        (torch.tensor(3), (3, 3)),
        (torch.Size([3, 4]), (3, 4)),
    ],
)
def test_pairs(value: Any, expected: tuple[int, int]) -> None:
    assert pair("stride", value) == expected


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1.0, TypeError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
        ((1.0, 1.0), TypeError),
        ((1, None), TypeError),
        ((), RuntimeError),
        ((1, 2, 3), RuntimeError),
    ],
)
def test_what_is_no_pair(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"conv2d: stride: expected .* got "):
        pair("stride", value)


def test_groups_are_one_number() -> None:
    assert integer("groups", np.int64(2)) == 2
    for value in (1.0, (1,), True):
        with pytest.raises(TypeError, match="conv2d: groups: expected an int"):
            integer("groups", value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((4, 6, 5), (6, 4, 3, 2), (1, 1), (0,) * 4, (1, 1), 1), "input: expected"),
        (((2, 4, 6, 5), (4, 3, 2), (1, 1), (0,) * 4, (1, 1), 1), "weight: expected"),
        (((2, 4, 6, 5), (6, 4, 3, 2), (0, 1), (0,) * 4, (1, 1), 1), "stride: expected at least 1"),
        (((2, 4, 6, 5), (6, 4, 3, 2), (1, -2), (0,) * 4, (1, 1), 1), "stride: expected at least 1"),
        (
            ((2, 4, 6, 5), (6, 4, 3, 2), (1, 1), (0, -1, 0, 0), (1, 1), 1),
            "padding: expected at least",
        ),
        (
            ((2, 4, 6, 5), (6, 4, 3, 2), (1, 1), (0,) * 4, (1, 0), 1),
            "dilation: expected at least 1",
        ),
        (((2, 4, 6, 5), (6, 4, 3, 2), (1, 1), (0,) * 4, (1, 1), 0), "groups: expected at least 1"),
        (((2, 4, 6, 5), (6, 5, 3, 2), (1, 1), (0,) * 4, (1, 1), 1), "input: expected 5 channels"),
        (((2, 4, 6, 5), (6, 1, 3, 2), (1, 1), (0,) * 4, (1, 1), 4), "weight: expected a multiple"),
        (((2, 4, 6, 5), (0, 4, 3, 2), (1, 1), (0,) * 4, (1, 1), 1), "weight: expected a multiple"),
        (((2, 4, 6, 5), (6, 4, 0, 2), (1, 1), (0,) * 4, (1, 1), 1), "weight: expected a kernel"),
        (
            ((2, 4, 2, 5), (6, 4, 3, 2), (1, 1), (0,) * 4, (1, 1), 1),
            "padded image of at least 3 x 2",
        ),
        (
            ((0, 4, 2, 5), (6, 4, 3, 2), (1, 1), (0,) * 4, (1, 1), 1),
            "padded image of at least 3 x 2",
        ),
        (
            ((2, 4, 0, 5), (6, 4, 3, 2), (1, 1), (3,) * 4, (1, 1), 1),
            "input: expected at least one row",
        ),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match="conv2d: ") as error:
        Conv2dGeometry.of("conv2d", *arguments)
    assert words in str(error.value)


def test_error_words() -> None:
    assert mismatch("op", "x", "an int", 1.5) == "op: x: expected an int, got 1.5"
    assert mismatch("op", "x", "an int", 1.5, "Round it") == (
        "op: x: expected an int, got 1.5. Round it."
    )


SIZES = list(itertools.product((1, 2), (1, 3), (1, 4), (1, 5)))


@pytest.mark.parametrize(
    ("size", "channels_last"),
    [*itertools.product(SIZES, (False, True)), ((0, 3, 4, 5), False), ((2, 0, 4, 5), False)],
)
def test_dense_strides_are_those_of_torch_empty(size: Any, channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    native = torch.empty(size, memory_format=memory_format).stride()
    assert dense_strides(size, channels_last) == native


def test_channels_last_is_what_native_takes_for_it() -> None:
    # F.conv2d's output tells what native made of the input's strides: 4 channels, so that the
    # output itself is never ambiguous.
    generator = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(400):
        size = tuple(generator.choice((1, 1, 2, 3)) for _ in range(4))
        order = generator.choice(([0, 2, 3, 1], generator.sample(range(4), 4)))
        base = torch.zeros([size[axis] for axis in order]).permute(
            [order.index(axis) for axis in range(4)]
        )
        slices = [slice(None, None, generator.choice((1, 1, 1, 2))) for _ in range(4)]
        input = base[tuple(slices)]
        if input.shape[1:] == (1, 1, 1):
            continue  # native's own functions do not agree on a slice of N x 1 x 1 x 1
        weight = torch.zeros(4, input.shape[1], 2, 2)
        native = F.conv2d(input, weight, padding=2)
        ours = is_channels_last(input.shape, input.stride())
        assert ours == native.is_contiguous(memory_format=torch.channels_last), input.stride()
        both = (input.shape, input.stride(), weight.shape, weight.stride())
        assert conv2d_is_channels_last(*both) == ours
        seen[ours] += 1
    assert min(seen.values()) > 50
