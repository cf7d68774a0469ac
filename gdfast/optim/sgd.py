"""torch.optim.SGD with all parameters of a group updated in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gdfast import ops
from gdfast.backends.sgd import SgdHyper
from gdfast.ops.sgd_dispatch import Checked, run_sgd


class SGD(torch.optim.SGD):
    """Stochastic gradient descent: a drop-in for `torch.optim.SGD`, with its arguments and state.

    The update is that of native's default loop, computed in one pass. Half types are computed in
    float32 and rounded once at each store. `foreach` and `fused` are accepted and checked as native
    does, but choose nothing here: there is one implementation for each device.

    `fused_zero_grad` sets the gradients to zero in the same pass, as `zero_grad(set_to_none=False)`
    would after the step: the training loop then leaves `zero_grad` out. It takes effect in skipped
    steps too.

    `torch.amp.GradScaler` needs no pass of its own: the step divides gradients by the scale, and
    they stay so, as native's fused step leaves them. Where it found an infinity, nothing changes.

    With `differentiable` the update goes through autograd, by `gdfast.ops.sgd`.

    Raises as `torch.optim.SGD` does: ValueError for hyperparameters out of range, RuntimeError for
    clashing flags and, in `step`, for sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        fused_zero_grad: bool = False,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize,
            foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        if fused_zero_grad and differentiable:
            raise RuntimeError("`fused_zero_grad` does not support `differentiable`")
        # Not in the groups: whose task zeroing is belongs to the training loop, which a state_dict
        # from elsewhere must not change.
        self.fused_zero_grad = fused_zero_grad
        self._checked: dict[int, Checked] = {}  # by group
        self._step_supports_amp_scaling = not differentiable

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fused_zero_grad": self.fused_zero_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._checked = {}
        self._step_supports_amp_scaling = not self.defaults["differentiable"]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        `closure` reevaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if self.defaults["differentiable"]:
                self._step_differentiable(group)
            else:
                self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        params, grads = group["params"], [p.grad for p in group["params"]]
        if type(None) in map(type, grads):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if group["fused"] and not all(map(torch.is_floating_point, params)):
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors")
        hyper = SgdHyper(
            group["lr"], group["momentum"], group["dampening"], float(group["weight_decay"]),
            group["nesterov"], group["maximize"], False, self.fused_zero_grad,
            getattr(self, "grad_scale", None), getattr(self, "found_inf", None),
        )  # fmt: skip
        buffers: list[Tensor] = []
        if hyper.momentum:
            buffers = [self.state[p].get("momentum_buffer") for p in params]
            if type(None) in map(type, buffers):
                self._first_step(params, grads, buffers, hyper)
                return
        checked = self._checked.pop(index, None)
        checked = run_sgd(params, grads, buffers, hyper, checked=checked)
        if checked is not None:
            self._checked[index] = checked

    def _first_step(
        self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], hyper: SgdHyper
    ) -> None:
        """Updates parameters of which some have no momentum buffer yet."""
        old = [i for i, buffer in enumerate(buffers) if buffer is not None]
        run_sgd([params[i] for i in old], [grads[i] for i in old], [buffers[i] for i in old], hyper)
        new = [i for i, buffer in enumerate(buffers) if buffer is None]
        params, grads = [params[i] for i in new], [grads[i] for i in new]
        if hyper.found_inf is not None and hyper.found_inf.item():
            # Nothing is updated, so that no buffer may come into being.
            run_sgd(params, grads, [], hyper._replace(momentum=0.0))
            return
        buffers = [torch.empty_like(p, requires_grad=False) for p in params]
        run_sgd(params, grads, buffers, hyper._replace(first_step=True))
        for p, buffer in zip(params, buffers, strict=True):
            self.state[p]["momentum_buffer"] = buffer

    def _step_differentiable(self, group: dict[str, Any]) -> None:
        scalars = {name: group[name] for name in ("lr", "weight_decay")}
        differentiated = any(isinstance(x, Tensor) and x.requires_grad for x in scalars.values())
        with torch.enable_grad():
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p] if group["momentum"] else {}
                new, buffer = ops.sgd(
                    # Gradients in lr and weight_decay look back at the old value.
                    p.clone() if differentiated else p, p.grad, state.get("momentum_buffer"),
                    momentum=group["momentum"], dampening=group["dampening"],
                    nesterov=group["nesterov"], maximize=group["maximize"], detach_first=True,
                    **scalars,
                )  # fmt: skip
                p.copy_(new)
                if buffer is not None:
                    state["momentum_buffer"] = buffer
