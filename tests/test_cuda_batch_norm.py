"""The CUDA kernels of batch normalisation, in their simulator or on a GPU, against native PyTorch
and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_batch_norm import (
    DTYPES,
    LAYOUTS,
    check_empty,
    native_norm,
    randoms,
    run,
    strides,
)
from torch import Tensor

from gdfast import native, ops
from gdfast.backends import batch_norm, plans
from gdfast.backends.activation import ACTIVATIONS
from gdfast.bench.workload import allowed_error, relative_error
from gdfast.ops import batch_norm_dispatch

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
# Vectors of channels, of pixels and of neither; planes of less than a vector, one channel, many
# tiles of channels, several rounds for each block of the simulator.
SIZES = [
    (2, 3, 1, 2), (3, 5, 4, 3), (33, 1, 3, 5), (2, 67, 7, 7), (4, 24, 5, 9), (1, 3, 40, 41),
    (2, 520, 2, 4), (1, 16, 7, 8), (5, 8, 50, 41),
]  # fmt: skip


def check(
    values: dict[str, Tensor], device: torch.device, residual: bool, *, backend: str = "cuda",
    **settings: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Every result's error against float64 at most twice native's, plus one rounding.

    Images have the input's layout: on a GPU, native gives gradients in another one in evaluation.
    """
    values = {name: tensor.to(device) for name, tensor in values.items()}
    settings = {"training": True, **settings}
    ours = run(ops.batch_norm_act, values, residual, backend=backend, **settings)
    natives = run(native_norm, values, residual, **settings)
    exact = run(native_norm, values, residual, torch.float64, **settings)
    for name, expected in exact.items():
        our, native_s = ours[name], natives[name]
        assert our.dtype == native_s.dtype, name
        assert strides(our) == strides(values["input"] if our.dim() == 4 else native_s), name
        allowed = allowed_error(relative_error(native_s, expected), our.dtype, 1)
        # Sums over a channel, of which native's are in double on the CPU.
        rows = exact["output"][:, 0].numel()
        sums = torch.float64 if our.dtype == torch.float64 else torch.float32
        allowed = max(allowed, torch.finfo(sums).eps * rows**0.5)
        error = relative_error(our, expected)
        assert error <= allowed, f"{name}: {error} > {allowed}"
    return ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(
    size: tuple[int, ...], layout: str, training: bool, cuda_device: torch.device
) -> None:
    check(randoms(size, layout=layout), cuda_device, False, training=training)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residuals(
    activation: str, residual: bool, cuda_device: torch.device
) -> None:
    for layout in LAYOUTS:
        values = randoms((3, 20, 5, 4), layout=layout)
        settings = {"negative_slope": 0.2, "momentum": 0.3, "eps": 1e-3}
        check(values, cuda_device, residual, activation=activation, **settings)
        check(values, cuda_device, residual, activation=activation, training=False, **settings)


def test_a_negative_slope_makes_backward_read_the_residual(cuda_device: torch.device) -> None:
    values = randoms((3, 20, 5, 4))
    check(values, cuda_device, True, activation="leaky_relu", negative_slope=-0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(layout: str, residual: bool, dtype: torch.dtype, cuda_device: torch.device) -> None:
    check(randoms((4, 24, 5, 8), dtype, layout), cuda_device, residual)


def test_half_types_with_parameters_of_their_own(cuda_device: torch.device) -> None:
    values = randoms((4, 24, 5, 8), torch.bfloat16, "channels_last")
    values = {name: tensor.to(torch.bfloat16) for name, tensor in values.items()}
    check(values, cuda_device, True)
    check(values, cuda_device, True, training=False)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_parameters_that_are_not_there(missing: tuple[str, ...], cuda_device: torch.device) -> None:
    input = torch.randn(3, 6, 5, 4, device=cuda_device, requires_grad=True)
    params = {
        "weight": torch.rand(6, device=cuda_device) + 0.5,
        "bias": torch.randn(6, device=cuda_device),
    }
    given = [None if name in missing else params[name] for name in params]
    results = []
    for function, options in ((ops.batch_norm_act, {"backend": "cuda"}), (native_norm, {})):
        output = function(input, *given, None, None, training=True, **options)
        (grad,) = torch.autograd.grad(output.square().sum(), input)
        results.append((output, grad))
    torch.testing.assert_close(*results)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch, cuda_device: torch.device) -> list[bool]:
    """Of each forward pass by our kernels, whether it wrote a mask."""
    return given_to_forward(10, monkeypatch)


def given_to_forward(position: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch of the forward kernels from now on, whether it has an address there."""
    seen = []
    run = native.cuda.batch_norm

    def spy(*arguments: Any) -> None:
        seen.append(arguments[position] != 0)
        run(*arguments)

    monkeypatch.setattr(native.cuda, "batch_norm", spy)
    monkeypatch.setattr(plans, "enabled", False)  # in which nobody sees a launch
    return seen


def leaves_of(values: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    names = ("input", "weight", "bias", "residual")
    return [values[name].to(device).requires_grad_() for name in names]


def masked(leaves: list[Tensor], activation: str = "relu") -> Tensor:
    input, weight, bias, residual = leaves
    return ops.batch_norm_act(
        input, weight, bias, None, None, residual, training=True, activation=activation,
        negative_slope=0.2, backend="cuda",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_a_mask_tells_what_the_output_does(
    activation: str, layout: str, dtype: torch.dtype, masks: list[bool],
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    values = randoms((3, 16, 5, 8), dtype, layout)
    values["input"][0, 0, 0, 0] = torch.nan
    results = []
    for _ in range(2):
        leaves = leaves_of(values, cuda_device)
        output = masked(leaves, activation)
        results.append(torch.autograd.grad(output, leaves, values["grad"].to(cuda_device)))
        monkeypatch.setattr(batch_norm, "mask_size", lambda *_: None)
    assert masks == [True, False]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_a_mask_is_for_whole_vectors(masks: list[bool], cuda_device: torch.device) -> None:
    check(randoms((2, 12, 3, 5), torch.bfloat16, "channels_last"), cuda_device, True)
    values = randoms((2, 16, 4, 4), layout="channels_last")
    room = torch.randn(values["residual"].numel() + 1, device=cuda_device)
    image = room[1:].as_strided(values["residual"].shape, values["residual"].stride())
    leaves = leaves_of({**values, "residual": image}, cuda_device)
    assert leaves[3].data_ptr() % 16
    grad = values["grad"].to(cuda_device)
    results = torch.autograd.grad(masked(leaves), leaves, grad)
    leaves[3] = image.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(masked(leaves), leaves, grad), results)
    assert masks == [False, False, True]


def test_a_mask_read_bit_by_bit(masks: list[bool], cuda_device: torch.device) -> None:
    values = randoms((2, 16, 4, 4), torch.bfloat16, "channels_last")
    leaves, grad = leaves_of(values, cuda_device), values["grad"].to(cuda_device)
    output = masked(leaves)
    expected = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    room = torch.empty(grad.numel() + 1, dtype=grad.dtype, device=cuda_device)
    image = room[1:].as_strided(grad.shape, grad.stride()).copy_(grad)
    assert masks == [True] and image.data_ptr() % 16
    torch.testing.assert_close(torch.autograd.grad(output, leaves, image), expected)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_gradients_by_a_mask_are_differentiable(
    activation: str, masks: list[bool], cuda_device: torch.device
) -> None:
    values = randoms((2, 3, 2, 2), torch.float64)
    leaves = leaves_of(values, cuda_device)
    assert torch.autograd.gradgradcheck(lambda *x: masked(list(x), activation), leaves)
    output, grad = masked(leaves, activation), values["grad"].to(cuda_device)
    batch = torch.stack([grad, 2 * grad])
    batched = torch.autograd.grad(output, leaves, batch, retain_graph=True, is_grads_batched=True)
    for index, single in enumerate((grad, 2 * grad)):
        expected = torch.autograd.grad(output, leaves, single, retain_graph=True)
        torch.testing.assert_close([each[index] for each in batched], list(expected))
    assert all(masks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_splits_lose_nothing_to_a_large_mean(layout: str, cuda_device: torch.device) -> None:
    values = randoms((4, 16, 36, 36), layout=layout)
    values["input"] += 1000
    # No kink, on whose other side rounding might put a value.
    check(values, cuda_device, False, activation="none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_every_order(
    layout: str, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = randoms((2, 40, 18, 20), layout=layout)
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(check(values, cuda_device, True))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_memory_that_is_not_aligned(cuda_device: torch.device) -> None:
    values = randoms((2, 16, 4, 4), layout="channels_last")
    room = torch.randn(values["input"].numel() + 1)
    image = room[1:].as_strided(values["input"].shape, values["input"].stride())
    values["input"] = image.copy_(values["input"])
    assert values["input"].data_ptr() % 16
    check(values, cuda_device, False)


def test_running_statistics_that_are_not_packed_are_moved(cuda_device: torch.device) -> None:
    values = {name: t.to(cuda_device) for name, t in randoms((3, 6, 5, 4)).items()}
    wide = torch.stack([values["mean"], values["var"]], 1)
    expected = [values["mean"].clone(), values["var"].clone()]
    before = wide._version
    ops.batch_norm_act(
        values["input"], None, None, wide[:, 0], wide[:, 1], training=True, backend="cuda"
    )
    native_norm(values["input"], None, None, *expected)
    torch.testing.assert_close(wide, torch.stack(expected, 1))
    assert wide._version > before


def test_a_nan_stays_in_its_channel(cuda_device: torch.device) -> None:
    input = torch.randn(2, 8, 3, 4).to(memory_format=torch.channels_last).to(cuda_device)
    input[1, 2, 0, 0] = torch.nan
    output = ops.batch_norm_act(input, None, None, None, None, training=True, backend="cuda")
    assert output[:, 2].isnan().all()
    assert output.isnan().sum() == output[:, 2].numel()


@pytest.mark.parametrize(
    ("size", "reason"),
    [((1, 70_000, 1, 2), "at most 65535 channels"), ((2, 1, 2**15, 2**15), "over at most")],
    ids=str,
)
def test_sizes_that_are_refused(
    size: tuple[int, ...], reason: str, cuda_device: torch.device
) -> None:
    input = torch.zeros(1, device=cuda_device).expand(size)
    query = batch_norm_dispatch._query(input, torch.float32, True, 1e-5, "relu", 0.0, "input")
    assert reason in batch_norm.cuda_why_not(query)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_input(training: bool, cuda_device: torch.device) -> None:
    check_empty((0, 3, 4, 5), training, "cuda", str(cuda_device))
