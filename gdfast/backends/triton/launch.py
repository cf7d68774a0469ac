"""Launching a kernel with little overhead, and what is known of the GPU that it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # none in this Triton
    TensorDescriptor = None

# Whether kernels run in Triton's interpreter: slowly, on any device, to be tested and debugged.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_ALIGNED = 15  # bits of an address that are 0 where the compiler may count on 16 bytes


class Box(NamedTuple):
    """A tensor as a kernel sees it through a descriptor, and the block that one load of it takes.

    Only the last stride is 1, and the others are multiples of 16 bytes.
    """

    size: list[int]
    strides: list[int]
    block: list[int]

    def of(self, tensor: Tensor, checked: bool) -> Any:
        """The descriptor of a tensor, which begins at 16 bytes."""
        if checked:
            return TensorDescriptor(tensor, *self)
        # Its constructor checks what was checked with another tensor, at a cost in every launch.
        descriptor = object.__new__(TensorDescriptor)
        descriptor.base = tensor
        descriptor.shape, descriptor.strides, descriptor.block_shape = self
        return descriptor


class Launch:
    """A kernel with its grid and all arguments but the tensors, ready to run on one device.

    The kernel takes tensors, then whatever changes from call to call (of types that don't change),
    then `numbers`, then `settings`, its compile-time constants by name. The first call compiles it.
    Later ones pass addresses to what was compiled, which spares Triton's own look-up; tensors that
    do not begin at 16 bytes take that way each time. Nothing waits for the GPU, and nothing is read
    from it, so that CUDA graphs can record a launch.

    The first tensors are passed as descriptors where there are `boxes` for them. The host makes
    these anew for each launch, with a call of the driver for each; made on the device, they would
    cost every program a wait for global memory, and every launch an allocation.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        device: torch.device,
        numbers: Sequence[float],
        settings: Mapping[str, Any],
        warps: int = 4,
        stages: int = 2,
        boxes: Sequence[Box] = (),
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._device = device if device.type == "cuda" else None
        self._rest = (*numbers, *settings.values())
        self._options = {"num_warps": warps, "num_stages": stages}
        self._boxes = boxes
        self._compiled: Any = None

    def __call__(self, *tensors: Tensor, changing: tuple[Any, ...] = ()) -> None:
        device = self._device
        try:
            if device is not None and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    self._run(tensors, changing)
            else:
                self._run(tensors, changing)
        except torch.OutOfMemoryError:
            raise  # of torch's own, which callers tell from others
        except Exception as error:  # of the compiler, its tools or the driver: they share no type
            raise RuntimeError(f"{self._told(tensors)}: {error}") from error

    def _run(self, tensors: tuple[Tensor, ...], changing: tuple[Any, ...]) -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        unaligned = 0
        for address in addresses:
            unaligned |= address & _ALIGNED
        if unaligned or self._compiled is None:
            compiled = self._kernel[self._grid](
                *self.seen(tensors), *changing, *self._rest, **self._options
            )
            if not unaligned:
                self._compiled = compiled  # None in the interpreter
        else:
            if self._boxes:
                addresses[: len(self._boxes)] = self._descriptors(tensors, checked=False)
            self._compiled[self._grid](*addresses, *changing, *self._rest)

    def _told(self, tensors: Sequence[Tensor]) -> str:
        """The kernel's file, which is named after the operation, the kernel and its tensors."""
        kernel = self._kernel
        file = kernel.__module__.rpartition(".")[2]
        sizes = ", ".join(f"{list(t.shape)} {str(t.dtype)[6:]}" for t in tensors)
        return f"{file}: Triton: {kernel.__name__} of {sizes}, grid {list(self._grid)}"

    def seen(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What the kernel is given of the tensors: descriptors of the first, then the others."""
        return [*self._descriptors(tensors, checked=True), *tensors[len(self._boxes) :]]

    def _descriptors(self, tensors: Sequence[Tensor], checked: bool) -> list[Any]:
        return [box.of(tensor, checked) for box, tensor in zip(self._boxes, tensors, strict=False)]


class Gpu(NamedTuple):
    """What a choice of tiles depends on."""

    multiprocessors: int
    shared_bytes: int  # that one program may have
    flops_per_clock: int  # of one multiprocessor, in bfloat16 on the tensor cores
    bytes_per_clock: int  # for one multiprocessor, from L2
    # That a thread may sum up at a time without running out of registers; Hopper's matrix
    # instructions read both operands from shared memory, others from registers.
    sums: int
    tma: bool  # whether it loads boxes of a tensor by descriptors


H100 = Gpu(132, 227 << 10, 4096, 32, 128, True)
A100 = Gpu(108, 163 << 10, 2048, 24, 64, False)
# The interpreter pays for each operation of each program, whatever its size.
_INTERPRETER = Gpu(1, 1 << 40, 1 << 40, 1 << 40, 1 << 40, False)


@cache
def gpu(device: torch.device) -> Gpu:
    """The GPU behind a device."""
    if INTERPRETED or device.type != "cuda":
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    like = H100 if properties.major in (9, 10) else A100
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return like._replace(
        multiprocessors=properties.multi_processor_count, shared_bytes=shared,
        tma=properties.major >= 9 and TensorDescriptor is not None,
    )  # fmt: skip


def channel_tile(channels: int, channels_last: bool) -> tuple[int, int]:
    """Positions and channels of one program of a kernel that is bound by memory.

    In channels_last each thread of four warps has two loads of 16 bytes in half types, for each of
    which the channels of a position lie side by side; else the positions of a channel do.
    """
    if INTERPRETED:
        return 1024, 16
    n = min(64, max(8, power_of_2(channels))) if channels_last else 1
    return 2048 // n, n


def power_of_2(number: int) -> int:
    """The least power of 2 that is no less than a number."""
    return 1 << (number - 1).bit_length()
