"""`gdfast.optim.SGD` beside `torch.optim.SGD`: steps, scaling, differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sgd_kernels import assert_as_close_as_native
from torch import Tensor
from torch.nn import Parameter

import gdfast
from gdfast import optim
from gdfast.errors import FallbackWarning

LR = 0.1
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.05, "maximize": True},
    "dampened": {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05, "maximize": True},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))

Make = Callable[..., torch.optim.SGD]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 3, 3, 3), (7,), (), (33, 5))
    return [Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def set_grads(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(
    make: Make, steps: int = 4, dtype: torch.dtype = torch.float32, **settings: Any
) -> list[Tensor]:
    """Parameters after some steps of fixed gradients, of which the last one's begin at step 3."""
    params = parameters(dtype)
    optimizer = make(params, lr=LR, **settings)
    for step in range(steps):
        set_grads(params, step)
        if step < 2:
            params[-1].grad = None
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("backend", ["auto", "native"])
@every_setting
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_match_the_default_loop(
    dtype: torch.dtype, settings: dict[str, Any], backend: str
) -> None:
    # The same starting values in every dtype: those of the narrow one.
    def wide(params: list[Parameter], **kw: Any) -> torch.optim.SGD:
        for p in params:
            p.data = p.data.to(dtype).double()
        return torch.optim.SGD(params, **kw)

    exact = train(wide, dtype=torch.float64, **settings)
    natives = train(torch.optim.SGD, dtype=dtype, foreach=False, **settings)
    with gdfast.backend(backend):
        ours = train(optim.SGD, dtype=dtype, **settings)
    # Gradients are rounded to the narrow type too, as in native: both share that error. All values
    # are judged together, since one that native hits exactly is luck after so many roundings.
    runs = ours, natives, exact
    assert_as_close_as_native(*(torch.cat([p.flatten() for p in params]) for params in runs))


def test_it_is_torch_optim_sgd_and_the_other_names_are_there() -> None:
    optimizer = optim.SGD(parameters(), lr=LR)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optim.Adam is torch.optim.Adam
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert "AdamW" in dir(optim)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = optim.Nothing
    names: dict[str, Any] = {}
    exec("from gdfast.optim import *", names)
    assert names["SGD"] is optim.SGD
    assert names["AdamW"] is torch.optim.AdamW
    theirs, ours = (repr(make(parameters())) for make in (torch.optim.SGD, optim.SGD))
    assert ours == theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"lr": torch.tensor([0.1, 0.2])},
        {"momentum": -0.5},
        {"weight_decay": -0.5},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
        {"capturable": True},
    ],
    ids=str,
)
def test_what_native_refuses_is_refused_in_its_words(settings: dict[str, Any]) -> None:
    with pytest.raises(Exception) as natives:
        torch.optim.SGD(parameters(), **settings)
    with pytest.raises(natives.type) as ours:
        optim.SGD(parameters(), **settings)
    assert str(ours.value) == str(natives.value)


def test_fused_zero_grad_and_differentiable_clash() -> None:
    with pytest.raises(RuntimeError, match="`fused_zero_grad` does not support `differentiable`"):
        optim.SGD(parameters(), fused_zero_grad=True, differentiable=True)


def test_no_parameters_and_sparse_gradients() -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        optim.SGD([])
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    for momentum in (0.0, 0.9):
        optimizer = optim.SGD(embedding.parameters(), lr=LR, momentum=momentum)
        with pytest.raises(RuntimeError, match="`_fused_sgd` does not support sparse gradients"):
            optimizer.step()


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("value", [False, True])
def test_flags_choose_nothing(flag: str, value: bool) -> None:
    expected = train(optim.SGD, momentum=0.9)
    result = train(optim.SGD, momentum=0.9, **{flag: value})
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_complex_parameters(fresh_registry: None) -> None:
    results = []
    for make in (torch.optim.SGD, optim.SGD):
        p = Parameter(torch.tensor([1 + 2j, -3j]))
        optimizer = make([p], lr=LR, momentum=0.9)
        for step in range(3):
            p.grad = torch.tensor([1 - 1j, 2j]) * step
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)
    optimizer = optim.SGD([p], fused=True)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating"):
        optimizer.step()


def test_several_groups_and_dtypes() -> None:
    results = []
    for make in (torch.optim.SGD, optim.SGD):
        params = [*parameters(), *parameters(torch.float64)]
        optimizer = make([{"params": params[::2], "lr": 0.2}], lr=LR, momentum=0.9, foreach=False)
        optimizer.add_param_group({"params": params[1::2], "momentum": 0.0, "weight_decay": 0.1})
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("lr", [torch.tensor(LR), torch.tensor([LR], dtype=torch.float64)], ids=str)
def test_lr_as_a_tensor_that_a_scheduler_changes(lr: Tensor) -> None:
    results = []
    for make, rate in ((torch.optim.SGD, LR), (optim.SGD, lr.clone())):
        params = parameters()
        optimizer = make(params, lr=rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            scheduler.step()
        results.append([p.detach() for p in params])
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (make is optim.SGD)
    torch.testing.assert_close(*results)


def test_weight_decay_as_a_tensor() -> None:
    expected = train(torch.optim.SGD, weight_decay=0.05)
    torch.testing.assert_close(train(optim.SGD, weight_decay=torch.tensor(0.05)), expected)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(unscale_first: bool, backend: str) -> None:
    """Three steps, of which the first and the last find an infinity."""
    results = []
    for make in (torch.optim.SGD, optim.SGD):
        params = parameters()
        optimizer = make(params, lr=LR, momentum=0.9, dampening=0.25)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
        for step in range(4):
            scaler.scale(torch.ones(()))
            set_grads(params, step, scaler.get_scale())
            if step in (0, 3):
                params[1].grad[2] = torch.inf
            if unscale_first:
                scaler.unscale_(optimizer)
            with gdfast.backend(backend):
                scaler.step(optimizer)
            if step in (1, 2):
                grads = [p.grad.clone() for p in params]
            else:
                assert (not optimizer.state[params[0]]) == (step == 0)
            scaler.update()
        results.append(([p.detach() for p in params], grads, scaler.get_scale()))
    torch.testing.assert_close(*results)


def test_fused_zero_grad_zeroes_in_place_and_in_skipped_steps() -> None:
    expected = train(torch.optim.SGD, momentum=0.9)
    params = parameters()
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, fused_zero_grad=True)
    for step in range(4):
        set_grads(params, step)
        if step < 2:
            params[-1].grad = None
        grads = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert not any(g.any() for g in grads if g is not None)
    torch.testing.assert_close([p.detach() for p in params], expected)

    fresh = optim.SGD(params, lr=LR, momentum=0.9, fused_zero_grad=True)
    for used in (optimizer, fresh):  # with momentum buffers and before there are any
        set_grads(params, 9)
        used.found_inf = torch.tensor(1.0)
        used.step()
        assert not any(p.grad.any() for p in params)
    torch.testing.assert_close([p.detach() for p in params], expected)
    assert not any("momentum_buffer" in state for state in fresh.state.values())


def test_a_step_between_forward_and_backward_raises() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = optim.SGD(layer.parameters(), lr=LR)
    for _ in range(2):  # the second step relies on what the first one checked
        loss = layer(torch.ones(2, 3)).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_same_parameter_twice_is_updated_twice() -> None:
    results = []
    for make in (torch.optim.SGD, optim.SGD):
        p = Parameter(torch.ones(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            optimizer = make([p, p], lr=LR, foreach=False)
        p.grad = torch.ones(3)
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@every_setting
@pytest.mark.parametrize("rate", ["lr", "weight_decay", "neither"])
def test_differentiable(settings: dict[str, Any], rate: str) -> None:
    # With lr as a tensor native saves the momentum buffer that its second step then changes.
    native_breaks = rate == "lr" and settings.get("momentum") and not settings.get("nesterov")

    def hypergradients(make: Make) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        chosen = dict(settings, lr=LR)
        leaves = [start]
        if rate != "neither":
            chosen[rate] = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
            leaves.append(chosen[rate])
        p = start.clone()
        optimizer = make([p], differentiable=True, **chosen)
        for _ in range(1 if native_breaks else 3):
            # A gradient that depends on the parameter, and stays in the graph.
            p.grad = p.clone() ** 2
            optimizer.step()
        return list(torch.autograd.grad((p**2).sum(), leaves))

    torch.testing.assert_close(hypergradients(optim.SGD), hypergradients(torch.optim.SGD))


def test_differentiable_refuses_a_leaf_as_native_does() -> None:
    p = Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=LR, differentiable=True)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step(backend: str) -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=LR, momentum=0.9)
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(4):
        set_grads(params, i)
        if i < 2:
            params[-1].grad = None
        step()
    torch._dynamo.reset()
    torch.testing.assert_close([p.detach() for p in params], train(torch.optim.SGD, momentum=0.9))


def test_many_threads_and_one_give_the_same(threads: None) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(300_000, generator=generator)) for _ in range(2)]
        for p in params:
            p.grad = p.detach() * 0.5
        optim.SGD(params, lr=LR, momentum=0.9).step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results)
