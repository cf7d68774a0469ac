"""Verifying a swap on a batch: what is found, and that no trace is left."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from swap_models import BATCH, classes, make_model
from torch import Tensor

import gdfast
from gdfast import nn

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


def state_of(model: torch.nn.Module) -> Any:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    return buffers, *randomness, [p.grad for p in model.parameters()], model.training


def assert_same(before: Any, after: Any) -> None:
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
    assert torch.equal(before[1], after[1])
    assert before[2:4] == after[2:4]
    assert all(a is b for a, b in zip(before[4], after[4], strict=True))
    assert before[5] == after[5]


@pytest.mark.parametrize("training", [True, False])
def test_reports_errors_and_leaves_no_trace(training: bool) -> None:
    model = make_model().train(training)
    model(BATCH).sum().backward()
    before = state_of(model)
    buffers = list(model.buffers())
    report = gdfast.swap_(model, verify=BATCH)
    assert_same(before, state_of(model))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert not any(m._forward_hooks for m in model.modules())
    kinds = [set(row.errors) for row in report.replaced]
    assert kinds[0] == {"output", "grad_weight"}  # nobody asks for the gradient of the batch
    assert kinds[1] == {"output", "grad_input", "grad_weight"}
    assert kinds[3] == {"output", "grad_input", "grad_weight", "grad_bias"}
    errors = [error for row in report.replaced for error in row.errors.values()]
    assert all(0 <= error < 1e-5 for error in errors)
    assert any(error > 0 for error in errors)
    assert "grad_weight" in str(report).splitlines()[0]


def test_finds_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nn.Conv2d._conv_forward

    def wrong(self: Any, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        output = right(self, input, weight, bias)
        return output + 0.01 * output.detach() if self.groups > 1 else output

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", wrong)
    report = gdfast.swap_(make_model().eval(), verify=BATCH)
    errors = {row.name: row.errors["output"] for row in report.replaced}
    assert errors["block.conv1.0"] < 1e-5
    assert errors["block.conv2.0"] == pytest.approx(0.01, rel=0.01)


def test_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nn.Conv2d._conv_forward

    def wrong(self: Any, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        half = weight * 0.5 + weight.detach() * 0.5
        return right(self, input, half, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", wrong)
    report = gdfast.swap_(make_model().eval(), verify=BATCH)
    for row in report.replaced:
        assert row.errors["output"] < 1e-5
        assert row.errors["grad_weight"] == pytest.approx(0.5, rel=0.01)


def test_a_bias_before_batch_norm_has_no_size_of_its_own() -> None:
    # Its gradient is 0 but for rounding; relative to itself the error would be about 1.
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    report = gdfast.swap_(model, verify=BATCH)
    assert report.replaced[0].errors["grad_bias"] < 1e-6


def test_batches_of_several_arguments() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, left: Tensor, right: Tensor | None = None) -> dict[str, Any]:
            return {"sum": self.conv(left) + self.conv(right), "label": "text"}

    for batch in ((BATCH, BATCH), [BATCH, BATCH], {"left": BATCH, "right": BATCH}):
        report = gdfast.swap_(Two(), verify=batch)
        assert report.replaced[0].errors["grad_weight"] < 1e-5


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=self.conv(input=x))


def test_layers_called_by_keyword() -> None:
    errors = gdfast.swap_(Twice(), verify=BATCH).replaced[0].errors
    assert set(errors) == {"output", "grad_input", "grad_weight", "grad_bias"}
    assert max(errors.values()) < 1e-5


def test_nan_in_one_of_several_calls_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nn.Conv2d._conv_forward
    calls = 0

    def nan_at_last(self: Any, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return right(self, input, weight, bias) * (torch.nan if calls == 2 else 1.0)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", nan_at_last)
    report = gdfast.swap_(Twice(), verify=BATCH)
    assert calls == 2
    assert math.isnan(report.replaced[0].errors["output"])


def test_in_inference_mode() -> None:
    model = make_model()
    with torch.inference_mode():
        report = gdfast.swap_(model, verify=BATCH.clone())
    assert all(row.errors["grad_weight"] < 1e-5 for row in report.replaced)
    model(BATCH).sum().backward()  # nothing of the model became an inference tensor


def test_frozen_layers() -> None:
    model = make_model()
    model.get_submodule("stem").requires_grad_(False)
    report = gdfast.swap_(model, verify=BATCH)
    assert set(report.replaced[0].errors) == {"output"}
    assert set(report.replaced[1].errors) == {"output", "grad_weight"}


def test_a_batch_that_fails_leaves_the_model_native(monkeypatch: Any) -> None:
    model = make_model()
    with pytest.raises(RuntimeError, match="channels"):
        gdfast.swap_(model, verify=BATCH[:, :2])
    assert classes(model) == [torch.nn.Conv2d] * 4

    def fails(*_: Any) -> Tensor:
        raise KeyError("ours")

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", fails)
    before = state_of(model)
    with pytest.raises(KeyError, match="ours"):
        gdfast.swap_(model, verify=BATCH)
    assert classes(model) == [torch.nn.Conv2d] * 4
    assert_same(before, state_of(model))


def test_a_model_without_gradients_is_an_error() -> None:
    class Detached(torch.nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).detach()

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), Detached(3, 3, 1))
    with pytest.raises(ValueError, match=r"swap_: verify: expected a batch for which"):
        gdfast.swap_(model, verify=BATCH)
    assert classes(model)[0] is torch.nn.Conv2d


def test_works_for_swap_and_swapped() -> None:
    assert classes(gdfast.swap(make_model(), verify=BATCH)) == [nn.Conv2d] * 4
    with gdfast.swapped(make_model(), verify=BATCH) as report:
        assert all(row.errors for row in report.replaced)
