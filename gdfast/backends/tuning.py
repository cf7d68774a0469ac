"""Which way each convolution runs: chosen once for each query, by timing or by a cost model.

The candidates are our algorithms that apply, as far as the precision allows (on a GPU: a few tiles
of the CUDA kernels, or of Triton's where there are none: those are compiled when they are first
called, which takes seconds each), and under the backend "auto" native PyTorch too. They are timed
at the first call of a query, on its own tensors; on a GPU only those are that give native's result
there (see `tuning_check`), and on a CPU "bf16" only where it gives that of "direct". A convolution
whose moments a batch normalisation takes is timed with that behind it. A choice once made is kept,
since another algorithm rounds otherwise. What was chosen is remembered in
a file (see `choices_file`), so that a machine pays for it once.

The cost model alone chooses (under "auto" that is native on a GPU, and for bfloat16 where there are
products of it: what has not been compared with it there does not run)
- what is too small to matter on a CPU, or would not be worth it: after so many sizes of one layer;
- under torch.use_deterministic_algorithms: what is timed may come out otherwise in the next run;
- in forked processes: there, timing would be of one thread on busy CPUs;
- while a CUDA graph is recorded: nothing may wait for the GPU then;
- with autotune("off").
A run that goes on from a checkpoint has the choices that it began with, whatever else holds.

Whatever keeps a kernel for later calls has `situation()` in the key that it is kept by.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from gdfast import native
from gdfast.backends import (
    choices_file,
    cpu,
    cpu_algorithms,
    cuda,
    triton_backend,
    tuning_check,
    tuning_norm,
)
from gdfast.backends.choices import MOST, Choice
from gdfast.backends.precision import is_strict
from gdfast.backends.registry import (
    AUTO,
    REFERENCE,
    Backend,
    Conv2dQuery,
    Query,
    resolve,
)
from gdfast.backends.tuning_fastest import BANDWIDTH, NATIVE, fastest
from gdfast.errors import BackendError, mismatch
from gdfast.tensor_cores import input_precision

OFF, FORCE = "off", "force"
MOMENTS = "conv2d_moments"  # a forward pass, of which a batch normalisation takes the moments

# The backends with several ways of running a convolution.
_CHOOSERS: dict[str, Any] = {"cpu": cpu, "cuda": cuda, "triton": triton_backend}
# A modest core: what it needs less time for than this is not worth choosing. On a GPU all is:
# what is not compared with native does not run there under "auto".
_FLOPS, _LEAST_SECONDS = 100e9, 50e-6
_MOST_SIZES = 16  # of the images of one layer that are timed in one process
_SECONDS_BETWEEN_SAVES = 2.0
# Parts of a situation's number: each is more than all before it, the first of which is threads.
_DETERMINISTIC, _EPOCH = 1 << 19, 1 << 20


class Use(NamedTuple):
    """A query, and how it was run: `timed` tells whether times decided."""

    op: str
    query: Conv2dQuery
    threads: int
    candidates: tuple[str, ...]
    choice: Choice


class _Session(NamedTuple):
    choices: dict[str, Choice]
    uses: list[Use]


# Plain globals, as the choice of the backend is, and for the same reasons. All but the reading of
# the first two happens under the lock; one thread may take it again, from a signal's handler.
_mode = AUTO
_epoch = 0
_session: _Session | None = None
_made: dict[str, Choice] = {}  # by times, in this process or, once the file was read, in others
_unsaved: dict[str, Choice] = {}
_forced: set[str] = set()  # timed in this process, whatever the file remembered
_sizes: Counter[tuple[Any, ...]] = Counter()
_file_was_read = _warned = _forked = False
_saved_at = float("-inf")
_lock = threading.RLock()


@contextmanager
def autotune(mode: str) -> Iterator[None]:
    """Sets how convolutions are chosen for as long as the context lasts, on all threads.

    "auto", the default, times a convolution's algorithms and native PyTorch at its first call,
    unless the choice is remembered from before, and keeps to the fastest; "off" asks a cost model
    alone, which always gives the same answer; "force" times everything once more, small
    convolutions too, and remembers that. The environment variable GDFAST_AUTOTUNE sets it for the
    whole process, GDFAST_CACHE_DIR the folder of the file that remembers (default: gdfast in the
    user's cache folder). Raises ValueError for another mode.
    """
    before = _mode
    _set_mode(_checked(mode))
    try:
        yield
    finally:
        _set_mode(before)


def mode() -> str:
    """How convolutions are chosen now: "auto", "off" or "force"."""
    return _mode


def choices() -> dict[str, Choice]:
    """What is known by times on this machine, from this process and those before, by query."""
    with _lock:
        _read_file()
        return dict(_made)


def forget() -> None:
    """Drops what is known by times, in this process and in the file.

    Raises OSError where the file cannot be removed.
    """
    global _epoch, _file_was_read
    with _lock:
        for known in (_made, _unsaved, _forced, _sizes):
            known.clear()
        _file_was_read = False
        _epoch += _EPOCH
        if file := choices_file.path():
            choices_file.remove(file)


@contextmanager
def recorded(choices: dict[str, Choice]) -> Iterator[list[Use]]:
    """Runs what `choices` has as it says, and adds to it whatever is chosen within the context.

    Gives the list of what ran, each query once, in the order of first use.
    """
    session = _Session(choices, [])
    before = _session
    _set_session(session)
    try:
        yield session.uses
    finally:
        _set_session(before)


def save() -> None:
    """Writes what has been chosen to the file now, for processes that start before this one ends.

    Otherwise that is done every few seconds, when something is chosen, and at the end.
    """
    with _lock:
        _save()


def situation() -> int:
    """A number for what a choice depends on beside its query.

    That is threads, precision, mode, session, and whether algorithms have to be deterministic.
    """
    # One number rather than a tuple, since this is part of every call's overhead.
    number = _epoch + torch.get_num_threads()
    if torch.are_deterministic_algorithms_enabled():
        number += _DETERMINISTIC
    return -number if is_strict() else number


def bind(
    op: str, query: Query, requested: str, arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], str]:
    """The kernel that runs `op` for `query` from now on, and the name of what was chosen.

    `arguments` are those of this call. The name is an algorithm's, "native", or the backend's.
    For `MOMENTS` it is a kernel of conv2d. Raises what `resolve` raises.
    """
    run = _run(op)
    backend = resolve(run, query, requested)
    if not isinstance(query, Conv2dQuery) or _chooser(backend) is None:
        return backend.operations[run](query), backend.name
    chooser = _chooser(backend)
    calls = {name: backend.operations[run](query, name) for name in chooser.candidates(run, query)}
    predicted = chooser.algorithm(run, query)
    if requested == AUTO:
        calls[NATIVE] = resolve(run, query, REFERENCE).operations[run](query)
        # Native's bfloat16 may run on AMX.
        pairs = predicted != cpu_algorithms.DIRECT and cpu_algorithms.bf16_applies(run, query)
        if query.device.type == "cuda" or pairs:
            predicted = NATIVE
    key = _key(op, query, tuple(calls), chooser.machine(query))
    with _lock, native.unrecorded():
        choice = _choose(key, op, query, predicted, calls, arguments)
        if _session is not None and len(_session.choices) < MOST:
            _session.choices[key] = choice
            _session.uses.append(Use(op, query, torch.get_num_threads(), tuple(calls), choice))
    return calls[choice.name], choice.name


def _run(op: str) -> str:
    """The operation whose kernels run another one."""
    return "conv2d" if op == MOMENTS else op


def _chooser(backend: Backend) -> Any:
    chooser = _CHOOSERS.get(backend.name)
    # Another backend may have been registered in the place of ours.
    return chooser if chooser is not None and backend is chooser.BACKEND else None


def _key(op: str, query: Conv2dQuery, names: tuple[str, ...], machine: str) -> str:
    # Everything that the query has, also what later kinds of queries may add; but of a device not
    # its number, so that the processes of one training, each with a GPU, share what was chosen.
    # `machine` has the GPU's name.
    values = {field.name: getattr(query, field.name) for field in fields(query)}
    values["device"] = query.device.type
    facts = " ".join(f"{name}={value}" for name, value in values.items())
    return f"{op} {'|'.join(names)} {machine} {facts}"


def _choose(
    key: str, op: str, query: Conv2dQuery, algorithm: str,
    calls: dict[str, Callable[..., Any]], arguments: tuple[Any, ...],
) -> Choice:  # fmt: skip
    global _saved_at
    if _session is not None and (choice := _session.choices.get(key)) and choice.name in calls:
        return choice
    predicted = Choice(algorithm)
    if len(calls) == 1 or query.geometry.N == 0 or _mode == OFF:
        return predicted
    if torch.are_deterministic_algorithms_enabled():
        return predicted
    _read_file()
    if (_mode != FORCE or key in _forced) and (choice := _made.get(key)) and choice.name in calls:
        return choice
    if _forked or (_mode != FORCE and not _is_worthwhile(op, query)):
        return predicted
    on_gpu = query.device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return predicted
    doubted = [n for n in calls if n != NATIVE and (on_gpu or n == cpu_algorithms.BF16)]
    if doubted:
        try:
            named = {name: calls[name] for name in doubted}
            right = _agreeing(_run(op), query, named, arguments)
            if op == MOMENTS:
                right = tuning_norm.agreeing({name: named[name] for name in right}, arguments)
        except RuntimeError:  # no memory for a comparison, or nothing to compare with
            return predicted
        calls = {n: call for n, call in calls.items() if n in right or n not in doubted}
        if not calls:
            raise BackendError(
                f"{op}: backend: none of its kernels gives native PyTorch's result for "
                f"{query.dtype} and {query.geometry}. Ask for 'auto' to let another backend run it."
            )
    if op == MOMENTS:
        calls = tuning_norm.followed(calls, query)
    calls = {name: partial(call, *arguments) for name, call in calls.items()}
    choice = fastest(predicted.name, calls, op, query)
    if not choice.seconds:
        return choice  # nothing was found out that would be worth remembering
    if _mode == FORCE:
        _forced.add(key)
    _made[key] = _unsaved[key] = choice
    if time.monotonic() - _saved_at > _SECONDS_BETWEEN_SAVES:
        _save()
        _saved_at = time.monotonic()
    return choice


def _is_worthwhile(op: str, query: Conv2dQuery) -> bool:
    g = query.geometry
    elements = prod(g.input_size) + prod(g.weight_size) + prod(g.output_size)
    number = elements * query.dtype.itemsize
    on_cpu = query.device.type != "cuda"
    if on_cpu and g.flops / _FLOPS + number / BANDWIDTH < _LEAST_SECONDS:
        return False
    layer = (op, query.dtype, g.weight_size, g.stride, g.padding, g.dilation, g.groups)
    _sizes[layer] += 1
    return _sizes[layer] <= _MOST_SIZES


def _agreeing(
    op: str, query: Conv2dQuery, calls: dict[str, Callable[..., Any]], arguments: tuple[Any, ...]
) -> list[str]:
    """Those of the calls that do what native does, or on a CPU what "direct" does: in bfloat16,
    native may round every part of a sum there.
    """
    plain = "conv2d" if op == "conv2d_act" else op
    on_gpu = query.device.type == "cuda"
    if on_gpu:
        exact, products = (
            resolve(name, query, REFERENCE).operations[name](query) for name in (op, plain)
        )
    else:
        no_act = Conv2dQuery(
            query.device, query.dtype, query.layout,
            geometry=query.geometry, strides=query.strides,
        )  # fmt: skip
        exact, products = (
            cpu.BACKEND.operations[name](each, cpu_algorithms.DIRECT)
            for name, each in ((op, query), (plain, no_act))
        )
    tf32 = on_gpu and input_precision(query.dtype, strict=False) == "tf32"
    return tuning_check.agreeing(op, calls, exact, products, arguments, tf32)


def _read_file() -> None:
    global _file_was_read
    if not _file_was_read:
        _file_was_read = True
        if file := choices_file.path():
            _made.update({**choices_file.read(file), **_made})


def _save() -> None:
    """Writes what is new; a file that cannot be written is told of once, and then done without."""
    global _warned
    file = choices_file.path()
    if file is None or _forked or not _unsaved:
        return
    try:
        _made.update({**choices_file.add(file, _unsaved, replacing=_mode == FORCE), **_made})
    except choices_file.Busy:
        return  # at the next time, then
    except OSError as error:
        if not _warned:
            _warned = True
            warnings.warn(
                f"autotune: {file}: expected a file that can be written, got: "
                f"{error.strerror or error}; choices are made anew in each process. "
                "Set GDFAST_CACHE_DIR to a folder that can be written to.",
                stacklevel=2,
            )
    _unsaved.clear()


def _checked(mode: str) -> str:
    if mode not in (AUTO, OFF, FORCE):
        expected = f"{AUTO!r}, {OFF!r} or {FORCE!r}"
        raise ValueError(mismatch("autotune", "mode", expected, repr(mode)))
    return mode


def _set_mode(mode: str) -> None:
    global _mode, _epoch
    with _lock:
        if mode != _mode:
            _mode = mode
            _epoch += _EPOCH


def _set_session(session: _Session | None) -> None:
    global _session, _epoch
    with _lock:
        _session = session
        _epoch += _EPOCH


def choose_from_environment() -> None:
    """Sets the mode from GDFAST_AUTOTUNE, where it is set."""
    if name := os.environ.get("GDFAST_AUTOTUNE"):
        try:
            _set_mode(_checked(name))
        except ValueError as error:
            raise ValueError(f"GDFAST_AUTOTUNE={name}: {error}") from None


def _after_fork() -> None:
    # The parent's lock may have been held by a thread that is not here.
    global _lock, _forked
    _lock = threading.RLock()
    _forked = True
    _unsaved.clear()


atexit.register(save)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
