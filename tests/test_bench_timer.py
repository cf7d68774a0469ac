"""The side-by-side timer, on a clock of its own, and the arithmetic of peaks."""

from itertools import pairwise

import pytest

from gdfast.bench import peak, timer

PEAK = peak.Peak(flops=100e9, bandwidth=10e9)


class Clock:
    """A clock that only the work moves; `slowdown` grows by `drift` for every second."""

    def __init__(self, drift=0.0):
        self.now, self.drift = 0.0, drift
        self.log = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds * (1 + self.drift * self.now)

        return call


def test_shortlist_leaves_out_what_is_slower():
    clock = Clock()
    candidates = {"a": clock.work("a", 1e-3), "b": clock.work("b", 1.1e-3), "c": clock.work("c", 2)}
    kept, dropped = timer.shortlist(candidates, 1.15, clock=clock)
    assert kept == ["a", "b"] and dropped == pytest.approx({"c": 2})
    assert "".join(clock.log) == "abc" + "abccba"  # warmed up, then there and back
    assert timer.shortlist({}, 1.15) == ([], {})


def test_medians_and_ratio():
    clock = Clock()
    candidates = {"ours": clock.work("ours", 1e-3), "native": clock.work("native", 3e-3)}
    times = timer.compare(candidates, rounds=4, clock=clock)
    assert times.median("ours") == pytest.approx(1e-3)
    assert times.median("native") == pytest.approx(3e-3)
    assert times.ratio("ours", against="native") == pytest.approx(3)
    assert times.spread("ours", against="native") == pytest.approx((3, 3))
    assert times.null_spread == pytest.approx((1, 1))
    assert times.best(candidates) == "ours"
    assert [len(values) for values in times.seconds.values()] == [4, 4]


def test_visits_last_long_enough():
    clock = Clock()
    timer.compare(
        {"quick": clock.work("quick", 1e-6), "slow": clock.work("slow", 1.0)},
        rounds=2, baselines=["slow"], min_seconds=1e-3, clock=clock,
    )  # fmt: skip
    # Two rounds of two visits, and at most as much again for the calibration.
    assert 4 * 1000 <= clock.log.count("quick") <= 8 * 1000
    assert clock.log.count("slow") <= 2 * 4 + 3  # with its twin, one call each visit


def test_drift_of_the_machine_cancels():
    # Over the whole run the machine gets many times slower: one candidate after the other would
    # show that as a difference between equals.
    clock = Clock(drift=20.0)
    candidates = {name: clock.work(name, 2e-3) for name in "abcd"}
    times = timer.compare(candidates, rounds=20, clock=clock)
    assert max(times.seconds["a"]) > 10 * min(times.seconds["a"])
    for name in "bcd":
        assert times.ratio(name, against="a") == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_candidate_follows_every_other_equally_often(count):
    clock = Clock()
    names = [str(index) for index in range(count - 1)]  # and the null case's twin
    twin = clock.work("twin", 1.0)
    candidates = {name: clock.work(name, 1.0) for name in names}
    timer.compare(candidates, rounds=count, twin=lambda name: twin, clock=clock)
    visits = clock.log[-2 * count * count :]
    rounds = [visits[start : start + 2 * count] for start in range(0, len(visits), 2 * count)]
    assert all(visit == visit[::-1] for visit in rounds)  # A B B A
    follows = [pair for visit in rounds for pair in pairwise(visit)]
    frequency = {pair: follows.count(pair) for pair in set(follows) if pair[0] != pair[1]}
    assert len(frequency) == count * (count - 1)
    assert set(frequency.values()) == {2}


def test_null_case_is_a_twin_of_the_quickest_baseline():
    clock = Clock()
    made = []

    def twin(name):
        made.append(name)
        return clock.work("twin", 4e-3)

    candidates = {
        "ours": clock.work("ours", 1e-3),
        "slow": clock.work("slow", 5e-3),
        "fast": clock.work("fast", 2e-3),
    }
    times = timer.compare(candidates, 2, baselines=["slow", "fast"], twin=twin, clock=clock)
    assert made == ["fast"] and times.null_of == "fast"
    assert times.null_spread == pytest.approx((0.5, 0.5))


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="compare: candidates, rounds: expected at least one"):
        timer.compare({})
    with pytest.raises(ValueError, match="compare: candidates, rounds: expected at least one"):
        timer.compare({"ours": lambda: None}, rounds=0)


def test_percentile():
    assert timer.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert timer.percentile([1.0, 2.0, 3.0], 0.1) == pytest.approx(1.2)
    assert timer.percentile([7.0], 0.9) == 7.0


def test_peak_sets_the_floor():
    assert PEAK.floor(flops=200_000_000_000, bytes=10_000_000_000) == 2
    assert PEAK.bound(flops=200_000_000_000, bytes=10_000_000_000) == "compute"
    assert PEAK.floor(flops=1, bytes=30_000_000_000) == 3
    assert PEAK.bound(flops=1, bytes=30_000_000_000) == "memory"
    assert PEAK.better(peak.Peak(1.0, 20e9)) == peak.Peak(100e9, 20e9)


def test_peak_counts_operations_and_bytes(monkeypatch):
    monkeypatch.setattr(peak, "_GEMM_SIZES", (100,))
    monkeypatch.setattr(peak, "_CONVOLUTIONS", ((10, 5, 3),))
    monkeypatch.setattr(peak, "_MEMORY_BYTES", 4000)
    monkeypatch.setattr(peak, "_best", lambda call, seconds: call() is not None and 0.5)
    # 2 x 100^3 operations of the product are more than 2 x 8 x 5^2 x 10^2 x 3^2 of the convolution;
    # the addition moves three times 4000 bytes.
    assert peak.measure(seconds=10) == peak.Peak(flops=2 * 2e6, bandwidth=2 * 12_000)
