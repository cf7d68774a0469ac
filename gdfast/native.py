"""The compiled modules, loaded once; a failed import is kept for `gdfast doctor` to show."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from types import BuiltinFunctionType, ModuleType
from typing import Any, Protocol

import torch  # first, so that the kernels share the libgomp that torch has loaded

_failures: dict[str, str] = {}

# Whether `cuda` is the simulator, which runs the CUDA kernels on tensors of the CPU, for tests.
cuda_is_simulated = os.environ.get("GDFAST_CUDA_SIMULATE", "0") not in ("", "0")


def _load(name: str, full_name: str) -> ModuleType | None:
    # Another build of the same modules, in place of the installed one: `make asan` sets it.
    folder = os.environ.get("GDFAST_NATIVE_DIR")
    try:
        return _load_from(Path(folder), full_name) if folder else importlib.import_module(full_name)
    except ImportError as error:
        _failures[name] = str(error)
        return None


def _load_from(folder: Path, full_name: str) -> ModuleType:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = folder / f"{full_name.rpartition('.')[2]}{suffix}"
    if not path.exists():
        raise ImportError(f"GDFAST_NATIVE_DIR: expected {path}, found none")
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[full_name] = module
    return module


def failure(name: str) -> str:
    """Say why the compiled module `name`, "cpu" or "cuda", is missing; "" where it is loaded."""
    return _failures.get(name, "")


def summary() -> str:
    """Say in one line which kernels there are, and why others are missing."""
    if cpu is None:
        kernels = f"no CPU kernels: {failure('cpu')}"
    else:
        kernels = f"CPU kernels for {', '.join(cpu.supported_isas())}, using {cpu.isa()}"
    if cuda is None:
        return f"{kernels}; no CUDA kernels: {failure('cuda')}"
    return f"{kernels}; CUDA kernels{' in the simulator' if cuda_is_simulated else ''}"


class Recorder(Protocol):
    """Who is told of the CPU kernels that a thread calls, and of the memory that they write to.

    `call(kernel, arguments)` calls a kernel; `allocate(make, size, strides, dtype)` gives memory
    for its result, made where there is none to be used again; within `paused()` nothing is told,
    and no mode of torch looks on.
    """

    def call(self, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> Any: ...

    def allocate(
        self, make: Callable[[], torch.Tensor], size: Any, strides: Any, dtype: torch.dtype
    ) -> torch.Tensor: ...

    def paused(self) -> AbstractContextManager[Any]: ...


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()
_count, _counting = 0, threading.Lock()  # of threads that are recorded: mostly there are none


def recorder() -> Recorder | None:
    """Who records this thread, or None."""
    return _thread.recorder if _count else None


@contextmanager
def recorded_by(by: Recorder | None) -> Iterator[None]:
    """Tells `by`, or nobody, of the CPU kernels that this thread calls."""
    before, _thread.recorder = _thread.recorder, by
    _count_recorders(by is not None)
    try:
        yield
    finally:
        _thread.recorder = before
        _count_recorders(-(by is not None))


def _count_recorders(change: int) -> None:
    global _count
    if change:
        with _counting:
            _count += change


def unrecorded() -> AbstractContextManager[Any]:
    """A context for what is no part of a recorded step."""
    by = recorder()
    return by.paused() if by else nullcontext()


def _recorded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, of whose calls a recorder is told."""

    @wraps(kernel)
    def call(*arguments: Any, **named: Any) -> Any:
        if _count and (by := _thread.recorder):
            return by.call(partial(kernel, **named), arguments)
        return kernel(*arguments, **named)

    return call


cpu = _load("cpu", "gdfast._cpu")
cuda = _load("cuda", "gdfast._cuda_simulated" if cuda_is_simulated else "gdfast._cuda")

# Functions of the CPU module that are no kernels: all others are, but for those that make launches.
# A plan makes its results itself, so that nothing recorded runs one.
_NO_KERNELS = {
    "isa", "supported_isas", "select_isa", "take_memory", "memory_use", "release_memory",
    "watch_tensors", "tensor_facts", "unwatched_facts", "make_plan", "run_plan",
    "make_memo", "recall", "make_update", "run_update",
}  # fmt: skip


def _is_kernel(name: str, function: Any) -> bool:
    is_function = isinstance(function, BuiltinFunctionType)
    return is_function and name not in _NO_KERNELS and not name.endswith("_launch")


if cpu is not None:
    for _name, _function in list(vars(cpu).items()):
        if _is_kernel(_name, _function):
            setattr(cpu, _name, _recorded(_function))
    # The build knows better than the import why the CUDA module is not there.
    if cuda is None and cpu.why_no_cuda and not cuda_is_simulated:
        _failures["cuda"] = cpu.why_no_cuda
    _isa = os.environ.get("GDFAST_CPU_ISA")
    if _isa and not cpu.select_isa(_isa):
        raise ValueError(
            f"GDFAST_CPU_ISA: expected one that this processor runs "
            f"({', '.join(cpu.supported_isas())}), got {_isa!r}"
        )
