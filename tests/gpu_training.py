"""Training of a model by a backend of ours, against native's in other roundings and float64."""

from __future__ import annotations

import torch
from test_models import TRAINED
from torch import Tensor

import gdfast
from gdfast import models, optim
from gdfast.bench.cases import StepCase
from gdfast.bench.step import Training, apart, round_otherwise_
from gdfast.bench.workload import LAYOUTS, relative_error

_STEPS, _LR = 3, 1e-3
# What ours may stray by, as a multiple of how far native strays from the exact gradients and from
# itself, in both layouts and from images that are rounded otherwise; and besides, what three
# products of TF32 numbers may: those are exact to 2^-17 at worst.
_ERROR, _SPREAD, _TF32X3_ERROR = 4, 10, 1e-5
_FLOAT64_ERROR = torch.finfo(torch.float64).eps ** 0.5


def check_training(name: str, backend: str, layouts: tuple[str, ...], device: str = "cuda") -> None:
    """The gradients of a first step, and the losses of a few.

    In float32 values that fall to the other side of a kink make most of a deep network's error, in
    native's runs as well; in float64, which Triton's kernels do not take, hardly any do.
    """
    options, (_, *size) = TRAINED[name]
    case = StepCase(name, name, 8, *size, classes=options.get("num_classes", 2))
    torch.manual_seed(0)
    model = models.create(name, **options).to(device)
    gdfast.swap_(model, fuse=True)

    def run(
        backend: str, layout: str, dtype: torch.dtype = torch.float32, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        training = Training(case, model, optim.SGD, layout, dtype, lr=_LR)
        if seed is not None:
            round_otherwise_(training.images, seed)
        with gdfast.backend(backend):
            losses = [training()]
            gradients = training.gradients()
            losses += [training() for _ in range(_STEPS - 1)]
        return torch.stack(losses).double(), gradients

    _, exact = run("native", "NCHW", torch.float64)
    natives = [run("native", layout, seed=seed) for layout in LAYOUTS for seed in (None, 0, 1)]
    error = max(relative_error(gradients, exact) for _, gradients in natives)
    spread = max(apart(one, other) for one, _ in natives for other, _ in natives)
    for layout in layouts:
        if backend != "triton":
            assert relative_error(run(backend, layout, torch.float64)[1], exact) <= _FLOAT64_ERROR
        losses, gradients = run(backend, layout)
        our_error = relative_error(gradients, exact)
        assert our_error <= _ERROR * error + _TF32X3_ERROR, f"{layout}: {our_error}, native {error}"
        strayed = min(apart(losses, native) for native, _ in natives)
        assert strayed <= _SPREAD * spread + _TF32X3_ERROR, f"{layout}: {strayed}, native {spread}"
