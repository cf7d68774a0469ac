"""Linear layers with few outputs or few rows, on our CPU kernels: which they take, and the calls.

A general matrix product makes poor use of a matrix of ten rows. For the gradients native PyTorch
calls it twice, each time reading grad_output anew and writing to fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import memory, plans

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
# Above it native's product is as fast: measured at 16 outputs and at 32.
_MOST_OUTPUTS = 16
# The same for the rows of a layer with more outputs, whose weights no cache of a core's own holds.
_MOST_ROWS, _MANY_WEIGHTS = 16, 2**18
# Below it the call costs more than the work.
_LEAST_PRODUCTS = 32 * 1024
_LEAST_COLUMNS = 64


def has_few_outputs(in_features: int, out_features: int) -> bool:
    """Whether the kernels may be the faster way for a layer, given enough rows on the CPU."""
    return (
        native.cpu is not None
        and 1 <= out_features <= _MOST_OUTPUTS
        and in_features >= _LEAST_COLUMNS
    )


def fits_layer(in_features: int, out_features: int) -> bool:
    """Whether they may be so for some number of rows."""
    return has_few_outputs(in_features, out_features) or (
        native.cpu is not None
        and in_features >= _LEAST_COLUMNS
        and in_features * out_features >= _MANY_WEIGHTS
    )


def fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels take these tensors, and are the faster way."""
    if not all(tensor is None or tensor.is_cpu for tensor in (input, weight, bias)):
        return False
    if input.dim() != 2 or weight.dim() != 2:
        return False
    (N, C), (K, columns) = input.shape, weight.shape
    return (
        columns == C
        and (has_few_outputs(C, K) or (N <= _MOST_ROWS and fits_layer(C, K)))
        and N * C * K >= _LEAST_PRODUCTS
        and input.dtype in _DTYPES
        and weight.dtype == input.dtype
        and input.stride(1) == 1
        and weight.is_contiguous()
        and (bias is None or (bias.shape == (K,) and bias.dtype == input.dtype))
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=4096)
def _problem(N: int, C: int, K: int, input_step: int, dtype: torch.dtype) -> Any:
    assert native.cpu is not None
    return native.cpu.LinearProblem(N, C, K, input_step, _DTYPES[dtype])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input [N, C] times weight [K, C] transposed, plus bias [K]: [N, K], of what `fits`."""
    assert native.cpu is not None
    (N, C), K = input.shape, weight.shape[0]
    output = torch.empty((N, K), dtype=input.dtype)
    if bias is not None:
        bias = bias.contiguous()
    native.cpu.linear(
        _problem(N, C, K, input.stride(0), input.dtype), input.data_ptr(), weight.data_ptr(),
        _address(bias), output.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return output


def linear_backward(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, columns: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of input, weight and bias from that of the output [N, K], None where they are
    not needed. Then the other tensor [N, columns] or [K, columns] is not looked at.
    """
    assert native.cpu is not None
    (N, K), C, dtype = grad_output.shape, columns, grad_output.dtype
    grad_output = grad_output.contiguous()
    input_step = C if input is None else input.stride(0)
    grads = (
        memory.empty_strided((N, C), (C, 1), dtype) if needed[0] else None,
        memory.empty_strided((K, C), (C, 1), dtype) if needed[1] else None,
        torch.empty(K, dtype=dtype) if needed[2] else None,
    )
    native.cpu.linear_backward(
        _problem(N, C, K, input_step, dtype), grad_output.data_ptr(), _address(input),
        _address(weight), *map(_address, grads), torch.get_num_threads(),
    )  # fmt: skip
    return grads


def plan(input: Tensor, weight: Tensor, bias: Tensor | None) -> plans.Plan | None:
    """A plan of `linear` for tensors like these, which `fits`: it gives the output."""
    assert native.cpu is not None
    if bias is not None and not bias.is_contiguous():
        return None
    (N, C), K = input.shape, weight.shape[0]
    launch = native.cpu.linear_launch(_problem(N, C, K, input.stride(0), input.dtype))
    draft = plans.Draft(3)
    output = draft.fresh(partial(torch.empty, (N, K), dtype=input.dtype, device=input.device))
    draft.launch(launch, 0, 1, plans.NONE if bias is None else 2, output)
    return draft.plan((output,))


def backward_plan(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, columns: int,
    needed: Sequence[bool],
) -> plans.Plan | None:  # fmt: skip
    """A plan of `linear_backward` that takes grad_output, input and weight: it gives the gradients,
    and a None behind them."""
    assert native.cpu is not None
    if not grad_output.is_contiguous():
        return None
    (N, K), C, dtype = grad_output.shape, columns, grad_output.dtype
    step = C if input is None else input.stride(0)
    launch = native.cpu.linear_backward_launch(_problem(N, C, K, step, dtype))
    makers: tuple[Callable[[], Tensor], ...] = (
        memory.allocator((N, C), (C, 1), dtype), memory.allocator((K, C), (C, 1), dtype),
        partial(torch.empty, K, dtype=dtype, device=grad_output.device),
    )  # fmt: skip
    draft = plans.Draft(3)
    grads = [
        draft.fresh(make) if wanted else plans.NONE
        for make, wanted in zip(makers, needed, strict=False)
    ]
    read = (plans.NONE if each is None else i for i, each in enumerate((input, weight), 1))
    draft.launch(launch, 0, *read, *grads)
    return draft.plan((*grads, plans.NONE))
