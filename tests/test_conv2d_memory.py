"""What the compiled convolution kernels read and write: nothing that is not theirs."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from typing import Any

import pytest
import torch
from test_conv2d_kernels import check, problem_of
from torch import Tensor

from gdfast import native
from gdfast.bench.cases import ODD, Conv2dCase

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("nan_filled_memory", "threads", "strict"),
]


@pytest.mark.parametrize("case", [case for case in ODD if case.N], ids=str)
def test_nothing_is_written_beside_the_outputs(case: Conv2dCase, isa: str) -> None:
    # Outputs with gaps on every axis: the gaps have to keep what is in them.
    problem = problem_of(case, torch.float32, False)
    sizes = (
        *case.input_shape,
        *(case.K, case.weight_shape[2], case.weight_shape[3], case.P, case.Q),
    )
    outputs = {
        name: with_gaps(shape)
        for name, shape in (
            ("output", case.output_shape),
            ("grad_input", case.input_shape),
            ("grad_weight", case.weight_shape),
        )
    }
    grad_bias_whole = torch.full((case.K + 2,), 7.0)
    grad_bias = grad_bias_whole[1:-1].fill_(math.nan)
    plain = problem.input.stride(), problem.weight.stride(), problem.grad_output.stride()

    def prepared(place: int, view: Tensor) -> Any:
        strides = [*plain[:place], view.stride(), *plain[place + 1 :]]
        return native.cpu.Conv2dProblem(
            sizes, case.stride, case.padding, case.dilation, case.groups, "float32", *strides
        )

    input, weight, bias, grad_output = (
        tensor.data_ptr()
        for tensor in (problem.input, problem.weight, problem.bias, problem.grad_output)
    )
    (_, output), (_, grad_input), (_, grad_weight) = outputs.values()
    native.cpu.conv2d(prepared(2, output), input, weight, bias, output.data_ptr(), 2)
    native.cpu.conv2d_grad_input(
        prepared(0, grad_input), grad_output, weight, grad_input.data_ptr(), 2
    )
    native.cpu.conv2d_grad_weight(
        prepared(1, grad_weight),
        grad_output,
        input,
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        2,
    )
    for name, (whole, view) in outputs.items():
        check(name, view, problem)
        view.fill_(7.0)
        assert (whole == 7.0).all(), name
    check("grad_bias", grad_bias, problem)
    assert grad_bias_whole[0] == grad_bias_whole[-1] == 7.0


def with_gaps(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    n, c, h, w = shape
    whole = torch.full((n + 2, c + 2, h + 2, 2 * w + 1), 7.0)
    view = whole[1:-1, 1:-1, 1:-1, 1:-1:2]
    return whole, view.fill_(math.nan)


# 1x1 kernels whose pixels are cut into chunks, of which the last one is a single pixel: vectors of
# the pixel before it are longer than what is left.
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("channels", [(1, 1), (7, 3)], ids=str)
def test_nothing_is_read_beyond_the_last_pixel(channels: tuple[int, int], isa: str) -> None:
    pixels = 10333
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def at_a_page_end(channels: int) -> Tensor:
        size = 4 * channels * pixels
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
        bytes_of_it = (ctypes.c_char * len(memory)).from_buffer(memory)
        guard = ctypes.c_void_p(ctypes.addressof(bytes_of_it) + whole)
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        kept.append(bytes_of_it)
        lines = torch.frombuffer(memory, dtype=torch.float32, count=size // 4, offset=whole - size)
        return lines.copy_(torch.randn(size // 4)).view(1, 1, pixels, channels).permute(0, 3, 1, 2)

    C, K = channels
    input, grad_output = at_a_page_end(C), at_a_page_end(K)
    grad_weight = torch.empty(K, C, 1, 1)
    problem = native.cpu.Conv2dProblem(
        (1, C, 1, pixels, K, 1, 1, 1, pixels), (1, 1), (0, 0), (1, 1), 1, "float32",
        input.stride(), grad_weight.stride(), grad_output.stride(),
    )  # fmt: skip
    native.cpu.conv2d_grad_weight(
        problem, grad_output.data_ptr(), input.data_ptr(), grad_weight.data_ptr(), 0, 1
    )
    exact = torch.einsum("nkpq,ncpq->kc", grad_output.double(), input.double())
    assert torch.allclose(grad_weight[:, :, 0, 0].double(), exact, rtol=1e-5, atol=1e-2)
