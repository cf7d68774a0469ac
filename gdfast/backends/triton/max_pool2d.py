"""Max pooling, forward:

    y[n, c, p, q] = max over r, s of x[n, c, h, w]
    argmax[n, c, p, q] = r * S + s where that is first
    h = p * stride_h - pad_h + r * dilation_h, w likewise; pixels outside of the image don't count

A NaN outdoes every number. With RELU a value of at most 0 becomes 0, and its argmax NOWHERE. Bound
by memory: one program makes BLOCK_M positions by BLOCK_N channels.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import inside

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "rows", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def max_pool2d_kernel(
    x, y, argmax,
    rows, C, H, W, P, Q, R, S,  # rows = N * P * Q
    x_n, x_c, x_h, x_w, y_n, y_c, y_p, y_q, a_n, a_c, a_p, a_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    RELU: tl.constexpr, NOWHERE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = row // (P * Q), row // Q % P, row % Q
    h0, w0 = p * stride_h - pad_h, q * stride_w - pad_w
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (row < rows)[:, None] & (c < C)[None, :]
    x_tile = x + (n * x_n + h0 * x_h + w0 * x_w)[:, None] + (c * x_c)[None, :]
    most = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    place = tl.full((BLOCK_M, BLOCK_N), NOWHERE, dtype=tl.int32)
    for r in range(R):
        for s in range(S):
            here = inside(h0 + r * dilation_h, H) & inside(w0 + s * dilation_w, W)
            at = r * dilation_h * x_h + s * dilation_w * x_w
            mask = here[:, None] & exists
            value = tl.load(x_tile + at, mask=mask, other=float("-inf")).to(tl.float32)
            # The first pixel that there is counts, even if it is -inf.
            larger = mask & ((value > most) | (value != value) | (place == NOWHERE))
            most = tl.where(larger, value, most)
            place = tl.where(larger, r * S + s, place)
    if RELU:
        place = tl.where(most <= 0, NOWHERE, place)
        most = tl.where(most <= 0, 0.0, most)
    y_tile = y + (n * y_n + p * y_p + q * y_q)[:, None] + (c * y_c)[None, :]
    tl.store(y_tile, most.to(y.dtype.element_ty), mask=exists)
    a_tile = argmax + (n * a_n + p * a_p + q * a_q)[:, None] + (c * a_c)[None, :]
    tl.store(a_tile, place.to(argmax.dtype.element_ty), mask=exists)
