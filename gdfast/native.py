"""The compiled modules, loaded once; a failed import is kept for `gdfast doctor` to show."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  first, so that the kernels share the libgomp that torch has loaded

_failures: dict[str, str] = {}


def _load(name: str) -> ModuleType | None:
    # GDFAST_NATIVE_DIR points at another build of the same modules: the sanitizers' one.
    folder = os.environ.get("GDFAST_NATIVE_DIR")
    try:
        if not folder:
            module = importlib.import_module(f"gdfast._{name}")
        else:
            files = sorted(Path(folder).glob(f"_{name}.*.so"))
            if not files:
                raise ImportError(f"no _{name}.*.so in GDFAST_NATIVE_DIR={folder}")
            spec = importlib.util.spec_from_file_location(f"gdfast._{name}", files[0])
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[f"gdfast._{name}"] = module
    except ImportError as error:
        _failures[name] = str(error)
        return None
    return module


def _select_isa(module: ModuleType, isa: str) -> None:
    if not module.select_isa(isa):
        supported = ", ".join(module.supported_isas())
        raise ValueError(
            f"GDFAST_CPU_ISA: expected one of {supported} (what this processor runs), got {isa!r}"
        )


def failure(name: str) -> str:
    """Why the compiled module `name` ("cpu" or "cuda") is missing; "" where it is loaded."""
    return _failures.get(name, "")


cpu = _load("cpu")
cuda = _load("cuda")

if cpu is not None and os.environ.get("GDFAST_CPU_ISA"):
    _select_isa(cpu, os.environ["GDFAST_CPU_ISA"])
