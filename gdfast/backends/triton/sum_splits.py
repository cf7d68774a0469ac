"""The second pass of a split sum: out[i] = partial[0, i] + partial[1, i] + ... in this order.

The elements i are those of a weight in the order [K, R, S, C]; `out` has any strides. One program
makes BLOCK elements.
"""

import triton
import triton.language as tl

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "count", "splits", "C", "R", "S", "out_k", "out_c", "out_r", "out_s",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def sum_splits_kernel(
    partial, out, count, splits, C, R, S, out_k, out_c, out_r, out_s, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = i < count
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    split = partial
    for _ in range(splits):
        sums += tl.load(split + i, mask=exists, other=0.0)
        split += count
    c, s, r, k = i % C, i // C % S, i // (C * S) % R, i // (C * S * R)
    at = k * out_k + r * out_r + s * out_s + c * out_c
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=exists)
