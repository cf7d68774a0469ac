"""Max pooling, gradient:

    dx[n, c, h, w] = sum over r, s of dy[n, c, p, q] where argmax[n, c, p, q] = r * S + s
    p = (h + pad_h - r * dilation_h) / stride_h where that is whole and an output's, q likewise

Each pixel gathers from the windows that hold it: no two programs write one pixel, and sums have one
order. Pixels of one phase of the stride share the places (r, s) that have such a p, as in
conv2d_grad_input. One program makes BLOCK_M pixels of one phase by BLOCK_N channels.
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
def max_pool2d_grad_kernel(
    y, argmax, x,
    rows, C, H, W, P, Q, R, S,  # rows = N * ceil(H / stride_h) * ceil(W / stride_w)
    x_n, x_c, x_h, x_w, y_n, y_c, y_p, y_q, a_n, a_c, a_p, a_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    phases_h, phases_w, tap_step_h, tap_step_w, p_step, q_step,
    NOWHERE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    h, w = phase_h + i * stride_h, phase_w + j * stride_w
    exists_row = (row < rows) & (h < H) & (w < W)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = c < C
    y_tile = y + (n * y_n + p0 * y_p + q0 * y_q)[:, None] + (c * y_c)[None, :]
    a_tile = argmax + (n * a_n + p0 * a_p + q0 * a_q)[:, None] + (c * a_c)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap_h in range(taps_h):
        for tap_w in range(taps_w):
            up, left = tap_h * p_step, tap_w * q_step
            here = exists_row & inside(p0 - up, P) & inside(q0 - left, Q)
            mask = here[:, None] & exists[None, :]
            place = tl.load(a_tile - (up * a_p + left * a_q), mask=mask, other=NOWHERE)
            taken = place == (r0 + tap_h * tap_step_h) * S + s0 + tap_w * tap_step_w
            sums += tl.load(y_tile - (up * y_p + left * y_q), mask=mask & taken, other=0.0).to(
                tl.float32
            )
    x_tile = x + (n * x_n + h * x_h + w * x_w)[:, None] + (c * x_c)[None, :]
    tl.store(x_tile, sums.to(x.dtype.element_ty), mask=exists_row[:, None] & exists[None, :])
