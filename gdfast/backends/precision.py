"""How much error an algorithm may trade for speed: a process-wide choice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gdfast.errors import mismatch

FAST, STRICT = "fast", "strict"

# A plain global, as the choice of the backend is, and for the same reasons.
_precision = FAST


def _checked(name: str) -> str:
    if name not in (FAST, STRICT):
        raise ValueError(mismatch("precision", "name", f"{FAST!r} or {STRICT!r}", repr(name)))
    return name


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Sets how exact convolutions are for as long as the context lasts, on all threads.

    "fast", the default, lets float32 convolutions use Winograd's algorithm, whose root mean square
    error is up to 5 times that of native PyTorch and which turns a NaN or an infinity into
    something that is not finite in the whole 4x4 tile around it, and Strassen's for 1x1 kernels,
    whose error is up to 4 times native's and whose tile is of twelve pixels. On GPUs it makes a
    float32 product of three in TF32, where TF32 alone is not allowed: for a sum of n products the
    error is at most 2^-17 + n 2^-27 of the sum of their magnitudes, 4.2e-5 for n = 4608, and
    numbers within 2^-12 of the largest count as infinite. "strict" keeps to the algorithms that
    multiply and add as the definition says, and to products by bfloat16 parts on Hopper, which are
    as exact as float32's: there the error is at most 2^-20 + n 2^-30, 5.3e-6 for n = 4608. Backward
    passes follow the choice in force when they run. Raises ValueError for another name.
    """
    global _precision
    before, _precision = _precision, _checked(name)
    try:
        yield
    finally:
        _precision = before


def is_strict() -> bool:
    """Whether algorithms with a larger error are ruled out now."""
    return _precision == STRICT


def choose_from_environment() -> None:
    """Sets the choice from GDFAST_PRECISION, where it is set."""
    global _precision
    if name := os.environ.get("GDFAST_PRECISION"):
        try:
            _precision = _checked(name)
        except ValueError as error:
            raise ValueError(f"GDFAST_PRECISION={name}: {error}") from None
