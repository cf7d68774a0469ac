"""Whole training steps: zero_grad, forward, loss, backward, SGD step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from gdfast.bench.cases import StepCase
from gdfast.bench.sgd import MakeOptimizer, native_variants
from gdfast.bench.workload import LAYOUTS, Check, Workload

_CHECKED_STEPS = 5
# Roundings allowed beside twice native's error. Native's own error may be less than one by luck,
# and a value at the kink of a ReLU, or two equal ones in a pooling window, may fall either way.
_ROUNDINGS = 8


def workload(
    case: StepCase,
    dtype: torch.dtype = torch.float32,
    *,
    ours: Module,
    native: Module,
    make_optimizer: MakeOptimizer,
    compiled: bool = False,
    backend: str = "",
) -> Workload:
    """One training step on one random batch, by both models in both layouts.

    `ours` and `native` are the same model with the same weights, on our layers and on PyTorch's;
    copies are trained, never they themselves. Native runs with each of its SGD variants, and with
    `compiled` through torch.compile too (the fused SGD beside it). The check compares the losses
    of the first steps with those of float64.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.N, case.C, case.H, case.W, generator=generator)
    labels = torch.randint(case.classes, (case.N,), generator=generator)
    rivals = native_variants(dtype)

    def training(
        model: Module,
        make: MakeOptimizer,
        layout: str = "NCHW",
        dtype: torch.dtype = dtype,
        *,
        lr: float = 1e-4,  # so small that thousands of timed steps leave the values ordinary
        compile: bool = False,
    ) -> Callable[[], Tensor]:
        memory_format = LAYOUTS[layout]
        model = copy.deepcopy(model).to(dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = make(model.parameters(), lr=lr, momentum=0.9)
        batch = images.to(dtype).to(memory_format=memory_format)
        return _step(torch.compile(model) if compile else model, optimizer, batch, labels)

    def losses(step: Callable[[], Tensor]) -> Tensor:
        return torch.stack([step().double() for _ in range(_CHECKED_STEPS)])

    def check() -> Check:
        exact = losses(training(native, rivals["loop"], dtype=torch.float64, lr=0.01))

        def worst(model: Module, make: MakeOptimizer, layout: str) -> float:
            found = losses(training(model, make, layout, lr=0.01))
            return ((found - exact).abs() / exact.abs()).max().item()

        allowed = 2 * max(worst(native, rivals["loop"], layout) for layout in LAYOUTS)
        allowed += _ROUNDINGS * torch.finfo(dtype).eps
        return Check(
            {layout: worst(ours, make_optimizer, layout) for layout in LAYOUTS},
            dict.fromkeys(LAYOUTS, allowed),
        )

    with FlopCounterMode(display=False) as counter:
        training(native, rivals["loop"])()

    variants = {
        f"{layout} {name}": partial(training, native, make, layout)
        for layout in LAYOUTS
        for name, make in rivals.items()
    }
    if compiled:
        fastest = rivals["fused" if "fused" in rivals else "loop"]
        variants |= {
            f"{layout} compiled": partial(training, native, fastest, layout, compile=True)
            for layout in LAYOUTS
        }
    return Workload(
        "step",
        case.name,
        "step",
        {layout: training(ours, make_optimizer, layout) for layout in LAYOUTS},
        {name: build() for name, build in variants.items()},
        check,
        flops=counter.get_total_flops(),
        bytes=0,  # not counted: how much of a model must cross memory is for fusion to decide
        twin=lambda name: variants[name](),
        images=case.N,
        backend=backend,
    )


def _step(
    model: Callable[[Tensor], Tensor], optimizer: Optimizer, images: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
