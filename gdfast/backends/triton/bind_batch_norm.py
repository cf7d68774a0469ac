"""The kernels of one batch normalisation: for a size and settings, functions of tensors.

All tensors of the input's size lie in memory as it does, without gaps; those of [C] are one stretch
of memory each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from gdfast.backends.triton import batch_norm_act, batch_norm_act_backward, launch
from gdfast.backends.triton.launch import Launch, channel_tile, power_of_2

_PROGRAMS = 8  # of sums for each multiprocessor: so many loads at a time keep memory busy
_MOST_SPLITS = 1024
_BLOCK_C = 8  # channels of one program of the kernels that join splits


@dataclass(frozen=True)
class Problem:
    """One batch normalisation of [N, C, H, W]; `other` is what backward finds act's argument by."""

    size: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    param_dtype: torch.dtype
    device: torch.device
    training: bool
    eps: float
    activation: str
    negative_slope: float
    other: str

    @property
    def rows(self) -> int:
        N, _, H, W = self.size
        return N * H * W

    @property
    def sizes(self) -> tuple[int, int]:
        _, C, H, W = self.size
        return C, H * W

    def tile(self) -> tuple[int, int]:
        """Rows and channels of one program."""
        return channel_tile(self.size[1], self.channels_last)

    def split(self) -> tuple[int, int, int]:
        """Tiles of channels, rows of one split and the number of splits."""
        m, n = self.tile()
        tiles = ceil(self.size[1] / n)
        programs = _PROGRAMS * launch.gpu(self.device).multiprocessors
        wanted = max(1, min(programs // tiles, self.rows // (4 * m), _MOST_SPLITS))
        rows_per_split = ceil(self.rows / wanted)
        return tiles, rows_per_split, ceil(self.rows / rows_per_split)


def bind_forward(
    problem: Problem, weight: bool, bias: bool, residual: bool, running: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(input, weight, bias, residual, running_mean, running_var, momentum) -> (output, mean,
    invstd); the booleans tell which tensors are not None."""
    C, HW = problem.sizes
    rows, device = problem.rows, problem.device
    m, n = problem.tile()
    tiles, rows_per_split, splits = problem.split()
    layout = {"LAST": problem.channels_last}
    blocks = {"BLOCK_M": m, "BLOCK_N": n}
    moments = Launch(
        batch_norm_act.moments_kernel, (tiles, splits), device, (rows, rows_per_split, C, HW),
        {**layout, **blocks},
    )  # fmt: skip
    normalise = Launch(
        batch_norm_act.normalise_kernel, (ceil(rows / m) * tiles,), device,
        (rows, C, HW, problem.negative_slope),
        {**layout, "WEIGHT": weight, "BIAS": bias, "RESIDUAL": residual,
         "ACTIVATION": problem.activation, **blocks},
    )  # fmt: skip
    statistics = Launch(
        batch_norm_act.statistics_kernel, (ceil(C / _BLOCK_C),), device,
        (rows, rows_per_split, splits, C, problem.eps),
        {"RUNNING": running, "PARTS": power_of_2(splits), "BLOCK_N": _BLOCK_C},
    )  # fmt: skip

    def kernel(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        output = torch.empty_like(input)
        if problem.training:
            mean, invstd = input.new_empty((2, C), dtype=torch.float32)
            partial = input.new_empty(splits * 2 * C, dtype=torch.float32)
            moments(input, partial)
            # A tensor that is not read stands for one that is not there.
            statistics(
                partial, mean, invstd, mean if running_mean is None else running_mean,
                mean if running_var is None else running_var, changing=(float(momentum),),
            )  # fmt: skip
        else:
            assert running_mean is not None and running_var is not None
            mean = running_mean.to(torch.float32, copy=True)
            invstd = (running_var.to(torch.float32) + problem.eps).rsqrt()
        normalise(
            input, mean if weight is None else weight, mean if bias is None else bias,
            input if residual is None else residual, mean, invstd, output,
        )  # fmt: skip
        return output, mean, invstd

    return kernel


def bind_backward(
    problem: Problem, weight: bool, bias: bool, wanted: tuple[bool, bool, bool, bool]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """(grad_output, input, weight, bias, other, mean, invstd) -> the gradients of input, weight,
    bias and residual, None where not wanted; the booleans tell which tensors are not None."""
    want_input, want_weight, want_bias, want_residual = wanted
    C, HW = problem.sizes
    rows, device, param_dtype = problem.rows, problem.device, problem.param_dtype
    m, n = problem.tile()
    tiles, rows_per_split, splits = problem.split()
    settings = {
        "LAST": problem.channels_last, "WEIGHT": weight, "BIAS": bias, "OTHER": problem.other,
        "ACTIVATION": problem.activation,
    }  # fmt: skip
    blocks = {"BLOCK_M": m, "BLOCK_N": n}
    slope = problem.negative_slope
    kernels = batch_norm_act_backward
    sum_up = Launch(
        kernels.sums_kernel, (tiles, splits), device, (rows, rows_per_split, C, HW, slope),
        {**settings, **blocks},
    )  # fmt: skip
    finish = Launch(
        kernels.parameters_kernel, (ceil(C / _BLOCK_C),), device, (splits, C),
        {"WEIGHT": want_weight, "BIAS": want_bias, "PARTS": power_of_2(splits),
         "BLOCK_N": _BLOCK_C},
    )  # fmt: skip
    spread = Launch(
        kernels.gradients_kernel, (ceil(rows / m) * tiles,), device, (rows, C, HW, slope),
        {**settings, "TRAINING": problem.training, "INPUT": want_input, "RESIDUAL": want_residual,
         **blocks},
    )  # fmt: skip
    need_sums = want_weight or want_bias or (want_input and problem.training)

    def kernel(
        grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        other: Tensor | None, mean: Tensor, invstd: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        # A tensor that is not read or written stands for one that is not there.
        w, b = mean if weight is None else weight, mean if bias is None else bias
        z = input if other is None else other
        grad_weight = input.new_empty(C, dtype=param_dtype) if want_weight else None
        grad_bias = input.new_empty(C, dtype=param_dtype) if want_bias else None
        sums = mean
        if need_sums:
            sums = input.new_empty(2 * C, dtype=torch.float32)
            partial = input.new_empty(splits * 2 * C, dtype=torch.float32)
            sum_up(grad_output, input, w, b, z, mean, invstd, partial)
            finish(
                partial, sums, sums if grad_weight is None else grad_weight,
                sums if grad_bias is None else grad_bias,
            )  # fmt: skip
        grad_input = torch.empty_like(input) if want_input else None
        grad_residual = torch.empty_like(input) if want_residual else None
        if want_input or want_residual:
            spread(
                grad_output, input, w, b, z, mean, invstd, sums,
                input if grad_input is None else grad_input,
                input if grad_residual is None else grad_residual,
            )  # fmt: skip
        return grad_input, grad_weight, grad_bias, grad_residual

    return kernel
