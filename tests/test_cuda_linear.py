"""Linear layers on the CUDA kernels, in their simulator or on a GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdfast
from gdfast import native, nn, ops
from gdfast.backends import cuda_linear

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "compiled_cpu", "by_cuda"),
]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# N, C, K: whole vectors and none, what is left of rows and outputs, several rows of a block.
FEW = [(64, 1352, 10), (1, 4096, 8), (5, 667, 16), (33, 101, 7), (17, 64, 1), (70, 72, 32),
       (521, 68, 9)]  # fmt: skip
WIDE = [(5, 512, 1000), (33, 72, 40), (64, 264, 136), (1, 64, 48), (70, 1032, 72)]
# Input, weight, and what autocast asks for.
UNIFORM = [(dtype, dtype, None) for dtype in (FP32, FP64, BF16, FP16)]
AUTOCAST = [(half, FP32, half) for half in (BF16, FP16)] + [(FP32, FP32, BF16)]
Types = tuple[torch.dtype, torch.dtype, Any]


@pytest.fixture
def by_cuda() -> Iterator[None]:
    with gdfast.backend("cuda"):
        yield


def layer_of(
    sizes: tuple[int, int, int], types: Types, device: torch.device, bias: bool = True
) -> tuple[Any, ...]:
    N, C, K = sizes
    of_input, of_weight, _ = types
    generator = torch.Generator().manual_seed(N + C + K)
    shapes = (((N, C), of_input), ((K, C), of_weight), ((K,), of_weight))
    tensors = [torch.randn(size, generator=generator).to(device, t) for size, t in shapes]
    return tuple(tensor.requires_grad_() for tensor in tensors[: 3 if bias else 2])


def passes(
    function: Callable[..., Tensor], tensors: tuple[Any, ...], cast: torch.dtype | None = None
) -> list[Tensor]:
    """Output and gradients; all results of a pass both ways."""
    device = tensors[0].device.type
    with torch.autocast(device, cast or BF16, enabled=cast is not None):
        output = function(*tensors)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=generator).to(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


def exactly(tensors: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """The same in float64, of a gradient that is rounded as the output is."""
    doubles = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    output = F.linear(*doubles)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=generator).to(output.device, dtype).double()
    return [output.detach(), *torch.autograd.grad(output, doubles, grad)]


def is_ours(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "CudaLinearFunctionBackward"


# Wide layers are of half types.
@pytest.mark.parametrize(
    ("sizes", "types"),
    [(sizes, types) for sizes in FEW for types in (*UNIFORM, *AUTOCAST)]
    + [(sizes, types) for sizes in WIDE for types in (*UNIFORM[2:], *AUTOCAST)],
    ids=str,
)
def test_matches_float64(
    sizes: tuple[int, int, int], types: Types, cuda_device: torch.device, thread_order: str
) -> None:
    tensors = layer_of(sizes, types, cuda_device, bias=sizes != FEW[0])
    cast = types[2]
    with torch.autocast(cuda_device.type, cast or BF16, enabled=cast is not None):
        output = ops.linear(*tensors)
    assert is_ours(output) and output.dtype == (cast or types[0])
    right = exactly(tensors, output.dtype)
    natively = passes(F.linear, tensors, cast)
    terms = max(sizes) if types[0] == FP64 else 4  # native is exact itself in float64
    for ours, theirs, exact in zip(passes(ops.linear, tensors, cast), natively, right, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        rounding = terms**0.5 * torch.finfo(ours.dtype).eps * exact.abs().max()
        error, natives = ((each - exact).abs().max() for each in (ours, theirs))
        assert error <= 2 * natives + rounding


@pytest.mark.parametrize("sizes", [(33, 101, 7), (33, 72, 40)], ids=str)
def test_each_gradient_alone(sizes: tuple[int, int, int], cuda_device: torch.device) -> None:
    tensors = layer_of(sizes, (BF16, BF16, None), cuda_device)
    together = passes(ops.linear, tensors)
    for wanted in range(3):
        leaves = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        output = ops.linear(*leaves)
        assert is_ours(output)
        generator = torch.Generator().manual_seed(7)
        output.backward(torch.randn(output.shape, generator=generator).to(output))
        assert torch.equal(leaves[wanted].grad, together[1 + wanted])
        assert [leaf.grad is None for leaf in leaves].count(True) == 2


@pytest.mark.parametrize("K", [7, 40])
def test_rows_apart_and_addresses_that_16_does_not_divide(
    K: int, cuda_device: torch.device
) -> None:
    wide = torch.randn(20, 320).to(cuda_device, BF16)
    weight = torch.randn(K * 200 + 8).to(cuda_device, BF16)
    for start in (8, 9):  # wide layers at the second one run natively
        tensors = tuple(
            t.detach().requires_grad_()
            for t in (wide[:, start : start + 200], weight[start - 8 :][: K * 200].view(K, 200))
        )
        leaves = tuple(t.detach().clone().requires_grad_() for t in tensors)
        assert tensors[0].stride() == (320, 1)
        for ours, right in zip(passes(ops.linear, tensors), exactly(leaves, BF16), strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("sizes", [(33, 101, 7), (33, 72, 40)], ids=str)
def test_nan_and_infinity_go_where_native_has_them(
    sizes: tuple[int, int, int], cuda_device: torch.device
) -> None:
    tensors = layer_of(sizes, (BF16, BF16, None), cuda_device)
    with torch.no_grad():
        tensors[0][2, 60], tensors[0][5, 3], tensors[1][4, 50] = torch.nan, torch.inf, -torch.inf
    for ours, right in zip(passes(ops.linear, tensors), exactly(tensors, BF16), strict=True):
        assert torch.equal(ours.isnan(), right.isnan())
        assert torch.equal(ours.isinf(), right.isinf())


def test_repeats_bit_by_bit_whatever_the_batch(cuda_device: torch.device) -> None:
    for sizes in ((600, 72, 10), (600, 72, 40)):
        tensors = layer_of(sizes, (BF16, BF16, None), cuda_device)
        output, *_ = first = passes(ops.linear, tensors)
        assert all(map(torch.equal, passes(ops.linear, tensors), first))
        few = ops.linear(tensors[0][:5], *tensors[1:])
        assert is_ours(few) and torch.equal(few, output[:5])


def test_a_gradient_of_any_strides(cuda_device: torch.device) -> None:
    input, weight, bias = layer_of((9, 64, 5), (FP32, FP32, None), cuda_device)
    for function in (ops.linear, F.linear):
        output = function(input, weight, bias)
        grads = torch.autograd.grad(output.sum(), (input, weight, bias))
        if function is ops.linear:
            assert is_ours(output)
            ours = grads
    torch.testing.assert_close(ours, grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("types", [(FP64, FP64, None), (FP32, FP32, BF16)], ids=str)
def test_gradients_of_gradients(types: Types, cuda_device: torch.device) -> None:
    tensors, cast = layer_of((8, 72, 9), types, cuda_device), types[2]
    found = []
    for function in (ops.linear, F.linear):
        with torch.autocast(cuda_device.type, cast or BF16, enabled=cast is not None):
            output = function(*tensors)
        assert is_ours(output) == (function is ops.linear)
        loss = output.double().pow(3).sum() / 1000
        grads = torch.autograd.grad(loss, tensors[:2], create_graph=True)
        of_grads = sum(grad.square().sum() for grad in grads)
        found.append([*grads, *torch.autograd.grad(of_grads, tensors[:2])])
    for ours, theirs in zip(*found, strict=True):
        # By autocast the same roundings, of other sums.
        most = 0.05 if cast else 1e-12
        assert (ours - theirs).abs().max() <= most * theirs.abs().max()


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_is_not_needed_may_change_before_backward(
    frozen: str, cuda_device: torch.device
) -> None:
    input, weight, bias = layer_of((9, 72, 10), (FP32, FP32, None), cuda_device)
    leaves = [input.detach() if frozen == "input" else input,
              weight.detach() if frozen == "weight" else weight, bias]  # fmt: skip
    wanted = [t for t in leaves if t.requires_grad]
    right = torch.autograd.grad(F.linear(*leaves).sum(), wanted)
    output = ops.linear(*leaves)
    assert is_ours(output)
    with torch.no_grad():
        leaves[frozen == "input"].add_(1)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), wanted), right)
    output = ops.linear(*leaves)
    with torch.no_grad():
        leaves[frozen != "input"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x[:0], w, b),
        lambda x, w, b: (x.unsqueeze(0), w, b),
        lambda x, w, b: (x, w.repeat(4, 1), None),  # 40 outputs of float32
        lambda x, w, b: (x.t().contiguous().t(), w, b),
        lambda x, w, b: (x, w.t().contiguous().t(), b),
        lambda x, w, b: (x[:, :32].contiguous(), w[:, :32].contiguous(), b),
        lambda x, w, b: (x[:, :0], w[:, :0].contiguous(), b),
    ],
    ids=["empty", "3-D", "many-outputs", "columns-apart", "weight-transposed", "narrow", "none"],
)
def test_runs_natively_what_it_has_no_kernel_for(
    change: Callable[..., Any], cuda_device: torch.device
) -> None:
    tensors = (torch.randn(size, device=cuda_device) for size in ((9, 80), (10, 80), (10,)))
    leaves = tuple(None if t is None else t.requires_grad_() for t in change(*tensors))
    output = ops.linear(*leaves)
    assert not is_ours(output)
    torch.testing.assert_close(output, F.linear(*leaves))


def test_large_layers_are_natives(cuda_device: torch.device) -> None:
    assert cuda_linear.fits_layer(2048, 1000) and cuda_linear.fits_layer(5408, 10)
    assert not cuda_linear.fits_layer(4096, 4096) and not cuda_linear.fits_layer(512, 1001)
    assert not cuda_linear.fits_layer(32, 10)


def test_errors_are_natives(cuda_device: torch.device) -> None:
    weight, bias = torch.randn(10, 80, device=cuda_device), torch.randn(10, device=cuda_device)
    for call in (ops.linear, F.linear):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call(torch.randn(9, 81, device=cuda_device), weight, bias)
        with pytest.raises(RuntimeError, match="dtype"):
            call(torch.randn(9, 80, device=cuda_device, dtype=FP64), weight, bias)
        # Kernels that autocast uses take them, but nobody asked for a cast.
        with pytest.raises(RuntimeError, match="dtype"):
            call(torch.randn(9, 80, device=cuda_device, dtype=BF16), weight, bias)


def test_the_native_backend_and_transforms(cuda_device: torch.device) -> None:
    input, weight, bias = layer_of((9, 80, 10), (FP32, FP32, None), cuda_device)
    with gdfast.backend("native"):
        assert not is_ours(ops.linear(input, weight, bias))
    assert is_ours(ops.linear(input, weight, bias))
    input, weight, bias = (t.detach() for t in (input, weight, bias))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found, right = (
            transform(lambda w, f=f: f(input, w, bias).sum(0))(weight)
            for f in (ops.linear, F.linear)
        )
        torch.testing.assert_close(found, right)
    rows = torch.func.vmap(lambda x: ops.linear(x, weight, bias))(input.unsqueeze(1))
    torch.testing.assert_close(rows.squeeze(1), F.linear(input, weight, bias))
    leaf = weight.clone().requires_grad_()
    output = ops.linear(input, leaf, bias)
    assert is_ours(output)
    (batched,) = torch.autograd.grad(
        output, leaf, torch.eye(90, device=cuda_device).view(90, 9, 10), is_grads_batched=True
    )
    torch.testing.assert_close(batched.sum(0), input.sum(0).expand(10, 80))


def test_layer_trains_as_natives_does(cuda_device: torch.device) -> None:
    ours = nn.Linear(80, 10, device=cuda_device)
    theirs = torch.nn.Linear(80, 10, device=cuda_device)
    theirs.load_state_dict(ours.state_dict())
    batch = torch.randn(16, 80, device=cuda_device)
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_problem_is_checked(cuda_device: torch.device) -> None:
    for arguments, message in (
        ((1, 0, 1, 0, *["float32"] * 3), "C, K > 0"),
        ((-1, 64, 1, 64, *["float32"] * 3), "N >= 0"),
        ((1, 64, 1, 64, "float32", "float64", "float32"), "one, or those of autocast"),
        ((1, 64, 40, 64, *["float32"] * 3), "at most 32 outputs"),
        ((1, 65, 40, 65, *["float16"] * 3), "8 divides"),
        ((1, 64, 1, 64, *["int8"] * 3), "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cuda.LinearProblem(*arguments)


@pytest.mark.skipif(not native.cuda_is_simulated, reason="needs `make cuda-simulator`")
def test_a_failed_launch_names_its_sizes(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = torch.ones(2, 64, requires_grad=True)
    sizes = r"\(float32, input \[2, 64\] of float32, weight \[3, 64\] of float32\)$"
    output = ops.linear(leaf, torch.ones(3, 64))
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", "none")
    with pytest.raises(RuntimeError, match=f"^linear: .*{sizes}"):
        ops.linear(leaf, torch.ones(3, 64))
    with pytest.raises(RuntimeError, match=f"^linear_backward: .*{sizes}"):
        output.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 5408, 10), (32, 512, 1000)], ids=str)
def test_a_side_stream_and_a_graph(sizes: tuple[int, int, int]) -> None:
    tensors = layer_of(sizes, (BF16, FP32, BF16), torch.device("cuda"))
    grad = torch.randn(sizes[0], sizes[2], device="cuda", dtype=BF16)

    def both_ways() -> list[Tensor]:
        with torch.autocast("cuda", BF16):
            output = ops.linear(*tensors)
        assert is_ours(output)
        return [output.detach(), *torch.autograd.grad(output, tensors, grad)]

    right = both_ways()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        ours = both_ways()
    stream.synchronize()
    assert all(map(torch.equal, ours, right))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = both_ways()
    with torch.no_grad():
        tensors[0].mul_(2)
    graph.replay()
    right = both_ways()
    assert all(map(torch.equal, ours, right))


@pytest.mark.gpu
def test_swap_gives_layers_on_a_gpu_our_operation() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(640, 640), torch.nn.ReLU(), torch.nn.Linear(640, 10)
    ).cuda()
    batch = torch.randn(16, 640, device="cuda")
    report = gdfast.swap_(model, fuse=True, verify=batch)
    assert [(row.parts, row.op) for row in report.fused] == [(["0"], "linear"), (["2"], "linear")]
    assert is_ours(model(batch))
    with torch.autocast("cuda", BF16):
        assert is_ours(model[0](batch))
    gdfast.restore_(model)
    assert not is_ours(model(batch))
