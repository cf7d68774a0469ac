"""One thing to measure: the calls that do it, ours and native's, and the check that they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Check:
    """Error of each of our variants on the very inputs that are timed, and what is allowed."""

    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def ok(self) -> bool:
        # Written so that a NaN fails.
        return all(self.errors[name] <= self.allowed[name] for name in self.errors)

    def __str__(self) -> str:
        return "; ".join(
            f"{name}: error {error:.1e}, allowed {self.allowed[name]:.1e}"
            for name, error in self.errors.items()
        )


@dataclass(frozen=True)
class Workload:
    """Calls that do the same work, by variant name ("NCHW", "channels_last", "fused", ...).

    `twin` makes one of native's variants anew, on memory of its own, where variants do not share
    theirs. `flops` and `bytes` are the least that the work takes, `images` what a training step
    sees. `backend` names what ours runs on. A variant that a first look shows to take more than
    `shortlist` times as long as the best of its side is not timed further; 0 times all.
    """

    suite: str
    name: str
    task: str
    ours: Mapping[str, Callable[[], Any]]
    native: Mapping[str, Callable[[], Any]]
    check: Callable[[], Check]
    flops: int
    bytes: int
    twin: Callable[[str], Callable[[], Any]] | None = None
    images: int = 0
    backend: str = ""
    shortlist: float = 0.0

    def __str__(self) -> str:
        return f"{self.suite}: {self.name}, {self.task}"

    @property
    def calls(self) -> dict[str, Callable[[], Any]]:
        """All of them by one name: "ours NCHW", "native NCHW", ..."""
        return {f"ours {name}": call for name, call in self.ours.items()} | {
            f"native {name}": call for name, call in self.native.items()
        }


def relative_error(value: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference over that of the reference (float64); NaN where shapes differ."""
    if value.shape != reference.shape:
        return float("nan")
    scale = reference.norm().item()
    return (value.double() - reference).norm().item() / (scale or 1.0)


def allowed_error(native: float, dtype: torch.dtype, terms: int) -> float:
    """Twice native's own error, one rounding in the dtype, and the float64 reference's own error.

    The last counts only where the dtype is float64 too: for sums of so many `terms` it is about
    the square root of that, in roundings.
    """
    return 2 * native + torch.finfo(dtype).eps + sqrt(terms) * torch.finfo(torch.float64).eps
