"""Whole training steps of ours and of native PyTorch, each in a process of its own.

    python benchmarks/apart.py --out benchmarks/results
    python benchmarks/apart.py ResNet-50 YOLO-lite --seconds 60

`gdfast bench --suite step` times both sides in one process, whose memory each of them finds as the
other, and the check before, have left it. Here every variant has a process to itself, as a training
has, and they take steps in turns, while the others wait.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

import gdfast.ops  # noqa: F401  registers torch.ops.gdfast
from gdfast import optim
from gdfast.bench import machine, sgd, step, suites
from gdfast.bench.cases import STEPS, StepCase
from gdfast.bench.workload import LAYOUTS

_WARMUP = 6  # steps before any is timed: in the first ones candidates are
_VARIANTS = [(side, layout) for side in ("ours", "native") for layout in LAYOUTS]


class Process:
    """A process that takes one step of a case's training whenever it is asked to."""

    def __init__(self, case: StepCase, side: str, layout: str) -> None:
        command = [sys.executable, __file__, "--serve", case.name, side, layout]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.seconds: list[float] = []
        self._answer()

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(float(self._answer()))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a step's process ended with status {self.process.wait()}")
        return line

    def end(self) -> None:
        self.process.communicate()


def serve(name: str, side: str, layout: str) -> None:
    """Takes a step for every line of standard input, and answers with its seconds."""
    case = next(case for case in STEPS if case.name == name)
    ours, native = suites.both_models(case)
    if side == "ours":
        training = step.Training(case, ours, optim.SGD, layout)
    else:
        make = sgd.native_variants(torch.float32)["fused"]
        training = step.Training(case, native, make, layout)
    del ours, native
    for _ in range(_WARMUP):
        training()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        training()
        print(time.perf_counter() - begin, flush=True)


def measure(case: StepCase, seconds: float) -> dict[str, Any]:
    """Median seconds of each variant, and the ratio of native's best to our best."""
    processes = {variant: Process(case, *variant) for variant in _VARIANTS}
    order, end = list(processes.values()), time.monotonic() + seconds
    while True:
        for process in order:
            process.step()
        order.reverse()
        if time.monotonic() >= end:
            break
    for process in order:
        process.end()
    medians = {v: statistics.median(process.seconds) for v, process in processes.items()}
    best = {
        side: min((v for v in _VARIANTS if v[0] == side), key=lambda v: medians[v])
        for side in ("ours", "native")
    }
    pairs = zip(*(processes[best[side]].seconds for side in ("native", "ours")), strict=True)
    ratios = sorted(native / ours for native, ours in pairs)
    tenth = len(ratios) // 10
    return {
        "step": case.name,
        "ms": {" ".join(v): 1e3 * median for v, median in medians.items()},
        "ratio": medians[best["native"]] / medians[best["ours"]],
        "spread": [ratios[tenth], ratios[-1 - tenth]],
        "rounds": len(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help="beginnings of names; default: all"
    )
    parser.add_argument("--seconds", type=float, default=40, metavar="S", help="for each step")
    parser.add_argument("--out", metavar="DIR", help="folder for the JSON file")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return 0
    chosen = [c for c in STEPS if not args.steps or c.name.startswith(tuple(args.steps))]
    if not chosen:
        parser.error(f"expected beginnings of {', '.join(c.name for c in STEPS)}")
    rows = []
    for case in chosen:
        row = measure(case, args.seconds)
        rows.append(row)
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())
        low, high = row["spread"]
        print(f"{case.name}: {row['ratio']:.2f} ({low:.2f}-{high:.2f}); {times}", flush=True)
    if args.out:
        path = machine.write_rows(args.out, f"apart-{torch.get_num_threads()}t", rows)
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
