"""ops.batch_norm_act and autograd: gradients of any order, what is needed of them, and versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_batch_norm import SLOPE, native_norm, randoms
from torch import Tensor

from gdfast import ops
from gdfast.backends.activation import ACTIVATIONS
from gdfast.errors import FallbackWarning

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


def test_only_what_is_needed_is_computed() -> None:
    values = randoms((2, 6, 4, 5))
    names = "input", "weight", "bias", "residual"
    for needed in range(1, 16):
        wanted = [name for bit, name in enumerate(names) if needed >> bit & 1]
        for training in (True, False):
            results = []
            for function in (ops.batch_norm_act, native_norm):
                v = {n: t.clone().requires_grad_(n in wanted) for n, t in values.items()}
                output = function(
                    v["input"], v["weight"], v["bias"], v["mean"], v["var"], v["residual"],
                    training=training,
                )  # fmt: skip
                output.backward(values["grad"])
                results.append({n: v[n].grad for n in names})
            for name in names:
                assert (results[0][name] is None) == (name not in wanted)
                torch.testing.assert_close(results[0][name], results[1][name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(activation: str, training: bool) -> None:
    values = randoms((2, 3, 2, 3), torch.float64)
    leaves = [values[n].requires_grad_() for n in ("input", "weight", "bias", "residual")]

    def function(*v: Tensor) -> Tensor:
        stats = (None, None) if training else (values["mean"], values["var"])
        return ops.batch_norm_act(
            *v[:3], *stats, *v[3:], training=training, activation=activation, negative_slope=SLOPE
        )

    for count in (3, 4):
        assert torch.autograd.gradcheck(function, leaves[:count])
        assert torch.autograd.gradgradcheck(function, leaves[:count])
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("changed", ["input", "weight", "output"])
def test_a_change_before_backward_raises(changed: str) -> None:
    v = randoms((2, 3, 4, 5))
    input, weight = v["input"].requires_grad_(), v["weight"].requires_grad_()
    output = ops.batch_norm_act(input, weight, None, None, None, v["residual"], training=True)
    with torch.no_grad():
        {"input": input, "weight": weight, "output": output}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_running_statistics_change_their_version() -> None:
    v = randoms((2, 3, 4, 5))
    before = v["mean"]._version, v["var"]._version
    ops.batch_norm_act(v["input"], None, None, v["mean"], v["var"], training=False)
    assert (v["mean"]._version, v["var"]._version) == before
    ops.batch_norm_act(v["input"], None, None, v["mean"], v["var"], training=True)
    assert v["mean"]._version > before[0]
    assert v["var"]._version > before[1]


def test_transforms_run_natively() -> None:
    v = randoms((2, 3, 4, 5))

    def loss(function: Any, weight: Tensor) -> Tensor:
        return function(v["input"], weight, v["bias"], None, None, training=True).square().sum()

    with pytest.warns(FallbackWarning, match="torch.func"):
        ours = torch.func.grad(lambda w: loss(ops.batch_norm_act, w))(v["weight"])
    torch.testing.assert_close(ours, torch.func.grad(lambda w: loss(native_norm, w))(v["weight"]))
