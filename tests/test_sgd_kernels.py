"""The compiled SGD kernel called directly: instruction sets, dtypes, tails, alignment, threads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gdfast import native

pytestmark = pytest.mark.kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LR = 0.3
SETTINGS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
     "nesterov": nesterov, "maximize": maximize}
    for momentum, dampening, weight_decay, nesterov, maximize in product(
        (0.0, 0.9), (0.0, 0.25), (0.0, 0.05), (False, True), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening))
]  # fmt: skip


def call(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor],
    masters: Sequence[Tensor] = (), **settings: Any,
) -> bool:  # fmt: skip
    """One call of the kernel, on tensors rather than addresses."""
    arguments = {
        "lr": LR, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "grad_scale": 1.0,
        "nesterov": False, "maximize": False, "first_step": False, "zero_grad": False,
        "threads": 2,
    } | settings  # fmt: skip
    addresses = ([t.data_ptr() for t in tensors] for tensors in (params, grads, momenta, masters))
    numels = [p.numel() for p in params]
    dtype = str(params[0].dtype).removeprefix("torch.")
    done: bool = native.cpu.sgd(*addresses, numels, dtype, **arguments)
    return done


def native_loop(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, dtype: torch.dtype, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """What torch.optim.SGD's default loop makes of copies in `dtype`."""
    p = torch.nn.Parameter(param.to(dtype, copy=True))
    p.grad = grad.to(dtype, copy=True)
    optimizer = torch.optim.SGD([p], lr=LR, foreach=False, **settings)
    if momentum_buffer is not None:
        optimizer.state[p]["momentum_buffer"] = momentum_buffer.to(dtype, copy=True)
    optimizer.step()
    return p.detach(), optimizer.state[p].get("momentum_buffer")


def assert_as_close_as_native(ours: Tensor, natives: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice native's, plus one rounding of the largest value."""
    error = (ours.double() - exact).abs().max()
    native_error = (natives.double() - exact).abs().max()
    # A half type's last rounding alone is half an epsilon; native may hit the exact value.
    slack = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= 2 * native_error + slack, f"{error} > 2 * {native_error} + {slack}"


def randoms(count: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_setting_matches_the_default_loop(
    isa: str, dtype: torch.dtype, first_step: bool
) -> None:
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
        assert call([param], [grad], buffers, first_step=first_step, **settings)
        assert_as_close_as_native(param, natives, exact)
        assert torch.equal(grad, untouched)
        if natives_buffer is not None:
            assert exact_buffer is not None
            assert_as_close_as_native(buffer, natives_buffer, exact_buffer)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("numel", [0, 1, 7, 33, 513, 100003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails_and_unaligned_addresses(
    isa: str, dtype: torch.dtype, numel: int, offset: int
) -> None:
    # Guards on both sides show a write out of bounds.
    whole = [torch.full((numel + 8,), 77.0, dtype=dtype) for _ in range(3)]
    param, grad, buffer = (t[offset : offset + numel] for t in whole)
    for tensor in (param, grad, buffer):
        tensor.copy_(torch.randn(numel))
    settings = {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05}
    exact, _ = native_loop(param, grad, buffer, torch.float64, **settings)
    natives, _ = native_loop(param, grad, buffer, dtype, **settings)
    assert call([param], [grad], [buffer], zero_grad=True, **settings)
    if numel:
        assert_as_close_as_native(param, natives, exact)
    assert not grad.any()
    for tensor in whole:
        assert (tensor[:offset] == 77).all()
        assert (tensor[offset + numel :] == 77).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_does_not_depend_on_the_threads_or_on_how_tensors_are_cut(
    isa: str, dtype: torch.dtype
) -> None:
    sizes = [1, 40_000, 7, 0, 100_003, 33, 64]
    whole = randoms(3, sum(sizes), dtype)
    settings = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}
    expected = [t.clone() for t in whole]
    assert call(*([t] for t in expected), threads=1, **settings)
    for threads in (1, 2, 3):
        cut = [[t.clone() for t in w.split(sizes)] for w in whole]
        assert call(*cut, threads=threads, **settings)
        for one, parts in zip(expected, cut, strict=True):
            assert torch.equal(one, torch.cat(parts))


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_unscaled_and_stay_so_unless_zeroed(
    isa: str, dtype: torch.dtype, zero_grad: bool
) -> None:
    param, grad = randoms(2, 1003, dtype)
    unscaled, scaled, expected = grad.clone(), grad * 8, param.clone()
    assert call([expected], [grad], [])
    assert call([param], [scaled], [], grad_scale=8.0, zero_grad=zero_grad)
    assert torch.equal(param, expected)
    assert torch.equal(scaled, torch.zeros_like(grad) if zero_grad else unscaled)


def test_nan_and_infinity_go_through_as_in_native(isa: str) -> None:
    special = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")]
    param, grad, buffer = torch.cartesian_prod(*(torch.tensor(special),) * 3).unbind(1)
    param, grad, buffer = (t.contiguous() for t in (param, grad, buffer))
    for settings in SETTINGS:
        expected, _ = native_loop(param, grad, buffer, torch.float32, **settings)
        ours, its_buffer = param.clone(), buffer.clone()
        buffers = [its_buffer] if settings["momentum"] else []
        assert call([ours], [grad], buffers, **settings)
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_round_once_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    param = every[every.isfinite()].clone()
    grad = torch.ones_like(param)
    expected = torch.add(param.float(), grad.float(), alpha=-LR).to(dtype)
    assert call([param], [grad], [])
    assert torch.equal(param, expected)


def test_parameters_that_share_memory_are_left_alone(compiled_cpu: None) -> None:
    base, grad = torch.ones(20), torch.ones(12)
    assert not call([base[:12], base[8:]], [grad, grad], [])
    assert (base == 1).all()
    assert call([base[:10], base[10:]], [grad[:10], grad[:10]], [])


def test_lists_that_differ_in_length_and_unknown_dtypes_are_refused(compiled_cpu: None) -> None:
    p, g = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="grads: expected 1 entries"):
        call([p], [], [])
    with pytest.raises(ValueError, match="momenta: expected 1 entries"):
        call([p], [g], [], momentum=0.9)
    with pytest.raises(ValueError, match="momenta: expected 0 entries"):
        call([p], [g], [g])
    with pytest.raises(ValueError, match="dtype: expected float32"):
        call([p.int()], [g], [])


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
@pytest.mark.parametrize(
    ("dtype", "masters"),
    [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True), (torch.float16, True)],
    ids=str,
)
def test_columns_divided_between_threads_change_no_bit(
    isa: str, dtype: torch.dtype, threads: int, masters: bool
) -> None:
    torch.manual_seed(0)
    rows = [1, 10, 1, 3, 1]
    numels = [288, 10 * 5408, 0, 3 * 65, 10]
    state = torch.float32 if masters else dtype
    params = [randoms(1, n, dtype)[0] for n in numels]
    others = [randoms(1, n, dtype)[0] for n in numels], [randoms(1, n, state)[0] for n in numels]
    copies = [p.float() for p in params] if masters else []

    def updated(**more: Any) -> list[Tensor]:
        tensors = [[t.clone() for t in each] for each in (params, *others, copies)]
        assert call(*tensors, momentum=0.9, zero_grad=True, threads=threads, **more)
        return [tensor for each in tensors for tensor in each]

    for ours, plain in zip(updated(rows=rows), updated(), strict=True):
        assert torch.equal(ours, plain)


def test_rows_that_divide_no_matrix_are_refused() -> None:
    (param,), (grad,) = randoms(1, 10, torch.float32), randoms(1, 10, torch.float32)
    for rows in ([3], [0], [2, 5]):
        with pytest.raises(ValueError, match="rows"):
            call([param], [grad], [], rows=rows)
