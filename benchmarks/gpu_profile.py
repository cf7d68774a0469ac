"""Profiles of what benchmarks/gpu_layers.py found slowest against its goals, as text.

    python benchmarks/gpu_profile.py DIR    reads DIR/results.json, adds to DIR/profile.txt

By torch.profiler: the ResNet-50 step's kernels, ours and native's, and the slowest layers. Then by
ncu, where it is there and may read the GPU's counters, the slowest layers of each backend.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_rows
import gpu_table
import torch
from gpu_goals import BACKENDS, backends
from gpu_layers import set_up, where, words

import gdfast.ops  # noqa: F401  registers torch.ops.gdfast

_STEP = "ResNet-50 step"
_LAYERS = 3  # of each backend
_SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats",
    "Occupancy", "LaunchStats",
)  # fmt: skip


def slowest(document: dict[str, Any], most: int) -> list[tuple[int, str]]:
    """Of what is no whole step, the worst ratios of each backend: entries' numbers, backends."""
    found = gpu_rows.entries(document["dry"])
    numbers = {(e.row, e.name, e.task, e.layout): index for index, e in enumerate(found)}
    chosen = []
    for backend in BACKENDS:
        ratios = []
        for entry in document["entries"]:
            rival = next((name for name in entry.get("seconds", {}) if "native" in name), "")
            value = gpu_table.ratio(entry, backend, rival.removeprefix("native "))
            if value is not None and entry["task"] != "step":
                key = tuple(entry[name] for name in ("row", "name", "task", "layout"))
                ratios.append((value, numbers[key]))
        chosen += [(number, backend) for _, number in sorted(ratios)[:most]]
    return chosen


def profiled(call: Callable[[], Any], rows: int, dry: bool) -> str:
    """torch.profiler's table of kernels, of a few calls after one that warms up."""
    activity = torch.profiler.ProfilerActivity
    call()
    with torch.profiler.profile(activities=[activity.CPU] if dry else [activity.CUDA]) as profile:
        for _ in range(1 if dry else 3):
            call()
        if not dry:
            torch.cuda.synchronize()
    times = "self_cpu_time_total" if dry else "self_device_time_total"
    table = profile.key_averages().table(sort_by=times, row_limit=rows, max_name_column_width=90)
    return str(table)


def by_torch(document: dict[str, Any], seconds: float, write: Callable[[str], None]) -> None:
    """The steps first, each in full: of whole training they tell the most."""
    end, at = time.monotonic() + seconds, where(document["dry"])
    found = gpu_rows.entries(at.dry)
    measured = {entry["row"] for entry in document["entries"]}
    steps = [
        index for index, e in enumerate(found)
        if (e.row, e.task) == (_STEP, "step") and e.row in measured
    ]  # fmt: skip
    whole = [(step, name) for step in steps for name in ("eager", *backends(_STEP))]
    for number, backend in [*whole, *slowest(document, _LAYERS)]:
        entry = found[number]
        if time.monotonic() > end:
            write("no time left")
            return
        write(f"== {entry}, {backend}, torch.profiler")
        try:
            set_up(entry)
            work = entry.build(at)
            call = work.native[backend] if backend in work.native else work.ours(backend)
            write(profiled(call, 25 if number in steps else 8, at.dry))
        except Exception as error:
            write(words(error))
        work = call = None  # type: ignore[assignment]  # before the next one takes memory


def one_call_each(chosen: list[tuple[int, str]]) -> int:
    """What ncu watches: between start and stop only the chosen calls run."""
    at = where(False)
    found = gpu_rows.entries()
    for number, backend in chosen:
        entry = found[number]
        set_up(entry)
        call = entry.build(at).ours(backend)
        call()
        torch.cuda.synchronize()
        print(f"== {entry}, {backend}", flush=True)
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def by_ncu(document: dict[str, Any], seconds: float, write: Callable[[str], None]) -> None:
    tool = shutil.which("ncu")
    chosen = slowest(document, 1)
    if tool is None or not chosen:
        write("== ncu: not there" if tool is None else "== ncu: nothing to profile")
        return
    command = [tool, "--profile-from-start", "off", "--launch-count", "12"]
    for section in _SECTIONS:
        command += ["--section", section]
    command += [sys.executable, __file__, ".", "--calls", json.dumps(chosen)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        write(f"== ncu: stopped after {seconds:.0f} s\n{text.decode(errors='replace')}")
        return
    if "ERR_NVGPUCTRPERM" in result.stdout + result.stderr:
        write("== ncu: may not read the GPU's counters (ERR_NVGPUCTRPERM)")
        return
    write(f"== ncu: status {result.returncode}\n{result.stdout}{result.stderr[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all (default 60)")
    parser.add_argument("--calls", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.calls:
        return one_call_each([(number, name) for number, name in json.loads(arguments.calls)])
    document = json.loads((arguments.folder / "results.json").read_text())
    started = time.monotonic()
    with (arguments.folder / "profile.txt").open("a") as file:

        def write(text: str) -> None:
            file.write(f"{text}\n")
            file.flush()

        by_torch(document, 0.6 * arguments.seconds, write)
        left = arguments.seconds - (time.monotonic() - started)
        if not document["dry"] and left > 10:
            by_ncu(document, left, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
