"""The dispatcher's side of conv2d: torch.ops.gdfast.conv2d and its two gradients.

Each operation has a real kernel, which resolves the backend, and a fake one for torch.compile and
export. Both start from the same checked query, so that sizes and strides agree.

padding is (rows above, columns left, rows below, columns right); `backend` a registered name or
"auto"; `channels_last` the layout that the gradient gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gdfast.backends import Conv2dQuery, chosen, tuning
from gdfast.errors import mismatch
from gdfast.geometry import Conv2dGeometry, conv2d_is_channels_last, dense_strides
from gdfast.ops.ordinary import tensor_facts

Strides = tuple[int, ...]
_ARGUMENTS = "int[] stride, int[] padding, int[] dilation, int groups, str backend"

library = torch.library.Library("gdfast", "FRAGMENT")
library.define(f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_ARGUMENTS}) -> Tensor")
library.define(
    "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[] input_size, "
    f"bool channels_last, {_ARGUMENTS}) -> Tensor"
)
# Without `bias` the second result is None, as aten.convolution_backward's is for a masked output.
library.define(
    "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[] weight_size, "
    f"bool channels_last, bool bias, {_ARGUMENTS}) -> (Tensor, Tensor)"
)

# The kernel for each combination of sizes, strides, dtypes and what else decides which one it is:
# a call costs one look-up. Bounded, because images may come in ever new sizes.
_kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}
known_kernel = _kernels.get
_native: set[tuple[Any, ...]] = set()  # the keys of those that are native PyTorch's, by choice
KERNELS_LIMIT = 4096
# Layers, and whether native PyTorch was chosen for all three passes of theirs. Then one call of its
# own operator does what takes three through us: after a large kernel, with cold caches, each of
# these costs 50 to 200 us more.
all_native: dict[tuple[Any, ...], bool] = {}
# Layers that have run before, convolutions with the batch normalisations behind them too.
units: dict[tuple[Any, ...], Any] = {}
generation = object()  # another one when units are forgotten


def forget_kernels() -> None:
    """Drops every kernel that was looked up, so that the next call resolves its backend again."""
    for known in (_kernels, _native, all_native):
        known.clear()
    forget_units()


def forget_units() -> None:
    """Drops what is known of layers."""
    global generation
    generation = object()
    units.clear()


def runs_native(key: tuple[Any, ...]) -> bool:
    """Whether native PyTorch was chosen for the kernel that is kept by this key."""
    return key in _native


def bind(
    key: tuple[Any, ...], op: str, query: Conv2dQuery, backend: str, *arguments: Any
) -> Callable[..., Any]:
    """The kernel that runs `op` for a query, which `known_kernel` finds by `key` from now on;
    `arguments` are those of this call.
    """
    if len(_kernels) >= KERNELS_LIMIT:
        forget_kernels()
    kernel, name = tuning.bind(op, query, backend, arguments)
    if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return kernel  # nothing could be timed: the next call may
    _kernels[key] = kernel
    if name == tuning.NATIVE:
        _native.add(key)
    return kernel


def conv2d_key(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of a forward pass is kept by."""
    return (
        tensor_facts(input, weight, bias),
        *stride, *padding, *dilation, groups, backend, tuning.situation(),
    )  # fmt: skip


def conv2d_grad_input_key(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], channels_last: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of a gradient in the input is kept by."""
    return (
        "input", tensor_facts(grad_output, weight),
        *input_size, channels_last, *stride, *padding, *dilation, groups, backend,
        tuning.situation(),
    )  # fmt: skip


def conv2d_grad_weight_key(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], channels_last: bool, bias: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of the gradients in the weight and the bias is kept by."""
    return (
        "weight", tensor_facts(grad_output, input),
        *weight_size, channels_last, *stride, *padding, *dilation, groups, backend,
        tuning.situation(),
    )  # fmt: skip


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """Runs a forward pass on the backend that takes it; see torch.ops.gdfast.conv2d."""
    backend = chosen(backend)
    key = conv2d_key(input, weight, bias, stride, padding, dilation, groups, backend)
    kernel = known_kernel(key)
    if kernel is None:
        query = conv2d_query("conv2d", input, weight, bias, stride, padding, dilation, groups)
        kernel = bind(key, "conv2d", query, backend, input, weight, bias)
    return kernel(input, weight, bias)


def conv2d_grad_input(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], channels_last: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """Runs the gradient in the input on the backend that takes it."""
    backend = chosen(backend)
    key = conv2d_grad_input_key(
        grad_output, weight, input_size, channels_last, stride, padding, dilation, groups, backend
    )
    kernel = known_kernel(key)
    if kernel is None:
        query = _grad_input_query(
            grad_output, weight, input_size, channels_last, stride, padding, dilation, groups
        )
        kernel = bind(key, "conv2d_grad_input", query, backend, grad_output, weight)
    return kernel(grad_output, weight)


def conv2d_grad_weight(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], channels_last: bool, bias: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs the gradients in the weight and, with `bias`, the bias on the backend that takes it."""
    kernel = grad_weight_kernel(
        grad_output, input, weight_size, channels_last, bias, stride, padding, dilation, groups,
        backend,
    )  # fmt: skip
    gradients: tuple[Tensor, Tensor | None] = kernel(grad_output, input, bias)
    return gradients


def grad_weight_kernel(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], channels_last: bool, bias: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> Callable[..., Any]:  # fmt: skip
    """The kernel that conv2d_grad_weight runs. Some can leave the weight's to the optimizer: those
    have a method `begin` (see `backends.cuda_grad_weight`).
    """
    backend = chosen(backend)
    key = conv2d_grad_weight_key(
        grad_output, input, weight_size, channels_last, bias, stride, padding, dilation, groups,
        backend,
    )  # fmt: skip
    kernel = known_kernel(key)
    if kernel is None:
        query = _grad_weight_query(
            grad_output, input, weight_size, channels_last, stride, padding, dilation, groups
        )
        kernel = bind(key, "conv2d_grad_weight", query, backend, grad_output, input, bias)
    return kernel


def conv2d_query(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> Conv2dQuery:
    """The query of a forward pass. Raises what `ops.conv2d` raises, in the name of `op`."""
    geometry = Conv2dGeometry.of(op, input.shape, weight.shape, *arguments)
    check_alike(op, "input", input, weight=weight, bias=bias)
    check_bias(op, bias, geometry)
    channels_last = conv2d_is_channels_last(
        input.shape, input.stride(), weight.shape, weight.stride()
    )
    output_strides = dense_strides(geometry.output_size, channels_last)
    return _query(input, geometry, input.stride(), weight.stride(), output_strides)


def _grad_input_query(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], channels_last: bool,
    *arguments: Any,
) -> Conv2dQuery:  # fmt: skip
    op = "conv2d_grad_input"
    geometry = Conv2dGeometry.of(op, input_size, weight.shape, *arguments)
    _check_grad_output(op, grad_output, geometry)
    check_alike(op, "grad_output", grad_output, weight=weight)
    input_strides = dense_strides(geometry.input_size, channels_last)
    return _query(grad_output, geometry, input_strides, weight.stride(), grad_output.stride())


def _grad_weight_query(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], channels_last: bool,
    *arguments: Any,
) -> Conv2dQuery:  # fmt: skip
    op = "conv2d_grad_weight"
    geometry = Conv2dGeometry.of(op, input.shape, weight_size, *arguments)
    _check_grad_output(op, grad_output, geometry)
    check_alike(op, "grad_output", grad_output, input=input)
    weight_strides = dense_strides(geometry.weight_size, channels_last)
    return _query(grad_output, geometry, input.stride(), weight_strides, grad_output.stride())


def _query(
    tensor: Tensor, geometry: Conv2dGeometry, input: Strides, weight: Strides, output: Strides
) -> Conv2dQuery:
    return Conv2dQuery(
        tensor.device, tensor.dtype, tensor.layout, geometry=geometry,
        strides=(input, weight, output),
    )  # fmt: skip


def _check_grad_output(op: str, grad_output: Tensor, geometry: Conv2dGeometry) -> None:
    if tuple(grad_output.shape) != geometry.output_size:
        expected, got = (f"size {list(s)}" for s in (geometry.output_size, grad_output.shape))
        raise RuntimeError(mismatch(op, "grad_output", expected, got))


def check_bias(op: str, bias: Tensor | None, geometry: Conv2dGeometry) -> None:
    """Raises RuntimeError where a bias does not fit the output channels."""
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != geometry.K):
        expected = f"size [{geometry.K}], one for each output channel"
        raise RuntimeError(mismatch(op, "bias", expected, f"size {list(bias.shape)}"))


def check_alike(op: str, first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises RuntimeError where others differ from the first tensor in dtype or device."""
    for name, other in others.items():
        if other is not None and other.dtype != tensor.dtype:
            expected = f"{tensor.dtype} like {first}: their types should be the same"
            fix = f"Convert one of them with .to({tensor.dtype})"
            raise RuntimeError(mismatch(op, name, expected, other.dtype, fix))
        if other is not None and other.device != tensor.device:
            expected = f"a tensor on {tensor.device} like {first}: all on the same device"
            fix = f"Move one of them with .to({str(tensor.device)!r})"
            raise RuntimeError(mismatch(op, name, expected, other.device, fix))


def _fake_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    *geometry, _ = arguments
    query = conv2d_query("conv2d", input, weight, bias, *geometry)
    return input.new_empty_strided(query.geometry.output_size, query.strides[2])


def _fake_conv2d_grad_input(grad_output: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *geometry, _ = arguments
    query = _grad_input_query(grad_output, weight, *geometry)
    return grad_output.new_empty_strided(query.geometry.input_size, query.strides[0])


def _fake_conv2d_grad_weight(
    grad_output: Tensor, input: Tensor, weight_size: Any, channels_last: bool, bias: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    *geometry, _ = arguments
    query = _grad_weight_query(grad_output, input, weight_size, channels_last, *geometry)
    grad_weight = input.new_empty_strided(query.geometry.weight_size, query.strides[1])
    return grad_weight, grad_output.new_empty(grad_output.shape[1]) if bias else None


for _name, _kernel, _fake in (
    ("conv2d", conv2d, _fake_conv2d),
    ("conv2d_grad_input", conv2d_grad_input, _fake_conv2d_grad_input),
    ("conv2d_grad_weight", conv2d_grad_weight, _fake_conv2d_grad_weight),
):
    # CompositeExplicitAutograd: one kernel for every device, which takes part in autograd only
    # through the formula that is registered beside it.
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gdfast::{_name}", _fake, lib=library)


# Each of the three passes multiplies every weight of a filter with every output position once.
@register_flop_formula(torch.ops.gdfast.conv2d)
def _conv2d_flops(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


@register_flop_formula(torch.ops.gdfast.conv2d_grad_input)
def _conv2d_grad_input_flops(grad_output: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(grad_output) * prod(weight[1:])


@register_flop_formula(torch.ops.gdfast.conv2d_grad_weight)
def _conv2d_grad_weight_flops(
    grad_output: Any, input: Any, weight_size: Any, *_: Any, **__: Any
) -> int:
    return 2 * prod(grad_output) * prod(weight_size[1:])
