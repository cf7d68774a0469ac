"""What was measured on: processor, instruction sets, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import gdfast
from gdfast import native, processor
from gdfast.files import write_atomic


def describe() -> dict[str, Any]:
    """Facts that a figure must be read with; the load is the machine's, over the last minute."""
    return {
        "cpu": processor.name(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "isa": native.cpu.isa() if native.cpu is not None else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "gdfast": gdfast.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_rows(folder: str, what: str, rows: Any) -> Path:
    """Writes rows of figures, with `describe`, to a file of a folder that is made if need be."""
    path = Path(folder) / f"{slug()}-{what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": describe(), "rows": rows}
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def slug() -> str:
    """The machine's name as a part of a file name: "amd-epyc-2cpu"."""
    name = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b", " ", processor.name().lower())
    return slug_of(f"{name} {os.cpu_count()}cpu")


def slug_of(text: str) -> str:
    """Small letters and digits of a text, with single hyphens for all else."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def held() -> str:
    """The instruction set that our kernels are held to, below what the machine has; "" if none."""
    if native.cpu is None or native.cpu.isa() == native.cpu.supported_isas()[-1]:
        return ""
    return native.cpu.isa()


def unfair() -> str:
    """What is unequal about the instruction sets that the two sides are held to; "" if nothing."""
    isa, capability = held(), torch.backends.cpu.get_cpu_capability().lower()
    onednn = (os.environ.get("ONEDNN_MAX_CPU_ISA") or "").lower()
    if isa == "avx2" and (capability != "avx2" or onednn != "avx2"):
        return (
            "Ours was held to avx2 and native was not: "
            "set ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 too."
        )
    if not isa and (onednn not in ("", "all", "default") or "ATEN_CPU_CAPABILITY" in os.environ):
        return "Native was held to an instruction set (see its variables) and ours was not."
    return ""


def commit() -> str | None:
    """The commit that gdfast runs from, "+" after it where files were changed; None outside git."""
    folder = Path(gdfast.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed copy may lie inside of somebody else's repository.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
