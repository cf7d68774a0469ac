"""The in-place SGD update on each backend.

The tensors of one call share a device and a dtype, but where parameters of a half type have master
copies: then those and the momentum buffers are float32. For kernels each is one stretch of memory,
with a gradient, a momentum buffer and a master copy in the order of their parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress, pairwise, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.sgd import sgd as native_sgd

from gdfast import native
from gdfast.backends import cuda_stream, plans
from gdfast.backends.linear import has_few_outputs

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
HALF_TYPES = {torch.bfloat16, torch.float16}  # those that may have master copies

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


class SgdTensors(NamedTuple):
    """What one call updates: lists of one length, or empty where there is no such thing."""

    params: Tensors
    grads: Tensors
    momenta: Tensors
    masters: Tensors

    def only(self, chosen: Sequence[bool]) -> SgdTensors:
        """Those whose flag is set."""
        return SgdTensors(*(list(compress(each, chosen)) for each in self))


class Memory(NamedTuple):
    """Where the elements are: addresses, and how many elements lie at each."""

    params: list[int]
    momenta: list[int]
    masters: list[int]
    numels: list[int]
    rows: list[int]  # of matrices whose columns CPU threads divide; empty if there are none

    @classmethod
    def of(cls, tensors: SgdTensors) -> Memory:
        params, _, momenta, masters = tensors
        numels, rows = list(map(_numel, params)), list(map(_rows, params))
        if max(rows, default=1) == 1:
            rows = []
        return cls(addresses(params), addresses(momenta), addresses(masters), numels, rows)


def _rows(param: Tensor) -> int:
    """The rows of a linear layer's weight whose kernels divide its columns between threads."""
    of_layer = param.dim() == 2 and param.is_contiguous()
    return param.shape[0] if of_layer and has_few_outputs(param.shape[1], param.shape[0]) else 1


def addresses(tensors: Tensors) -> list[int]:
    return list(map(_data_ptr, tensors))


def cpu(tensors: SgdTensors, hyper: SgdHyper, at: Memory) -> None:
    """Runs the CPU kernel, in one parallel region for all tensors."""
    if hyper.found_inf is not None and hyper.found_inf.item():
        if hyper.zero_grad:
            torch._foreach_zero_(list(tensors.grads))
        return
    assert native.cpu is not None
    done = native.cpu.sgd(
        at.params, addresses(tensors.grads), at.momenta, at.masters, at.numels,
        DTYPES[tensors.params[0].dtype], hyper.lr, hyper.momentum, hyper.dampening,
        hyper.weight_decay, 1.0 if hyper.grad_scale is None else hyper.grad_scale.item(),
        hyper.nesterov, hyper.maximize, hyper.first_step, hyper.zero_grad, torch.get_num_threads(),
        at.rows,
    )  # fmt: skip
    if done:
        _increment_versions(tensors, hyper)
    else:  # parameters share memory, so that their order matters
        reference(tensors, hyper)


def cuda(tensors: SgdTensors, hyper: SgdHyper, at: Memory) -> None:
    """Runs the CUDA kernel on the current stream. Nothing waits for the GPU."""
    assert native.cuda is not None
    device = tensors.params[0].device
    lr, lr_tensor = split_lr(device, hyper.lr)
    grad_scale, found_inf = (
        None if value is None else value.to(device, torch.float32)
        for value in (hyper.grad_scale, hyper.found_inf)
    )
    done = native.cuda.sgd(
        at.params, addresses(tensors.grads), at.momenta, at.masters, at.numels,
        DTYPES[tensors.params[0].dtype], lr, hyper.momentum, hyper.dampening, hyper.weight_decay,
        hyper.nesterov, hyper.maximize, hyper.first_step, hyper.zero_grad,
        address(lr_tensor), address(grad_scale), address(found_inf),
        *cuda_stream.current(device),
    )  # fmt: skip
    if done:
        _increment_versions(tensors, hyper)
    else:
        reference(tensors, hyper)


def again_like(
    run: Callable[..., None], tensors: SgdTensors, at: Memory
) -> Callable[..., bool] | None:
    """Does an update by `run` once more, of tensors like these, whose kernels are told of `at`.

    `again(params, state, lr, momentum, dampening, weight_decay, nesterov, maximize, zero_grad)`
    takes a list of parameters and a dict of their states as an optimizer has them. It returns
    False, with nothing done, where something is not as it was. None where there is no such thing.
    """
    if native.cpu is None or run not in (cpu, cuda) or tensors.masters:
        return None
    like, on_gpu = tensors.params[0], run is cuda
    dtype, module = DTYPES[like.dtype], native.cuda if on_gpu else native.cpu
    assert module is not None
    launch = module.sgd_launch() if on_gpu else module.sgd_launch(dtype, at.rows)
    params, grads, momenta, _ = map(tuple, tensors)
    try:
        made = native.cpu.make_update(launch, dtype, params, grads, momenta)
    except ValueError:  # of what has no memory
        return None
    run_again, place = native.cpu.run_update, plans.place(like.device, on_gpu)

    def again(*arguments: Any) -> bool:
        done: bool = run_again(made, *arguments, *place())
        return done

    return again


def triton(tensors: SgdTensors, hyper: SgdHyper, at: Memory) -> None:
    """Runs the Triton kernel on the current stream. Nothing waits for the GPU."""
    from gdfast.backends.triton import bind_sgd

    like = tensors.params[0]
    if _share_memory((*at.params,), (*at.numels,), like.element_size()):
        reference(tensors, hyper)
        return
    lr, grad_scale, found_inf = lr_on(like.device, hyper.lr), hyper.grad_scale, hyper.found_inf
    hyper = hyper._replace(
        lr=lr.to(torch.float32) if isinstance(lr, Tensor) else lr,
        grad_scale=None if grad_scale is None else grad_scale.to(like.device, torch.float32),
        found_inf=None if found_inf is None else found_inf.to(like.device, torch.float32),
    )
    settings = bind_sgd.Settings(*hyper)
    bind_sgd.update(
        like, at.params, addresses(tensors.grads), at.momenta, at.masters, at.numels, settings
    )
    _increment_versions(tensors, hyper)


def lr_on(device: torch.device, lr: float | Tensor) -> float | Tensor:
    """lr as a tensor only where it lies on the device: one elsewhere is read without a copy."""
    return lr.item() if isinstance(lr, Tensor) and lr.device != device else lr


def split_lr(device: torch.device, lr: float | Tensor) -> tuple[float, Tensor | None]:
    """lr as CUDA kernels take it: a number, or instead of it a float64 tensor on their device."""
    on_device = lr_on(device, lr)
    if isinstance(on_device, Tensor):
        return 0.0, on_device.to(torch.float64)
    return on_device, None


@lru_cache(maxsize=64)
def _share_memory(starts: tuple[int, ...], numels: tuple[int, ...], itemsize: int) -> bool:
    """Whether two of the stretches overlap: programs would update it at the same time."""
    stretches = sorted((a, a + n * itemsize) for a, n in zip(starts, numels, strict=True) if n)
    return any(a[1] > b[0] for a, b in pairwise(stretches))


def reference(tensors: SgdTensors, hyper: SgdHyper, at: Memory | None = None) -> None:
    """Runs native PyTorch's default loop."""
    with torch.no_grad():
        if hyper.found_inf is None or not hyper.found_inf.item():
            for param, grad, momentum, master in zip_longest(*tensors):
                _reference_one(param, grad, momentum, master, hyper)
        if hyper.zero_grad:
            for grad in tensors.grads:
                grad.zero_()


def _reference_one(
    param: Tensor, grad: Tensor, momentum: Tensor | None, master: Tensor | None, hyper: SgdHyper
) -> None:
    updated, wide_grad = param, grad
    if master is not None:
        wide_grad = grad.float()
        master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))
        updated = master
    if hyper.grad_scale is not None:
        wide_grad.div_(hyper.grad_scale)
        if wide_grad is not grad:
            grad.copy_(wide_grad)
    buffers = [None if hyper.first_step else momentum]
    native_sgd(
        [updated], [wide_grad], buffers, foreach=False, fused=False,
        lr=hyper.lr,  # type: ignore[arg-type]  # it takes a tensor too
        momentum=hyper.momentum, dampening=hyper.dampening, weight_decay=hyper.weight_decay,
        nesterov=hyper.nesterov, maximize=hyper.maximize,
    )  # fmt: skip
    if hyper.first_step and momentum is not None:
        assert buffers[0] is not None  # the loop put it there
        momentum.copy_(buffers[0])
    if master is not None:
        param.copy_(master)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _increment_versions(tensors: SgdTensors, hyper: SgdHyper) -> None:
    """Tells autograd what a kernel wrote through pointers."""
    params, grads, momenta, masters = tensors
    increment_version([*params, *momenta, *masters, *(grads if hyper.writes_grads else ())])
