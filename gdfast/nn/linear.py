"""The linear layer on our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from gdfast.ops.linear import linear


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` that runs on our kernels where they are faster: same arguments and state.

    input [..., in_features]; what runs where is said at `gdfast.ops.linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., out_features] of input [..., in_features]."""
        return linear(input, self.weight, self.bias)
