"""Whole training steps: zero_grad, forward, loss, backward, SGD step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from gdfast import GraphedStep
from gdfast.bench import timer
from gdfast.bench.cases import StepCase
from gdfast.bench.sgd import MakeOptimizer, native_variants
from gdfast.bench.workload import LAYOUTS, Check, Workload, relative_error
from gdfast.ops import cross_entropy

_CHECKED_STEPS = 5
_CHECKED_LR = 0.01
# What the losses may stray by, as a multiple of how far native's own two layouts stray from each
# other: rounding grows from step to step, in native's layouts as between native and us.
_LOSS_SPREADS = 10
# Roundings allowed beside that, for where native has none by luck.
_ROUNDINGS = 8
# Native's own error is a matter of luck: it is the largest of both layouts, each from the images as
# they are and with so many other roundings of them.
_OTHER_ROUNDINGS = 2
# A variant that two calls show to be slower than the best by so much need not be timed in full.
_SHORTLIST = 1.15


class Training:
    """A copy of a model in training on one random batch; a call does one step, gives the loss.

    `images` and `labels` are drawn from a fixed seed, on the model's device. After a call each
    parameter's `grad` is that of the step. With `recorded`, a `GraphedStep` takes the steps, with
    our loss.
    """

    def __init__(
        self,
        case: StepCase,
        model: Module,
        make_optimizer: MakeOptimizer,
        layout: str = "NCHW",
        dtype: torch.dtype = torch.float32,
        *,
        lr: float = 1e-4,  # so small that thousands of timed steps leave the values ordinary
        compiled: bool = False,
        recorded: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(case.N, case.C, case.H, case.W, generator=generator)
        labels = torch.randint(case.classes, (case.N,), generator=generator)
        device = next(model.parameters()).device
        self.labels = labels.to(device)
        self.images = images.to(device, dtype).to(memory_format=LAYOUTS[layout])
        model = copy.deepcopy(model).to(dtype)
        self.model = model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.model.parameters(), lr=lr, momentum=0.9)
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.model) if compiled else self.model
        )
        self._recorded = None
        if recorded:
            self._recorded = GraphedStep(self.model, cross_entropy, self.optimizer)

    def __call__(self) -> Tensor:
        if self._recorded is not None:
            return self._recorded(self.images, self.labels)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradients(self) -> Tensor:
        """Those of the last step, in one tensor of float64."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.cat([gradient.double().flatten() for gradient in gradients])


def workload(
    case: StepCase,
    dtype: torch.dtype = torch.float32,
    *,
    ours: Module,
    native: Module,
    make_optimizer: MakeOptimizer,
    compiled: bool = False,
    recorded: bool = False,
    backend: str = "",
    amplified: float = 0.0,
) -> Workload:
    """One training step on one random batch, by both models in both layouts.

    `ours` and `native` are the same model with the same weights, on our layers and on PyTorch's;
    copies are trained, never they themselves. Native runs with the quickest of its SGD variants
    for these parameters, and with `compiled` through torch.compile too; ours with `recorded` by
    `GraphedStep`.

    The check compares the gradients of the first step with native's in float64: their error may be
    twice that of native's, or `amplified` times where our algorithms state a larger one, and as
    good as none where ours runs in float64 too. It compares the losses of the first five steps, at
    a learning rate of 0.01, with native's.
    """
    rivals = native_variants(dtype)
    update = quickest_update(native, dtype)
    train = partial(Training, case)

    def check() -> Check:
        return _check(case, dtype, ours, native, make_optimizer, amplified, recorded)

    variants = {
        f"{layout} {update}": partial(train, native, rivals[update], layout, dtype)
        for layout in LAYOUTS
    }
    if compiled:
        variants |= {
            f"{layout} compiled": partial(
                train, native, rivals[update], layout, dtype, compiled=True
            )
            for layout in LAYOUTS
        }
    return Workload(
        "step",
        case.name,
        "step",
        {
            f"{layout} recorded" if recorded else layout: train(
                ours, make_optimizer, layout, dtype, recorded=recorded
            )
            for layout in LAYOUTS
        },
        {name: build() for name, build in variants.items()},
        check,
        flops=flops(case, native),
        bytes=0,  # not counted: how much of a model must cross memory is for fusion to decide
        twin=lambda name: variants[name](),
        images=case.N,
        backend=backend,
        shortlist=_SHORTLIST,
    )


def flops(case: StepCase, model: Module) -> int:
    """Operations of the convolutions and linear layers in one step, two for each multiply-add.

    A layer computes three products of one size: forward, grad_input and grad_weight; the first
    layer's grad_input is nobody's. (torch's own counter takes grouped convolutions for dense ones.)
    """
    total = 0

    def count(layer: Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        products = 3 if inputs[0].requires_grad else 2
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += products * 2 * output.numel() * weight[0].numel()

    model = copy.deepcopy(model).to("meta")
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    model(torch.empty(case.N, case.C, case.H, case.W, device="meta"))
    return total


def quickest_update(model: Module, dtype: torch.dtype) -> str:
    """The name of native's quickest SGD variant for this model's parameters, by timing them."""
    updates: dict[str, Callable[[], None]] = {}
    for name, make in native_variants(dtype).items():
        parameters = [p.detach().to(dtype, copy=True).requires_grad_() for p in model.parameters()]
        for parameter in parameters:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        updates[name] = make(parameters, lr=1e-4, momentum=0.9).step
    return timer.compare(updates, rounds=5).best(updates)


def _check(
    case: StepCase,
    dtype: torch.dtype,
    ours: Module,
    native: Module,
    make_optimizer: MakeOptimizer,
    amplified: float,
    recorded: bool,
) -> Check:
    loop = native_variants(dtype)["loop"]
    exact = Training(case, native, loop, dtype=torch.float64, lr=_CHECKED_LR)
    exact()
    reference = exact.gradients()
    exact = Training(case, ours, make_optimizer, dtype=torch.float64, lr=_CHECKED_LR)
    exact()
    # In float32 most of a network's error is from values that fall to the other side of a kink. In
    # float64 hardly any do, and a wrong gradient has nowhere to hide.
    errors = {"float64 gradients": relative_error(exact.gradients(), reference)}
    allowed = {"float64 gradients": torch.finfo(torch.float64).eps ** 0.5}
    del exact

    def run(
        model: Module, make: MakeOptimizer, layout: str, recorded: bool = False
    ) -> tuple[float, Tensor]:
        training = Training(case, model, make, layout, dtype, lr=_CHECKED_LR, recorded=recorded)
        losses = [training().double()]
        error = relative_error(training.gradients(), reference)
        losses += [training().double() for _ in range(_CHECKED_STEPS - 1)]
        return error, torch.stack(losses)

    of_native = {layout: run(native, loop, layout) for layout in LAYOUTS}
    of_ours = {layout: run(ours, make_optimizer, layout, recorded) for layout in LAYOUTS}
    error_of_native = max(error for error, _ in of_native.values())
    for layout in LAYOUTS:
        for seed in range(_OTHER_ROUNDINGS):
            training = Training(case, native, loop, layout, dtype, lr=_CHECKED_LR)
            round_otherwise_(training.images, seed)
            training()
            error_of_native = max(error_of_native, relative_error(training.gradients(), reference))
    losses_of_native = [losses for _, losses in of_native.values()]
    roundings = _ROUNDINGS * torch.finfo(dtype).eps
    for layout, (error, losses) in of_ours.items():
        errors[f"{layout} gradients"] = error
        allowed[f"{layout} gradients"] = max(2.0, amplified) * error_of_native + roundings
        errors[f"{layout} losses"] = min(apart(losses, others) for others in losses_of_native)
        allowed[f"{layout} losses"] = _LOSS_SPREADS * apart(*losses_of_native) + roundings
    return Check(errors, allowed)


def round_otherwise_(images: Tensor, seed: int) -> None:
    """Moves each value by up to one rounding."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    images.mul_(1 + (2 * noise - 1) * torch.finfo(images.dtype).eps)


def apart(losses: Tensor, others: Tensor) -> float:
    """The largest relative difference of two runs' losses, step by step."""
    return ((losses - others).abs() / others.abs()).max().item()
