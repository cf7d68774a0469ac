"""conv2d, forward:

    y[n, k, p, q] = act(b[k] + sum over c, r, s of w[k, c, r, s] * x[n, c, h, w])
    h = p * stride_h - pad_h + r * dilation_h, w likewise; x is 0 outside of the image

A matrix product whose left operand is never stored: N * P * Q positions by K filters, over
R * S * C products. One program makes BLOCK_M positions by BLOCK_N filters of one group. It walks
through the taps (r, s) and within each through the channels, BLOCK_K at a time, as one loop, which
Triton pipelines. Where a position reads its pixel is computed before the loop for tap (0, 0); other
taps add one number to all, and each position has one mask. Few channels (FOLD) are taken together
with the taps, so that BLOCK_K is not mostly padding.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import activate, grouped_tile, inside

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "rows", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def conv2d_kernel(
    x, w, b, y,
    rows, C, K, H, W, P, Q, R, S,  # rows = N * P * Q; C and K are those of one group
    x_n, x_c, x_h, x_w, w_k, w_c, w_r, w_s, y_n, y_k, y_p, y_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, slope,
    PADDED: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(K, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = grouped_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)

    # What lies past the end reads what the last one reads, and is not stored.
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    position = tl.minimum(row, rows - 1)
    n, p, q = position // (P * Q), position // Q % P, position % Q
    h0, w0 = p * stride_h - pad_h, q * stride_w - pad_w
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = group * K + tl.minimum(column, K - 1)
    x_row = n * x_n + h0 * x_h + w0 * x_w + group * C * x_c
    y_row = n * y_n + p * y_p + q * y_q
    j = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    if FOLD:
        for first in range(0, R * S * C, BLOCK_K):
            product = first + j
            r, s, c = product // (S * C), product // C % S, product % C
            exists = product < R * S * C
            mask = exists[None, :]
            if PADDED:
                mask &= inside(h0[:, None] + (r * dilation_h)[None, :], H)
                mask &= inside(w0[:, None] + (s * dilation_w)[None, :], W)
            x_at = r * dilation_h * x_h + s * dilation_w * x_w + c * x_c
            w_at = r * w_r + s * w_s + c * w_c
            pixels = tl.load(x + x_row[:, None] + x_at[None, :], mask=mask, other=0.0)
            weights = tl.load(
                w + w_at[:, None] + (k * w_k)[None, :], mask=exists[:, None], other=0.0
            )
            if UPCAST:
                pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
            sums = tl.dot(pixels, weights, sums, input_precision=PRECISION)
    else:
        x_rows = x + x_row[:, None] + (j * x_c)[None, :]
        w_columns = w + (j * w_c)[:, None] + (k * w_k)[None, :]
        r, s, c = 0, 0, 0
        for _ in range(R * S * tl.cdiv(C, BLOCK_K)):
            x_tile = x_rows + (r * dilation_h * x_h + s * dilation_w * x_w + c * x_c)
            w_tile = w_columns + (r * w_r + s * w_s + c * w_c)
            exists = j < C - c
            mask = tl.full((BLOCK_M,), True, tl.int1)
            if PADDED:
                mask = inside(h0 + r * dilation_h, H) & inside(w0 + s * dilation_w, W)
            if not EVEN:
                pixels = tl.load(x_tile, mask=mask[:, None] & exists[None, :], other=0.0)
                weights = tl.load(w_tile, mask=exists[:, None], other=0.0)
            elif PADDED:
                pixels = tl.load(x_tile, mask=mask[:, None], other=0.0)
                weights = tl.load(w_tile)
            else:
                pixels, weights = tl.load(x_tile), tl.load(w_tile)
            if UPCAST:
                pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
            sums = tl.dot(pixels, weights, sums, input_precision=PRECISION)
            c += BLOCK_K
            s += (c >= C).to(tl.int32)
            c = tl.where(c >= C, 0, c)
            r += (s >= S).to(tl.int32)
            s = tl.where(s >= S, 0, s)

    if BIAS:
        sums += tl.load(b + k).to(tl.float32)[None, :]
    sums = activate(sums, slope, ACTIVATION)
    y_tile = y + y_row[:, None] + ((group * K + column) * y_k)[None, :]
    tl.store(
        y_tile, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < K)[None, :]
    )
