"""Launches of the SGD kernel for tensors of one dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from gdfast.backends.triton import sgd
from gdfast.backends.triton.launch import INTERPRETED, Launch

_TENSORS = 32  # of one launch: a kernel's arguments are at most 4 KB
_BLOCK = 65536 if INTERPRETED else 2048
_PIECE = 2**29  # elements of one tensor that an entry may have
_NEVER = 2**29  # more than there are programs
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


def encoded(number: int) -> int:
    """An odd number that stands for one from 0 on.

    Triton compiles a kernel anew where an entry of a tuple is 1 or becomes a multiple of 16, and
    what was compiled holds for no other: entries that are neither share one.
    """
    return 2 * number + 3


def update(
    like: Tensor, params: Sequence[int], grads: Sequence[int], momenta: Sequence[int],
    masters: Sequence[int], numels: Sequence[int], settings: Settings,
) -> None:  # fmt: skip
    """Updates what lies at the addresses; `like` tells the dtype and the device."""
    s = settings
    kind = "none" if s.momentum == 0 else "first" if s.first_step else "running"
    flags = (
        kind, s.nesterov, s.maximize, s.weight_decay != 0, s.zero_grad, isinstance(s.lr, Tensor),
        s.grad_scale is not None, s.found_inf is not None, bool(masters),
    )  # fmt: skip
    lr = 0.0 if isinstance(s.lr, Tensor) else float(s.lr)
    numbers = lr, float(s.momentum), float(1 - s.dampening), float(s.weight_decay)
    # A tensor that is not read stands for one that is not there.
    scalars = [x if isinstance(x, Tensor) else like for x in (s.lr, s.grad_scale, s.found_inf)]
    # Tables hold for as long as the addresses do: from step to step, where memory is reused.
    lists = params, grads, momenta or params, masters or params, numels
    sizes = like.element_size(), 4 if masters else like.element_size()
    key = *map(tuple, lists), *sizes
    for programs, aligned, tables in _tables(*key):
        run = _launch(programs, like.dtype, like.device, flags, aligned)
        run(like, *scalars, changing=(*tables, *numbers))


Table = tuple[int, ...]


@lru_cache(maxsize=64)
def _tables(
    params: Table, grads: Table, momenta: Table, masters: Table, numels: Table, size: int,
    state_size: int,
) -> list[tuple[int, bool, list[Table]]]:  # fmt: skip
    """For each launch: programs, whether addresses are multiples of 16, the kernel's tuples."""
    entries = list(_pieces(params, grads, momenta, masters, numels, size, state_size))
    launches = []
    for at in range(0, len(entries), _TENSORS):
        chosen = entries[at : at + _TENSORS]
        aligned = not any(address & 15 for *addresses, _ in chosen for address in addresses)
        starts, programs = [], 0
        for *_, numel in chosen:
            starts.append(programs)
            programs += ceil(numel / _BLOCK)
        chosen += [(_NOWHERE, _NOWHERE, _NOWHERE, _NOWHERE, 0)] * (_TENSORS - len(chosen))
        starts += [_NEVER] * (_TENSORS - len(starts))
        columns = [*zip(*chosen, strict=True), starts]
        launches.append((programs, aligned, [tuple(map(encoded, each)) for each in columns]))
    return launches


def _pieces(
    params: Table, grads: Table, momenta: Table, masters: Table, numels: Table, size: int,
    state_size: int,
) -> Iterator[tuple[int, int, int, int, int]]:  # fmt: skip
    """Addresses and numbers of elements, each of which 32 bits can count when encoded."""
    tables = params, grads, momenta, masters, numels
    for param, grad, momentum, master, numel in zip(*tables, strict=True):
        for first in range(0, numel, _PIECE):
            by, state_by = first * size, first * state_size
            left = min(_PIECE, numel - first)
            yield param + by, grad + by, momentum + state_by, master + state_by, left


@lru_cache(maxsize=1024)
def _launch(
    programs: int, dtype: torch.dtype, device: torch.device, flags: tuple[object, ...],
    aligned: bool,
) -> Launch:  # fmt: skip
    names = (
        "MOMENTUM", "NESTEROV", "MAXIMIZE", "DECAY", "ZERO_GRAD", "LR_AT", "SCALE", "FOUND_INF",
        "MASTER",
    )  # fmt: skip
    settings = {**dict(zip(names, flags, strict=True)), "ALIGNED": aligned, "BLOCK": _BLOCK}
    return Launch(sgd.sgd_kernel, (programs,), device, (), settings)
