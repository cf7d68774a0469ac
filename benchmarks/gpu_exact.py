"""What kernels give on tiny tensors, beside what is right: pairs of results and float64's.

Tensors are made on the CPU and results come back there, so that next to no kernels but ours run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

import gdfast
from gdfast import nn, ops, optim
from gdfast.backends import (
    cuda_conv2d,
    cuda_hopper,
    cuda_hopper_float32,
    cuda_hopper_halo,
    cuda_hopper_planes,
    precision,
)
from gdfast.backends.activation import activate
from gdfast.bench import norm
from gdfast.bench.cases import Conv2dCase
from gdfast.bench.workload import LAYOUTS
from gdfast.geometry import Conv2dGeometry


def random(size: tuple[int, ...], dtype: torch.dtype, layout: str = "channels_last") -> Tensor:
    value = torch.randn(size).to(dtype)
    return value.to(memory_format=LAYOUTS[layout]) if len(size) == 4 else value


def passes(
    case: Conv2dCase, dtype: torch.dtype, layout: str, device: str, backend: str, by: str = "",
    tf32: bool = False, strict: bool = False,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """All passes of a convolution, by the candidate that is named, if one is."""
    sizes = case.input_shape, case.weight_shape, (case.K,), case.output_shape
    here = [random(size, dtype, layout) for size in sizes]
    input, weight, bias, grad = (value.to(device) for value in here)
    torch.backends.cudnn.allow_tf32 = tf32
    with precision("strict" if strict else "fast"):
        if by:
            query = _query(case, input, weight, grad)
            # Few channels have no kernel of their own in this pass, nor groups for a stride.
            missing = by == "stem" or (by == "grouped" and case.stride != (1, 1))
            ours = [
                cuda_conv2d.conv2d(query, by)(input, weight, bias),
                cuda_conv2d.conv2d_grad_input(query, "" if missing else by)(grad, weight),
            ]
            without_weight = (
                cuda_hopper.HOPPER, cuda_hopper_float32.TILES, cuda_hopper_halo.HALO,
                {cuda_hopper_planes.NAME},
            )  # fmt: skip
            if not any(by in names for names in without_weight):
                ours += cuda_conv2d.conv2d_grad_weight(query, by)(grad, input, True)
        else:
            ours = _by_operations(case, [input, weight, bias, grad], backend)
        ours = [value.cpu() for value in ours if value is not None]
    exact = _by_operations(case, [value.double() for value in here], "reference")
    return list(zip(ours, exact[: len(ours)], strict=True))


def moments(case: Conv2dCase, by: str, device: str, backend: str) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of a convolution's output, which the candidate that is named takes."""
    sizes = case.input_shape, case.weight_shape, case.output_shape
    input, weight, grad = (random(size, torch.bfloat16).to(device) for size in sizes)
    kernel: Any = cuda_conv2d.conv2d(_query(case, input, weight, grad), by)
    output, parts = kernel.with_moments(input, weight, None)
    count, mean, squares = parts.double().cpu().unbind(1)
    whole = (count * mean).sum(0) / count.sum(0)
    variance = (squares + count * (mean - whole) ** 2).sum(0) / count.sum(0)
    exact = torch.var_mean(output.double().cpu(), (0, 2, 3), correction=0)
    return list(zip((whole.float(), variance.float()), exact[::-1], strict=True))


def weight_gradient(
    case: Conv2dCase,
    dtype: torch.dtype,
    by: str,
    device: str,
    backend: str,
    layout: str = "channels_last",
) -> list[tuple[Tensor, Tensor]]:
    """Of a convolution without a bias and without TF32, by the candidate that is named."""
    torch.backends.cudnn.allow_tf32 = False
    sizes = case.input_shape, case.weight_shape, case.output_shape
    here = [random(size, dtype, layout) for size in sizes]
    input, weight, grad = (value.to(device) for value in here)
    query = _query(case, input, weight, grad)
    ours, _ = cuda_conv2d.conv2d_grad_weight(query, by)(grad, input, False)
    exact = torch.nn.grad.conv2d_weight(
        here[0].double(), case.weight_shape, here[2].double(), case.stride, case.padding,
        case.dilation,
    )  # fmt: skip
    return [(ours.cpu(), exact)]


def _query(case: Conv2dCase, *tensors: Tensor) -> gdfast.backends.Conv2dQuery:
    """What backends are asked for, on input, weight and a tensor of the output's layout."""
    geometry = Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2,
        case.dilation, case.groups,
    )  # fmt: skip
    return gdfast.backends.Conv2dQuery(
        tensors[0].device, tensors[0].dtype, geometry=geometry,
        strides=tuple(tensor.stride() for tensor in tensors),
    )  # fmt: skip


def activated(
    case: Conv2dCase, activation: str, dtype: torch.dtype, device: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """Convolution, bias and activation in one kernel."""
    here = [random(size, dtype) for size in (case.input_shape, case.weight_shape, (case.K,))]
    window = case.stride, case.padding, case.dilation, case.groups
    ours = ops.conv2d_act(
        *(value.to(device) for value in here), *window, activation=activation, negative_slope=0.2,
        backend=backend,
    )  # fmt: skip
    return [(ours.cpu(), activate(F.conv2d(*(v.double() for v in here), *window), activation, 0.2))]


def with_norm(
    case: Conv2dCase, dtype: torch.dtype, device: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """A layer with its normalisation in training, whose statistics the convolution may take."""
    torch.backends.cudnn.allow_tf32 = False
    layer = nn.ConvNormAct(
        case.C, case.K, (case.R, case.S), stride=case.stride, padding=case.padding,
        dilation=case.dilation, groups=case.groups,
    ).to(dtype)  # fmt: skip
    image, grad = random(case.input_shape, dtype), random(case.output_shape, dtype)

    def run(backend: str, layer: Any, image: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [image.requires_grad_(), *layer.parameters()]
        with gdfast.backend(backend):
            output = layer(image)
            grads = torch.autograd.grad(output, leaves, grad)
        return [value.detach().cpu() for value in (output, *grads)]

    exact = run("native", copy.deepcopy(layer).double(), image.double(), grad.double())
    ours = run(backend, layer.to(device), image.to(device), grad.to(device))
    return list(zip(ours, exact, strict=True))


def _by_operations(case: Conv2dCase, tensors: list[Tensor], backend: str) -> list[Tensor]:
    input, weight, bias, grad = tensors
    run = torch.ops.gdfast
    last = not input.is_contiguous()
    arguments = case.stride, case.padding * 2, case.dilation, case.groups, backend
    return [
        run.conv2d(input, weight, bias, *arguments),
        run.conv2d_grad_input(grad, weight, input.shape, last, *arguments),
        *run.conv2d_grad_weight(grad, input, weight.shape, last, True, *arguments),
    ]


def both_ways(
    function: Callable[..., Tensor], exact: Callable[..., Tensor], leaves: list[Tensor], device: str
) -> list[tuple[Tensor, Tensor]]:
    """The output of a differentiable function, and the gradients of its leaves."""

    def run(function: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
        inputs = [value.detach().requires_grad_() for value in values]
        output = function(*inputs)
        grad = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
        grads = torch.autograd.grad(output, inputs, grad.to(output.device))
        return [value.detach().cpu() for value in (output, *grads)]

    ours = run(function, [value.to(device) for value in leaves])
    return list(zip(ours, run(exact, [value.double() for value in leaves]), strict=True))


def normalised(
    dtype: torch.dtype, layout: str, residual: bool, device: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    size, C = (3, 20, 5, 6), 20
    params = [torch.rand(C) + 0.5, torch.randn(C)]
    params = [value.double() if dtype == torch.float64 else value for value in params]
    leaves = [random(size, dtype, layout), *params]
    leaves += [random(size, dtype, layout)] * residual

    def of(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        mean, var = (value.to(inputs[1]) for value in (torch.zeros(C), torch.ones(C)))
        more = inputs[3] if residual else None
        return function(*inputs[:3], mean, var, more, training=True)

    ours = partial(ops.batch_norm_act, backend=backend)
    return both_ways(partial(of, ours), partial(of, norm.native), leaves, device)


def pooled(
    dtype: torch.dtype, layout: str, device: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    # All values differ, in half types too: with equal ones, float64 may choose another.
    size = (2, 9, 5, 2)
    values = torch.randperm(180).view(size).to(dtype).to(memory_format=LAYOUTS[layout])
    window = {"kernel_size": 3, "stride": 2, "padding": 1}
    ours = partial(ops.max_pool2d, **window, backend=backend)
    return both_ways(ours, partial(F.max_pool2d, **window), [values], device)


def multiplied(
    sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, ...], device: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """A linear layer on tensors of two dtypes, of which autocast makes a third one."""
    (N, C, K), (of_input, of_weight, cast) = sizes, dtypes
    leaves = [random((N, C), of_input), random((K, C), of_weight), random((K,), of_weight)]

    def ours(*inputs: Tensor) -> Tensor:
        enabled = cast != of_weight
        dtype = cast if enabled else torch.bfloat16
        with gdfast.backend(backend), torch.autocast(device, dtype, enabled=enabled):
            return ops.linear(*inputs)

    return both_ways(ours, F.linear, leaves, device)


def updated(
    dtype: torch.dtype, masters: bool, device: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    start = [random((size,), dtype) for size in (1, 7, 1000, 4099)]
    grads = [random((size,), dtype) for size in (1, 7, 1000, 4099)]
    hyper: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}

    def run(make: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
        params = [Parameter(value.to(device, dtype, copy=True)) for value in start]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device, dtype)
        optimizer = make(params, **hyper)
        for _ in range(2):
            optimizer.step()
        return [param.detach().cpu() for param in params]

    with gdfast.backend(backend):
        ours = run(partial(optim.SGD, master_weights=masters), dtype, device)
    return list(zip(ours, run(torch.optim.SGD, torch.float64, "cpu"), strict=True))


def updated_in_backward(
    dtype: torch.dtype, bias: bool, device: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """A weight in the last pass of its gradient: with a bias by parts, without by the only one."""
    start, images = random((40, 24, 3, 3), dtype), random((2, 24, 9, 8), dtype)
    hyper: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}

    def run(make: Any, dtype: torch.dtype, device: str, convolve: Any) -> list[Tensor]:
        weight = Parameter(start.to(device, dtype, copy=True))
        zeros = torch.zeros(40, dtype=dtype, device=device)
        added = Parameter(zeros) if bias else None
        optimizer = make([weight], **hyper)
        for _ in range(2):
            convolve(images.to(device, dtype), weight, added).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [weight.detach().cpu()]

    torch.backends.cudnn.allow_tf32 = False
    with gdfast.backend(backend):
        make = partial(optim.SGD, in_backward=True, master_weights=dtype == torch.bfloat16)
        ours = run(make, dtype, device, ops.conv2d)
    exact = run(torch.optim.SGD, torch.float64, "cpu", F.conv2d)
    return list(zip(ours, exact, strict=True))
