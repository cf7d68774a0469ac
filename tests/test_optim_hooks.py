"""What looks on at the steps of `gdfast.optim.SGD`: hooks, closures, profilers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_optim import LR, parameters, set_grads
from torch import Tensor

import gdfast
from gdfast import optim


def test_hooks_closure_and_profile_name() -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=LR)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state"))

    def closure() -> Tensor:
        calls.append("closure")
        assert torch.is_grad_enabled()
        set_grads(params, 0)
        return torch.tensor(5.0)

    with torch.no_grad(), torch.profiler.profile() as profile:
        loss = optimizer.step(closure)
    optimizer.state_dict()
    assert loss.item() == 5
    assert calls == ["pre", "closure", "post", "state"]
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_no_span_is_opened_where_no_profiler_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def span(name: str) -> None:
        raise AssertionError(name)

    params = parameters()
    optimizer = optim.SGD(params, lr=LR)
    set_grads(params, 0)
    monkeypatch.setattr(torch.autograd.profiler, "record_function", span)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(AssertionError, match=r"SGD\.step"):
        optimizer.step()


class _WithStep(gdfast.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _WithWrappedStep(gdfast.optim.SGD):
    @functools.wraps(gdfast.optim.SGD.step)
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("cls", [gdfast.optim.SGD, _WithStep, _WithWrappedStep])
def test_hooks_around_a_step_run_once(cls: type[gdfast.optim.SGD]) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    gdfast.optim.SGD([weight])  # torch looks at a class's step with its first optimizer
    cls([weight])  # and once only
    optimizer, seen = cls([weight], lr=0.5), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    weight.grad = torch.ones(3)
    optimizer.step()
    assert seen == ["before", "after"]
    assert weight.tolist() == [0.5] * 3


def test_profilers_see_steps_and_zero_grad() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = gdfast.optim.SGD([weight])
    weight.grad = torch.ones(3)
    with torch.profiler.profile() as profiled:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profiled.key_averages()}
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= names
    assert weight.grad is None
