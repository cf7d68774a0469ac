"""Choosing how a convolution runs: what is timed and when, what is kept, and what is exact."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gdfast
from gdfast import backends, bench, doctor, ops
from gdfast.backends import (
    choices_file,
    cpu,
    cpu_algorithms,
    memory,
    tuning,
    tuning_fastest,
    tuning_timer,
)
from gdfast.bench import cases, suites
from gdfast.errors import FallbackWarning

pytestmark = pytest.mark.usefixtures("compiled_cpu", "threads")

OPS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")
PLAIN = {"direct": 2.0, "winograd": 1.0, "native": 3.0}


class Stopwatch:
    """Stands in for the timer: has its own seconds for each candidate, and counts."""

    def __init__(self) -> None:
        self.seconds = dict(PLAIN)
        self.timed: list[tuple[str, ...]] = []
        self.run_them = False

    def __call__(self, calls: dict[str, Any]) -> dict[str, float]:
        self.timed.append(tuple(calls))
        if self.run_them:
            for call in calls.values():
                call()
        return {name: self.seconds[name] for name in calls}


def start_anew() -> None:
    """What a new process has in memory: nothing."""
    for known in (tuning._made, tuning._unsaved, tuning._forced, tuning._sizes):
        known.clear()
    tuning._file_was_read = tuning._warned = tuning._forked = False
    tuning._saved_at = float("-inf")
    tuning._set_session(None)  # kernels that were bound are not found any more


@pytest.fixture
def stopwatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stopwatch]:
    """A tuner with a file of its own and without a real clock."""
    monkeypatch.setenv("GDFAST_CACHE_DIR", str(tmp_path / "cache"))
    # Everything is saved at once.
    monkeypatch.setattr(tuning, "_SECONDS_BETWEEN_SAVES", float("-inf"))
    watch = Stopwatch()
    monkeypatch.setattr(tuning_timer, "measure", watch)
    monkeypatch.setattr(memory, "_seconds_per_fresh_byte", lambda threads: 0.0)
    start_anew()
    with gdfast.autotune("auto"):
        yield watch
    start_anew()


@pytest.fixture
def deterministic() -> Iterator[Callable[[bool], None]]:
    """Switches torch.use_deterministic_algorithms, for one test."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


def tensors(n: int = 2, c: int = 16, size: int = 40, **options: Any) -> tuple[torch.Tensor, ...]:
    input = torch.randn(n, c, size, size, **options).requires_grad_()
    return input, torch.randn(16, c, 3, 3, **options).requires_grad_()


def ran(*arguments: torch.Tensor, backend: str = "auto") -> list[str]:
    """What the forward pass and the two gradients run on."""
    with tuning.recorded({}) as uses:
        ops.conv2d(*arguments, padding=1, backend=backend).sum().backward()
    assert [use.op for use in uses] == list(OPS)
    return [use.choice.name for use in uses]


class TestChoice:
    def test_the_fastest_runs_and_is_timed_once(self, stopwatch: Stopwatch) -> None:
        arguments = tensors()
        stopwatch.run_them = True
        assert ran(*arguments) == ["winograd"] * 3
        assert stopwatch.timed == [("direct", "winograd", "native")] * 3
        stopwatch.seconds = {"direct": 1.0, "winograd": 2.0, "native": 3.0}
        assert ran(*arguments) == ["winograd"] * 3
        start_anew()
        assert ran(*arguments) == ["winograd"] * 3
        assert len(stopwatch.timed) == 3
        tuning.forget()
        assert ran(*arguments) == ["direct"] * 3

    def test_natives_time_has_what_fresh_memory_costs(
        self, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "_seconds_per_fresh_byte", lambda threads: 1e-7)
        stopwatch.seconds = {"direct": 1.1, "winograd": 2.0, "native": 1.0}
        large = tensors(n=82)  # results of 8,396,800 bytes, and a weight's gradient of 9,216
        with tuning.recorded({}) as uses:
            ops.conv2d(*large, padding=1).sum().backward()
        assert [use.choice.name for use in uses] == ["direct", "direct", "native"]
        assert uses[0].choice.seconds["native"] == pytest.approx(1 + 0.5 * 0.83968, rel=1e-3)
        assert ran(*tensors(n=81)) == ["native"] * 3  # 8,294,400 bytes: the heap has them

    @pytest.mark.parametrize(
        ("seconds", "name"),
        [
            ({"direct": 2.0, "winograd": 1.0, "native": 3.0}, "winograd"),
            (
                {"direct": 1.0, "winograd": 0.97, "native": 3.0},
                "direct",
            ),  # too little for its error
            ({"direct": 1.0, "winograd": 2.0, "native": 0.995}, "direct"),  # noise
            ({"direct": 1.0, "winograd": 2.0, "native": 0.98}, "native"),
            ({"direct": 9.0, "winograd": 1.0, "native": 1.0}, "native"),
        ],
    )
    def test_margins(self, seconds: dict[str, float], name: str, stopwatch: Stopwatch) -> None:
        stopwatch.seconds = seconds
        assert ran(*tensors()) == [name] * 3

    def test_each_runs_as_it_says(self, stopwatch: Stopwatch) -> None:
        input, weight = tensors()
        outputs = {}
        for name in PLAIN:
            stopwatch.seconds = PLAIN | {name: 0.1}
            tuning.forget()
            outputs[name] = ops.conv2d(input, weight, padding=1)
        assert torch.equal(outputs["native"], F.conv2d(input, weight, padding=1))
        assert not torch.equal(outputs["direct"], outputs["winograd"])
        for output in outputs.values():
            torch.testing.assert_close(output, outputs["native"], rtol=1e-3, atol=1e-3)

    def test_native_by_speed_is_no_fallback(self, stopwatch: Stopwatch) -> None:
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            assert ran(*tensors()) == ["native"] * 3
        assert backends.preview("conv2d", backends.Query(torch.device("cpu"), torch.float32)) == (
            "cpu"
        )

    def test_a_backend_asked_for_by_name_is_not_native(self, stopwatch: Stopwatch) -> None:
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        assert ran(*tensors(), backend="cpu") == ["winograd"] * 3
        with gdfast.backend("cpu"):
            assert ran(*tensors()) == ["winograd"] * 3
        with tuning.recorded({}) as uses, gdfast.backend("native"):
            ops.conv2d(*tensors())
        assert uses == []

    def test_strict_precision_has_its_own(self, stopwatch: Stopwatch) -> None:
        arguments = tensors()
        assert ran(*arguments) == ["winograd"] * 3
        with gdfast.precision("strict"):
            assert ran(*arguments) == ["direct"] * 3
        assert stopwatch.timed[3:] == [("direct", "native")] * 3
        assert ran(*arguments) == ["winograd"] * 3

    def test_threads_layouts_and_dtypes_have_their_own(self, stopwatch: Stopwatch) -> None:
        arguments = tensors()
        torch.set_num_threads(1)
        ran(*arguments)
        torch.set_num_threads(2)
        ran(*arguments)
        ran(*(tensor.detach().to(memory_format=torch.channels_last).requires_grad_()
              for tensor in arguments))  # fmt: skip
        assert len(stopwatch.timed) == 9
        assert ran(*tensors(dtype=torch.float64)) == ["direct"] * 3
        assert stopwatch.timed[9:] == [("direct", "native")] * 3
        torch.set_num_threads(1)
        ran(*arguments)
        assert len(stopwatch.timed) == 12

    def test_every_algorithm_of_the_table_has_a_name_that_the_kernels_know(self) -> None:
        query = query_of(*tensors())
        for name in cpu_algorithms.ALGORITHMS:
            for op in OPS:
                assert callable(backends.cpu.BACKEND.operations[op](query, name))

    def test_what_cannot_run_is_out(
        self, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tuning_timer, "measure", lambda calls, *_: {"native": 1.0})
        assert ran(*tensors()) == ["native"] * 3
        monkeypatch.setattr(tuning_timer, "measure", lambda calls, *_: {})
        assert set(ran(*tensors(n=3))) <= {"direct", "winograd"}


class TestPolicy:
    def test_small_ones_and_empty_ones_are_not_timed(self, stopwatch: Stopwatch) -> None:
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        assert "native" not in ran(*tensors(n=1, size=6))
        ops.conv2d(torch.zeros(0, 16, 9000, 9000), torch.zeros(16, 16, 3, 3))
        assert stopwatch.timed == []

    def test_off_and_force(self, stopwatch: Stopwatch) -> None:
        large, small = tensors(), tensors(n=1, size=6)
        predicted = [backends.cpu.algorithm(op, query_of(*large)) for op in OPS]
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        with gdfast.autotune("off"):
            assert tuning.mode() == "off"
            assert ran(*large) == predicted
        assert ran(*large) == ["native"] * 3
        stopwatch.seconds = PLAIN
        with gdfast.autotune("force"):
            assert ran(*large) == ran(*small) == ["winograd"] * 3
            stopwatch.seconds = {**PLAIN, "native": 0.1}
            assert ran(*large) == ["winograd"] * 3  # once more, not each time
        assert ran(*large) == ["winograd"] * 3
        start_anew()
        assert ran(*large) == ran(*small) == ["winograd"] * 3
        with pytest.raises(ValueError, match="autotune: mode: expected 'auto', 'off' or 'force'"):
            gdfast.autotune("on").__enter__()

    def test_deterministic_algorithms_are_not_timed(
        self, stopwatch: Stopwatch, deterministic: Callable[[bool], None]
    ) -> None:
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        arguments = tensors()
        assert ran(*arguments) == ["native"] * 3
        deterministic(True)
        assert "native" not in ran(*arguments)

    @pytest.mark.parametrize("before", [False, True])
    def test_determinism_holds_for_what_has_run_before(
        self, before: bool, stopwatch: Stopwatch, deterministic: Callable[[bool], None]
    ) -> None:
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        input, weight = tensors()
        # No session here: that one would be a situation of its own.
        native = F.conv2d(input, weight, padding=1)
        deterministic(before)
        first = ops.conv2d(input, weight, padding=1)
        deterministic(not before)
        second = ops.conv2d(input, weight, padding=1)
        timed, untimed = (second, first) if before else (first, second)
        assert torch.equal(timed, native) and not torch.equal(untimed, native)
        assert len(stopwatch.timed) == 1

    def test_ever_new_sizes_are_not_timed_for_ever(self, stopwatch: Stopwatch) -> None:
        weight = torch.randn(16, 16, 3, 3)
        for size in range(40, 40 + 2 * tuning._MOST_SIZES):
            ops.conv2d(torch.randn(1, 16, size, size), weight)
        assert len(stopwatch.timed) == tuning._MOST_SIZES
        ops.conv2d(torch.randn(1, 16, 40, 40), torch.randn(17, 16, 3, 3))  # another layer
        assert len(stopwatch.timed) == tuning._MOST_SIZES + 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_process_times_nothing_and_keeps_what_is_known(
        self, stopwatch: Stopwatch, tmp_path: Path
    ) -> None:
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        torch.set_num_threads(1)
        known, unknown = tensors(), tensors(n=3)
        ran(*known)
        before = [*(tmp_path / "cache").iterdir()]
        tuning._lock.acquire()  # as another thread would have it
        child = os.fork()
        if child == 0:
            status = 1
            try:
                query = query_of(*known)
                calls = {name: lambda: None for name in ("direct", "winograd", "native")}
                names = tuple(calls)
                key = tuning._key("conv2d", query, names, cpu.machine(query))
                with tuning._lock:
                    choice = tuning._choose(key, "conv2d", query, "direct", calls, ())
                    assert choice.name == "native"
                    new = query_of(*unknown)
                    other = tuning._choose("other", "conv2d", new, "direct", calls, ())
                assert other.name != "native" and len(stopwatch.timed) == 3
                tuning.save()
                status = 0
            finally:
                os._exit(status)
        tuning._lock.release()
        assert os.waitpid(child, 0)[1] == 0
        assert [*(tmp_path / "cache").iterdir()] == before

    def test_threads_choose_once(self, stopwatch: Stopwatch) -> None:
        input, weight = (tensor.detach() for tensor in tensors())
        stopwatch.run_them = True
        outputs = []

        def work() -> None:
            outputs.append(ops.conv2d(input, weight))

        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(stopwatch.timed) == 1
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    def test_tracing_times_nothing(self, stopwatch: Stopwatch) -> None:
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            ops.conv2d(torch.empty(8, 64, 56, 56), torch.empty(64, 64, 3, 3))
        ops.conv2d(
            torch.empty(8, 64, 56, 56, device="meta"), torch.empty(64, 64, 3, 3, device="meta")
        )
        exported = torch.export.export(gdfast.nn.Conv2d(16, 16, 3), (torch.randn(2, 16, 40, 40),))
        assert stopwatch.timed == []
        exported.module()(torch.randn(2, 16, 40, 40))
        assert stopwatch.timed == [("direct", "winograd", "native")]

    def test_random_numbers_are_left_alone(self, stopwatch: Stopwatch) -> None:
        arguments = tensors()
        stopwatch.run_them = True
        before = torch.get_rng_state()
        ran(*arguments)
        assert torch.equal(torch.get_rng_state(), before)


def query_of(input: torch.Tensor, weight: torch.Tensor) -> Any:
    from gdfast.ops import conv2d_dispatch

    return conv2d_dispatch.conv2d_query(
        "conv2d", input, weight, None, (1, 1), (1, 1, 1, 1), (1, 1), 1
    )


class TestTold:
    def test_the_doctor_tells_the_file(self, stopwatch: Stopwatch, tmp_path: Path) -> None:
        ran(*tensors())
        told = doctor.examine()["autotune"]
        assert told == {"mode": "auto", "file": str(choices_file.path()), "choices": 3}

    def explain(self, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        assert bench.main(parser.parse_args(["--explain", *words])) == 0
        return capsys.readouterr().out

    def test_explain(self, stopwatch: Stopwatch, capsys: pytest.CaptureFixture[str]) -> None:
        stopwatch.seconds = dict.fromkeys(cpu_algorithms.ALGORITHMS, 2e-3) | {"native": 4e-5}
        words = "--suite", "simple_cnn", "--passes", "forward", "grad_weight"
        lines = self.explain(capsys, *words).splitlines()
        (row,) = [line for line in lines if "grad_weight  channels_last" in line]
        assert row.startswith("3x3 1->32 @28, N 64  grad_weight  channels_last  native   times")
        assert "2.00 ms" in row and row.count("40 us") == 1
        assert any(line.startswith("-- simple_cnn") for line in lines)
        assert lines[-1].startswith("4 of 4 run on native PyTorch.")
        document = json.loads(self.explain(capsys, *words, "--json"))
        assert document["autotune"] == "auto" and document["machine"]["threads"] > 0
        assert [(each["op"], each["layout"]) for each in document["choices"]] == [
            ("conv2d", "NCHW"), ("conv2d", "channels_last"),
            ("conv2d_grad_weight", "NCHW"), ("conv2d_grad_weight", "channels_last"),
        ]  # fmt: skip
        first = document["choices"][0]
        assert (first["N"], first["C"], first["choice"]) == (64, 1, "native")
        assert first["seconds"]["direct"] == 2e-3

    def test_explain_a_whole_step_by_the_cost_model(
        self, stopwatch: Stopwatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with gdfast.autotune("off"):
            text = self.explain(capsys, "--suite", "step", "--only", "resnet20")
        assert "autotune: off" in text and text.count("cost model") >= 4
        assert stopwatch.timed == []

    def test_a_bench_row_names_what_was_chosen(self, stopwatch: Stopwatch) -> None:
        layer = cases.SIMPLE_CNN[0].with_batch(8)
        names = dict.fromkeys(cpu_algorithms.ALGORITHMS, 1.0)
        for seconds, expected in ((0.1, "reference"), (9.0, "cpu, direct")):
            tuning.forget()
            stopwatch.seconds = {**names, "direct": 0.5, "native": seconds}
            work = suites.layer_workload(layer, "forward", torch.float32)
            assert work.backend == expected and work.check().ok


def test_the_environment_sets_the_mode(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDFAST_AUTOTUNE", "force")
    tuning.choose_from_environment()
    assert tuning.mode() == "force"
    code = "from gdfast import backends"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "GDFAST_AUTOTUNE": "on"},
    )  # fmt: skip
    assert "GDFAST_AUTOTUNE=on: autotune: mode: expected 'auto', 'off' or" in result.stderr


def test_on_a_gpu_a_short_call_of_natives_is_taken_for_a_longer_one() -> None:
    """There steps of short kernels wait for the host."""
    for seconds, most in ((10e-6, 13e-6), (50e-6, 60e-6), (90e-6, 90e-6)):
        weighed = tuning_fastest.weighed(tuning.NATIVE, seconds, True)
        assert weighed == pytest.approx(tuning_fastest.NATIVE_HANDICAP * most)
        assert tuning_fastest.weighed("hopper-64", seconds, True) == seconds
        weighed = tuning_fastest.weighed(tuning.NATIVE, seconds, False)
        assert weighed == pytest.approx(tuning_fastest.NATIVE_HANDICAP * seconds)
