"""ResNet-50's layers on a GPU, in bfloat16 and channels_last: the Triton kernels beside native's.

    python benchmarks/gpu_layers.py FILE [--seconds S]    measures, and adds to FILE as results come
    python benchmarks/gpu_layers.py FILE --table          prints what FILE holds

One process, in turns A B B A with native (cuDNN, benchmark=True), medians of rounds that each last
some milliseconds by CUDA events; every result is compared with float64 before it is timed. It has
not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gdfast.ops  # noqa: F401  registers torch.ops.gdfast
from gdfast.backends import tuning
from gdfast.bench.cases import RESNET50, Conv2dCase
from gdfast.bench.workload import allowed_error, relative_error
from gdfast.files import write_atomic

SCHEMA = "gdfast gpu layers 1"
IMAGES = 256
PASSES = ("forward", "grad_input", "grad_weight")
ROUNDS = 7
SECONDS_OF_ROUND = 4e-3


def call_of(case: Conv2dCase, task: str, backend: str, tensors: dict[str, Tensor]) -> Any:
    """One pass of a layer by the dispatcher's operation, as a call without arguments."""
    input, weight, grad = tensors["input"], tensors["weight"], tensors["grad"]
    arguments = case.stride, case.padding * 2, case.dilation, case.groups, backend
    ops = torch.ops.gdfast
    calls: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: ops.conv2d(input, weight, None, *arguments),
        "grad_input": lambda: ops.conv2d_grad_input(grad, weight, input.shape, True, *arguments),
        "grad_weight": lambda: ops.conv2d_grad_weight(
            grad, input, weight.shape, True, False, *arguments
        )[0],
    }
    return calls[task]


def tensors_of(case: Conv2dCase, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = {"input": case.input_shape, "weight": case.weight_shape, "grad": case.output_shape}
    return {
        name: torch.randn(size, device="cuda", generator=generator)
        .to(dtype)
        .to(memory_format=torch.channels_last)
        for name, size in sizes.items()
    }


def check(case: Conv2dCase, task: str, backend: str) -> str:
    """What is wrong with the results on a small batch, or ""."""
    small = case.with_batch(4)
    tensors = tensors_of(small, torch.bfloat16)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected = call_of(small, task, "reference", exact)()
    native = relative_error(call_of(small, task, "reference", tensors)(), expected)
    error = relative_error(call_of(small, task, backend, tensors)(), expected)
    allowed = allowed_error(native, torch.bfloat16, 1)
    return "" if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e}"


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds per call of each in every round; all are visited there and back in each."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(2):
            call()  # compiles, chooses
        repeats[name] = max(1, round(SECONDS_OF_ROUND / seconds_of(call, 2)))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        once: dict[str, float] = dict.fromkeys(calls, 0.0)
        for name in [*calls, *reversed(calls)]:
            once[name] += seconds_of(calls[name], repeats[name]) / 2
        for name, seconds in once.items():
            rounds[name].append(seconds)
    return rounds


def run(file: Path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    torch.backends.cudnn.benchmark = True
    properties = torch.cuda.get_device_properties(0)
    document: dict[str, Any] = {
        "schema": SCHEMA, "gpu": properties.name, "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(), "dtype": "bfloat16", "layout": "channels_last",
        "images": IMAGES, "layers": [],
    }  # fmt: skip
    wrong = 0
    # The layers that take most of a step come first.
    for case in sorted(RESNET50, key=lambda case: -case.count * case.flops):
        case = case.with_batch(IMAGES)
        tensors = tensors_of(case, torch.bfloat16)
        for task in PASSES:
            if time.monotonic() > deadline:
                document["stopped"] = "no time left"
                write(file, document)
                return int(wrong > 0)
            entry: dict[str, Any] = {"layer": case.name, "count": case.count, "pass": task}
            document["layers"].append(entry)
            try:
                if reason := check(case, task, "triton"):
                    entry["wrong"] = reason
                    wrong += 1
                    continue
                calls = {
                    "native": call_of(case, task, "reference", tensors),
                    "triton": call_of(case, task, "triton", tensors),
                    "native again": call_of(case, task, "reference", tensors),
                }
                with tuning.recorded({}) as uses:
                    rounds = measure(calls)
                entry["seconds"] = rounds
                entry["flops"], entry["tile"] = case.flops, [use.choice.name for use in uses]
            except Exception as error:  # the other layers are still worth measuring
                entry["failed"] = f"{type(error).__name__}: {error}"[:2000]
                wrong += 1
            finally:
                write(file, document)
    return int(wrong > 0)


def write(file: Path, document: dict[str, Any]) -> None:
    write_atomic(file, (json.dumps(document, indent=1) + "\n").encode())


def table(file: Path) -> None:
    """Prints medians; with a ratio above 1 ours is faster, `null` is native against itself."""
    document = json.loads(file.read_text())
    print(f"{document['gpu']}, torch {document['torch']}, cuDNN {document['cudnn']}")
    print("| layer | pass | native us | triton us | ratio | null | TFLOP/s | tile |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for entry in document["layers"]:
        cells = [entry["layer"], entry["pass"]]
        if "seconds" not in entry:
            print("|", " | ".join([*cells, entry.get("wrong") or entry.get("failed", "?")]), "|")
            continue
        native, ours, again = (median(values) for values in entry["seconds"].values())
        cells += [
            f"{native * 1e6:.1f}", f"{ours * 1e6:.1f}", f"{native / ours:.2f}",
            f"{native / again:.2f}", f"{entry['flops'] / ours * 1e-12:.0f}", *entry["tile"][:1],
        ]  # fmt: skip
        print("|", " | ".join(cells), "|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON")
    parser.add_argument("--seconds", type=float, default=240.0, help="when to stop (default 240)")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.file)
        return 0
    return run(arguments.file, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
