"""Tables and a picture of what benchmarks/gpu_layers.py measured. It needs no torch.

A ratio is native's median time over ours: above 1 ours is faster. A kernel's share of its roofline
is the least time that the GPU's arithmetic and memory allow, over ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from math import log2
from statistics import geometric_mean
from typing import Any

from gpu_goals import AUTO, BACKENDS, GOALS, SUSPECT, SUSPECT_ONCE, Goal, backends

# FLOP/s by kind of arithmetic, and bytes/s of memory: NVIDIA's data sheets, without sparsity.
_HOPPER = {"bfloat16": 989e12, "tf32": 495e12, "3 x tf32": 165e12, "float32": 67e12}
ROOFLINES = {
    "H200": {**_HOPPER, "memory": 4.8e12},
    "H100": {**_HOPPER, "memory": 3.35e12},
}

_MOST_TILES = 8  # told of in one line

Document = dict[str, Any]
Measured = dict[str, Any]


def share(entry: Measured, backend: str, gpu: str) -> float | None:
    """Of the roofline; None for an unknown GPU and without a time."""
    peaks = next((peaks for name, peaks in ROOFLINES.items() if name in gpu), None)
    seconds = entry.get("seconds", {}).get(f"ours {backend}")
    if peaks is None or not seconds:
        return None
    floor = max(entry["flops"] / peaks[entry["peak"]], entry["bytes"] / peaks["memory"])
    return float(floor / seconds)


def ratio(entry: Measured, backend: str, rival: str) -> float | None:
    """Of the rival's time to ours; of the shorter where it was timed in NCHW besides."""
    seconds = entry.get("seconds", {})
    names = f"native {rival}", f"native {rival} NCHW"
    natives = [value for name in names if (value := seconds.get(name))]
    ours = seconds.get(f"ours {backend}")
    return min(natives) / ours if natives and ours else None


def of_goal(document: Document, goal: Goal) -> list[Measured]:
    return [
        entry
        for entry in document["entries"]
        if entry["row"] == goal.row
        and goal.task in ("", entry["task"])
        and goal.layout in ("", entry["layout"])
    ]


def ratios(document: Document) -> list[dict[str, Any]]:
    """Of each goal and backend the ratio that was reached, None where nothing was timed."""
    found = []
    for goal in GOALS:
        entries = of_goal(document, goal)
        for backend in goal.ratio:
            values = [value for entry in entries if (value := ratio(entry, backend, goal.rival))]
            found.append({
                "goal": goal.title, "rival": goal.rival, "backend": backend,
                "ratio": round(geometric_mean(values), 4) if values else None,
                "wanted": goal.ratio[backend], "entries": len(values), "of": len(entries),
            })  # fmt: skip
    return found


def goals(document: Document) -> str:
    """One line for each goal and backend."""
    lines = [
        "| what | against | backend | ratio | goal | reached | of roofline | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    gpu = document["machine"]["gpu"]
    which = [goal for goal in GOALS for _ in goal.ratio]
    for goal, reached in zip(which, ratios(document), strict=True):
        entries, backend, mean = of_goal(document, goal), reached["backend"], reached["ratio"]
        shares = [value for entry in entries if (value := share(entry, backend, gpu))]
        verdict = "-" if mean is None else "yes" if mean >= reached["wanted"] else "no"
        if mean is not None and reached["entries"] < len(entries):
            verdict += ", of a part"
        cells = [
            goal.title, goal.rival, backend, "-" if mean is None else f"{mean:.2f}",
            f"{reached['wanted']:g}", verdict, f"{geometric_mean(shares):.0%}" if shares else "-",
            _count(entries, backend, reached["entries"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _count(entries: Sequence[Measured], backend: str, timed: int) -> str:
    wrong = sum(backend in entry.get("wrong", {}) for entry in entries)
    failed = sum(
        not entry.get("seconds", {}).get(f"ours {backend}") and bool(_failure(entry, backend))
        for entry in entries
    )
    text = f"{timed} of {len(entries)}"
    return text + f", {wrong} WRONG" * (wrong > 0) + f", {failed} failed" * (failed > 0)


def every(document: Document) -> str:
    """One line for each entry and backend."""
    gpu = document["machine"]["gpu"]
    lines = [
        "| what | pass | backend | us | ratio | of roofline | null | how |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in document["entries"]:
        for backend in backends(entry["row"]):
            name = f"{entry['row']}: {entry['name']}"
            cells = [name + " NCHW" * (entry["layout"] == "NCHW"), entry["task"], backend]
            seconds = entry.get("seconds", {}).get(f"ours {backend}")
            if seconds is None:
                cells += [_why(entry, backend), "", "", "", ""]
            else:
                natives = {
                    name.removeprefix("native "): value
                    for name, value in entry["seconds"].items() if name.startswith("native ")
                }  # fmt: skip
                against = [f"{name} {value / seconds:.2f}" for name, value in natives.items()]
                against += [f"{name} absent" for name in entry.get("absent", {})]
                low, high = entry["null_spread"]
                part = share(entry, backend, gpu)
                how = _how(entry, backend)
                cells += [
                    f"{seconds * 1e6:.1f}", ", ".join(against),
                    "" if part is None else f"{part:.0%}", f"{low:.2f}-{high:.2f}", ", ".join(how),
                ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _how(entry: Measured, backend: str) -> list[str]:
    """What ran: for each choice of the tuner the queries that it was made for, most first."""
    chosen = Counter(entry["tiles"].get(backend, ())).most_common()
    how = [f"{name} x{count}" if count > 1 else name for name, count in chosen[:_MOST_TILES]]
    if len(chosen) > _MOST_TILES:
        how.append(f"{len(chosen) - _MOST_TILES} others")
    if not entry["graph"]:
        how.append("no graph")
    alone = entry.get("gpu_seconds", {})
    if ours := alone.get(f"ours {backend}"):
        ratios = (
            f"{name.removeprefix('native ')} {value / ours:.2f}"
            for name, value in alone.items() if name.startswith("native ")
        )  # fmt: skip
        how.append(f"GPU alone {ours * 1e6:.1f} us: {', '.join(ratios)}")
    if backend != "triton" and {SUSPECT, SUSPECT_ONCE} & entry.get("failed", {}).keys():
        how.append(f"without {SUSPECT}")
    return how


def _why(entry: Measured, backend: str) -> str:
    if backend in entry.get("wrong", {}):
        return f"WRONG: {entry['wrong'][backend]}"
    why = _failure(entry, backend) or entry.get("skipped") or "not timed"
    return " ".join(str(why).replace("|", "/").split())[:300]


def _failure(entry: Measured, backend: str) -> str:
    """Why a backend has no time: it failed, or what all of the entry's depend on did."""
    others = (f"{name}: {why}" for name, why in entry.get("failed", {}).items()
              if name not in (*BACKENDS, AUTO, SUSPECT, SUSPECT_ONCE))  # fmt: skip
    wrong = backend in entry.get("wrong", {})
    return entry.get("failed", {}).get(backend) or ("" if wrong else next(others, ""))


def whole(document: Document) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    return "\n\n".join([facts, goals(document), every(document), ""])


def picture(document: Document) -> str:
    """An SVG: a bar for each goal and backend from the line where native is, a tick at the goal."""
    colours = {"cuda": "#1f77b4", "triton": "#ff7f0e", AUTO: "#2ca02c"}
    bars = [(goal, backend) for goal in GOALS for backend in goal.ratio]
    height, left, octave = 18, 330, 90
    width, bottom = left + 5 * octave + 70, 34 + height * len(bars)

    def x(value: float) -> float:
        return left + octave * (min(max(log2(value), -1.9), 2.9) + 2)

    parts = [
        f'<text x="10" y="18" font-weight="bold">{escape(document["machine"]["gpu"])}: '
        "native's time over ours</text>"
    ]
    for mark in (0.25, 0.5, 1, 2, 4, 8):
        at = left + octave * (log2(mark) + 2)
        parts.append(
            f'<path d="M{at} 30V{bottom}" stroke="{"#000" if mark == 1 else "#ddd"}"/>'
            f'<text x="{at}" y="{bottom + 14}" text-anchor="middle">{mark:g}</text>'
        )
    for index, ((goal, backend), reached) in enumerate(zip(bars, ratios(document), strict=True)):
        top, mean = 34 + height * index, reached["ratio"]
        label = escape(f"{goal.title} / {goal.rival}, {backend}")
        parts.append(f'<text x="10" y="{top + 12}">{label}</text>')
        aim = x(goal.ratio[backend])
        parts.append(f'<path d="M{aim:.1f} {top}v15" stroke="#d62728" stroke-width="2"/>')
        if mean is not None:
            ends = sorted((x(1), x(mean)))
            parts.append(
                f'<rect x="{ends[0]:.1f}" y="{top + 2}" width="{ends[1] - ends[0]:.1f}" '
                f'height="11" fill="{colours[backend]}" fill-opacity="0.8"/>'
                f'<text x="{width - 45}" y="{top + 12}">{mean:.2f}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{bottom + 26}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
