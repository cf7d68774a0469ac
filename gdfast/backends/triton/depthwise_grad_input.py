"""Depthwise conv2d, gradient in the input:

    dx[n, c, h, w] = sum over r, s and the filters k of channel c of w[k, 0, r, s] * dy[n, k, p, q]
    p = (h + pad_h - r * dilation_h) / stride_h where that is whole and an output's, q likewise

Pixels of one phase of the stride share the taps that have such a p, as in conv2d_grad_input. One
program makes BLOCK_M pixels of one phase by BLOCK_N channels.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import first_tap, inside

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "rows", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w", "phases_h", "phases_w", "tap_step_h", "tap_step_w", "p_step", "q_step",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def depthwise_grad_input_kernel(
    y, w, x,
    rows, C, H, W, P, Q, R, S,  # rows = N * ceil(H / stride_h) * ceil(W / stride_w)
    x_n, x_c, x_h, x_w, w_k, w_r, w_s, y_n, y_k, y_p, y_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    phases_h, phases_w, tap_step_h, tap_step_w, p_step, q_step,
    MULTIPLIER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    phase_h, phase_w = tl.program_id(2) // phases_w, tl.program_id(2) % phases_w
    r0 = first_tap(phase_h + pad_h, R, stride_h, dilation_h)
    s0 = first_tap(phase_w + pad_w, S, stride_w, dilation_w)
    taps_h, taps_w = tl.cdiv(R - r0, tap_step_h), tl.cdiv(S - s0, tap_step_w)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    size_h, size_w = tl.cdiv(H, stride_h), tl.cdiv(W, stride_w)
    n, i, j = row // (size_h * size_w), row // size_w % size_h, row % size_w
    p0 = (phase_h + pad_h - r0 * dilation_h) // stride_h + i
    q0 = (phase_w + pad_w - s0 * dilation_w) // stride_w + j
    h, w_pixel = phase_h + i * stride_h, phase_w + j * stride_w
    exists_row = (row < rows) & (h < H) & (w_pixel < W)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    k = c * MULTIPLIER
    y_tile = y + (n * y_n + p0 * y_p + q0 * y_q)[:, None] + (k * y_k)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap_h in range(taps_h):
        for tap_w in range(taps_w):
            up, left = tap_h * p_step, tap_w * q_step
            mask = exists_row & inside(p0 - up, P) & inside(q0 - left, Q)
            at = (r0 + tap_h * tap_step_h) * w_r + (s0 + tap_w * tap_step_w) * w_s
            for copy in tl.static_range(MULTIPLIER):
                grads = tl.load(
                    y_tile + (copy * y_k - up * y_p - left * y_q),
                    mask=mask[:, None] & exists[None, :], other=0.0,
                )  # fmt: skip
                weights = tl.load(w + (k + copy) * w_k + at, mask=exists, other=0.0)
                sums += grads.to(tl.float32) * weights.to(tl.float32)[None, :]
    x_tile = x + (n * x_n + h * x_h + w_pixel * x_w)[:, None] + (c * x_c)[None, :]
    tl.store(x_tile, sums.to(x.dtype.element_ty), mask=exists_row[:, None] & exists[None, :])
