"""Our CPU kernels: checks that they take a query, allocates the result and passes pointers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import (
    cpu_algorithms,
    cpu_batch_norm,
    fused_pool,
    max_pool2d,
    memory,
    plans,
    sgd,
)
from gdfast.backends.precision import is_strict
from gdfast.backends.registry import Backend, Conv2dActQuery, Conv2dQuery, Query

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def why_not(query: Query) -> str:
    if query.device.type != "cpu":
        return f"it takes tensors on the CPU, not on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"it takes {', '.join(_DTYPES.values())}, not {query.dtype}"
    if query.layout is not torch.strided:
        return f"it takes dense tensors, not {query.layout}"
    if isinstance(query, Conv2dQuery) and query.geometry.C == 0:
        return "it takes at least one input channel"
    return ""


# Strides belong to the problem: kernels read any layout in place.
@lru_cache(maxsize=4096)
def _problem(query: Conv2dQuery, algorithm: str) -> Any:
    assert native.cpu is not None
    g = query.geometry
    # A step over nothing may be larger than memory: kernels get 1 in its place.
    stride = _steps(g.stride, (g.P, g.Q))
    dilation = _steps(g.dilation, (g.R, g.S))
    ending: tuple[Any, ...] = ()
    if isinstance(query, Conv2dActQuery):
        ending = query.activation, query.negative_slope
    return native.cpu.Conv2dProblem(
        (g.N, g.C, g.H, g.W, g.K, g.R, g.S, g.P, g.Q), stride, g.padding[:2], dilation,
        g.groups, _DTYPES[query.dtype], *query.strides, algorithm, *ending,
    )  # fmt: skip


def _steps(steps: tuple[int, int], counts: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (1 if n == 1 else step for step, n in zip(steps, counts, strict=True))
    return rows, columns


def algorithm(op: str, query: Conv2dQuery) -> str:
    """The algorithm that the cost model gives one pass in the precision that is set now."""
    assert native.cpu is not None
    if is_strict():
        return cpu_algorithms.DIRECT
    return cpu_algorithms.predicted(op, query, native.cpu.isa())


def candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    """The algorithms that may run one pass in the precision that is set now."""
    return cpu_algorithms.candidates(op, query, is_strict())


def machine(query: Conv2dQuery) -> str:
    """What times of the query hold for, beside the query itself."""
    assert native.cpu is not None
    return f"{native.cpu.isa()} threads={torch.get_num_threads()}"


# Each pass is run by the algorithm that is named, or by the cost model's. Forward ends with the
# activation that the query has, if any.
def conv2d(query: Conv2dQuery, by: str = "") -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    assert native.cpu is not None
    problem, run = _problem(query, by or algorithm("conv2d", query)), native.cpu.conv2d
    new_output = memory.allocator(query.geometry.output_size, query.strides[2], query.dtype)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = new_output()
        if bias is not None:
            bias = bias.contiguous()
        run(
            problem, input.data_ptr(), weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), output.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return output

    def draft(plan: plans.Draft, input: int, weight: int, bias: int) -> int:
        output = plan.fresh(new_output)
        plan.launch(launch, input, weight, bias, output)
        return output

    launch = native.cpu.conv2d_launch(problem)
    return plans.drafted(kernel, draft, problem)


def conv2d_grad_input(query: Conv2dQuery, by: str = "") -> Callable[[Tensor, Tensor], Tensor]:
    assert native.cpu is not None
    problem = _problem(query, by or algorithm("conv2d_grad_input", query))
    run = native.cpu.conv2d_grad_input
    new_grad_input = memory.allocator(query.geometry.input_size, query.strides[0], query.dtype)

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = new_grad_input()
        run(
            problem, grad_output.data_ptr(), weight.data_ptr(),
            grad_input.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_input

    def draft(plan: plans.Draft, grad_output: int, weight: int, onto: int = plans.NONE) -> int:
        """`onto` is what the gradient is added to, in its place, where `adds` says so."""
        grad_input = plan.fresh(new_grad_input) if onto == plans.NONE else onto
        plan.launch(launch if onto == plans.NONE else adding, grad_output, weight, grad_input)
        return grad_input

    launch = native.cpu.conv2d_grad_input_launch(problem)
    adding = native.cpu.conv2d_grad_input_launch(problem, True)
    kernel.adds = native.cpu.conv2d_adds(problem)  # type: ignore[attr-defined]
    return plans.drafted(kernel, draft, problem)


def conv2d_grad_weight(
    query: Conv2dQuery, by: str = ""
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    assert native.cpu is not None
    problem = _problem(query, by or algorithm("conv2d_grad_weight", query))
    run = native.cpu.conv2d_grad_weight
    size, dtype = query.geometry.weight_size, query.dtype
    new_grad_weight = memory.allocator(size, query.strides[1], dtype)
    new_grad_bias = memory.allocator(size[:1], (1,), dtype)

    def kernel(grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        grad_weight = new_grad_weight()
        grad_bias = new_grad_bias() if bias else None
        run(
            problem, grad_output.data_ptr(), input.data_ptr(),
            grad_weight.data_ptr(), 0 if grad_bias is None else grad_bias.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_weight, grad_bias

    def draft(plan: plans.Draft, grad_output: int, input: int, bias: bool) -> tuple[int, int]:
        grad_weight = plan.fresh(new_grad_weight)
        grad_bias = plan.fresh(new_grad_bias) if bias else plans.NONE
        plan.launch(launch, grad_output, input, grad_weight, grad_bias)
        return grad_weight, grad_bias

    launch = native.cpu.conv2d_grad_weight_launch(problem)
    return plans.drafted(kernel, draft, problem)


def joins_norm(op: str, query: Conv2dQuery) -> bool:
    """Whether one of our passes and a batch normalisation behind the convolution run as one kernel:
    see `cpu_conv2d_norm`.
    """
    assert native.cpu is not None
    problem = _problem(query, cpu_algorithms.DIRECT)
    fits: bool = native.cpu.conv2d_norm_fits(problem, op != "conv2d", torch.get_num_threads())
    return fits


def missing() -> str:
    return "" if native.cpu is not None else f"gdfast._cpu: {native.failure('cpu')}"


BACKEND = Backend(
    name="cpu",
    operations={
        "batch_norm_act": cpu_batch_norm.forward,
        "batch_norm_act_backward": cpu_batch_norm.backward,
        "conv2d": conv2d,
        "conv2d_act": conv2d,
        "conv2d_grad_input": conv2d_grad_input,
        "conv2d_grad_weight": conv2d_grad_weight,
        "conv2d_relu_max_pool2d": fused_pool.cpu,
        "conv2d_relu_max_pool2d_grad_weight": fused_pool.cpu_grad_weight,
        "max_pool2d": max_pool2d.cpu,
        "max_pool2d_grad": max_pool2d.cpu_grad,
        "sgd_": sgd.cpu,
    },
    missing=missing,
    why_not=why_not,
)
