"""State of `gdfast.optim.SGD`: saved, loaded, copied, and changed between steps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim import LR, Make, every_setting, parameters, set_grads, train
from torch import Tensor
from torch.nn import Parameter

from gdfast import optim


@every_setting
def test_state_dicts_are_interchangeable(settings: dict[str, Any]) -> None:
    makes: list[Make] = [torch.optim.SGD, optim.SGD]
    expected = train(torch.optim.SGD, **settings)
    for first, second in (makes, makes[::-1]):
        params = parameters()
        optimizer = first(params, lr=LR, **settings)
        for step in range(4):
            if step == 2:
                saved = io.BytesIO()
                torch.save(optimizer.state_dict(), saved)
                saved.seek(0)
                optimizer = second(params, lr=7.0)
                optimizer.load_state_dict(torch.load(saved, weights_only=True))
            set_grads(params, step)
            if step < 2:
                params[-1].grad = None
            optimizer.step()
        torch.testing.assert_close([p.detach() for p in params], expected)
    states = [make(parameters(), **settings).state_dict() for make in makes]
    assert states[0] == states[1]


def test_loading_a_state_does_not_change_who_zeroes() -> None:
    optimizer = optim.SGD(parameters(), lr=LR, fused_zero_grad=True)
    optimizer.load_state_dict(torch.optim.SGD(parameters(), lr=LR).state_dict())
    assert optimizer.fused_zero_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_deepcopy_and_pickle(duplicate: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, fused_zero_grad=True)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    twin = duplicate(optimizer)
    its_params = twin.param_groups[0]["params"]
    assert all(a is not b for a, b in zip(params, its_params, strict=True))
    for group in (params, its_params):
        set_grads(group, 2)
    optimizer.step()
    twin.step()
    for a, b in zip(params, its_params, strict=True):
        assert torch.equal(a, b)
        assert not b.grad.any()


def test_what_was_checked_is_checked_again_after_a_change() -> None:
    def run(make: Make) -> list[Tensor]:
        params = [Parameter(torch.ones(4, 6)), Parameter(torch.ones(5))]
        optimizer = make(params, lr=LR, momentum=0.9)
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()

        def forget() -> None:
            optimizer.state.clear()

        def new_momentum() -> None:
            optimizer.state[params[1]] = {"momentum_buffer": torch.full((5,), 2.0)}

        def new_memory() -> None:
            params[0].data = params[0].data * 2

        def transposed() -> None:
            params[0].data = params[0].data.t()
            optimizer.state[params[0]]["momentum_buffer"] = torch.ones(6, 4)

        def replaced() -> None:
            params[1] = optimizer.param_groups[0]["params"][1] = Parameter(params[1].data[:3])

        def wider() -> None:
            params[1].data = params[1].data.double()
            optimizer.state[params[1]] = {}

        for change in (forget, new_momentum, new_memory, transposed, replaced, wider, lambda: None):
            step()
            step()
            change()
            step()
        return [p.detach() for p in params]

    torch.testing.assert_close(run(optim.SGD), run(torch.optim.SGD))


def test_moving_a_parameter_without_its_momentum_is_an_error() -> None:
    p = Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=LR, momentum=0.9)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    p.data = p.data.double()
    p.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"momentum_buffers\[0\]: expected the dtype"):
        optimizer.step()
