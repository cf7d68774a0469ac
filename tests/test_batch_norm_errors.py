"""What ops.batch_norm_act refuses, and what it leaves to native PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_batch_norm import check_empty, native_norm, randoms

import gdfast
from gdfast import ops
from gdfast.errors import BackendError, FallbackWarning

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"weight": torch.ones(4)}, "weight: expected size"),
    ({"mean": torch.ones(4)}, "running_mean: expected size"),
    ({"mean": None}, "expected both running_mean and running_var"),
    ({"mean": None, "var": None, "training": False}, "defined in evaluation mode"),
    ({"bias": torch.ones(3).double()}, "mixed dtype"),
    ({"input": torch.randn(1, 3, 1, 1), "residual": None}, "more than 1 value per channel"),
    ({"eps": 0.0}, "eps: expected a positive number"),
    ({"eps": -1.0, "training": False}, "eps: expected a positive number"),
]


@pytest.mark.parametrize("changes, words", ERRORS, ids=[words for _, words in ERRORS])
def test_errors_are_of_native_types(changes: dict[str, Any], words: str) -> None:
    v: dict[str, Any] = {**randoms((2, 3, 4, 5)), "training": True, "eps": 1e-5} | changes
    arguments = [v[n] for n in ("input", "weight", "bias", "mean", "var", "residual")]
    settings = {"training": v["training"], "eps": v["eps"]}
    with pytest.raises((RuntimeError, ValueError), match=words) as ours:
        ops.batch_norm_act(*arguments, **settings)
    with pytest.raises(ours.type):
        native_norm(*arguments, **settings)


def test_unknown_names_raise() -> None:
    v = randoms((2, 3, 4, 5))
    for backend in ("auto", "native"):
        with pytest.raises(ValueError, match="activation: expected one of none, relu"):
            ops.batch_norm_act(
                v["input"], None, None, None, None, training=True, activation="tanh",
                backend=backend,
            )  # fmt: skip
    with pytest.raises(ValueError, match="backend"):
        ops.batch_norm_act(v["input"], None, None, None, None, training=True, backend="tpu")


@pytest.mark.parametrize("kind", ["3-D", "broadcast", "promoted"])
def test_what_native_alone_takes_says_so(kind: str) -> None:
    v = randoms((2, 3, 4, 5))
    input, residual = {
        "3-D": (v["input"][:, :, 0], None),
        "broadcast": (v["input"], v["residual"][:1]),
        "promoted": (v["input"].bfloat16(), v["residual"]),
    }[kind]
    arguments = input, v["weight"], v["bias"], None, None, residual
    with pytest.warns(FallbackWarning, match="running on native PyTorch"):
        ours = ops.batch_norm_act(*arguments, training=True)
    torch.testing.assert_close(ours, native_norm(*arguments))
    with pytest.raises(BackendError, match="'cpu' was asked for"):
        ops.batch_norm_act(*arguments, training=True, backend="cpu")


def test_an_empty_input_is_refused_like_any_other() -> None:
    with pytest.raises(BackendError, match="'cpu' was asked for and cannot run this"):
        check_empty((0, 3, 4, 5), True, "cpu", "meta")


def test_native_by_name_and_by_switch() -> None:
    v = randoms((2, 3, 4, 5))
    arguments = v["input"].requires_grad_(), v["weight"], v["bias"], None, None
    output = ops.batch_norm_act(*arguments, training=True, backend="native")
    assert "Relu" in type(output.grad_fn).__name__
    with gdfast.backend("native"):
        output = ops.batch_norm_act(*arguments, training=True)
    assert "Relu" in type(output.grad_fn).__name__
