"""`gdfast doctor`: what this installation consists of, and whether its kernels are right."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Packages of the extras, by the names under which they are installed.
_EXTRAS = {
    "train": (
        "matplotlib", "pillow", "pycocotools", "pyyaml", "safetensors", "scikit-learn",
    ),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "tensorboard": ("tensorboard",),
    "triton": ("triton",),
}  # fmt: skip
_ENVIRONMENT = (
    "GDFAST_AUTOTUNE",
    "GDFAST_BACKEND",
    "GDFAST_CACHE_DIR",
    "GDFAST_CPU_ISA",
    "GDFAST_NATIVE_DIR",
    "GDFAST_PRECISION",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


class Check(NamedTuple):
    """One operation of one backend against float64: relative errors, ours and native PyTorch's."""

    backend: str
    operation: str
    error: float | None
    native_error: float | None
    ok: bool
    reason: str


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
    """Collect the facts and test every backend that can be used here; takes about two seconds."""
    import numpy
    import torch

    from gdfast import __version__, backends, native, processor
    from gdfast.backends import cpu_algorithms

    started = time.perf_counter()
    available = backends.available()
    usable = [each.name for each in available if each.ok and each.name != "reference"]
    checks = [check for name in usable for check in _self_test(name)]
    ok = bool(usable) and all(check.ok for check in checks)
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
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
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


def _self_test(backend: str) -> list[Check]:
    """Run every operation on a small asymmetric case and compare with float64."""
    import torch

    from gdfast.backends import cpu_algorithms, precision
    from gdfast.bench.workload import relative_error
    from gdfast.errors import BackendError

    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"  # there Triton's kernels run in the interpreter
    cases = [(name, run, torch.float32) for name, run in _operations(3, 4).items()]
    if backend == "cpu" and not cpu_algorithms.why_no_bf16():
        cases += [
            (f"{name} bfloat16", run, torch.bfloat16)
            for name, run in _operations(17, 18).items()
            if name != "sgd_"
        ]
    checks = []

    def run(case: Callable[[str, torch.dtype, str], torch.Tensor], name: str) -> torch.Tensor:
        # Float32 as it is: native takes TF32 for some sizes and not for others.
        with precision("strict"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return case(name, dtype, device).cpu()

    for operation, case, dtype in cases:
        exact = case("reference", torch.float64, "cpu")
        native_error = relative_error(run(case, "reference"), exact)
        try:
            error = relative_error(run(case, backend), exact)
        except BackendError as refusal:
            # A backend may have a forward and no backward: that is legal, and told.
            checks.append(Check(backend, operation, None, native_error, True, str(refusal)))
            continue
        except RuntimeError as failure:
            checks.append(Check(backend, operation, None, native_error, False, str(failure)))
            continue
        # Native adds the same numbers in another order: one rounding more is no mistake.
        ok = error <= 2 * native_error + torch.finfo(dtype).eps
        checks.append(Check(backend, operation, error, native_error, ok, ""))
    return checks


def _operations(
    channels: int, filters: int
) -> dict[str, Callable[[str, torch.dtype, str], torch.Tensor]]:
    """Functions of (backend, dtype, device) that give a result as one flat tensor.

    A convolution has two groups of as many channels and filters.
    """
    import torch

    from gdfast import ops

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    generator = torch.Generator().manual_seed(0)
    convolution = (
        draw(5, 2 * channels, 17, 13), draw(2 * filters, channels, 3, 2), draw(2 * filters),
    )  # fmt: skip
    update = draw(1001), draw(1001), draw(1001)

    def conv2d(*wanted: int) -> Callable[[str, torch.dtype, str], torch.Tensor]:
        def run(backend: str, dtype: torch.dtype, device: str) -> torch.Tensor:
            tensors = [value.to(device, dtype, copy=True) for value in convolution]
            for index in wanted:
                tensors[index].requires_grad_()
            input, weight, bias = tensors
            output = ops.conv2d(
                input, weight, bias, stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2,
                backend=backend,
            )  # fmt: skip
            if not wanted:
                return output.flatten()
            grads = torch.autograd.grad(output.square().sum(), [tensors[index] for index in wanted])
            return torch.cat([grad.flatten() for grad in grads])

        return run

    def sgd_(backend: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        weight, grad, momentum = (value.to(device, dtype, copy=True) for value in update)
        ops.sgd_(
            weight, grad, momentum, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True,
            backend=backend,
        )  # fmt: skip
        return weight

    return {
        "conv2d": conv2d(),
        "conv2d_grad_input": conv2d(0),
        "conv2d_grad_weight": conv2d(1, 2),
        "sgd_": sgd_,
    }


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
        ("bfloat16", _bf16_in_words(cpu["why_no_bf16"])),
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
        *(("self-test", _check_in_words(Check(**check))) for check in report["self_test"]),
    ]
    if report["ok"]:
        verdict = f"everything is in order ({report['seconds']} s)"
    elif report["self_test"]:
        verdict = "a self-test failed: results of that backend cannot be trusted; --backend native"
    else:
        verdict = "no kernel of ours can be used, all runs on native PyTorch; build: pip install ."
    return "\n".join([*(f"{name:<12} {text}" for name, text in lines), "", verdict])


def _bf16_in_words(why_not: str) -> str:
    if why_not:
        return f"convolutions on the CPU widen it to float32, or are native's: {why_not}"
    return "convolutions on the CPU multiply it as it is, or are native's"


def _extra_in_words(extra: str, packages: dict[str, str | None]) -> str:
    missing = [package for package, version in packages.items() if version is None]
    if not missing:
        return f"{extra}: installed"
    return f'{extra}: lacks {", ".join(missing)}; pip install "gdfast[{extra}]"'


def _check_in_words(check: Check) -> str:
    name = f"{check.backend} {check.operation}"
    verdict = "pass" if check.ok else "FAIL"
    if check.error is None:
        return f"{name}: {'not run' if check.ok else verdict}: {check.reason}"
    return f"{name}: {verdict}, error {check.error:.1e} (native {check.native_error:.1e})"
