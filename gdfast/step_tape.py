"""A training step on the CPU that was recorded: its tape, and what it holds for.

A tape names memory. Where a parameter, a buffer or a state of the optimizer has moved since, or a
module of the model was replaced, it is of no use any more; `Surroundings` are what tells so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from gdfast import native
from gdfast.backends import available, chosen, triton_backend, tuning
from gdfast.ops.ordinary import dispatch_modes, ordinary_facts
from gdfast.tape import Recorder, Tape, extent

# Why a step may have to be recorded once more.
UNSETTLED = "the model's or the optimizer's state is another one after each step"

_OURS = {"cpu", "cuda", "triton", "reference"}
_address = torch._C.TensorBase.data_ptr
_requires_grad, _training = attrgetter("requires_grad"), attrgetter("training")


class Surroundings:
    """What a tape holds for: modules and how they are set, where parameters, buffers and the
    optimizer's state are, and the optimizer's settings."""

    def __init__(self, roots: Sequence[Module], optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._modules = list(roots)
        for module in self._modules:  # which grows meanwhile
            self._modules.extend(x for x in module._modules.values() if x is not None)
        # One pass over these dicts sees whatever was replaced.
        self._state, self._groups = optimizer.state, optimizer.param_groups
        self._dicts: list[Any] = [self._state, *self._state.values(), *self._groups]
        for m in self._modules:
            self._dicts += m._modules, m._parameters, m._buffers
        self._found = list(_values(self._dicts))  # so that no other object gets the id of one
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
            self._found, self._objects = list(_values(self._dicts)), now
        return True

    def _now(self) -> tuple[list[Any], ...]:
        return (
            list(map(id, _values(self._dicts))),
            list(map(id, self._optimizer.param_groups)),
            list(map(id, _params(self._optimizer.param_groups))),
            list(map(_training, self._modules)),
            list(map(_address, self.tensors)),
            list(map(_requires_grad, self.tensors)),
        )

    def _settings(self) -> list[Any]:
        """All that was found, numbers and the like by their values."""
        return [
            x if isinstance(x, (int, float, str, tuple, NoneType)) else id(x)
            for x in _values(self._dicts)
        ]

    def why_not(self) -> str:
        """Why no step can be recorded in them, or ""."""
        if any(module._compiled_call_impl is not None for module in self._modules):
            return "a module is compiled"
        for x in self.tensors:
            if type(x) not in (Tensor, Parameter) or x.layout is not torch.strided or not x.is_cpu:
                return f"a parameter or buffer is a {type(x).__name__}, {x.layout}, on {x.device}"
        return ""


def _params(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def _values(dicts: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))  # type: ignore[arg-type]


def kind(batch: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What decides how a step runs beside the model and the optimizer; None where it must be an
    ordinary one, because of its batch or because somebody looks at operators."""
    if dispatch_modes() or torch._C._is_torch_function_mode_enabled() or native.recorder():
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
        self, tape: Tape, loss: Tensor, grads: list[tuple[Tensor, Tensor | None]],
        added: list[tuple[Tensor, Tensor | None]], moved: list[Tensor],
    ) -> None:  # fmt: skip
        self.tape, self._loss = tape, loss
        # What parameters end with; what those that the optimizer leaves alone began with; what is
        # written in place, of which autograd is told.
        self._grads, self._added, self._moved = grads, added, moved

    def holds(self) -> bool:
        """Whether gradients that a step adds to are where they were."""
        return all(param.grad is grad for param, grad in self._added)

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        self.tape.bind(batch)
        self.tape.replay()
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
    batch, known = _apart(batch), around.tensors
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
    return Recording(loss.clone(), TapedStep(recorder.tape, loss, grads, added, moved), "")


def _apart(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch, with a copy of each tensor that shares memory with one before it: addresses tell
    them from each other."""
    found: list[Tensor] = []
    for tensor in batch:
        memory = extent(tensor)
        if any(x.start < memory.stop and memory.start < x.stop for x in map(extent, found)):
            tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(
                tensor
            )
        found.append(tensor)
    return tuple(found)
