"""Depthwise conv2d, forward: each filter reads one channel, c = k // (K / C).

    y[n, k, p, q] = act(b[k] + sum over r, s of w[k, 0, r, s] * x[n, c, h, w])
    h = p * stride_h - pad_h + r * dilation_h, w likewise; x is 0 outside of the image

Bound by memory: a matrix product would be nearly all padding. One program makes BLOCK_M positions
by BLOCK_N filters, which lie side by side in channels_last, and loads one tile of the input for
each tap; neighbouring taps find most of it in L1.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import activate, inside

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "rows", "H", "W", "P", "Q", "R", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def depthwise_kernel(
    x, w, b, y,
    rows, K, H, W, P, Q, R,  # rows = N * P * Q
    x_n, x_c, x_h, x_w, w_k, w_r, w_s, y_n, y_k, y_p, y_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, slope,
    S: tl.constexpr, MULTIPLIER: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = row // (P * Q), row // Q % P, row % Q
    h0, w0 = p * stride_h - pad_h, q * stride_w - pad_w
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = k < K
    c = k // MULTIPLIER
    x_tile = x + (n * x_n + h0 * x_h + w0 * x_w)[:, None] + (c * x_c)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(R):
        exists_row = (row < rows) & inside(h0 + r * dilation_h, H)
        for s in tl.static_range(S):
            mask = exists_row & inside(w0 + s * dilation_w, W)
            at = r * dilation_h * x_h + s * dilation_w * x_w
            pixels = tl.load(x_tile + at, mask=mask[:, None] & exists[None, :], other=0.0)
            weights = tl.load(w + k * w_k + r * w_r + s * w_s, mask=exists, other=0.0)
            sums += pixels.to(tl.float32) * weights.to(tl.float32)[None, :]
    if BIAS:
        sums += tl.load(b + k, mask=exists, other=0.0).to(tl.float32)[None, :]
    sums = activate(sums, slope, ACTIVATION)
    y_tile = y + (n * y_n + p * y_p + q * y_q)[:, None] + (k * y_k)[None, :]
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & exists[None, :])
