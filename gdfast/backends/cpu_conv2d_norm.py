"""A convolution and the batch normalisation behind it as one CPU kernel, in plans.

It runs where one of both would read from memory what a core's cache can hold since the other one
wrote it. What it gives is what their own kernels give, bit by bit; by Strassen's algorithm, which
takes pixels in pairs of tiles, but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from gdfast import native
from gdfast.backends.plans import told


def forward_launch(conv: Any, norm: Any) -> Any:
    """The launch that stands for those of a convolution and a norm, or None."""
    match told(conv), told(norm):
        case (of_conv,), (of_norm,) if _fits(False, of_conv):
            return native.cpu.conv2d_norm_launch(of_conv, of_norm)  # type: ignore[union-attr]
    return None


def backward_launch(norm: Any, conv_input: Any, conv_weight: Any, adds: bool = False) -> Any:
    """The launch that stands for those of a norm's gradient and a convolution's two, or None.

    With `adds` the input's gradient is added to what is there.
    """
    match told(norm), told(conv_input), told(conv_weight):
        case (of_norm, source), (of_input,), (of_weight,) if _fits(True, of_input, of_weight):
            launch = native.cpu.conv2d_norm_backward_launch  # type: ignore[union-attr]
            return launch(of_norm, source, of_input, of_weight, adds)
    return None


def _fits(backward: bool, *convs: Any) -> bool:
    if native.cpu is None:
        return False
    fits, threads = native.cpu.conv2d_norm_fits, torch.get_num_threads()
    return all(fits(conv, backward, threads) for conv in convs)
