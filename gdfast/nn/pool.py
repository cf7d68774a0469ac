"""Max pooling on our kernels: the layer, and the block of a convolution, ReLU and pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast import ops
from gdfast.nn import memo
from gdfast.nn.block import has_hooks
from gdfast.nn.conv import Conv2d
from gdfast.ops.conv2d_relu_max_pool2d_planned import planned_conv_pool
from gdfast.ops.max_pool2d_planned import planned_max_pool2d


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that runs on our kernels: same arguments.

    input [N, C, H, W] or [C, H, W]; dtypes, layout of the result and errors are those of
    `gdfast.ops.max_pool2d`. With return_indices it runs on native PyTorch.
    """

    def forward(self, input: Tensor) -> Any:
        """[N, C, P, Q] or [C, P, Q], and native's indices where they are asked for."""
        if self.return_indices:
            return super().forward(input)
        return run_max_pool(self, input)


def run_max_pool(module: torch.nn.MaxPool2d, input: Tensor) -> Tensor:
    """The output of a pooling layer that returns no indices."""
    is_plain = not torch.compiler.is_compiling() and not module.return_indices
    if is_plain and (output := memo.run_again(module, None, input)) is not None:
        return output
    windows: Any = (
        module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
    )  # fmt: skip
    if is_plain and (planned := planned_max_pool2d(input, *windows)) is not None:
        memo.note(module, None, (input,), planned)
        return planned.run((input,))
    return ops.max_pool2d(input, *windows)


def conv_relu_max_pool(
    conv: torch.nn.Conv2d, input: Tensor, pool_size: int | tuple[int, int]
) -> Tensor:
    """max_pool2d(relu(conv(input)), pool_size), by one kernel each way where `conv` is our layer.

    A convolution of torch.nn, or one with hooks, which want to see its output, runs by itself, with
    native PyTorch's ReLU and pooling behind it. Raises what the three raise.
    """
    is_plain = type(conv) is Conv2d and not torch.compiler.is_compiling()
    if is_plain and (output := memo.run_again(conv, pool_size, input)) is not None:
        return output
    if type(conv) is not Conv2d or conv.padding_mode != "zeros" or has_hooks(conv):
        return F.max_pool2d(F.relu(conv(input)), pool_size)
    if is_plain and (output := _run_planned(conv, input, pool_size)) is not None:
        return output
    return ops.conv2d_relu_max_pool2d(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        pool_size=pool_size,
    )  # fmt: skip


def _run_planned(conv: Any, input: Any, pool_size: Any) -> Tensor | None:
    params = conv._parameters
    if "weight" not in params or "bias" not in params or "_conv_forward" in vars(conv):
        return None
    given = input, params["weight"], params["bias"]
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    found = planned_conv_pool(given, geometry, pool_size)
    if found is None:
        return None
    planned, tensors = found
    memo.note(conv, pool_size, given, planned, tensors is not given)
    return planned.run(tensors)
