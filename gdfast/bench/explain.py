"""How each convolution of some workloads is run, and the times that it was chosen by."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gdfast import optim
from gdfast.backends import cpu_algorithms, tuning
from gdfast.backends.tuning import Use
from gdfast.bench import suites
from gdfast.bench.step import Training
from gdfast.bench.suites import Planned
from gdfast.bench.workload import LAYOUTS
from gdfast.geometry import Conv2dGeometry, is_channels_last

SCHEMA = 1  # raised when a reader of the JSON would have to change

_PASSES = {
    "conv2d": "forward",
    "conv2d_act": "forward, act",
    "conv2d_moments": "forward, norm",
    "conv2d_grad_input": "grad_input",
    "conv2d_grad_weight": "grad_weight",
}


class Row(NamedTuple):
    """One pass of one layer in one layout, in the suite that it is of."""

    suite: str
    use: Use

    @property
    def how(self) -> str:
        if self.use.choice.seconds:
            return "times"
        return "cost model" if len(self.use.candidates) > 1 else "the only one"


def collect(
    planned: Sequence[Planned], dtype: torch.dtype, show: Callable[[str], None]
) -> list[Row]:
    """Runs our side of each workload once, in each layout, and tells how its convolutions ran."""
    rows: dict[tuple[Any, ...], Row] = {}
    for position, item in enumerate(planned, 1):
        show(f"[{position}/{len(planned)}] {item.label}")
        suite, calls = _ours(item, dtype)
        with tuning.recorded({}) as uses:
            for call in calls:
                call()
        for use in uses:
            rows.setdefault((suite, use.op, use.query), Row(suite, use))
    return list(rows.values())


def _ours(item: Planned, dtype: torch.dtype) -> tuple[str, list[Callable[[], Any]]]:
    if item.step is None:
        workload = item.build()
        return workload.suite, list(workload.ours.values())
    # Native's side of a whole step would be timed for nothing.
    model, _ = suites.both_models(item.step)
    calls = [Training(item.step, model, optim.SGD, layout, dtype) for layout in LAYOUTS]
    return str(item.step), list(calls)


def table(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """One table by suite, and below it in words how to read it."""
    candidates = list(dict.fromkeys(name for row in rows for name in row.use.candidates))
    header = ["", "pass", "layout", "runs on", "chosen by", *candidates]
    lines = [[*_labels(row), *(_time(row.use, name) for name in candidates)] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        words = len(header) - len(candidates)
        padded = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    text = [
        f"{machine['cpu']}, {machine['threads']} of {machine['cpus']} CPUs, "
        f"kernels {machine['isa'] or 'not built'}, torch {machine['torch']}; "
        f"autotune: {tuning.mode()}",
        "",
        line(header),
    ]
    for suite in dict.fromkeys(row.suite for row in rows):
        text.append(f"-- {suite}")
        text += [line(cells) for row, cells in zip(rows, lines, strict=True) if row.suite == suite]
    native = sum(row.use.choice.name == tuning.NATIVE for row in rows)
    notes = []
    reason = cpu_algorithms.why_no_bf16()
    if reason and any(row.use.query.dtype == torch.bfloat16 for row in rows):
        notes = [f"On the CPU direct widens bfloat16 to float32; there is no bf16: {reason}."]
    return "\n".join(
        [
            *text,
            "",
            f"{native} of {len(rows)} run on native PyTorch. Median times of a call, on this "
            "machine, when the choice was made; - where a candidate was not timed.",
            *notes,
        ]
    )


def to_json(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """The same as plain data; times in seconds."""
    choices = [
        {
            "suite": row.suite,
            "op": row.use.op,
            **vars(row.use.query.geometry),
            "layout": _layout(row.use),
            "strides": row.use.query.strides,
            "dtype": str(row.use.query.dtype).removeprefix("torch."),
            "threads": row.use.threads,
            "candidates": row.use.candidates,
            "choice": row.use.choice.name,
            "chosen_by": row.how,
            "seconds": dict(row.use.choice.seconds),
        }
        for row in rows
    ]
    facts = {
        "schema": SCHEMA, "machine": machine, "autotune": tuning.mode(), "choices": choices,
    }  # fmt: skip
    return json.dumps(facts, indent=1, allow_nan=False)


def _labels(row: Row) -> list[str]:
    op, query, *_ = row.use
    return [
        _layer(query.geometry), _PASSES.get(op, op), _layout(row.use), row.use.choice.name, row.how,
    ]  # fmt: skip


def _layer(g: Conv2dGeometry) -> str:
    stride = "" if g.stride == (1, 1) else f"/{_pair(g.stride)}"
    dilation = "" if g.dilation == (1, 1) else f", dilation {_pair(g.dilation)}"
    groups = "" if g.groups == 1 else f", groups {g.groups}"
    size = f"{g.R}x{g.S}{stride} {g.C}->{g.K} @{_pair((g.H, g.W))}"
    return f"{size}, N {g.N}{dilation}{groups}"


def _pair(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


def _layout(use: Use) -> str:
    # Of what the pass reads or writes in the places of input and output.
    g, (input, _, output) = use.query.geometry, use.query.strides
    both = is_channels_last(g.input_size, input), is_channels_last(g.output_size, output)
    if both[0] == both[1]:
        return "channels_last" if both[0] else "NCHW"
    return "mixed"


def _time(use: Use, name: str) -> str:
    seconds = use.choice.seconds.get(name)
    if seconds is None:
        return "-" if name in use.candidates else ""
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
