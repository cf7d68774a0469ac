"""The benchmark harness: its arithmetic, its refusals and what it writes. Nothing here is timed."""

import argparse
import json
import os
import subprocess
import sys
from itertools import pairwise
from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gdfast
from gdfast import bench, cli
from gdfast.bench import (
    cases,
    layers,
    machine,
    peak,
    plot,
    report,
    result,
    sgd,
    step,
    suites,
    timer,
)
from gdfast.bench.workload import Check, Workload, allowed_error, relative_error
from gdfast.extras import MissingExtraError

SMALL = cases.Conv2dCase("small", 2, 4, 7, 6, 5, 3, 2, (2, 1), (1, 0), model="test")
PEAK = peak.Peak(flops=100e9, bandwidth=10e9)
MACHINE = {"cpu": "Test CPU", "cpus": 4, "threads": 2, "isa": "avx2", "torch": "2.13.0"}


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


def test_error_is_relative_and_a_nan_fails():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert isnan(relative_error(torch.zeros(3), reference))  # another shape
    assert not Check({"NCHW": nan}, {"NCHW": inf}).ok
    assert not Check({"NCHW": 1.0, "channels_last": 2.0}, dict.fromkeys(layers.LAYOUTS, 1.5)).ok
    assert Check({"NCHW": 1.0}, {"NCHW": 1.0}).ok
    allowed = allowed_error(1e-3, torch.float32, terms=10_000)
    assert allowed == pytest.approx(2e-3 + 1.19e-7, rel=1e-6)
    assert allowed_error(0.0, torch.float64, terms=100) == pytest.approx(11 * 2.22e-16, rel=1e-3)


@pytest.mark.parametrize("task", layers.PASSES)
def test_a_pass_is_what_autograd_gives(task):
    work = layers.workload(SMALL, task, torch.float64, convolve=F.conv2d)
    generator = torch.Generator().manual_seed(0)
    input, weight, grad_output = (
        torch.randn(shape, generator=generator).double()
        for shape in (SMALL.input_shape, SMALL.weight_shape, SMALL.output_shape)
    )
    input.requires_grad_()
    weight.requires_grad_()
    output = F.conv2d(input, weight, None, SMALL.stride, SMALL.padding)
    output.backward(grad_output)
    expected = {"forward": output, "grad_input": input.grad, "grad_weight": weight.grad}[task]
    for call in work.calls.values():
        torch.testing.assert_close(call(), expected.detach())
    assert work.check().ok


def test_layouts_are_real_for_one_channel():
    seen = []

    def convolve(input, weight, **geometry):
        seen.append((input.stride(), weight.stride()))
        return F.conv2d(input, weight, **geometry)

    case = cases.Conv2dCase("one channel", 2, 1, 5, 6, 3, 3, 3)
    work = layers.workload(case, "forward", convolve=convolve)
    for layout in ("NCHW", "channels_last"):
        work.ours[layout]()
    # torch calls a tensor of one channel channels_last by its strides alone.
    assert seen == [((30, 30, 6, 1), (9, 9, 3, 1)), ((30, 1, 6, 1), (9, 1, 3, 1))]


def test_no_such_pass():
    with pytest.raises(ValueError, match=r"task: expected one of .*forward.*, got 'backward'"):
        layers.workload(SMALL, "backward", convolve=F.conv2d)


def _a_little_wrong(input, weight, **geometry):
    return F.conv2d(input, weight, **geometry) * 1.00001


@pytest.mark.parametrize("task", layers.PASSES)
def test_no_speed_is_told_for_wrong_results(task):
    found = result.measure(layers.workload(SMALL, task, convolve=_a_little_wrong), rounds=1)
    assert not found.check.ok and found.times is None
    with pytest.raises(RuntimeError, match="no times, since the check failed"):
        _ = found.ratio
    assert result.geometric_means([found]) == {}
    assert "WRONG, so not timed: NCHW: error 1.0e-05" in report.table(
        [found], MACHINE, PEAK, "float32"
    )
    document = json.loads(report.to_json([found], MACHINE, PEAK, {}))
    assert document["results"][0]["check"]["ok"] is False
    assert document["results"][0]["times"] is None


def test_sgd_that_forgets_weight_decay_is_refused():
    case = cases.SgdCase("small", (100, 7))

    def forgetful(parameters, weight_decay, **settings):
        return torch.optim.SGD(parameters, **settings)

    assert not sgd.workload(case, make_optimizer=forgetful).check().ok
    assert sgd.workload(case, make_optimizer=torch.optim.SGD).check().ok


def test_sgd_s_twin_has_tensors_of_its_own():
    work = sgd.workload(cases.SgdCase("small", (5,)), make_optimizer=torch.optim.SGD)
    step_of = {name: call.__self__ for name, call in work.native.items()}
    twin = work.twin("fused").__self__
    assert twin.defaults["fused"] and step_of["fused"].defaults["fused"]
    pointers = {o.param_groups[0]["params"][0].data_ptr() for o in (*step_of.values(), twin)}
    assert len(pointers) == len(step_of) + 1


def test_fused_is_no_rival_where_it_is_wrong():
    assert set(sgd.native_variants(torch.float32)) == {"loop", "foreach", "fused"}
    assert set(sgd.native_variants(torch.bfloat16)) == {"loop", "foreach"}


class _Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 6 * 6, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


class _HalfGradient(_Small):
    def forward(self, x):
        features = self.conv(x)
        return self.fc(torch.relu((features + features.detach()) / 2).flatten(1))


STEP = cases.StepCase("small", "none", 4, 1, 8, 8, 10)


def _step(ours):
    torch.manual_seed(0)
    native = _Small()
    ours.load_state_dict(native.state_dict())
    return step.workload(STEP, ours=ours, native=native, make_optimizer=torch.optim.SGD)


def test_step_by_a_wrong_gradient_is_refused():
    assert not _step(_HalfGradient()).check().ok


def test_step_by_equal_models():
    work = _step(_Small())
    assert work.check().ok
    assert set(work.ours) == {"NCHW", "channels_last"}
    assert {name.split()[0] for name in work.native} == set(work.ours)
    assert {name.split()[1] for name in work.native} == {"loop", "foreach", "fused"}
    # Each variant trains a model of its own: the first losses agree however often others ran.
    first = [call().item() for call in work.calls.values()]
    assert first == pytest.approx([first[0]] * len(first), rel=1e-5)
    assert work.twin("NCHW fused")().item() == pytest.approx(first[0], rel=1e-5)
    # forward and grad_weight of the convolution, all three products of the linear layer
    assert work.flops == 2 * (4 * 6 * 6 * 4 * 9) * 2 + 3 * 2 * (4 * 144 * 10)


def _result(ours=(1e-3, 2e-3), native=(4e-3, 3e-3), **changes):
    layouts = ("NCHW", "channels_last")
    sides = {"ours": ours, "native": native}
    seconds = {
        f"{side} {layout}": [value, value, value]
        for side, values in sides.items()
        for layout, value in zip(layouts, values, strict=True)
    }
    facts = {
        "suite": "resnet18", "name": "3x3 8->8 @4", "task": "forward", "backend": "cpu",
        "ours": layouts, "native": layouts, "flops": 50_000_000, "bytes": 10, "images": 0,
        "check": Check({"NCHW": 1e-7}, {"NCHW": 2e-7}),
        "times": timer.Comparison(seconds, "native channels_last", [3e-3, 3.3e-3, 2.7e-3]),
    }  # fmt: skip
    return result.Result(**(facts | changes))


def test_ratio_is_best_against_best():
    found = _result()
    assert (found.best_ours, found.best_native) == ("NCHW", "channels_last")
    assert found.ratio == pytest.approx(3)
    assert found.same_layout == pytest.approx({"NCHW": 4, "channels_last": 1.5})
    assert found.share(PEAK) == pytest.approx(0.5)  # 0.5 ms at the peak, 1 ms taken
    slower = _result(ours=(12e-3, 24e-3))
    assert result.geometric_means([found, slower]) == pytest.approx({"resnet18": 0.8660254})


def test_table_tells_what_it_shows():
    step_result = _result(suite="step", name="SimpleCNN", task="step", images=64)
    memory = _result(suite="sgd", name="1 M", task="update", bytes=5_000_000, flops=1)
    text = report.table([_result(), memory, step_result], MACHINE, PEAK, "float32")
    lines = text.splitlines()
    assert "Test CPU, 2 of 4 CPUs, kernels avx2" in lines[0]
    assert "100 GFLOP/s, 10 GB/s" in lines[0]
    row = next(line for line in lines if line.startswith("3x3"))
    for cell in ("1.00 ms", "3.00 ms", "3.00", "50.0 GFLOP/s", "50%", "0.93-1.09", "4.00", "1.50"):
        assert cell in row
    assert "5.0 GB/s" in next(line for line in lines if line.startswith("1 M"))
    assert "64,000 images/s" in next(line for line in lines if line.startswith("SimpleCNN"))
    ends = {len(line) for line in lines if line.startswith(("3x3", "1 M", "SimpleCNN"))}
    assert len(ends) == 1  # the last column is aligned to the right
    assert "above 1 we are faster. Geometric mean of 3: 3.00" in lines[-1]
    assert "Ours ran on: cpu." in lines


def test_a_busy_machine_is_said_to_be():
    times = _result().measured
    busy = timer.Comparison(times.seconds, times.null_of, [1e-3, 3e-3, 9e-3])
    assert "machine was busy" in report.table([_result(times=busy)], MACHINE, PEAK, "float32")
    assert "machine was busy" not in report.table([_result()], MACHINE, PEAK, "float32")


def test_json_holds_everything():
    document = json.loads(report.to_json([_result()], MACHINE, PEAK, {"rounds": 3}))
    assert document["schema"] == 1
    assert document["machine"] == MACHINE and document["settings"] == {"rounds": 3}
    assert document["peak"] == {"flops": 100e9, "bandwidth": 10e9}
    assert document["geometric_mean"] == pytest.approx({"resnet18": 3})
    (entry,) = document["results"]
    assert entry["check"] == {"ok": True, "errors": {"NCHW": 1e-7}, "allowed": {"NCHW": 2e-7}}
    times = entry["times"]
    assert times["rounds"]["ours NCHW"] == [1e-3] * 3
    assert times["ratio"] == pytest.approx(3) and times["spread"] == pytest.approx([3, 3])
    assert times["best_ours"] == "NCHW" and times["bound"] == "compute"


def test_json_of_an_error_that_is_no_number():
    failed = _result(check=Check({"NCHW": nan}, {"NCHW": 1e-7}), times=None)
    document = json.loads(report.to_json([failed], MACHINE, PEAK, {}))
    assert document["results"][0]["check"]["errors"] == {"NCHW": "nan"}


def test_machine_tells_what_a_figure_must_be_read_with():
    facts = machine.describe()
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert facts["cpu"] and facts["date"].endswith("+00:00")
    json.dumps(facts)


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-2cpu"),
        ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14-96-core-2cpu"),
    ],
)
def test_machine_s_name_in_file_names(monkeypatch, cpu, expected):
    monkeypatch.setattr(machine, "cpu_name", lambda: cpu)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert machine.slug() == expected


def test_plot_is_a_picture_and_leaves_no_parts(tmp_path):
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "gdfast[train]"')
    failed = _result(check=Check({"NCHW": nan}, {"NCHW": 1e-7}), times=None)
    plot.save([_result(), failed, _result(suite="sgd", task="update")], "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_every_suite_is_planned_from_the_table():
    for model, table in cases.LAYERS.items():
        labels = [item.label for item in suites.plan(model, layers.PASSES, torch.float32)]
        assert labels == [f"{case} {task}" for case in table for task in layers.PASSES]
    everything = suites.plan("all", ["forward"], torch.float32)
    layer_count = sum(map(len, cases.LAYERS.values()))
    assert len(everything) == layer_count + len(cases.SGD_CASES) + len(cases.STEPS)


def test_quick_suite_names_layers_that_exist():
    for model, names in suites._QUICK_LAYERS.items():
        assert set(names) <= {case.name for case in cases.LAYERS[model]}
    assert set(suites._QUICK_SGD) <= {case.name for case in cases.SGD_CASES}


def test_no_such_suite():
    with pytest.raises(ValueError, match=r"suite: expected one of quick, all, .*, got 'vgg'"):
        suites.plan("vgg", layers.PASSES, torch.float32)


def test_options_offer_what_there_is():
    assert set(bench._SUITES) == set(suites.SUITES)
    assert set(bench._PASSES) == set(layers.PASSES)


def _options(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words", [("--suite", "vgg"), ("--rounds", "0"), ("--threads", "two"), ("--passes", "all")]
)
def test_bad_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        _options(*words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def _small_workload(convolve):
    return [
        suites.Planned("small", lambda: layers.workload(SMALL, "forward", convolve=convolve)),
        suites.Planned(
            "update",
            lambda: sgd.workload(cases.SgdCase("9", (9,)), make_optimizer=torch.optim.SGD),
        ),
    ]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the whole command on two tiny workloads; gives its status, stdout and stderr."""

    def command(*words, convolve=F.conv2d):
        monkeypatch.setattr(peak, "measure", lambda dtype: PEAK)
        monkeypatch.setattr(suites, "plan", lambda *_: _small_workload(convolve))
        threads = torch.get_num_threads()
        try:
            status = bench.main(_options("--rounds", "2", "--out", str(tmp_path / "out"), *words))
        finally:
            torch.set_num_threads(threads)
        return status, *capsys.readouterr()

    return command


def test_command_prints_and_saves(run, tmp_path):
    status, out, err = run()
    assert status == 0
    assert "-- test  geometric mean" in out and "-- sgd  geometric mean" in out
    assert "[1/2] small" in err and "[2/2] update" in err and "saved" in err
    stem = f"{machine.slug()}-quick-float32-{torch.get_num_threads()}t"
    document = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert [entry["suite"] for entry in document["results"]] == ["test", "sgd"]
    assert document["settings"]["rounds"] == 2


def test_command_prints_json(run, tmp_path):
    status, out, _ = run("--json", "--threads", "1")
    assert status == 0
    assert json.loads(out)["machine"]["threads"] == 1


def test_command_fails_on_wrong_results(run):
    status, out, _ = run(convolve=_a_little_wrong)
    assert status == 1
    assert "WRONG, so not timed" in out and "1 of 2 gave wrong results" in out


def test_command_without_matplotlib(run, monkeypatch, tmp_path):
    def missing(*_):
        raise MissingExtraError('the plot needs matplotlib: pip install "gdfast[train]"')

    monkeypatch.setattr(plot, "require", missing)
    status, out, err = run()
    assert status == 0 and "-- test  geometric mean" in out
    assert 'no plot: the plot needs matplotlib: pip install "gdfast[train]"' in err
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]


def test_command_with_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--out", str(tmp_path / "file" / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and str(tmp_path / "file") in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("task", layers.PASSES)
def test_our_layers_pass_their_check(task, dtype):
    case = cases.SIMPLE_CNN[0].with_batch(2)
    work = suites.layer_workload(case, task, dtype)
    assert isinstance(work, Workload) and work.backend
    assert work.check().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_our_sgd_passes_its_check(dtype):
    work = suites.sgd_workload(cases.SGD_CASES[1], dtype)
    assert work.backend
    assert work.check().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_our_step_passes_its_check_against_plain_layers(dtype):
    work = suites.step_workload(cases.STEPS[0], dtype)
    assert work.backend
    assert work.check().ok


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_table_names_the_backend_asked_for(backend):
    with gdfast.backend(backend):
        work = [
            suites.layer_workload(cases.SIMPLE_CNN[0].with_batch(1), "forward", torch.float32),
            suites.sgd_workload(cases.SGD_CASES[0], torch.float32),
            suites.step_workload(cases.STEPS[0], torch.float32),
        ]
    assert {item.backend for item in work} == {"reference"}


def test_native_side_of_a_step_has_none_of_our_layers(monkeypatch):
    seen = {}

    def workload(case, dtype, *, ours, native, **_):
        seen.update(ours=ours, native=native)

    monkeypatch.setattr(suites.step, "workload", workload)
    suites.step_workload(cases.STEPS[0], torch.float32)
    classes = {side: {type(m) for m in model.modules()} for side, model in seen.items()}
    assert gdfast.nn.Conv2d in classes["ours"] and nn.Conv2d not in classes["ours"]
    assert nn.Conv2d in classes["native"] and gdfast.nn.Conv2d not in classes["native"]
    for ours, native in zip(*(seen[side].parameters() for side in ("ours", "native")), strict=True):
        assert torch.equal(ours, native)


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _pytest(*words):
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *words], cwd=BENCHMARKS.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_benchmarks_cover_the_table():
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    listed = _pytest("--collect-only", "--benchmark-only").stdout
    everything = suites.plan("all", layers.PASSES, torch.float32)
    groups = {line.rsplit("-ours", 1)[0] for line in listed.splitlines() if "-ours-" in line}
    assert len(groups) == len(everything)


def test_benchmarks_run():
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    done = _pytest("--benchmark-disable", "-k", "simple_cnn or 10-k or step")
    assert done.returncode == 0, done.stdout
    assert "28 passed" in done.stdout
