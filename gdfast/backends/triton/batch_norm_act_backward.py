"""Batch normalisation with residual and activation, backward: three kernels.

    g = dy * act'(z), u = (x - mean[c]) * invstd[c]
    db[c] = sum of g, dw[c] = sum of g * u, dresidual = g
    dx = (g - db[c] / ROWS - u * dw[c] / ROWS) * invstd[c] * w[c]      in evaluation g * invstd * w

z, the activation's argument, is computed again from x (and the residual), or the output stands in
for it where its sign and limits tell as much.

1. `sums_kernel`: both sums, one program for BLOCK_N channels and a split of the rows.
2. `parameters_kernel`: adds the splits up.
3. `gradients_kernel`: one pass from dy and x to dx and dresidual.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.batch_norm_act import normalised, offsets, scaled
from gdfast.backends.triton.parts import activation_gradient

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = ("rows", "rows_per_split", "splits")


@triton.jit
def before_activation(
    y, u, w, b, other, at, mask, c, exists, slope,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """g of a tile; OTHER says what `other` is: "residual", "output" or nothing ("input")."""
    g = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        if OTHER == "output":
            z = tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
        else:
            z = scaled(u, c, exists, w, b, WEIGHT, BIAS)
            if OTHER == "residual":
                z += tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
        g = activation_gradient(g, z, slope, ACTIVATION)
    return g


@triton.jit(do_not_specialize=_SIZES)
def sums_kernel(
    y, x, w, b, other, mean, invstd, partial, rows, rows_per_split, C, HW, slope,
    LAST: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    split = tl.program_id(1)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    row = first + tl.arange(0, BLOCK_M)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(tl.cdiv(last - first, BLOCK_M)):
        mask = (row < last)[:, None] & exists[None, :]
        at = offsets(row, c, C, HW, LAST)
        u = normalised(tl.load(x + at, mask=mask, other=0.0), c, exists, mean, invstd)
        g = before_activation(
            y, u, w, b, other, at, mask, c, exists, slope, WEIGHT, BIAS, OTHER, ACTIVATION
        )
        # An infinite mean makes u a NaN where there is no row.
        sums += g
        products += tl.where(mask, g * u, 0.0)
        row += BLOCK_M
    tl.store(partial + split * 2 * C + c, tl.sum(sums, axis=0), mask=exists)
    tl.store(partial + (split * 2 + 1) * C + c, tl.sum(products, axis=0), mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def parameters_kernel(
    partial, sums, grad_weight, grad_bias, splits, C,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    split = tl.arange(0, PARTS)
    mask = (split < splits)[:, None] & exists[None, :]
    at = (split * 2 * C)[:, None] + c[None, :]
    g = tl.sum(tl.load(partial + at, mask=mask, other=0.0), axis=0)
    gu = tl.sum(tl.load(partial + C + at, mask=mask, other=0.0), axis=0)
    tl.store(sums + c, g, mask=exists)
    tl.store(sums + C + c, gu, mask=exists)
    if WEIGHT:
        tl.store(grad_weight + c, gu.to(grad_weight.dtype.element_ty), mask=exists)
    if BIAS:
        tl.store(grad_bias + c, g.to(grad_bias.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def gradients_kernel(
    y, x, w, b, other, mean, invstd, sums, grad_input, grad_residual, rows, C, HW, slope,
    LAST: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr,
    ACTIVATION: tl.constexpr, TRAINING: tl.constexpr, INPUT: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(C, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    mask = (row < rows)[:, None] & exists[None, :]
    at = offsets(row, c, C, HW, LAST)
    u = normalised(tl.load(x + at, mask=mask, other=0.0), c, exists, mean, invstd)
    g = before_activation(
        y, u, w, b, other, at, mask, c, exists, slope, WEIGHT, BIAS, OTHER, ACTIVATION
    )
    if RESIDUAL:
        tl.store(grad_residual + at, g.to(grad_residual.dtype.element_ty), mask=mask)
    if INPUT:
        if TRAINING:
            count = rows.to(tl.float32)
            g -= (tl.load(sums + c, mask=exists, other=0.0) / count)[None, :]
            g -= u * (tl.load(sums + C + c, mask=exists, other=0.0) / count)[None, :]
        factor = tl.load(invstd + c, mask=exists, other=0.0)
        if WEIGHT:
            factor *= tl.load(w + c, mask=exists, other=0.0).to(tl.float32)
        tl.store(grad_input + at, (g * factor[None, :]).to(grad_input.dtype.element_ty), mask=mask)
