"""How float32 numbers are multiplied on the tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# Of the tensor core for one product: tf32x3 adds the products of the rounding errors.
PASSES = {"tf32": 1, "tf32x3": 3, "ieee": 16}

# Unlike `allow_tf32`, its `fp32_precision` can be read whatever else was set. The way to it takes
# longer than a kernel's launch; what it ends with does not.
_conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_getter: Any = getattr(torch._C, "_get_fp32_precision_getter", None)


def asked_of_tf32() -> Callable[[], Any]:
    """What to ask whether anything about TF32 has changed: the answer is another one then."""
    return allows_tf32 if _getter is None else partial(_getter, "cuda", "conv")


def allows_tf32() -> bool:
    """Whether native's convolutions may multiply float32 as TF32."""
    precision = _conv.fp32_precision if _getter is None else _getter("cuda", "conv")
    return bool(precision == "tf32")


def input_precision(dtype: torch.dtype, strict: bool) -> str:
    """TF32 where native's convolutions may use it, else as exact as float32.

    `strict` rules out the three products of TF32 numbers in place of one, whose error has a bound
    of its own (see `precision`). It matters for float32 alone.
    """
    if dtype != torch.float32:
        return "ieee"
    if allows_tf32():
        return "tf32"
    return "ieee" if strict else "tf32x3"
