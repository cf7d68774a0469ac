"""Residual blocks of convolutions with their norms in one call, where all is as it was before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import plans
from gdfast.nn import memo
from gdfast.ops.conv2d_norm_act import Unit
from gdfast.ops.conv2d_norm_block import Block, block
from gdfast.ops.ordinary import unwatched_facts
from gdfast.ops.planned import known_situation

# A convolution, the norm behind it, and name and slope of the activation behind that.
Layer = tuple[Any, Any, str, float]

# Whether hooks take what is saved for backward: checkpointing compares that, unit by unit.
_hooks_of_saved: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Known(NamedTuple):
    modules: tuple[weakref.ref[Any], ...]
    settings: tuple[Any, ...]
    of_layers: tuple[Any, ...]  # what was known of each layer
    block: Block
    momentum: float
    capsule: Any


# By the id of a block's last norm, and no longer than that lives.
_known: dict[int, _Known] = {}


def run_block(
    input: Any, shortcut: Layer | None, chain: tuple[Layer, ...], by_layers: Callable[[], list[Any]]
) -> Any:
    """What the layers of a chain give, the last of which gets as its residual the input, or what
    the shortcut makes of it. `by_layers` calls them: the shortcut, if there is one, and the chain.
    """
    if torch.compiler.is_compiling() or native.cpu is None or not plans.enabled:
        return by_layers()[-1]
    layers = chain if shortcut is None else (shortcut, *chain)
    known = _known.get(id(chain[-1][1]))
    if known is not None and _is_of(known, layers):
        tensors = native.cpu.recall(known.capsule, input)
        if tensors is not None:
            output = known.block.run(tensors, known.momentum)
            if output is not None:
                return output
    else:
        known = None
    outputs = by_layers()
    _learn(input, layers, shortcut is not None, outputs, known)
    return outputs[-1]


def _is_of(known: _Known, layers: tuple[Layer, ...]) -> bool:
    modules = [module for layer in layers for module in layer[:2]]
    return (
        len(modules) == len(known.modules)
        and all(ref() is each for ref, each in zip(known.modules, modules, strict=True))
        and known.settings == tuple(layer[2:] for layer in layers)
    )


def _learn(
    input: Any, layers: tuple[Layer, ...], has_shortcut: bool, outputs: list[Any],
    before: _Known | None,
) -> None:  # fmt: skip
    """Notes a block for later calls, where each layer is found again in a call like this one."""
    if not isinstance(input, Tensor) or input.device.type != "cpu":
        return
    memos: list[Any] = [memo.known(norm, conv, tuple(end)) for conv, norm, *end in layers]
    of_layers = tuple(each and each.capsule for each in memos)
    if None in of_layers or (before is not None and before.of_layers == of_layers):
        return
    modules = [module for layer in layers for module in layer[:2]]
    units = tuple(each.unit for each in memos)
    momenta = {each.momentum for each in memos}
    if (
        len(set(map(id, modules))) < len(modules) or len(momenta) > 1 or _hooks_of_saved is None
        or any(each.casts for each in memos) or not all(isinstance(unit, Unit) for unit in units)
    ):  # fmt: skip
        return
    kept, sources, tensors = [], [memo.INPUT], [input]
    for conv, norm, *end in layers:
        found = memo.of_block(norm, conv, tuple(end))
        if found is None:
            return
        kept += found[0]
        sources += found[1]
        tensors += found[2]
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in tensors)
    facts, made = unwatched_facts(*tensors), block(units, has_shortcut, tuple(tensors), needs)
    if made is None or not isinstance(facts, bytes):
        return
    # What holds for the layers now is what their memos have noted: training, for one.
    assert native.cpu is not None
    for place, capsule in enumerate(of_layers):
        source = outputs[place - 1] if place > has_shortcut else input
        residual = (outputs[0] if has_shortcut else input) if place == len(layers) - 1 else None
        if native.cpu.recall(capsule, source, residual, None) is None:
            return
    of_situation, asked = known_situation(input.device)
    asked.append((partial(_hooks_of_saved, True), None))
    capsule = native.cpu.make_memo(
        (*kept, *of_situation), tuple(asked), tuple(sources), facts, needs
    )
    *others, last = modules
    refs = (*map(weakref.ref, others), weakref.ref(last, partial(_forget, id(last))))
    settings = tuple(layer[2:] for layer in layers)
    _known[id(last)] = _Known(refs, settings, of_layers, made, momenta.pop(), capsule)


def _forget(key: int, _: Any) -> None:
    _known.pop(key, None)
