"""Batch normalisation with residual and activation, forward: three kernels.

    y = act((x - mean[c]) * invstd[c] * w[c] + b[c] + residual), invstd = 1 / sqrt(var + eps)

1. `moments_kernel`: mean and sum of squared deviations, one program for BLOCK_N channels and a
   split of the ROWS = N * H * W values of each. Every lane keeps its own by Welford's update; they
   are joined at the end by Chan's formula, which loses nothing to a large mean.
2. `statistics_kernel`: joins the splits, and moves the running statistics; PARTS is the next power
   of 2 to the number of splits.
3. `normalise_kernel`: one pass from x to y, a tile of BLOCK_M rows by BLOCK_N channels each.

Source: Chan, Golub and LeVeque, 1979, "Updating formulae and a pairwise algorithm".
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import activate

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = ("rows", "rows_per_split", "splits")


@triton.jit
def offsets(row, c, C, HW, LAST: tl.constexpr):
    """Where the elements of rows (n, h, w) and channels lie in channels_last or NCHW."""
    if LAST:
        at = (row * C)[:, None] + c[None, :]
    else:
        at = (row // HW * C * HW + row % HW)[:, None] + (c * HW)[None, :]
    return at


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    x, partial, rows, rows_per_split, C, HW,
    LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    split = tl.program_id(1)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    row = first + tl.arange(0, BLOCK_M)
    count = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(tl.cdiv(last - first, BLOCK_M)):
        here = row < last
        mask = here[:, None] & exists[None, :]
        value = tl.load(x + offsets(row, c, C, HW, LAST), mask=mask, other=0.0).to(tl.float32)
        count += here.to(tl.float32)
        away = tl.where(mask, value - mean, 0.0)
        mean += away * (1.0 / tl.maximum(count, 1.0))[:, None]
        squares += away * (value - mean)
        row += BLOCK_M
    total = (last - first).to(tl.float32)
    joint = tl.sum(mean * count[:, None], axis=0) / total
    away = mean - joint[None, :]
    spread = tl.sum(squares + away * away * count[:, None], axis=0)
    tl.store(partial + split * 2 * C + c, joint, mask=exists)
    tl.store(partial + (split * 2 + 1) * C + c, spread, mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def statistics_kernel(
    partial, mean, invstd, running_mean, running_var, momentum,
    rows, rows_per_split, splits, C, eps,
    RUNNING: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    split = tl.arange(0, PARTS)
    mask = (split < splits)[:, None] & exists[None, :]
    first = split * rows_per_split
    count = tl.where(split < splits, tl.minimum(rows_per_split, rows - first), 0).to(tl.float32)
    at = (split * 2 * C)[:, None] + c[None, :]
    means = tl.load(partial + at, mask=mask, other=0.0)
    # As deviations from the first split's mean, so that a large one costs no digits.
    some = tl.load(partial + c, mask=exists, other=0.0)
    total = rows.to(tl.float32)
    away = tl.where(mask, means - some[None, :], 0.0)
    joint = some + tl.sum(away * count[:, None], axis=0) / total
    away = tl.where(mask, means - joint[None, :], 0.0)
    squares = tl.load(partial + C + at, mask=mask, other=0.0) + away * away * count[:, None]
    squares = tl.sum(squares, axis=0)
    tl.store(mean + c, joint, mask=exists)
    tl.store(invstd + c, 1.0 / tl.sqrt_rn(squares / total + eps), mask=exists)
    if RUNNING:
        unbiased = squares / (rows - 1).to(tl.float32)
        old = tl.load(running_mean + c, mask=exists, other=0.0).to(tl.float32)
        new = (1.0 - momentum) * old + momentum * joint
        tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=exists)
        old = tl.load(running_var + c, mask=exists, other=0.0).to(tl.float32)
        new = (1.0 - momentum) * old + momentum * unbiased
        tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=exists)


@triton.jit
def normalised(x, c, exists, mean, invstd):
    """(x - mean) * invstd of a tile."""
    m = tl.load(mean + c, mask=exists, other=0.0)
    s = tl.load(invstd + c, mask=exists, other=0.0)
    return (x.to(tl.float32) - m[None, :]) * s[None, :]


@triton.jit
def scaled(value, c, exists, w, b, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """value * w + b of a tile."""
    if WEIGHT:
        value = value * tl.load(w + c, mask=exists, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        value = value + tl.load(b + c, mask=exists, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit(do_not_specialize=_SIZES)
def normalise_kernel(
    x, w, b, residual, mean, invstd, y, rows, C, HW, slope,
    LAST: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(C, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    mask = (row < rows)[:, None] & exists[None, :]
    at = offsets(row, c, C, HW, LAST)
    value = normalised(tl.load(x + at, mask=mask, other=0.0), c, exists, mean, invstd)
    value = scaled(value, c, exists, w, b, WEIGHT, BIAS)
    if RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    value = activate(value, slope, ACTIVATION)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
