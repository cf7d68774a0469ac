"""Max pooling on our kernels: the layer, and the block of a convolution, ReLU and pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.modules.module as hooks
from torch import Tensor

from gdfast.nn.conv import Conv2d
from gdfast.ops.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d
from gdfast.ops.max_pool2d import max_pool2d


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that runs on our kernels: same arguments.

    input [N, C, H, W] or [C, H, W]; dtypes, layout of the result and errors are those of
    `gdfast.ops.max_pool2d`. With return_indices it runs on native PyTorch.
    """

    def forward(self, input: Tensor) -> Any:
        """[N, C, P, Q] or [C, P, Q], and native's indices where they are asked for."""
        if self.return_indices:
            return super().forward(input)
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


def conv_relu_max_pool(
    conv: torch.nn.Conv2d, input: Tensor, pool_size: int | tuple[int, int]
) -> Tensor:
    """max_pool2d(relu(conv(input)), pool_size), by one kernel each way where `conv` is our layer.

    A convolution of torch.nn, or one with hooks, which want to see its output, runs by itself, with
    native PyTorch's ReLU and pooling behind it. Raises what the three raise.
    """
    if type(conv) is not Conv2d or conv.padding_mode != "zeros" or _has_hooks(conv):
        return F.max_pool2d(F.relu(conv(input)), pool_size)
    return conv2d_relu_max_pool2d(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        pool_size=pool_size,
    )  # fmt: skip


def _has_hooks(module: torch.nn.Module) -> bool:
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )
