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

    `call(kernel, arguments)` calls a kernel; `keep(tensor)` learns of a tensor that came past
    torch's allocator; within `paused()` nothing is told, and no mode of torch looks on.
    """

    def call(self, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> Any: ...

    def keep(self, tensor: torch.Tensor) -> None: ...

    def paused(self) -> AbstractContextManager[Any]: ...


_recorder: Recorder | None = None
_recording_thread = 0


def recorder() -> Recorder | None:
    """Who records this thread, or None."""
    return _recorder if _recorder and threading.get_ident() == _recording_thread else None


@contextmanager
def recorded_by(by: Recorder | None) -> Iterator[None]:
    """Tells `by`, or nobody, of the CPU kernels that this thread calls.

    Raises RuntimeError while another thread is recorded.
    """
    global _recorder, _recording_thread
    before = _recorder, _recording_thread
    if _recorder and _recording_thread != threading.get_ident():
        raise RuntimeError("recorded_by: thread: expected one at a time, got a second")
    _recorder, _recording_thread = by, threading.get_ident()
    try:
        yield
    finally:
        _recorder, _recording_thread = before


def unrecorded() -> AbstractContextManager[Any]:
    """A context for what is no part of a recorded step."""
    by = recorder()
    return by.paused() if by else nullcontext()


def _recorded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, of whose calls a recorder is told."""

    @wraps(kernel)
    def call(*arguments: Any, **named: Any) -> Any:
        if _recorder and (by := recorder()):
            return by.call(partial(kernel, **named), arguments)
        return kernel(*arguments, **named)

    return call


cpu = _load("cpu", "gdfast._cpu")
cuda = _load("cuda", "gdfast._cuda_simulated" if cuda_is_simulated else "gdfast._cuda")

# Functions of the CPU module that write to no tensor's memory: all others are kernels.
_NO_KERNELS = {
    "isa", "supported_isas", "select_isa", "take_memory", "memory_use", "release_memory",
    "watch_tensors", "tensor_facts",
}  # fmt: skip

if cpu is not None:
    for _name, _function in list(vars(cpu).items()):
        if isinstance(_function, BuiltinFunctionType) and _name not in _NO_KERNELS:
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
