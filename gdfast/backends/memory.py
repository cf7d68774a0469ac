"""Memory for what CPU kernels put out: large tensors come from a pool that keeps what they free.

The C library returns the memory of a large tensor to the operating system when it is freed, and the
next one is mapped and zeroed page by page: in a training step that costs as much as some layers.
The pool belongs to this package's results alone; nothing of torch's own allocator is changed.
GDFAST_POOL=0 switches it off.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gdfast import native

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
}
# From here on the C library maps blocks anew, and gives back what is free at the end of its heap.
_LEAST_BYTES = 128 * 1024
_LEAST_FRESH_BYTES = 8 << 20
_CPU = torch.device("cpu")
# Of what `from_dlpack` does, all that a capsule needs.
_from_capsule: Callable[..., Tensor] = getattr(torch._C, "_from_dlpack", from_dlpack)
_ENABLED = os.environ.get("GDFAST_POOL", "1") != "0"


class MemoryUse(NamedTuple):
    """Bytes of the pool that tensors hold, and bytes that wait for their next use."""

    taken: int
    kept: int


def empty_strided(size: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor on the CPU, as `torch.empty_strided` makes it.

    Large ones come from the pool, and their storage cannot be resized. In deterministic mode, where
    torch fills fresh memory, all come from torch.
    """
    return allocator(size, strides, dtype)()


def allocator(
    size: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Callable[[], Tensor]:
    """`empty_strided` for one size: what a kernel that runs often calls."""
    plain = partial(torch.empty_strided, size, strides, dtype=dtype, device=_CPU)
    name = _DTYPES.get(dtype)
    is_small = prod(size) * dtype.itemsize < _LEAST_BYTES
    if not _ENABLED or is_small or name is None or native.cpu is None:
        return plain
    take = partial(native.cpu.take_memory, size, strides, name)

    def allocate() -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            return plain()
        if by := native.recorder():
            return by.allocate(lambda: _from_capsule(take()), size, strides, dtype)
        return _from_capsule(take())

    return allocate


def seconds_of_fresh_pages(bytes: int) -> float:
    """What it costs in a training step that a result is not from the pool, by measuring once.

    In steps of ResNet-50 and MobileNetV2 on native PyTorch a third to two thirds of the pages of
    results are mapped anew: half of them are counted. The same call over and over, when an operator
    is timed alone, finds the pages that it has just freed. Smaller results than 8 MB find theirs in
    a step too, where most others are from the pool: not a page was mapped anew for them in steps of
    ResNet-20, MobileNetV2 and YOLO-lite.
    """
    if bytes < _LEAST_FRESH_BYTES:
        return 0.0
    return 0.5 * bytes * _seconds_per_fresh_byte(torch.get_num_threads())


@lru_cache(maxsize=16)
def _seconds_per_fresh_byte(threads: int) -> float:
    size = 32 << 20
    differences = []
    for _ in range(3):
        # Not torch.empty: the C library may have kept as much from earlier.
        block = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        started = time.perf_counter()
        block.fill_(0)
        between = time.perf_counter()
        block.fill_(0)
        differences.append(2 * between - started - time.perf_counter())
    return max(0.0, min(differences)) / size


def use() -> MemoryUse:
    """How much memory the pool holds now."""
    return MemoryUse(*native.cpu.memory_use()) if native.cpu is not None else MemoryUse(0, 0)


def release() -> None:
    """Returns the memory that waits for its next use to the operating system."""
    if native.cpu is not None:
        native.cpu.release_memory()
