"""The ratios as a picture: one bar each, from the line where native is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdfast.bench.result import Result, geometric_means
from gdfast.extras import require
from gdfast.files import write_atomic

_COLOURS = {
    "forward": "#1f77b4",
    "grad_input": "#2ca02c",
    "grad_weight": "#9467bd",
    "update": "#ff7f0e",
    "step": "#d62728",
}
_ROW = 0.24  # inches for a bar


def save(results: Sequence[Result], title: str, path: Path) -> None:
    """Write a PNG of all results that were timed.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # The figure is drawn without pyplot: no window system is asked for, no global state is left.
    require("matplotlib", "train", "the plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [result for result in results if result.times is not None]
    means = geometric_means(timed)
    figure = Figure(figsize=(10, 1.6 + _ROW * (len(timed) + 1.2 * len(means))), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.axvline(1, color="black", linewidth=1, zorder=3)

    ticks: list[float] = []
    labels: list[str] = []
    height, suite, name = 0.0, "", ""
    for result in timed:
        if result.suite != suite:
            suite, name = result.suite, ""
            height += 1.2
            ticks.append(height)
            labels.append(f"{suite}: geometric mean {means[suite]:.2f}")
        height += 1
        _bar(axes, result, height)
        ticks.append(height)
        labels.append(result.name if result.name != name else "")
        name = result.name

    axes.set_yticks(ticks, labels, fontsize=8)
    for label in axes.get_yticklabels():
        if "geometric mean" in label.get_text():
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(height + 1, 0.4)
    # Only the ratios set the range: on a busy machine the spreads run out of it.
    low = min([0.5, *(result.ratio / 1.2 for result in timed)])
    high = max([2.0, *(result.ratio * 1.2 for result in timed)])
    axes.set_xlim(low, high)
    marks = [mark for mark in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
             if low <= mark <= high]  # fmt: skip
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("ratio: best native variant's time over ours (right of 1: ours is faster)")
    axes.set_title(title, fontsize=9, loc="left", pad=24)
    _legend(axes, [task for task in _COLOURS if any(r.task == task for r in timed)])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _bar(axes: Any, result: Result, height: float) -> None:
    ratio, (low, high) = result.ratio, result.spread
    null_low, null_high = result.measured.null_spread
    # Behind the bar, what chance alone gives: native against itself.
    axes.barh(height, null_high - null_low, 1.0, left=null_low, color="#bbbbbb", zorder=1)
    axes.barh(height, ratio - 1, 0.66, left=1, color=_COLOURS.get(result.task, "#555555"), zorder=2)
    axes.plot([low, high], [height, height], color="black", linewidth=1, zorder=4)
    beside = axes.get_yaxis_transform()
    axes.text(1.01, height, f"{ratio:.2f}", va="center", fontsize=7, transform=beside)


def _legend(axes: Any, tasks: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=_COLOURS[task], label=task) for task in tasks]
    handles.append(Line2D([], [], color="black", linewidth=1, label="middle 80 % of rounds"))
    handles.append(Patch(color="#bbbbbb", label="native against itself"))
    axes.legend(
        handles=handles, ncols=len(handles), fontsize=7, frameon=False,
        loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3,
    )  # fmt: skip
