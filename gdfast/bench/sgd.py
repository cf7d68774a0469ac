"""Updates by SGD with momentum and weight decay, over one tensor or many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdfast.bench.cases import SgdCase
from gdfast.bench.workload import Check, Workload, allowed_error, relative_error

MakeOptimizer = Callable[..., Optimizer]  # the constructor of torch.optim.SGD

_SETTINGS = {"momentum": 0.9, "weight_decay": 1e-4}


def native_variants(dtype: torch.dtype) -> dict[str, MakeOptimizer]:
    """Native's ways to run the same update, by name; each is a rival."""
    variants: dict[str, MakeOptimizer] = {
        "loop": partial(torch.optim.SGD, foreach=False, fused=False),
        "foreach": partial(torch.optim.SGD, foreach=True),
    }
    # Native's fused update rounds wrongly in half types on the CPU: no rival there.
    if dtype in (torch.float32, torch.float64):
        variants["fused"] = partial(torch.optim.SGD, fused=True)
    return variants


def workload(
    case: SgdCase,
    dtype: torch.dtype = torch.float32,
    *,
    make_optimizer: MakeOptimizer,
    backend: str = "",
) -> Workload:
    """One `step()` with momentum 0.9 and weight decay 1e-4, by each optimizer on its own tensors.

    `make_optimizer` is ours. The check compares the parameters after three steps with float64.
    """
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator).to(dtype) for size in case.sizes]
    gradients = [torch.randn(size, generator=generator).to(dtype) for size in case.sizes]
    native = native_variants(dtype)

    def optimizer(make: MakeOptimizer, dtype: torch.dtype, lr: float) -> Optimizer:
        parameters = [value.to(dtype, copy=True).requires_grad_() for value in start]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(dtype, copy=True)
        return make(parameters, lr=lr, **_SETTINGS)

    def after_three_steps(make: MakeOptimizer, dtype: torch.dtype) -> Tensor:
        # So large a learning rate that the updates weigh as much as the parameters.
        used = optimizer(make, dtype, lr=0.1)
        for _ in range(3):
            used.step()
        return torch.cat([p.detach().flatten() for p in used.param_groups[0]["params"]])

    def check() -> Check:
        reference = after_three_steps(native["loop"], torch.float64)
        error = relative_error(after_three_steps(make_optimizer, dtype), reference)
        native_error = relative_error(after_three_steps(native["loop"], dtype), reference)
        # Three steps of three multiply-adds each: weight decay, momentum, update.
        return Check({"SGD": error}, {"SGD": allowed_error(native_error, dtype, terms=9)})

    # So small a learning rate that thousands of timed steps leave the values ordinary.
    def update(make: MakeOptimizer) -> Callable[[], None]:
        return optimizer(make, dtype, lr=1e-4).step

    return Workload(
        "sgd",
        case.name,
        "update",
        {"SGD": update(make_optimizer)},
        {name: update(make) for name, make in native.items()},
        check,
        # p, g and m once each for weight decay, momentum and the update: 2 operations each
        flops=6 * case.parameters,
        bytes=case.bytes * dtype.itemsize // 4,
        twin=lambda name: update(native[name]),
        backend=backend,
    )
