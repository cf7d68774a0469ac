"""A training step on the CPU that was recorded: its tape, and what it holds for.

A tape names memory. Where a parameter, a buffer or a state of the optimizer has moved since, or a
module of the model was replaced, it is of no use any more; `Surroundings` are what tells so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Module, Parameter
from torch.nn.modules import module as _module
from torch.optim import Optimizer

from gdfast import native
from gdfast.backends import available, chosen, triton_backend, tuning
from gdfast.ops.ordinary import dispatch_modes, ordinary_facts
from gdfast.tape import Recorder, Tape, extent

# Why a step may have to be recorded once more.
UNSETTLED = "the model's or the optimizer's state is another one after each step"

_OURS = {"cpu", "cuda", "triton", "reference"}
_address = torch._C.TensorBase.data_ptr
_requires_grad = attrgetter("requires_grad")
_hooks_of_tensor = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
_TENSORS = "_modules", "_parameters", "_buffers"
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_GLOBAL_HOOKS = [x for name, x in vars(_module).items() if name.startswith("_global_")
                 and name.endswith("_hooks")]  # fmt: skip
_STEP_HOOKS = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
# Beside numbers and the like, what a module may be set to and keeps through a step.
_FUNCTIONS = FunctionType, BuiltinFunctionType, MethodType, torch.dtype


class Surroundings:
    """What a tape holds for: modules, how they are set and their hooks, where parameters, buffers
    and the optimizer's state are, and the optimizer's settings."""

    def __init__(self, roots: Sequence[Any], optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._modules = [x for x in roots if isinstance(x, Module)]
        for module in self._modules:  # which grows meanwhile
            self._modules.extend(x for x in module._modules.values() if x is not None)
        # One pass over these dicts sees whatever was replaced.
        self._state, self._groups = optimizer.state, optimizer.param_groups
        self._dicts: list[Any] = [self._state, *self._state.values(), *self._groups]
        for m in self._modules:
            self._dicts += (getattr(m, name) for name in (*_TENSORS, *_HOOKS))
        self._dicts += _GLOBAL_HOOKS
        self._dicts += (getattr(optimizer, name) for name in _STEP_HOOKS)
        # What else they are set to is in here, beside much that is not compared.
        self._attributes = [vars(m) for m in self._modules]
        self._attributes += [
            vars(x) for x in roots if not isinstance(x, Module) and hasattr(x, "__dict__")
        ]
        self._found = self._all()  # so that no other object gets the id of one
        self.updated = list(_params(self._groups))
        tensors = (x for x in (*self._found, *self.updated) if isinstance(x, Tensor))
        self.tensors = list({id(x): x for x in tensors}.values())
        self._objects, self._facts = self._now(), self._settings()

    def hold(self) -> bool:
        """Whether all is as it was."""
        if self._optimizer.state is not self._state:
            return False
        now = self._now()
        if now != self._objects:
            # A setting may be another object of the same value: schedules assign them.
            if now[1:] != self._objects[1:] or self._settings() != self._facts:
                return False
            self._found, self._objects = self._all(), now
        return True

    def _all(self) -> list[Any]:
        return [*_values(self._dicts), *_values(self._attributes)]

    def _now(self) -> tuple[list[Any], ...]:
        return (
            list(map(id, chain(_values(self._dicts), _values(self._attributes)))),
            list(map(id, self._optimizer.param_groups)),
            list(map(id, _params(self._optimizer.param_groups))),
            list(map(_address, self.tensors)),
            list(map(_requires_grad, self.tensors)),
            list(map(_hooks_of_tensor, self.tensors)),
        )

    def _settings(self) -> list[Any]:
        """All that was found, numbers and the like by their values."""
        found = [_told(x) for x in _values(self._dicts)]
        # A module may also note there what it computes.
        attributes = [
            {name: _told(x) for name, x in each.items() if _is_setting(x)}
            for each in self._attributes
        ]
        return [found, attributes]

    def why_not(self) -> str:
        """Why no step can be recorded in them, or ""."""
        if any(module._compiled_call_impl is not None for module in self._modules):
            return "a module is compiled"
        for x in self.tensors:
            if type(x) not in (Tensor, Parameter) or x.layout is not torch.strided or not x.is_cpu:
                return f"a parameter or buffer is a {type(x).__name__}, {x.layout}, on {x.device}"
        return ""


def _told(value: Any) -> Any:
    """A value as it can be compared."""
    if isinstance(value, tuple):
        return tuple(map(_told, value))
    return value if isinstance(value, (int, float, str, NoneType)) else id(value)


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, (int, float, str, NoneType, *_FUNCTIONS))


def _params(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def _values(dicts: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))  # type: ignore[arg-type]


def kind(batch: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What decides how a step runs beside the model and the optimizer; None where it must be an
    ordinary one, because of its batch or because somebody looks at operators."""
    if dispatch_modes() or torch._C._is_torch_function_mode_enabled() or native.recorder():
        return None
    if not all(isinstance(x, Tensor) for x in batch):
        return None
    facts = ordinary_facts(*batch)  # of tensors alone
    if not facts or any(map(_requires_grad, batch)):
        return None
    return (
        facts, tuning.situation(), chosen(), torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
    )  # fmt: skip


def why_not(criterion: Any) -> str:
    """Why no step can be recorded in this process, or by this criterion, or ""."""
    if native.cuda_is_simulated or triton_backend.is_interpreted():
        return "GPU kernels are simulated on the CPU"
    if others := {each.name for each in available()} - _OURS:
        return f"other backends are registered: {', '.join(sorted(others))}"
    if hasattr(criterion, "_torchdynamo_orig_callable"):
        return "the criterion is compiled"
    return ""


class TapedStep:
    """A recorded step: a call with another batch of the same kind repeats it, and gives the loss.

    Parameters have the gradients of the last call then.
    """

    def __init__(
        self, tape: Tape, loss: Tensor, updated: list[Tensor],
        grads: list[tuple[Tensor, Tensor | None]], added: list[tuple[Tensor, Tensor | None]],
        moved: list[Tensor],
    ) -> None:  # fmt: skip
        self.tape, self._loss, self._updated = tape, loss, updated
        # What parameters end with; what those that the optimizer leaves alone began with; what is
        # written in place, of which autograd is told.
        self._grads, self._added, self._moved = grads, added, moved

    def holds(self) -> bool:
        """Whether gradients that a step adds to are where they were."""
        return all(param.grad is grad for param, grad in self._added)

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        self.tape.bind(batch)
        try:
            self.tape.replay()
        except BaseException:
            for param in self._updated:  # as an ordinary step begins
                param.grad = None
            raise
        finally:
            increment_version(self._moved)
        for param, grad in self._grads:
            if param.grad is not grad:
                param.grad = grad
        return self._loss.clone()


class Recording(NamedTuple):
    """A step that ran: its loss, and what repeats it or why nothing can."""

    loss: Tensor
    taped: TapedStep | None
    why_not: str


def record(
    step: Callable[[tuple[Tensor, ...]], Tensor], batch: tuple[Tensor, ...], around: Surroundings
) -> Recording:
    """Takes a step with a batch of which `kind` gives something, and records it."""
    known = around.tensors
    batch = _apart(batch, known)
    is_updated = set(map(id, around.updated))
    others = [x for x in known if x.requires_grad and id(x) not in is_updated]
    added = [(param, param.grad) for param in others]
    versions = [x._version for x in known]
    recorder = Recorder(batch, (*known, *(x for _, x in added if x is not None)))
    with recorder.running():
        loss = step(batch)
    reason = recorder.why_not
    if not around.hold():
        reason = reason or UNSETTLED
    if reason:
        return Recording(loss, None, reason)
    moved = [x for x, version in zip(known, versions, strict=True) if x._version != version]
    grads = [(param, param.grad) for param in (*around.updated, *others)]
    return Recording(
        loss.clone(), TapedStep(recorder.tape, loss, around.updated, grads, added, moved), ""
    )


def _apart(batch: tuple[Tensor, ...], known: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The batch, with a copy of each tensor that shares memory with one before it or one that is
    known: addresses tell them from each other."""
    taken = [extent(x) for x in known]
    found: list[Tensor] = []
    for tensor in batch:
        memory = extent(tensor)
        if any(x.start < memory.stop and memory.start < x.stop for x in taken):
            tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(
                tensor
            )
        found.append(tensor)
        taken.append(extent(tensor))
    return tuple(found)
