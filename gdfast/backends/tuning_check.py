"""Whether a candidate computes what it should, before its times may count.

GPUs, drivers and compilers are many, and so are processors with new instructions: what runs on one
of them wrongly must not be chosen there for being fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gdfast.errors import FallbackWarning

# Of the sum of the products' magnitudes: what the order of sums, Winograd's transforms and, where
# it is allowed, TF32 may cost. A wrong tap or border costs more, and so does a lost part of a sum,
# unless it is of very many. Products of half types are exact in float32.
_SUM_ERROR = {torch.float64: 2.0**-40}
_FLOAT32_ERROR = 2.0**-13
_TF32_ERROR = 2.0**-9  # of two operands, cut off after 10 bits


def agreeing(
    op: str,
    calls: Mapping[str, Callable[..., Any]],
    reference: Callable[..., Any],
    products: Callable[..., Any],
    arguments: tuple[Any, ...],
    tf32: bool,
) -> list[str]:
    """Names of the calls whose results are the reference's but for rounding.

    What is compared are random numbers in tensors like these arguments: where those are zeros, or
    overflow, a wrong result would pass. `products` is the reference without an activation, which
    hides the size of what is summed. Warns of every call that does not agree; one that raises a
    RuntimeError is passed over, here as by the timer. Raises OutOfMemoryError, which tells nothing
    of a call, and what the reference raises.
    """
    arguments = tuple(random_like(a) if isinstance(a, Tensor) else a for a in arguments)
    expected = reference(*arguments)
    magnitudes = products(*(a.abs() if isinstance(a, Tensor) else a for a in arguments))
    names = []
    for name, call in calls.items():
        try:
            _poison(expected)
            excess = _excess(call(*arguments), expected, magnitudes, tf32)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where the GPU is lost to this process
            continue
        if excess <= 1:
            names.append(name)
        else:
            warnings.warn(
                f"{op}: {name}: expected the right result but for rounding, got one whose "
                f"error is {excess:.3g} times what rounding allows; it is not used. Please report "
                "this, with the output of `gdfast doctor`.",
                FallbackWarning,
                stacklevel=2,
            )
    return names


def random_like(tensor: Tensor) -> Tensor:
    """Numbers of a normal distribution, the same always, in the order of memory of a tensor."""
    generator = torch.Generator(tensor.device).manual_seed(0)
    # Where steps are 0 one number stands for many.
    size = [1 if step == 0 else n for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
    values = torch.empty_strided(
        size, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    ).normal_(generator=generator)
    return values.expand(tensor.shape)


def _poison(expected: Any) -> None:
    """Leaves NaN in the memory that the next results will probably get: else what a kernel does not
    write is what the last one wrote there.
    """
    for part in [torch.full_like(part, float("nan")) for part in _tensors(expected)]:
        del part


def _excess(result: Any, expected: Any, magnitudes: Any, tf32: bool) -> float:
    """The largest difference, over the largest that rounding explains."""
    worst = 0.0
    pairs = zip(_tensors(result), _tensors(expected), _tensors(magnitudes), strict=True)
    for ours, theirs, magnitude in pairs:
        dtype = theirs.dtype
        sums = _SUM_ERROR.get(dtype, _FLOAT32_ERROR)
        if tf32 and dtype == torch.float32:
            sums = _TF32_ERROR
        wide = torch.promote_types(dtype, torch.float32)
        ours, theirs, magnitude = ours.to(wide), theirs.to(wide), magnitude.to(wide)
        # Where a value overflows or is no number, kernels may differ in which of these it is.
        known = theirs.isfinite() & magnitude.isfinite()
        bound = 2 * torch.finfo(dtype).eps * theirs.abs() + sums * magnitude
        bound += torch.finfo(dtype).tiny
        over = ((ours - theirs).abs() / bound)[known]
        if over.numel():
            worst = max(worst, float(over.nan_to_num(nan=float("inf")).max()))
    return worst


def _tensors(result: Any) -> Iterator[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return (part for part in parts if part is not None)
