"""Where CUDA kernels are launched: the last two arguments of every binding of `gdfast._cuda`."""

from __future__ import annotations

from typing import Any

import torch

from gdfast import native

# torch.cuda.current_stream makes a Stream of this, which takes longer than a launch does.
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current(device: torch.device) -> tuple[int, int]:
    """The index of a device and the address of its current stream; 0, 0 in the simulator."""
    if native.cuda_is_simulated:
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, _raw_stream(index)
