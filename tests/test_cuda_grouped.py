"""The CUDA kernels for groups of few channels, in the simulator or on a GPU, against native."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda_conv2d import check, check_bias_and_activation, passes, query_of, tensors_of
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_candidates, cuda_conv2d
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

SAME = {"padding": (1, 1)}
# Parts of slabs and of tiles, with all sizes of groups; what is in one tile, and in many.
CASES = [
    Conv2dCase("4s", 2, 72, 9, 19, 72, 3, 3, groups=18, **SAME),
    Conv2dCase("8s", 2, 40, 7, 7, 40, 3, 3, groups=5, **SAME),
    Conv2dCase("16s", 1, 80, 17, 10, 80, 3, 3, groups=5, **SAME),
    Conv2dCase("32s", 2, 96, 12, 9, 96, 3, 3, groups=3, **SAME),
    Conv2dCase("2s", 1, 16, 10, 30, 16, 3, 3, groups=8),
    Conv2dCase("4s-wide-padding", 1, 8, 5, 4, 8, 3, 3, padding=(3, 4), groups=2),
    Conv2dCase("8s-stride-2", 2, 64, 15, 18, 64, 3, 3, (2, 2), (1, 1), groups=8),
    Conv2dCase("32s-stride-2", 1, 64, 9, 21, 64, 3, 3, (2, 2), (1, 1), groups=2),
    Conv2dCase("4s-asymmetric", 2, 24, 11, 20, 24, 3, 2, (1, 2), (0, 1), groups=6),
    Conv2dCase("16s-5x4", 1, 32, 9, 12, 32, 5, 4, (2, 1), (2, 1), groups=2),
    Conv2dCase("8s-7x7", 1, 16, 9, 10, 16, 7, 7, padding=(3, 3), groups=2),
    Conv2dCase("16s-1x1", 3, 32, 5, 9, 32, 1, 1, groups=2),
    Conv2dCase("4s-1x3-over-image", 2, 8, 3, 20, 8, 1, 3, (5, 3), groups=2),
]
OFTEN = [CASES[0], CASES[3], CASES[6], CASES[8]]
OPS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")


def small_integers(case: Conv2dCase, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """What makes every sum exact."""
    values = tensors_of(case, torch.float32, True, device)
    limits = {"input": 3, "weight": 2, "bias": 8, "grad": 2}
    return {
        name: (tensor * limits[name]).round().clamp(-limits[name], limits[name]).to(dtype)
        for name, tensor in values.items()
    }


def ours(case: Conv2dCase, values: dict[str, Tensor], way: str = "grouped") -> tuple[Tensor, ...]:
    """All three passes, the gradient of the input by tiles where the stride is not 1."""
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    by = {op: "" if cuda_candidates.grouped_why_not(op, query, way) else way for op in OPS}
    assert by["conv2d"] and by["conv2d_grad_weight"]
    steps = query.geometry.stride if max(case.output_shape[2:]) > 1 else (1, 1)
    assert bool(by["conv2d_grad_input"]) == (steps == (1, 1)) or case.name.endswith("over-image")
    return (
        cuda_conv2d.conv2d(query, by["conv2d"])(input, weight, bias),
        cuda_conv2d.conv2d_grad_input(query, by["conv2d_grad_input"])(grad, weight),
        *cuda_conv2d.conv2d_grad_weight(query, by["conv2d_grad_weight"])(grad, input, True),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    for our, expected in zip(ours(case, values), exact, strict=True):
        assert expected.abs().max() <= 2048
        assert torch.equal(our.double(), expected)


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_bfloat16(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    check(case, values, ours(case, values))


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_thread_orders(case: Conv2dCase, cuda_device: torch.device, thread_order: str) -> None:
    """What is compared is exact, and so is the same in any order."""
    values = small_integers(case, torch.bfloat16, cuda_device)
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    for our, expected in zip(ours(case, values), exact, strict=True):
        assert torch.equal(our, expected.to(our.dtype))


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_other_layouts(case: Conv2dCase, cuda_device: torch.device) -> None:
    """What is read is copied, but a weight; where NCHW would be written, tiles do it."""
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(case, values)
    read = {name: t.contiguous() for name, t in values.items()}
    query = query_of(case, {**read, "grad": values["grad"]})
    input, weight, bias, grad = read.values()
    assert torch.equal(cuda_conv2d.conv2d(query, "grouped")(input, weight, bias), expected[0])
    results = cuda_conv2d.conv2d_grad_weight(query_of(case, read), "grouped")(grad, input, True)
    for result, right in zip(results, expected[2:], strict=True):
        assert torch.equal(result, right)
    assert "channels_last" in cuda_candidates.grouped_why_not("conv2d", query_of(case, read))
    # A gradient with strides of 0, as y.sum().backward() gives it, is copied too.
    values["grad"] = grad[:1, :, :1, :1].expand(case.output_shape)
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    query, grad = query_of(case, values), values["grad"]
    input = values["input"]
    results = cuda_conv2d.conv2d_grad_weight(query, "grouped")(grad, input, True)
    for result, right in zip(results, exact[2:], strict=True):
        assert torch.equal(result, right.to(result.dtype))


def test_an_address_that_16_does_not_divide(cuda_device: torch.device) -> None:
    case = CASES[0]
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(case, values)
    for name in ("input", "weight", "grad"):
        whole = torch.zeros(values[name].numel() + 1, dtype=torch.float16, device=cuda_device)
        moved = whole[1:].as_strided(values[name].shape, values[name].stride())
        values[name] = moved.copy_(values[name])
    for result, right in zip(ours(case, values), expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_bias_and_activation(activation: str, cuda_device: torch.device) -> None:
    case = CASES[0]
    values = tensors_of(case, torch.float16, True, cuda_device)
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")[0]
    check_bias_and_activation(case, values, "grouped", activation, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [*OFTEN, CASES[4]], ids=str)
def test_what_is_not_finite_stays_in_its_group(
    case: Conv2dCase, value: float, cuda_device: torch.device
) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    values["weight"] = torch.where(values["weight"] == 0, 1, values["weight"])
    values["input"][:, 5] = value
    values["input"][0, 0, -1, -1] = value  # beside what a tile has beyond the image
    # In float64: on a GPU, native's half types let it into other groups.
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    results = ours(case, values)
    for i in (0, 2, 3):
        assert torch.equal(results[i].isfinite(), exact[i].isfinite())
        assert torch.equal(results[i].isnan(), exact[i].isnan())
    values = small_integers(case, torch.float16, cuda_device)
    values["weight"] = torch.where(values["weight"] == 0, 1, values["weight"])
    values["grad"][:, 3, 1:] = value
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    results = ours(case, values)
    for i in (1, 2, 3):
        assert torch.equal(results[i].isfinite(), exact[i].isfinite())


def test_no_images(cuda_device: torch.device) -> None:
    case = replace(CASES[0], N=0)
    output, grad_input, grad_weight, grad_bias = ours(
        case, tensors_of(case, torch.bfloat16, True, cuda_device)
    )
    assert output.shape == case.output_shape
    assert grad_input.shape == case.input_shape
    assert not grad_weight.any()
    assert not grad_bias.any()


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (CASES[0], torch.float32, "half types"),
        (replace(CASES[0], groups=1), torch.float16, "groups"),
        (replace(CASES[0], groups=6), torch.float16, "2, 4, 8, 16 or 32"),
        (replace(CASES[0], C=36), torch.float16, "as many filters"),
        (replace(CASES[0], R=9, padding=(4, 1)), torch.float16, "7 x 7"),
        (replace(CASES[0], dilation=(1, 2)), torch.float16, "dilation"),
        (replace(CASES[3], R=7, S=7, padding=(3, 3)), torch.float16, "shared memory"),
    ],
)
def test_what_it_does_not_take(
    case: Conv2dCase, dtype: torch.dtype, reason: str, cuda_device: torch.device
) -> None:
    query = query_of(case, tensors_of(case, dtype, True, cuda_device))
    assert reason in cuda_candidates.grouped_why_not("conv2d", query)


def test_it_is_the_first_choice_on_a_gpu(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDFAST_HOPPER", "0")  # which has kernels of its own
    query = query_of(CASES[0], tensors_of(CASES[0], torch.float16, True, cuda_device))
    query = replace(query, device=torch.device("cuda", 0))
    for op in (*OPS, "conv2d_act"):
        first, *others = cuda_candidates.candidates(op, query)
        assert first == "grouped"
        assert "64x64" in others


@pytest.mark.parametrize("splits", [1, 3])
def test_parts_become_gradients_and_updates(
    splits: int, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdfast.backends.sgd import SgdHyper, SgdTensors

    case = CASES[0]
    values = small_integers(case, torch.bfloat16, cuda_device)
    assert native.cuda is not None
    monkeypatch.setattr(native.cuda, "conv2d_grouped_splits", lambda problem: splits)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(case, values), "grouped")
    grad, input, weight = values["grad"], values["input"], values["weight"]
    gradient, _ = kernel(grad, input, False)
    begun, grad_bias = kernel.begin(grad, input, True)  # type: ignore[attr-defined]
    assert torch.equal(begun.gradient(), gradient)
    assert torch.equal(grad_bias, kernel(grad, input, True)[1])
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")[2]
    updated = weight.float()
    expected = updated.double() - 0.25 * exact
    begun, _ = kernel.begin(grad, input, False)  # type: ignore[attr-defined]
    hyper = SgdHyper(0.25, 0.0, 0.0, 0.0, False, False, True, False, None, None)
    begun.update(SgdTensors([updated], [], [], []), hyper)
    assert torch.equal(updated.double(), expected)
