"""What the processor says of itself."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def name() -> str:
    """The processor's own name for itself, or the architecture's where it tells none."""
    return _told("model name") or platform.processor() or platform.machine()


def features() -> str:
    """Names of the instructions that it has, where it tells."""
    return _told("flags") or _told("Features")


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _told(what: str) -> str:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{what}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""
