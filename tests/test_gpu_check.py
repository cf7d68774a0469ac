"""benchmarks/gpu_check.sh and what it runs, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from gdfast.bench.cases import Conv2dCase

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Without "hopper" job 4 goes on, job 5 does not.
WORKER = """
import json, os, sys, time
for job in json.load(sys.stdin)["jobs"]:
    def say(**event):
        print("@" + json.dumps(event), flush=True)
    id = job["id"]
    say(begin=id)
    for stage in ("cuda", "triton"):
        if stage in job["without"]:
            continue
        say(stage=stage)
        if (id, stage) == (0, "cuda"):
            print("a last word", flush=True)
            os._exit(9)
        if (id, stage) == (1, "triton"):
            time.sleep(60)
        if (id, stage) == (4, "cuda") and "hopper" not in job["without"]:
            os._exit(8)
        if (id, stage) == (5, "cuda"):
            os._exit(6)
    say(stage="time")
    if id == 2:
        os._exit(7)
    say(end=id, result={"without": job["without"]})
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripts, as modules of one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_layers

    # The scripts set these; torch's own test helpers, once imported, forbid it.
    flags = torch.backends.cudnn
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        before = flags.allow_tf32, flags.benchmark
        yield gpu_layers
        flags.allow_tf32, flags.benchmark = before


def run_check(folder: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    return subprocess.run(
        [bash, BENCHMARKS / "gpu_check.sh", folder, *options], capture_output=True, text=True,
        timeout=600, env={**os.environ, "PYTHON": sys.executable, **more},
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_stops_and_says_why(tmp_path: Path) -> None:
    result = run_check(tmp_path / "out")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "machine: cannot be used: torch.cuda.is_available() is False" in result.stdout
    assert "machine: cannot be used" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_dry_run_leaves_eight_whole_files(tmp_path: Path) -> None:
    result = run_check(tmp_path, "--dry-run", GPU_CHECK_ROWS="SGD", GPU_CHECK_COMMIT="c0ffee")
    assert result.returncode == 0, result.stdout + result.stderr
    names = {"summary.txt", "build.log", "tests.log", "sanitizer.log", "profile.txt"}
    assert {file.name for file in tmp_path.iterdir()} == names | {
        f"results.{ending}" for ending in ("json", "txt", "svg")
    }
    summary = (tmp_path / "summary.txt").read_text()
    for step in ("kernels", "measure", "profile"):
        assert f"{step}: done" in summary
    assert "commit c0ffee" in summary and "| SGD | fused | cuda |" in summary
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["machine"]["commit"] == "c0ffee"
    goals = {(g["goal"], g["rival"], g["backend"]): g for g in document["goals"]}
    triton = goals["SGD", "fused", "triton"]
    assert triton["ratio"] > 0 and triton["wanted"] == triton["entries"] == 1
    assert goals["depthwise channels_last", "cuDNN", "cuda"]["ratio"] is None
    assert "== SGD: 3 tensors, update, triton, torch.profiler" in (
        tmp_path / "profile.txt"
    ).read_text()  # fmt: skip


def test_a_worker_that_dies_or_hangs_costs_only_itself(gpu: ModuleType) -> None:
    from gpu_supervisor import Job, supervise

    results: list[tuple[int, dict[str, str], dict[str, Any]]] = []
    candidates = ("cuda", "triton")
    supervise(
        [sys.executable, "-c", WORKER],
        [Job(id, "row", candidates, 1.0, {"cuda": "hopper"} if id > 3 else {}) for id in range(6)],
        {"row": 100.0},
        lambda job, result: results.append((job.id, job.failed, result)),
        seconds=60,
    )
    assert [id for id, *_ in results] == [0, 1, 2, 3, 4, 5]
    assert results[0][1] == {"cuda": "the process ended with 9: a last word"}
    assert results[0][2] == {"without": ["cuda"]}
    assert results[1][1] == {"triton": "stopped after 1 s"}
    assert results[1][2] == {"without": ["triton"]}
    assert list(results[2][1]) == ["time"] and results[2][2] == {}
    assert results[3][1:] == ({}, {"without": []})
    assert results[4][1:] == ({"hopper": "the process ended with 8: "}, {"without": ["hopper"]})
    assert list(results[5][1]) == results[5][2]["without"] == ["hopper", "cuda"]


def test_what_went_well_without_hopper_leaves_it_out(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GDFAST_HOPPER", raising=False)
    told: list[dict[str, str]] = []

    def supervise(command: Any, jobs: Any, budgets: Any, done: Any, *, seconds: float) -> None:
        once = dict.fromkeys(("auto", "time"), "hopper, this once")  # Triton's kernels run then too
        assert jobs[0].suspects == {"cuda": "hopper", **once}
        jobs[0].failed["hopper"] = "hung"
        done(jobs[0], {"failed": {}})  # of cuda there is no time: who was to blame is not known
        told.append(dict(jobs[2].failed))
        jobs[1].failed["hopper"] = "hung"
        timed = {"seconds": {"native cuDNN": 2.0, "ours cuda": 1.0}, "graph": True}
        done(jobs[1], {**timed, "null_spread": [1, 1], "tiles": {}})
        told.append(dict(jobs[2].failed))

    monkeypatch.setattr(gpu, "supervise", supervise)
    assert gpu.run(tmp_path, 1.0, True, "ResNet-50 layers") == 1
    assert told[0] == {} and told[1]["hopper"].startswith("left out since ResNet-50 layers: ")
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["machine"]["hopper"] == "a candidate"
    assert document["entries"][1]["failed"] == {"hopper": "hung"}
    assert "without hopper" in (tmp_path / "results.txt").read_text()


def test_a_failure_that_others_may_have_caused_leaves_hopper_out_once(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDFAST_HOPPER", "1")
    without = [[], ["hopper, this once"], [], ["hopper"], []]
    row = "SGD"
    jobs = [{"id": id, "without": names} for id, names in enumerate(without)]
    orders = json.dumps({"jobs": jobs, "budgets": {row: 60.0}})
    seen: list[bool] = []

    def measure(entry: Any, without: list[str], at: Any) -> dict[str, Any]:
        seen.append(gpu.with_hopper())
        return {}

    monkeypatch.setattr(sys, "stdin", StringIO(orders))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.gpu_rows, "entries", lambda dry: 5 * [SimpleNamespace(row=row)])
    assert gpu.worker(True) == 0
    assert seen == [True, False, True, False, False]


def test_the_kernel_for_hopper_is_run_last(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_kernels

    monkeypatch.setattr(gpu_kernels.native, "cuda", SimpleNamespace(hopper_missing=lambda i: ""))
    names = [name for name, *_ in gpu_kernels.everything("cpu", "cuda")]
    hopper = ["hopper" in name.lower() for name in names]
    assert any(hopper) and hopper == sorted(hopper)


def test_another_library_that_is_not_there_has_a_reason(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_rivals
    import gpu_rows
    import gpu_work

    monkeypatch.setattr(gpu_rivals.importlib.util, "find_spec", lambda name: None)
    entry = next(entry for entry in gpu_rows.entries(dry=True) if entry.row == "Triton rivals")
    work = entry.build(gpu.where(True))
    tensors = [torch.ones(2)] * 3
    case = gpu_work.tiny(gpu_rows.RESNET50[0])
    work.native["flag_gems"] = gpu_rivals.call("flag_gems", case, "forward", tensors)
    work.native["attorch"] = lambda: torch.zeros_like(work.native["cuDNN"]())
    result = gpu.measure(SimpleNamespace(row=entry.row, build=lambda at: work), [], gpu.where(True))
    assert result["absent"] == {"flag_gems": "flag_gems is not installed"}
    assert result["failed"]["native attorch"].startswith("error 1.0e+00, allowed")
    assert "native inductor" in result["seconds"]


@pytest.mark.parametrize("task", ["forward", "grad_input", "grad_weight"])
def test_inductor_knows_its_options(task: str, gpu: ModuleType) -> None:
    import gpu_rivals

    try:
        options = gpu_rivals.inductor_options(task)
    except gpu_rivals.Absent as absence:
        pytest.skip(str(absence))
    torch.compile(torch.relu, options=options)  # which raises for a name that it does not know


@pytest.mark.parametrize("task", ["forward", "grad_input", "grad_weight"])
def test_inductor_is_given_the_same_pass(
    task: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_rivals

    monkeypatch.setattr(gpu_rivals, "inductor_options", lambda task: {})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = Conv2dCase("asymmetric", 2, 4, 7, 6, 6, 3, 2, (2, 1), (1, 0), (1, 2), groups=2)
    sizes = case.input_shape, case.weight_shape, case.output_shape
    input, weight, grad = (torch.randn(size) for size in sizes)
    window = case.stride, case.padding, case.dilation, case.groups
    exact = {
        "forward": torch.conv2d(input, weight, None, *window),
        "grad_input": torch.nn.grad.conv2d_input(input.shape, weight, grad, *window),
        "grad_weight": torch.nn.grad.conv2d_weight(input, weight.shape, grad, *window),
    }[task]
    torch.testing.assert_close(
        gpu_rivals.call("inductor", case, task, [input, weight, grad])(), exact
    )


def test_no_time_is_spent_once_it_is_over(gpu: ModuleType) -> None:
    from gpu_supervisor import Job, supervise

    results: list[dict[str, Any]] = []
    jobs = [Job(id, "row", ("cuda",), 1.0) for id in range(2)]
    supervise(["no such program"], jobs, {"row": 1.0}, lambda _, r: results.append(r), seconds=0)
    assert results == 2 * [{"skipped": "no time left"}]
    results.clear()
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    supervise(command, jobs, {"row": 1.0}, lambda _, r: results.append(r), seconds=60)
    assert results == 2 * [{"skipped": "no worker starts"}]


@pytest.mark.parametrize("row", ["ResNet-50 layers", "BatchNorm + ReLU", "SGD", "small steps",
                                 "depthwise", "grouped", "float32 3x3", "NCHW layers",
                                 "Triton rivals"])  # fmt: skip
def test_rows_are_checked_and_timed(row: str, gpu: ModuleType) -> None:
    import gpu_rows

    entries = [entry for entry in gpu_rows.entries(dry=True) if entry.row == row]
    for entry in entries[-1:]:
        result = gpu.measure(entry, [], gpu.where(True))
        assert (result["wrong"], result["failed"]) == ({}, {})
        assert {"ours cuda", "ours triton"} < set(result["seconds"])
        assert ("ours auto" in result["seconds"]) == ("step" in row)
        for name in gpu.candidates(entry):
            assert name in result["seconds"] or f"ours {name}" in result["seconds"]


def test_what_is_wrong_is_not_timed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_rows
    import gpu_work

    entry = next(entry for entry in gpu_rows.entries(dry=True) if entry.row == "grouped")
    right = gpu_work.Where.run_by

    def run_by(self: Any, backend: str) -> str:
        if backend == "triton":
            raise RuntimeError("no such kernel")
        return right(self, backend)

    monkeypatch.setattr(gpu_work.Where, "run_by", run_by)
    monkeypatch.setattr(gpu_work, "allowed_error", lambda native, dtype, terms: -1.0)
    result = gpu.measure(entry, [], gpu.where(True))
    assert result["wrong"]["cuda"].startswith("result 0: error")
    assert result["failed"] == {"triton": "RuntimeError: no such kernel"}
    assert "seconds" not in result


def test_kernels_are_compared_one_by_one(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_kernels

    words = ["gpu_kernels.py", "--backend", "reference", "-k"]
    monkeypatch.setattr(sys, "argv", [*words, "max_pool2d"])
    assert gpu_kernels.main() == 0
    assert "6 of 6 right" in capsys.readouterr().out
    monkeypatch.setattr(gpu_kernels, "_ERROR", dict.fromkeys(gpu_kernels._ERROR, -1.0))
    monkeypatch.setattr(sys, "argv", [*words, "sgd_, torch.float32"])
    assert gpu_kernels.main() == 1
    assert "sgd_, torch.float32, masters False: WRONG: errors" in capsys.readouterr().out


def test_every_goal_has_entries_and_a_budget(gpu: ModuleType) -> None:
    import gpu_goals
    import gpu_rows

    for dry in (False, True):
        entries = gpu_rows.entries(dry)
        assert list(dict.fromkeys(entry.row for entry in entries)) == list(gpu_goals.SECONDS)
        for goal in gpu_goals.GOALS:
            assert any(
                entry.row == goal.row
                and goal.task in ("", entry.task)
                and goal.layout in ("", entry.layout)
                for entry in entries
            )


def document() -> dict[str, Any]:
    def entry(name: str, **more: Any) -> dict[str, Any]:
        facts = {"row": "ResNet-50 layers", "name": name, "task": "forward", "flops": 989 * 10**9,
                 "bytes": 1, "peak": "bfloat16", "layout": "channels_last", "wrong": {},
                 "failed": {}, "tiles": {"cuda": ["a-tile"]}, "graph": True,
                 "null_spread": [0.98, 1.02]}  # fmt: skip
        return {**facts, **more}

    return {
        "machine": {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2"},
        "entries": [
            entry("3x3", seconds={"native cuDNN": 8e-3, "ours cuda": 2e-3, "ours triton": 8e-3}),
            entry("1x1", seconds={"native cuDNN": 1e-3, "ours cuda": 1e-3},
                  wrong={"triton": "error 1"}),
            entry("7x7", failed={"time": "the process ended with -9"}),
            {"row": "ResNet-50 layers", "name": "5x5", "task": "forward",
             "layout": "channels_last", "skipped": "no time left"},
        ],
    }  # fmt: skip


def test_the_tables_tell_ratios_rooflines_and_failures(gpu: ModuleType) -> None:
    import gpu_table

    text = gpu_table.whole(document())
    head = "| ResNet-50 layers | cuDNN |"
    # Of 1 ms at the peak, 2 ms and 1 ms are 71 % in the geometric mean.
    assert f"{head} cuda | 2.00 | 1 | yes, of a part | 71% | 2 of 4, 1 failed |" in text
    assert f"{head} triton | 1.00 | 0.85 | yes, of a part | 13% | 1 of 4, 1 WRONG, 1 failed" in text
    layer = "| ResNet-50 layers:"
    assert f"{layer} 3x3 | forward | cuda | 2000.0 | cuDNN 4.00 | 50% | 0.98-1.02 | a-tile" in text
    assert f"{layer} 1x1 | forward | triton | WRONG: error 1 |" in text
    assert f"{layer} 7x7 | forward | cuda | time: the process ended with -9 |" in text
    assert f"{layer} 5x5 | forward | cuda | no time left |" in text
    assert gpu_table.share(document()["entries"][0], "cuda", "another GPU") is None


def test_a_steps_row_tells_what_ran_and_the_time_of_the_gpu_alone(gpu: ModuleType) -> None:
    import gpu_table

    step = document()["entries"][0] | {
        "row": "small steps", "task": "step", "graph": False,
        "tiles": {"cuda": {"64x64": 1, "hopper-64": 30}, "auto": dict.fromkeys("abcdefghijk", 1)},
        "seconds": {"native eager": 3e-3, "ours cuda": 2e-3, "ours auto": 1e-3},
        "gpu_seconds": {"native eager": 2e-3, "ours cuda": 1e-3, "ours auto": 1e-3},
        "failed": {"hopper, this once": "hung"},
    }  # fmt: skip
    text = gpu_table.every({**document(), "entries": [step]})
    alone = "no graph, GPU alone 1000.0 us: eager 2.00, without hopper |"
    assert f"| hopper-64 x30, 64x64, {alone}" in text
    assert f"| a, b, c, d, e, f, g, h, 3 others, {alone}" in text
    assert text.count("without hopper") == 2 and "| triton | not timed |" in text


def test_a_rival_has_the_better_of_its_layouts(gpu: ModuleType) -> None:
    import gpu_table

    seconds = {"native cuDNN": 4.0, "native cuDNN NCHW": 3.0, "ours cuda": 2.0}
    assert gpu_table.ratio({"seconds": seconds}, "cuda", "cuDNN") == 1.5


def test_the_picture_is_xml(gpu: ModuleType) -> None:
    import gpu_table

    picture = ElementTree.fromstring(gpu_table.picture(document()))
    bars = [
        each for each in picture.iter() if each.tag.endswith("rect") and each.get("fill-opacity")
    ]
    assert len(bars) == 4  # of two goals and two backends
