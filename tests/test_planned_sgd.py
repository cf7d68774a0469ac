"""Steps of SGD that are taken again in one call, on the CPU: they notice what changes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_planned import layer_of, same
from torch import Tensor

from gdfast import optim
from gdfast.backends import plans

pytestmark = pytest.mark.usefixtures("fresh_registry", "compiled_cpu")


def trained(change: Callable[[Any, int], Any], planned: bool, **settings: Any) -> list[Tensor]:
    """Parameters and momenta after steps that a change is made between."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    optimizer = optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})
    batch = torch.randn(4, 7)
    for step in range(8):
        if planned:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            change(optimizer, step)
            optimizer.step()
        else:
            with plans.disabled():
                optimizer.zero_grad()
                model(batch).square().sum().backward()
                change(optimizer, step)
                optimizer.step()
    assert not planned or change is not _nothing or optimizer._again
    momenta = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    return [p.detach() for p in model.parameters()] + [m for m in momenta if m is not None]


def _nothing(*_: Any) -> None:
    pass


def _first(optimizer: Any) -> Tensor:
    first: Tensor = optimizer.param_groups[0]["params"][0]
    return first


def _at_six(change: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    return lambda optimizer, step: change(optimizer) if step == 5 else None


@pytest.mark.parametrize(
    "change",
    [
        _nothing,
        _at_six(lambda o: o.param_groups[0].update(lr=0.03)),
        _at_six(lambda o: o.param_groups[0].update(lr=torch.tensor(0.03))),
        _at_six(lambda o: o.param_groups[0].update(momentum=0.0)),
        _at_six(lambda o: o.param_groups[0].update(nesterov=True)),
        _at_six(lambda o: o.param_groups[0].update(weight_decay=0.1)),
        _at_six(lambda o: setattr(_first(o), "grad", None)),
        _at_six(lambda o: setattr(_first(o), "grad", _first(o).grad.t().contiguous().t())),
        _at_six(lambda o: o.state.pop(_first(o))),
        _at_six(lambda o: o.state.clear()),
        _at_six(lambda o: o.load_state_dict(copy.deepcopy(o.state_dict()))),
        _at_six(lambda o: o.param_groups[0]["params"].pop()),
        _at_six(lambda o: setattr(_first(o), "data", _first(o).data.clone())),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0}, {"fused_zero_grad": True}], ids=str)
def test_steps_notice_what_changes(change: Any, settings: dict[str, Any]) -> None:
    if settings.get("momentum") == 0 and change is not _nothing:
        settings = {"weight_decay": 0.01, "momentum": 0.5}
    same(trained(change, True, **settings), trained(change, False, **settings))


def test_steps_tell_autograd_what_they_wrote() -> None:
    weight = torch.nn.Parameter(torch.ones(40, 3))
    optimizer = optim.SGD([weight], lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert optimizer._again
    optimizer.zero_grad()
    loss = weight.square().sum()
    weight.grad = torch.ones_like(weight)
    version = weight._version
    optimizer.step()
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_and_its_parameters_are_freed() -> None:
    weight = torch.nn.Parameter(torch.ones(40, 3))
    optimizer = optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.owner = optimizer
    for _ in range(5):
        weight.square().sum().backward()
        optimizer.step()
    watched = weakref.ref(weight)
    del weight, optimizer
    gc.collect()
    assert watched() is None


def test_an_optimizer_whose_containers_were_replaced() -> None:
    layer, batch = layer_of("linear")
    optimizer = optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        layer(batch).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        step()
    (group,) = optimizer.param_groups
    group["params"] = tuple(group["params"])
    before = [p.detach().clone() for p in layer.parameters()]
    step()
    for param, old in zip(layer.parameters(), before, strict=True):
        assert not torch.equal(param, old)
