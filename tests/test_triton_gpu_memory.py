"""The Triton kernels that memory bounds, on a GPU, which this needs: norms, pooling, SGD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_batch_norm import LAYOUTS, randoms
from test_cuda_batch_norm import SIZES
from test_cuda_batch_norm import check as check_norm
from test_max_pool2d import image_of
from test_sgd_kernels import LR, SETTINGS, assert_as_close_as_native, native_loop
from triton_here import NOT_IN_INTERPRETER

from gdfast import ops
from gdfast.backends.activation import ACTIVATIONS
from gdfast.bench.cases import ODD_POOLS, PoolCase

pytestmark = [
    pytest.mark.gpu,
    *NOT_IN_INTERPRETER,
    pytest.mark.usefixtures("fresh_registry", "nan_filled_memory", "no_tf32"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = torch.device("cuda")


@pytest.fixture
def no_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms_of_all_sizes(size: tuple[int, ...], layout: str) -> None:
    for training in (True, False):
        check_norm(randoms(size, layout=layout), GPU, False, training=training, backend="triton")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norms_with_activations(activation: str, residual: bool) -> None:
    values = randoms((3, 24, 5, 8), layout="channels_last")
    check_norm(
        values, GPU, residual, activation=activation, negative_slope=0.2, backend="triton"
    )  # fmt: skip


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_norms_of_half_types(dtype: torch.dtype, residual: bool) -> None:
    values = randoms((8, 64, 14, 14), dtype, "channels_last")
    ours = check_norm(values, GPU, residual, backend="triton")
    again = check_norm(values, GPU, residual, backend="triton")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", ODD_POOLS, ids=str)
def test_pooling(case: PoolCase, layout: str) -> None:
    for dtype in DTYPES if layout == "channels_last" else DTYPES[:1]:
        image = image_of(case, dtype, layout)
        results = []
        for max_pool2d, options in ((ops.max_pool2d, {"backend": "triton"}), (F.max_pool2d, {})):
            # Native's on the CPU: for NaN its GPU kernels differ from those.
            leaf = image.to(GPU if options else "cpu").detach().requires_grad_()
            output = max_pool2d(leaf, **case.arguments, **options)
            # Whole numbers, whose sums are exact in every order and dtype.
            generator = torch.Generator().manual_seed(2)
            grad = torch.randint(-3, 4, output.shape, generator=generator).to(output)
            (grad_input,) = torch.autograd.grad(output, leaf, grad)
            results.append((output.cpu(), grad_input.cpu()))
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_setting_of_sgd(dtype: torch.dtype, first_step: bool) -> None:
    sizes = [1, 7, 33, 8191, 8193, 100_003, *[5] * 120]
    for settings in SETTINGS:
        momentum = settings["momentum"]
        whole = [torch.randn(sum(sizes), device=GPU).to(dtype) for _ in range(3)]
        before = whole[2] if momentum and not first_step else None
        exact, _ = native_loop(*whole[:2], before, torch.float64, **settings)
        natives, _ = native_loop(*whole[:2], before, dtype, **settings)
        params, grads, buffers = (list(t.split(sizes)) for t in whole)
        ops.sgd_(
            params, grads, buffers if momentum else [], lr=LR, backend="triton",
            first_step=bool(momentum) and first_step, **settings,
        )  # fmt: skip
        assert_as_close_as_native(whole[0], natives, exact)


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_master_copies_and_scaled_gradients(dtype: torch.dtype, infinite: bool) -> None:
    sizes = [1, 7, 33, 8191, 8193, *[5] * 120]
    master, buffer, grad = torch.randn(3, sum(sizes)).unbind()
    results = []
    for name, device in (("reference", torch.device("cpu")), ("triton", GPU)):
        whole: list[Any] = [
            t.to(device, copy=True) for t in (master.to(dtype), grad.to(dtype), buffer, master)
        ]
        params, grads, buffers, masters = (list(t.split(sizes)) for t in whole)
        scalars = [torch.tensor(value, device=device) for value in (LR, 4.0, float(infinite))]
        ops.sgd_(
            params, grads, buffers, lr=scalars[0], momentum=0.9, weight_decay=0.05, nesterov=True,
            master_weights=masters, grad_scale=scalars[1], found_inf=scalars[2], backend=name,
        )  # fmt: skip
        results.append([t.cpu() for t in whole])
    torch.testing.assert_close(*results)
