"""Convolution, ReLU and max pooling in one kernel, against the three functions in turn."""

from __future__ import annotations

import copy
import ctypes
import mmap
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gdfast
from gdfast import models, nn, ops
from gdfast.bench.cases import FUSED_POOLS, FusedPoolCase
from gdfast.errors import FallbackWarning
from gdfast.ops import conv2d_relu_max_pool2d_dispatch as dispatch

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu", "threads"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SMALL = [case for case in FUSED_POOLS if case.name.startswith("small")]


def composed(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, pool_size: Any = 2,
    pool_stride: Any = None, pool_padding: Any = 0, **geometry: Any,
) -> Tensor:  # fmt: skip
    output = F.relu(F.conv2d(input, weight, bias, **geometry))
    return F.max_pool2d(output, pool_size, pool_stride, pool_padding)


def tensors_of(
    case: FusedPoolCase, dtype: torch.dtype, layout: str = "NCHW", whole: bool = False
) -> list[Tensor]:
    conv = case.conv
    shapes = conv.input_shape, conv.weight_shape, (conv.K,)
    draw = (lambda shape: torch.randint(-2, 3, shape)) if whole else torch.randn
    tensors = [draw(shape).to(dtype) for shape in shapes]
    tensors[:2] = [t.to(memory_format=LAYOUTS[layout]) for t in tensors[:2]]
    return [tensor.requires_grad_() for tensor in tensors]


def passes(function: Any, tensors: list[Tensor], case: FusedPoolCase) -> list[Tensor]:
    """The output, the gradients of weight and bias alone, and those of all three."""
    output = function(*tensors, **case.arguments)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    of_parameters = function(tensors[0].detach(), *tensors[1:], **case.arguments)
    return [
        output.detach(),
        *torch.autograd.grad(of_parameters, tensors[1:], grad),
        *torch.autograd.grad(output, tensors, grad),
    ]


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FUSED_POOLS, ids=str)
def test_error_is_at_most_twice_native_s(
    case: FusedPoolCase, dtype: torch.dtype, layout: str, isa: str
) -> None:
    # Of two values of a window that a half type rounds to one, either may get the gradient. Sums of
    # small whole numbers are exact, so that gradients of half types can be told right from wrong.
    halves = (torch.bfloat16, torch.float16)
    for whole in (False, True) if dtype in halves else (False,):
        tensors = tensors_of(case, dtype, layout, whole)
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        ours, native = (passes(f, tensors, case) for f in (ops.conv2d_relu_max_pool2d, composed))
        exact = passes(composed, wide, case)
        # float64 is its own reference: sums of so many terms differ by about their square root.
        terms = case.conv.N * case.conv.P * case.conv.Q if dtype == torch.float64 else 1
        eps = max(terms, 1) ** 0.5 * torch.finfo(dtype).eps
        judged = 1 if dtype in halves and not whole else len(exact)
        for mine, theirs, true in list(zip(ours, native, exact, strict=True))[:judged]:
            assert mine.shape == theirs.shape
            if not true.numel():
                continue
            assert mine.stride() == theirs.stride()
            error, allowed = ((t.double() - true).norm() for t in (mine, theirs))
            assert error <= 2 * allowed + 4 * eps * true.norm()


@pytest.mark.kernels
@pytest.mark.parametrize("case", FUSED_POOLS, ids=str)
def test_ties_and_nan_are_native_s(case: FusedPoolCase, isa: str) -> None:
    # Small whole numbers: sums are exact, and many values of a window are equal or 0.
    conv = case.conv
    for dtype, threads in product(DTYPES, (1, 2)):
        torch.set_num_threads(threads)
        input = torch.randint(-2, 3, conv.input_shape).to(dtype).requires_grad_()
        weight = torch.randint(-1, 2, conv.weight_shape).to(dtype).requires_grad_()
        bias = torch.randint(-1, 2, (conv.K,)).to(dtype).requires_grad_()
        results = []
        for function in (ops.conv2d_relu_max_pool2d, composed):
            output = function(input, weight, bias, **case.arguments)
            results.append((output, *torch.autograd.grad(output.sum(), (input, weight, bias))))
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=0)
        if not input.numel() or dtype == torch.bfloat16:
            continue  # native's convolution in bfloat16 gives NaN to neighbours that see none
        with torch.no_grad():
            input.view(-1)[::53] = float("nan")
        outputs = [
            f(input, weight, bias, **case.arguments) for f in (ops.conv2d_relu_max_pool2d, composed)
        ]
        torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)
        results = [torch.autograd.grad(output[~output.isnan()].sum(), bias) for output in outputs]
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("value", [torch.inf, 3e38], ids=["infinity", "overflow"])
def test_sums_without_a_value_are_native_s(value: float, isa: str) -> None:
    # Infinities of both signs add up to a NaN that no argument has.
    input, weight = torch.ones(2, 1, 12, 20), torch.ones(3, 1, 3, 3)
    input[:, :, 5, 4:6] = value
    input[1, :, 5, 4] = -torch.inf
    outputs = [f(input, weight, None) for f in (ops.conv2d_relu_max_pool2d, composed)]
    assert outputs[1].isinf().any() and (value != torch.inf or outputs[1].isnan().any())
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_of_any_order(case: FusedPoolCase) -> None:
    torch.set_num_threads(1)
    tensors = tensors_of(case, torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return ops.conv2d_relu_max_pool2d(*tensors, **case.arguments)

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)
    assert gradcheck(function, [tensors[0].detach(), *tensors[1:]])
    assert gradgradcheck(function, [tensors[0].detach(), *tensors[1:]])


def checked_arguments(case: FusedPoolCase) -> tuple[Any, ...]:
    conv = case.conv
    return (
        conv.stride, conv.padding * 2, conv.dilation, conv.groups, case.pool_size,
        case.pool_stride, "cpu",
    )  # fmt: skip


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_the_operations(case: FusedPoolCase) -> None:
    torch.set_num_threads(1)
    tensors, arguments = tensors_of(case, torch.float64), checked_arguments(case)
    op = torch.ops.gdfast.conv2d_relu_max_pool2d
    op_grad = torch.ops.gdfast.conv2d_relu_max_pool2d_grad_weight
    assert gradcheck(lambda *t: op(*t, *arguments)[0], tensors)
    assert gradgradcheck(lambda *t: op(*t, *arguments)[0], tensors)
    torch.library.opcheck(op, (*tensors, *arguments))
    input, weight, bias = tensors
    output, argmax = op(input, weight, bias, *arguments)
    grad = torch.randn_like(output).requires_grad_()
    rest = argmax, input, weight.shape, False, True
    torch.library.opcheck(op_grad, (grad, *rest, *arguments))
    assert gradcheck(
        lambda g, x: op_grad(g, argmax, x, weight.shape, False, True, *arguments), (grad, input)
    )


@pytest.mark.parametrize("needed", list(product((False, True), repeat=3))[1:], ids=str)
def test_any_subset_of_gradients(needed: tuple[bool, ...]) -> None:
    case = FUSED_POOLS[0]
    tensors = [
        t.detach().requires_grad_(n)
        for t, n in zip(tensors_of(case, torch.float64), needed, strict=True)
    ]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    ours, native = (
        torch.autograd.grad(f(*tensors, **case.arguments).square().sum(), wanted)
        for f in (ops.conv2d_relu_max_pool2d, composed)
    )
    torch.testing.assert_close(ours, native)


def test_a_change_in_place_before_backward_raises() -> None:
    case = FUSED_POOLS[0]
    for changed in (0, 1):
        tensors = tensors_of(case, torch.float32)
        output = ops.conv2d_relu_max_pool2d(*tensors, **case.arguments)
        with torch.no_grad():
            tensors[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_may_come_back_in_another_layout(layout: str) -> None:
    input, *parameters = tensors_of(FUSED_POOLS[0], torch.float32)
    found = []

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor

    for pack in (lambda tensor: tensor, unpack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = ops.conv2d_relu_max_pool2d(
                input.detach(), *parameters, **FUSED_POOLS[0].arguments
            )
        found.append(torch.autograd.grad(output.square().sum(), parameters))
    torch.testing.assert_close(*found)


def test_batched_gradients() -> None:
    case = SMALL[0]
    tensors = tensors_of(case, torch.float64)
    results = []
    for function in (ops.conv2d_relu_max_pool2d, composed):
        output = function(*tensors, **case.arguments)
        generator = torch.Generator().manual_seed(3)
        basis = torch.randn((3, *output.shape), generator=generator, dtype=torch.float64)
        results.append(torch.autograd.grad(output, tensors, basis, is_grads_batched=True))
    torch.testing.assert_close(*results)


def test_transforms_run_on_native() -> None:
    case = FUSED_POOLS[0]
    input, weight, bias = (t.detach() for t in tensors_of(case, torch.float64))
    with pytest.warns(FallbackWarning, match="conv2d_relu_max_pool2d: running on native"):
        ours, native = (
            torch.func.grad(lambda w, f=f: f(input, w, bias, **case.arguments).square().sum())(
                weight
            )
            for f in (ops.conv2d_relu_max_pool2d, composed)
        )
    torch.testing.assert_close(ours, native)


def test_autocast() -> None:
    tensors = tensors_of(FUSED_POOLS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, native = (
            f(*tensors, **FUSED_POOLS[0].arguments) for f in (ops.conv2d_relu_max_pool2d, composed)
        )
    assert ours.dtype == native.dtype == torch.bfloat16
    torch.testing.assert_close(ours, native)


@pytest.mark.parametrize(
    "change",
    [
        {"pool_size": 0},
        {"pool_size": 40},
        {"pool_stride": 0},
        {"pool_padding": 2},
        {"pool_size": 1.5},
        {"groups": 2},
        {"stride": 0},
        {"padding": "other"},
    ],
    ids=str,
)
def test_wrong_arguments_raise_as_natively(change: dict[str, Any]) -> None:
    tensors = tensors_of(FUSED_POOLS[0], torch.float32)
    arguments = FUSED_POOLS[0].arguments | change
    with pytest.raises((RuntimeError, TypeError)) as native:
        composed(*tensors, **arguments)
    with pytest.raises(native.type, match="conv2d_relu_max_pool2d: "):
        ops.conv2d_relu_max_pool2d(*tensors, **arguments)


def test_an_unbatched_image_and_named_padding() -> None:
    input, weight, bias = torch.randn(2, 9, 8), torch.randn(5, 2, 3, 2), torch.randn(5)
    for padding in ("same", "valid"):
        torch.testing.assert_close(
            ops.conv2d_relu_max_pool2d(input, weight, bias, padding=padding),
            composed(input, weight, bias, padding=padding),
        )


@pytest.mark.parametrize("name", ["simple-cnn", "37-outputs"])  # whose channels threads divide
def test_bits_do_not_depend_on_the_threads(name: str) -> None:
    (case,) = (case for case in FUSED_POOLS if case.name == name)
    tensors = tensors_of(case, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(passes(ops.conv2d_relu_max_pool2d, tensors, case)[:3])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_only_few_channels_without_overlap_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    kernel = dispatch.conv2d_relu_max_pool2d
    monkeypatch.setattr(
        dispatch, "conv2d_relu_max_pool2d", lambda *a: calls.append(a) or kernel(*a)
    )
    for case in FUSED_POOLS:
        calls.clear()
        ops.conv2d_relu_max_pool2d(*tensors_of(case, torch.float32), **case.arguments)
        assert bool(calls) == case.fused, case


def test_flops_are_counted_as_natively() -> None:
    tensors, counts = tensors_of(FUSED_POOLS[0], torch.float32), []
    for function in (ops.conv2d_relu_max_pool2d, composed):
        with FlopCounterMode(display=False) as counter:
            function(tensors[0].detach(), *tensors[1:], **FUSED_POOLS[0].arguments).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class TestModel:
    """SimpleCNN, which is made of it."""

    @staticmethod
    def gradients(model: torch.nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    @pytest.fixture
    def batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(5, 1, 28, 28), torch.randint(10, (5,))

    def test_native_runs_pytorch_s_operators_alone(self, batch: tuple[Tensor, Tensor]) -> None:
        model = models.create("cnn")
        restored = copy.deepcopy(model)
        gdfast.restore_(restored)
        seen = self.operators(restored, batch)
        with gdfast.backend("native"):
            seen |= self.operators(model, batch)
        assert not [name for name in seen if name.startswith("gdfast")]
        assert [name for name in self.operators(model, batch) if name.startswith("gdfast")]

    @staticmethod
    def operators(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> set[str]:
        names: set[str] = set()

        class Names(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                names.add(func.name())
                return func(*args, **(kwargs or {}))

        with Names():
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        return names

    def test_compiles_in_one_graph(self, batch: tuple[Tensor, Tensor]) -> None:
        model = models.create("cnn")
        eager = self.gradients(model, *batch)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(self.gradients(compiled._orig_mod, *batch), eager)
        F.cross_entropy(compiled(batch[0]), batch[1]).backward()

    def test_hooks_see_the_convolution(self, batch: tuple[Tensor, Tensor]) -> None:
        model, shapes = models.create("cnn"), []
        expected = model(batch[0])
        model.conv1.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
        torch.testing.assert_close(model(batch[0]), expected)
        assert shapes == [(5, 32, 26, 26)]

    def test_losses_of_50_steps_are_native_s(self) -> None:
        images, labels = torch.randn(8, 64, 1, 28, 28), torch.randint(10, (8, 64))
        model = models.create("cnn")
        losses = []
        for name in ("auto", "native"):
            trained = copy.deepcopy(model)
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
            with gdfast.backend(name):
                for step in range(50):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(trained(images[step % 8]), labels[step % 8])
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
        torch.testing.assert_close(losses[:50], losses[50:], rtol=1e-5, atol=0)

    def test_other_convolutions_run_by_themselves(self) -> None:
        image = torch.randn(2, 3, 9, 8)
        reflecting = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        expected = F.max_pool2d(F.relu(reflecting(image)), 2)
        torch.testing.assert_close(nn.conv_relu_max_pool(reflecting, image, 2), expected)


def before_a_forbidden_page(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last of a page, and the process may not read the next one."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copied = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size
    ).view(tensor.shape)
    return copied.copy_(tensor)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_nothing_is_read_behind_gradients_and_places(isa: str) -> None:
    # Bands of three lines of one pixel: the last but one ends less than a vector before the end.
    image, weight = torch.randn(1, 3, 141, 13), torch.randn(2, 3, 1, 1)
    arguments = ([4, 4], [0, 0, 0, 0], [1, 1], 1, [4, 4], [4, 4], "cpu")
    operations = torch.ops.gdfast
    output, argmax = operations.conv2d_relu_max_pool2d(image, weight, None, *arguments)
    grad = torch.randn_like(output)
    settings = image, [2, 3, 1, 1], False, True, *arguments
    backward = operations.conv2d_relu_max_pool2d_grad_weight
    expected = backward(grad, argmax, *settings)
    guarded = map(before_a_forbidden_page, (grad, argmax))
    torch.testing.assert_close(backward(*guarded, *settings), expected, rtol=0, atol=0)
