"""Which of several ways is the fastest: their times, and what native costs beside its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from gdfast.backends import cpu, cpu_algorithms, memory, tuning_timer
from gdfast.backends.choices import Choice
from gdfast.backends.registry import Conv2dQuery

NATIVE = "native"
BANDWIDTH = 20e9  # of a modest core, bytes a second
# How much faster native must be before it is preferred, for the noise of medians, and how much an
# algorithm that is less exact.
NATIVE_HANDICAP, _ERROR_HANDICAP = 1.01, 1.05
# What the host needs for native's call of a convolution on a GPU, measured in training steps; and
# by how much it may slow down what is recorded as a CUDA graph, where it costs nothing.
_NATIVE_CALL, _MOST_FOR_CALL = 60e-6, 1.3


def _result_bytes(op: str, query: Conv2dQuery) -> int:
    g = query.geometry
    sizes = {"conv2d_grad_input": g.input_size, "conv2d_grad_weight": g.weight_size}
    return prod(sizes.get(op, g.output_size)) * query.dtype.itemsize


def seconds_elsewhere(op: str, query: Conv2dQuery) -> float:
    """What native costs beside its own time: fresh memory for the result and, in a gradient, what
    ours would save where a batch normalisation stands behind the convolution, as most often one
    does. Its gradient is then neither written nor read by itself: a pass over memory for each.
    """
    seconds = memory.seconds_of_fresh_pages(_result_bytes(op, query))
    if op in ("conv2d_grad_input", "conv2d_grad_weight") and cpu.joins_norm(op, query):
        seconds += prod(query.geometry.output_size) * query.dtype.itemsize / (2 * BANDWIDTH)
    return seconds


def fastest(
    predicted: str, calls: Mapping[str, Callable[[], Any]], op: str, query: Conv2dQuery
) -> Choice:  # fmt: skip
    """The fastest; on a CPU, native's time has what it costs elsewhere beside it."""
    on_gpu = query.device.type == "cuda"
    if on_gpu:
        measured = tuning_timer.measure(calls, tuning_timer.OnGpu(query.device))
    else:
        measured = tuning_timer.measure(calls)
        if NATIVE in measured:
            measured[NATIVE] += seconds_elsewhere(op, query)
    if not measured:
        return Choice(predicted)
    seconds = {name: float(f"{value:.3e}") for name, value in measured.items()}
    return Choice(min(seconds, key=lambda name: weighed(name, seconds[name], on_gpu)), seconds)


def weighed(name: str, seconds: float, on_gpu: bool) -> float:
    """Seconds by which ways are compared."""
    if name != NATIVE:
        return seconds * (_ERROR_HANDICAP if cpu_algorithms.STATED_ERROR.get(name) else 1.0)
    if on_gpu:
        # In steps of short kernels the GPU waits for the host, which native's call keeps longer.
        seconds = max(seconds, min(_NATIVE_CALL, _MOST_FOR_CALL * seconds))
    return seconds * NATIVE_HANDICAP
