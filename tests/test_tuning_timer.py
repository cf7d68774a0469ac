"""The timer of candidates: what it calls how often, and which seconds it gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

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

    def test_what_a_device_does_later_is_waited_for(self, clock: list[float]) -> None:
        pending = [0.0]

        def wait() -> None:
            clock[0] += pending[0]
            pending[0] = 0.0

        def give(seconds: float) -> None:
            pending[0] += seconds

        calls = {"a": partial(give, 1e-3), "b": partial(give, 1.2e-3)}
        assert tuning_timer.measure(calls, wait) == pytest.approx({"a": 1e-3, "b": 1.2e-3})
