"""What layers were found to be at their last call.

A layer's call looks at its modules' settings and hooks, at the tensors, and at all that decides
which kernels run, and mostly finds what it found before. Here that is asked in one call of
gdfast._cpu.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as _module
from torch import Tensor

from gdfast import native
from gdfast.ops.conv2d_norm_act import Tensors, Unit
from gdfast.ops.ordinary import unwatched_facts
from gdfast.ops.planned import Planned, known_situation

_ABSENT, _FALSE = NotImplemented, ...  # for make_memo: a dict has no such key, or one that is false
INPUT, _RESIDUAL, _NONE = range(3)  # the arguments of recall
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks", "_global_backward_hooks", "_global_forward_pre_hooks",
    "_global_forward_hooks", "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)  # fmt: skip
# What a call of a layer depends on beside its tensors and hooks.
_SETTINGS = {
    torch.nn.Conv2d: ("padding_mode", "stride", "padding", "dilation", "groups"),
    torch.nn.BatchNorm2d: ("training", "track_running_stats", "momentum", "eps"),
    torch.nn.Linear: (),
    torch.nn.MaxPool2d: (
        "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
    ),
}  # fmt: skip


class _Memo(NamedTuple):
    module: weakref.ref[Any]
    conv: weakref.ref[Any] | None  # in front of a norm
    settings: Any  # what is none of the modules'
    unit: Unit | Planned
    casts: bool  # autocast makes other tensors than what the unit is to get
    momentum: float
    capsule: Any  # None after a call of its kind: what changes all the time is not noted


# By the id of a module, and no longer than that lives. The garbage collector does not look into
# them: they refer to modules weakly, and own none of their parameters.
_memos: dict[int, _Memo] = {}


def run_again(
    module: Any, settings: Any, input: Any, residual: Any = None, conv: Any = None
) -> Tensor | None:
    """The output of a layer, where all is as it was at the call that was noted, else None."""
    memo = _memos.get(id(module))
    if (
        memo is None
        or memo.capsule is None
        or memo.module() is not module
        or memo.settings != settings
        or (conv is not None and (memo.conv is None or memo.conv() is not conv))
    ):
        return None
    assert native.cpu is not None
    tensors = native.cpu.recall(memo.capsule, input, residual, None)
    if tensors is None:
        return None
    if memo.casts:
        tensors = memo.unit.cast(tensors)
    return memo.unit.run(tensors, memo.momentum)


def note(
    module: Any, settings: Any, tensors: Tensors, unit: Unit | Planned, casts: bool = False,
    conv: Any = None, momentum: float = 0.0,
) -> None:  # fmt: skip
    """Notes a call of a unit on these tensors, when it is made for the second time.

    Without `settings` it is a call of the module's own forward, which hooks stand around. `casts`
    tells whether the unit took what autocast makes of them. The modules have their parameters and
    buffers, and the hooks and settings of a call as one.
    """
    key = id(module)
    before = _memos.get(key)
    if before is not None and before.unit is unit and before.module() is module:
        capsule = _capsule(module, conv, tensors, settings)
    else:
        capsule = None
    if casts and capsule is not None:
        pairs = zip(unit.cast(tensors), tensors, strict=True)
        casts = any(cast is not given for cast, given in pairs)
    weak = weakref.ref(module, partial(_forget, key))
    of_conv = None if conv is None else weakref.ref(conv)
    _memos[key] = _Memo(weak, of_conv, settings, unit, casts, momentum, capsule)


def known(module: Any, conv: Any, settings: Any) -> _Memo | None:
    """What is noted of a norm behind a convolution, for calls that are found again."""
    found = _memos.get(id(module))
    if found is None or found.module() is not module or found.settings != settings:
        return None
    is_of = found.capsule is not None and found.conv is not None and found.conv() is conv
    return found if is_of else None


def of_block(norm: Any, conv: Any, settings: Any) -> tuple[list[Any], list[Any], list[Any]] | None:
    """Of a norm behind a convolution in a block, what a call rests on, where its tensors are found,
    but for input, residual and the convolution's bias, and the tensors themselves."""
    of_conv, parameters, buffers = vars(conv)["_parameters"], norm._parameters, norm._buffers
    names = "running_mean", "running_var", "num_batches_tracked"
    if of_conv.get("bias") is not None or any(buffers.get(name) is None for name in names):
        return None
    of_norm = parameters["weight"], parameters["bias"]
    mean, variance, batches = (buffers[name] for name in names)
    tensors = None, of_conv["weight"], None, *of_norm, mean, variance, None, batches
    found = _rests_on(norm, conv, tensors, settings)
    if found is None:
        return None
    places = 1, 3, 4, 5, 6, 8
    return found[0], [found[1][i] for i in places], [tensors[i] for i in places]


def _forget(key: int, _: Any) -> None:
    _memos.pop(key, None)


def _capsule(module: Any, conv: Any, tensors: Tensors, settings: Any) -> Any:
    facts = unwatched_facts(*tensors)
    if not isinstance(facts, bytes) or not _is_constant(settings):
        return None
    found = _rests_on(module, conv, tensors, settings)
    if found is None:
        return None
    kept, sources = found
    kept_of_situation, asked = known_situation(tensors[0].device)
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in tensors[:3])
    assert native.cpu is not None
    return native.cpu.make_memo(
        (*kept, *kept_of_situation), tuple(asked), tuple(sources), facts, needs
    )


def _rests_on(
    module: Any, conv: Any, tensors: Tensors, settings: Any
) -> tuple[list[Any], list[Any]] | None:
    """What a call's modules must have as they have it now, and where its tensors are found."""
    modules = [module] if conv is None else [conv, module]
    kept: list[Any] = []
    sources: list[Any] = [INPUT]
    for each in modules:
        own, weak = vars(each), weakref.ref(each)
        names = next(names for kind, names in _SETTINGS.items() if isinstance(each, kind))
        if not all(_is_constant(own[name]) for name in names):
            return None  # a list may be changed in its place
        kept += [(weak, name, own[name]) for name in names]
        # Around a forward of its own somebody else has called what is to be called.
        hooks = _HOOKS if settings is not None else ()
        of_all = _GLOBAL_HOOKS if hooks and isinstance(each, torch.nn.Conv2d) else ()
        if any(own[name] for name in hooks) or any(vars(_module)[name] for name in of_all):
            return None
        kept += [(weak, name, _FALSE) for name in hooks]
        kept += [(vars(_module), name, _FALSE) for name in of_all]
        if isinstance(each, torch.nn.Conv2d):
            own_functions = ("forward", "_conv_forward") if hooks else ("_conv_forward",)
            kept += [(weak, name, _ABSENT) for name in own_functions]
        if not isinstance(each, torch.nn.MaxPool2d):
            sources += [(weak, "_parameters", name) for name in ("weight", "bias")]
    if conv is not None:
        sources += [(weak, "_buffers", "running_mean"), (weak, "_buffers", "running_var")]
        sources += [_RESIDUAL, (weak, "_buffers", "num_batches_tracked")]
    for place, (source, tensor) in enumerate(zip(sources, tensors, strict=True)):
        if isinstance(source, tuple) and _find(*source) is not tensor:
            if tensor is not None:
                return None
            sources[place] = _NONE  # statistics that are not in use
    return kept, sources


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (int, float, str))


def _find(module: weakref.ref[Any], name: str, key: str) -> Any:
    return vars(module())[name].get(key)
