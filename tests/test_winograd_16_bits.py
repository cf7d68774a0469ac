"""Winograd's algorithm for bfloat16 and float16: by float32's kernels, rounded once."""

from __future__ import annotations

import pytest
import torch
from test_winograd import (
    CASES,
    LAYOUTS,
    STATED_ERROR,
    exact_passes,
    lay_out,
    passes,
    random_tensors,
)
from torch import Tensor

import gdfast
from gdfast import native, ops
from gdfast.backends import cpu, cpu_algorithms, tuning
from gdfast.bench.cases import Conv2dCase

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("nan_filled_memory", "threads")]

DTYPES = (torch.bfloat16, torch.float16)
# Of 8.7 MB an image: more than a piece.
PIECES = Conv2dCase("pieces", 3, 8, 260, 260, 24, 3, 3, padding=(1, 1))


def rms(tensor: Tensor) -> float:
    return tensor.double().pow(2).mean().sqrt().item()


def check_rounded_once(case: Conv2dCase, tensors: tuple[Tensor, ...]) -> None:
    exact = exact_passes(case, tensors)
    for name, tensor in passes(case, "winograd", tensors).items():
        expected = exact[name]
        rounding = rms(expected.to(tensor.dtype).double() - expected)
        allowed = 1.01 * rounding + STATED_ERROR * rms(expected)
        assert rms(tensor.double() - expected) <= allowed, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_rounded_once(case: Conv2dCase, layout: str, isa: str) -> None:
    # Each case and each layout with both.
    dtype = DTYPES[(CASES.index(case) + LAYOUTS.index(layout)) % 2]
    input, weight, bias, grad_output = (t.to(dtype) for t in random_tensors(case))
    laid_out = (
        lay_out(input, layout), lay_out(weight, layout, is_weight=True), bias,
        lay_out(grad_output, layout),
    )  # fmt: skip
    for count in (1, 2):
        torch.set_num_threads(count)
        check_rounded_once(case, laid_out)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pieces_of_a_batch(layout: str, isa: str) -> None:
    tensors = tuple(lay_out(t.bfloat16(), layout) if t.ndim == 4 else t.bfloat16()
                    for t in random_tensors(PIECES))  # fmt: skip
    torch.set_num_threads(2)
    check_rounded_once(PIECES, tensors)
    first, again = (passes(PIECES, "winograd", tensors) for _ in range(2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_a_batch_between_the_other_axes_is_one_piece(isa: str) -> None:
    # Memory in the order C, N, H, W: an image is not in one place.
    input, weight, bias, grad_output = (t.bfloat16() for t in random_tensors(PIECES))
    turned = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (input, grad_output))
    input, grad_output = turned
    assert input.stride(0) < input.stride(1)
    check_rounded_once(PIECES, (input, weight, bias, grad_output))


@pytest.mark.usefixtures("compiled_cpu")
class TestChoice:
    @pytest.fixture(autouse=True)
    def lower_isa(self):
        """The same kernels on every machine: those that have no products of bfloat16."""
        before = native.cpu.isa()
        assert native.cpu.select_isa("baseline")
        yield
        native.cpu.select_isa(before)

    def uses(self, dtype: torch.dtype, **options: int) -> list[tuning.Use]:
        input = torch.randn(4, 64, 28, 28).to(dtype).requires_grad_()
        weight = torch.randn(64, 64, 3, 3).to(dtype).requires_grad_()
        with tuning.recorded({}) as uses:
            output = ops.conv2d(input, weight, padding=1, backend="cpu", **options)
            output.backward(torch.randn(output.shape).to(dtype))
        return list(uses)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_runs_where_it_pays(self, dtype: torch.dtype) -> None:
        assert {use.choice.name for use in self.uses(dtype)} == {"winograd"}
        # With a stride of 2 the copies cost what it saves.
        assert {use.choice.name for use in self.uses(dtype, stride=2)} == {"direct"}
        with gdfast.precision("strict"):
            assert {use.candidates for use in self.uses(dtype)} == {("direct",)}

    def test_not_for_images_with_gaps(self) -> None:
        query = self.uses(torch.bfloat16)[0].query
        assert "winograd" in cpu.candidates("conv2d", query)
        (n, c, h, w), *others = query.strides
        gaps = type(query)(
            query.device, query.dtype, geometry=query.geometry,
            strides=((2 * n, c, h, w), *others),
        )  # fmt: skip
        assert "winograd" not in cpu.candidates("conv2d", gaps)

    def test_products_of_bfloat16_halve_the_direct_way(self) -> None:
        query = self.uses(torch.bfloat16)[0].query
        geometry = query.geometry
        costs = {"widened": True, "direct_share": 0.5}
        assert cpu_algorithms.choose("conv2d", geometry, "avx512", **costs) == "winograd"
        assert cpu_algorithms.choose("conv2d", geometry, "avx512", direct_share=0.2) == "direct"
