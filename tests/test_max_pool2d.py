"""Max pooling: the kernels, their gradients of any order, and what the function does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gdfast import native, nn, ops
from gdfast.bench.cases import ODD_POOLS, PoolCase
from gdfast.errors import BackendError, FallbackWarning
from gdfast.ops.max_pool2d import pool, pool_grad

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu", "threads"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced")
SMALL = [case for case in ODD_POOLS if case.N * case.C * case.H * case.W < 500]


def image_of(case: PoolCase, dtype: torch.dtype, layout: str, special: bool = True) -> Tensor:
    """Few different values, so that many are equal; NaN and infinities among them."""
    shape = (case.N, case.C, case.H, case.W)
    image = torch.randint(-3, 4, shape).to(dtype)
    if special and image.numel():
        image.view(-1)[::37] = float("nan")
        image.view(-1)[3::11] = float("-inf")
        image.view(-1)[5::29] = float("inf")
    if layout == "channels_last":
        return image.to(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = image.new_zeros((case.N, case.C, case.H + 2, 2 * case.W))
        wide[:, :, 1:-1, ::2] = image
        return wide[:, :, 1:-1, ::2]
    return image


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_POOLS, ids=str)
def test_values_and_gradients_are_native_s(
    case: PoolCase, dtype: torch.dtype, layout: str, isa: str
) -> None:
    image = image_of(case, dtype, layout)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results = []
        for max_pool2d in (ops.max_pool2d, F.max_pool2d):
            leaf = image.detach().requires_grad_()
            output = max_pool2d(leaf, **case.arguments)
            generator = torch.Generator().manual_seed(2)
            # Whole numbers, whose sums are exact in every order and dtype.
            grad = torch.randint(-3, 4, output.shape, generator=generator).to(dtype)
            (grad_input,) = torch.autograd.grad(output, leaf, grad)
            (of_one,) = torch.autograd.grad(max_pool2d(leaf, **case.arguments).sum(), leaf)
            results.append((output, grad_input, of_one))
        for ours, native_s in zip(*results, strict=True):
            torch.testing.assert_close(ours, native_s, rtol=0, atol=0, equal_nan=True)
            if layout != "sliced":
                assert ours.stride() == native_s.stride()


@pytest.mark.kernels
@pytest.mark.parametrize("channels", [3, 40])
def test_a_window_that_sees_no_pixel(channels: int, isa: str) -> None:
    # Native's own index for it lies outside of the image.
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image = torch.randn(2, channels, 5, 2).to(memory_format=memory_format).requires_grad_()
        output = ops.max_pool2d(image, (3, 2), stride=1, padding=(0, 1), dilation=(1, 3))
        assert output.shape == (2, channels, 3, 1) and output.isneginf().all()
        (grad,) = torch.autograd.grad(output, image, torch.ones_like(output))
        assert torch.equal(grad, torch.zeros_like(image))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_POOLS, ids=str)
def test_relu(case: PoolCase, dtype: torch.dtype, isa: str) -> None:
    if case.dilation != (1, 1):
        pytest.skip("needs windows that see a pixel each")
    for layout in LAYOUTS:
        results = []
        image = image_of(case, dtype, layout)
        for ours in (True, False):
            leaf = image.detach().requires_grad_()
            if ours:
                kernel, stride, padding, dilation, ceil_mode = case.arguments.values()
                output = pool(leaf, kernel, stride, padding, dilation, ceil_mode, True, "cpu")
            else:
                output = F.max_pool2d(F.relu(leaf), **case.arguments)
            results.append((output, *torch.autograd.grad(output.sum(), leaf)))
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_of_any_order(case: PoolCase, backend: str) -> None:
    torch.set_num_threads(1)
    size = (case.N, case.C, case.H, case.W)
    # Values apart from each other, so that a numerical derivative changes no order.
    image = torch.randperm(case.N * case.C * case.H * case.W).double().view(size) / 7
    image.requires_grad_()
    arguments = (*case.arguments.values(), False, backend)
    assert gradcheck(lambda x: pool(x, *arguments), image)
    assert gradgradcheck(lambda x: pool(x, *arguments), image)
    of_op = torch.ops.gdfast.max_pool2d
    assert gradcheck(lambda x: of_op(x, *arguments)[0], image)
    assert gradgradcheck(lambda x: of_op(x, *arguments)[0], image)


def test_third_order_equals_native() -> None:
    image = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for max_pool2d in (ops.max_pool2d, F.max_pool2d):
        value = max_pool2d(image, 3, 2, 1).pow(4).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, image, create_graph=True)
            value = grad.pow(2).sum()
        results.append(torch.autograd.grad(value, image))
    torch.testing.assert_close(*results)


def test_batched_gradients() -> None:
    image = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(4, 2, 3, 4, 3, dtype=torch.float64)
    ours, native_s = (
        torch.autograd.grad(f(image, 3, 2, 1), image, basis, is_grads_batched=True)
        for f in (ops.max_pool2d, F.max_pool2d)
    )
    torch.testing.assert_close(ours, native_s)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("relu", [False, True])
def test_opcheck(backend: str, relu: bool) -> None:
    image = torch.randn(2, 3, 7, 6, requires_grad=True)
    windows = [3, 2], [2, 1], [1, 0], [1, 2], True
    torch.library.opcheck(torch.ops.gdfast.max_pool2d, (image, *windows, relu, backend))
    output, argmax = torch.ops.gdfast.max_pool2d(image, *windows, relu, backend)
    grad = torch.randn_like(output).requires_grad_()
    torch.library.opcheck(
        torch.ops.gdfast.max_pool2d_grad, (grad, argmax, image.shape, True, *windows, backend)
    )


def test_compiles_in_one_graph() -> None:
    def loss(image: Tensor) -> Tensor:
        return nn.MaxPool2d(3, 2, 1)(image).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, loss):
        image = torch.arange(2 * 3 * 7 * 6).remainder(17).float().view(2, 3, 7, 6).requires_grad_()
        value = function(image)
        results.append((value, *torch.autograd.grad(value, image)))
    torch.testing.assert_close(*results)


def test_transforms_run_on_native() -> None:
    image = torch.randn(2, 3, 7, 6)
    with pytest.warns(FallbackWarning, match="max_pool2d: running on native"):
        for transform in (torch.func.grad, torch.func.hessian):
            ours, native_s = (
                transform(lambda x, f=f: f(x, 3, 2, 1).square().sum())(image)
                for f in (ops.max_pool2d, F.max_pool2d)
            )
            torch.testing.assert_close(ours, native_s)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 0},
        {"kernel_size": (2, 2, 2)},
        {"kernel_size": 2, "stride": 0},
        {"kernel_size": 2, "stride": -1},
        {"kernel_size": 2, "padding": -1},
        {"kernel_size": 2, "padding": 2},
        {"kernel_size": 2, "dilation": 0},
        {"kernel_size": 9},
        {"kernel_size": 2.5},
        {"kernel_size": 2, "stride": "2"},
    ],
    ids=str,
)
def test_wrong_arguments_raise_as_natively(arguments: dict[str, Any]) -> None:
    image = torch.randn(2, 3, 5, 6)
    with pytest.raises((RuntimeError, TypeError)) as native_s:
        F.max_pool2d(image, **arguments)
    with pytest.raises(native_s.type, match="max_pool2d: "):
        ops.max_pool2d(image, **arguments)


@pytest.mark.parametrize("size", [(6,), (5, 6), (1, 2, 3, 5, 6), (2, 0, 5, 6), (2, 3, 0, 6)])
def test_wrong_sizes_raise_as_natively(size: tuple[int, ...]) -> None:
    for max_pool2d in (F.max_pool2d, ops.max_pool2d):
        with pytest.raises(RuntimeError):
            max_pool2d(torch.randn(size), 2)


def test_an_unbatched_image() -> None:
    image = torch.randn(3, 7, 6)
    torch.testing.assert_close(ops.max_pool2d(image, 2), F.max_pool2d(image, 2))


def test_what_no_kernel_takes_runs_on_native() -> None:
    image = torch.arange(36).view(1, 1, 6, 6)
    with pytest.warns(FallbackWarning, match=r"max_pool2d: running on native.*int64"):
        assert torch.equal(ops.max_pool2d(image, 2), F.max_pool2d(image, 2))
    with pytest.raises(BackendError, match="int64"):
        ops.max_pool2d(image, 2, backend="cpu")
    meta = ops.max_pool2d(torch.empty(2, 3, 6, 6, device="meta"), 2, backend="native")
    assert meta.shape == (2, 3, 3, 3)


def test_the_layer() -> None:
    arguments: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    ours, theirs = nn.MaxPool2d(**arguments), torch.nn.MaxPool2d(**arguments)
    image = torch.randn(2, 3, 8, 7)
    assert torch.equal(ours(image), theirs(image))
    assert isinstance(ours, torch.nn.MaxPool2d) and repr(ours) == repr(theirs)
    ours.return_indices = theirs.return_indices = True
    torch.testing.assert_close(ours(image), theirs(image))
    torch.testing.assert_close(
        nn.functional.max_pool2d(image, 2, return_indices=True),
        F.max_pool2d(image, 2, return_indices=True),
    )


def test_the_argmax_of_an_output_is_no_larger_than_needed() -> None:
    image = torch.randn(2, 3, 30, 30)
    for kernel, dtype in ((15, torch.uint8), (16, torch.int32)):
        windows = [kernel, kernel], [1, 1], [0, 0], [1, 1], False
        assert torch.ops.gdfast.max_pool2d(image, *windows, False, "cpu")[1].dtype == dtype


@pytest.mark.kernels
def test_bits_do_not_depend_on_the_threads() -> None:
    assert native.cpu is not None
    image = torch.randn(4, 20, 33, 31)
    windows = [3, 3], [2, 2], [1, 1], [1, 1], False
    grads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        output, argmax = torch.ops.gdfast.max_pool2d(image, *windows, False, "cpu")
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(output.shape, generator=generator)
        grads.append(pool_grad(grad, argmax, image.shape, False, *windows, "cpu"))
    assert torch.equal(*grads)
