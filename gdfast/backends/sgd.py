"""The in-place SGD update on each backend.

The tensors of one call share a device and a dtype. For the CPU and CUDA kernels each is one stretch
of memory, a gradient and a momentum buffer in the order of their parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.sgd import sgd as native_sgd

from gdfast import native
from gdfast.backends import cuda_stream

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

Tensors = Sequence[Tensor]
_data_ptr = torch._C.TensorBase.data_ptr
_numel = torch._C.TensorBase.numel


class SgdHyper(NamedTuple):
    """What all tensors of one call share, as `gdfast.ops.sgd_` describes it."""

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

    @property
    def writes_grads(self) -> bool:
        return self.zero_grad or self.grad_scale is not None


class Memory(NamedTuple):
    """Where the elements are: addresses, and how many elements lie at each."""

    params: list[int]
    momenta: list[int]
    numels: list[int]

    @classmethod
    def of(cls, params: Tensors, momenta: Tensors) -> Memory:
        return cls(addresses(params), addresses(momenta), list(map(_numel, params)))


def addresses(tensors: Tensors) -> list[int]:
    return list(map(_data_ptr, tensors))


def cpu(params: Tensors, grads: Tensors, momenta: Tensors, hyper: SgdHyper, at: Memory) -> None:
    """Runs the CPU kernel, in one parallel region for all tensors."""
    if hyper.found_inf is not None and hyper.found_inf.item():
        if hyper.zero_grad:
            torch._foreach_zero_(list(grads))
        return
    assert native.cpu is not None
    done = native.cpu.sgd(
        at.params, addresses(grads), at.momenta, at.numels, DTYPES[params[0].dtype],
        float(hyper.lr), hyper.momentum, hyper.dampening, hyper.weight_decay,
        1.0 if hyper.grad_scale is None else hyper.grad_scale.item(), hyper.nesterov,
        hyper.maximize, hyper.first_step, hyper.zero_grad, torch.get_num_threads(),
    )  # fmt: skip
    if done:
        _increment_versions(params, grads, momenta, hyper)
    else:  # parameters share memory, so that their order matters
        reference(params, grads, momenta, hyper)


def cuda(params: Tensors, grads: Tensors, momenta: Tensors, hyper: SgdHyper, at: Memory) -> None:
    """Runs the CUDA kernel on the current stream. Nothing waits for the GPU."""
    assert native.cuda is not None
    device = params[0].device
    lr, lr_tensor = (0.0, hyper.lr) if isinstance(hyper.lr, Tensor) else (hyper.lr, None)
    lr_tensor, grad_scale, found_inf = (
        None if value is None else value.to(device, dtype)
        for value, dtype in (
            (lr_tensor, torch.float64),
            (hyper.grad_scale, torch.float32),
            (hyper.found_inf, torch.float32),
        )
    )
    done = native.cuda.sgd(
        at.params, addresses(grads), at.momenta, at.numels, DTYPES[params[0].dtype], lr,
        hyper.momentum, hyper.dampening, hyper.weight_decay, hyper.nesterov, hyper.maximize,
        hyper.first_step, hyper.zero_grad, _address(lr_tensor), _address(grad_scale),
        _address(found_inf), *cuda_stream.current(device),
    )  # fmt: skip
    if done:
        _increment_versions(params, grads, momenta, hyper)
    else:
        reference(params, grads, momenta, hyper)


def triton(params: Tensors, grads: Tensors, momenta: Tensors, hyper: SgdHyper, at: Memory) -> None:
    """Runs the Triton kernel on the current stream. Nothing waits for the GPU."""
    from gdfast.backends.triton import bind_sgd

    like = params[0]
    if _share_memory((*at.params,), (*at.numels,), like.element_size()):
        reference(params, grads, momenta, hyper)
        return
    grad_scale, found_inf = hyper.grad_scale, hyper.found_inf
    hyper = hyper._replace(
        lr=hyper.lr.to(like.device, torch.float32) if isinstance(hyper.lr, Tensor) else hyper.lr,
        grad_scale=None if grad_scale is None else grad_scale.to(like.device, torch.float32),
        found_inf=None if found_inf is None else found_inf.to(like.device, torch.float32),
    )
    settings = bind_sgd.Settings(*hyper)
    bind_sgd.update(like, at.params, addresses(grads), at.momenta, at.numels, settings)
    _increment_versions(params, grads, momenta, hyper)


@lru_cache(maxsize=64)
def _share_memory(starts: tuple[int, ...], numels: tuple[int, ...], itemsize: int) -> bool:
    """Whether two of the stretches overlap: programs would update it at the same time."""
    stretches = sorted((a, a + n * itemsize) for a, n in zip(starts, numels, strict=True) if n)
    return any(a[1] > b[0] for a, b in pairwise(stretches))


def reference(
    params: Tensors, grads: Tensors, momenta: Tensors, hyper: SgdHyper, at: Memory | None = None
) -> None:
    """Runs native PyTorch's default loop."""
    with torch.no_grad():
        if hyper.found_inf is None or not hyper.found_inf.item():
            if hyper.grad_scale is not None:
                for grad in grads:
                    grad.div_(hyper.grad_scale)
            buffers = [None if hyper.first_step else buffer for buffer in momenta]
            buffers = buffers or [None] * len(params)
            native_sgd(
                list(params), list(grads), buffers, foreach=False, fused=False,
                lr=hyper.lr,  # type: ignore[arg-type]  # it takes a tensor too
                momentum=hyper.momentum, dampening=hyper.dampening,
                weight_decay=hyper.weight_decay, nesterov=hyper.nesterov,
                maximize=hyper.maximize,
            )  # fmt: skip
            if hyper.first_step:
                for buffer, made in zip(momenta, buffers, strict=False):
                    assert made is not None  # the loop put it there
                    buffer.copy_(made)
        if hyper.zero_grad:
            for grad in grads:
                grad.zero_()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _increment_versions(params: Tensors, grads: Tensors, momenta: Tensors, hyper: SgdHyper) -> None:
    """Tells autograd what a kernel wrote through pointers."""
    increment_version([*params, *momenta, *(grads if hyper.writes_grads else ())])
