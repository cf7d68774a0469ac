"""Depthwise conv2d, gradients in the weight and the bias:

    dw[k, 0, r, s] = sum over n, p, q of dy[n, k, p, q] * x[n, c, h, w], c = k // (K / C)
    db[k] = sum over n, p, q of dy[n, k, p, q]
    h = p * stride_h - pad_h + r * dilation_h, w likewise; x is 0 outside of the image

Bound by memory. One program takes BLOCK_N filters and TAPS taps over its split of the positions,
BLOCK_M at a time: a tile of dy meets the tiles of x that its taps see, most of which L1 has. Sums
stay apart by position until the end, so that threads exchange nothing within the loop; `sum_splits`
adds the splits up in their order.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import advance, inside

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "rows", "rows_per_split", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h",
    "pad_w", "dilation_h", "dilation_w", "step_n", "step_p", "step_q", "first_split",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def depthwise_grad_weight_kernel(
    y, x, partial, partial_bias,
    rows, rows_per_split, K, H, W, P, Q, R, S,  # rows = N * P * Q
    x_n, x_c, x_h, x_w, y_n, y_k, y_p, y_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    step_n, step_p, step_q,  # the digits of BLOCK_M
    first_split,
    MULTIPLIER: tl.constexpr, BIAS: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = k < K
    tap = tl.program_id(1) * TAPS + tl.arange(0, TAPS)
    exists_tap = tap < R * S
    split = tl.program_id(2)
    up, left = tap // S * dilation_h - pad_h, tap % S * dilation_w - pad_w
    x_taps = x + (up * x_h + left * x_w)[:, None, None] + (k // MULTIPLIER * x_c)[None, None, :]

    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    position = first + tl.arange(0, BLOCK_M)
    n, p, q = position // (P * Q), position // Q % P, position % Q
    sums = tl.zeros((TAPS, BLOCK_M, BLOCK_N), dtype=tl.float32)
    bias_sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(tl.cdiv(last - first, BLOCK_M)):
        exists_row = position < last
        y_tile = y + (n * y_n + p * y_p + q * y_q)[:, None] + (k * y_k)[None, :]
        grads = tl.load(y_tile, mask=exists_row[:, None] & exists[None, :], other=0.0)
        grads = grads.to(tl.float32)
        h, w = p * stride_h, q * stride_w
        mask = inside(h[None, :] + up[:, None], H) & inside(w[None, :] + left[:, None], W)
        mask = mask & exists_tap[:, None] & exists_row[None, :]
        x_tile = x_taps + (n * x_n + h * x_h + w * x_w)[None, :, None]
        pixels = tl.load(x_tile, mask=mask[:, :, None] & exists[None, None, :], other=0.0)
        sums += pixels.to(tl.float32) * grads[None, :, :]
        if BIAS:
            bias_sums += grads
        position += BLOCK_M
        n, p, q = advance(n, p, q, step_n, step_p, step_q, P, Q)

    # As [split, k, r, s]; all splits together may be past what int32 counts.
    split = (first_split + split).to(tl.int64)
    tile = k[None, :] * (R * S) + tap[:, None]
    tl.store(
        partial + split * K * R * S + tile, tl.sum(sums, axis=1),
        mask=exists_tap[:, None] & exists[None, :],
    )  # fmt: skip
    if BIAS and tl.program_id(1) == 0:
        tl.store(partial_bias + split * K + k, tl.sum(bias_sums, axis=0), mask=exists)
