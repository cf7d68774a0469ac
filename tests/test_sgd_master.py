"""The update of half-precision parameters in their float32 master copies: kernels and operation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_sgd_kernels import LR, SETTINGS, call, native_loop, randoms
from torch import Tensor

import gdfast
from gdfast import ops
from gdfast.errors import FallbackWarning

DTYPES = [torch.bfloat16, torch.float16]
FULL = {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05, "maximize": True}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def quartet(numel: int, dtype: torch.dtype) -> list[Tensor]:
    """A parameter, its gradient, momentum buffer and master copy."""
    master, buffer = randoms(2, numel, torch.float32)
    (grad,) = randoms(1, numel, dtype)
    return [master.to(dtype), grad, buffer, master]


def expected_of(quartet: list[Tensor], **settings: Any) -> list[Tensor]:
    """What the kernel for float32 makes of the master copy, the gradient widened first."""
    _, grad, buffer, master = quartet
    wide = [master.clone(), grad.float(), buffer.clone()]
    momenta = wide[2:] if settings.get("momentum") else []
    assert call(wide[:1], wide[1:2], momenta, **settings)
    return [wide[0].to(grad.dtype), wide[1].to(grad.dtype), wide[2], wide[0]]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, right in zip(ours, expected, strict=True):
        assert mine.dtype == right.dtype and torch.equal(mine, right)


@pytest.mark.kernels
@pytest.mark.parametrize("first_step", [False, True])
@every_dtype
def test_every_setting_is_bitwise_the_float32_update(
    isa: str, dtype: torch.dtype, first_step: bool
) -> None:
    for settings in SETTINGS:
        tensors = quartet(1003, dtype)
        how = dict(settings, first_step=first_step and settings["momentum"] > 0)
        expected = expected_of(tensors, **how)
        if first_step:
            tensors[2].fill_(torch.nan)
            if not settings["momentum"]:
                expected[2].fill_(torch.nan)
        lists = [[t] for t in tensors]
        lists[2] = lists[2] if settings["momentum"] else []
        assert call(*lists, **how)
        if settings["momentum"] or not first_step:
            assert_equal(tensors, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("numel", [0, 1, 7, 511, 513, 100003])
@every_dtype
def test_tails_unaligned_addresses_and_threads(
    isa: str, dtype: torch.dtype, numel: int, offset: int
) -> None:
    # Guards on both sides show a write out of bounds.
    kinds = (dtype, dtype, torch.float32, torch.float32)
    whole = [torch.full((numel + 8,), 77.0, dtype=kind) for kind in kinds]
    tensors = [t[offset : offset + numel] for t in whole]
    for tensor, value in zip(tensors, quartet(numel, dtype), strict=True):
        tensor.copy_(value)
    settings = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True, "grad_scale": 4.0}
    expected = expected_of(tensors, **settings)
    assert call(*([t] for t in tensors), threads=2, **settings)
    assert_equal(tensors, expected)
    for tensor in whole:
        assert (tensor[:offset] == 77).all()
        assert (tensor[offset + numel :] == 77).all()


def test_kernels_refuse_master_copies_of_what_is_no_half_type(compiled_cpu: None) -> None:
    p, g, m = torch.ones(3), torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="masters: expected none, because only params of half"):
        call([p], [g], [], [m])
    with pytest.raises(ValueError, match="masters: expected 1 entries"):
        call([p.half()], [g.half()], [], [m, m])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("first_step", [False, True])
@every_dtype
def test_the_operation_matches_the_default_loop_in_float32(
    dtype: torch.dtype, first_step: bool, backend: str
) -> None:
    for settings in SETTINGS:
        param, grad, buffer, master = quartet(1003, dtype)
        before = buffer if settings["momentum"] and not first_step else None
        expected, expected_buffer = native_loop(
            master, grad.float(), before, torch.float32, **settings
        )
        ops.sgd_(
            param, grad, buffer if settings["momentum"] else [], lr=LR, master_weights=master,
            first_step=first_step and settings["momentum"] > 0, backend=backend, **settings,
        )  # fmt: skip
        torch.testing.assert_close(master, expected)
        assert torch.equal(param, master.to(dtype))
        if settings["momentum"]:
            torch.testing.assert_close(buffer, expected_buffer)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@every_dtype
def test_a_master_copy_follows_what_was_changed_and_keeps_its_lower_bits_elsewhere(
    dtype: torch.dtype, backend: str
) -> None:
    param, grad, _, master = quartet(1003, dtype)
    grad.zero_()
    before = master.clone()
    assert not torch.equal(before, param.float())  # there are lower bits to be lost
    param[::7] = 3
    param[5] = torch.nan
    param[6] = torch.inf
    changed = param.float()
    ops.sgd_(param, grad, lr=LR, master_weights=master, backend=backend)
    was_changed = torch.zeros(1003, dtype=torch.bool)
    was_changed[::7] = was_changed[5] = was_changed[6] = True
    expected = torch.where(was_changed, changed, before)
    torch.testing.assert_close(master, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("zero_grad", [False, True])
@every_dtype
def test_scaled_gradients_and_a_found_infinity(
    dtype: torch.dtype, zero_grad: bool, backend: str
) -> None:
    param, grad, _, master = quartet(99, dtype)
    before, scaled = [param.clone(), master.clone()], grad * 4
    settings = {"lr": torch.tensor(LR), "zero_grad": zero_grad, "master_weights": master}
    scale = torch.tensor(4.0)
    ops.sgd_(
        param, scaled, grad_scale=scale, found_inf=torch.tensor(1.0), backend=backend, **settings
    )
    assert_equal([param, master], before)
    assert torch.equal(scaled, torch.zeros_like(grad) if zero_grad else grad * 4)
    scaled = grad * 4
    ops.sgd_(
        param, scaled, grad_scale=scale, found_inf=torch.tensor(0.0), backend=backend, **settings
    )
    torch.testing.assert_close(master, before[1] - LR * grad.float())
    assert torch.equal(param, master.to(dtype))
    assert torch.equal(scaled, torch.zeros_like(grad) if zero_grad else grad)


@pytest.mark.parametrize("odd", ["param", "grad", "buffer", "master"])
def test_any_memory_layout(odd: str) -> None:
    roles = dict(zip(("param", "grad", "buffer", "master"), quartet(120, DTYPES[0]), strict=True))
    roles = {name: tensor.view(4, 3, 2, 5) for name, tensor in roles.items()}
    expected = expected_of([t.flatten() for t in roles.values()], **FULL)
    roles[odd] = roles[odd].contiguous(memory_format=torch.channels_last)
    strides = roles[odd].stride()
    param, grad, buffer, master = roles.values()
    ops.sgd_(param, grad, buffer, lr=LR, master_weights=master, **FULL)
    assert_equal([t.flatten() for t in roles.values()], expected)
    assert roles[odd].stride() == strides


def test_several_dtypes_in_one_call() -> None:
    params = [torch.ones(5, dtype=dtype) for dtype in (*DTYPES, DTYPES[0])]
    masters = [torch.ones(5) for _ in params]
    ops.sgd_(params, [torch.full_like(p, 2) for p in params], lr=0.25, master_weights=masters)
    assert all((p == 0.5).all() for p in (*params, *masters))


def test_everything_that_is_written_has_a_new_version() -> None:
    tensors = quartet(9, DTYPES[0])
    before = [t._version for t in tensors]
    param, grad, buffer, master = tensors
    ops.sgd_(param, grad, buffer, lr=LR, momentum=0.9, master_weights=master)
    after = [t._version for t in tensors]
    assert [a > b for a, b in zip(after, before, strict=True)] == [True, False, True, True]


def test_what_does_not_fit_together_is_refused() -> None:
    param, grad, buffer, master = quartet(6, DTYPES[0])
    of_master = r"expected the dtype of a master copy, torch.float32, got torch.bfloat16"
    for arguments, words in (
        (([param, param], [grad, grad], [], [master]), "master_weights: expected 2 tensors, got 1"),
        ((master, master, [], master), r"params\[0\]: expected float16 or bfloat16, which alone"),
        ((param, grad, [], param), rf"master_weights\[0\]: {of_master}"),
        ((param, grad, [], master[:3]), r"master_weights\[0\]: expected the shape of its param"),
        ((param, grad, [], master.to("meta")), r"master_weights\[0\]: expected the device of its"),
        ((param, grad, [], master[:1].expand(6)), r"master_weights\[0\]: expected elements with"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            ops.sgd_(*arguments[:3], lr=LR, master_weights=arguments[3])
    with pytest.raises(RuntimeError, match=rf"momentum_buffers\[0\]: {of_master}"):
        ops.sgd_(param, grad, buffer.bfloat16(), lr=LR, momentum=0.9, master_weights=master)
    with pytest.raises(TypeError, match="master_weights: expected a tensor or a list of tensors"):
        ops.sgd_(param, grad, lr=LR, master_weights=4)  # type: ignore[arg-type]


def test_parameters_that_overlap_each_other_are_updated_in_order() -> None:
    base, masters = torch.arange(20.0).bfloat16(), [torch.arange(12.0), torch.arange(8.0, 20)]
    grads = [torch.ones(12).bfloat16(), torch.ones(12).bfloat16()]
    expected = base - 0.25 * (1 + (torch.arange(20) // 4 == 2).bfloat16())
    ops.sgd_([base[:12], base[8:]], grads, lr=0.25, master_weights=masters)
    assert torch.equal(base, expected)
    assert torch.equal(masters[1].bfloat16(), base[8:])


def test_compiled() -> None:
    def step(p: Tensor, g: Tensor, b: Tensor, m: Tensor) -> Tensor:
        ops.sgd_([p], [g], [b], lr=LR, master_weights=[m], **FULL)
        return p * 2

    eager = quartet(9, DTYPES[0])
    compiled = [t.clone() for t in eager]
    expected = step(*eager)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(result, expected)
    assert_equal(compiled, eager)


def test_tensor_subclasses_run_on_the_reference(fresh_registry: None) -> None:
    class Wrapped(Tensor):
        pass

    param, master = torch.ones(3).half().as_subclass(Wrapped), torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        ops.sgd_(param, torch.ones(3).half(), lr=0.5, master_weights=master)
    assert (param.as_subclass(Tensor) == 0.5).all() and (master == 0.5).all()


def test_native_backend_gives_the_same(compiled_cpu: None) -> None:
    results = []
    for backend in ("auto", "native"):
        torch.manual_seed(3)
        tensors = quartet(50, DTYPES[1])
        with gdfast.backend(backend):
            param, grad, buffer, master = tensors
            ops.sgd_(param, grad, buffer, lr=LR, master_weights=master, **FULL)
        results.append(master)
    torch.testing.assert_close(*results)
