"""Winograd's algorithm: within the error that it states, chosen where it pays, and switched off."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import gdfast
from gdfast import native, ops
from gdfast.backends import cpu_algorithms
from gdfast.bench.cases import Conv2dCase
from gdfast.geometry import Conv2dGeometry
from gdfast.ops import conv2d_dispatch

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("nan_filled_memory", "threads")]

STATED_ERROR = cpu_algorithms.STATED_ERROR["winograd"]
STRIDE2_STATED_ERROR = cpu_algorithms.STRIDE2_STATED_ERROR

CASES = (
    Conv2dCase("one-tile", 1, 8, 4, 4, 8, 3, 3, padding=(1, 1)),
    Conv2dCase("less-than-a-tile", 2, 9, 3, 2, 11, 3, 3, padding=(1, 1)),
    Conv2dCase("few-channels", 2, 3, 9, 10, 4, 3, 3, padding=(1, 1)),
    Conv2dCase("no-padding", 3, 16, 9, 14, 32, 3, 3),
    Conv2dCase("padding-0-2", 3, 17, 13, 9, 37, 3, 3, padding=(0, 2)),
    Conv2dCase("padding-2-1", 1, 33, 10, 35, 65, 3, 3, padding=(2, 1)),
    Conv2dCase("groups", 2, 32, 9, 9, 64, 3, 3, padding=(1, 1), groups=2),
    Conv2dCase("odd-channels", 5, 70, 7, 30, 130, 3, 3, padding=(1, 1)),
    Conv2dCase("many-tiles", 8, 24, 45, 47, 20, 3, 3, padding=(1, 1)),
    Conv2dCase("many-tiles-of-few-channels", 5, 16, 45, 46, 13, 3, 3, padding=(1, 1)),
    Conv2dCase("many-channels", 3, 260, 14, 14, 200, 3, 3, padding=(1, 1)),
    Conv2dCase("many-channels-of-few-tiles", 2, 264, 7, 7, 136, 3, 3, padding=(1, 1)),
    Conv2dCase("many-channels-of-odd-tiles", 3, 192, 7, 7, 192, 3, 3, padding=(1, 1)),
    Conv2dCase("many-channels-of-a-row", 1, 192, 7, 10, 168, 3, 3, padding=(1, 1)),
    Conv2dCase("more-channels", 1, 512, 7, 7, 512, 3, 3, padding=(1, 1)),
)
STRIDE2_CASES = (
    Conv2dCase("stride2-one-tile", 1, 8, 6, 6, 8, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("stride2-less-than-a-tile", 2, 9, 3, 2, 11, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("stride2-one-output", 1, 40, 1, 2, 24, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("stride2-few-channels", 2, 3, 9, 10, 4, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("stride2-no-padding", 3, 16, 10, 15, 32, 3, 3, (2, 2)),
    Conv2dCase("stride2-padding-0-2", 3, 17, 14, 9, 37, 3, 3, (2, 2), (0, 2)),
    Conv2dCase("stride2-padding-2-1", 1, 33, 10, 35, 65, 3, 3, (2, 2), (2, 1)),
    Conv2dCase("stride2-groups", 2, 32, 9, 9, 64, 3, 3, (2, 2), (1, 1), groups=2),
    Conv2dCase("stride2-odd-channels", 5, 70, 7, 30, 130, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("stride2-many-tiles", 8, 24, 65, 67, 20, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("stride2-many-channels", 3, 264, 14, 14, 200, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("stride2-more-channels", 1, 256, 14, 13, 512, 3, 3, (2, 2), (1, 1)),
)
ALL_CASES = CASES + STRIDE2_CASES
LAYOUTS = ("contiguous", "channels_last", "mixed", "sliced")


def lay_out(tensor: Tensor, layout: str, is_weight: bool = False) -> Tensor:
    if layout == "channels_last" or (layout == "mixed" and not is_weight):
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = tensor.shape
        whole = torch.full((n, c + 1, h + 2, 2 * w + 1), math.nan, dtype=tensor.dtype)
        return whole[:, 1:, 1 : h + 1, 1::2].copy_(tensor)
    return tensor


def passes(case: Conv2dCase, algorithm: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The three passes by one algorithm, whatever the cost model would choose."""
    input, weight, bias, grad_output = tensors
    output = torch.empty_like(grad_output, memory_format=torch.preserve_format)
    grad_input, grad_weight, grad_bias = map(torch.empty_like, (input, weight, bias))
    sizes = (*case.input_shape, case.K, case.R, case.S, case.P, case.Q)
    dtype = str(input.dtype).removeprefix("torch.")

    def problem(*strides_of: Tensor) -> Any:
        return native.cpu.Conv2dProblem(
            sizes, case.stride, case.padding, case.dilation, case.groups, dtype,
            *(tensor.stride() for tensor in strides_of), algorithm,
        )  # fmt: skip

    threads = torch.get_num_threads()
    native.cpu.conv2d(
        problem(input, weight, output), input.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        output.data_ptr(), threads,
    )  # fmt: skip
    native.cpu.conv2d_grad_input(
        problem(grad_input, weight, grad_output), grad_output.data_ptr(), weight.data_ptr(),
        grad_input.data_ptr(), threads,
    )  # fmt: skip
    native.cpu.conv2d_grad_weight(
        problem(input, grad_weight, grad_output), grad_output.data_ptr(), input.data_ptr(),
        grad_weight.data_ptr(), grad_bias.data_ptr(), threads,
    )  # fmt: skip
    return {
        "output": output, "grad_input": grad_input, "grad_weight": grad_weight,
        "grad_bias": grad_bias,
    }  # fmt: skip


def exact_passes(case: Conv2dCase, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    input, weight, bias, grad_output = (tensor.double() for tensor in tensors)
    geometry = case.stride, case.padding, case.dilation, False, (0, 0), case.groups
    output = torch.ops.aten.convolution(input, weight, bias, *geometry)
    grads = torch.ops.aten.convolution_backward(
        grad_output, input, weight, [case.K], *geometry, [True] * 3
    )
    return dict(
        zip(("output", "grad_input", "grad_weight", "grad_bias"), (output, *grads), strict=True)
    )


def stated_error(case: Conv2dCase) -> float:
    return STRIDE2_STATED_ERROR if case.stride == (2, 2) else STATED_ERROR


def random_tensors(case: Conv2dCase) -> tuple[Tensor, ...]:
    shapes = case.input_shape, case.weight_shape, (case.K,), case.output_shape
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_stated_error_holds(case: Conv2dCase, layout: str, isa: str) -> None:
    tensors = random_tensors(case)
    exact = exact_passes(case, tensors)
    input, weight, bias, grad_output = tensors
    laid_out = (
        lay_out(input, layout), lay_out(weight, layout, is_weight=True), bias,
        lay_out(grad_output, layout),
    )  # fmt: skip
    direct = passes(case, "direct", laid_out)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results = passes(case, "winograd", laid_out)
        for name, tensor in results.items():
            error = ((tensor - exact[name]).norm() / exact[name].norm()).item()
            # The bias's gradient is a plain sum, whatever the stride.
            assert error <= (STATED_ERROR if name == "grad_bias" else stated_error(case)), name
        # It is Winograd that ran: the direct algorithm rounds otherwise.
        assert not torch.equal(results["output"], direct["output"])


@pytest.mark.parametrize("stride", [1, 2])
def test_many_tiles_of_many_channels(stride: int, isa: str) -> None:
    # More than are kept at once: image and gradients are transformed in several rounds.
    size, strides = 118 * stride, (stride, stride)
    case = Conv2dCase("rounds", 1, 272, size, size, 100, 3, 3, strides, padding=(1, 1))
    tensors = random_tensors(case)
    exact = exact_passes(case, tensors)
    torch.set_num_threads(2)
    for name, tensor in passes(case, "winograd", tensors).items():
        error = ((tensor - exact[name]).norm() / exact[name].norm()).item()
        assert error <= stated_error(case), name


def test_bitwise_repeatable(isa: str) -> None:
    for case in CASES[-4:] + STRIDE2_CASES[-4:]:
        tensors = random_tensors(case)
        torch.set_num_threads(2)
        first = passes(case, "winograd", tensors)
        for name, tensor in passes(case, "winograd", tensors).items():
            assert torch.equal(tensor, first[name]), name


def test_nothing_is_left_from_another_shape(isa: str) -> None:
    # Scratch memory is kept from call to call, and must never be read before it is written.
    for large, small in (
        *((CASES[7], small) for small in CASES[:3]),
        *((STRIDE2_CASES[8], small) for small in STRIDE2_CASES[:4]),
    ):
        filled = tuple(torch.full_like(tensor, math.nan) for tensor in random_tensors(large))
        tensors = random_tensors(small)
        expected = passes(small, "winograd", tensors)
        passes(large, "winograd", filled)
        for name, tensor in passes(small, "winograd", tensors).items():
            assert torch.equal(tensor, expected[name]), (small.name, name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_within_its_tile(value: float, isa: str) -> None:
    case = Conv2dCase("not-finite", 2, 16, 20, 20, 16, 3, 3, padding=(1, 1))
    tensors = random_tensors(case)
    tensors[0][0, 3, 9, 10] = value
    output = passes(case, "winograd", tensors)["output"]
    seen = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    seen[0, 0, 8:11, 9:12] = True
    # Tiles begin at multiples of 4: the pixels that see the value lie in rows and columns 8 to 11.
    tile = torch.zeros_like(seen)
    tile[0, 0, 8:12, 8:12] = True
    finite = output.isfinite()
    assert not finite[seen.expand_as(output)].any()
    assert finite[~tile.expand_as(output)].all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_within_its_tile_of_stride_2(value: float, isa: str) -> None:
    case = Conv2dCase("not-finite", 2, 16, 20, 20, 16, 3, 3, (2, 2), (1, 1))
    tensors = random_tensors(case)
    tensors[0][0, 3, 9, 10] = value
    finite = passes(case, "winograd", tensors)["output"].isfinite()
    # Seen by rows 4 and 5 of column 5. Tiles begin at 0, 3, 6 and 8.
    assert not finite[0, :, 4:6, 5].any()
    finite[0, :, 3:6, 3:6] = True
    assert finite.all()


def geometry_of(case: Conv2dCase) -> Conv2dGeometry:
    return Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2,
        case.dilation, case.groups,
    )  # fmt: skip


@pytest.mark.parametrize("op", ["conv2d", "conv2d_grad_input", "conv2d_grad_weight"])
def test_the_cost_model_takes_it_where_it_pays(op: str) -> None:
    def choice(*sizes: int, **options: Any) -> str:
        return cpu_algorithms.choose(op, geometry_of(Conv2dCase("", *sizes, **options)), "avx512")

    layer = {"padding": (1, 1)}
    assert choice(8, 64, 56, 56, 64, 3, 3, **layer) == "winograd"
    assert choice(8, 512, 7, 7, 512, 3, 3, **layer) == "winograd"
    assert choice(64, 16, 32, 32, 16, 3, 3, **layer) == "winograd"
    assert choice(8, 64, 56, 56, 128, 3, 3, stride=(2, 2), **layer) == "winograd"
    # Few channels, few tiles, another kernel, stride, dilation: the direct algorithm.
    assert choice(64, 1, 28, 28, 32, 3, 3) == "direct"
    assert choice(8, 3, 56, 56, 64, 3, 3, **layer) == "direct"
    assert choice(8, 3, 56, 56, 64, 3, 3, stride=(2, 2), **layer) == "direct"
    assert choice(1, 64, 5, 5, 64, 3, 3, stride=(2, 2), **layer) == "direct"
    assert choice(1, 64, 5, 5, 64, 3, 3, **layer) == "direct"
    assert choice(8, 64, 56, 56, 64, 5, 5, **layer) == "direct"
    assert choice(8, 64, 56, 56, 64, 3, 3, stride=(2, 1), **layer) == "direct"
    assert choice(8, 64, 56, 56, 64, 3, 3, padding=(2, 2), dilation=(2, 2)) == "direct"
    assert choice(8, 64, 56, 56, 64, 3, 3, groups=64, **layer) == "direct"


def test_strict_precision_keeps_to_the_direct_algorithm(compiled_cpu: None) -> None:
    case = Conv2dCase("", 2, 64, 20, 20, 64, 3, 3, padding=(1, 1))
    tensors = random_tensors(case)
    results = {
        "direct": passes(case, "direct", tensors), "winograd": passes(case, "winograd", tensors)
    }  # fmt: skip

    def public() -> dict[str, Tensor]:
        input, weight, bias = (tensor.clone().requires_grad_() for tensor in tensors[:3])
        output = ops.conv2d(input, weight, bias, padding=1)
        grads = torch.autograd.grad(output, (input, weight, bias), tensors[3])
        return dict(
            zip(("output", "grad_input", "grad_weight", "grad_bias"), (output, *grads), strict=True)
        )

    for context, algorithm in (("strict", "direct"), ("fast", "winograd")):
        with gdfast.precision(context):
            for name, tensor in public().items():
                assert torch.equal(tensor, results[algorithm][name]), (context, name)


def test_precision_names_are_checked() -> None:
    with (
        pytest.raises(ValueError, match="precision: name: expected 'fast' or 'strict', got 'low'"),
        gdfast.precision("low"),
    ):
        pass
    result = subprocess.run(
        [sys.executable, "-c", "from gdfast import ops"], capture_output=True, text=True,
        timeout=120, env={**os.environ, "GDFAST_PRECISION": "low"},
    )  # fmt: skip
    assert result.returncode != 0
    assert "GDFAST_PRECISION=low: precision: name: expected 'fast' or" in result.stderr


def test_the_environment_chooses_the_precision() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from gdfast import backends; print(backends.is_strict())"],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "GDFAST_PRECISION": "strict"},
    )  # fmt: skip
    assert result.stdout.strip() == "True", result.stderr


def test_an_unknown_algorithm_is_refused(compiled_cpu: None) -> None:
    tensors = random_tensors(CASES[0])
    with pytest.raises(ValueError, match="algorithm: expected direct, winograd, bf16 or strassen"):
        passes(CASES[0], "fft", tensors)


def test_float64_never_takes_it(compiled_cpu: None) -> None:
    # gradcheck and gradgradcheck would not forgive its error.
    geometry = geometry_of(CASES[2])
    query = conv2d_dispatch.Conv2dQuery(
        torch.device("cpu"), torch.float64, geometry=geometry,
        strides=((1,) * 4, (1,) * 4, (1,) * 4),
    )  # fmt: skip
    assert gdfast.backends.cpu.algorithm("conv2d", query) == "direct"
