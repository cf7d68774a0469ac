"""What measuring a workload gave, or why no speed is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from statistics import geometric_mean
from typing import Any

from gdfast.bench import timer
from gdfast.bench.peak import Peak
from gdfast.bench.workload import Check, Workload


@dataclass(frozen=True)
class Result:
    """A workload's check and, only where that held, its times.

    `dropped` are the variants that were too slow to be timed in full, with the seconds that a first
    look gave; `memory` the peak bytes of a training step, ours and native's, if it was asked for.
    """

    suite: str
    name: str
    task: str
    backend: str
    ours: tuple[str, ...]
    native: tuple[str, ...]
    flops: int
    bytes: int
    images: int
    check: Check
    times: timer.Comparison | None
    dropped: dict[str, float] = field(default_factory=dict)
    memory: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        return f"{self.suite}: {self.name}" + (f", {self.task}" if self.task != self.suite else "")

    @property
    def measured(self) -> timer.Comparison:
        if self.times is None:
            raise RuntimeError(f"{self.label}: no times, since the check failed: {self.check}")
        return self.times

    @property
    def best_ours(self) -> str:
        return self._best("ours", self.ours)

    @property
    def best_native(self) -> str:
        return self._best("native", self.native)

    @property
    def seconds(self) -> float:
        """Median of our best variant."""
        return self.measured.median(f"ours {self.best_ours}")

    @property
    def native_seconds(self) -> float:
        """Median of the best native variant."""
        return self.measured.median(f"native {self.best_native}")

    @property
    def ratio(self) -> float:
        """Best native median over our best median: above 1 we are faster."""
        return self.native_seconds / self.seconds

    @property
    def spread(self) -> tuple[float, float]:
        """Where the middle 80 % of the rounds' own ratios lie."""
        return self.measured.spread(f"ours {self.best_ours}", f"native {self.best_native}")

    @property
    def same_layout(self) -> dict[str, float]:
        """Ratio in each layout: the best of native's variants in it over ours."""
        ratios = {}
        for layout in self.ours:
            rivals = [name for name in self.native if name.split()[0] == layout]
            if rivals:
                best = self._best("native", rivals)
                ratios[layout] = self.measured.ratio(f"ours {layout}", f"native {best}")
        return ratios

    def share(self, peak: Peak) -> float:
        """The floor that the machine's peaks set, over our time: 1 is as fast as they allow."""
        return peak.floor(self.flops, self.bytes) / self.seconds

    def to_dict(self, peak: Peak) -> dict[str, Any]:
        """Everything as plain data, for JSON; times in seconds per call."""
        facts: dict[str, Any] = {
            "suite": self.suite,
            "name": self.name,
            "task": self.task,
            "backend": self.backend,
            "flops": self.flops,
            "bytes": self.bytes,
            "images": self.images,
            "check": {
                "ok": self.check.ok,
                "errors": _numbers(self.check.errors),
                "allowed": _numbers(self.check.allowed),
            },
            "memory": self.memory and dict(zip(("ours", "native"), self.memory, strict=True)),
            "times": None,
        }
        if self.times is not None:
            facts["times"] = {
                "median": {name: self.times.median(name) for name in self.times.seconds},
                "rounds": self.times.seconds,
                "best_ours": self.best_ours,
                "best_native": self.best_native,
                "ratio": self.ratio,
                "spread": self.spread,
                "same_layout": self.same_layout,
                "dropped": self.dropped,
                "null_of": self.times.null_of,
                "null_spread": self.times.null_spread,
                "bound": peak.bound(self.flops, self.bytes),
                "share_of_peak": self.share(peak),
            }
        return facts

    def _best(self, side: str, variants: tuple[str, ...] | list[str]) -> str:
        return self.measured.best([f"{side} {name}" for name in variants])[len(side) + 1 :]


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """As JSON can hold them: it has no NaN and no infinity."""
    return {name: value if isfinite(value) else str(value) for name, value in values.items()}


def measure(workload: Workload, rounds: int = 15) -> Result:
    """Check a workload and time it; without the times where the check fails."""
    check = workload.check()
    ours, native = list(workload.ours), list(workload.native)
    times, dropped = None, {}
    if check.ok:
        if workload.shortlist:
            ours, slow_ours = timer.shortlist(workload.ours, workload.shortlist)
            native, slow_native = timer.shortlist(workload.native, workload.shortlist)
            dropped = _by_side(slow_ours, slow_native)
        twin = workload.twin
        baselines = [f"native {name}" for name in native]
        times = timer.compare(
            {name: workload.calls[name] for name in [*(f"ours {n}" for n in ours), *baselines]},
            rounds,
            baselines=baselines,
            twin=twin and (lambda name: twin(name.removeprefix("native "))),
        )
    return Result(
        workload.suite,
        workload.name,
        workload.task,
        workload.backend,
        tuple(ours),
        tuple(native),
        workload.flops,
        workload.bytes,
        workload.images,
        check,
        times,
        dropped,
    )


def _by_side(ours: Mapping[str, float], native: Mapping[str, float]) -> dict[str, float]:
    return {f"ours {name}": value for name, value in ours.items()} | {
        f"native {name}": value for name, value in native.items()
    }


def geometric_means(results: list[Result]) -> dict[str, float]:
    """Geometric mean of the ratios by suite, in order; suites without any time are left out."""
    ratios: dict[str, list[float]] = {}
    for result in results:
        if result.times is not None:
            ratios.setdefault(result.suite, []).append(result.ratio)
    return {suite: geometric_mean(values) for suite, values in ratios.items()}
