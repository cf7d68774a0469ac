"""Launches of the SGD kernel for tensors of one dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from gdfast.backends.triton import sgd
from gdfast.backends.triton.launch import INTERPRETED, Launch

_TENSORS = 32  # of one launch: a kernel's arguments are at most 4 KB
_BLOCK = 65536 if INTERPRETED else 2048
_MOST = 2**31 - 1
_NOWHERE = 2**40  # where nothing is read: an address that counts with as many bits as others


class Settings(NamedTuple):
    """What all tensors share; tensors here are of one float32 element on their device."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first_step: bool
    zero_grad: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None


def update(
    like: Tensor, params: Sequence[int], grads: Sequence[int], momenta: Sequence[int],
    numels: Sequence[int], settings: Settings,
) -> None:  # fmt: skip
    """Updates what lies at the addresses; `like` tells the dtype and the device."""
    s = settings
    kind = "none" if s.momentum == 0 else "first" if s.first_step else "running"
    flags = (
        kind, s.nesterov, s.maximize, s.weight_decay != 0, s.zero_grad, isinstance(s.lr, Tensor),
        s.grad_scale is not None, s.found_inf is not None,
    )  # fmt: skip
    lr = 0.0 if isinstance(s.lr, Tensor) else float(s.lr)
    numbers = lr, float(s.momentum), float(1 - s.dampening), float(s.weight_decay)
    # A tensor that is not read stands for one that is not there.
    scalars = [x if isinstance(x, Tensor) else like for x in (s.lr, s.grad_scale, s.found_inf)]
    present = [i for i, numel in enumerate(numels) if numel]
    for at in range(0, len(present), _TENSORS):
        chosen = present[at : at + _TENSORS]
        rest = _TENSORS - len(chosen)
        starts, programs, unaligned = [], 0, 0
        for i in chosen:
            starts.append(programs)
            programs += ceil(numels[i] / _BLOCK)
        tables = []
        for table in (params, grads, momenta or params):
            tables.append((*(table[i] for i in chosen), *[_NOWHERE] * rest))
            for address in tables[-1]:
                unaligned |= address & 15
        counts = (*(numels[i] for i in chosen), *[0] * rest)
        wide = max(counts) > _MOST
        launch = _launch(programs, like.dtype, like.device, wide, flags, not unaligned)
        launch(like, *scalars, changing=(*tables, counts, (*starts, *[_MOST] * rest), *numbers))


# What is compiled depends on the width of the counts too.
@lru_cache(maxsize=1024)
def _launch(
    programs: int, dtype: torch.dtype, device: torch.device, wide: bool, flags: tuple[object, ...],
    aligned: bool,
) -> Launch:  # fmt: skip
    names = (
        "MOMENTUM", "NESTEROV", "MAXIMIZE", "DECAY", "ZERO_GRAD", "LR_AT", "SCALE", "FOUND_INF",
    )  # fmt: skip
    settings = {**dict(zip(names, flags, strict=True)), "ALIGNED": aligned, "BLOCK": _BLOCK}
    return Launch(sgd.sgd_kernel, (programs,), device, (), settings)
