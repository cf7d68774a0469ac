"""Max pooling on the CPU, CUDA and Triton kernels and on native PyTorch's operators.

argmax says where in its window each value was: r * S + s in uint8, or in int32 for windows of more
than 255 places, with all bits set where no value was taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_stream, memory, plans
from gdfast.backends.registry import Query
from gdfast.geometry import MaxPool2dGeometry

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

_MOST = 2**31 - 2**16  # offsets of 32 bits, with room for a step beyond the end
_NOWHERE = {torch.uint8: 255, torch.int32: -1}


@dataclass(frozen=True, kw_only=True)
class MaxPool2dQuery(Query):
    """The query of a max pooling or of its gradient.

    `strides` are the element strides of input, output and argmax, or of the gradients that take
    their places; `relu` sets values below 0 to 0 and lets no gradient through there.
    """

    geometry: MaxPool2dGeometry
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    relu: bool


def place_dtype(geometry: MaxPool2dGeometry) -> torch.dtype:
    """The dtype of argmax."""
    return torch.uint8 if geometry.R * geometry.S <= 255 else torch.int32


def nowhere(argmax: Tensor) -> int:
    """What argmax holds where no value was taken."""
    return _NOWHERE[argmax.dtype]


def problem(query: MaxPool2dQuery, kernels: Any) -> Any:
    """The description of a query that a compiled module takes."""
    g = query.geometry
    # A step over nothing may be larger than memory. Kernels get that of windows side by side.
    stride = g.R if g.P == 1 else g.stride[0], g.S if g.Q == 1 else g.stride[1]
    dilation = 1 if g.R == 1 else g.dilation[0], 1 if g.S == 1 else g.dilation[1]
    return kernels.MaxPool2dProblem(
        (g.N, g.C, g.H, g.W, g.R, g.S, g.P, g.Q), stride, g.padding, dilation,
        DTYPES[query.dtype], *query.strides, query.relu,
    )  # fmt: skip


def cpu(query: MaxPool2dQuery) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    assert native.cpu is not None
    made, run = problem(query, native.cpu), native.cpu.max_pool2d
    size, (_, strides, place_strides) = query.geometry.output_size, query.strides
    new_output = memory.allocator(size, strides, query.dtype)
    new_argmax = memory.allocator(size, place_strides, place_dtype(query.geometry))

    def kernel(input: Tensor) -> tuple[Tensor, Tensor]:
        output, argmax = new_output(), new_argmax()
        run(made, input.data_ptr(), output.data_ptr(), argmax.data_ptr(), torch.get_num_threads())
        return output, argmax

    draft = _draft(native.cpu.max_pool2d_launch(made), new_output, new_argmax)
    return plans.drafted(kernel, draft)


def _draft(launch: Any, *results: Callable[[], Tensor]) -> Callable[..., list[int]]:
    """The draft of a launch that writes these, behind the tensors that it reads."""

    def draft(plan: plans.Draft, *tensors: int) -> list[int]:
        made = [plan.fresh(each) for each in results]
        plan.launch(launch, *tensors, *made)
        return made

    return draft


def cpu_grad(query: MaxPool2dQuery) -> Callable[[Tensor, Tensor], Tensor]:
    assert native.cpu is not None
    made, run = problem(query, native.cpu), native.cpu.max_pool2d_grad
    new_grad_input = memory.allocator(query.geometry.input_size, query.strides[0], query.dtype)

    def kernel(grad_output: Tensor, argmax: Tensor) -> Tensor:
        grad_input = new_grad_input()
        run(
            made, grad_output.data_ptr(), argmax.data_ptr(), grad_input.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_input

    draft = _draft(native.cpu.max_pool2d_grad_launch(made), new_grad_input)
    return plans.drafted(kernel, draft)


def cuda_why_not(query: MaxPool2dQuery) -> str:
    """Why the CUDA kernels do not take it, or ""."""
    g, (x, *outputs) = query.geometry, query.strides
    padded = g.C, g.H + 2 * g.padding[0], g.W + 2 * g.padding[1]
    sizes = padded, *[g.output_size[1:]] * len(outputs)
    # Offsets within an image have 32 bits.
    for size, strides in zip(sizes, (x, *outputs), strict=True):
        if max(prod(size), sum(n * s for n, s in zip(size, strides[1:], strict=True))) > _MOST:
            return "it takes images of less than 2^31 elements"
    return ""


def cuda(query: MaxPool2dQuery) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    assert native.cuda is not None
    made, run = problem(query, native.cuda), native.cuda.max_pool2d
    size, (_, strides, place_strides) = query.geometry.output_size, query.strides
    dtype, places, device = query.dtype, place_dtype(query.geometry), query.device
    new_output = partial(torch.empty_strided, size, strides, dtype=dtype, device=device)
    new_argmax = partial(torch.empty_strided, size, place_strides, dtype=places, device=device)

    def kernel(input: Tensor) -> tuple[Tensor, Tensor]:
        output, argmax = new_output(), new_argmax()
        run(
            made, input.data_ptr(), output.data_ptr(), argmax.data_ptr(),
            *cuda_stream.current(device),
        )  # fmt: skip
        return output, argmax

    draft = _draft(native.cuda.max_pool2d_launch(made), new_output, new_argmax)
    return plans.drafted(kernel, draft, on_gpu=True)


def cuda_grad(query: MaxPool2dQuery) -> Callable[[Tensor, Tensor], Tensor]:
    assert native.cuda is not None
    made, run = problem(query, native.cuda), native.cuda.max_pool2d_grad
    size, strides, device = query.geometry.input_size, query.strides[0], query.device
    new_grad_input = partial(torch.empty_strided, size, strides, dtype=query.dtype, device=device)

    def kernel(grad_output: Tensor, argmax: Tensor) -> Tensor:
        grad_input = new_grad_input()
        run(
            made, grad_output.data_ptr(), argmax.data_ptr(), grad_input.data_ptr(),
            *cuda_stream.current(device),
        )  # fmt: skip
        return grad_input

    draft = _draft(native.cuda.max_pool2d_grad_launch(made), new_grad_input)
    return plans.drafted(kernel, draft, on_gpu=True)


def triton(query: MaxPool2dQuery) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    from gdfast.backends.triton.bind_max_pool2d import bind_forward

    places = place_dtype(query.geometry)
    return bind_forward(
        query.geometry, query.strides, query.relu, places, _NOWHERE[places], query.device
    )


def triton_grad(query: MaxPool2dQuery) -> Callable[[Tensor, Tensor], Tensor]:
    from gdfast.backends.triton.bind_max_pool2d import bind_grad

    nowhere = _NOWHERE[place_dtype(query.geometry)]
    return bind_grad(query.geometry, query.strides, nowhere, query.device)


def indices(argmax: Tensor, geometry: MaxPool2dGeometry) -> tuple[Tensor, Tensor]:
    """Native's indices for argmax, into the flat image, and where there are any (else 0)."""
    g, device = geometry, argmax.device
    taken = argmax != nowhere(argmax)
    place = argmax.long()
    h = torch.arange(g.P, device=device).view(-1, 1) * g.stride[0] - g.padding[0]
    w = torch.arange(g.Q, device=device) * g.stride[1] - g.padding[1]
    h = h + place.div(g.S, rounding_mode="floor") * g.dilation[0]
    w = w + place.remainder(g.S) * g.dilation[1]
    return torch.where(taken, h * g.W + w, 0), taken


def reference(query: MaxPool2dQuery) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    g, (_, strides, place_strides) = query.geometry, query.strides

    def kernel(input: Tensor) -> tuple[Tensor, Tensor]:
        value, index = torch.ops.aten.max_pool2d_with_indices.default(
            input, [g.R, g.S], g.stride, g.padding, g.dilation, g.ceil_mode
        )
        h = torch.arange(g.P, device=input.device).view(-1, 1) * g.stride[0] - g.padding[0]
        w = torch.arange(g.Q, device=input.device) * g.stride[1] - g.padding[1]
        r = (index.div(g.W, rounding_mode="floor") - h).div(g.dilation[0], rounding_mode="floor")
        s = (index.remainder(g.W) - w).div(g.dilation[1], rounding_mode="floor")
        argmax = (r * g.S + s).to(place_dtype(g))
        if query.relu:
            argmax = argmax.masked_fill(value <= 0, nowhere(argmax))
            value = value.clamp_min(0)
        return laid_out(value, strides), laid_out(argmax, place_strides)

    return kernel


def reference_grad(query: MaxPool2dQuery) -> Callable[[Tensor, Tensor], Tensor]:
    g, strides = query.geometry, query.strides[0]

    def kernel(grad_output: Tensor, argmax: Tensor) -> Tensor:
        index, taken = indices(argmax, g)
        grads = torch.where(taken, grad_output, 0).reshape(g.N, g.C, g.P * g.Q)
        zeros = torch.zeros((g.N, g.C, g.H * g.W), dtype=grads.dtype, device=grads.device)
        summed = zeros.scatter_add(2, index.reshape(grads.shape), grads)
        return laid_out(summed.view(g.input_size), strides)

    return kernel


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor in the layout that fake kernels promise."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)
