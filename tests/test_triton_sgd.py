"""The SGD kernel in Triton's interpreter, against native's default loop and float64."""

from __future__ import annotations

import pytest
import torch
from test_sgd_kernels import LR, SETTINGS, assert_as_close_as_native, native_loop, randoms
from triton_here import IN_INTERPRETER, INTERPRETED

from gdfast import ops, optim

if INTERPRETED:
    from gdfast.backends.triton import bind_sgd

pytestmark = [
    *IN_INTERPRETER,
    pytest.mark.usefixtures("fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def forget() -> None:
    bind_sgd._launch.cache_clear()
    bind_sgd._tables.cache_clear()


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_setting_matches_the_default_loop(dtype: torch.dtype, first_step: bool) -> None:
    for settings in SETTINGS:
        if first_step and not settings["momentum"]:
            continue
        param, grad, buffer = randoms(3, 1003, dtype)
        before = None if first_step or not settings["momentum"] else buffer
        exact, exact_buffer = native_loop(param, grad, before, torch.float64, **settings)
        natives, natives_buffer = native_loop(param, grad, before, dtype, **settings)
        buffers = [buffer] if settings["momentum"] else []
        if first_step:
            buffer.fill_(torch.nan)
        untouched = grad.clone()
        version = param._version
        ops.sgd_(
            [param], [grad], buffers, lr=LR, first_step=first_step, backend="triton", **settings
        )
        assert param._version > version
        assert_as_close_as_native(param, natives, exact)
        assert torch.equal(grad, untouched)
        if natives_buffer is not None:
            assert exact_buffer is not None
            assert_as_close_as_native(buffer, natives_buffer, exact_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tensors_of_all_sizes_and_alignments(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bind_sgd, "_BLOCK", 256)
    forget()
    sizes = [1, 7, 0, 255, 256, 257, 1000, *range(1, 40)]
    whole = randoms(3, sum(sizes), dtype)
    settings = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}
    exact, exact_buffer = native_loop(*whole, torch.float64, **settings)
    natives, natives_buffer = native_loop(*whole, dtype, **settings)
    # Views: most of them begin between 16 bytes.
    parts = [list(tensor.split(sizes)) for tensor in whole]
    ops.sgd_(*parts, lr=LR, backend="triton", zero_grad=True, **settings)
    assert_as_close_as_native(whole[0], natives, exact)
    assert_as_close_as_native(whole[2], natives_buffer, exact_buffer)
    assert not whole[1].any()
    forget()


def test_a_tensor_past_32_bits_is_updated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind_sgd, "_PIECE", 64)
    forget()
    param, grad = randoms(2, 1003, torch.float32)
    expected, _ = native_loop(param, grad, None, torch.float64)
    ops.sgd_(param, grad, lr=LR, backend="triton")
    torch.testing.assert_close(param.double(), expected)
    forget()


@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradients_are_unscaled_and_stay_so_unless_zeroed(zero_grad: bool) -> None:
    param, grad = randoms(2, 103, torch.float32)
    expected, _ = native_loop(param, grad, None, torch.float32)
    scaled = grad * 8
    ops.sgd_(
        param, scaled, lr=torch.tensor(LR), grad_scale=torch.tensor(8.0),
        found_inf=torch.tensor(0.0), zero_grad=zero_grad, backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(param, expected)
    assert torch.equal(scaled, torch.zeros_like(grad) if zero_grad else grad)


@pytest.mark.parametrize("zero_grad", [False, True])
def test_nothing_is_updated_where_gradients_overflowed(zero_grad: bool) -> None:
    param, grad, buffer = randoms(3, 103, torch.float32)
    grad[3] = torch.inf
    before = param.clone(), grad.clone(), buffer.clone()
    ops.sgd_(
        param, grad, buffer, lr=LR, momentum=0.9, grad_scale=torch.tensor(8.0),
        found_inf=torch.tensor(1.0), zero_grad=zero_grad, backend="triton",
    )  # fmt: skip
    assert torch.equal(param, before[0]) and torch.equal(buffer, before[2])
    assert not grad.any() if zero_grad else torch.equal(grad, before[1])


def test_an_infinite_parameter_without_decay_stays_infinite() -> None:
    param, grad = torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, 1.0])
    ops.sgd_(param, grad, lr=0.5, backend="triton")
    assert param.tolist() == [torch.inf, 0.5]


def test_parameters_that_share_memory_are_updated_in_their_order() -> None:
    whole = torch.randn(40)
    expected = whole.clone()
    grads = [torch.randn(30), torch.randn(30)]
    for values, backend in ((whole, "triton"), (expected, "reference")):
        ops.sgd_([values[:30], values[10:]], grads, lr=LR, weight_decay=0.3, backend=backend)
    torch.testing.assert_close(whole, expected)


def test_the_optimizer_steps_on_it() -> None:
    import gdfast

    torch.manual_seed(1)
    layers = [torch.nn.Linear(5, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    pairs = zip(layers, (optim.SGD, torch.optim.SGD), strict=True)
    input = torch.randn(4, 5)
    with gdfast.backend("triton"):
        for layer, SGD in pairs:
            optimizer = SGD(layer.parameters(), **options)
            for _ in range(3):
                optimizer.zero_grad()
                layer(input).square().sum().backward()
                optimizer.step()
    torch.testing.assert_close(*(list(layer.parameters()) for layer in layers))


@pytest.mark.parametrize("name", ["dampened", "nesterov", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_copies_are_updated_in_float32(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bind_sgd, "_BLOCK", 512)
    forget()
    settings: dict[str, dict[str, float | bool]] = {
        "dampened": {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05, "maximize": True},
        "nesterov": {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
        "plain": {"momentum": 0.0},
    }
    how = settings[name]
    (param,) = randoms(1, 1003, dtype)
    master, wide, buffer, its_buffer = param.float(), param.float(), torch.zeros(1003), None
    for step in range(3):
        (grad,) = randoms(1, 1003, dtype)
        if step == 2:
            param[::5] = 2
            wide[::5] = 2
        wide, its_buffer = native_loop(wide, grad.float(), its_buffer, torch.float32, **how)
        ops.sgd_(
            param, grad * 4, [buffer] if how["momentum"] else [], lr=torch.tensor(LR),
            master_weights=master, grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0),
            first_step=step == 0 and how["momentum"] > 0, backend="triton", **how,
        )  # fmt: skip
        torch.testing.assert_close(master, wide)
        # The interpreter may cut off where a GPU rounds.
        torch.testing.assert_close(param.float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-7)
    before = param.clone(), master.clone()
    ops.sgd_(
        param, grad, lr=LR, master_weights=master, found_inf=torch.tensor(1.0), zero_grad=True,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(param, before[0]) and torch.equal(master, before[1])
    assert not grad.any()
    forget()


def test_many_tensors_with_master_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind_sgd, "_PIECE", 64)
    forget()
    sizes = [1, 7, 0, 100, *range(30, 64)]
    params = [p.half() for p in randoms(1, sum(sizes), torch.float32)[0].split(sizes)]
    masters, grads = [p.float() for p in params], [torch.full_like(p, 2) for p in params]
    expected = [p.float() - LR * 2 for p in params]
    ops.sgd_(params, grads, lr=LR, master_weights=masters, backend="triton", zero_grad=True)
    torch.testing.assert_close(masters, expected)
    torch.testing.assert_close([p.float() for p in params], [m.half().float() for m in masters])
    assert not any(g.any() for g in grads)
    forget()
