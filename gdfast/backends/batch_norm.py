"""Batch normalisation with residual and activation on each backend; `cpu_batch_norm` has the CPU's.

Forward kernels take (input, weight, bias, running_mean, running_var, residual, momentum) and return
(output, mean, invstd): the statistics that the input was normalised with, in the type that sums are
taken in. In training they move the running statistics where there are any. CUDA's take `moments`
too, which its convolution has found out about the input, and may write a mask (see `MaskSize`).

Backward kernels take (grad_output, input, weight, bias, other, mean, invstd, wanted): `other` is
what `pre_activation` names, `wanted` four booleans. They return the gradients of input, weight,
bias and residual, None where not wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gdfast import native
from gdfast.backends import cuda_stream, plans
from gdfast.backends.activation import activate, activation_gradient
from gdfast.backends.registry import BatchNormQuery
from gdfast.backends.sgd import DTYPES
from gdfast.errors import mismatch

Wanted = tuple[bool, bool, bool, bool]
Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor | None, ...]]


class MaskSize(NamedTuple):
    """What of an activation its backward pass reads in the place of the output: a bit per element.

    A byte has those of `elements` that lie side by side in memory, from the lowest bit up.
    """

    bytes: int
    elements: int


# What the CUDA kernels count in 32 bits, with room for a split beyond it, and on a grid's axis.
_MOST_PIXELS = 2**30
_MOST_CHANNELS = 2**16 - 1


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums over tensors of a dtype are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem_of(query: BatchNormQuery, kernels: Any) -> Any:
    """The description of a query that a compiled module takes."""
    N, C, H, W = query.size
    return kernels.BatchNormProblem(
        N, C, H * W, query.channels_last, DTYPES[query.dtype], DTYPES[query.param_dtype],
        query.activation, query.negative_slope, query.eps,
    )  # fmt: skip


def laid_out(tensor: Tensor, query: BatchNormQuery) -> Tensor:
    """The tensor itself, or its copy, in the memory order that kernels walk through."""
    if tensor.stride() == query.strides:
        return tensor
    format = torch.channels_last if query.channels_last else torch.contiguous_format
    return tensor.contiguous(memory_format=format)


def _allocator(
    size: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """What makes fresh tensors: with few arguments for each call."""
    return partial(torch.empty_strided, size, strides, dtype=dtype, device=device)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def packed(param: Tensor | None) -> Tensor | None:
    """The tensor itself, or its copy in one stretch of memory."""
    return None if param is None else param.contiguous()


def running_written(
    running_mean: Tensor | None, running_var: Tensor | None, packed_mean: Any, packed_var: Any
) -> None:
    """Lets the running statistics have what a kernel wrote, and autograd know."""
    if running_mean is None or running_var is None:
        return
    if running_mean is packed_mean and running_var is packed_var:
        increment_version((running_mean, running_var))
    else:
        running_mean.copy_(packed_mean)
        running_var.copy_(packed_var)


def cuda_why_not(query: BatchNormQuery) -> str:
    """Why the CUDA kernels do not take it, or ""."""
    N, C, H, W = query.size
    if N * H * W > _MOST_PIXELS:
        return f"it normalises over at most {_MOST_PIXELS} values"
    if C > _MOST_CHANNELS:
        return f"it takes at most {_MOST_CHANNELS} channels"
    return ""


def _check_moments(
    moments: Tensor, channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    size, layout = moments.shape, "contiguous" if moments.is_contiguous() else "strided"
    if size[1:] != (3, channels) or (moments.dtype, moments.device, layout) != (
        dtype, device, "contiguous",
    ):  # fmt: skip
        expected = (
            f"size [splits, 3, {channels}], {dtype}, contiguous, on {device}, as conv2d_moments "
            "gives with input"
        )
        got = f"size {list(size)}, {moments.dtype}, {layout}, on {moments.device}"
        raise RuntimeError(mismatch("batch_norm_act", "moments", expected, got))


def mask_size(query: BatchNormQuery, *images: Tensor | None) -> MaskSize | None:
    """The mask that the CUDA kernels can write beside the output, of images where they lie."""
    _, C, H, W = query.size
    elements = 1 if query.dtype == torch.float64 else 16 // query.dtype.itemsize
    if (C if query.channels_last else H * W) % elements:
        return None
    if any(image is not None and image.data_ptr() % 16 for image in images):
        return None
    return MaskSize(prod(query.size) // elements, elements)


def _unmasked(mask: Tensor, query: BatchNormQuery) -> Tensor:
    """A positive number for each element whose activation handed its gradient on, else a negative
    one: what tells an activation's gradient as its output does."""
    size = mask_size(query)
    assert size is not None
    bits = mask.unsqueeze(1) >> torch.arange(size.elements, dtype=torch.uint8, device=mask.device)
    signs = (bits & 1).to(query.dtype) * 2 - 1
    return signs.flatten().as_strided(query.size, query.strides)


class CudaForward:
    """The CUDA kernels for one shape; input has the strides of the query.

    In training, moments of the input that `cuda_conv2d.Kernel` gave with it take the place of a
    pass over it; a mask that `new_mask` made is written.
    """

    def __init__(self, query: BatchNormQuery) -> None:
        assert native.cuda is not None
        self._run, self._problem = native.cuda.batch_norm, problem_of(query, native.cuda)
        self._query, self._stats_dtype = query, sum_dtype(query.dtype)
        channels, bytes = query.size[1], native.cuda.batch_norm_workspace_bytes(self._problem)
        self._new_output = _allocator(query.size, query.strides, query.dtype, query.device)
        self._new_statistic = _allocator((channels,), (1,), self._stats_dtype, query.device)
        self._new_workspace = _allocator((bytes,), (1,), torch.uint8, query.device)
        self._workspace_bytes = bytes

    def new_mask(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """Memory for the mask of an output, or None where these images get none."""
        size = mask_size(self._query, input, residual)
        return size and torch.empty(size.bytes, dtype=torch.uint8, device=input.device)

    def draft(
        self, plan: plans.Draft, input: int, *tensors: int, moments: int, splits: int,
        wants_mask: bool,
    ) -> tuple[int, ...]:  # fmt: skip
        """Tensors as in a call, with the counter of batches behind them; gives the mask too."""
        assert native.cuda is not None
        query = self._query
        *of_norm, residual, batches = tensors
        results = (
            plan.fresh(self._new_output),
            plan.fresh(self._new_statistic),
            plan.fresh(self._new_statistic),
        )
        mask, size = plans.NONE, mask_size(query) if wants_mask else None
        if size is not None:
            mask = plan.fresh(_allocator((size.bytes,), (1,), torch.uint8, query.device))
            plan.align(residual)
        launch = native.cuda.batch_norm_launch(self._problem, query.training, splits)
        workspace = plan.scratch(self._workspace_bytes)
        plan.launch(
            launch, input, *of_norm, residual, *results, mask, batches, moments, workspace
        )  # fmt: skip
        return *results, mask

    def __call__(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, residual: Tensor | None,
        momentum: float, moments: Tensor | None = None, mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        query, device = self._query, input.device
        if moments is not None:
            _check_moments(moments, query.size[1], self._stats_dtype, device)
        output, workspace = self._new_output(), self._new_workspace()
        mean, invstd = self._new_statistic(), self._new_statistic()
        if residual is not None:
            residual = laid_out(residual, query)
        weight, bias = packed(weight), packed(bias)
        packed_mean, packed_var = packed(running_mean), packed(running_var)
        self._run(
            self._problem, input.data_ptr(), address(weight), address(bias),
            address(packed_mean), address(packed_var), address(residual), output.data_ptr(),
            mean.data_ptr(), invstd.data_ptr(), address(mask), query.training, momentum,
            address(moments), 0 if moments is None else len(moments), workspace.data_ptr(),
            *cuda_stream.current(device),
        )  # fmt: skip
        if query.training:
            running_written(running_mean, running_var, packed_mean, packed_var)
        return output, mean, invstd


def cuda_backward(query: BatchNormQuery) -> Backward:
    """The CUDA kernels for the gradients; input has the strides of the query."""
    assert native.cuda is not None
    run, problem = native.cuda.batch_norm_backward, problem_of(query, native.cuda)
    device, training, pre_activation = query.device, query.training, query.pre_activation
    hands_on = query.activation == "none"
    workspace_bytes = native.cuda.batch_norm_workspace_bytes(problem)
    new_image = _allocator(query.size, query.strides, query.dtype, device)
    new_param = _allocator(query.size[1:2], (1,), query.param_dtype, device)
    new_workspace = _allocator((workspace_bytes,), (1,), torch.uint8, device)

    def kernel(
        grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        other: Tensor | None, mean: Tensor, invstd: Tensor, wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        want_input, want_weight, want_bias, want_residual = wanted
        grad = laid_out(grad_output, query)
        grad_input = new_image() if want_input else None
        grad_residual = new_image() if want_residual and not hands_on else None
        grad_weight = new_param() if want_weight else None
        grad_bias = new_param() if want_bias else None
        workspace = new_workspace()
        if other is not None and pre_activation != "mask":
            other = laid_out(other, query)
        weight, bias = packed(weight), packed(bias)
        run(
            problem, grad.data_ptr(), input.data_ptr(), address(other), address(weight),
            address(bias), mean.data_ptr(), invstd.data_ptr(), address(grad_input),
            address(grad_weight), address(grad_bias), address(grad_residual), training,
            pre_activation, workspace.data_ptr(), *cuda_stream.current(device),
        )  # fmt: skip
        if want_residual and hands_on:
            grad_residual = grad_output
        return grad_input, grad_weight, grad_bias, grad_residual

    def draft(plan: plans.Draft, *tensors: int, wanted: Wanted) -> list[int]:
        """The gradient of the input is no tensor."""
        _, *params, wants_residual = wanted
        makers = new_param, new_param, new_image
        grads = [plan.scratch(prod(query.size) * query.dtype.itemsize)]
        for make, wants in zip(makers, (*params, wants_residual and not hands_on), strict=True):
            grads.append(plan.fresh(make) if wants else plans.NONE)
        plan.launch(launch, *tensors, *grads, plan.scratch(workspace_bytes))
        return [*grads[:3], tensors[0]] if wants_residual and hands_on else grads

    launch = native.cuda.batch_norm_backward_launch(problem, training, pre_activation)
    return plans.drafted(kernel, draft)


def _triton_problem(query: BatchNormQuery) -> Any:
    from gdfast.backends.triton.bind_batch_norm import Problem

    return Problem(
        query.size, query.channels_last, query.dtype, query.param_dtype, query.device,
        query.training, query.eps, query.activation, query.negative_slope,
        query.pre_activation,
    )  # fmt: skip


def triton(query: BatchNormQuery) -> Forward:
    """The Triton kernels for one shape; input has the strides of the query."""
    from gdfast.backends.triton.bind_batch_norm import bind_forward

    problem, training = _triton_problem(query), query.training

    @cache
    def bound(*present: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        return bind_forward(problem, *present)

    def kernel(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, residual: Tensor | None, momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if residual is not None:
            residual = laid_out(residual, query)
        packed_mean, packed_var = packed(running_mean), packed(running_var)
        run = bound(
            weight is not None, bias is not None, residual is not None, running_mean is not None
        )
        results = run(
            input, packed(weight), packed(bias), residual, packed_mean, packed_var, momentum
        )
        if training:
            running_written(running_mean, running_var, packed_mean, packed_var)
        return results

    return kernel


def triton_backward(query: BatchNormQuery) -> Backward:
    """The Triton kernels for the gradients; input has the strides of the query."""
    from gdfast.backends.triton.bind_batch_norm import bind_backward

    problem, hands_on = _triton_problem(query), query.activation == "none"

    @cache
    def bound(*present: Any) -> Callable[..., tuple[Tensor | None, ...]]:
        return bind_backward(problem, *present)

    def kernel(
        grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        other: Tensor | None, mean: Tensor, invstd: Tensor, wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        want_input, want_weight, want_bias, want_residual = wanted
        run = bound(
            weight is not None, bias is not None,
            (want_input, want_weight, want_bias, want_residual and not hands_on),
        )  # fmt: skip
        *gradients, grad_residual = run(
            laid_out(grad_output, query), input, packed(weight), packed(bias),
            None if other is None else laid_out(other, query), mean, invstd,
        )  # fmt: skip
        return *gradients, grad_output if want_residual and hands_on else grad_residual

    return kernel


def reference(query: BatchNormQuery) -> Forward:
    """Native PyTorch's operators, one after another."""
    training, eps, dtype = query.training, query.eps, sum_dtype(query.dtype)

    def kernel(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, residual: Tensor | None, momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        output, mean, invstd = torch.ops.aten.native_batch_norm.default(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if residual is not None:
            output = output + residual
        output = laid_out(activate(output, query.activation, query.negative_slope), query)
        if not training:
            assert running_mean is not None and running_var is not None
            mean, invstd = running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()
        return output, mean.to(dtype), invstd.to(dtype)

    return kernel


def reference_backward(query: BatchNormQuery) -> Backward:
    """The gradients as a formula of native operators, differentiable any number of times."""

    def kernel(*inputs: Any) -> tuple[Tensor | None, ...]:
        return gradients(query, *inputs)

    return kernel


def gradients(
    query: BatchNormQuery, grad_output: Tensor, input: Tensor, weight: Tensor | None,
    bias: Tensor | None, other: Tensor | None, mean: Tensor, invstd: Tensor, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of input, weight, bias and residual by native operators.

    In training the statistics count as functions of the input, whatever `mean` and `invstd` are.
    """

    def by_channel(value: Tensor) -> Tensor:
        return value.to(dtype).view(1, -1, 1, 1)

    dtype, over = sum_dtype(query.dtype), (0, 2, 3)
    x = input.to(dtype)
    if query.training:
        m = x.mean(over, keepdim=True)
        s = ((x - m).square().mean(over, keepdim=True) + query.eps).rsqrt()
    else:
        m, s = by_channel(mean), by_channel(invstd)
    normalised = (x - m) * s
    grad = grad_output.to(dtype)
    if query.activation != "none":
        if query.pre_activation == "output":
            assert other is not None
            z = other.to(dtype)
        elif query.pre_activation == "mask":
            assert other is not None
            z = _unmasked(other, query).to(dtype)
        else:
            z = normalised if weight is None else normalised * by_channel(weight)
            z = z if bias is None else z + by_channel(bias)
            z = z if other is None else z + other.to(dtype)
        grad = activation_gradient(grad, z, query.activation, query.negative_slope)
    grad_input = grad_weight = grad_bias = None
    want_input, want_weight, want_bias, want_residual = wanted
    if want_input:
        grad_input = grad
        if query.training:
            products = (grad * normalised).mean(over, keepdim=True)
            grad_input = grad - grad.mean(over, keepdim=True) - normalised * products
        grad_input = grad_input * (s if weight is None else s * by_channel(weight))
        grad_input = grad_input.to(query.dtype)
    if want_weight:
        grad_weight = (grad * normalised).sum(over).to(query.param_dtype)
    if want_bias:
        grad_bias = grad.sum(over).to(query.param_dtype)
    return grad_input, grad_weight, grad_bias, grad.to(query.dtype) if want_residual else None
