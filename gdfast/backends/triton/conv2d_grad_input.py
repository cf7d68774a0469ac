"""conv2d, gradient in the input:

    dx[n, c, h, w] = sum over k, r, s of w[k, c, r, s] * dy[n, k, p, q]
    p = (h + pad_h - r * dilation_h) / stride_h where that is whole and an output's, q likewise

With a stride most pairs of pixel and tap have no such p. Pixels of one phase, h % stride_h, share
the taps that have: r = r0 + i * tap_step, and then p = p0 - i * p_step for a whole p0, where
tap_step = stride / gcd(stride, dilation) and p_step = dilation / gcd. So each phase is a
convolution of stride 1 by a part of the filter: nothing is multiplied by zero. A phase without taps
is zero.

One program makes BLOCK_M pixels of one phase by BLOCK_N channels of one group, and walks through
taps and filters as the forward kernel walks through taps and channels.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import first_tap, grouped_tile, inside

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "rows", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w", "phases_h", "phases_w", "tap_step_h", "tap_step_w", "p_step", "q_step",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def conv2d_grad_input_kernel(
    y, w, x,
    rows, C, K, H, W, P, Q, R, S,  # rows = N * ceil(H / stride_h) * ceil(W / stride_w)
    x_n, x_c, x_h, x_w, w_k, w_c, w_r, w_s, y_n, y_k, y_p, y_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    phases_h, phases_w, tap_step_h, tap_step_w, p_step, q_step,
    PADDED: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(C, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, BAND)
    group = tl.program_id(1) // (phases_h * phases_w)
    phase_h = tl.program_id(1) // phases_w % phases_h
    phase_w = tl.program_id(1) % phases_w
    r0 = first_tap(phase_h + pad_h, R, stride_h, dilation_h)
    s0 = first_tap(phase_w + pad_w, S, stride_w, dilation_w)
    taps_h, taps_w = tl.cdiv(R - r0, tap_step_h), tl.cdiv(S - s0, tap_step_w)
    first_p = (phase_h + pad_h - r0 * dilation_h) // stride_h
    first_q = (phase_w + pad_w - s0 * dilation_w) // stride_w

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    position = tl.minimum(row, rows - 1)
    size_h, size_w = tl.cdiv(H, stride_h), tl.cdiv(W, stride_w)
    n, i, j = position // (size_h * size_w), position // size_w % size_h, position % size_w
    p0, q0 = first_p + i, first_q + j
    h, w_pixel = phase_h + i * stride_h, phase_w + j * stride_w
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y_row = n * y_n + p0 * y_p + q0 * y_q + group * K * y_k
    x_row = n * x_n + h * x_h + w_pixel * x_w
    exists_row = (row < rows) & (h < H) & (w_pixel < W)

    filters = tl.arange(0, BLOCK_K)
    y_rows = y + y_row[:, None] + (filters * y_k)[None, :]
    w_columns = w + ((group * K + filters) * w_k)[:, None] + (column * w_c)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tap_h, tap_w, k = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(K, BLOCK_K)):
        r, s = r0 + tap_h * tap_step_h, s0 + tap_w * tap_step_w
        up, left = tap_h * p_step, tap_w * q_step
        y_tile = y_rows + (k * y_k - up * y_p - left * y_q)
        w_tile = w_columns + (k * w_k + r * w_r + s * w_s)
        exists = filters < K - k
        mask = tl.full((BLOCK_M,), True, tl.int1)
        if PADDED:
            mask = inside(p0 - up, P) & inside(q0 - left, Q)
        if not EVEN:
            grads = tl.load(y_tile, mask=mask[:, None] & exists[None, :], other=0.0)
        elif PADDED:
            grads = tl.load(y_tile, mask=mask[:, None], other=0.0)
        else:
            grads = tl.load(y_tile)
        if not (EVEN and WHOLE):
            there = exists[:, None] & (column < C)[None, :]
            weights = tl.load(w_tile, mask=there, other=0.0)
        else:
            weights = tl.load(w_tile)
        if UPCAST:
            grads, weights = grads.to(tl.float32), weights.to(tl.float32)
        sums = tl.dot(grads, weights, sums, input_precision=PRECISION)
        k += BLOCK_K
        tap_w += (k >= K).to(tl.int32)
        k = tl.where(k >= K, 0, k)
        tap_h += (tap_w >= taps_w).to(tl.int32)
        tap_w = tl.where(tap_w >= taps_w, 0, tap_w)

    x_tile = x + x_row[:, None] + ((group * C + column) * x_c)[None, :]
    tl.store(x_tile, sums.to(x.dtype.element_ty), mask=exists_row[:, None] & (column < C)[None, :])
