"""The timer of candidates: what it calls how often, and which seconds it gives."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdfast.backends import tuning_timer

pytestmark = pytest.mark.usefixtures("compiled_cpu", "threads")


class TestTimer:
    """With a clock that only calls move."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [0.0]
        monkeypatch.setattr(tuning_timer, "clock", lambda: now[0])
        return now

    def calls(self, now: list[float], seen: list[str], **seconds: Any) -> dict[str, Any]:
        def make(name: str) -> Any:
            def call() -> None:
                seen.append(name)
                cost = seconds[name]
                now[0] += cost(seen.count(name)) if callable(cost) else cost

            return call

        return {name: make(name) for name in seconds}

    def test_there_and_back(self, clock: list[float]) -> None:
        seen: list[str] = []
        times = tuning_timer.measure(self.calls(clock, seen, a=0.1, b=0.11, c=0.12))
        assert times == pytest.approx({"a": 0.1, "b": 0.11, "c": 0.12})
        assert seen == [*"abc", *"abccba", *"bcaacb"]

    def test_the_first_call_does_not_count(self, clock: list[float]) -> None:
        times = tuning_timer.measure(
            self.calls(clock, [], a=0.01, b=lambda count: 0.5 if count == 1 else 0.011)
        )
        assert times == pytest.approx({"a": 0.01, "b": 0.011})
        seen: list[str] = []
        times = tuning_timer.measure(self.calls(clock, seen, a=0.01, b=0.5))
        # Slower by far, and long: not worth more than a second look.
        assert times["b"] == pytest.approx(0.5) and seen.count("b") == 2
        times = tuning_timer.measure(
            self.calls(clock, [], a=0.01, b=lambda count: 0.03 if count == 1 else 0.011)
        )
        assert times["b"] == pytest.approx(0.011)

    def test_what_is_slower_by_far_is_left_soon(self, clock: list[float]) -> None:
        seen: list[str] = []
        times = tuning_timer.measure(self.calls(clock, seen, a=1e-3, b=2e-3, c=1.01e-3))
        assert seen.count("b") == 3
        assert clock[0] == pytest.approx(tuning_timer._BUDGET, rel=0.2)
        assert times == pytest.approx({"a": 1e-3, "b": 2e-3, "c": 1.01e-3})

    def test_one_long_interruption_does_not_decide(self, clock: list[float]) -> None:
        slow = self.calls(clock, [], a=lambda count: 0.04 if count == 4 else 1e-3, b=1.2e-3)
        assert tuning_timer.measure(slow) == pytest.approx({"a": 1e-3, "b": 1.2e-3})

    def test_what_is_short_is_called_several_times(self, clock: list[float]) -> None:
        seen: list[str] = []
        tuning_timer.measure(self.calls(clock, seen, a=1e-5, b=2e-5))
        assert seen[:17] == ["a", "b"] + ["a"] * 10 + ["b"] * 5

    def test_a_clock_that_stands_still_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ticks = iter(range(10**6))
        monkeypatch.setattr(tuning_timer, "clock", lambda: next(ticks) // 50 * 1e-3)
        assert tuning_timer.measure({"a": lambda: None, "b": lambda: None}).keys() == {"a", "b"}

    def test_errors_are_out(self, clock: list[float]) -> None:
        def fail() -> None:
            raise RuntimeError("out of memory")

        calls = {"bad": fail, **self.calls(clock, [], a=0.1)}
        assert tuning_timer.measure(calls) == {"a": pytest.approx(0.1)}
        assert tuning_timer.measure({"bad": fail}) == {}


class FakeGpu:
    """A GPU that does what it is given one after the other, and a host that takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.free = 0.0
        self.clock = 2e9
        self.slept: list[float] = []
        monkeypatch.setattr(tuning_timer, "clock", lambda: self.now)
        for name in ("_sleep", "synchronize", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        self.visit = tuning_timer.OnGpu(torch.device("cuda"))

    def give(self, seconds: float) -> float:
        self.free = max(self.now, self.free) + seconds
        return self.free

    def call(self, host: float, seconds: float) -> None:
        self.now += host
        self.give(seconds)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles / self.clock)
        self.give(self.slept[-1])

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = self.give(0.0)

        def synchronize() -> None:
            self.now = max(self.now, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: self.now >= event.at
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


class TestOnGpu:
    @pytest.mark.parametrize("host", [1e-6, 6e-5, 1e-3])
    def test_the_time_of_the_host_does_not_count(self, gpu: FakeGpu, host: float) -> None:
        calls = {
            "a": partial(gpu.call, host, 1.0e-5), "b": partial(gpu.call, 2 * host, 0.9e-5),
        }  # fmt: skip
        times = tuning_timer.measure(calls, gpu.visit)
        assert times == pytest.approx({"a": 1.0e-5, "b": 0.9e-5})

    def test_compiling_does_not_keep_it_asleep(self, gpu: FakeGpu) -> None:
        hosts = iter([3.0])
        assert gpu.visit(lambda: gpu.call(next(hosts, 2e-5), 1e-5), 1) == pytest.approx(1e-5)
        gpu.slept.clear()
        assert gpu.visit(lambda: gpu.call(2e-5, 1e-5), 10) == pytest.approx(1e-5)
        assert sum(gpu.slept) < 1e-3

    def test_what_waits_for_the_gpu_ends(self, gpu: FakeGpu) -> None:
        def call() -> None:
            gpu.call(1e-5, 1e-4)
            gpu.synchronize()

        assert gpu.visit(call, 1) == pytest.approx(1e-4, rel=0.2)
        assert max(gpu.slept) <= tuning_timer.OnGpu._LONGEST

    def test_a_gpu_that_wakes_early_is_told_to_sleep_longer(self, gpu: FakeGpu) -> None:
        gpu.clock = 4e9
        assert gpu.visit(lambda: gpu.call(5e-5, 1e-5), 4) == pytest.approx(1e-5)
