"""conv2d, gradients in the weight and the bias:

    dw[k, c, r, s] = sum over n, p, q of dy[n, k, p, q] * x[n, c, h, w]
    db[k] = sum over n, p, q of dy[n, k, p, q]
    h = p * stride_h - pad_h + r * dilation_h, w likewise; x is 0 outside of the image

A matrix product of K filters by R * S * C columns, over N * P * Q positions: few tiles, long sums.
So the positions are split among programs too, each of which leaves its sums in `partial`, and
`sum_splits` adds these up in one order: the same bits in every run, which atomic additions would
not give. One program makes BLOCK_M filters by BLOCK_N columns, which are channels of one tap, or,
where channels are few (FOLD), channels and taps in one. Positions advance by BLOCK_K as numbers
with digits n, p, q: no division within the loop. Programs of the first column sum the bias up.
"""

import triton
import triton.language as tl

from gdfast.backends.triton.parts import advance, grouped_tile, inside

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "rows", "rows_per_split", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h",
    "pad_w", "dilation_h", "dilation_w", "step_n", "step_p", "step_q", "filters", "first_split",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def conv2d_grad_weight_kernel(
    y, x, partial, partial_bias,
    rows, rows_per_split, C, K, H, W, P, Q, R, S,  # rows = N * P * Q; C and K are of one group
    x_n, x_c, x_h, x_w, y_n, y_k, y_p, y_q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    step_n, step_p, step_q,  # the digits of BLOCK_K
    filters, first_split,  # of all groups; of this launch
    PADDED: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    X_LINEAR: tl.constexpr, Y_LINEAR: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(1), tl.program_id(2)
    products = R * S * C
    tiles_c = tl.cdiv(C, BLOCK_N)
    tiles_n = tl.cdiv(products, BLOCK_N) if FOLD else R * S * tiles_c
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(K, BLOCK_M), tiles_n, BAND)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists_row = row < K
    if FOLD:
        product = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = product < products
        r, s, c = product // (S * C), product // C % S, product % C
    else:
        r, s = tile_n // tiles_c // S, tile_n // tiles_c % S
        column = tile_n % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = column < C
        c = column
        product = (r * S + s) * C + column
    up, left = r * dilation_h - pad_h, s * dilation_w - pad_w
    x_columns = x + (group * C + c) * x_c + up * x_h + left * x_w
    y_columns = y + (group * K + row) * y_k

    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    position = first + tl.arange(0, BLOCK_K)
    n, p, q = position // (P * Q), position // Q % P, position % Q
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bias_sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for _ in range(tl.cdiv(last - first, BLOCK_K)):
        h, w = p * stride_h, q * stride_w
        x_row = position * x_w if X_LINEAR else n * x_n + h * x_h + w * x_w
        y_row = position * y_q if Y_LINEAR else n * y_n + p * y_p + q * y_q
        x_tile = x_columns[None, :] + x_row[:, None]
        y_tile = y_columns[None, :] + y_row[:, None]
        here = position < last
        mask = here
        if PADDED and not FOLD:
            mask = here & inside(h + up, H) & inside(w + left, W)
        if EVEN and WHOLE:
            grads = tl.load(y_tile)
        else:
            grads = tl.load(y_tile, mask=here[:, None] & exists_row[None, :], other=0.0)
        if FOLD:
            there = here[:, None] & exists[None, :]
            if PADDED:
                there &= inside(h[:, None] + up[None, :], H) & inside(w[:, None] + left[None, :], W)
            pixels = tl.load(x_tile, mask=there, other=0.0)
        elif not WHOLE:
            pixels = tl.load(x_tile, mask=mask[:, None] & exists[None, :], other=0.0)
        elif PADDED or not EVEN:
            pixels = tl.load(x_tile, mask=mask[:, None], other=0.0)
        else:
            pixels = tl.load(x_tile)
        if UPCAST:
            grads, pixels = grads.to(tl.float32), pixels.to(tl.float32)
        if BIAS:
            bias_sums += tl.sum(grads.to(tl.float32), axis=0)
        sums = tl.dot(tl.trans(grads), pixels, sums, input_precision=PRECISION)
        position += BLOCK_K
        n, p, q = advance(n, p, q, step_n, step_p, step_q, P, Q)

    # As [split, k, r, s, c]; all splits together may be past what int32 counts.
    split = (first_split + split).to(tl.int64)
    tile = (group * K + row)[:, None] * products + product[None, :]
    tl.store(
        partial + split * filters * products + tile, sums,
        mask=exists_row[:, None] & exists[None, :],
    )  # fmt: skip
    if BIAS and tile_n == 0:
        tl.store(partial_bias + split * filters + group * K + row, bias_sums, mask=exists_row)
