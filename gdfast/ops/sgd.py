"""Stochastic gradient descent as functions: `sgd_` in place on many tensors, `sgd` differentiable.

Both compute what `torch.optim.SGD`'s default loop does. With g the gradient (negated to maximize):

    d = g + weight_decay * param
    m = momentum * m + (1 - dampening) * d      in the first step m = d
    u = d + momentum * m with nesterov, m without it, d without momentum
    param = param - lr * u
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdfast.backends import fall_back
from gdfast.backends.sgd import SgdHyper, SgdTensors
from gdfast.ops.sgd_dispatch import SUBCLASS, as_tensors, is_plain, run_sgd, update


def sgd_(
    params: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    momentum_buffers: Tensor | Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    zero_grad: bool = False,
    master_weights: Tensor | Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Updates parameters in place by SGD, all of them in one pass over memory.

    Takes tensors or lists of as many tensors, of any shapes, layouts, dtypes and devices; a
    gradient and a momentum buffer are as their parameter is. `momentum_buffers` is empty where
    momentum is 0; with `first_step` its content does not matter, because it becomes the gradient.
    Autograd does not record the update, but sees that the tensors have changed.

    lr may be a one-element tensor. Kernels read it where it is, if it is on the device of the
    parameters: nothing waits for its value, and a CUDA graph follows it.

    `master_weights` are float32 copies of parameters that are all float16 or bfloat16, with float32
    momentum buffers. The update starts from them and ends in them, and a parameter is what its
    master copy rounds to. An element of a parameter that is anything else before, because somebody
    changed it, is taken into the master copy first.

    `zero_grad` leaves the gradients zero. Gradients are divided by `grad_scale`, a one-element
    tensor, and stay so unless zeroed. Where the one-element tensor `found_inf` is not 0, nothing is
    updated, though gradients are zeroed if that was asked for.

    Raises TypeError for what is no tensor or list of tensors, ValueError for lists that differ in
    length and an unknown backend, RuntimeError for sparse tensors, parameters whose elements
    overlap, and shapes, dtypes and devices that do not fit together, BackendError when the backend
    asked for by name cannot run this.
    """
    params, grads = as_tensors("params", params), as_tensors("grads", grads)
    momenta = as_tensors("momentum_buffers", momentum_buffers)
    masters = as_tensors("master_weights", master_weights)
    hyper = SgdHyper(
        lr, momentum, dampening, weight_decay, nesterov, maximize, first_step, zero_grad,
        grad_scale, found_inf,
    )  # fmt: skip
    run_sgd(SgdTensors(params, grads, momenta, masters), hyper, backend)


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    detach_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Returns what one step of SGD makes of a parameter and of its momentum buffer.

    All tensors have the shape, dtype and device of `param`; lr and weight_decay may be one-element
    tensors. Without a momentum buffer this is the first step. The second result is None where
    momentum is 0. Differentiable any number of times in every tensor; with `detach_first` the first
    momentum buffer counts as a constant, as in `torch.optim.SGD(differentiable=True)`.

    Raises as `sgd_` does.
    """
    buffer = momentum_buffer if momentum else None
    how = _How(momentum, dampening, nesterov, maximize, detach_first)
    lr, weight_decay = _scalar(lr), _scalar(weight_decay)
    if reason := _why_operators(param, grad, buffer):
        fall_back("sgd", backend, reason)
    if reason or torch.compiler.is_compiling():
        u, new_buffer = _direction(param, grad, buffer, weight_decay, how)
        return param - lr * u, new_buffer
    result: tuple[Tensor, Tensor | None] = SgdFunction.apply(
        param, grad, buffer, lr, weight_decay, how, backend
    )
    return result


class _How(NamedTuple):
    """The settings of `sgd` that are never differentiated in."""

    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool
    detach_first: bool


class SgdFunction(torch.autograd.Function):
    """`sgd` to autograd: param, grad, momentum buffer, lr, weight_decay, settings, backend."""

    @staticmethod
    def forward(
        ctx: Any, param: Tensor, grad: Tensor, momentum_buffer: Tensor | None,
        lr: float | Tensor, weight_decay: float | Tensor, how: _How, backend: str,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.how, ctx.first_step = how, momentum_buffer is None
        ctx.scalars = lr, weight_decay
        if any(ctx.needs_input_grad[3:5]):
            # Only these gradients look back at the operands. Without them the caller may change
            # its tensors in place before backward, as it may with torch.optim.SGD.
            tensors = [x if isinstance(x, Tensor) else None for x in ctx.scalars]
            ctx.save_for_backward(param, grad, momentum_buffer, *tensors)
        new = param.detach().clone()
        buffers: list[Tensor] = []
        if how.momentum:
            first = torch.empty_like(new) if momentum_buffer is None else momentum_buffer.detach()
            buffers.append(first.clone())
        hyper = SgdHyper(
            lr, how.momentum, how.dampening, float(weight_decay), how.nesterov, how.maximize,
            momentum_buffer is None, False, None, None,
        )  # fmt: skip
        update(SgdTensors([new], [grad.detach()], buffers, []), hyper, backend)
        return new, buffers[0] if buffers else None

    @staticmethod
    def backward(ctx: Any, grad_new: Tensor, grad_buffer: Tensor | None) -> tuple[Any, ...]:
        # By differentiable operators alone, because backward may be differentiated too.
        how: _How = ctx.how
        lr, weight_decay = ctx.scalars
        grad_lr = grad_weight_decay = grad_m = None
        need_lr, need_weight_decay = ctx.needs_input_grad[3:5]
        if need_lr or need_weight_decay:
            param, grad, momentum_buffer, *saved = ctx.saved_tensors
            lr, weight_decay = (
                x if t is None else t for x, t in zip((lr, weight_decay), saved, strict=True)
            )
        grad_u = -lr * grad_new
        grad_d = grad_u
        if how.momentum:
            assert grad_buffer is not None
            grad_new_m = grad_buffer + (how.momentum * grad_u if how.nesterov else grad_u)
            if not how.nesterov:
                grad_d = torch.zeros_like(grad_u)
            if not ctx.first_step:
                grad_d = grad_d + (1 - how.dampening) * grad_new_m
                grad_m = how.momentum * grad_new_m
            elif not how.detach_first:
                grad_d = grad_d + grad_new_m
        if need_lr:
            u, _ = _direction(param, grad, momentum_buffer, weight_decay, how)
            grad_lr = -(grad_new * u).sum().to(lr.dtype)
        if need_weight_decay:
            grad_weight_decay = (grad_d * param).sum().to(weight_decay.dtype)
        grad_param = grad_new + weight_decay * grad_d
        grad_grad = -grad_d if how.maximize else grad_d
        return grad_param, grad_grad, grad_m, grad_lr, grad_weight_decay, None, None


def _direction(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, weight_decay: float | Tensor,
    how: _How,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """u and the new momentum buffer, by differentiable operators."""
    d = -grad if how.maximize else grad
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        d = d + weight_decay * param
    if not how.momentum:
        return d, None
    if momentum_buffer is None:
        m = d.detach().clone() if how.detach_first else d.clone()
    else:
        m = how.momentum * momentum_buffer + (1 - how.dampening) * d
    return d + how.momentum * m if how.nesterov else m, m


def _scalar(value: float | Tensor) -> float | Tensor:
    """A hyperparameter as a number, or as a tensor without axes where it is differentiated in."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if value.requires_grad or torch.compiler.is_compiling():
        return value.reshape(())
    return value.item()


def _why_operators(*tensors: Tensor | None) -> str:
    """Why plain operators compute this, or "" where the kernels can."""
    present = [tensor for tensor in tensors if tensor is not None]
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need operators that they know"
    if forward_ad._current_level >= 0:
        return "forward-mode AD needs operators that it knows"
    if not is_plain(present):
        return SUBCLASS
    if any(tensor.is_complex() for tensor in present):
        return "no other backend takes complex numbers"
    return ""
