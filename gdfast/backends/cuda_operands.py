"""The tensors that CUDA kernels are given where these read them as they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import plans
from gdfast.backends.sgd import DTYPES, HALF_TYPES

Copy = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def at_16(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where 16 does not divide its address."""
    if tensor.data_ptr() % 16 == 0:
        return tensor
    like = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return like.copy_(tensor)


def may_plan(plan: plans.Draft, copies: Sequence[Copy], tensors: Sequence[int]) -> bool:
    """Whether kernels read these tensors of a plan where they lie, which it then makes sure of;
    `copies` are what each of them would go through."""
    for copy, tensor in zip(copies, tensors, strict=True):
        if copy is at_16:
            plan.align(tensor)
        elif copy is not as_it_is:
            return False
    return True


def plan_cast(
    plan: plans.Draft, tensor: int, size: Sequence[int], strides: Sequence[int],
    to: torch.dtype, half: torch.dtype, device: torch.device,
) -> int:  # fmt: skip
    """The number of a dense tensor made another of type `to`: float32 a half type, or back."""
    assert native.cuda is not None and half in HALF_TYPES
    made = plan.fresh(partial(torch.empty_strided, size, strides, dtype=to, device=device))
    plan.launch(native.cuda.cast_launch(prod(size), DTYPES[half], to == half), tensor, made)
    return made
