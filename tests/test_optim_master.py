"""`gdfast.optim.SGD(master_weights=True)`: half-precision parameters with float32 master copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim import LR, every_setting, parameters, set_grads
from torch import Tensor
from torch.nn import Parameter

import gdfast
from gdfast import optim

DTYPES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def step(optimizer: torch.optim.Optimizer, params: list[Parameter], number: int) -> None:
    """A step of fixed gradients, of which the last parameter's begin at step 2."""
    set_grads(params, number)
    if number < 2:
        params[-1].grad = None
    optimizer.step()


def train(dtype: torch.dtype, steps: int = 4, **settings: Any) -> list[Tensor]:
    params = parameters(dtype)
    optimizer = optim.SGD(params, lr=LR, master_weights=True, **settings)
    for number in range(steps):
        step(optimizer, params, number)
    return [p.detach() for p in params]


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and all that is kept of them."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            found += [p.detach(), *(state[name] for name in sorted(state))]
    return found


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, right in zip(ours, expected, strict=True):
        assert mine.dtype == right.dtype and torch.equal(mine, right)


@pytest.mark.parametrize("backend", ["auto", "native"])
@every_setting
@every_dtype
def test_it_is_float32_training_with_rounded_weights(
    dtype: torch.dtype, settings: dict[str, Any], backend: str
) -> None:
    params, wide = parameters(dtype), [Parameter(p.detach().float()) for p in parameters(dtype)]
    make = optim.SGD if backend == "auto" else torch.optim.SGD
    reference = make(wide, lr=LR, **settings, foreach=False)
    optimizer = optim.SGD(params, lr=LR, master_weights=True, **settings)
    for number in range(5):
        set_grads(params, number)
        if number < 2:
            params[-1].grad = None
        for p, w in zip(params, wide, strict=True):
            w.grad = None if p.grad is None else p.grad.float()
        with gdfast.backend(backend):
            optimizer.step()
        reference.step()
    masters = [optimizer.state[p]["master_weight"] for p in params]
    assert_equal(masters, [w.detach() for w in wide])
    assert_equal([p.detach() for p in params], [m.to(dtype) for m in masters])
    if settings.get("momentum"):
        buffers = [[o.state[p]["momentum_buffer"] for p in o.param_groups[0]["params"]]
                   for o in (optimizer, reference)]  # fmt: skip
        assert_equal(*buffers)


@every_dtype
def test_small_updates_add_up(dtype: torch.dtype) -> None:
    moved = []
    for master_weights in (False, True):
        p = Parameter(torch.ones(1, dtype=dtype))
        optimizer = optim.SGD([p], lr=1e-4, master_weights=master_weights)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved.append(1 - p.item())
    assert moved[0] == 0  # each update is less than half of what the dtype can tell
    assert abs(moved[1] - 0.1) < torch.finfo(dtype).eps


def test_wide_parameters_beside_half_ones_have_no_master_copy() -> None:
    params = [Parameter(torch.ones(3, dtype=t)) for t in (*DTYPES, torch.float32, torch.float64)]
    optimizer = optim.SGD(params, lr=0.25, momentum=0.5, master_weights=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all((p == 1 - 0.25 - 0.375).all() for p in params)
    assert ["master_weight" in optimizer.state[p] for p in params] == [True, True, False, False]
    dtypes = [optimizer.state[p]["momentum_buffer"].dtype for p in params]
    assert dtypes == [torch.float32, torch.float32, torch.float32, torch.float64]
    only_wide = optim.SGD(params[2:], lr=LR, master_weights=True)
    only_wide.step()
    assert not any("master_weight" in state for state in only_wide.state.values())


@every_setting
@every_dtype
def test_a_resumed_run_is_bitwise_the_same(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    params = parameters(dtype)
    optimizer = optim.SGD(params, lr=LR, master_weights=True, **settings)
    for number in range(6):
        if number == 3:
            saved = io.BytesIO()
            torch.save([[p.detach() for p in params], optimizer.state_dict()], saved)
        step(optimizer, params, number)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    resumed = parameters(dtype)
    again = optim.SGD(resumed, lr=7.0, master_weights=True)
    again.load_state_dict(state)  # before the weights: the order does not matter
    for p, weight in zip(resumed, weights, strict=True):
        p.data.copy_(weight)
    for number in range(3, 6):
        step(again, resumed, number)
    assert_equal(everything(again), everything(optimizer))


@every_dtype
def test_a_state_of_native_can_be_loaded_and_the_other_way_round(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.05}
    params = parameters(dtype)
    native = torch.optim.SGD(params, lr=LR, **settings)
    for number in range(3):
        step(native, params, number)
    ours = optim.SGD(params, lr=7.0, master_weights=True)
    ours.load_state_dict(native.state_dict())
    for p in params:
        buffer = native.state[p]["momentum_buffer"]
        assert torch.equal(ours.state[p]["momentum_buffer"], buffer.float())
    step(ours, params, 3)
    assert ours.state[params[0]]["master_weight"].dtype == torch.float32

    native.load_state_dict(ours.state_dict())
    for p in params:
        wide = ours.state[p]["momentum_buffer"]
        assert wide.dtype == torch.float32
        assert torch.equal(native.state[p]["momentum_buffer"], wide.to(dtype))
    before = [p.detach().clone() for p in params]
    step(native, params, 4)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_loading_makes_copies_and_sees_what_hooks_make_of_the_state() -> None:
    params = parameters(DTYPES[0])
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, master_weights=True)
    step(optimizer, params, 0)
    saved = optimizer.state_dict()
    twin = optim.SGD(parameters(DTYPES[0]), lr=LR, momentum=0.9, master_weights=True)
    seen: list[torch.dtype] = []

    def doubled(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {k: v * 2 for k, v in s.items()} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    twin.register_load_state_dict_pre_hook(doubled)
    twin.register_load_state_dict_post_hook(
        lambda o: seen.extend(s["master_weight"].dtype for s in o.state.values())
    )
    for _ in range(2):  # hooks of ours do not stay behind
        twin.load_state_dict(saved)
    assert seen == [torch.float32] * 6
    ours, theirs = (next(iter(o.state.values()))["master_weight"] for o in (twin, optimizer))
    assert torch.equal(ours, theirs * 2)
    assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_deepcopy_and_pickle(duplicate: Callable[[Any], Any]) -> None:
    params = parameters(DTYPES[1])
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, master_weights=True)
    for number in range(3):
        step(optimizer, params, number)
    twin = duplicate(optimizer)
    assert twin.master_weights
    its_params = twin.param_groups[0]["params"]
    step(optimizer, params, 3)
    assert not torch.equal(its_params[0], params[0])
    step(twin, its_params, 3)
    assert_equal(everything(twin), everything(optimizer))


def change_in_place(p: Parameter) -> None:
    with torch.no_grad():
        p[:2] = 0.5


def change_data(p: Parameter) -> None:
    p.data[:2] = 0.5  # which autograd does not see


def replace_data(p: Parameter) -> None:
    p.data = torch.cat([torch.full_like(p.data[:2], 0.5), p.data[2:]])


@pytest.mark.parametrize("change", [change_in_place, change_data, replace_data])
def test_a_parameter_may_be_changed_between_steps(change: Callable[[Parameter], None]) -> None:
    params = parameters(DTYPES[0])
    optimizer = optim.SGD(params, lr=LR, master_weights=True)
    step(optimizer, params, 0)
    before = optimizer.state[params[0]]["master_weight"].clone()
    change(params[0])
    set_grads(params, 1)
    optimizer.step()
    before[:2] = 0.5
    expected = before - LR * params[0].grad.float()
    master = optimizer.state[params[0]]["master_weight"]
    torch.testing.assert_close(master, expected)
    assert torch.equal(params[0], master.bfloat16())


def test_weights_that_are_swapped_out_and_back_lose_nothing() -> None:
    params = parameters(DTYPES[0])
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, master_weights=True)
    for number in range(4):
        step(optimizer, params, number)
        kept = [p.detach().clone() for p in params]
        for p, k in zip(params, kept, strict=True):  # as for validation with averaged weights
            p.data.zero_()
            p.data.copy_(k)
    assert_equal([p.detach() for p in params], train(DTYPES[0], momentum=0.9))


def test_a_group_that_is_added_later() -> None:
    params = parameters(DTYPES[0])
    optimizer = optim.SGD(params[:2], lr=LR, momentum=0.9, master_weights=True)
    step(optimizer, params, 0)
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    step(optimizer, params, 2)
    masters = [optimizer.state[p]["master_weight"] for p in params]
    torch.testing.assert_close(masters[2], parameters(DTYPES[0])[2].float() - 0.5 * params[2].grad)
    assert_equal([p.detach() for p in params], [m.bfloat16() for m in masters])


def test_fused_zero_grad() -> None:
    params = parameters(DTYPES[1])
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, master_weights=True, fused_zero_grad=True)
    for number in range(4):
        step(optimizer, params, number)
        assert not any(p.grad.any() for p in params if p.grad is not None)
    assert_equal([p.detach() for p in params], train(DTYPES[1], momentum=0.9))


@pytest.mark.parametrize("backend", ["auto", "native"])
@every_dtype
def test_grad_scaler(dtype: torch.dtype, backend: str) -> None:
    """Four steps, of which the first and the last find an infinity."""
    params = parameters(dtype)
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, dampening=0.25, master_weights=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for number in range(4):
        scaler.scale(torch.ones(()))
        set_grads(params, number, scaler.get_scale())
        if number in (0, 3):
            params[1].grad[2] = torch.inf
        before = everything(optimizer)
        with gdfast.backend(backend):
            scaler.step(optimizer)
        if number == 0:
            assert not any("momentum_buffer" in state for state in optimizer.state.values())
        if number == 3:
            assert_equal(everything(optimizer), before)
        scaler.update()

    expected = parameters(dtype)
    optimizer = optim.SGD(expected, lr=LR, momentum=0.9, dampening=0.25, master_weights=True)
    for number in (1, 2):
        set_grads(expected, number)
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in expected])


def test_lr_as_a_tensor() -> None:
    expected = train(DTYPES[0], momentum=0.9)
    params = parameters(DTYPES[0])
    optimizer = optim.SGD(params, lr=torch.tensor(7.0), momentum=0.9, master_weights=True)
    optimizer.param_groups[0]["lr"].fill_(LR)
    for number in range(4):
        step(optimizer, params, number)
    torch.testing.assert_close([p.detach() for p in params], expected)


def test_a_model_that_becomes_half_in_the_middle_goes_on_from_its_momentum() -> None:
    p = Parameter(torch.randn(5))
    optimizer = optim.SGD([p], lr=LR, momentum=0.9, master_weights=True)
    p.grad = torch.ones(5)
    optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"].clone()
    p.grad = None
    p.data = p.data.half()
    p.grad = torch.ones(5).half()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], buffer * 0.9 + 1)


def test_a_compiled_step() -> None:
    params = parameters(DTYPES[0])
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, master_weights=True)
    compiled = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        set_grads(params, number)
        if number < 2:
            params[-1].grad = None
        compiled()
    torch._dynamo.reset()
    assert_equal([p.detach() for p in params], train(DTYPES[0], momentum=0.9))


def test_it_does_not_go_with_differentiable() -> None:
    with pytest.raises(RuntimeError, match="`master_weights` does not support `differentiable`"):
        optim.SGD(parameters(), master_weights=True, differentiable=True)
