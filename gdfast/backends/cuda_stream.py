"""Where CUDA kernels are launched: the last two arguments of every binding of `gdfast._cuda`."""

from __future__ import annotations

import torch

from gdfast import native


def current(device: torch.device) -> tuple[int, int]:
    """The index of a device and the address of its current stream; 0, 0 in the simulator."""
    if native.cuda_is_simulated:
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(device).cuda_stream
