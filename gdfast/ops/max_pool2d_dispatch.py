"""The dispatcher's side of max_pool2d: torch.ops.gdfast.max_pool2d and its gradient.

The second result, argmax, says where in its window each value was: see gdfast.backends.max_pool2d.
kernel, stride, padding and dilation are pairs (height, width); `relu` puts max(0, x) behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfast.backends import Query, chosen, resolve
from gdfast.backends.max_pool2d import MaxPool2dQuery, place_dtype
from gdfast.errors import mismatch
from gdfast.geometry import MaxPool2dGeometry, dense_strides, is_channels_last
from gdfast.ops.conv2d_dispatch import library
from gdfast.ops.ordinary import tensor_facts

_ARGUMENTS = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode"

library.define(
    f"max_pool2d(Tensor input, {_ARGUMENTS}, bool relu, str backend) -> (Tensor, Tensor)"
)
library.define(
    "max_pool2d_grad(Tensor grad_output, Tensor argmax, SymInt[] input_size, bool channels_last, "
    f"{_ARGUMENTS}, str backend) -> Tensor"
)


# The kernel for each combination of sizes, strides and dtypes, so that a call costs one look-up.
# Bounded, because images may come in ever new sizes.
_kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}
_KERNELS_LIMIT = 4096
known_kernel = _kernels.get


def forget_kernels() -> None:
    """Drops every kernel that was looked up, so that the next call resolves its backend again."""
    _kernels.clear()


def bind(key: tuple[Any, ...], op: str, query: Query, backend: str) -> Callable[..., Any]:
    """The kernel that runs `op` for a query, which `known_kernel` finds by `key` from now on."""
    if len(_kernels) >= _KERNELS_LIMIT:
        _kernels.clear()
    kernel = _kernels[key] = resolve(op, query, backend).operations[op](query)
    return kernel


def max_pool2d_key(
    input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, relu: bool, backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of a forward pass is kept by."""
    return (
        "max_pool2d", tensor_facts(input),
        *kernel, *stride, *padding, *dilation, ceil_mode, relu, backend,
    )  # fmt: skip


def max_pool2d_grad_key(
    grad_output: Tensor, argmax: Tensor, input_size: Sequence[int], channels_last: bool,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool, backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of the gradient is kept by."""
    return (
        "max_pool2d_grad", tensor_facts(grad_output, argmax), *input_size, channels_last, *kernel,
        *stride, *padding, *dilation, ceil_mode, backend,
    )  # fmt: skip


def max_pool2d(
    input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, relu: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs a forward pass on the backend that takes it; see torch.ops.gdfast.max_pool2d."""
    backend = chosen(backend)
    key = max_pool2d_key(input, kernel, stride, padding, dilation, ceil_mode, relu, backend)
    run = known_kernel(key)
    if run is None:
        query = _query(input, kernel, stride, padding, dilation, ceil_mode, relu)
        run = bind(key, "max_pool2d", query, backend)
    output: tuple[Tensor, Tensor] = run(input)
    return output


def max_pool2d_grad(
    grad_output: Tensor, argmax: Tensor, input_size: Sequence[int], channels_last: bool,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool, backend: str,
) -> Tensor:  # fmt: skip
    """Runs the gradient in the input on the backend that takes it."""
    backend = chosen(backend)
    key = max_pool2d_grad_key(
        grad_output, argmax, input_size, channels_last, kernel, stride, padding, dilation,
        ceil_mode, backend,
    )  # fmt: skip
    run = known_kernel(key)
    if run is None:
        query = _grad_query(
            grad_output, argmax, input_size, channels_last, kernel, stride, padding, dilation,
            ceil_mode,
        )  # fmt: skip
        run = bind(key, "max_pool2d_grad", query, backend)
    output: Tensor = run(grad_output, argmax)
    return output


def _query(
    input: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool,
    relu: bool,
) -> MaxPool2dQuery:  # fmt: skip
    geometry = MaxPool2dGeometry.of(
        "max_pool2d", input.shape, kernel, stride, padding, dilation, ceil_mode
    )
    channels_last = is_channels_last(input.shape, input.stride())
    strides = dense_strides(geometry.output_size, channels_last)
    return MaxPool2dQuery(
        input.device, input.dtype, input.layout, geometry=geometry,
        strides=(input.stride(), strides, strides), relu=relu,
    )  # fmt: skip


def _grad_query(
    grad_output: Tensor, argmax: Tensor, input_size: Sequence[int], channels_last: bool,
    *arguments: Any,
) -> MaxPool2dQuery:  # fmt: skip
    op = "max_pool2d_grad"
    geometry = MaxPool2dGeometry.of(op, input_size, *arguments)
    for name, tensor in (("grad_output", grad_output), ("argmax", argmax)):
        if tuple(tensor.shape) != geometry.output_size:
            expected, got = (f"size {list(s)}" for s in (geometry.output_size, tensor.shape))
            raise RuntimeError(mismatch(op, name, expected, got))
    if argmax.dtype != place_dtype(geometry):
        raise RuntimeError(mismatch(op, "argmax", str(place_dtype(geometry)), argmax.dtype))
    if argmax.device != grad_output.device:
        expected = f"a tensor on {grad_output.device} like grad_output"
        raise RuntimeError(mismatch(op, "argmax", expected, argmax.device))
    strides = dense_strides(geometry.input_size, channels_last)
    return MaxPool2dQuery(
        grad_output.device, grad_output.dtype, grad_output.layout, geometry=geometry,
        strides=(strides, grad_output.stride(), argmax.stride()), relu=False,
    )  # fmt: skip


def _fake_max_pool2d(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *arguments_, _ = arguments
    query = _query(input, *arguments_)
    size, strides = query.geometry.output_size, query.strides[1]
    argmax = input.new_empty_strided(size, strides, dtype=place_dtype(query.geometry))
    return input.new_empty_strided(size, strides), argmax


def _fake_max_pool2d_grad(grad_output: Tensor, argmax: Tensor, *arguments: Any) -> Tensor:
    *arguments_, _ = arguments
    query = _grad_query(grad_output, argmax, *arguments_)
    return grad_output.new_empty_strided(query.geometry.input_size, query.strides[0])


for _name, _kernel, _fake in (
    ("max_pool2d", max_pool2d, _fake_max_pool2d),
    ("max_pool2d_grad", max_pool2d_grad, _fake_max_pool2d_grad),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gdfast::{_name}", _fake, lib=library)
