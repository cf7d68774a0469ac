"""linear: the kernels for few outputs, their gradients, and when native PyTorch runs instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdfast
from gdfast import native, nn, ops
from gdfast.backends import linear as kernels
from gdfast.ops.linear import LinearFunction

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "compiled_cpu")

# N, C, K: whole tiles and what is left of rows, outputs and columns; several tasks of each pass.
SIZES = [(64, 5408, 10), (1, 4096, 8), (5, 667, 16), (33, 1001, 7), (64, 785, 1), (130, 64, 9)]
# Few rows, many outputs: results written past the caches, and where lines do not let them be so.
SIZES += [(8, 2048, 130), (3, 1033, 257)]


def arguments(N: int, C: int, K: int, dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(N + C + K)
    tensors = [torch.randn(size, generator=generator) for size in ((N, C), (K, C), (K,))]
    return tuple(t.to(dtype).requires_grad_() for t in tensors[: 3 if bias else 2])


def results(function: Callable[..., Tensor], tensors: tuple[Any, ...]) -> list[Tensor]:
    output = function(*tensors)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


def is_ours(output: Tensor) -> bool:
    node = type(output.grad_fn).__name__
    return node in ("LinearFunctionBackward", "PlannedFunctionBackward")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64(
    sizes: tuple[int, int, int], bias: bool, dtype: torch.dtype, isa: str
) -> None:
    tensors = arguments(*sizes, dtype, bias)
    assert is_ours(ops.linear(*tensors))
    exact = results(F.linear, tuple(t.detach().double().requires_grad_() for t in tensors))
    natively = results(F.linear, tensors)
    # Native is exact itself in float64: there the roundings of as many terms as a sum has.
    terms = max(sizes) if dtype == torch.float64 else 4
    for ours, theirs, right in zip(results(ops.linear, tensors), natively, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        rounding = terms**0.5 * torch.finfo(dtype).eps * right.abs().max()
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + rounding


def test_tensors_elsewhere_are_not_for_the_kernels() -> None:
    tensors = arguments(64, 5408, 10, torch.float32)
    assert kernels.fits(*tensors)
    for index in range(3):
        moved = [t.to("meta") if i == index else t for i, t in enumerate(tensors)]
        assert not kernels.fits(*moved)


def test_sparse_tensors_are_natives() -> None:
    input, weight, bias = (t.detach() for t in arguments(64, 5408, 10, torch.float32))
    torch.testing.assert_close(
        ops.linear(input.to_sparse_csr(), weight, bias), F.linear(input, weight, bias),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.kernels
def test_each_gradient_alone_and_input_rows_apart() -> None:
    wide = torch.randn(40, 300)
    input, weight = wide[:, 10:210], torch.randn(10, 200)
    assert kernels.fits(input, weight, None)
    torch.testing.assert_close(ops.linear(input, weight), F.linear(input, weight))
    for wanted in range(3):
        tensors = [input.clone(), weight.clone(), torch.randn(10)]
        tensors[wanted].requires_grad_()
        output = ops.linear(*tensors)
        assert is_ours(output)
        output.square().sum().backward()
        gradient = tensors[wanted].grad
        tensors[wanted].grad = None
        F.linear(*tensors).square().sum().backward()
        torch.testing.assert_close(gradient, tensors[wanted].grad, rtol=1e-4, atol=1e-3)


def test_repeats_bit_by_bit_for_any_number_of_threads() -> None:
    tensors = arguments(64, 5408, 10, torch.float32)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(results(ops.linear, tensors))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_gradients_of_gradients() -> None:
    tensors = arguments(8, 600, 9, torch.float64)
    assert is_ours(ops.linear(*tensors))

    def through(i: int, tensor: Tensor) -> Tensor:
        return ops.linear(*tensors[:i], tensor, *tensors[i + 1 :])

    projection = torch.randn(8, 9, dtype=torch.float64)
    for second in range(2):
        grads = torch.autograd.grad(
            (ops.linear(*tensors).sin() * projection).sum(), tensors[:2], create_graph=True
        )
        natively = torch.autograd.grad(
            (F.linear(*tensors).sin() * projection).sum(), tensors[:2], create_graph=True
        )
        found = torch.autograd.grad(grads[second].square().sum(), tensors[:2])
        right = torch.autograd.grad(natively[second].square().sum(), tensors[:2])
        torch.testing.assert_close(found, right)


def test_nan_and_infinity_go_where_native_has_them() -> None:
    input, weight, bias = arguments(8, 600, 9, torch.float32)
    with torch.no_grad():
        input[2, 599], input[5, 3], weight[4, 100] = torch.nan, torch.inf, -torch.inf
    ours = results(ops.linear, (input, weight, bias))
    natively = results(F.linear, (input, weight, bias))
    for found, right in zip(ours, natively, strict=True):
        assert torch.equal(found.isnan(), right.isnan())
        assert torch.equal(found.isinf(), right.isinf())


def test_empty_batch_and_small_products_run_natively() -> None:
    weight = torch.randn(10, 5408, requires_grad=True)
    output = ops.linear(torch.empty(0, 5408), weight)
    assert output.shape == (0, 10) and not is_ours(output)
    assert not is_ours(ops.linear(torch.randn(2, 64), torch.randn(10, 64, requires_grad=True)))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.unsqueeze(0), w, b),
        lambda x, w, b: (x, w.repeat(2, 1), None),  # 20 outputs
        lambda x, w, b: (x[:17], w.repeat(40, 1), None),  # 17 rows
        lambda x, w, b: (x.half(), w.half(), b.half()),
        lambda x, w, b: (x.t().contiguous().t(), w, b),
        lambda x, w, b: (x, w.t().contiguous().t(), b),
    ],
    ids=["3-D", "many-outputs", "many-rows", "half", "columns-apart", "weight-transposed"],
)
def test_runs_natively_what_it_has_no_kernel_for(change: Callable[..., Any]) -> None:
    tensors = change(torch.randn(64, 800), torch.randn(10, 800), torch.randn(10))
    leaves = tuple(None if t is None else t.requires_grad_() for t in tensors)
    output = ops.linear(*leaves)
    assert not is_ours(output)
    torch.testing.assert_close(output, F.linear(*leaves))


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_what_is_not_needed_may_change_before_backward(frozen: str) -> None:
    input, weight, bias = arguments(64, 800, 10, torch.float32)
    leaves = [input, weight, bias]
    for i, name in enumerate(("input", "weight")):
        if frozen in (name, "both"):
            leaves[i] = leaves[i].detach()
    right = torch.autograd.grad(F.linear(*leaves).sum(), [t for t in leaves if t.requires_grad])
    output = ops.linear(*leaves)
    assert is_ours(output)
    with torch.no_grad():
        if frozen != "input":  # the weight has no gradient, so that the input is not needed
            leaves[0].add_(1)
        if frozen != "weight":
            leaves[1].add_(1)
    found = torch.autograd.grad(output.sum(), [t for t in leaves if t.requires_grad])
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3)


def test_a_bias_of_many_rows() -> None:
    rows = torch.rand(100_000, 64, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(3, requires_grad=True)
    output = ops.linear(rows, torch.randn(3, 64), bias)
    assert is_ours(output)
    grad = torch.rand(output.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(output, bias, grad)
    right = grad.double().sum(0)
    assert ((found - right).abs() / right).max() < 1e-7


def test_errors_are_natives() -> None:
    bad = torch.randn(64, 801)
    for call in (ops.linear, F.linear):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call(bad, torch.randn(10, 800), torch.randn(10))


def test_autocast_the_native_backend_and_transforms() -> None:
    tensors = arguments(64, 800, 10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(*tensors).dtype == torch.bfloat16
    with gdfast.backend("native"):
        assert not is_ours(ops.linear(*tensors))
    input, weight, bias = (t.detach() for t in tensors)
    jacobian = torch.func.jacrev(lambda w: ops.linear(input, w, bias).sum(0))(weight)
    right = torch.func.jacrev(lambda w: F.linear(input, w, bias).sum(0))(weight)
    torch.testing.assert_close(jacobian, right)


def test_layer_has_natives_state_and_trains_alike() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(800, 10)
    theirs = torch.nn.Linear(800, 10)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, torch.nn.Linear)
    batch = torch.randn(64, 800)
    assert is_ours(ours(batch))
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            layer(batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_swap_gives_small_linear_layers_our_operation() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 26 * 26, 10)
    )
    large = torch.nn.Linear(64, 100)
    batch = torch.randn(16, 1, 28, 28)
    expected = model(batch)
    report = gdfast.swap_(model, fuse=True, verify=batch)
    assert type(model[2]) is torch.nn.Linear
    assert [(row.parts, row.op) for row in report.fused] == [(["2"], "linear")]
    assert report.fused[0].errors["grad_weight"] < 1e-5
    assert is_ours(model(batch))
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)
    gdfast.restore_(model)
    assert not is_ours(model(batch))
    for other in (large, torch.nn.Linear(32, 4)):
        with pytest.warns(UserWarning, match="no layer was replaced"):
            assert not gdfast.swap_(other, fuse=True).fused


@pytest.mark.parametrize("size", [(640,), (16, 640), (8, 4, 640)], ids=str)
def test_verifies_inputs_of_any_dimensions(size: tuple[int, ...]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(640, 8))
    report = gdfast.swap_(model, fuse=True, verify=torch.randn(size))
    assert 0 <= report.fused[0].errors["grad_bias"] < 1e-5


def test_problem_is_checked() -> None:
    assert native.cpu is not None
    for arguments_, message in (
        ((1, 15, 1, 15, "float32"), "C >= 16"),
        ((-1, 64, 1, 64, "float32"), "N, K >= 0"),
        ((1, 64, 1, 64, "float16"), "float32 or float64"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cpu.LinearProblem(*arguments_)


def test_function_is_exported() -> None:
    assert ops.LinearFunction is LinearFunction
