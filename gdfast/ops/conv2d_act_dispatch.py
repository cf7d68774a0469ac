"""The dispatcher's side of conv2d + bias + activation: torch.ops.gdfast.conv2d_act.

Arguments as for torch.ops.gdfast.conv2d, activation as for `ops.conv2d_act`. The gradients are
those of an activation and of conv2d.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gdfast.backends import Conv2dActQuery, chosen
from gdfast.backends.activation import ACTIVATIONS
from gdfast.errors import mismatch
from gdfast.ops.conv2d_dispatch import (
    bind,
    conv2d_key,
    conv2d_query,
    known_kernel,
    library,
)

OP = "conv2d_act"

library.define(
    f"{OP}(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation, float negative_slope, str backend) -> Tensor"
)


def conv2d_act_key(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    activation: str, negative_slope: float, backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of a forward pass is kept by."""
    key = conv2d_key(input, weight, bias, stride, padding, dilation, groups, backend)
    return (OP, activation, negative_slope, *key)


def conv2d_act(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    activation: str, negative_slope: float, backend: str,
) -> Tensor:  # fmt: skip
    """Runs a forward pass on the backend that takes it; see torch.ops.gdfast.conv2d_act."""
    backend = chosen(backend)
    key = conv2d_act_key(
        input, weight, bias, stride, padding, dilation, groups, activation, negative_slope, backend
    )
    kernel = known_kernel(key)
    if kernel is None:
        query = _query(
            input, weight, bias, stride, padding, dilation, groups, activation, negative_slope
        )
        kernel = bind(key, OP, query, backend, input, weight, bias)
    output: Tensor = kernel(input, weight, bias)
    return output


def check_activation(activation: str) -> None:
    """Raises ValueError for the name of no activation."""
    if activation not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        raise ValueError(mismatch(OP, "activation", expected, repr(activation)))


def _query(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Conv2dActQuery:
    *geometry, activation, negative_slope = arguments
    check_activation(activation)
    query = conv2d_query(OP, input, weight, bias, *geometry)
    # What no other activation reads tells no queries apart.
    slope = float(negative_slope) if activation == "leaky_relu" else 0.0
    return Conv2dActQuery(
        query.device, query.dtype, query.layout, geometry=query.geometry, strides=query.strides,
        activation=activation, negative_slope=slope,
    )  # fmt: skip


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    *settings, _ = arguments
    query = _query(input, weight, bias, *settings)
    return input.new_empty_strided(query.geometry.output_size, query.strides[2])


library.impl(OP, conv2d_act, "CompositeExplicitAutograd")
torch.library.register_fake(f"gdfast::{OP}", _fake, lib=library)


@register_flop_formula(torch.ops.gdfast.conv2d_act)
def _flops(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    # As natively: an activation counts nothing.
    return 2 * prod(out_shape) * prod(weight[1:])
