"""The table that people read and the JSON that programs read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import geometric_mean, median
from typing import Any

from gdfast.bench.peak import Peak
from gdfast.bench.result import Result, geometric_means

SCHEMA = 1  # raised when a reader of the JSON would have to change

_HEADER = ("", "pass", "ours", "", "best native", "", "ratio", "spread", "null",
           "NCHW", "ch_last", "rate", "of peak", "memory")  # fmt: skip
_BUSY = 0.25  # width of a usual null case, from which on single rows say little
_LEFT = {0, 1, 3, 5}  # columns of words; the others are numbers, aligned to the right


def table(results: Sequence[Result], machine: dict[str, Any], peak: Peak, dtype: str) -> str:
    """One table of all results, by suite, and below it in words how to read it."""
    rows = [row(result, peak) for result in results]
    widths = [
        max(len(cells[column]) for cells in [_HEADER, *(r for r in rows if len(r) > 3)])
        for column in range(len(_HEADER))
    ]
    widths[0] = max(widths[0], max((len(cells[0]) for cells in rows), default=0))

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    lines = [
        f"{machine['cpu']}, {machine['threads']} of {machine['cpus']} CPUs, "
        f"kernels {machine['isa'] or 'not built'}, torch {machine['torch']}, {dtype}; "
        f"measured peak {peak.flops / 1e9:.0f} GFLOP/s, {peak.bandwidth / 1e9:.0f} GB/s",
        "",
        line(_HEADER),
    ]
    means = geometric_means(list(results))
    for suite in dict.fromkeys(result.suite for result in results):
        mean = f"  geometric mean {means[suite]:.2f}" if suite in means else ""
        lines.append(f"-- {suite}{mean}")
        for result, cells in zip(results, rows, strict=True):
            if result.suite == suite:
                short = len(cells) == 3
                lines.append(
                    f"{cells[0].ljust(widths[0])}  {cells[1].ljust(widths[1])}  {cells[2]}"
                    if short
                    else line(cells)
                )
    return "\n".join([*lines, "", *_in_words(results)])


def row(result: Result, peak: Peak) -> tuple[str, ...]:
    """The table's cells for one result; three of them where the check failed."""
    if result.times is None:
        return (result.name, result.task, f"WRONG, so not timed: {result.check}")
    scale, unit = (1e6, "us") if result.native_seconds < 1e-4 else (1e3, "ms")
    low, high = result.spread
    null_low, null_high = result.times.null_spread
    same = result.same_layout
    if result.images:
        rate = f"{result.images / result.seconds:,.0f} images/s"
    elif peak.bound(result.flops, result.bytes) == "compute":
        rate = f"{result.flops / result.seconds / 1e9:.1f} GFLOP/s"
    else:
        rate = f"{result.bytes / result.seconds / 1e9:.1f} GB/s"
    return (
        result.name,
        result.task,
        f"{result.seconds * scale:.2f} {unit}",
        _short(result.best_ours),
        f"{result.native_seconds * scale:.2f} {unit}",
        _short(result.best_native),
        f"{result.ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{null_low:.2f}-{null_high:.2f}",
        f"{same['NCHW']:.2f}" if "NCHW" in same else "",
        f"{same['channels_last']:.2f}" if "channels_last" in same else "",
        rate,
        f"{result.share(peak):.0%}",
        f"{result.memory[0] / result.memory[1]:.2f}" if result.memory else "",
    )


def to_json(
    results: Sequence[Result], machine: dict[str, Any], peak: Peak, settings: dict[str, Any]
) -> str:
    """All results with all rounds; times in seconds, peaks in FLOP/s and bytes/s."""
    facts = {
        "schema": SCHEMA,
        "machine": machine,
        "settings": settings,
        "peak": {"flops": peak.flops, "bandwidth": peak.bandwidth},
        "geometric_mean": geometric_means(list(results)),
        "results": [result.to_dict(peak) for result in results],
    }
    return json.dumps(facts, indent=1, allow_nan=False)


def _short(variant: str) -> str:
    return variant.replace("channels_last", "ch_last")


def _in_words(results: Sequence[Result]) -> list[str]:
    timed = [result for result in results if result.times is not None]
    lines = []
    backends = sorted({result.backend for result in results if result.backend})
    if backends:
        lines.append(f"Ours ran on: {', '.join(backends)}.")
    if len(timed) < len(results):
        lines.append(
            f"{len(results) - len(timed)} of {len(results)} gave wrong results: "
            "no speed is told for them."
        )
    if timed:
        noise = median(high - low for low, high in (r.measured.null_spread for r in timed))
        if noise > _BUSY:
            lines.append(
                f"This machine was busy: native against itself gave ratios {noise:.0%} apart. "
                "Run again when nothing else runs."
            )
        overall = geometric_mean(result.ratio for result in timed)
        slowest = min(timed, key=lambda result: result.ratio)
        lines += [
            "of peak: the least time that the measured peaks allow, over ours; GFLOP/s where "
            "arithmetic is the limit, GB/s where memory is (over 100 %: it stayed in a cache).",
            "spread: the middle 80 % of the rounds' own ratios; null: the same for native against "
            "itself, the noise of this machine.",
            f"ratio: the best native variant's median time over ours; above 1 we are faster. "
            f"Geometric mean of {len(timed)}: {overall:.2f}; lowest: {slowest.ratio:.2f} "
            f"({slowest.label}).",
        ]
    return lines
