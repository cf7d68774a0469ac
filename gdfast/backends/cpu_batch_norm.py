"""Batch normalisation with residual and activation on the CPU: kernels as `batch_norm` has them."""

from __future__ import annotations

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import memory, plans
from gdfast.backends.batch_norm import (
    Backward,
    Forward,
    Wanted,
    address,
    laid_out,
    packed,
    problem_of,
    running_written,
    sum_dtype,
)
from gdfast.backends.registry import BatchNormQuery


def forward(query: BatchNormQuery) -> Forward:
    """The CPU kernel for one shape; input has the strides of the query."""
    assert native.cpu is not None
    run, problem = native.cpu.batch_norm, problem_of(query, native.cpu)
    training = query.training
    new_output = memory.allocator(query.size, query.strides, query.dtype)
    new_statistic = memory.allocator(query.size[1:2], (1,), sum_dtype(query.dtype))

    def kernel(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, residual: Tensor | None, momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        output, mean, invstd = new_output(), new_statistic(), new_statistic()
        if residual is not None:
            residual = laid_out(residual, query)
        weight, bias = packed(weight), packed(bias)
        packed_mean, packed_var = packed(running_mean), packed(running_var)
        run(
            problem, input.data_ptr(), address(weight), address(bias), address(packed_mean),
            address(packed_var), address(residual), output.data_ptr(), mean.data_ptr(),
            invstd.data_ptr(), training, momentum, torch.get_num_threads(),
        )  # fmt: skip
        if training:
            running_written(running_mean, running_var, packed_mean, packed_var)
        return output, mean, invstd

    def draft(plan: plans.Draft, *tensors: int) -> tuple[int, int, int]:
        """Tensors as in a call, with the counter of batches behind them."""
        *of_norm, residual, batches = tensors
        results = plan.fresh(new_output), plan.fresh(new_statistic), plan.fresh(new_statistic)
        plan.launch(launch, *of_norm, residual, *results, plans.NONE, batches)
        return results

    launch = native.cpu.batch_norm_launch(problem, training)
    told = (problem,) if _may_join(query) else ()
    return plans.drafted(kernel, draft, *told)


def backward(query: BatchNormQuery) -> Backward:
    """The CPU kernel for the gradients; input has the strides of the query."""
    assert native.cpu is not None
    run, problem = native.cpu.batch_norm_backward, problem_of(query, native.cpu)
    training, pre_activation = query.training, query.pre_activation
    hands_on = query.activation == "none"
    new_image = memory.allocator(query.size, query.strides, query.dtype)
    new_param = memory.allocator(query.size[1:2], (1,), query.param_dtype)

    def kernel(
        grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        other: Tensor | None, mean: Tensor, invstd: Tensor, wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        want_input, want_weight, want_bias, want_residual = wanted
        grad = laid_out(grad_output, query)
        grad_input = new_image() if want_input else None
        grad_weight = new_param() if want_weight else None
        grad_bias = new_param() if want_bias else None
        grad_residual = new_image() if want_residual and not hands_on else None
        if other is not None:
            other = laid_out(other, query)
        weight, bias = packed(weight), packed(bias)
        run(
            problem, grad.data_ptr(), input.data_ptr(), address(other), address(weight),
            address(bias), mean.data_ptr(), invstd.data_ptr(), address(grad_input),
            address(grad_weight), address(grad_bias), address(grad_residual), training,
            pre_activation, torch.get_num_threads(),
        )  # fmt: skip
        if want_residual and hands_on:
            grad_residual = grad_output
        return grad_input, grad_weight, grad_bias, grad_residual

    def draft(plan: plans.Draft, *tensors: int, wanted: Wanted) -> list[int]:
        makers = new_image, new_param, new_param, new_image
        *params, wants_residual = wanted
        written = *params, wants_residual and not hands_on
        grads = [
            plan.fresh(make) if wants else plans.NONE
            for make, wants in zip(makers, written, strict=True)
        ]
        plan.launch(launch, *tensors, *grads)
        return [*grads[:3], tensors[0]] if wants_residual and hands_on else grads

    launch = native.cpu.batch_norm_backward_launch(problem, training, pre_activation)
    told = (problem, pre_activation) if _may_join(query) else ()
    return plans.drafted(kernel, draft, *told)


def _may_join(query: BatchNormQuery) -> bool:
    """Whether a convolution in front may run with it as one kernel: see `cpu_conv2d_norm`."""
    return query.training and query.channels_last and query.dtype == torch.float32
