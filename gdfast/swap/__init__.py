"""Puts our layers into a model that was written for PyTorch, and takes them out again.

A layer changes its class and nothing else. Parameters, optimizers made before, state_dict keys,
hooks, DDP and EMA copies stay valid, and nothing in PyTorch is patched.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from gdfast import nn
from gdfast.backends import Query, preview
from gdfast.errors import mismatch
from gdfast.swap.fuse import Fusion, fuse_neighbours, unfuse, unfused
from gdfast.swap.report import Replaced, Report, Skipped, qualified
from gdfast.swap.verify import record, worst

FilterFn = Callable[[torch.nn.Module, str], bool]

_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {torch.nn.Conv2d: nn.Conv2d}
# What restore_ undoes: what a model of ours may be written with, too.
_NATIVE: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    **{ours: native for native, ours in _CLASSES.items()},
    nn.BatchNorm2d: torch.nn.BatchNorm2d,
    nn.Linear: torch.nn.Linear,
    nn.MaxPool2d: torch.nn.MaxPool2d,
}
_OPERATIONS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")
_TOUCHED = "_gdfast_touched"
_OF_OUTPUTS = ("output", "grad_input")
_OF_LAYERS = ("grad_weight", "grad_bias", "running_mean", "running_var")


def swap_(
    model: torch.nn.Module,
    filter_fn: FilterFn | None = None,
    *,
    fuse: bool = False,
    verify: Any = None,
) -> Report:
    """Gives every `torch.nn.Conv2d` of the model our class, in place; also when it is the model.

    Only modules of exactly that class change, and only where `filter_fn(module, name)` is true. The
    report lists every convolution, with the reason where it was left alone; nothing to replace is a
    warning.

    `verify` is a batch for the model: a tensor, a tuple of positional or a dict of named arguments.
    It runs with the native layers and with ours, forward and backward from the same random numbers,
    and the report gets each layer's errors. Buffers, gradients and random numbers are left as they
    were; a model that fails on the batch is left native. The model's own hooks run as in training.
    Reentrant checkpointing (`use_reentrant=True`) cannot be verified: torch raises RuntimeError.

    `fuse=True` gives new forwards to the modules in whose forwards layers follow each other that
    one of our operations computes: BatchNorm2d with a residual and an activation, convolution with
    an activation or with ReLU and max pooling, in `Sequential`s and in forwards written out. They
    are attributes of the instances, read parameters and modes at the call, and run the class's
    forward where a hook was added or something replaced. `copy.deepcopy` and pickle take them
    along; before `copy.copy` and `torch.jit.script` call `restore_`. BatchNorm2d and MaxPool2d
    without such neighbours, and small Linear layers of 64 or more inputs (see `ops.linear`), run on
    our operations too, where `filter_fn` is true for them. The report lists what was fused, and
    the forwards that could not be, with the reason. Where a convolution's ReLU6 or LeakyReLU might
    be written to before backward, which native's allow, the two are one only "without gradients".

    Raises TypeError where the model is no `torch.nn.Module` or `filter_fn` no function.
    """
    return _swap(model, filter_fn, fuse, verify)[0]


def _swap(
    model: torch.nn.Module, filter_fn: FilterFn | None, fuse: bool, verify: Any
) -> tuple[Report, Fusion]:
    _check_model("swap_", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(mismatch("swap_", "filter_fn", "a function or None", repr(filter_fn)))
    layers, skipped = _candidates(model, filter_fn)
    before = None if verify is None else record(model, layers, verify)
    _set_classes(layers, _CLASSES)
    fusion, errors = Fusion(), {}
    try:
        if before is not None:
            errors = record(model, layers, verify).errors(before)
        if fuse:
            fusion = fuse_neighbours(model, filter_fn)
            if verify is not None:
                _verify_fused(model, layers, fusion, verify)
    except BaseException:
        unfuse(fusion.modules)
        _set_classes(layers, _NATIVE)
        raise
    replaced = [
        Replaced(
            name, qualified(_NATIVE[type(layer)]), qualified(type(layer)), _backend(layer),
            errors.get(name, {}),
        )
        for name, layer in layers.items()
    ]  # fmt: skip
    report = Report(replaced, [*skipped, *fusion.skipped], fusion.fused)
    if not replaced and not fusion.fused:
        reasons = "; ".join(f"{row.name or 'the model'}: {row.reason}" for row in skipped)
        warnings.warn(
            f"swap_: no layer was replaced ({reasons or 'the model has no convolution'})",
            stacklevel=3,
        )
    return report, fusion


def _verify_fused(
    model: torch.nn.Module, layers: dict[str, torch.nn.Module], fusion: Fusion, batch: Any
) -> None:
    watched = {name for name in fusion.outputs if name is not None}
    modules = {
        name: model.get_submodule(name) for name in {*watched, *itertools.chain(*fusion.layers)}
    }
    ours = record(model, modules, batch, watched)
    _set_classes(layers, _NATIVE)
    try:
        with unfused(fusion):
            native = record(model, modules, batch)
    finally:
        _set_classes(layers, _CLASSES)
    errors = ours.errors(native)
    for i, (row, output, names) in enumerate(
        zip(fusion.fused, fusion.outputs, fusion.layers, strict=True)
    ):
        found = [(k, v) for name in names for k, v in errors[name].items() if k in _OF_LAYERS]
        if output is not None:
            found += [(k, v) for k, v in errors[output].items() if k in _OF_OUTPUTS]
        kinds = {kind: worst(v for k, v in found if k == kind) for kind, _ in found}
        fusion.fused[i] = replace(row, errors=kinds)


def swap(
    model: torch.nn.Module,
    filter_fn: FilterFn | None = None,
    *,
    fuse: bool = False,
    verify: Any = None,
) -> torch.nn.Module:
    """A deep copy of the model with our layers; arguments and errors are those of `swap_`."""
    _check_model("swap", model)
    model = copy.deepcopy(model)
    _swap(model, filter_fn, fuse, verify)
    return model


def restore_(model: torch.nn.Module) -> None:
    """Gives every layer of ours its class of `torch.nn` and its own forward again, in place.

    Raises TypeError where the model is no `torch.nn.Module`.
    """
    _check_model("restore_", model)
    unfuse(model.modules())
    _set_classes({n: m for n, m in model.named_modules() if type(m) in _NATIVE}, _NATIVE)


@contextmanager
def swapped(
    model: torch.nn.Module,
    filter_fn: FilterFn | None = None,
    *,
    fuse: bool = False,
    verify: Any = None,
) -> Iterator[Report]:
    """Swaps in place for as long as the context lasts and gives the report.

    Layers that were ours before stay ours. Arguments and errors are those of `swap_`.
    """
    _check_model("swapped", model)
    layers = {name: module for name, module in model.named_modules() if type(module) in _CLASSES}
    report, fusion = _swap(model, filter_fn, fuse, verify)
    try:
        yield report
    finally:
        unfuse(fusion.modules)
        _set_classes({n: m for n, m in layers.items() if type(m) in _NATIVE}, _NATIVE)


def _check_model(op: str, model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(mismatch(op, "model", "a torch.nn.Module", type(model).__name__))


def _candidates(
    model: torch.nn.Module, filter_fn: FilterFn | None
) -> tuple[dict[str, torch.nn.Module], list[Skipped]]:
    layers, skipped = {}, []
    for name, module in model.named_modules():
        if not _is_convolution(module):
            continue
        reason = _why_skipped(module)
        if not reason and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn is false for it"
        if reason:
            skipped.append(Skipped(name, qualified(type(module)), reason))
        else:
            layers[name] = module
    return layers, skipped


def _is_convolution(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") == "Conv2d"
    return isinstance(module, _ConvNd)


def _why_skipped(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its code is compiled already"
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if is_parametrized(module):
        return "parametrized: its class is its own"
    if type(module) in _NATIVE:
        return "it is ours already"
    if type(module) not in _CLASSES:
        if isinstance(module, torch.nn.Conv2d):
            return "subclass of torch.nn.Conv2d: it may compute something else"
        return "gdfast has no such layer"
    if "_conv_forward" in vars(module):
        return "its _conv_forward was replaced on the instance"
    return ""


def _set_classes(
    layers: dict[str, torch.nn.Module], classes: dict[type[torch.nn.Module], type[torch.nn.Module]]
) -> None:
    for layer in layers.values():
        layer.__class__ = classes[type(layer)]
        # Code that torch.compile made before must not go on: while no attribute changes, it may
        # take for granted that no class does either.
        vars(layer)[_TOUCHED] = True
        del vars(layer)[_TOUCHED]


def _backend(layer: torch.nn.Module) -> str:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    names = {
        op: preview(op, Query(weight.device, weight.dtype, weight.layout)) for op in _OPERATIONS
    }
    if len(set(names.values())) == 1:
        return names["conv2d"]
    return ", ".join(f"{op}: {name}" for op, name in names.items())
