"""Timing a few ways of doing the same thing, in as little time as their order can be told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import ceil
from statistics import median
from typing import Any

clock = time.perf_counter

_BUDGET = 0.06  # seconds for one comparison; calls that take long get the least number of rounds
_LEAST_ROUNDS = 2
_VISIT = 1e-4  # seconds that a visit lasts at least: several calls of what is shorter
# A candidate whose quickest visit is slower by this factor than the best one's median is out.
_OUT = 1.3
# After the first call, which also compiles and allocates, only one that is slower by far.
_FAR_OUT, _LONG = 4.0, 0.05


def measure(
    calls: Mapping[str, Callable[[], Any]], wait: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median seconds per call of each; a call that raises a RuntimeError has none.

    `wait` returns when the device has done what it was given, where calls only give it something.

    Every round visits each candidate on the way there and on the way back (A B B A), and the next
    round begins with another one: drift and warm caches favour none. What a call returns is
    dropped at once, so that the cost of fresh memory counts.
    """
    started = clock()
    repeats: dict[str, int] = {}
    first: dict[str, float] = {}
    for name, call in calls.items():
        try:
            first[name] = _visit(call, 1, wait)
            if wait is not None:  # compiling may have taken seconds
                first[name] = _visit(call, 1, wait)
        except RuntimeError:
            continue
    fastest = min(first.values(), default=0.0)
    for name, seconds in first.items():
        if seconds >= _LONG and seconds > _FAR_OUT * fastest:
            # Its first call may have found no memory of its size: once more.
            seconds = first[name] = _visit(calls[name], 1, wait)
        if seconds < _LONG or seconds <= _FAR_OUT * fastest:
            repeats[name] = max(1, ceil(_VISIT / seconds)) if seconds > 0 else 1
    visits: dict[str, list[float]] = {name: [] for name in repeats}
    contenders = list(repeats)
    rounds = 0
    while len(contenders) > 1 and (rounds < _LEAST_ROUNDS or clock() - started < _BUDGET):
        for name in [*contenders, *reversed(contenders)]:
            visits[name].append(_visit(calls[name], repeats[name], wait))
        rounds += 1
        best = min(median(visits[name]) for name in contenders)
        contenders = [name for name in contenders if min(visits[name]) <= _OUT * best]
        contenders = contenders[1:] + contenders[:1]
    return {
        name: median(visits[name]) if visits.get(name) else seconds
        for name, seconds in first.items()
    }


def _visit(call: Callable[[], Any], repeats: int, wait: Callable[[], Any] | None) -> float:
    if wait is not None:
        wait()
    start = clock()
    for _ in range(repeats):
        call()
    if wait is not None:
        wait()
    return (clock() - start) / repeats
