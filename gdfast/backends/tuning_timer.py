"""Timing a few ways of doing the same thing, in as little time as their order can be told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import ceil
from statistics import median
from typing import Any

import torch

clock = time.perf_counter
# Given a call and a number, calls it so often and tells the seconds of each.
Visit = Callable[[Callable[[], Any], int], float]

_BUDGET = 0.06  # seconds for one comparison; calls that take long get the least number of rounds
_LEAST_ROUNDS = 2
_VISIT = 1e-4  # seconds that a visit lasts at least: several calls of what is shorter
# A candidate whose quickest visit is slower by this factor than the best one's median is out.
_OUT = 1.3
# After the first call, which also compiles and allocates, only one that is slower by far.
_FAR_OUT, _LONG = 4.0, 0.05


def on_host(call: Callable[[], Any], repeats: int) -> float:
    """The seconds of a call that is done when it returns."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


class OnGpu:
    """Tells the GPU's time alone for a call: where a kernel is short, the host takes longer to give
    it than the GPU to do it, and all candidates would look alike.

    The GPU sleeps until it has been given all calls, which it then does without a gap.
    """

    _FASTEST_CLOCK = 2e9  # cycles in a second
    _SPARE = 1.5
    _LONGEST = 4e-3  # seconds that a call is given: one that waits for the GPU would need any

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = 5e-5  # seconds that the host took for each of the last calls

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        spare = self._SPARE
        while True:
            sleep = min(spare * self._host, self._LONGEST)
            seconds, was_ahead = self._visit(call, repeats, sleep)
            if was_ahead or sleep == self._LONGEST:
                return seconds
            spare *= 2  # of a GPU with a faster clock

    def _visit(self, call: Callable[[], Any], repeats: int, sleep: float) -> tuple[float, bool]:
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(sleep * repeats * self._FASTEST_CLOCK))
            begin.record()
            self._host = on_host(call, repeats)
            was_ahead = not begin.query()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / repeats, was_ahead


def measure(calls: Mapping[str, Callable[[], Any]], visit: Visit = on_host) -> dict[str, float]:
    """Median seconds per call of each, as `visit` tells; one that raises a RuntimeError has none.

    Every round visits each candidate on the way there and on the way back (A B B A), and the next
    round begins with another one: drift and warm caches favour none. What a call returns is
    dropped at once, so that the cost of fresh memory counts.
    """
    started = clock()
    repeats: dict[str, int] = {}
    first: dict[str, float] = {}
    for name, call in calls.items():
        try:
            first[name] = visit(call, 1)
        except RuntimeError:
            continue
    fastest = min(first.values(), default=0.0)
    for name, seconds in first.items():
        if seconds >= _LONG and seconds > _FAR_OUT * fastest:
            # Its first call may have found no memory of its size: once more.
            seconds = first[name] = visit(calls[name], 1)
        if seconds < _LONG or seconds <= _FAR_OUT * fastest:
            repeats[name] = max(1, ceil(_VISIT / seconds)) if seconds > 0 else 1
    visits: dict[str, list[float]] = {name: [] for name in repeats}
    contenders = list(repeats)
    rounds = 0
    while len(contenders) > 1 and (rounds < _LEAST_ROUNDS or clock() - started < _BUDGET):
        for name in [*contenders, *reversed(contenders)]:
            visits[name].append(visit(calls[name], repeats[name]))
        rounds += 1
        best = min(median(visits[name]) for name in contenders)
        contenders = [name for name in contenders if min(visits[name]) <= _OUT * best]
        contenders = contenders[1:] + contenders[:1]
    return {
        name: median(visits[name]) if visits.get(name) else seconds
        for name, seconds in first.items()
    }
