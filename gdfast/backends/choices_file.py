"""The file in the user's cache folder that remembers what was chosen on this machine.

One file for each combination of processor and versions, JSON, written whole under a lock, so that
several processes lose nothing. Whatever else it holds (it was cut, is another file's, is nonsense)
counts as nothing remembered, and the next write replaces it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

import gdfast
from gdfast import native, processor
from gdfast.backends import choices
from gdfast.backends.choices import Choice
from gdfast.files import remove_leftovers, write_atomic

try:
    import fcntl
except ImportError:  # not on Windows: there the last process to write wins
    fcntl = None  # type: ignore[assignment]

_FORMAT = "gdfast choices 1"
_MOST_BYTES = 8 << 20  # more than `choices.MOST` of the longest that are written
_LOCK = "choices.lock"
_SECONDS_FOR_LOCK = 0.3


class Busy(Exception):
    """Another process holds the lock for longer than is worth waiting."""


def folder() -> Path | None:
    """Where the file lies: GDFAST_CACHE_DIR, else the user's cache folder, if there is one."""
    if own := os.environ.get("GDFAST_CACHE_DIR"):
        return Path(own)
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the specification says to ignore others
        return xdg / "gdfast"
    try:
        return Path.home() / ".cache" / "gdfast"
    except RuntimeError:
        return None


def path() -> Path | None:
    """The file for this machine and these versions."""
    where = folder()
    if where is None:
        return None
    digest = hashlib.sha256(json.dumps(_machine()).encode()).hexdigest()
    return where / f"choices-{digest[:16]}.json"


@cache
def _machine() -> dict[str, Any]:
    """What the figures in a file hold for."""
    return {
        "gdfast": gdfast.__version__,
        "kernels": _digest(native.cpu),
        "chooser": _digest_of_sources("tuning*.py", "memory.py"),
        "torch": str(torch.__version__),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "processor": processor.name(),
        "features": hashlib.sha256(processor.features().encode()).hexdigest()[:16],
        "cpus": processor.usable_cpus(),
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    """What decides how kernels run on a GPU, where there is one."""
    if not torch.cuda.is_available():
        return {}
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    return {
        "cuda": _digest(native.cuda),
        "triton": _digest_of_sources("triton/*.py"),
        "driver": str(driver),
    }


def _digest(module: Any) -> str:
    """Of a compiled module's file: a build of other kernels has to choose anew."""
    try:
        # Mapped rather than read: without a copy it takes half as long, 1 ms for a MB.
        with (
            Path(module.__file__ or "").open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return hashlib.sha256(content).hexdigest()[:16]
    except (AttributeError, OSError, ValueError):  # ValueError: it is empty
        return "unknown"


def _digest_of_sources(*patterns: str) -> str:
    digest = hashlib.sha256()
    for pattern in patterns:
        for source in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def read(file: Path) -> dict[str, Choice]:
    """What `file` remembers for this machine; nothing if it is not there or not such a file."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            return {}
        values = json.loads(content)
        if values["format"] != _FORMAT or values["machine"] != _machine():
            return {}
        return choices.from_plain(values["choices"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def add(file: Path, new: Mapping[str, Choice], replacing: bool = False) -> dict[str, Choice]:
    """Adds choices to those in `file`, and gives what it holds then.

    One that another process made meanwhile stays, but for `replacing`. Over the limit the oldest
    go. Raises OSError where the file cannot be written, Busy while others keep the lock.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(file.parent / _LOCK):
        # Only those who hold the lock write here: what lies about is of processes that were killed.
        remove_leftovers(file.parent)
        old = read(file)
        both = {**old, **new} if replacing else {**new, **old}
        kept = {key: both[key] for key in [*old, *(key for key in new if key not in old)]}
        kept = dict(list(kept.items())[-choices.MOST :])
        document = {"format": _FORMAT, "machine": _machine(), "choices": choices.to_plain(kept)}
        write_atomic(file, (json.dumps(document, indent=0) + "\n").encode())
    return kept


def remove(file: Path) -> None:
    """Removes the file, if it is there. Raises OSError where that cannot be done."""
    file.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("ab") as stream:  # the lock ends with the descriptor, even if we are killed
        deadline = time.monotonic() + _SECONDS_FOR_LOCK
        while fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Busy from None
                time.sleep(0.01)
        yield
