"""`gdfast doctor`: what this installation consists of, and whether its kernels are right."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from contextlib import suppress
from functools import partial
from typing import Any

# Packages of the extras, by the names under which they are installed.
_EXTRAS = {
    "train": (
        "matplotlib", "pillow", "pycocotools", "pyyaml", "safetensors", "scikit-learn",
    ),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "tensorboard": ("tensorboard",),
    "triton": ("triton",),
}  # fmt: skip
# Beside those of our own, which all begin with GDFAST_.
_ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast doctor` to a parser."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def main(args: argparse.Namespace) -> int:
    """Print the report; returns 0, or 1 if a check failed or no kernel of ours can be used."""
    report = examine()
    text = json.dumps(report, indent=2) if args.json else _in_words(report)
    print(text)
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Collect the facts and test every backend that can be used here.

    That takes a few seconds; on a GPU, where Triton has not yet compiled its kernels, a minute.
    """
    import numpy
    import torch

    from gdfast import __version__, backends, native, processor, self_test
    from gdfast.backends import cpu_algorithms

    started = time.perf_counter()
    available = backends.available()
    usable = [each.name for each in available if each.ok and each.name != "reference"]
    checks = [check for name in usable for check in self_test.run(name)]
    wrong = {check.backend for check in checks if not check.ok}
    ok = bool(usable) and not wrong
    timed = [name for name in usable if self_test.runs_on_gpu(name) and name not in wrong]
    return {
        "ok": ok,
        "versions": {
            "gdfast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "triton": _version("triton"),
            "torch_cuda": torch.version.cuda,
        },
        "system": platform.platform(),
        "cpu": {
            "name": processor.name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_sets": native.cpu.supported_isas() if native.cpu else [],
            "in_force": native.cpu.isa() if native.cpu else None,
            "torch_in_force": torch.backends.cpu.get_cpu_capability(),
            "why_no_bf16": cpu_algorithms.why_no_bf16(),
        },
        "cuda_devices": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "gigabytes": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            }
            for index in range(torch.cuda.device_count())
        ],
        "backends": [each._asdict() for each in available],
        "chosen_backend": backends.chosen(),
        "autotune": _autotune(),
        "extras": {
            extra: {package: _version(package) for package in packages}
            for extra, packages in _EXTRAS.items()
        },
        "paths": {
            "python": sys.executable,
            "gdfast": os.path.dirname(os.path.abspath(__file__)),
            "cpu_module": native.cpu.__file__ if native.cpu else None,
            "cuda_module": native.cuda.__file__ if native.cuda else None,
        },
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("GDFAST_") or name in _ENVIRONMENT
        },
        "nchw_over_channels_last": _layout_costs(timed),
        "self_test": [check._asdict() for check in checks],
        "seconds": round(time.perf_counter() - started, 2),
    }


def _autotune() -> dict[str, Any]:
    """How convolutions are chosen, and what the file that remembers holds for this machine."""
    from gdfast import native
    from gdfast.backends import choices_file, tuning

    file = choices_file.path() if native.cpu else None
    return {
        "mode": tuning.mode(),
        "file": str(file) if file else None,
        "choices": len(choices_file.read(file)) if file else 0,
    }


def _layout_costs(backends: list[str]) -> dict[str, float]:
    costs = {}
    for backend in backends:
        with suppress(RuntimeError):  # no memory, or no bfloat16: there is nothing to tell then
            costs[backend] = round(_layout_cost(backend, "cuda", 32), 2)
    return costs


def _layout_cost(backend: str, device: str, images: int) -> float:
    """How many times as long a 3x3 convolution takes in NCHW as in channels_last."""
    import torch

    from gdfast import autotune, ops
    from gdfast.bench import timer
    from gdfast.bench.workload import LAYOUTS

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    input, weight = (
        torch.randn(size, dtype=torch.bfloat16, device=device)
        for size in ((images, 64, 56, 56), (64, 64, 3, 3))
    )
    calls = {}
    for name, layout in LAYOUTS.items():
        image, filters = (value.contiguous(memory_format=layout) for value in (input, weight))
        calls[name] = partial(ops.conv2d, image, filters, padding=1, backend=backend)
    with autotune("off"), torch.no_grad():
        times = timer.compare(calls, rounds=5, clock=clock)
    return times.ratio("channels_last", "NCHW")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_words(report: dict[str, Any]) -> str:
    cpu, versions, autotune = report["cpu"], report["versions"], report["autotune"]
    lines = [
        ("versions", ", ".join(f"{name} {value or 'none'}" for name, value in versions.items())),
        ("system", report["system"]),
        ("CPU", f"{cpu['name']}, {cpu['cpus']} CPUs, {cpu['threads']} threads"),
        (
            "kernels for",
            f"{', '.join(cpu['instruction_sets']) or 'nothing'}; in force: {cpu['in_force']} "
            f"(torch: {cpu['torch_in_force']})",
        ),
        ("bfloat16", _bf16_in_words(cpu["why_no_bf16"], cpu["in_force"])),
        *(
            ("GPU", f"{gpu['name']}, capability {gpu['capability']}, {gpu['gigabytes']} GiB")
            for gpu in report["cuda_devices"] or []
        ),
        *(
            ("backend", f"{each['name']}: {'yes' if each['ok'] else 'no, ' + each['reason']}")
            for each in report["backends"]
        ),
        ("chosen", report["chosen_backend"]),
        (
            "autotune",
            f"{autotune['mode']}; {autotune['choices']} choices in {autotune['file'] or 'no file'}",
        ),
        *(("extra", _extra_in_words(*item)) for item in report["extras"].items()),
        *(("path", f"{name}: {path}") for name, path in report["paths"].items() if path),
        *(("set", f"{name}={value}") for name, value in report["environment"].items()),
        *(
            (
                "layout",
                f"{name}: a 3x3 convolution of 64 channels in NCHW takes {ratio:.2f} times "
                "as long as in channels_last",
            )
            for name, ratio in report["nchw_over_channels_last"].items()
        ),
        *(("self-test", _check_in_words(check)) for check in report["self_test"]),
    ]
    if report["ok"]:
        verdict = f"everything is in order ({report['seconds']} s)"
    elif report["self_test"]:
        verdict = "a self-test failed: results of that backend cannot be trusted; --backend native"
    else:
        verdict = "no kernel of ours can be used, all runs on native PyTorch; build: pip install ."
    return "\n".join([*(f"{name:<12} {text}" for name, text in lines), "", verdict])


def _bf16_in_words(why_not: str, isa: str) -> str:
    if isa.startswith("emulated"):
        return "convolutions on the CPU emulate its products, for tests: slow"
    if why_not:
        return f"convolutions on the CPU widen it to float32, or are native's: {why_not}"
    return "convolutions on the CPU multiply it as it is, or are native's"


def _extra_in_words(extra: str, packages: dict[str, str | None]) -> str:
    missing = [package for package, version in packages.items() if version is None]
    if not missing:
        return f"{extra}: installed"
    return f'{extra}: lacks {", ".join(missing)}; pip install "gdfast[{extra}]"'


def _check_in_words(check: dict[str, Any]) -> str:
    name = f"{check['backend']} {check['operation']}"
    verdict = "pass" if check["ok"] else "FAIL"
    if check["error"] is None:
        return f"{name}: {'not run' if check['ok'] else verdict}: {check['reason']}"
    return f"{name}: {verdict}, error {check['error']:.1e} (native {check['native_error']:.1e})"
