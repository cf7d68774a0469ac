"""What a swap did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gdfast import nn

_KINDS = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
_ROOT = "(the model)"


@dataclass(frozen=True)
class Replaced:
    """A layer that changed its class; `backend` is what runs it where its weight is now.

    `errors` has what a verification found for "output", "grad_input", "grad_weight", "grad_bias":
    the L2 norm of the difference to native's, relative to native's. For grad_bias it is relative
    to the sums of absolute values: in front of BatchNorm that gradient is 0 but for rounding.
    """

    name: str
    old: str
    new: str
    backend: str
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fused:
    """Neighbours in the forward of the module `name` that run as one operation, or a layer alone.

    `parts` are the names of its layers and functions, `op` is the operation of `gdfast.ops`.
    `errors` has what a verification found: for "output" of the module, for "grad_weight" and
    "grad_bias" of the layers among the parts and for "running_mean" and "running_var", the largest
    L2 norm of a difference to native's, relative to native's.
    """

    name: str
    parts: list[str]
    op: str
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A layer, or a module whose forward was to be fused, that was left alone, and why."""

    name: str
    old: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Every convolution of a model, replaced or skipped, and what was fused. Prints as tables."""

    replaced: list[Replaced]
    skipped: list[Skipped]
    fused: list[Fused] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kinds, errors = _columns([row.errors for row in self.replaced])
        rows = [["layer", "old", "new", "backend or reason", *kinds]]
        rows += [
            [row.name or _ROOT, row.old, row.new, row.backend, *cells]
            for row, cells in zip(self.replaced, errors, strict=True)
        ]
        rows += [
            [row.name or _ROOT, row.old, "", row.reason, *[""] * len(kinds)] for row in self.skipped
        ]
        lines = _table(rows)
        summary = f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"
        if self.fused:
            kinds, errors = _columns([row.errors for row in self.fused])
            rows = [["in", "fused", "into", *kinds]]
            rows += [
                [row.name or _ROOT, ", ".join(row.parts), row.op, *cells]
                for row, cells in zip(self.fused, errors, strict=True)
            ]
            lines += ["", *_table(rows)]
            summary += f", {len(self.fused)} fused"
        return "\n".join([*lines, summary])


def qualified(cls: type) -> str:
    """The name of a class, as it is imported where it is torch's or ours."""
    for package in (torch.nn, nn):
        if vars(package).get(cls.__name__) is cls:
            return f"{package.__name__}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _columns(errors: list[dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    kinds = [kind for kind in _KINDS if any(kind in row for row in errors)]
    cells = [[f"{row[kind]:.1e}" if kind in row else "" for kind in kinds] for row in errors]
    return kinds, cells


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
