"""What a convolution and the norm behind it were found to be at their last call.

A layer's call looks at its modules' settings and hooks, at the tensors, and at all that decides
which kernels run, and mostly finds what it found before. Here that is asked in one call of
gdfast._cpu.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch.nn.modules.module as _module
from torch import Tensor

from gdfast import native
from gdfast.ops.conv2d import autocast
from gdfast.ops.conv2d_norm_act import Tensors, Unit, known_situation
from gdfast.ops.ordinary import unwatched_facts

_ABSENT, _FALSE = NotImplemented, ...  # for make_memo: a dict has no such key, or one that is false
_INPUT, _RESIDUAL, _NONE = range(3)  # the arguments of recall
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks", "_global_backward_hooks", "_global_forward_pre_hooks",
    "_global_forward_hooks", "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)  # fmt: skip

_OF_ALL = vars(_module.Module()).keys()


class _Memo(NamedTuple):
    norm: weakref.ref[Any]
    conv: weakref.ref[Any]
    ending: tuple[str, float]  # activation and slope
    unit: Unit
    casts: bool  # for autocast
    momentum: float
    capsule: Any  # None after a call of its kind: what changes all the time is not noted


# By the id of the norm, and no longer than that lives: they hold parameters.
_memos: dict[int, _Memo] = {}


def run_again(
    norm: Any, conv: Any, input: Any, residual: Any, ending: tuple[str, float]
) -> Tensor | None:
    """The output of both, where all is as it was at the call that was noted, else None."""
    memo = _memos.get(id(norm))
    if (
        memo is None
        or memo.capsule is None
        or memo.conv() is not conv
        or memo.norm() is not norm
        or memo.ending != ending
    ):
        return None
    assert native.cpu is not None
    tensors = native.cpu.recall(memo.capsule, input, residual, None)
    if tensors is None:
        return None
    if memo.casts:
        tensors = *autocast(*tensors[:3]), *tensors[3:]
    return memo.unit.run(tensors, memo.momentum)


def note(
    norm: Any, conv: Any, tensors: Tensors, ending: tuple[str, float], unit: Unit, casts: bool
) -> None:
    """Notes a call of a unit on these tensors, when it is made for the second time.

    `casts` tells whether the unit took what autocast makes of them. The modules have their
    parameters and buffers, and the hooks and settings of a call as one.
    """
    key = id(norm)
    before = _memos.get(key)
    if before is not None and before.unit is unit and before.norm() is norm:
        capsule = _capsule(norm, conv, tensors)
    else:
        capsule = None
    forget = partial(_forget, key)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    modules = weakref.ref(norm, forget), weakref.ref(conv)
    memo = _Memo(*modules, ending, unit, casts, momentum, capsule)
    _memos[key] = memo


def _forget(key: int, _: Any) -> None:
    _memos.pop(key, None)


def _capsule(norm: Any, conv: Any, tensors: Tensors) -> Any:
    of_conv, of_norm = vars(conv), vars(norm)
    facts = unwatched_facts(*tensors)
    if not isinstance(facts, bytes) or _leads_on(conv) or _leads_on(norm):
        return None
    names = "padding_mode", "stride", "padding", "dilation", "groups", "_parameters"
    kept = [(of_conv, name, of_conv[name]) for name in names]
    names = "training", "track_running_stats", "momentum", "eps", "_parameters", "_buffers"
    kept += [(of_norm, name, of_norm[name]) for name in names]
    kept += [(of_conv, name, _FALSE) for name in _HOOKS]
    kept += [(of_conv, name, _ABSENT) for name in ("forward", "_conv_forward")]
    kept += [(vars(_module), name, _FALSE) for name in _GLOBAL_HOOKS]
    kept_of_situation, asked = known_situation(tensors[0].device)
    params, buffers = of_norm["_parameters"], of_norm["_buffers"]
    sources: list[Any] = [
        _INPUT, (of_conv["_parameters"], "weight"), (of_conv["_parameters"], "bias"),
        (params, "weight"), (params, "bias"), (buffers, "running_mean"), (buffers, "running_var"),
        _RESIDUAL, (buffers, "num_batches_tracked"),
    ]  # fmt: skip
    for place, (source, tensor) in enumerate(zip(sources, tensors, strict=True)):
        if isinstance(source, tuple) and source[0].get(source[1]) is not tensor:
            if tensor is not None:
                return None
            sources[place] = _NONE  # statistics that are not in use
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in tensors[:3])
    assert native.cpu is not None
    return native.cpu.make_memo(
        (*kept, *kept_of_situation), tuple(asked), tuple(sources), facts, needs
    )


def _leads_on(module: Any) -> bool:
    """Whether attributes may lead from a module to its model, which a memo would keep alive: the
    garbage collector does not look into memos."""
    own = (value for name, value in vars(module).items() if name not in _OF_ALL)
    return bool(module._modules) or not all(map(_is_plain, own))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str))
