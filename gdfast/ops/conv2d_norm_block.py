"""A residual block of convolutions with their norms as one node of autograd's graph.

Its kernels are those of the block's units (`conv2d_norm_act`), one call of a plan each way. Where
the block's input goes two ways its gradient is a sum: the kernel of the first convolution adds to
what came by the shortcut, which else takes three passes over memory. Only blocks of which all units
have run both ways become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from gdfast.backends import cpu_conv2d_norm, plans
from gdfast.backends.plans import NONE, Draft, draft_of
from gdfast.ops import conv2d_dispatch, in_backward
from gdfast.ops.batch_norm import batch_norm_act
from gdfast.ops.conv2d_autograd import conv
from gdfast.ops.conv2d_norm_act import Unit
from gdfast.ops.ordinary import apply_to_ordinary, unwatched_facts
from gdfast.ops.planned import backward_memo, run_again, situation

# What a unit takes: the convolution's weight, and weight, bias, running mean, running variance and
# the counter of batches of the norm.
_PER_UNIT = 6
_NEEDS = True, True, True, False, False, False  # gradients
_SAVED_PER_UNIT = 7  # the first three of them; what it made: convolved, mean, invstd and output


class Block:
    """activation(norm(conv(... activation(norm(conv(input))) ...)) + shortcut) by units, of which
    the first is the shortcut's with `has_shortcut`; else the shortcut is the input itself.
    """

    def __init__(self, units: tuple[Unit, ...], has_shortcut: bool) -> None:
        self._units, self._has_shortcut = units, has_shortcut
        self._backend = units[0].arguments[-1]
        self._situation = situation(self._backend)
        self._place = plans.place(torch.device("cpu"), False)
        self._forward: Any = None
        self._backward: Any = None
        self._memo: Any = None
        self._facts: Any = None  # of the output's gradient and what is saved
        self._needs = True, *_NEEDS * len(units), False, False

    def prepare(self, tensors: tuple[Any, ...]) -> bool:
        """Drafts both plans for tensors like these; False where they cannot be."""
        passes = [self._known(i) for i in range(len(self._units))]
        if any(unit.situation != self._situation for unit in self._units) or None in passes:
            return False
        self._forward = self._forward_plan(tensors)
        self._backward = self._forward and self._backward_plan(passes)
        return self._backward is not None

    def _known(self, place: int) -> Any:
        """The kernels of a unit's gradients."""
        is_last = place == len(self._units) - 1
        needs = True, True, False, True, True, False, False, is_last
        for known in self._units[place]._backward.values():
            if known.needs[:8] == needs and not known.how[1]:
                return known
        return None

    def _source(self, place: int) -> int:
        """The unit whose output another one takes, or -1 for the block's input."""
        return place - 1 if place > self._has_shortcut else -1

    def _forward_plan(self, tensors: tuple[Any, ...]) -> Any:
        draft = Draft(len(tensors))
        numbers = [NONE if tensor is None else i for i, tensor in enumerate(tensors)]
        outputs: list[int] = []
        made: list[int] = []
        for place, unit in enumerate(self._units):
            draft_conv, draft_norm = draft_of(unit.conv), draft_of(unit.norm_kernel)
            if draft_conv is None or draft_norm is None or plans.is_on_gpu(unit.norm_kernel):
                return None
            weight, *of_norm, batches = numbers[1 + place * _PER_UNIT :][:_PER_UNIT]
            source = self._source(place)
            between = draft_conv(draft, outputs[source] if source >= 0 else 0, weight, NONE)
            residual = NONE
            if place == len(self._units) - 1:
                residual = outputs[0] if self._has_shortcut else 0
            output, mean, invstd = draft_norm(draft, between, *of_norm, residual, batches)
            if launch := cpu_conv2d_norm.forward_launch(unit.conv, unit.norm_kernel):
                draft.join(2, launch)
            outputs.append(output)
            made += [between, mean, invstd, output]
        written = [
            number
            for i, number in enumerate(numbers[1:])
            if i % _PER_UNIT in (3, 4, 5) and number != NONE
        ]
        return draft.plan(made, written)

    def _backward_plan(self, passes: Sequence[Any]) -> Any:
        """Of the output's gradient and what is saved: gives the input's gradient, what is to be
        added to it, and the gradients of the units' weights and norms."""
        count, launch = len(self._units), cpu_conv2d_norm.backward_launch
        draft = Draft(2 + _SAVED_PER_UNIT * count)
        saved = [
            range(2 + _SAVED_PER_UNIT * i, 2 + _SAVED_PER_UNIT * (i + 1)) for i in range(count)
        ]
        grads: dict[int, Sequence[int]] = {}
        grad, of_shortcut, onto = 0, NONE, NONE  # the first is of the output
        order = [*range(count - 1, self._has_shortcut, -1), *range(self._has_shortcut + 1)]
        for place in order:
            known, source, is_last = passes[place], self._source(place), place == count - 1
            of_norm, of_input, of_weight = map(draft_of, known[:3])
            if of_norm is None or of_input is None or of_weight is None:
                return None
            weight, scale, shift, between, mean, invstd, output = saved[place]
            residual = saved[0][-1] if self._has_shortcut else 1
            other = {"input": NONE, "output": output, "residual": residual}[known.how[0]]
            image = saved[source][-1] if source >= 0 else 1
            given = of_shortcut if self._has_shortcut and place == 0 else grad
            if source < 0 and place == self._has_shortcut and of_shortcut > 0 and known[1].adds:
                onto = of_shortcut
            joined = launch(known.norm, known.conv_input, known.conv_weight, onto != NONE)
            wanted = joined is None, True, True, is_last
            of_image, *of_params, of_residual = of_norm(
                draft, given, between, scale, shift, other, mean, invstd, wanted=wanted
            )
            of_source = of_input(draft, of_image, weight, *([onto] if onto != NONE else []))
            of_kernel, _ = of_weight(draft, of_image, image, False)
            if joined is not None:
                draft.join(3, joined)
            grads[place] = of_kernel, *of_params
            if is_last:
                of_shortcut, grad = of_residual, of_source
            elif self._has_shortcut and place == 0:
                of_shortcut = of_source
            else:
                grad = of_source
        rest = NONE if onto != NONE else of_shortcut
        return draft.plan([grad, rest, *(n for place in range(count) for n in grads[place])])

    def run(self, tensors: tuple[Any, ...], momentum: float) -> Tensor | None:
        """The output, or None, with nothing done, where the units have to run by themselves.

        All is as it was when the block was prepared.
        """
        results: Any = self._forward(tensors, momentum, *self._place())
        if results is None:
            return None
        output: Tensor = _apply_to_ordinary(*tensors, results, self)
        return output

    def saved(self, tensors: Sequence[Any], made: Sequence[Any]) -> list[Any]:
        """What backward reads beside the output's gradient."""
        saved = [tensors[0]]
        for place in range(len(self._units)):
            saved += tensors[1 + place * _PER_UNIT :][:3]
            saved += made[place * 4 :][:4]
        if self._facts is None:
            self._facts = unwatched_facts(made[-1], *saved)
        return saved

    def gradients(
        self, ctx: Any, grad_output: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs of the function."""
        needs = ctx.needs_input_grad
        if needs != self._needs or torch.is_grad_enabled() or type(grad_output) is not Tensor:
            return self._by_operations(needs, grad_output, saved)
        output = saved[-1]
        if grad_output.stride() != output.stride():
            grad_output = torch.empty_like(output).copy_(grad_output)
        if self._memo is None and isinstance(self._facts, bytes):
            if situation(self._backend) != self._situation or in_backward.targets:
                return self._by_operations(needs, grad_output, saved)
            self._memo = backward_memo(self._facts, 1 + len(saved), output.device)
        results = run_again(self._backward, self._memo, (grad_output, *saved), self._place)
        if results is None:
            return self._by_operations(needs, grad_output, saved)
        grad, rest, *grads = results
        if rest is not None:
            grad.add_(rest)
        of_units = ((*grads[i : i + 3], None, None, None) for i in range(0, len(grads), 3))
        return grad, *(each for unit in of_units for each in unit), None, None

    def _by_operations(
        self, needs: tuple[bool, ...], grad_output: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        """The same through the block's operations once more, differentiable again."""
        inputs: list[Tensor | None] = [saved[0]]
        outputs: list[Tensor] = []
        with torch.enable_grad():
            for place, unit in enumerate(self._units):
                weight, scale, shift = saved[1 + place * _SAVED_PER_UNIT :][:3]
                source, residual = self._source(place), None
                if place == len(self._units) - 1:
                    residual = outputs[0] if self._has_shortcut else saved[0]
                of_source = outputs[source] if source >= 0 else saved[0]
                between = conv(of_source, weight, None, *unit.arguments)
                _, eps, activation, slope = unit.norm
                outputs.append(batch_norm_act(
                    between, scale, shift, None, None, residual, training=True, eps=eps,
                    activation=activation, negative_slope=slope, backend=unit.arguments[-1],
                ))  # fmt: skip
                inputs += [weight, scale, shift, None, None, None]
        wanted: Any = list(compress(inputs, needs))
        grads = iter(torch.autograd.grad(
            outputs[-1], wanted, grad_output, create_graph=torch.is_grad_enabled()
        ))  # fmt: skip
        return *(next(grads) if need else None for need in needs[:-2]), None, None


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, made, block = inputs
        ctx.block = block
        ctx.save_for_backward(*block.saved(tensors, made))
        ctx.set_materialize_grads(False)
        output: Tensor = made[-1]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # once: checkpointing allows no second time
        gradients: tuple[Tensor | None, ...] = ctx.block.gradients(ctx, grad_output, saved)
        return gradients


_apply_to_ordinary = apply_to_ordinary(_BlockFunction)
_blocks: dict[tuple[bool, tuple[Unit, ...]], Any] = {}  # False where there is none


def block(
    units: tuple[Unit, ...], has_shortcut: bool, tensors: tuple[Any, ...], needs: tuple[bool, ...]
) -> Block | None:
    """The block of units on tensors like these, of which gradients are needed so, or None where
    they run by themselves."""
    if needs != (True, *_NEEDS * len(units)) or any(not unit.norm[0] for unit in units):
        return None
    key = has_shortcut, units
    found: Any = _blocks.get(key)
    if found is None:
        # Where a unit has not run both ways yet it may later.
        if not all(unit._backward for unit in units):
            return None
        if len(_blocks) >= conv2d_dispatch.KERNELS_LIMIT:
            _blocks.clear()
        made = Block(units, has_shortcut)
        found = _blocks[key] = made if made.prepare(tensors) else False
    return found or None
