"""The convolution layer on our kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.nn import memo
from gdfast.ops.conv2d import conv2d
from gdfast.ops.conv2d_planned import layer_of

_NAMES = {"weight", "bias"}


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` that runs on our kernels: same arguments, parameters and state.

    input [N, C, H, W] or [C, H, W]; dtypes, layout of the result and errors are those of
    `gdfast.ops.conv2d`. `gdfast.backend` and GDFAST_BACKEND choose what it runs on.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, K, P, Q] or [K, P, Q] of input [N, C, H, W] or [C, H, W]."""
        if type(self) is not Conv2d or torch.compiler.is_compiling():
            return super().forward(input)
        output = memo.run_again(self, None, input)
        if output is not None:
            return output
        own = vars(self)
        params, padding_mode = own["_parameters"], own["padding_mode"]
        is_plain = padding_mode == "zeros" and "_conv_forward" not in own
        if is_plain and params.keys() == _NAMES and isinstance(input, Tensor) and input.dim() == 4:
            tensors = input, params["weight"], params["bias"]
            geometry = self.stride, self.padding, self.dilation, self.groups
            _, layer = layer_of(tensors, *geometry)
            if layer is not None:
                memo.note(self, None, tensors, layer)
                return layer.run(tensors)
        return super().forward(input)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
