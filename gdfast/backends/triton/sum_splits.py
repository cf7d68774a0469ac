"""The second pass of a split sum: out[i] = sum over splits of partial[split, i].

The elements i are those of a weight in the order [K, R, S, C]; `out` has any strides. One program
makes BLOCK elements, and loads PARTS splits of each at a time, so that it seldom waits. The order
of additions is always the same.
"""

import triton
import triton.language as tl

# Sizes that take many values and help no load: one compiled kernel serves them all.
_SIZES = (
    "count", "splits", "C", "R", "S", "out_k", "out_c", "out_r", "out_s",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def sum_splits_kernel(
    partial, out, count, splits, C, R, S, out_k, out_c, out_r, out_s,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = i < count
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits, PARTS):
        # All splits together may be past what int32 counts.
        split = first + tl.arange(0, PARTS).to(tl.int64)
        at = split[:, None] * count + i[None, :]
        mask = (split < splits)[:, None] & exists[None, :]
        sums += tl.sum(tl.load(partial + at, mask=mask, other=0.0), axis=0)
    c, s, r, k = i % C, i // C % S, i // (C * S) % R, i // (C * S * R)
    at = k * out_k + r * out_r + s * out_s + c * out_c
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=exists)
