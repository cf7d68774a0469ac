"""Which backend runs what: registration, refusal with reasons, and the process-wide choice.

1. One `register()` per backend; the order of registration is the order of preference.
2. `why_not` returns "" or a reason, from metadata alone: it never looks at a tensor's memory.
3. "auto" takes the first backend without a reason. Falling to the reference warns once and lists
   the reasons. A backend asked for by name runs or raises.
4. Every operation resolves by itself, so that a backend may have a forward and no backward.
5. A compiled module that does not load is a reason like any other, shown by `available()`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gdfast.errors import BackendError, FallbackWarning, mismatch
from gdfast.geometry import Conv2dGeometry

AUTO = "auto"
REFERENCE = "reference"
_ALIASES = {"native": REFERENCE}
_CACHE_LIMIT = 4096  # queries; a model has dozens, so only ever-changing image sizes get here


@dataclass(frozen=True)
class Query:
    """What an operation is asked to run on, as far as it decides who can."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.layout = torch.strided


@dataclass(frozen=True, kw_only=True)
class Conv2dQuery(Query):
    """The query of a convolution or of one of its gradients.

    `strides` are the element strides of input, weight and output, or of the gradients that take
    their places.
    """

    geometry: Conv2dGeometry
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Conv2dActQuery(Conv2dQuery):
    """The query of a convolution with an activation behind it."""

    activation: str
    negative_slope: float


@dataclass(frozen=True, kw_only=True)
class BatchNormQuery(Query):
    """The query of a batch normalisation with activation, or of its gradients.

    `size` is [N, C, H, W] and `strides` those of all tensors of that size, dense; `pre_activation`
    tells where the backward pass finds the activation's argument: "input" computes it again,
    "residual" too, "output" and "mask" read what tells as much.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    channels_last: bool
    param_dtype: torch.dtype
    training: bool
    eps: float
    activation: str
    negative_slope: float
    pre_activation: str


@dataclass(frozen=True)
class Backend:
    """One way of running the operations.

    `operations` maps an operation's name to what runs it. For a convolution that is a function
    from a Conv2dQuery to a kernel, a callable that takes the tensors: what depends on the geometry
    alone is done once. `missing` tells why the backend cannot be used on this machine at all,
    `why_not` why it refuses one query; "" means that it does not.
    """

    name: str
    operations: Mapping[str, Callable[..., Any]]
    missing: Callable[[], str] = field(default=lambda: "")
    why_not: Callable[[Query], str] = field(default=lambda query: "")

    def refusal(self, op: str, query: Query) -> str:
        """The first reason why this backend does not run `op` for `query`, or ""."""
        if reason := self.missing():
            return reason
        if op not in self.operations:
            return f"it has no {op} kernel"
        return self.why_not(query)


class Availability(NamedTuple):
    """Whether a backend can be used on this machine, and why it cannot."""

    name: str
    ok: bool
    reason: str


_backends: dict[str, Backend] = {}
_resolved: dict[tuple[str, Query, str], Backend] = {}
_warned: set[str] = set()

# A plain global: a ContextVar would break torch.compile(fullgraph=True), and a thread-local would
# be lost on autograd's own threads.
_switch = AUTO


def register(backend: Backend) -> None:
    """Adds a backend after those there are; one of the same name takes that one's place.

    The reference stays last. Raises ValueError for a name with a meaning of its own.
    """
    if backend.name == AUTO or backend.name in _ALIASES:
        raise ValueError(mismatch("register", "name", "a name of its own", repr(backend.name)))
    _backends[backend.name] = backend
    if REFERENCE in _backends:
        _backends[REFERENCE] = _backends.pop(REFERENCE)
    _resolved.clear()


def canonical(name: str) -> str:
    """The registered name that `name` stands for. Raises ValueError for an unknown one."""
    name = _ALIASES.get(name, name)
    if name != AUTO and name not in _backends:
        known = ", ".join([AUTO, *_backends, *_ALIASES])
        raise ValueError(mismatch("backend", "name", f"one of {known}", repr(name)))
    return name


def chosen(requested: str = AUTO) -> str:
    """The backend that a request means: "auto" stands for the process-wide choice."""
    return _switch if requested == AUTO else canonical(requested)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Sets the process-wide choice for as long as the context lasts, on all threads.

    It concerns what is called with backend="auto". Raises ValueError for an unknown name.
    """
    global _switch
    before, _switch = _switch, canonical(name)
    try:
        yield
    finally:
        _switch = before


def choose_from_environment() -> None:
    """Sets the process-wide choice from GDFAST_BACKEND, where it is set."""
    global _switch
    if name := os.environ.get("GDFAST_BACKEND"):
        try:
            _switch = canonical(name)
        except ValueError as error:
            raise ValueError(f"GDFAST_BACKEND={name}: {error}") from None


def resolve(op: str, query: Query, requested: str = AUTO) -> Backend:
    """The backend that runs `op` for `query`.

    Raises BackendError when the one asked for by name refuses, ValueError for an unknown name.
    """
    name = chosen(requested)
    key = op, query, name
    found = _resolved.get(key)
    if found is None:
        if len(_resolved) >= _CACHE_LIMIT:
            _resolved.clear()
        found = _resolved[key] = _first(op, query) if name == AUTO else _named(name, op, query)
    return found


def preview(op: str, query: Query) -> str:
    """The name of the backend that would run `op` now, without warning of the reference."""
    if _switch != AUTO:
        return _switch
    return next((name for name, b in _backends.items() if not b.refusal(op, query)), "none")


def _named(name: str, op: str, query: Query) -> Backend:
    backend = _backends[name]
    if reason := backend.refusal(op, query):
        raise BackendError(
            f"{op}: backend: {name!r} was asked for and cannot run this: {reason}. "
            "Ask for 'auto' to let another backend run it."
        )
    return backend


def _first(op: str, query: Query) -> Backend:
    reasons: list[str] = []
    for backend in _backends.values():
        reason = backend.refusal(op, query)
        if not reason:
            if backend.name == REFERENCE:
                _warn_once(op, reasons)
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise BackendError(f"{op}: no backend runs this: {'; '.join(reasons)}")


def fall_back(op: str, requested: str, reason: str) -> None:
    """Says that native PyTorch runs `op`, for a reason that no query carries.

    Warns once. Raises BackendError when another backend was asked for by name.
    """
    if requested not in (AUTO, REFERENCE):
        raise BackendError(
            f"{op}: backend: {requested!r} was asked for and cannot run this: {reason}."
        )
    if not torch.compiler.is_compiling():
        _warn_once(op, [reason])


def _warn_once(op: str, reasons: list[str]) -> None:
    message = f"{op}: running on native PyTorch ({'; '.join(reasons) or 'no other backend'})"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=2)


def available() -> list[Availability]:
    """Every registered backend in order of preference, with the reason where it cannot be used."""
    reasons = {backend.name: backend.missing() for backend in _backends.values()}
    return [Availability(name, not reason, reason) for name, reason in reasons.items()]
