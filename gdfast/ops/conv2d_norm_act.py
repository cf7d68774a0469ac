"""A convolution and the batch normalisation behind it as one node of autograd's graph.

They are `conv2d` (or `conv2d_moments`) and `batch_norm_act`, and their kernels run as those would
run them. But what stands before the kernels, in Python, takes as long as they do where images are
small or the GPU is fast: here it is gone through once for both, and looked up in later calls. Only
what both operations have run before is known, so that checks, errors and choices are theirs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdfast.backends import chosen, plans
from gdfast.backends.batch_norm import CudaForward
from gdfast.backends.cuda_conv2d import Kernel
from gdfast.backends.registry import AUTO, REFERENCE
from gdfast.backends.sgd import HALF_TYPES
from gdfast.ops import batch_norm_dispatch, conv2d_dispatch, in_backward
from gdfast.ops.batch_norm import count_batch, norm_gradients
from gdfast.ops.batch_norm_dispatch import pre_activation
from gdfast.ops.casts import autocast
from gdfast.ops.conv2d import settings
from gdfast.ops.conv2d_autograd import conv_gradients, layer_key, note_sizes
from gdfast.ops.conv2d_moments import OP as MOMENTS
from gdfast.ops.conv2d_moments import may_have_moments
from gdfast.ops.conv2d_norm_act_plans import backward_plan, forward_plan
from gdfast.ops.ordinary import apply_to_ordinary, unwatched_facts
from gdfast.ops.planned import backward_memo, run_again, situation

# input, weight and bias of the convolution; weight, bias, running mean and running variance of the
# norm; residual; and the counter of batches, where the norm has one that is to be raised
Tensors = tuple[Any, ...]
_SAVED = 8  # tensors for the backward pass
# Layouts and subsets of gradients that one unit meets.
_MOST_BACKWARD = 64


class Unit:
    """A convolution and a norm on tensors of certain sizes: their kernels.

    Those of the norm, and of the backward pass, are found when they first run.
    """

    def __init__(
        self, conv: Any, has_moments: bool, arguments: tuple[Any, ...], norm: tuple[Any, ...],
        source: str, situation: Any,
    ) -> None:  # fmt: skip
        self.arguments, self.norm, self.situation = arguments, norm, situation
        self.conv, self._has_moments = conv, has_moments
        # Where backward finds the activation's argument, but for a mask in its place.
        self.source = source
        self.norm_kernel: Any = None
        self._is_cuda = False
        self._plan: plans.Plan | None = None
        # The same for a weight in float32, which autocast would make what images are.
        self._wide_plan: plans.Plan | None = None
        self._weight_strides: tuple[int, ...] = ()
        self._place: Any = None
        # By pre_activation, which gradients of the convolution are asked for, and the facts of the
        # tensors: what was saved may come back in another layout, from hooks that pack it.
        self._backward: dict[tuple[Any, ...], _Backward] = {}
        self._last: _Backward | None = None  # noted, when it came for the second time in a row
        self._before: _Backward | None = None

    def cast(self, tensors: Tensors) -> Tensors:
        """What autocast makes of the tensors, but for a weight that the plan casts."""
        input, weight, bias, *rest = tensors
        if self.is_wide(weight):
            input, _, bias = autocast(input, None, bias)
            return input, weight, bias, *rest
        return *autocast(input, weight, bias), *rest

    def run(self, tensors: Tensors, momentum: float) -> Tensor:
        """activation(norm(conv(input)) + residual), with the running statistics updated."""
        if torch.is_grad_enabled():
            output: Tensor = _apply_to_ordinary(*tensors, self, momentum)
            return output
        return self.forward(tensors, momentum, False)[0]

    def forward(
        self, tensors: Tensors, momentum: float, wants_mask: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gives output, the convolution's output, mean, invstd, the mask if there is one, and the
        weight where it was cast.

        All tensors are as those that the unit was found for, or the weight is one that `is_wide`.
        """
        wide = tensors[1].dtype != tensors[0].dtype
        plan = self._wide_plan if wide else self._plan
        if plan is not None and plans.enabled:
            results: Any = plan(tensors, momentum, *self._place())
            if results is not None:
                return results
        input, weight, bias, *others, batches = tensors
        if wide:
            weight = weight.to(input.dtype)
        of_norm, moments, mask = tuple(others), None, None
        if batches is not None:
            count_batch(batches)
        if self._has_moments:
            between, moments = self.conv.with_moments(input, weight, bias)
        else:
            between = self.conv(input, weight, bias)
        if self.norm_kernel is None:
            find: Any = batch_norm_dispatch.forward_kernel
            settings = *self.norm, self.arguments[-1], moments is not None
            self.norm_kernel = find(between, *of_norm, *settings)
            self._is_cuda = isinstance(self.norm_kernel, CudaForward)
            self._place = plans.place(between.device, self._is_cuda)
            make = partial(
                forward_plan, self.conv, self.norm_kernel, tensors, between, training=self.norm[0],
                has_moments=moments is not None, wants_mask=wants_mask,
            )  # fmt: skip
            self._plan = make()
            self._weight_strides = weight.stride()
            layouts = torch.contiguous_format, torch.channels_last
            dense = any(weight.is_contiguous(memory_format=layout) for layout in layouts)
            if self._plan is not None and self._is_cuda and dense and input.dtype in HALF_TYPES:
                self._wide_plan = make(casts=True)
        if self._is_cuda:
            if wants_mask:
                mask = self.norm_kernel.new_mask(between, of_norm[-1])
            results = self.norm_kernel(between, *of_norm, momentum, moments, mask)
        else:
            results = self.norm_kernel(between, *of_norm, momentum)
        output, mean, invstd = results
        return output, between, mean, invstd, mask, weight if wide else None

    def is_wide(self, weight: Tensor) -> bool:
        """Whether a weight may be given as it is, to be cast by the plan, as autocast would."""
        is_like = weight.dtype == torch.float32 and weight.stride() == self._weight_strides
        return self._wide_plan is not None and is_like

    def gradients(
        self, ctx: Any, grad_output: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of input, weight and bias, and of the norm's weight, bias and residual."""
        needs, last, how = ctx.needs_input_grad, self._last, (ctx.source, ctx.is_wide)
        if last is not None and last.needs == needs and last.how == how:
            results = run_again(last.plan, last.memo, (grad_output, *saved), self._place)
            if results is not None:
                return results
        facts = unwatched_facts(grad_output, *saved)
        found = self._backward.get((how, needs, facts))
        if (
            found is None
            or facts is None
            or self.situation != situation(self.arguments[-1])
            or in_backward.targets
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return self._learn_gradients(ctx, grad_output, saved, facts)
        if found.plan is not None and plans.enabled:
            if found is self._before:
                self._last = found.noted(facts, grad_output.device)
            self._before = found
            results = found.plan((grad_output, *saved), 0.0, *self._place())
            if results is not None:
                return results
        norm, conv_input, conv_weight, *_ = found
        input, weight, between, *of_norm = saved
        wanted = True, needs[3], needs[4], needs[7]
        grad, *of_norm = norm(grad_output, between, *of_norm, wanted)
        grad_input = conv_input(grad, weight) if needs[0] else None
        grad_weight, grad_bias = conv_weight(grad, input, needs[2])
        return grad_input, grad_weight, grad_bias, *of_norm

    def _learn_gradients(
        self, ctx: Any, grad_output: Tensor, saved: tuple[Any, ...], facts: Any
    ) -> tuple[Tensor | None, ...]:
        """The same by the operations, and what kernels they run."""
        input, weight, between, *of_norm = saved
        needs = ctx.needs_input_grad
        own_weight = ctx.weight if weight is None else weight
        if ctx.is_wide and torch.is_grad_enabled():
            own_weight = _Cast.apply(ctx.weight, weight, input.dtype)
            weight = None if weight is None else own_weight
        if torch.is_grad_enabled():
            between = _Known.apply(input, own_weight, ctx.bias, between, self)
        ctx.arguments = list(self.arguments)
        note_sizes(ctx, input, own_weight)
        settings = *self.norm, ctx.source, self.arguments[-1]
        wanted = True, needs[3], needs[4], needs[7]
        results: Any = norm_gradients(grad_output, between, *of_norm, wanted, settings=settings)
        grad, *rest = results
        gradients = conv_gradients(ctx, grad, input, weight)
        if (
            needs[1]
            and facts is not None
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
            and unwatched_facts(grad) is not None
        ):
            self._find_kernels(ctx, grad_output, grad, saved, facts)
        return *gradients, *rest

    def _find_kernels(
        self, ctx: Any, grad_output: Tensor, grad: Tensor, saved: tuple[Any, ...], facts: Any
    ) -> None:
        """Notes the kernels that the operations ran; grad is that of the convolution's output."""
        if self.situation != situation(self.arguments[-1]):
            return
        input, weight, between, norm_weight, norm_bias, *_ = saved
        arguments, needs = self.arguments, ctx.needs_input_grad
        arguments = *arguments[:-1], chosen(arguments[-1])
        dispatch, conv_input = conv2d_dispatch, None
        conv_weight = dispatch.known_kernel(
            dispatch.conv2d_grad_weight_key(
                grad, input, ctx.weight_size, ctx.weight_channels_last, needs[2], *arguments
            )
        )
        if needs[0]:
            conv_input = dispatch.known_kernel(
                dispatch.conv2d_grad_input_key(
                    grad, weight, ctx.input_size, ctx.input_channels_last, *arguments
                )
            )
        if conv_weight is None or (needs[0] and conv_input is None):
            return  # in a recording
        settings = *self.norm, ctx.source, arguments[-1]
        norm = batch_norm_dispatch.backward_kernel(between, norm_weight, norm_bias, *settings)
        if len(self._backward) >= _MOST_BACKWARD:
            self._backward.clear()
        like = ctx.weight if ctx.is_wide else None
        plan = backward_plan(norm, conv_input, conv_weight, grad_output, saved, needs, like)
        how = ctx.source, ctx.is_wide
        found = _Backward(norm, conv_input, conv_weight, plan, how, needs)
        self._backward[how, needs, facts] = found


class _Backward(NamedTuple):
    """The kernels of a backward pass, and a plan of all of them, if there is one."""

    norm: Any
    conv_input: Any
    conv_weight: Any
    plan: plans.Plan | None
    how: tuple[str, bool]  # source, and whether the weight's gradient is made float32
    needs: tuple[bool, ...]
    memo: Any = None  # of a call of the plan

    def noted(self, facts: bytes, device: torch.device) -> _Backward | None:
        """The same with a memo of a call now, on tensors with these facts."""
        if not isinstance(facts, bytes):
            return None
        return self._replace(memo=backward_memo(facts, _SAVED + 1, device))


def unit(
    tensors: Tensors, geometry: tuple[Any, ...], norm: tuple[Any, ...], takes_moments: bool
) -> tuple[Unit, Tensors] | None:
    """What runs a convolution with the norm behind it, and the tensors to call it with; or None,
    where the two operations do.

    `geometry` is stride, padding, dilation and groups, `norm` training, eps, activation and
    negative_slope; `takes_moments` tells whether `conv2d_moments` is the convolution.
    """
    input, weight, bias, *rest = tensors
    if input is None or weight is None:
        return None
    if torch._C._is_any_autocast_enabled():
        if unwatched_facts(*tensors) is None:
            return None
        input, weight, bias = autocast(input, weight, bias)
        tensors = input, weight, bias, *rest
    facts = unwatched_facts(*tensors)
    if facts is None:
        return None
    grads = None
    if torch.is_grad_enabled():
        if not weight.requires_grad:
            return None  # what its gradients need might not be kept
        grads = input.requires_grad, bias is not None and bias.requires_grad
    backend = chosen()
    key = facts, *geometry, *norm, takes_moments, grads, situation(backend)
    try:
        found = conv2d_dispatch.units.get(key)
    except TypeError:  # lists for stride and so on, which the two operations take
        return None
    if found is None:
        found = _find(key, tensors, geometry, norm, takes_moments, backend)
    return (found, tensors) if found else None


def _find(
    key: tuple[Any, ...], tensors: Tensors, geometry: tuple[Any, ...], norm: tuple[Any, ...],
    takes_moments: bool, backend: str,
) -> Unit | None:  # fmt: skip
    input, weight, bias, *_, residual, _ = tensors
    if input.dim() != 4 or 0 in input.shape or backend == REFERENCE:
        return None
    arguments = *settings("conv2d", weight, *geometry), backend
    query = conv2d_dispatch.conv2d_query("conv2d", input, weight, bias, *arguments[:-1])
    size = query.geometry.output_size
    if residual is not None and (residual.shape != size or residual.dtype != input.dtype):
        return None
    conv_key = conv2d_dispatch.conv2d_key(input, weight, bias, *arguments)
    has_moments = takes_moments and may_have_moments(input, weight, bias, AUTO)
    if has_moments:
        conv_key = MOMENTS, *conv_key
    elif torch.is_grad_enabled() and input.requires_grad and backend == AUTO:
        layer = layer_key(input, weight, bias is not None, arguments)
        # Before its first backward pass nobody knows whether native's own operator is better.
        if conv2d_dispatch.all_native.get(layer) is not False:
            return None
    conv: Any = conv2d_dispatch.known_kernel(conv_key)
    if conv is None:
        return None  # not run yet, or in a recording
    has_moments = has_moments and isinstance(conv, Kernel)
    units = conv2d_dispatch.units
    if len(units) >= conv2d_dispatch.KERNELS_LIMIT:
        units.clear()
    *_, activation, slope = norm
    source = pre_activation(activation, slope, residual)
    found = units[key] = Unit(conv, has_moments, arguments, norm, source, key[-1])
    return found


class _UnitFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, norm_weight, norm_bias, _, _, residual, _, unit, momentum = inputs
        source = unit.source
        output, between, mean, invstd, mask, cast = unit.forward(
            inputs[:9], momentum, source == "output"
        )
        if mask is not None:
            source, other = "mask", mask
        elif source == "input":
            other = None
        else:
            other = residual if source == "residual" else output
        ctx.unit, ctx.source, ctx.is_wide = unit, source, cast is not None
        # For graphs of gradients. Under autocast these may be copies: not for longer than need be.
        ctx.weight, ctx.bias = weight, bias
        if cast is not None:
            weight = cast
        elif ctx.needs_input_grad[0]:
            ctx.weight = None
        # As the two operations save them, in that order: checkpointing compares.
        ctx.save_for_backward(
            input, weight if ctx.needs_input_grad[0] else None,
            between, norm_weight, norm_bias, other, mean, invstd,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 11
        saved = ctx.saved_tensors  # once: checkpointing allows no second time
        *gradients, residual = ctx.unit.gradients(ctx, grad_output, saved)
        return *gradients, None, None, residual, None, None, None


class _Cast(torch.autograd.Function):
    """`apply(weight, cast, dtype)`: a weight that was cast, given beside what it was cast from, for
    a graph of gradients. It is cast where `cast` is None."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        weight, cast, dtype = inputs
        ctx.dtype = weight.dtype
        output: Tensor = weight.to(dtype) if cast is None else cast.detach()
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output.to(ctx.dtype), None, None


class _Known(torch.autograd.Function):
    """A convolution's output, given beside its operands, for a graph of gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, _, output, unit = inputs
        need_input, need_weight, _ = ctx.needs_input_grad[:3]
        ctx.arguments = list(unit.arguments)
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        note_sizes(ctx, input, weight)
        detached: Tensor = output.detach()
        return detached

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *conv_gradients(ctx, grad_output, *ctx.saved_tensors), None, None


_apply_to_ordinary = apply_to_ordinary(_UnitFunction)
