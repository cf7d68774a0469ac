"""Side-by-side timing in one process, for machines whose speed drifts.

Every round visits each candidate twice, once on the way there and once on the way back (A B B A),
and the next round goes in another order. Slow drift then hits all alike, and none is always the
one that finds the caches warm. The null case, one candidate against itself under the
same treatment, tells how far a ratio may stray by chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

_MAX_REPEATS = 100_000


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of each candidate, one value per round.

    `null` holds the values of the null case: candidate `null_of` once more under another name.
    """

    seconds: dict[str, list[float]]
    null_of: str
    null: list[float]

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return median(self.seconds[name])

    def best(self, names: Iterable[str]) -> str:
        """The candidate among `names` with the smallest median."""
        return min(names, key=self.median)

    def ratio(self, name: str, against: str) -> float:
        """How many times faster `name` is than `against`, by their medians."""
        return self.median(against) / self.median(name)

    def spread(self, name: str, against: str) -> tuple[float, float]:
        """The range that holds the middle 80 % of the rounds' own ratios."""
        return _middle(self.seconds[against], self.seconds[name])

    @property
    def null_spread(self) -> tuple[float, float]:
        """The same range for the null case, whose true ratio is 1."""
        return _middle(self.seconds[self.null_of], self.null)


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    *,
    baselines: Iterable[str] | None = None,
    twin: Callable[[str], Callable[[], Any]] | None = None,
    min_seconds: float = 2e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time the candidates against each other.

    Each is warmed up and its number of calls per visit calibrated, so that a visit lasts at least
    `min_seconds`. What a call returns is dropped at once, as in a training loop: the cost of fresh
    memory is part of the time.

    The null case is a twin of the quickest of `baselines` (default: all): `twin` makes it from that
    one's name. It must share with it what candidates share with each other, no more: a twin that
    worked on the same memory, where the others have their own, would warm the caches for it.
    Default: the same call, for candidates that share all their inputs.

    Raises ValueError when there is nothing to compare.
    """
    if not candidates or rounds < 1:
        raise ValueError(
            f"compare: candidates, rounds: expected at least one of each, "
            f"got {len(candidates)} and {rounds}"
        )
    calls = dict(candidates)
    repeats: dict[Any, int] = {}
    estimates: dict[str, float] = {}
    for name, call in calls.items():
        repeats[name], estimates[name] = _calibrate(call, min_seconds, clock)
    null_of = min(calls if baselines is None else baselines, key=estimates.__getitem__)

    null = object()  # no string, so it can't clash with a candidate's name
    timed: dict[Any, Callable[[], Any]] = {**calls, null: twin(null_of) if twin else calls[null_of]}
    timed[null]()
    repeats[null] = repeats[null_of]
    order = list(timed)
    seconds: dict[Any, list[float]] = {key: [] for key in order}
    for turn in range(rounds):
        visits = _there_and_back(order, turn)
        spent = dict.fromkeys(order, 0.0)
        for key in visits:
            spent[key] += _time(timed[key], repeats[key], clock)
        for key in order:
            seconds[key].append(spent[key] / 2)
    return Comparison({name: seconds[name] for name in calls}, null_of, seconds[null])


def shortlist(
    candidates: Mapping[str, Callable[[], Any]],
    within: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[str], dict[str, float]]:
    """The candidates worth timing in full, and the others with their seconds per call.

    Each is warmed up and called twice, there and back; worth it is what takes at most `within`
    times as long as the best of them, by the quicker of its two calls.
    """
    for call in candidates.values():
        call()
    seconds = dict.fromkeys(candidates, float("inf"))
    names = list(candidates)
    for name in names + names[::-1]:
        seconds[name] = min(seconds[name], _time(candidates[name], 1, clock))
    limit = within * min(seconds.values(), default=0.0)
    kept = [name for name, taken in seconds.items() if taken <= limit]
    return kept, {name: taken for name, taken in seconds.items() if name not in kept}


def percentile(values: Sequence[float], share: float) -> float:
    """Value below which `share` (0 to 1) of the values lie, interpolated linearly."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _middle(over: Sequence[float], under: Sequence[float]) -> tuple[float, float]:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return percentile(ratios, 0.1), percentile(ratios, 0.9)


def _there_and_back(order: Sequence[Any], turn: int) -> list[Any]:
    """The visits of one round: a zigzag through the candidates, and back again.

    Over as many rounds as there are candidates, each comes right after each other one equally often
    (E. J. Williams, 1949: designs balanced for residual effects): what a call leaves in the caches
    favours none.
    """
    count = len(order)
    zigzag = [(step + 1) // 2 if step % 2 else count - step // 2 for step in range(count)]
    there = [order[(place + turn) % count] for place in zigzag]
    return there + there[::-1]


def _time(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds per call over so many calls in a row."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _calibrate(
    call: Callable[[], Any], min_seconds: float, clock: Callable[[], float]
) -> tuple[int, float]:
    """Calls per visit, and a first estimate of the seconds per call."""
    call()  # first-call costs (code paths, caches, compilation) are not what we time
    repeats = 1
    while True:
        per_call = _time(call, repeats, clock)
        if repeats * per_call >= min_seconds or repeats >= _MAX_REPEATS:
            return repeats, per_call
        # At least double; a first estimate of zero would ask for infinitely many.
        wanted = int(min_seconds / per_call) + 1 if per_call > 0 else 2 * repeats
        repeats = min(max(2 * repeats, wanted), _MAX_REPEATS)
