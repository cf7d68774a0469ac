"""What a swap did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_KINDS = ("output", "grad_input", "grad_weight", "grad_bias")


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
class Skipped:
    """A layer that was left alone, and why."""

    name: str
    old: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Every convolution of a model: replaced or skipped. Printing it gives a table."""

    replaced: list[Replaced]
    skipped: list[Skipped]

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = [kind for kind in _KINDS if any(kind in row.errors for row in self.replaced)]
        header = ["layer", "old", "new", "backend or reason", *kinds]
        rows = [
            [row.name, row.old, row.new, row.backend]
            + [f"{row.errors[kind]:.1e}" if kind in row.errors else "" for kind in kinds]
            for row in self.replaced
        ] + [[row.name, row.old, "", row.reason, *[""] * len(kinds)] for row in self.skipped]
        for row in rows:
            row[0] = row[0] or "(the model)"
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [header, ["-" * width for width in widths], *rows]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        summary = f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"
        return "\n".join([*table, summary])
