"""The in-place update: torch.ops.gdfast.sgd_, its checks, and what it does with odd memory layouts.

Kernels walk through a parameter, its gradient, its momentum buffer and its master copy as through
arrays. What is not one stretch of memory in the parameter's order is copied there and back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdfast.backends import Query, chosen, fall_back, resolve
from gdfast.backends.registry import AUTO
from gdfast.backends.sgd import (
    HALF_TYPES,
    Memory,
    SgdHyper,
    SgdTensors,
    Tensors,
    addresses,
    reference,
)
from gdfast.errors import mismatch
from gdfast.ops.conv2d_dispatch import library
from gdfast.ops.ordinary import dispatch_modes

SUBCLASS = "a tensor is of a subclass, whose memory is not ours to read"

_dtype_and_device = attrgetter("dtype", "device")
_is_contiguous = torch._C.TensorBase.is_contiguous
_numel = torch._C.TensorBase.numel
_stride = torch._C.TensorBase.stride
_PLAIN = {torch.Tensor, torch.nn.Parameter}

library.define(
    "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, "
    "Tensor(d!)[] master_weights, *, float lr, Tensor? lr_tensor, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step, "
    "bool zero_grad, Tensor? grad_scale, Tensor? found_inf, str backend) -> ()"
)


def _sgd_kernel(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, master_weights: Tensors, *,
    lr: float, lr_tensor: Tensor | None, backend: str, **hyper: Any,
) -> None:  # fmt: skip
    lr_or_tensor = lr if lr_tensor is None else lr_tensor
    settings = SgdHyper(lr=lr_or_tensor, **hyper)
    update(SgdTensors(params, grads, momentum_buffers, master_weights), settings, backend)


def _fake_sgd(*_: Any, **__: Any) -> None:
    """Nothing is returned, and what is written keeps its size and layout."""


# CompositeExplicitAutograd: one kernel for every device, which autograd does not record.
library.impl("sgd_", _sgd_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("gdfast::sgd_", _fake_sgd, lib=library)


def as_tensors(name: str, value: Any) -> Tensors:
    """A tensor or several as a list. Raises TypeError for anything else."""
    try:
        tensors = [value] if isinstance(value, Tensor) else list(value)
    except TypeError:
        expected = "a tensor or a list of tensors"
        raise TypeError(mismatch("sgd_", name, expected, repr(value))) from None
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(mismatch("sgd_", f"{name}[{index}]", "a tensor", repr(tensor)))
    return tensors


def is_plain(tensors: Tensors) -> bool:
    """Whether all are torch.Tensor or Parameter themselves, which keep their elements in memory."""
    return _PLAIN.issuperset(map(type, tensors))


def run_sgd(
    tensors: SgdTensors, hyper: SgdHyper, backend: str = AUTO, checked: Checked | None = None
) -> Checked | None:
    """Updates in place, past the dispatcher where nobody watches it.

    For many small tensors most of a step is checks. The result, given back in the next step, saves
    those of all but the gradients.
    """
    if not (torch.compiler.is_compiling() or dispatch_modes()):
        return update(tensors, hyper, backend, checked)
    lr, lr_tensor = (0.0, hyper.lr) if isinstance(hyper.lr, Tensor) else (hyper.lr, None)
    settings = hyper._asdict() | {"lr": lr, "lr_tensor": lr_tensor, "backend": backend}
    with torch.no_grad():
        torch.ops.gdfast.sgd_(*tensors, **settings)
    return None


class Checked(NamedTuple):
    """Parameters, momentum buffers and master copies that kernels can walk through together.

    It holds as long as the addresses are the same: `kept` keeps the memory there from being freed,
    so that nothing else can have come to lie there.
    """

    backend: str
    run: Callable[..., None]
    strides: list[tuple[int, ...]]
    kinds: list[tuple[torch.dtype, torch.device]]
    memory: Memory
    kept: list[Tensor]

    @classmethod
    def of(cls, backend: str, run: Callable[..., None], tensors: SgdTensors) -> Checked:
        params, _, momenta, masters = tensors
        return cls(
            chosen(backend), run, list(map(_stride, params)), list(map(_dtype_and_device, params)),
            Memory.of(tensors), [tensor.detach() for tensor in (*params, *momenta, *masters)],
        )  # fmt: skip

    def holds(self, backend: str, tensors: SgdTensors) -> bool:
        params, grads, momenta, masters = tensors
        return (
            chosen(backend) == self.backend
            and addresses(params) == self.memory.params
            and addresses(momenta) == self.memory.momenta
            and addresses(masters) == self.memory.masters
            and list(map(_stride, grads)) == self.strides
            and list(map(_numel, grads)) == self.memory.numels
            and list(map(_dtype_and_device, grads)) == self.kinds
        )


def update(
    tensors: SgdTensors, hyper: SgdHyper, backend: str, checked: Checked | None = None
) -> Checked | None:
    """Runs one update on the backends that take it, device by device and dtype by dtype."""
    if checked is not None and checked.holds(backend, tensors):
        checked.run(tensors, hyper, checked.memory)
        return checked
    params, grads, momenta, masters = tensors
    count = len(params)
    _check_length("grads", grads, count)
    _check_length("momentum_buffers", momenta, count if hyper.momentum else 0)
    if masters:
        _check_length("master_weights", masters, count)
        _check_half_types(params)
    if not count:
        return None
    kinds = list(map(_dtype_and_device, params))
    if kinds.count(kinds[0]) != count:
        for kind in dict.fromkeys(kinds):
            update(tensors.only([each == kind for each in kinds]), hyper, backend)
        return None

    if not all(map(is_plain, tensors)):
        fall_back("sgd_", backend, SUBCLASS)
        run = reference
    else:
        dtype, device = kind = kinds[0]
        state_kind = (torch.float32, device) if masters else kind
        run = resolve("sgd_", Query(device, dtype), backend).operations["sgd_"]
        if (
            _walk_together(params, grads, kind)
            and (not momenta or _walk_together(params, momenta, state_kind))
            and (not masters or _walk_together(params, masters, state_kind))
        ):
            checked = Checked.of(backend, run, tensors)
            run(tensors, hyper, checked.memory)
            return checked
    for i, param in enumerate(params):
        _check_writable("params", i, param)
        _check_fits("grads", i, grads[i], param)
        for name, state in (("momentum_buffers", momenta), ("master_weights", masters)):
            if state:
                _check_fits(name, i, state[i], param, has_master=bool(masters))
                _check_writable(name, i, state[i])
    if run is reference:
        run(tensors, hyper)
    else:
        _update_copies(run, tensors, hyper)
    return None


def _walk_together(
    params: Tensors, others: Tensors, kind: tuple[torch.dtype, torch.device]
) -> bool:
    """Whether each param and its other are one stretch of memory, in the same order of elements.

    `kind` is the dtype and the device that the others should have.
    """
    return (
        list(map(_numel, params)) == list(map(_numel, others))
        and list(map(_dtype_and_device, others)) == [kind] * len(params)
        and all(
            _same_order(param.shape, param.stride(), other.stride())
            for param, other in zip(params, others, strict=True)
        )
        and _all_dense(params)
        and _all_dense(others)
    )


def walk_with(strides: tuple[int, ...], tensors: SgdTensors) -> bool:
    """Whether a kernel that walks through memory by the strides of a dense tensor can update one
    parameter with its state."""
    (param,), _, momenta, masters = tensors
    kind = torch.float32 if masters else param.dtype, param.device
    return (
        _same_order(param.shape, param.stride(), strides)
        and is_plain((*tensors.params, *momenta, *masters))
        and all(_walk_together([param], [each], kind) for each in (*momenta, *masters))
    )


def _all_dense(tensors: Tensors) -> bool:
    return all(map(_is_contiguous, tensors)) or all(
        t.layout is torch.strided and _is_dense(t.shape, t.stride()) for t in tensors
    )


@lru_cache(maxsize=4096)
def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the elements fill one stretch of memory, in some order of the axes."""
    expected = 1
    axes = sorted((stride, n) for stride, n in zip(strides, shape, strict=True) if n != 1)
    for stride, n in axes:
        if stride != expected:
            return False
        expected *= n
    return True


@lru_cache(maxsize=4096)
def _same_order(shape: torch.Size, strides: tuple[int, ...], other: tuple[int, ...]) -> bool:
    # The stride of an axis of length 1 means nothing.
    return len(strides) == len(other) and all(
        a == b for n, a, b in zip(shape, strides, other, strict=True) if n != 1
    )


def _update_copies(run: Callable[..., None], tensors: SgdTensors, hyper: SgdHyper) -> None:
    """Updates copies in one memory order where the tensors themselves are not, and copies back."""
    params, *others = tensors
    with torch.no_grad():
        dense = [p if _is_dense(p.shape, p.stride()) else p.contiguous() for p in params]
        laid_out = ([_laid_out(t, p) for t, p in zip(ts, dense, strict=False)] for ts in others)
        copies = SgdTensors(dense, *laid_out)
        run(copies, hyper, Memory.of(copies))
        for originals, written in zip(tensors, copies, strict=True):
            if originals is not tensors.grads or hyper.writes_grads:
                for original, copy in zip(originals, written, strict=True):
                    if original is not copy:
                        original.copy_(copy)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    if _same_order(tensor.shape, tensor.stride(), like.stride()):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _check_length(name: str, tensors: Tensors, expected: int) -> None:
    if len(tensors) != expected:
        words = f"{expected} tensors" if expected else "no tensors, because momentum is 0"
        raise ValueError(mismatch("sgd_", name, words, len(tensors)))


def _check_half_types(params: Tensors) -> None:
    for index, param in enumerate(params):
        if param.dtype not in HALF_TYPES:
            expected = "float16 or bfloat16, which alone have master copies"
            raise RuntimeError(mismatch("sgd_", f"params[{index}]", expected, param.dtype))


def _check_fits(
    name: str, index: int, tensor: Tensor, param: Tensor, has_master: bool = False
) -> None:
    """`has_master` is for what is float32 where parameters have master copies."""
    if tensor.layout != torch.strided:
        raise RuntimeError("`_fused_sgd` does not support sparse gradients")
    dtype, whose = (
        (torch.float32, "a master copy") if has_master else (param.dtype, "its parameter")
    )
    for what, got, expected in (
        ("shape of its parameter", list(tensor.shape), list(param.shape)),
        (f"dtype of {whose}", tensor.dtype, dtype),
        ("device of its parameter", tensor.device, param.device),
    ):
        if got != expected:
            raise RuntimeError(mismatch("sgd_", f"{name}[{index}]", f"the {what}, {expected}", got))


def _check_writable(name: str, index: int, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        expected, got = "a dense tensor", f"{tensor.layout}, a sparse one"
        raise RuntimeError(mismatch("sgd_", f"{name}[{index}]", expected, got, "to_dense() it"))
    if torch._debug_has_internal_overlap(tensor) == 1:
        expected, got = "elements with memory of their own", f"strides {tensor.stride()}"
        raise RuntimeError(mismatch("sgd_", f"{name}[{index}]", expected, got, "clone() it"))
