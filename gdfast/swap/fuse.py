"""Fuses neighbouring layers: finds them and gives the modules that hold them new forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from gdfast.backends import cuda_linear, linear
from gdfast.swap import layers
from gdfast.swap.joins import join_blocks, join_convolutions
from gdfast.swap.match import (
    NORMS,
    POOLS,
    Group,
    Matcher,
    drop_identities,
    rewrite,
)
from gdfast.swap.plan import carries_fused, install, install_layer, is_hooked, uncarry
from gdfast.swap.report import Fused, Skipped, qualified
from gdfast.swap.trace import STACK, Trace, Untraceable, trace

Modules = dict[str, torch.nn.Module]

# What single layers become, if nothing beside them is fused with them.
_LAYERS: dict[type[torch.nn.Module], tuple[str, Callable[..., Any]]] = {
    torch.nn.BatchNorm2d: ("batch_norm_act", layers.norm_act),
    torch.nn.MaxPool2d: ("max_pool2d", layers.pool),
    torch.nn.Linear: ("linear", layers.linear),
}


@dataclass
class Fusion:
    """What was fused and what was left alone; `modules` are those that got a forward of ours."""

    fused: list[Fused] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    modules: list[torch.nn.Module] = field(default_factory=list)
    # For a verification, beside `fused`: the name of the module whose output shows what the fused
    # layers gave, None where a hook on it would undo the fusing, and the layers' own names.
    outputs: list[str | None] = field(default_factory=list)
    layers: list[list[str]] = field(default_factory=list)


def fuse_neighbours(
    model: torch.nn.Module, allowed: Callable[[torch.nn.Module, str], bool] | None
) -> Fusion:
    """Gives new forwards to the modules that have neighbours to fuse, and to single layers.

    `allowed(module, name)` says of a norm, pooling or linear layer whether it may be fused.
    """
    fusion = Fusion()
    try:
        _fuse_all(model, allowed, fusion)
    except BaseException:
        unfuse(fusion.modules)
        raise
    return fusion


def _fuse_all(
    model: torch.nn.Module,
    allowed: Callable[[torch.nn.Module, str], bool] | None,
    fusion: Fusion,
) -> None:
    names = {module: name for name, module in model.named_modules()}
    usable: set[torch.nn.Module] = set()
    for module, name in names.items():
        reason = _why_layer_skipped(module)
        if reason is None and (type(module) in (*NORMS, *POOLS) or _is_small_linear(module)):
            if allowed is None or allowed(module, name):
                usable.add(module)
            else:
                reason = "filter_fn is false for it"
        if reason is not None:
            fusion.skipped.append(Skipped(name, qualified(type(module)), reason))
    rows: list[tuple[torch.nn.Module, list[torch.nn.Module], Fused]] = []
    covered: set[torch.nn.Module] = set()
    inlined: set[torch.nn.Module] = set()
    for module, name in names.items():
        if not _is_parent(module):
            continue
        try:
            groups, containers = _fuse_parent(module, usable)
        except Untraceable as reason:
            if _holds_layers(module):
                row = Skipped(name, qualified(type(module)), f"its forward stays: {reason}")
                fusion.skipped.append(row)
            continue
        if groups:
            fusion.modules.append(module)
        inlined |= {module.get_submodule(path) for path in containers}
        for group in groups:
            parts = [module.get_submodule(path) for path in group.bypassed]
            # A container's forward has what a forward around it has fused already.
            if not parts or not covered.issuperset(parts):
                rows.append((module, parts, Fused(name, group.parts, group.op)))
            covered.update(parts)
    for module in usable:
        if type(module) in _LAYERS and not carries_fused(module):
            op, function = _LAYERS[type(module)]
            install_layer(module, function)
            fusion.modules.append(module)
            if module not in covered:
                parent, _, own = names[module].rpartition(".")
                rows.append((module, [module], Fused(parent, [own or type(module).__name__], op)))
    order = {module: i for i, module in enumerate(names)}
    for seen, parts, fused in sorted(rows, key=lambda row: order[(*row[1], row[0])[0]]):
        fusion.fused.append(fused)
        fusion.outputs.append(None if seen in inlined else names[seen])
        fusion.layers.append([names[part] for part in parts])


@contextmanager
def unfused(fusion: Fusion) -> Iterator[None]:
    """Runs the classes' own forwards for as long as the context lasts."""
    forwards = [vars(module).pop("forward") for module in fusion.modules]
    try:
        yield
    finally:
        for module, forward in zip(fusion.modules, forwards, strict=True):
            vars(module)["forward"] = forward


def unfuse(modules: Iterable[torch.nn.Module]) -> None:
    """Gives the modules the forwards of their classes again."""
    for module in modules:
        if carries_fused(module):
            uncarry(module)


def _fuse_parent(
    root: torch.nn.Module, usable: set[torch.nn.Module]
) -> tuple[list[Group], set[str]]:
    if carries_fused(root):
        raise Untraceable("it is fused already")
    if isinstance(root, torch.fx.GraphModule):
        raise Untraceable("it was made by torch.fx, which saves and copies it in its own way")
    if "forward" in vars(root):
        raise Untraceable("it was replaced on the instance")
    modules = dict(root.named_modules())
    containers = {path for path, module in modules.items() if path and _is_container(module)}
    traced = trace(root, lambda path, _: path in containers)
    drop_identities(traced.graph, modules)
    groups = _match(traced, modules, usable)
    rewrite(traced.graph, groups)
    join_convolutions(traced.graph, modules)
    inlined = _crossed([*(group.nodes for group in groups), *join_blocks(traced.graph)])
    traced = trace(root, lambda path, _: path in inlined)
    identities = drop_identities(traced.graph, modules)
    groups = _match(traced, modules, usable)
    if not groups:
        return [], set()
    bypassed = [*identities, *(path for group in groups for path in group.bypassed)]
    for path in bypassed:
        module = modules[path]
        if is_hooked(module):
            raise Untraceable(f"{path} carries hooks")
        if "forward" in vars(module) and not carries_fused(module):
            raise Untraceable(f"the forward of {path} was replaced on the instance")
    rewrite(traced.graph, groups)
    join_convolutions(traced.graph, modules)
    join_blocks(traced.graph)
    install(root, traced, {path: type(modules[path]) in _LAYERS for path in (*bypassed, *inlined)})
    return groups, inlined


def _match(traced: Trace, modules: Modules, usable: set[torch.nn.Module]) -> list[Group]:
    def allowed(path: str) -> bool:
        module = modules[path]
        return module in usable or type(module) not in (*NORMS, *POOLS)

    return Matcher(traced.graph, modules, allowed).groups()


def _crossed(groups: Iterable[list[Node]]) -> set[str]:
    """The containers that a group of nodes reaches into or out of."""
    crossed: set[str] = set()
    for group in groups:
        stacks = [set(node.meta[STACK]) for node in group]
        crossed |= set.union(*stacks) - set.intersection(*stacks)
    return crossed


def _is_container(module: torch.nn.Module) -> bool:
    return (
        type(module).forward is torch.nn.Sequential.forward
        and type(module).__call__ is torch.nn.Module.__call__
        and not is_hooked(module)
        and ("forward" not in vars(module) or carries_fused(module))
    )


def _is_parent(module: torch.nn.Module) -> bool:
    cls = type(module)
    if cls.forward is torch.nn.Sequential.forward:
        return True
    if cls.forward is torch.nn.Module.forward:
        return False
    if isinstance(module, torch.fx.GraphModule):
        return True
    return not cls.__module__.startswith(("torch.", "gdfast.nn."))


def _holds_layers(module: torch.nn.Module) -> bool:
    """Whether there are layers in it that could have been fused."""
    return any(
        isinstance(child, (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.MaxPool2d))
        or (_is_container(child) and _holds_layers(child))
        for child in module.children()
    )


def _is_small_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer whose forward our operation may take the place of."""
    if type(module) is not torch.nn.Linear:
        return False
    device, sizes = module.weight.device.type, (module.in_features, module.out_features)
    # A model may be moved to a GPU later.
    fits = cuda_linear.fits_layer(*sizes) or (device == "cpu" and linear.fits_layer(*sizes))
    return (
        fits
        and device in ("cpu", "cuda")
        and ("forward" not in vars(module) or carries_fused(module))
    )


def _why_layer_skipped(module: torch.nn.Module) -> str | None:
    """Why a norm or pooling layer is left alone; None for others and for those that are not."""
    if not isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LazyBatchNorm2d, torch.nn.MaxPool2d)):
        return None
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if is_parametrized(module):
        return "parametrized: its class is its own"
    if type(module) in (*NORMS, *POOLS):
        if "forward" in vars(module) and not carries_fused(module):
            return "its forward was replaced on the instance"
        if isinstance(module, torch.nn.MaxPool2d) and module.return_indices:
            return "it returns indices"
        return None
    if type(module).__module__.startswith("gdfast.nn."):
        return None
    base = torch.nn.BatchNorm2d if isinstance(module, torch.nn.BatchNorm2d) else torch.nn.MaxPool2d
    return f"subclass of {qualified(base)}: it may compute something else"
