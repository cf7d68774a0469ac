"""The convolution layer on our kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.ops.conv2d import conv2d


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` that runs on our kernels: same arguments, parameters and state.

    input [N, C, H, W] or [C, H, W]; dtypes, layout of the result and errors are those of
    `gdfast.ops.conv2d`. `gdfast.backend` and GDFAST_BACKEND choose what it runs on.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
