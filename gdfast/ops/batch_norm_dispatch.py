"""The dispatcher's side of batch_norm_act: torch.ops.gdfast.batch_norm_act and its backward.

Both are functional, which is what register_autograd asks for: batch_norm_act returns the statistics
of the batch, and `ops.batch_norm_act` moves the running ones. Eager code calls the kernels without
the dispatcher, and these do both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfast.backends import BatchNormQuery, chosen, resolve
from gdfast.backends.activation import ACTIVATIONS, output_tells
from gdfast.backends.batch_norm import CudaForward, sum_dtype
from gdfast.errors import mismatch
from gdfast.geometry import dense_strides, is_channels_last
from gdfast.ops.conv2d_dispatch import forget_units, library
from gdfast.ops.ordinary import tensor_facts

OP = "batch_norm_act"
_SETTINGS = "bool training, float eps, str activation, float negative_slope"

# The results: output, and per channel mean, 1 / sqrt(variance + eps) and, in training, the unbiased
# variance, which moves the running one. `moments` is what `ops.conv2d_moments` gave with the input.
library.define(
    f"{OP}(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    f"Tensor? residual, {_SETTINGS}, str backend, Tensor? moments=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# `other` is the tensor that pre_activation names. A gradient that is not wanted is None, as
# aten.native_batch_norm_backward's are for its output_mask.
library.define(
    f"{OP}_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? other, "
    f"Tensor mean, Tensor invstd, bool[] wanted, {_SETTINGS}, str pre_activation, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

# The kernel for each combination of sizes, strides, dtypes and settings: a call costs one look-up.
# Bounded, because images may come in ever new sizes.
_kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}
_KERNELS_LIMIT = 4096


def forget_kernels() -> None:
    """Drops every kernel that was looked up, so that the next call resolves its backend again."""
    _kernels.clear()
    forget_units()


def pre_activation(activation: str, negative_slope: float, residual: Tensor | None) -> str:
    """Where the backward pass finds the activation's argument, by what costs fewest bytes."""
    if residual is None or activation == "none":
        return "input"
    return "output" if output_tells(activation, negative_slope) else "residual"


def _bind(key: tuple[Any, ...], op: str, query: BatchNormQuery, backend: str) -> Callable[..., Any]:
    if len(_kernels) >= _KERNELS_LIMIT:
        _kernels.clear()
    kernel = _kernels[key] = resolve(op, query, backend).operations[op](query)
    return kernel


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, training: bool, momentum: float,
    eps: float, activation: str, negative_slope: float, backend: str,
    moments: Tensor | None = None, wants_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Runs a forward pass, running statistics included: output, mean, invstd and, where it is
    wanted and the backend has it, the mask that backward reads in the place of the output.
    """
    tensors = input, weight, bias, running_mean, running_var, residual
    settings = training, eps, activation, negative_slope
    kernel = forward_kernel(*tensors, *settings, backend, moments is not None)
    if isinstance(kernel, CudaForward):
        mask = kernel.new_mask(input, residual) if wants_mask else None
        return *kernel(*tensors, momentum, moments, mask), mask
    return *kernel(*tensors, momentum), None


def forward_kernel(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, training: bool, eps: float,
    activation: str, negative_slope: float, backend: str, has_moments: bool,
) -> Callable[..., Any]:  # fmt: skip
    """The kernel that `forward` runs; with moments it takes them only if it is a `CudaForward`."""
    backend = chosen(backend)
    key = (
        tensor_facts(input, weight, bias, running_mean, running_var, residual),
        training, eps, activation, negative_slope, backend, has_moments,
    )  # fmt: skip
    kernel = _kernels.get(key)
    if kernel is None:
        query = forward_query(
            input, weight, bias, running_mean, running_var, residual, training, eps, activation,
            negative_slope,
        )  # fmt: skip
        kernel = _bind(key, OP, query, backend)
    return kernel


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None,
    other: Tensor | None, mean: Tensor, invstd: Tensor, wanted: Sequence[bool], training: bool,
    eps: float, activation: str, negative_slope: float, pre_activation: str, backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Runs the backward pass: gradients of input, weight, bias and residual, or None."""
    settings = training, eps, activation, negative_slope, pre_activation, backend
    kernel = backward_kernel(input, weight, bias, *settings)
    return kernel(grad_output, input, weight, bias, other, mean, invstd, wanted)


def backward_kernel(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, eps: float,
    activation: str, negative_slope: float, pre_activation: str, backend: str,
) -> Callable[..., tuple[Tensor | None, ...]]:  # fmt: skip
    """The kernel that `backward` runs."""
    # Who wrote a mask reads it, whatever was chosen since.
    backend = "cuda" if pre_activation == "mask" else chosen(backend)
    param_dtype = _param_dtype(input, weight, bias)
    key = (
        "backward", tensor_facts(input), param_dtype, training, eps, activation,
        negative_slope, pre_activation, backend,
    )  # fmt: skip
    kernel = _kernels.get(key)
    if kernel is None:
        query = _query(
            input, param_dtype, training, eps, activation, negative_slope, pre_activation
        )
        kernel = _bind(key, f"{OP}_backward", query, backend)
    return kernel


def backward_query(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *settings: Any
) -> BatchNormQuery:
    """The query of a backward pass; settings are training, ..., pre_activation."""
    return _query(input, _param_dtype(input, weight, bias), *settings)


def _param_dtype(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    param = weight if weight is not None else bias
    return input.dtype if param is None else param.dtype


def _query(
    input: Tensor, param_dtype: torch.dtype, training: bool, eps: float, activation: str,
    negative_slope: float, pre_activation: str,
) -> BatchNormQuery:  # fmt: skip
    channels_last = is_channels_last(input.shape, input.stride())
    return BatchNormQuery(
        input.device, input.dtype, input.layout, size=tuple(input.shape),
        strides=dense_strides(input.shape, channels_last), channels_last=channels_last,
        param_dtype=param_dtype, training=training, eps=eps, activation=activation,
        negative_slope=negative_slope, pre_activation=pre_activation,
    )  # fmt: skip


def forward_query(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, training: bool, eps: float,
    activation: str, negative_slope: float,
) -> BatchNormQuery:  # fmt: skip
    """The query of a forward pass. Raises what `ops.batch_norm_act` raises."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            mismatch(OP, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
        )
    if input.dim() != 4:
        raise RuntimeError(mismatch(OP, "input", "size [N, C, H, W]", f"{list(input.shape)}"))
    N, C, H, W = input.shape
    if training and N * H * W == 1:
        expected = "more than 1 value per channel when training"
        raise ValueError(mismatch(OP, "input", expected, f"input size {list(input.shape)}"))
    if eps < 0 or (training and eps == 0):
        expected = "a positive number in training, at least 0 in evaluation"
        raise ValueError(mismatch(OP, "eps", expected, eps))
    if (running_mean is None) != (running_var is None):
        expected = "both running_mean and running_var or neither"
        raise ValueError(mismatch(OP, "running_mean, running_var", expected, "one of them"))
    if not training and running_mean is None:
        expected = "running_mean and running_var, which must be defined in evaluation mode"
        raise RuntimeError(mismatch(OP, "running_mean", expected, None))
    if residual is not None:
        _check("residual", residual, input, tuple(input.shape), (input.dtype,))
    params = {
        "weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var
    }  # fmt: skip
    # Half types may have float32 parameters; all of them have one type.
    types: tuple[torch.dtype, ...] = (input.dtype, sum_dtype(input.dtype))
    param_dtype = input.dtype
    for name, param in params.items():
        if param is not None:
            _check(name, param, input, (C,), types)
            param_dtype = param.dtype
            types = (param_dtype,)
    return _query(
        input, param_dtype, training, eps, activation, negative_slope,
        pre_activation(activation, negative_slope, residual),
    )  # fmt: skip


def _check(
    name: str, tensor: Tensor, input: Tensor, size: tuple[int, ...], types: Sequence[torch.dtype]
) -> None:
    if tuple(tensor.shape) != size:
        expected = f"size {list(size)}"
        raise RuntimeError(mismatch(OP, name, expected, f"size {list(tensor.shape)}"))
    if tensor.dtype not in types:
        expected = " or ".join(dict.fromkeys(map(str, types)))
        raise RuntimeError(mismatch(OP, name, f"{expected}: mixed dtype", tensor.dtype))
    if tensor.device != input.device:
        expected = f"a tensor on {input.device} like input: all on the same device"
        raise RuntimeError(mismatch(OP, name, expected, tensor.device))


def _forward_op(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, training: bool, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not training:
        running = running_mean, running_var
        results = forward(input, weight, bias, *running, residual, training, 0.0, *settings)
        return *results[:3], input.new_empty(0)
    # Running statistics that are moved all the way are those of the batch.
    batch_mean = input.new_zeros(input.shape[1], dtype=_param_dtype(input, weight, bias))
    batch_var = torch.zeros_like(batch_mean)
    batch = batch_mean, batch_var
    results = forward(input, weight, bias, *batch, residual, training, 1.0, *settings)
    return *results[:3], batch_var


def _fake_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, training: bool, eps: float,
    activation: str, negative_slope: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    query = forward_query(
        input, weight, bias, running_mean, running_var, residual, training, eps, activation,
        negative_slope,
    )  # fmt: skip
    channels = input.shape[1]
    mean, invstd = (input.new_empty(channels, dtype=sum_dtype(input.dtype)) for _ in range(2))
    param_dtype = _param_dtype(input, weight, bias)
    var = input.new_empty(channels if training else 0, dtype=param_dtype if training else None)
    return input.new_empty_strided(query.size, query.strides), mean, invstd, var


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None,
    other: Tensor | None, mean: Tensor, invstd: Tensor, wanted: Sequence[bool], *_: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    strides = dense_strides(input.shape, is_channels_last(input.shape, input.stride()))
    param_dtype = _param_dtype(input, weight, bias)

    def image(needed: bool) -> Tensor | None:
        return input.new_empty_strided(input.shape, strides) if needed else None

    def channels(needed: bool) -> Tensor | None:
        return input.new_empty(input.shape[1], dtype=param_dtype) if needed else None

    want_input, want_weight, want_bias, want_residual = wanted
    return image(want_input), channels(want_weight), channels(want_bias), image(want_residual)


for _name, _kernel, _fake in (
    (OP, _forward_op, _fake_forward),
    (f"{OP}_backward", backward, _fake_backward),
):
    # CompositeExplicitAutograd: one kernel for every device, which takes part in autograd only
    # through the formula that is registered beside it.
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gdfast::{_name}", _fake, lib=library)
