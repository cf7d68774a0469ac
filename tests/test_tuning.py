"""Choosing how a convolution runs: what is timed and when, what is kept, and what is exact."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mnist_files import digits, write_pair

import gdfast
from gdfast import backends, bench, doctor, ops
from gdfast.backends import choices_file, cpu, cpu_algorithms, memory, tuning, tuning_timer
from gdfast.backends.choices import Choice
from gdfast.bench import cases, suites
from gdfast.errors import FallbackWarning
from gdfast.models import SimpleCNN
from gdfast.train import Recipe, Settings, checkpoint, resume, train

pytestmark = pytest.mark.usefixtures("compiled_cpu", "threads")

OPS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")
PLAIN = {"direct": 2.0, "winograd": 1.0, "native": 3.0}


class Stopwatch:
    """Stands in for the timer: has its own seconds for each candidate, and counts."""

    def __init__(self) -> None:
        self.seconds = dict(PLAIN)
        self.timed: list[tuple[str, ...]] = []
        self.run_them = False

    def __call__(self, calls: dict[str, Any], wait: Any) -> dict[str, float]:
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
        monkeypatch.setattr(tuning_timer, "measure", lambda calls, wait: {"native": 1.0})
        assert ran(*tensors()) == ["native"] * 3
        monkeypatch.setattr(tuning_timer, "measure", lambda calls, wait: {})
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
                tuning._at_exit()
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


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("data")
    write_pair(folder, "train", *digits(250))
    return Settings(data=f"mnist:{folder}", recipe=Recipe(epochs=2, batch_size=64, warmup=2))


@pytest.fixture(scope="module")
def trained(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a finished run, by the cost model alone."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(settings, out=out, stream=io.StringIO())
    return checkpoint.load(out / checkpoint.NAME)


class TestTraining:
    @pytest.fixture(autouse=True)
    def unfused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A convolution by itself has a choice; the kernel that it shares with a pool has none."""

        def forward(model: SimpleCNN, x: torch.Tensor) -> torch.Tensor:
            x = F.max_pool2d(torch.relu(model.conv1(x)), 2)
            return model.fc(torch.flatten(x, 1))

        monkeypatch.setattr(SimpleCNN, "forward", forward)
        monkeypatch.setattr(gdfast, "swap_", lambda model, fuse: None)  # or it would find them

    def outcome(self, folder: Path) -> list[float]:
        """Losses and weights: the last bits of one kernel may not show in the losses."""
        content = checkpoint.load(folder / checkpoint.NAME)
        losses = content["state"]["steps"]["loss"].tolist()
        return [*losses, *(x for w in content["model"].values() for x in w.flatten().tolist())]

    def test_a_resumed_run_keeps_its_choices(
        self, stopwatch: Stopwatch, settings: Settings, tmp_path: Path
    ) -> None:
        from gdfast.train.errors import InterruptedRun
        from gdfast.train.progress import Progress

        native_first = {**dict.fromkeys(cpu_algorithms.ALGORITHMS, 1.0), "native": 0.1}
        ours_first = {**native_first, "native": 9.0}

        def run(name: str, seconds: dict[str, float]) -> list[float]:
            stopwatch.seconds = seconds
            start_anew()
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            train(settings, out=tmp_path / name, stream=io.StringIO())
            return self.outcome(tmp_path / name)

        whole = run("whole", native_first)
        assert run("other", ours_first) != whole  # or this test would show nothing

        def interrupt(progress: Progress, state: Any) -> None:
            if len(state.steps["loss"]) == 5:
                os.kill(os.getpid(), 2)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Progress, "step", interrupt)
            with pytest.raises(InterruptedRun):
                run("parts", native_first)
        stored = checkpoint.load(tmp_path / "parts" / checkpoint.NAME)["choices"]
        assert "native" in {value["choice"] for value in stored.values()}
        shutil.rmtree(tmp_path / "cache")
        start_anew()
        stopwatch.seconds = ours_first
        resume(tmp_path / "parts", stream=io.StringIO())
        assert self.outcome(tmp_path / "parts") == whole

    @pytest.mark.parametrize(
        "choices", [5, [], {"key": 5}, {"key": {"choice": "direct", "seconds": {"direct": -1.0}}}]
    )
    def test_choices_that_are_none_are_refused(
        self, choices: Any, trained: dict[str, Any], tmp_path: Path
    ) -> None:
        content = {**trained, "choices": choices}
        (tmp_path / checkpoint.NAME).write_bytes(checkpoint.to_bytes(content))
        with pytest.raises(gdfast.train.RunError, match="one that does not fit: expected"):
            resume(tmp_path, stream=io.StringIO())

    def test_a_choice_that_does_not_exist_is_made_anew(self, stopwatch: Stopwatch) -> None:
        arguments = tensors()
        choices: dict[str, Choice] = {}
        with tuning.recorded(choices):
            ops.conv2d(*arguments)
        hostile = dict.fromkeys(choices, Choice("os.system"))
        with tuning.recorded(hostile) as uses:
            ops.conv2d(*arguments)
        assert [use.choice.name for use in uses] == ["winograd"]

    def test_choices_hold_whatever_the_mode(self, stopwatch: Stopwatch) -> None:
        arguments = tensors()
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        choices: dict[str, Choice] = {}
        with tuning.recorded(choices):
            ops.conv2d(*arguments)
        with gdfast.autotune("off"), tuning.recorded(choices) as uses:
            ops.conv2d(*arguments)
        assert [use.choice.name for use in uses] == ["native"]


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
