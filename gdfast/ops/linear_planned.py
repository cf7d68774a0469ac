"""`linear` on our kernels as a plan each way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast import native
from gdfast.backends import chosen, tuning_check
from gdfast.backends import linear as kernels
from gdfast.backends.cuda_linear import Layer
from gdfast.backends.plans import Plan
from gdfast.backends.registry import AUTO
from gdfast.ops.conv2d import autocast
from gdfast.ops.linear import differentiable_gradients, gradients, is_ours, saved
from gdfast.ops.planned import Cast, Gradients, Planned, keep, lookup

Tensors = tuple[Any, ...]


class _OnCpu(Planned):
    def __init__(self, forward: Plan, input: Tensor) -> None:
        super().__init__(forward, input.device)
        self._columns = input.shape[1]

    def kernels(self, *tensors: Any) -> Tensors:
        return (kernels.linear(*tensors),)

    def saved(self, needs: Any, tensors: Any, made: Any) -> Tensors:
        return saved(needs, *tensors[:2])

    def operations(self, ctx: Any, grad_output: Tensor, saved: Tensors) -> Gradients:
        return gradients(ctx.needs_input_grad, self._columns, grad_output, saved)

    def backward_plan(self, needs: Any, grad_output: Tensor, saved: Any) -> Plan | None:
        return kernels.backward_plan(grad_output, *saved, self._columns, needs)


class _OnGpu(Planned):
    """Without a plan by native's operators. The weight may be one that autocast would cast."""

    keeps_weight = True

    def __init__(self, forward: Plan, layer: Layer) -> None:
        super().__init__(forward, layer.device, on_gpu=True)
        self._layer = layer

    def cast(self, tensors: Tensors) -> Tensors:
        return autocast(tensors[0], None, None)[0], *tensors[1:]

    def kernels(self, *tensors: Any) -> Tensors:
        dtype = self._layer.dtype
        input, *params = tensors
        weight, bias = (None if each is None else each.to(dtype) for each in params)
        with torch._C._DisableAutocast():
            return F.linear(input, weight, bias), weight if self._layer.casts else None

    def saved(self, needs: Any, tensors: Any, made: Any) -> Tensors:
        input, weight, *_ = tensors
        return saved(needs, input, weight if made[0] is None else made[0])

    def operations(self, ctx: Any, grad_output: Tensor, saved: Tensors) -> Gradients:
        input, weight = saved
        if self._layer.casts and weight is not None and torch.is_grad_enabled():
            weight = Cast.apply(ctx.weight, weight, weight.dtype)
        return differentiable_gradients(ctx.needs_input_grad, grad_output, (input, weight))

    def backward_plan(self, needs: Any, grad_output: Tensor, saved: Any) -> Plan | None:
        plan = self._layer.backward(needs) if grad_output.is_contiguous() else None
        if plan is None or self.backend != AUTO:
            return plan
        give = self._gradients_of(plan)

        def natively(*tensors: Any) -> Gradients:
            return differentiable_gradients(needs, tensors[0], tensors[1:])

        return plan if _agree("linear_backward", give, natively, (grad_output, *saved)) else None

    def _gradients_of(self, plan: Plan) -> Any:
        def call(*tensors: Any) -> Gradients:
            results = plan(tensors, 0.0, *self._place())
            if results is None:
                raise RuntimeError("addresses are not aligned")
            return results[:3]

        return call


def _agree(op: str, call: Any, natively: Any, arguments: Tensors) -> bool:
    """Whether a plan gives what native's operators give: unseen, none is preferred to those."""
    return bool(tuning_check.agreeing(op, {"cuda": call}, natively, natively, arguments, False))


def planned_linear(tensors: Tensors) -> tuple[Planned, Tensors] | None:
    """What runs `linear` on input, weight and bias, and the tensors to call it with; None where
    the function does."""
    if torch._C._is_any_autocast_enabled():
        if not isinstance(tensors[0], Tensor) or tensors[0].device.type == "meta":
            return None
        input, _, _ = autocast(tensors[0], None, None)
        tensors = input, *tensors[1:]
    key, found = lookup("linear", tensors, *_autocast(tensors[0]))
    if found is None and key is not None:
        found = _find(key, tensors)
    return (found, tensors) if found else None


def _autocast(input: Any) -> tuple[Any, ...]:
    """The type that autocast computes in, if it does."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    kind = input.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,)


def _find(key: Any, tensors: Tensors) -> Planned | None:
    if is_ours(*tensors):
        forward = kernels.plan(*tensors)
        return keep(key, forward and _OnCpu(forward, tensors[0]))
    layer = _layer(tensors)
    if layer is None or not layer.fits():
        return keep(key, None)
    if layer.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # nothing could be compared: the next call may
    forward = layer.forward(tensors[2] is not None)
    if forward is None:
        return keep(key, None)
    planned = _OnGpu(forward, layer)
    if planned.backend == AUTO:

        def call(*given: Any) -> Tensor:
            output: Tensor = planned.planned(given)[0]
            return output

        def natively(*given: Any) -> Tensor:
            output: Tensor = planned.kernels(*given)[0]
            return output

        with torch.no_grad():
            if not _agree("linear", call, natively, tensors):
                return keep(key, None)
    return keep(key, planned)


def _layer(tensors: Tensors) -> Layer | None:
    """The layer that CUDA kernels may run."""
    input, weight, bias = tensors
    if chosen() != "cuda" and (chosen() != AUTO or not input.is_cuda):
        return None
    if not input.is_cuda and not native.cuda_is_simulated:
        return None
    params = [weight] if bias is None else [weight, bias]
    if input.dim() != 2 or weight.dim() != 2 or input.shape[1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    if any(each.dtype != weight.dtype or each.device != input.device for each in params):
        return None
    if not all(each.is_contiguous() for each in (input, *params)):
        return None
    casts = weight.dtype != input.dtype
    if casts and (weight.dtype != torch.float32 or _autocast(input) != (input.dtype,)):
        return None
    if not casts and _autocast(input) not in ((), (None,), (input.dtype,)):
        return None
    (N, C), K = input.shape, weight.shape[0]
    return Layer(N, C, K, input.dtype, input.device, casts)
