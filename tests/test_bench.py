"""`gdfast bench`: the results, what is told of them, and the command. No time matters here."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gdfast import bench, cli, files
from gdfast.bench import (
    cases,
    layers,
    machine,
    memory,
    norm,
    peak,
    plot,
    report,
    result,
    sgd,
    suites,
    timer,
)
from gdfast.bench.workload import Check
from gdfast.extras import MissingExtraError

SMALL = cases.Conv2dCase("small", 2, 4, 7, 6, 5, 3, 2, (2, 1), (1, 0), model="test")
PEAK = peak.Peak(flops=100e9, bandwidth=10e9)
MACHINE = {"cpu": "Test CPU", "cpus": 4, "threads": 2, "isa": "avx2", "torch": "2.13.0"}


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
    monkeypatch.setattr(machine.processor, "name", lambda: cpu)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert machine.slug() == expected


@pytest.mark.parametrize(
    ("ours", "variables", "capability", "complaint"),
    [
        ("avx512", {}, "AVX512", ""),
        ("avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "AVX2", ""),
        ("avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX512", "native was not"),
        ("avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2", "native was not"),
        ("avx512", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX512", "ours was not"),
        ("avx512", {"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2", "ours was not"),
    ],
)
def test_sides_held_to_other_instruction_sets_are_told(
    monkeypatch, ours, variables, capability, complaint
):
    class Kernels:
        isa = staticmethod(lambda: ours)
        supported_isas = staticmethod(lambda: ["baseline", "avx2", "avx512"])

    monkeypatch.setattr(machine.native, "cpu", Kernels)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.held() == ("avx2" if ours == "avx2" else "")
    assert complaint in machine.unfair() and bool(complaint) == bool(machine.unfair())


def test_memory_of_a_step_is_measured_in_processes_of_their_own():
    ours, native = memory.compare(cases.STEPS[0], torch.float32, "NCHW", "channels_last")
    # At least the first layer's output and its gradient; no process needs gigabytes for it.
    assert 11e6 < ours < 1e9 and 11e6 < native < 1e9


def test_memory_is_told_where_it_was_measured():
    found = replace(_result(suite="step", images=64), memory=(110, 100))
    text = report.table([found, _result()], MACHINE, PEAK, "float32")
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("3x3")] == [
        "1.10", "50%"
    ]  # fmt: skip
    assert found.to_dict(PEAK)["memory"] == {"ours": 110, "native": 100}


def test_slow_variants_are_not_timed_in_full():
    work = layers.workload(SMALL, "forward", convolve=F.conv2d)
    slow = {"NCHW": work.native["NCHW"], "channels_last": lambda: time.sleep(0.02)}
    found = result.measure(replace(work, native=slow, shortlist=5.0), rounds=1)
    assert found.native == ("NCHW",) and found.dropped["native channels_last"] >= 0.02
    assert "native channels_last" not in found.measured.seconds


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
    norm_count = len(norm.PASSES) * len(cases.NORM_CASES)
    assert len(everything) == layer_count + norm_count + len(cases.SGD_CASES) + len(cases.STEPS)


def test_quick_suite_names_layers_that_exist():
    for model, names in suites._QUICK_LAYERS.items():
        assert set(names) <= {case.name for case in cases.LAYERS[model]}
    assert set(suites._QUICK_NORM) <= {case.size for case in cases.NORM_CASES}
    assert set(suites._QUICK_SGD) <= {case.name for case in cases.SGD_CASES}
    assert set(suites._QUICK_STEPS) <= {case.name for case in cases.STEPS}


def test_only_finds_by_letters_and_digits():
    def labels(only):
        return [item.label for item in suites.plan("step", (), torch.float32, only=only)]

    assert labels("resnet18") == labels("ResNet-18") == ["ResNet-18, batch 8, 224x224"]
    assert len(labels("")) == len(cases.STEPS)
    with pytest.raises(ValueError, match=r"only: expected a part of .*MobileNetV2.*; got 'vgg'"):
        labels("vgg")


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


def test_command_saves_before_it_prints(run, monkeypatch, tmp_path):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(report, "table", gone)
    with pytest.raises(BrokenPipeError):
        run()
    assert len(list((tmp_path / "out").glob("*.json"))) == 1


def test_command_prints_what_it_cannot_save(run, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(OSError, match="no space left"):
        run()
    assert "-- test  geometric mean" in capsys.readouterr().out


def test_command_with_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--out", str(tmp_path / "file" / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and str(tmp_path / "file") in err and len(err.splitlines()) == 1


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _pytest(*words):
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "-p", "no:cacheprovider"]
    # Where several processes test, pytest-benchmark measures nothing: this one is alone.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [*command, *words], cwd=BENCHMARKS.parent, env=alone | {"OMP_NUM_THREADS": "1"},
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
    done = _pytest("--benchmark-disable", "-k", "simple_cnn or 10-k or SimpleCNN")
    assert done.returncode == 0, done.stdout
    assert "24 passed" in done.stdout
