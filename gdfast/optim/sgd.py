"""torch.optim.SGD with all parameters of a group updated in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as _optimizer
from torch.optim.optimizer import ParamsT

from gdfast import ops
from gdfast.backends import chosen, plans
from gdfast.backends.cuda_grad_weight import BegunGradWeight
from gdfast.backends.sgd import HALF_TYPES, SgdHyper, SgdTensors, again_like
from gdfast.ops.sgd_dispatch import Checked, run_sgd, walk_with
from gdfast.optim.in_backward import InBackward


class SGD(torch.optim.SGD):
    """Stochastic gradient descent: a drop-in for `torch.optim.SGD`, with its arguments and state.

    The update is that of native's default loop, computed in one pass. Half types are computed in
    float32 and rounded once at each store. `foreach` and `fused` are accepted and checked as native
    does, but choose nothing here: there is one implementation for each device.

    `fused_zero_grad` sets the gradients to zero in the same pass, as `zero_grad(set_to_none=False)`
    would after the step: the training loop then leaves `zero_grad` out. It takes effect in skipped
    steps too.

    `master_weights` keeps float32 copies and float32 momentum buffers of float16 and bfloat16
    parameters (Micikevicius et al., "Mixed Precision Training", ICLR 2018). The update starts from
    the copy and ends in it; the parameter, what it rounds to, is written in the same pass. Elements
    of a parameter that are anything else before a step, because weights were loaded, clamped or
    pruned meanwhile, are taken into the copy first, by whatever way they were changed; all others
    keep their lower bits. State_dicts have a "master_weight" beside the "momentum_buffer".
    `torch.optim.SGD` loads them; after one of its own the copies begin as the parameters are.

    `in_backward` updates each parameter during backward, as soon as its gradient is complete, and
    keeps no gradient: `.grad` stays None, and its memory is free before the next one is computed.
    The weights are the same bits as without. Where our CUDA kernels compute the only gradient of a
    convolution's weight, their last pass does the update, and no gradient is stored at all; half
    types, and float32 under autocast, are then updated by gradients that were never rounded to the
    half type. `step` updates what has a gradient nevertheless and ends the step: it must follow
    each backward, and hyperparameters change after it. Refused with RuntimeError are a second
    backward before `step`, `zero_grad` between the two, create_graph, other post-accumulate-grad
    hooks on a parameter, DistributedDataParallel, several processes and GradScaler, which `step`
    alone sees: then weights have changed by scaled gradients. What reads or changes `.grad` between
    backward and step by hand can't be seen, and does nothing: clipping by norm, above all. Hooks of
    `Tensor.register_hook` work.

    `torch.amp.GradScaler` needs no pass of its own: the step divides gradients by the scale, and
    they stay so, as native's fused step leaves them. Where it found an infinity, nothing changes.

    With `differentiable` the update goes through autograd, by `gdfast.ops.sgd`.

    Raises as `torch.optim.SGD` does: ValueError for hyperparameters out of range, RuntimeError for
    clashing flags and, in `step`, for sparse gradients. With `in_backward` ValueError for a
    parameter that is listed twice.
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
        master_weights: bool = False,
        in_backward: bool = False,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize,
            foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        # Not in the groups: these go with the training loop, which a state_dict from elsewhere must
        # not change.
        self.fused_zero_grad = fused_zero_grad
        self.master_weights = master_weights
        self.in_backward = in_backward
        for name in ("fused_zero_grad", "master_weights", "in_backward"):
            if getattr(self, name) and differentiable:
                raise RuntimeError(f"`{name}` does not support `differentiable`")
        self._set_up()

    def _set_up(self) -> None:
        """What is made anew wherever the optimizer comes from, and after a state is loaded."""
        self._checked: dict[tuple[int, bool], Checked] = {}
        self._again: dict[int, tuple[str, Any]] = {}  # by group: the backend, and its update
        self._step_supports_amp_scaling = not self.defaults["differentiable"]
        if self.in_backward:
            if "_backward" not in vars(self):
                self._backward = InBackward(self._update_in_backward, self._finish_in_backward)
            self._backward.watch(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        own = ("fused_zero_grad", "master_weights", "in_backward")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_up()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with hyperparameters of its own where it has some."""
        super().add_param_group(param_group)
        if "_backward" in vars(self):  # not yet in torch's own constructor
            self._backward.watch(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this optimizer or of `torch.optim.SGD`."""
        if not self.master_weights:
            super().load_state_dict(state_dict)
            return
        # Behind all other hooks before loading, which may replace the state_dict, and in front of
        # those after it, which may look at the state.
        given: list[dict[str, Any]] = []
        before = self.register_load_state_dict_pre_hook(lambda _, final: given.append(final))
        after = self.register_load_state_dict_post_hook(
            lambda _: self._load_float32(given[0]), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _load_float32(self, state_dict: dict[str, Any]) -> None:
        """Loads again what torch has rounded to the dtype of a parameter of a half type."""
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, p in zip(indices, params, strict=True):
            if p.dtype in HALF_TYPES:
                for name, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][name] = value.to(p.device, torch.float32, copy=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradients to None, or to zero."""
        if self.in_backward:
            self._backward.refuse_unfinished()
        if not set_to_none or _is_watched():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        `closure` reevaluates the model and returns the loss, which is returned.
        """
        # Around a subclass's own step torch puts it.
        if type(self).step is SGD.step and self._is_observed():
            return _hooked_step(self) if closure is None else _hooked_step(self, closure)
        return self._step(closure)

    # What torch would put around it takes longer than an update of a small model.
    step.hooked = True  # type: ignore[attr-defined]

    def _patch_step_function(self) -> None:
        # functools.wraps hands `hooked` on to a subclass's own step, which nothing is around yet.
        own: Any = type(self).step
        if getattr(own, "__wrapped__", None) is SGD.step:
            own.hooked = False
        super()._patch_step_function()

    def _is_observed(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _optimizer._global_optimizer_pre_hooks
            or _optimizer._global_optimizer_post_hooks
            or _is_watched()
        )

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.in_backward:
            scaled = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
            self._backward.finish(self.param_groups, any(x is not None for x in scaled))
        for index, group in enumerate(self.param_groups):
            if self.defaults["differentiable"]:
                self._step_differentiable(group)
            else:
                self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        if self._update_again(index, group):
            return
        params, grads = group["params"], [p.grad for p in group["params"]]
        if type(None) in map(type, grads):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        self._update(index, group, params, grads)

    def _update_again(self, index: int, group: dict[str, Any]) -> bool:
        """Updates a group as in the last step, if all is as it was."""
        if index not in self._again or not plans.enabled or torch.compiler.is_compiling():
            return False
        (backend, again), lr = self._again[index], group["lr"]
        own = vars(self)
        if (
            backend != chosen()
            or self.master_weights
            or not isinstance(group["params"], list)
            or not isinstance(self.state, dict)
            or not isinstance(lr, float)
            or own.get("grad_scale") is not None
            or own.get("found_inf") is not None
        ):
            return False
        done: bool = again(
            group["params"], self.state, lr, group["momentum"], group["dampening"],
            group["weight_decay"], group["nesterov"], group["maximize"], self.fused_zero_grad,
        )  # fmt: skip
        if not done:
            del self._again[index]
        return done

    def _update_in_backward(self, index: int, param: Tensor, grad: Tensor) -> None:
        with torch.no_grad():
            self._update(id(param), self.param_groups[index], [param], [grad])

    def _update(
        self, key: int, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> None:
        """Updates parameters of a group; `key` finds again what was checked of them before."""
        if group["fused"] and not all(map(torch.is_floating_point, params)):
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors")
        hyper = self._hyper(group)
        tensors = SgdTensors(params, grads, [], [])
        if self.master_weights:
            is_half = [p.dtype in HALF_TYPES for p in params]
            half = tensors.only(is_half)
            self._run(key, half._replace(masters=list(map(self._master, half.params))), hyper)
            tensors = tensors.only([not each for each in is_half])
        self._run(key, tensors, hyper)

    def _hyper(self, group: dict[str, Any]) -> SgdHyper:
        return SgdHyper(
            group["lr"], group["momentum"], group["dampening"], float(group["weight_decay"]),
            group["nesterov"], group["maximize"], False, self.fused_zero_grad,
            getattr(self, "grad_scale", None), getattr(self, "found_inf", None),
        )  # fmt: skip

    def _finish_in_backward(self, index: int, param: Tensor, begun: BegunGradWeight) -> bool:
        """Updates a weight in the last pass of its gradient, or returns False if it can't be."""
        hyper = self._hyper(self.param_groups[index])
        if hyper.grad_scale is not None or hyper.found_inf is not None:
            return False
        with torch.no_grad():
            is_half = self.master_weights and param.dtype in HALF_TYPES
            masters = [self._master(param)] if is_half else []
            momenta = []
            if hyper.momentum:
                buffer = self.state[param].get("momentum_buffer")
                hyper = hyper._replace(first_step=buffer is None)
                if buffer is None:
                    buffer = torch.empty_like((masters or [param])[0], requires_grad=False)
                momenta = [buffer]
            tensors = SgdTensors([param], [], momenta, masters)
            if not walk_with(begun.strides, tensors):
                return False
            begun.update(tensors, hyper)
        if momenta:
            (self.state[param]["momentum_buffer"],) = momenta
        return True

    def _master(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "master_weight" not in state:
            state["master_weight"] = param.detach().float()
        master: Tensor = state["master_weight"]
        return master

    def _run(self, key: int, tensors: SgdTensors, hyper: SgdHyper) -> None:
        if hyper.momentum:
            buffers = [self.state[p].get("momentum_buffer") for p in tensors.params]
            tensors = tensors._replace(momenta=buffers)
            if type(None) in map(type, buffers):
                self._first_step(tensors, hyper)
                return
        place = key, len(tensors.masters) > 0  # which torch.compile traces, unlike bool(list)
        before = self._checked.pop(place, None)
        checked = run_sgd(tensors, hyper, checked=before)
        if checked is not None:
            self._checked[place] = checked
            if checked is before and key < len(self.param_groups):
                self._note(key, checked, tensors)

    def _note(self, index: int, checked: Checked, tensors: SgdTensors) -> None:
        """Notes an update of a whole group for the next step."""
        all_params = self.param_groups[index]["params"]
        if self.master_weights or len(tensors.params) != len(all_params):
            return
        again = again_like(checked.run, tensors, checked.memory)
        if again is not None:
            self._again[index] = checked.backend, again

    def _first_step(self, tensors: SgdTensors, hyper: SgdHyper) -> None:
        """Updates parameters of which some have no momentum buffer yet."""
        run_sgd(tensors.only([buffer is not None for buffer in tensors.momenta]), hyper)
        tensors = tensors.only([buffer is None for buffer in tensors.momenta])
        if hyper.found_inf is not None and hyper.found_inf.item():
            # Nothing is updated, so that no buffer may come into being.
            run_sgd(tensors._replace(momenta=[]), hyper._replace(momentum=0.0))
            return
        like = tensors.masters or tensors.params
        buffers = [torch.empty_like(p, requires_grad=False) for p in like]
        run_sgd(tensors._replace(momenta=buffers), hyper._replace(first_step=True))
        for p, buffer in zip(tensors.params, buffers, strict=True):
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


_hooked_step = torch.optim.Optimizer.profile_hook_step(SGD._step)


def _is_watched() -> bool:
    """Whether a profiler or a compiler looks at what runs."""
    return torch.compiler.is_compiling() or torch.autograd._profiler_enabled()
