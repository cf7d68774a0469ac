"""Our CUDA and Triton kernels beside native PyTorch on a GPU: layers, updates, training steps.

    python benchmarks/gpu_layers.py DIR [--seconds S]    measures; adds to DIR/results.* at once
    python benchmarks/gpu_layers.py DIR --table          prints what DIR/results.json holds
    python benchmarks/gpu_layers.py DIR --dry-run        tiny cases on the CPU, native for ours

What is timed is in gpu_rows.py, what is aimed at in gpu_goals.py. Each result is compared with more
exact arithmetic first; what is wrong, fails, crashes or hangs is told of and stops nothing else.
All that is compared is timed in one process, in turns (A B B A), as CUDA graphs where that is
possible. Short calls are in a graph several times, one after the other as in a recorded step: by
itself a call waits for its graph to begin, which is no time of the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gpu_goals
import gpu_rows
import gpu_table
import torch
from gpu_goals import (
    AUTO,
    BOTH_LAYOUTS,
    GOALS,
    SECONDS,
    SECONDS_OF_ENTRY,
    SUSPECT,
    SUSPECT_ONCE,
    WITHOUT_TF32,
)
from gpu_rivals import Absent
from gpu_rows import Entry
from gpu_supervisor import Job, answer, supervise
from gpu_work import Where, Work

import gdfast.ops  # noqa: F401  registers torch.ops.gdfast
from gdfast import backends
from gdfast.backends import tuning
from gdfast.bench import timer
from gdfast.files import write_atomic

SCHEMA = "gdfast gpu 1"
ROUNDS = 7
SECONDS_OF_VISIT = 4e-3
SECONDS_OF_GRAPH = 4e-4
MOST_CALLS_OF_GRAPH = 20
_VISITS_OF_GPU = 3
_FASTEST_CLOCK = 2e9  # cycles of a GPU in a second


class Poisoned(Exception):
    """The GPU takes no more work from this process."""


def where(dry: bool) -> Where:
    return Where(torch.device("cpu" if dry else "cuda"), dry)


def set_up(entry: Entry) -> None:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = entry.row not in WITHOUT_TF32


def clock(at: Where) -> Callable[[], float]:
    """Seconds, once the GPU has done what it was given."""

    def wait() -> float:
        _wait(at)
        return time.perf_counter()

    return wait


def captured(call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
    """The call as a CUDA graph, so many times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def calls_of_graph(graphs: Iterable[Callable[[], None]], at: Where) -> int:
    """How many calls a graph should have, the same for all that is compared."""
    slowest = 0.0
    for replay in graphs:
        replay()
        _wait(at)
        began = time.perf_counter()
        for _ in range(MOST_CALLS_OF_GRAPH):
            replay()
        _wait(at)
        slowest = max(slowest, (time.perf_counter() - began) / MOST_CALLS_OF_GRAPH)
    return min(MOST_CALLS_OF_GRAPH, math.ceil(SECONDS_OF_GRAPH / slowest))


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1500]


def measure(entry: Entry, without: list[str], at: Where) -> dict[str, Any]:
    """Checks and times one entry, without the calls and backends that are named."""
    set_up(entry)
    result: dict[str, Any] = {"wrong": {}, "failed": {}, "absent": {}, "tiles": {}}
    reasons = {name: reason for name, _, reason in backends.available()}
    with tuning.recorded({}) as uses:
        work = entry.build(at)
        result |= {"flops": work.flops, "bytes": work.bytes, "peak": work.peak}
        calls: dict[str, Callable[[], Any]] = {}
        for name, call in work.native.items():
            if f"native {name}" in without:
                continue
            answer(stage=f"native {name}")
            try:
                if reason := work.differs(call()):
                    result["failed"][f"native {name}"] = reason
                else:
                    calls[f"native {name}"] = call
            except Absent as absence:
                result["absent"][name] = str(absence)
            except Exception as error:  # torch.compile has many ways to fail
                result["failed"][f"native {name}"] = words(error)
        for name in gpu_goals.backends(entry.row):
            if name in without:
                continue
            answer(stage=name)
            if not at.dry and (reason := reasons.get(name, "")):
                result["failed"][name] = reason
                continue
            seen = len(uses)
            try:
                if reason := work.wrong(name):
                    result["wrong"][name] = reason
                else:
                    call = work.ours(name)
                    call()
                    _wait(at)
                    calls[f"ours {name}"] = call
            except Exception as error:
                result["failed"][name] = words(error)
                answer(note=words(error))
                _live_on(at)
            used = Counter(use.choice.name for use in uses[seen:])
            result["tiles"][name] = dict(used.most_common())
        answer(stage="time")
        if any(name.startswith("ours") for name in calls):
            result |= timed(calls, work, at)
    return result


def _live_on(at: Where) -> None:
    """After an error of a kernel, no call of the process succeeds any more: another one goes on."""
    try:
        _wait(at)
    except RuntimeError as error:
        raise Poisoned from error


def _wait(at: Where) -> None:
    if at.device.type == "cuda":
        torch.cuda.synchronize()


def timed(calls: dict[str, Callable[[], Any]], work: Work, at: Where) -> dict[str, Any]:
    result: dict[str, Any] = {"graph": False}
    each = 1
    if work.graph and at.device.type == "cuda":
        try:
            graphs = {}
            for name, call in calls.items():
                answer(stage=name.removeprefix("ours "))
                graphs[name] = captured(call)
            many = calls_of_graph(graphs.values(), at)
            if many > 1:
                graphs = {name: captured(call, many) for name, call in calls.items()}
            calls, each = graphs, many
            result |= {"graph": True, "calls_of_graph": many}
        except Exception as error:  # then none is, so that all are timed alike
            result["not_a_graph"] = words(error)
            answer(note=words(error))
            _live_on(at)
        answer(stage="time")
    natives = [name for name in calls if name.startswith("native")]
    times = timer.compare(
        calls, 1 if at.dry else ROUNDS, baselines=natives or None,
        min_seconds=1e-5 if at.dry else SECONDS_OF_VISIT, clock=clock(at),
    )  # fmt: skip
    if at.device.type == "cuda" and not result["graph"]:
        result["gpu_seconds"] = {
            name: gpu_seconds(call, times.median(name)) for name, call in calls.items()
        }  # fmt: skip
    return {
        **result,
        "seconds": {name: times.median(name) / each for name in calls},
        "rounds": {name: [one / each for one in found] for name, found in times.seconds.items()},
        "null_of": times.null_of,
        "null_spread": times.null_spread,
    }


def gpu_seconds(call: Callable[[], Any], seconds: float) -> float:
    """The GPU's time alone for a call that takes so many seconds with all that the CPU does.

    The GPU sleeps until it has been given all of the work, which it then does without a gap.
    """
    found = []
    for _ in range(_VISITS_OF_GPU):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(2 * seconds * _FASTEST_CLOCK))
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return min(found)


def worker(dry: bool) -> int:
    """Does the jobs that it reads, and tells their results (see gpu_supervisor)."""
    orders = json.load(sys.stdin)
    budgets, at = orders["budgets"], where(dry)
    if dry:
        torch.set_num_threads(1)  # others may be busy
    found, hopper = gpu_rows.entries(dry), os.environ.get("GDFAST_HOPPER", "1")
    for job in orders["jobs"]:
        entry = found[job["id"]]
        if SUSPECT in job["without"]:  # for good, unless another one is guilty and ends the process
            hopper = "0"
        os.environ["GDFAST_HOPPER"] = "0" if SUSPECT_ONCE in job["without"] else hopper
        if budgets[entry.row] <= 0:
            answer(skip=job["id"])
            continue
        began = time.monotonic()
        answer(begin=job["id"])
        try:
            result = measure(entry, job["without"], at)
        except Poisoned:
            return 3
        except Exception as error:
            result = {"failed": {"time": words(error)}}
            answer(note=words(error))
            try:
                _live_on(at)
            except Poisoned:
                return 3
        budgets[entry.row] -= time.monotonic() - began
        answer(end=job["id"], result=result)
        _clean_up(at)
    return 0


def _clean_up(at: Where) -> None:
    gc.collect()
    if at.device.type == "cuda":
        # Else what torch.compile made for all entries would be variants of one function.
        torch.compiler.reset()
        torch.cuda.empty_cache()


def warm_up(part: str) -> int:
    """Compiles what Triton and torch.compile will need, as far as caches keep it; `part` is I/N."""
    index, parts = map(int, part.split("/"))
    at = where(False)
    torch.cuda.set_per_process_memory_fraction(0.12)  # tests and others like it run beside it
    # Those of torch.compile take longest, so they come first.
    found = sorted(gpu_rows.entries(), key=lambda entry: "native compile" not in candidates(entry))
    for entry in found[index::parts]:
        set_up(entry)
        with contextlib.suppress(Exception):
            work = entry.build(at)
            for call in (work.native.get("compile"), work.ours("triton")):
                if call is not None:
                    call()
        work = call = None
        _clean_up(at)
    return 0


def run(folder: Path, seconds: float, dry: bool, only: str) -> int:
    """Measures all, by worker processes; 1 where something was wrong or failed."""
    found = gpu_rows.entries(dry)
    document: dict[str, Any] = {
        "schema": SCHEMA, "dry": dry, "machine": machine(dry), "entries": [],
    }  # fmt: skip

    def done(job: Job, result: dict[str, Any]) -> None:
        entry = found[job.id]
        if job.failed:
            result["failed"] = {**result.get("failed", {}), **job.failed}
        if SUSPECT in job.failed and "ours cuda" in result.get("seconds", {}):
            # Without it all went well: it was to blame, and is not tried again.
            for other in jobs:
                other.failed.setdefault(SUSPECT, f"left out since {entry}")
        facts = {name: getattr(entry, name) for name in ("row", "name", "task", "layout")}
        document["entries"].append(facts | result)
        save(folder, document)

    jobs = [
        Job(index, entry.row, candidates(entry), SECONDS_OF_ENTRY[entry.row], suspects())
        for index, entry in enumerate(found)
        if only in entry.row
    ]
    command = [sys.executable, __file__, str(folder), "--worker", *["--dry-run"] * dry]
    supervise(command, jobs, SECONDS, done, seconds=seconds)
    print(gpu_table.goals(document))
    bad = [entry for entry in document["entries"] if entry.get("wrong") or entry.get("failed")]
    return int(bool(bad))


def candidates(entry: Entry) -> tuple[str, ...]:
    rivals = {goal.rival for goal in GOALS if goal.row == entry.row}
    if entry.row in BOTH_LAYOUTS:
        rivals |= {f"{rival} NCHW" for rival in rivals}
    return (*gpu_goals.backends(entry.row), *(f"native {rival}" for rival in sorted(rivals)))


def with_hopper() -> bool:
    return os.environ.get("GDFAST_HOPPER") != "0"


def suspects() -> dict[str, str]:
    """What to do without first, by stage that failed."""
    if not with_hopper():
        return {}
    return {"cuda": SUSPECT, AUTO: SUSPECT_ONCE, "time": SUSPECT_ONCE}


def commit() -> str:
    """Of the working tree, which need not be a repository: GPU_CHECK_COMMIT may tell."""
    if known := os.environ.get("GPU_CHECK_COMMIT"):
        return known
    if (git := shutil.which("git")) is None:
        return "unknown"
    command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def machine(dry: bool) -> dict[str, Any]:
    facts = {
        "commit": commit(), "torch": torch.__version__, "python": sys.version.split()[0],
        "hopper": "a candidate" if with_hopper() else "no candidate",
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    if dry:
        return {"gpu": "dry run on the CPU, times mean nothing", **facts}
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name, "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count, "bytes": device.total_memory,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **facts,
    }  # fmt: skip


def save(folder: Path, document: dict[str, Any]) -> None:
    """The results as JSON, as tables and as a picture."""
    document["goals"] = gpu_table.ratios(document)
    text = json.dumps(document, indent=1)
    write_atomic(folder / "results.json", f"{text}\n".encode())
    write_atomic(folder / "results.txt", gpu_table.whole(document).encode())
    write_atomic(folder / "results.svg", gpu_table.picture(document).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what gets the results")
    parser.add_argument("--seconds", type=float, default=240.0, help="when to stop (default 240)")
    parser.add_argument("--only", default="", metavar="ROW", help="rows with this in their name")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, native for ours")
    parser.add_argument("--warm", metavar="I/N", help="fill compilers' caches with a part of all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.dry_run)
    if arguments.warm:
        return warm_up(arguments.warm)
    if arguments.table:
        print(gpu_table.whole(json.loads((arguments.folder / "results.json").read_text())), end="")
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return run(arguments.folder, arguments.seconds, arguments.dry_run, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
