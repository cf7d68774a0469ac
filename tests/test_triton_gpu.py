"""The Triton kernels on a GPU, which this needs: results, layouts, graphs, `auto`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_training import check_training
from test_models import TRAINED
from torch import Tensor
from triton_here import NOT_IN_INTERPRETER

import gdfast
from gdfast import models, ops, optim
from gdfast.bench.cases import ODD, RESNET50, Conv2dCase
from gdfast.bench.workload import allowed_error, relative_error
from gdfast.geometry import Conv2dGeometry

triton = pytest.importorskip("triton", reason="needs triton: pip install 'gdfast[triton]'")

from gdfast.backends.triton import bind_conv2d  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    *NOT_IN_INTERPRETER,
    pytest.mark.usefixtures("fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_tf32() -> Any:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


def passes(case: Conv2dCase, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    input, weight, bias, grad = tensors
    arguments = case.stride, case.padding * 2, case.dilation, case.groups, backend
    last = not input.is_contiguous()
    return (
        torch.ops.gdfast.conv2d(input, weight, bias, *arguments),
        torch.ops.gdfast.conv2d_grad_input(grad, weight, input.shape, last, *arguments),
        *torch.ops.gdfast.conv2d_grad_weight(grad, input, weight.shape, last, True, *arguments),
    )


def check(case: Conv2dCase, dtype: torch.dtype, layout: torch.memory_format) -> None:
    sizes = case.input_shape, case.weight_shape, (case.K,), case.output_shape
    exact_tensors = [torch.randn(size).to(dtype).double() for size in sizes]
    exact = passes(case, "reference", *exact_tensors)
    tensors = [tensor.to("cuda", dtype) for tensor in exact_tensors]
    tensors = [t.to(memory_format=layout) if t.dim() == 4 else t for t in tensors]
    natives = passes(case, "reference", *tensors)
    ours = passes(case, "triton", *tensors)
    for name, our, native, expected in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), ours, natives, exact, strict=True
    ):
        error = relative_error(our.cpu(), expected)
        allowed = allowed_error(relative_error(native.cpu(), expected), dtype, 1)
        # Three products of TF32 numbers are exact to 2^-21 or so; sums differ in their order.
        allowed = max(allowed, 2e-6 if dtype == torch.float32 else 0)
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_layers_of_resnet50(case: Conv2dCase) -> None:
    check(case.with_batch(2), torch.bfloat16, torch.channels_last)


def test_small_whole_numbers_are_exact() -> None:
    # A wrong mask or a race of one step shows in a single bit.
    for N in range(1, 6):
        input = torch.randint(-2, 3, (N, 64, 9, 11), device="cuda").to(torch.bfloat16)
        weight = torch.randint(-1, 2, (80, 64, 3, 3), device="cuda").to(torch.bfloat16)
        input, weight = (t.to(memory_format=torch.channels_last) for t in (input, weight))
        output = ops.conv2d(input, weight, padding=1, backend="triton")
        exact = F.conv2d(input.double(), weight.double(), padding=1).to(torch.bfloat16)
        assert torch.equal(output, exact)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_boxes_of_small_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    for N, size, K in ((1, (9, 11), 80), (5, (7, 7), 72), (3, (30, 19), 136)):
        input = torch.randint(-2, 3, (N, 72, *size), device="cuda").to(dtype)
        weight = torch.randint(-1, 2, (K, 72, 3, 2), device="cuda").to(dtype)
        input, weight = (t.to(memory_format=torch.channels_last) for t in (input, weight))
        arguments = {"padding": (2, 1), "dilation": (2, 1)}
        exact = F.conv2d(input.double(), weight.double(), **arguments).to(dtype)
        grad = torch.randint(-2, 3, exact.shape, device="cuda").to(dtype)
        grad = grad.to(memory_format=torch.channels_last)
        exact_grad = torch.nn.grad.conv2d_input(
            input.shape, weight.double(), grad.double(), **arguments
        ).to(dtype)
        geometry = Conv2dGeometry.of(
            "conv2d", input.shape, weight.shape, (1, 1), (2, 1, 2, 1), (2, 1), 1
        )
        strides = input.stride(), weight.stride(), grad.stride()
        problem = bind_conv2d.Problem(geometry, strides, dtype, input.device, "ieee")
        passes = (
            ("conv2d", bind_conv2d.bind_forward, (input, weight, None), exact),
            ("conv2d_grad_input", bind_conv2d.bind_grad_input, (grad, weight), exact_grad),
        )
        for op, bind, tensors, expected in passes:
            tiles = [tile for tile in problem.candidates(op) if tile.box]
            assert tiles
            for tile in tiles:
                kernel = bind(problem, tile)
                for _ in range(3):  # compiled, then cached
                    assert torch.equal(kernel(*tensors), expected), (op, tile)


def test_the_same_bits_in_every_run() -> None:
    case = RESNET50[2].with_batch(8)
    tensors = [
        torch.randn(size, device="cuda").to(torch.bfloat16)
        for size in (case.input_shape, case.weight_shape, (case.K,), case.output_shape)
    ]
    first = passes(case, "triton", *tensors)
    for _ in range(5):
        for one, other in zip(first, passes(case, "triton", *tensors), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", TRAINED)
def test_models_train_as_natively(name: str) -> None:
    check_training(name, "triton", ("channels_last",))


def test_a_step_can_be_recorded_as_a_graph() -> None:
    layer = gdfast.nn.Conv2d(16, 32, 3, padding=1).cuda()
    static = torch.randn(4, 16, 12, 12, device="cuda")
    with gdfast.backend("triton"), gdfast.autotune("off"):
        optimizer = optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = layer(static).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        before = layer.weight.detach().clone()
        losses = []
        for _ in range(3):
            graph.replay()
            losses.append(loss.item())
    assert not torch.equal(layer.weight, before)
    assert losses[0] > losses[1] > losses[2]


def test_a_compiled_model_is_one_graph() -> None:
    model = models.create("resnet20", num_classes=4, in_channels=1).cuda().eval()
    images = torch.randn(4, 1, 16, 16, device="cuda")
    with gdfast.backend("triton"), torch.no_grad():
        expected = model(images)
        output = torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


def test_auto_chooses_among_tiles_and_native() -> None:
    input = torch.randn(8, 64, 28, 28, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16)
    choices: dict[str, Any] = {}
    with gdfast.autotune("force"), gdfast.backends.tuning.recorded(choices) as uses:
        output = ops.conv2d(input, weight, padding=1)
    torch.testing.assert_close(output, F.conv2d(input, weight, padding=1), rtol=2e-2, atol=2e-1)
    assert uses and "native" in uses[0].candidates and len(uses[0].choice.seconds) >= 2


# Last, since each compiles kernels of its own.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_cases(case: Conv2dCase, dtype: torch.dtype) -> None:
    check(case, dtype, torch.channels_last)


@pytest.mark.parametrize("case", ODD[1:12:2], ids=str)
def test_nchw(case: Conv2dCase) -> None:
    check(case, torch.float32, torch.contiguous_format)
