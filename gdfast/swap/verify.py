"""Runs a batch through a model, forward and backward, and leaves no trace."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from gdfast.errors import mismatch

Values = dict[str, list[Tensor]]  # what a layer gave, by kind and call
GRAD_OUTPUT = "grad_output"


class Recording:
    """What each layer gave in one run, by kind; GRAD_OUTPUT is what its gradients came from."""

    def __init__(self, layers: dict[str, Values], axes: dict[str, int]) -> None:
        self.layers = layers
        self.axes = axes  # where in a layer's output its channels are

    def errors(self, native: Recording) -> dict[str, dict[str, float]]:
        """The errors of `Replaced.errors`, of the call that has the largest; NaN is the largest."""
        return {
            name: {
                kind: worst(
                    _relative_error(*pair, native.size(name, kind, call))
                    for call, pair in enumerate(zip(values, native.layers[name][kind], strict=True))
                )
                for kind, values in kinds.items()
                if kind != GRAD_OUTPUT
            }
            for name, kinds in self.layers.items()
        }

    def size(self, name: str, kind: str, call: int) -> Tensor:
        """What an error of a value is relative to."""
        values = self.layers[name]
        if kind != "grad_bias":
            return torch.linalg.vector_norm(values[kind][call].double())
        sums = torch.zeros_like(values[kind][call], dtype=torch.float64)
        for grad in values[GRAD_OUTPUT]:
            rows = grad.double().abs().movedim(self.axes[name], 0).reshape(len(sums), -1)
            sums += rows.sum(1)
        return torch.linalg.vector_norm(sums)


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN is the largest."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def _relative_error(ours: Tensor, native: Tensor, size: Tensor) -> float:
    difference = torch.linalg.vector_norm(ours.double() - native.double())
    return (difference / size if size > 0 else difference).item()


def record(
    model: torch.nn.Module,
    layers: dict[str, torch.nn.Module],
    batch: Any,
    watched: Collection[str] | None = None,
) -> Recording:
    """Runs `batch` through `model` and records what the layers give, forward and backward.

    Of layers that are not `watched` (None: all are), only the gradients of parameters and the
    buffers are recorded: they get no hooks. The gradients are those of a fixed random weighting of
    all that the model puts out. Raises ValueError where nothing that it puts out has a gradient.
    """
    seen: dict[str, Values] = {name: {} for name in layers}
    sources: list[tuple[str, str, Any]] = []  # layer, kind, what to take the gradient in

    def hook_for(name: str) -> Any:
        def hook(
            layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if not isinstance(output, Tensor):
                return
            seen[name].setdefault("output", []).append(output.detach().clone())
            input = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), output)
            for kind, tensor in (("grad_input", input), (GRAD_OUTPUT, output)):
                if tensor.requires_grad:
                    # The edge stays what it is when a layer behind works in place on the tensor.
                    sources.append((name, kind, get_gradient_edge(tensor)))

        return hook

    for name, layer in layers.items():
        for kind, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                sources.append((name, f"grad_{kind}", parameter))
    with torch.inference_mode(False), torch.enable_grad(), _unchanged(model):
        handles = [
            layer.register_forward_hook(hook_for(name), with_kwargs=True)
            for name, layer in layers.items()
            if watched is None or name in watched
        ]
        try:
            output = _call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in layers.items():
            for kind, buffer in layer.named_buffers(recurse=False):
                seen[name][kind] = [buffer.clone()]
        if sources:
            # autograd.grad leaves every .grad alone.
            gradients = torch.autograd.grad(
                _weighted_sum(output), [source for _, _, source in sources], allow_unused=True
            )
            for (name, kind, _), gradient in zip(sources, gradients, strict=True):
                if gradient is not None:
                    seen[name].setdefault(kind, []).append(gradient)
    axes = {n: -1 if isinstance(m, torch.nn.Linear) else -3 for n, m in layers.items()}
    return Recording(seen, axes)


def _call(model: torch.nn.Module, batch: Any) -> Any:
    # A copy, so that a layer that works in place does not spoil the batch for the next run, and
    # that a batch made in inference mode has gradients.
    batch = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _weighted_sum(output: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    terms = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(leaf)).sum()
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if not terms:
        expected = "a batch for which the model puts out tensors that require gradients"
        raise ValueError(mismatch("swap_", "verify", expected, f"{type(output).__name__} without"))
    return torch.stack([term.double() for term in terms]).sum()


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Puts buffers and random numbers back to what they were."""
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                owner[name] = buffer.copy_(value)
