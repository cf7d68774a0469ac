"""Which workloads a benchmark run consists of, built only when their turn comes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Module

from gdfast import backends, models, ops, optim, restore_, swap_
from gdfast.backends import cpu_algorithms, registry, tuning
from gdfast.bench import cases, layers, norm, sgd, step
from gdfast.bench.workload import Workload

SUITES = ("quick", "all", *cases.LAYERS, "norm", "sgd", "step")

# What a first look should hold: the layers that networks are made of, in under two minutes.
_QUICK_LAYERS = {
    "simple_cnn": ("3x3 1->32 @28",),
    "resnet18": ("7x7/2 3->64 @224", "3x3/2 64->128 @56"),
    "resnet50": (
        "3x3 64->64 @56",
        "3x3 128->128 @28",
        "3x3 256->256 @14",
        "3x3 512->512 @7",
        "1x1 64->256 @56",
        "1x1 512->128 @28",
        "1x1 1024->256 @14",
        "1x1 512->2048 @7",
    ),
}
_QUICK_STEPS = ("SimpleCNN, batch 64", "ResNet-20, batch 64, 32x32")
_QUICK_NORM = ((8, 64, 56, 56), (8, 512, 28, 28))
_QUICK_SGD = ("10 k, 1 tensor", "1 M, 1 tensor", "1 M, 161 tensors", "25.6 M, ResNet-50's 161")

# Error of Winograd's algorithm over native's in one layer with 64 channels or more. So many times
# more values fall to the other side of a ReLU's kink, which is what most of a network's error is.
_LARGER_ERROR = 4.0


@dataclass(frozen=True)
class Planned:
    """A workload to come: its label, what builds it, and the case where it is a training step."""

    label: str
    build: Callable[[], Workload]
    step: cases.StepCase | None = None


def plan(
    suite: str,
    passes: Sequence[str],
    dtype: torch.dtype,
    compiled: bool = False,
    only: str = "",
    recorded: bool = False,
) -> list[Planned]:
    """The workloads of a suite ("quick", "all" or one of its own), in the order of the table.

    `only` keeps those whose label holds it, letters and digits alone compared: "resnet18" finds
    "ResNet-18, batch 8".

    Raises:
        ValueError: no such suite, or nothing in it that `only` finds.
    """
    if suite not in SUITES:
        raise ValueError(f"suites.plan: suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    everything = list(_plan(suite, passes, dtype, compiled, recorded))
    found = [item for item in everything if _plain(only) in _plain(item.label)]
    if not found:
        labels = "; ".join(item.label for item in everything)
        raise ValueError(
            f"suites.plan: only: expected a part of one of these names: {labels}; got {only!r}"
        )
    return found


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _plan(
    suite: str, passes: Sequence[str], dtype: torch.dtype, compiled: bool, recorded: bool
) -> Iterator[Planned]:
    for model, table in cases.LAYERS.items():
        if suite not in ("quick", "all", model):
            continue
        for layer in table:
            if suite == "quick" and layer.name not in _QUICK_LAYERS.get(model, ()):
                continue
            for task in passes:
                yield Planned(f"{layer} {task}", partial(layer_workload, layer, task, dtype))
    if suite in ("quick", "all", "norm"):
        for normalised in cases.NORM_CASES:
            if suite != "quick" or normalised.size in _QUICK_NORM:
                for task in norm.PASSES:
                    build = partial(norm_workload, normalised, task, dtype)
                    yield Planned(f"norm {normalised} {task}", build)
    if suite in ("quick", "all", "sgd"):
        for update in cases.SGD_CASES:
            if suite != "quick" or update.name in _QUICK_SGD:
                yield Planned(f"SGD, {update}", partial(sgd_workload, update, dtype))
    if suite in ("quick", "all", "step"):
        for training in cases.STEPS:
            if suite != "quick" or training.name in _QUICK_STEPS:
                build = partial(step_workload, training, dtype, compiled, recorded)
                yield Planned(str(training), build, training)


def layer_workload(case: cases.Conv2dCase, task: str, dtype: torch.dtype) -> Workload:
    """One pass of one layer by `gdfast.ops.conv2d`."""
    build = partial(layers.workload, case, task, dtype, convolve=ops.conv2d)
    # What it runs on, and how exact that is, is chosen when it first runs.
    backend, stated_error = _ran_on(build())
    if not backend:
        backend = _backend(dtype, "conv2d" if task == "forward" else f"conv2d_{task}")
    return build(backend=backend, stated_error=stated_error)


def norm_workload(case: cases.NormCase, task: str, dtype: torch.dtype) -> Workload:
    """One pass of batch normalisation with what follows it, by `gdfast.ops.batch_norm_act`."""
    op = "batch_norm_act" if task == "forward" else "batch_norm_act_backward"
    return norm.workload(
        case, task, dtype, normalise=ops.batch_norm_act, backend=_backend(dtype, op)
    )


def sgd_workload(case: cases.SgdCase, dtype: torch.dtype) -> Workload:
    """One update by `gdfast.optim.SGD`."""
    return sgd.workload(case, dtype, make_optimizer=optim.SGD, backend=_backend(dtype, "sgd_"))


def step_workload(
    case: cases.StepCase, dtype: torch.dtype, compiled: bool = False, recorded: bool = False
) -> Workload:
    """One training step of a model of ours, and of the same one with its layers restored."""
    ours, plain = both_models(case)
    return step.workload(
        case,
        dtype,
        ours=ours,
        native=plain,
        make_optimizer=optim.SGD,
        compiled=compiled,
        recorded=recorded,
        backend=_backend(dtype, "conv2d", "conv2d_grad_input", "conv2d_grad_weight", "sgd_"),
        amplified=_LARGER_ERROR if dtype == torch.float32 else 0.0,
    )


def both_models(case: cases.StepCase) -> tuple[Module, Module]:
    """The model of a step on our layers, and the same one on PyTorch's, with equal weights."""
    torch.manual_seed(0)
    return on_both_sides(models.create(case.model, **case.options))


def on_both_sides(model: Module) -> tuple[Module, Module]:
    """A model of ours with its neighbours fused, and a copy of it on PyTorch's layers alone."""
    plain = copy.deepcopy(model)
    restore_(plain)
    swap_(model, fuse=True)
    return model, plain


def _backend(dtype: torch.dtype, *operations: str) -> str:
    """Names of the backends that take these operations, as far as the dtype decides."""
    query = backends.Query(torch.device("cpu"), dtype)
    return "/".join(sorted({backends.preview(op, query) for op in operations}))


def _ran_on(workload: Workload) -> tuple[str, float]:
    """Names of what ours runs on, in either layout, and the error that this states.

    No names where the backend leaves no choice.
    """
    with tuning.recorded({}) as uses:
        for call in workload.ours.values():
            call()
    chosen = {use.choice.name for use in uses}
    names = {registry.REFERENCE if name == tuning.NATIVE else f"cpu, {name}" for name in chosen}
    errors = [cpu_algorithms.STATED_ERROR.get(name, 0.0) for name in chosen]
    return "/".join(sorted(names)), max(errors, default=0.0)
