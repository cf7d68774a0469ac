"""`ops.sgd_` and `ops.sgd`: parity with native, layouts, gradients, versions, the dispatcher."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_sgd_kernels import (
    DTYPES,
    LR,
    SETTINGS,
    assert_as_close_as_native,
    native_loop,
)
from torch import Tensor

import gdfast
from gdfast import ops
from gdfast.backends.sgd import lr_on
from gdfast.errors import BackendError, FallbackWarning

FULL = {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05, "maximize": True}
NESTEROV = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}


def tensors(count: int, *size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("settings", [FULL, NESTEROV, {}], ids=["full", "nesterov", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_matches_the_default_loop(
    dtype: torch.dtype, settings: dict[str, Any], backend: str
) -> None:
    triples = [tensors(3, *size, dtype=dtype) for size in ((5, 3), (), (1001,), (0, 4))]
    exact, natives = (
        [native_loop(p, g, m if settings else None, kind, **settings) for p, g, m in triples]
        for kind in (torch.float64, dtype)
    )
    params, grads, buffers = (list(role) for role in zip(*triples, strict=True))
    ops.sgd_(params, grads, buffers if settings else [], lr=LR, backend=backend, **settings)
    for i in range(3):  # the last is empty
        assert_as_close_as_native(params[i], natives[i][0], exact[i][0])
        if settings:
            assert_as_close_as_native(buffers[i], natives[i][1], exact[i][1])


def test_float32_is_bitwise_that_of_the_default_loop_where_both_have_fma() -> None:
    if gdfast.native.cpu is None or gdfast.native.cpu.isa() == "baseline":
        pytest.skip("needs AVX2 or AVX-512 kernels")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a PyTorch that runs AVX2 or AVX-512")
    for settings in SETTINGS:
        param, grad, buffer = tensors(3, 1003)
        expected, _ = native_loop(param, grad, buffer, torch.float32, **settings)
        ops.sgd_(param, grad, buffer if settings["momentum"] else [], lr=LR, **settings)
        assert torch.equal(param, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lr_as_a_tensor(backend: str) -> None:
    for lr in (torch.tensor(LR), torch.tensor([LR], dtype=torch.float64)):
        param, grad = tensors(2, 9)
        expected = param - lr.item() * grad
        ops.sgd_(param, grad, lr=lr, backend=backend)
        torch.testing.assert_close(param, expected)


def test_a_gpu_reads_lr_where_it_is_and_is_told_what_lies_elsewhere() -> None:
    lr = torch.tensor(0.5)
    assert lr_on(torch.device("cpu"), lr) is lr
    assert lr_on(torch.device("cuda", 0), lr) == lr_on(torch.device("cpu"), 0.5) == 0.5


def test_first_step_writes_the_buffer(nan_filled_memory: None) -> None:
    param, grad = tensors(2, 33)
    buffer = torch.empty_like(param)
    expected, expected_buffer = native_loop(param, grad, None, torch.float32, **FULL)
    ops.sgd_(param, grad, buffer, lr=LR, first_step=True, **FULL)
    torch.testing.assert_close(param, expected)
    torch.testing.assert_close(buffer, expected_buffer)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "transposed gradient": ((6, 5), lambda t: t.t().contiguous().t(), "grad"),
    "expanded gradient": ((6, 5), lambda t: t[:, :1].expand(6, 5), "grad"),
    "channels_last param": ((4, 3, 2, 5), channels_last, "param"),
    "channels_last momentum": ((4, 3, 2, 5), channels_last, "buffer"),
    "param with gaps": ((6, 5), lambda t: t.repeat(1, 2)[:, :5], "param"),
    "momentum with gaps": ((6, 5), lambda t: t.repeat(2, 1)[::2], "buffer"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_memory_layout(name: str, backend: str) -> None:
    size, change, role = LAYOUTS[name]
    roles = dict(zip(("param", "grad", "buffer"), tensors(3, *size), strict=True))
    roles[role] = change(roles[role])
    strides = roles[role].stride()
    param, grad, buffer = roles.values()
    expected, expected_buffer = native_loop(param, grad, buffer, torch.float32, **FULL)
    # One ordinary neighbour: whoever is odd must not drag it along.
    neighbour, its_grad, its_buffer = tensors(3, 4)
    ops.sgd_(
        [param, neighbour], [grad, its_grad], [buffer, its_buffer], lr=LR, backend=backend, **FULL
    )
    torch.testing.assert_close(param, expected)
    torch.testing.assert_close(buffer, expected_buffer)
    assert roles[role].stride() == strides


def test_axes_of_length_one_need_no_copy() -> None:
    param, grad = tensors(2, 8, 4, 1, 1)
    grad = channels_last(grad).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    expected = param - LR * grad
    ops.sgd_(param, grad, lr=LR, zero_grad=True)
    torch.testing.assert_close(param, expected)
    assert not grad.any()


def test_parameters_that_overlap_each_other_are_updated_in_order() -> None:
    base = torch.arange(20.0)
    params, grads = [base[:12], base[8:]], [torch.ones(12), torch.ones(12)]
    expected = base - LR * (1 + (torch.arange(20) // 4 == 2).float())
    ops.sgd_(params, grads, lr=LR)
    torch.testing.assert_close(base, expected)


def test_several_dtypes_in_one_call() -> None:
    params = [torch.ones(5, dtype=dtype) for dtype in (*DTYPES, torch.float32)]
    grads = [torch.full_like(p, 2) for p in params]
    ops.sgd_(params, grads, lr=0.25, zero_grad=True)
    assert all((p == 0.5).all() for p in params)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scaled_gradients_and_a_found_infinity(backend: str) -> None:
    param, grad = tensors(2, 9)
    before, scaled = param.clone(), grad * 4
    scale = torch.tensor(4.0)
    ops.sgd_(param, scaled, lr=LR, grad_scale=scale, found_inf=torch.tensor(1.0), backend=backend)
    assert torch.equal(param, before)
    assert torch.equal(scaled, grad * 4)
    ops.sgd_(param, scaled, lr=LR, grad_scale=scale, found_inf=torch.tensor(0.0), backend=backend)
    torch.testing.assert_close(param, before - LR * grad)
    assert torch.equal(scaled, grad)
    ops.sgd_(param, scaled, lr=LR, found_inf=torch.tensor(2.0), zero_grad=True, backend=backend)
    torch.testing.assert_close(param, before - LR * grad)
    assert not scaled.any()


def test_everything_that_is_written_has_a_new_version() -> None:
    param, grad, buffer = tensors(3, 9)

    def versions() -> list[int]:
        return [t._version for t in (param, grad, buffer)]

    before = versions()
    ops.sgd_(param, grad, buffer, lr=LR, momentum=0.9)
    after = versions()
    assert [a > b for a, b in zip(after, before, strict=True)] == [True, False, True]
    ops.sgd_(param, grad, lr=LR, zero_grad=True)
    assert [a > b for a, b in zip(versions(), after, strict=True)] == [True, True, False]


def test_a_step_between_forward_and_backward_raises() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(3, 3, requires_grad=True)
    loss = (x @ weight).sum()
    ops.sgd_(weight, torch.ones(3, 3), lr=LR)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_does_not_fit_together_is_refused() -> None:
    p, g = tensors(2, 4, 3)
    for grad, words in (
        (g[:3], r"grads\[0\]: expected the shape of its parameter, \[4, 3\], got \[3, 3\]"),
        (g.double(), r"grads\[0\]: expected the dtype of its parameter, torch.float32"),
        (g.to("meta"), r"grads\[0\]: expected the device of its parameter, cpu, got meta"),
        (g.to_sparse(), "`_fused_sgd` does not support sparse gradients"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.sgd_(p, grad, lr=LR)
    with pytest.raises(RuntimeError, match="`_fused_sgd` does not support sparse gradients"):
        ops.sgd_(torch.ones(1), torch.ones(1).to_sparse(), lr=LR)
    with pytest.raises(RuntimeError, match=r"params\[0\]: expected elements with memory of their"):
        ops.sgd_(torch.ones(1).expand(4), torch.ones(4), lr=LR)
    with pytest.raises(ValueError, match="momentum_buffers: expected 1 tensors, got 0"):
        ops.sgd_(p, g, lr=LR, momentum=0.9)
    with pytest.raises(ValueError, match="expected no tensors, because momentum is 0, got 1"):
        ops.sgd_(p, g, g, lr=LR)
    with pytest.raises(ValueError, match="grads: expected 2 tensors, got 1"):
        ops.sgd_([p, p], [g], lr=LR)
    with pytest.raises(ValueError, match="nowhere"):
        ops.sgd_(p, g, lr=LR, backend="nowhere")


def test_what_is_no_tensor_and_what_is_sparse() -> None:
    p = torch.ones(3)
    for arguments, words in (
        ((3, 4), "sgd_: params: expected a tensor or a list of tensors, got 3"),
        ((p, 4), "sgd_: grads: expected a tensor or a list of tensors, got 4"),
        (([p], [None]), r"sgd_: grads\[0\]: expected a tensor, got None"),
        ((p, p, 5), "sgd_: momentum_buffers: expected a tensor or a list"),
    ):
        with pytest.raises(TypeError, match=words):
            ops.sgd_(*arguments, lr=0.1)  # type: ignore[arg-type]
    words = r"sgd_: params\[0\]: expected a dense tensor, got torch.sparse_coo"
    with pytest.raises(RuntimeError, match=words):
        ops.sgd_(p.to_sparse(), p, lr=0.1)


def test_what_kernels_do_not_take_runs_on_the_reference_and_says_so(fresh_registry: None) -> None:
    param, grad = torch.ones(3, dtype=torch.complex64), torch.full((3,), 1j)
    with pytest.warns(FallbackWarning, match="complex64"):
        ops.sgd_(param, grad, lr=0.5)
    torch.testing.assert_close(param, torch.full((3,), 1 - 0.5j))
    with pytest.raises(BackendError, match="complex64"):
        ops.sgd_(param, grad, lr=0.5, backend="cpu")

    class Wrapped(Tensor):
        pass

    param = torch.ones(3).as_subclass(Wrapped)
    with pytest.warns(FallbackWarning, match="subclass"):
        ops.sgd_(param, torch.ones(3), lr=0.5)
    assert (param.as_subclass(Tensor) == 0.5).all()


def test_meta_tensors(fresh_registry: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        ops.sgd_(torch.ones(3, device="meta"), torch.ones(3, device="meta"), lr=LR)


def test_the_dispatcher_operation_passes_opcheck() -> None:
    def arguments(**changes: Any) -> dict[str, Any]:
        return {
            "lr": LR, "lr_tensor": None, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05,
            "nesterov": False, "maximize": True, "first_step": False, "zero_grad": True,
            "grad_scale": None, "found_inf": None, "backend": "auto",
        } | changes  # fmt: skip

    operation = torch.ops.gdfast.sgd_.default
    lists = tuple([*tensors(1, 3, 2), *tensors(1, 5)] for _ in range(3))
    torch.library.opcheck(operation, (*lists, []), arguments())
    torch.library.opcheck(
        operation, (*lists[:2], [], []),
        arguments(momentum=0.0, lr_tensor=torch.tensor(LR), grad_scale=torch.tensor(2.0)),
    )  # fmt: skip
    half = [[t.bfloat16() for t in lists[0]] for _ in range(2)]
    torch.library.opcheck(operation, (*half, *lists[1:]), arguments())


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["float", "tensor"])
def test_compiled(lr: float | Tensor) -> None:
    def step(p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        ops.sgd_([p], [g], [m], lr=lr, **FULL)
        return p * 2

    eager, compiled = tensors(3, 9), []
    compiled = [t.clone() for t in eager]
    expected = step(*eager)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(result, expected)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


FUNCTIONAL = [
    {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    {"weight_decay": 0.05, "maximize": True},
    {},
]


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("settings", FUNCTIONAL, ids=["full", "nesterov", "decay", "plain"])
def test_out_of_place_matches_in_place_and_leaves_its_operands(
    settings: dict[str, Any], first_step: bool
) -> None:
    param, grad, buffer = tensors(3, 5, 3)
    copies = [t.clone() for t in (param, grad, buffer)]
    new, new_buffer = ops.sgd(param, grad, None if first_step else buffer, lr=LR, **settings)
    assert all(torch.equal(t, c) for t, c in zip((param, grad, buffer), copies, strict=True))
    ops.sgd_(
        param, grad, buffer if settings.get("momentum") else [], lr=LR,
        first_step=first_step and "momentum" in settings, **settings,
    )  # fmt: skip
    assert torch.equal(new, param)
    if settings.get("momentum"):
        assert torch.equal(new_buffer, buffer)
    else:
        assert new_buffer is None


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("settings", FUNCTIONAL, ids=["full", "nesterov", "decay", "plain"])
def test_gradcheck_and_gradgradcheck(settings: dict[str, Any], first_step: bool) -> None:
    inputs = [t.requires_grad_() for t in tensors(3, 3, 2, dtype=torch.float64)]
    lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    settings = {name: value for name, value in settings.items() if name != "weight_decay"}

    def function(p: Tensor, g: Tensor, m: Tensor, lr: Tensor, decay: Tensor) -> Any:
        before = None if first_step else m
        new, buffer = ops.sgd(p, g, before, lr=lr, weight_decay=decay, **settings)
        return new if buffer is None else (new, buffer)

    if first_step or not settings.get("momentum"):
        inputs[2] = inputs[2].detach()
    assert torch.autograd.gradcheck(function, (*inputs, lr, decay))
    assert torch.autograd.gradgradcheck(function, (*inputs, lr, decay))


def test_gradients_only_where_they_are_needed() -> None:
    param, grad, buffer = tensors(3, 4)
    new, new_buffer = ops.sgd(param, grad.requires_grad_(), buffer, lr=LR, momentum=0.9)
    param.add_(1)  # nothing looks back at it
    (new.sum() + new_buffer.sum()).backward()
    assert torch.allclose(grad.grad, torch.full((4,), 1 - LR))
    assert param.grad is None


def test_torch_func_and_forward_mode_run_on_plain_operators(fresh_registry: None) -> None:
    param, grad, buffer = tensors(3, 5, 3)

    def new_param(p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        return ops.sgd(p, g, m, lr=LR, **FULL)[0]

    expected = new_param(param, grad, buffer)
    with pytest.warns(FallbackWarning, match="torch.func"):
        result = torch.func.vmap(new_param)(param, grad, buffer)
    torch.testing.assert_close(result, expected)
    tangents = tuple(tensors(3, 5, 3))
    _, tangent = torch.func.jvp(new_param, (param, grad, buffer), tangents)
    torch.testing.assert_close(tangent, new_param(*tangents))  # it is linear


def test_compiled_out_of_place() -> None:
    param, grad, buffer = (t.requires_grad_() for t in tensors(3, 5, 3))

    def loss(p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        return ops.sgd(p, g, m, lr=LR, **FULL)[0].square().sum()

    expected = torch.autograd.grad(loss(param, grad, buffer), (param, grad, buffer))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result = torch.autograd.grad(compiled(param, grad, buffer), (param, grad, buffer))
    torch.testing.assert_close(result, expected)
