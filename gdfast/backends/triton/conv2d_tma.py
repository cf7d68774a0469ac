"""conv2d of stride 1 through Hopper's tensor memory accelerator (TMA), forward:

    y[n, k, p, q] = act(b[k] + sum over c, r, s of w[k, c, r, s] * x[n, c, h, w])
    h = p + start_h + r * step_h, w likewise; x is 0 outside of the image

with start = -padding, step = dilation. The gradient in the input is the same sum of dy, with start
= padding, step = -dilation and w[c, k, r, s] (SWAPPED).

One program makes a box of BLOCK_I images x BLOCK_P rows x BLOCK_Q columns by BLOCK_N filters. It
walks through taps and channels in one loop, BLOCK_K channels at a time. Each step loads one box of
x and one of w through descriptors: a single thread asks for a box by the place of its corner, and
what lies outside of the tensor, above and left of an image too, arrives as zero. So there are no
addresses and no masks, neither for padding nor for what is left over at borders; stores clip in the
same way.

The weights are the left operand: Triton reshapes a right one where it lies in shared memory, and
would carry a left one through registers.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import activate, grouped_tile

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "C", "K", "R", "S", "tiles_n", "tiles_p", "tiles_q", "start_h", "start_w", "step_h", "step_w",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def conv2d_tma_kernel(
    x, w, y, b,  # descriptors of [N, H, W, C], [R, S, K, C] or, SWAPPED, [R, S, C, K], [N, P, Q, K]
    C, K, R, S, tiles_n, tiles_p, tiles_q, start_h, start_w, step_h, step_w, slope,
    SWAPPED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_P * BLOCK_Q
    tiles_m, tiles_k = tiles_n * tiles_p * tiles_q, tl.cdiv(K, BLOCK_N)
    tile, tile_k = grouped_tile(tl.program_id(0), tiles_m, tiles_k, BAND)
    n = tile // (tiles_p * tiles_q) * BLOCK_I
    p = tile // tiles_q % tiles_p * BLOCK_P
    q = tile % tiles_q * BLOCK_Q
    k = tile_k * BLOCK_N
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    r, s, c = 0, 0, 0
    for _ in range(R * S * tl.cdiv(C, BLOCK_K)):
        pixels = x.load([n, p + start_h + r * step_h, q + start_w + s * step_w, c])
        pixels = pixels.reshape(BLOCK_M, BLOCK_K)
        if SWAPPED:
            weights = w.load([r, s, c, k]).reshape(BLOCK_K, BLOCK_N).T
        else:
            weights = w.load([r, s, k, c]).reshape(BLOCK_N, BLOCK_K)
        if UPCAST:
            pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
        sums = tl.dot(weights, pixels.T, sums, input_precision=PRECISION)
        c += BLOCK_K
        s += (c >= C).to(tl.int32)
        c = tl.where(c >= C, 0, c)
        r += (s >= S).to(tl.int32)
        s = tl.where(s >= S, 0, s)

    if BIAS:
        filters = k + tl.arange(0, BLOCK_N)
        sums += tl.load(b + filters, mask=filters < K, other=0.0).to(tl.float32)[:, None]
    sums = activate(sums, slope, ACTIVATION)
    made = sums.T.reshape(BLOCK_I, BLOCK_P, BLOCK_Q, BLOCK_N)
    y.store([n, p, q, k], made.to(y.dtype))
