"""The depthwise kernels on the tensor cores, in the simulator or on a GPU, against native."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda_conv2d import check, check_bias_and_activation, passes, query_of, tensors_of
from torch import Tensor

from gdfast.backends import cuda_candidates, cuda_conv2d, cuda_depthwise
from gdfast.backends.activation import ACTIVATIONS
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
TENSOR, NARROW = cuda_depthwise.TENSOR, cuda_depthwise.NARROW
OPS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")


def depthwise(
    name: str, N: int, C: int, H: int, W: int, size: int, padding: tuple[int, int]
) -> Conv2dCase:
    return Conv2dCase(name, N, C, H, W, C, size, size, padding=padding, groups=C)


CASES = [
    # Images side by side, the last ones beyond the batch; slabs that are half full.
    depthwise("3x3-short-rows", 7, 24, 9, 11, 3, (1, 1)),
    depthwise("5x5-short-rows", 5, 40, 7, 8, 5, (2, 2)),
    depthwise("7x7-short-rows", 3, 24, 9, 10, 7, (3, 3)),
    # One image wide, and rows that are made in strips.
    depthwise("3x3-long-rows", 1, 8, 10, 130, 3, (1, 1)),
    depthwise("5x5-long-rows", 2, 16, 6, 64, 5, (2, 2)),
    depthwise("7x7-long-rows", 1, 8, 9, 97, 7, (3, 3)),
    # More rows than one block has, and rows of filters that see nothing of the image.
    depthwise("3x3-tall", 3, 16, 50, 5, 3, (1, 1)),
    depthwise("7x7-low", 2, 16, 2, 9, 7, (3, 3)),
    # Padding that is not half of the filter, which grad_input has less of than none.
    depthwise("3x3-unpadded", 2, 8, 8, 12, 3, (0, 0)),
    depthwise("3x3-wide-padding", 2, 16, 5, 4, 3, (4, 3)),
    depthwise("5x5-asymmetric-padding", 2, 16, 8, 7, 5, (0, 4)),
    depthwise("3x3-one-column", 30, 8, 4, 1, 3, (1, 1)),
]
OFTEN = CASES[:3]


def small_integers(case: Conv2dCase, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """What makes every sum exact."""
    values = tensors_of(case, torch.float32, True, device)
    limits = {"input": 2, "weight": 2, "bias": 8, "grad": 2}
    return {
        name: (tensor * limits[name]).round().clamp(-limits[name], limits[name]).to(dtype)
        for name, tensor in values.items()
    }


def ours(case: Conv2dCase, values: dict[str, Tensor], by: str = TENSOR) -> tuple[Tensor, ...]:
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    assert not cuda_candidates.depthwise_tensor_why_not(query)
    return (
        cuda_conv2d.conv2d(query, by)(input, weight, bias),
        cuda_conv2d.conv2d_grad_input(query, by)(grad, weight),
        *cuda_conv2d.conv2d_grad_weight(query, by)(grad, input, True),
    )


def exactly(case: Conv2dCase, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return passes(case, {name: t.double() for name, t in values.items()}, "reference")


def without_padding(case: Conv2dCase, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """All passes tap by tap, each over the pixels that there are: padding multiplies nothing."""
    input, weight, bias, grad = (tensor.double() for tensor in values.values())
    output = torch.zeros_like(grad) + bias[:, None, None]
    grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)
    for r in range(case.R):
        for s in range(case.S):
            seeing, seen = [...], [...]
            for tap, pad, size, made in zip(
                (r, s), case.padding, case.input_shape[2:], case.output_shape[2:], strict=True
            ):
                first, last = max(0, pad - tap), max(0, min(made, size + pad - tap))
                seeing.append(slice(first, last))
                seen.append(slice(max(0, first + tap - pad), max(0, last + tap - pad)))
            output[tuple(seeing)] += weight[:, :, r, s, None] * input[tuple(seen)]
            grad_input[tuple(seen)] += weight[:, :, r, s, None] * grad[tuple(seeing)]
            grad_weight[:, 0, r, s] = (grad[tuple(seeing)] * input[tuple(seen)]).sum((0, 2, 3))
    return output, grad_input, grad_weight, grad.sum((0, 2, 3))


@pytest.mark.parametrize("by", [TENSOR, NARROW])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case: Conv2dCase, by: str, cuda_device: torch.device) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    for our, expected in zip(ours(case, values, by), exactly(case, values), strict=True):
        assert expected.abs().max() <= 2048
        assert torch.equal(our.double(), expected)


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_bfloat16(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    check(case, values, ours(case, values))


@pytest.mark.parametrize("by", [TENSOR, NARROW])
@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_thread_orders(
    case: Conv2dCase, by: str, cuda_device: torch.device, thread_order: str
) -> None:
    """What is compared is exact, and so is the same in any order."""
    values = small_integers(case, torch.bfloat16, cuda_device)
    for our, expected in zip(ours(case, values, by), exactly(case, values), strict=True):
        assert torch.equal(our, expected.to(our.dtype))


def test_the_same_bits_in_every_order(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[2]
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(ours(case, values))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_weights_and_images_in_other_places(cuda_device: torch.device) -> None:
    """Weights of any strides, images within larger ones."""
    case = CASES[0]
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(case, values)
    values["weight"] = values["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    for name in ("input", "grad"):
        n, c, h, w = values[name].shape
        whole = torch.full((n, h + 1, w + 2, c + 16), torch.nan, dtype=torch.float16)
        part = whole.to(cuda_device)[:, 1:, 1:-1, 8:-8].permute(0, 3, 1, 2)
        values[name] = part.copy_(values[name])
    for result, right in zip(ours(case, values), expected, strict=True):
        assert torch.equal(result, right)


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_bias_and_activation(case: Conv2dCase, activation: str, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.float16, True, cuda_device)
    check_bias_and_activation(case, values, TENSOR, activation, exactly(case, values)[0])


def test_without_a_gradient_of_the_bias(cuda_device: torch.device) -> None:
    case = CASES[1]
    values = small_integers(case, torch.float16, cuda_device)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(case, values), TENSOR)
    grad_weight, grad_bias = kernel(values["grad"], values["input"], False)
    assert grad_bias is None
    assert torch.equal(grad_weight.double(), exactly(case, values)[2])


def with_one(
    case: Conv2dCase, name: str, value: float, device: torch.device
) -> dict[str, Tensor]:  # fmt: skip
    """Small integers, none of them zero in weight and input, with a value at places of a tensor."""
    values = small_integers(case, torch.float16, device)
    for each in ("weight", "input"):
        values[each] = torch.where(values[each] == 0, 1, values[each])
    tensor = values[name]
    if tensor.ndim == 1:
        tensor[2] = value
    elif name == "weight":
        tensor[5, 0, -1, 0] = value
    else:
        tensor[:, 3] = value
        tensor[0, 6, 0, 0] = value
        tensor[-1, 6, -1, -1] = value
    return values


@pytest.mark.parametrize("name", ["input", "weight", "bias", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[9]], ids=str)
def test_what_is_not_finite_stays_in_its_channel(
    case: Conv2dCase, value: float, name: str, cuda_device: torch.device
) -> None:
    """Nor does padding make NaN of a filter's infinity: it multiplies nothing."""
    values = with_one(case, name, value, cuda_device)
    exact = without_padding(case, values)
    unseen = case.name == "7x7-low" and name == "weight"
    assert unseen == all(result.isfinite().all() for result in exact)
    for our, expected in zip(ours(case, values), exact, strict=True):
        torch.testing.assert_close(our.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last", "reason"),
    [
        (CASES[0], torch.float32, True, "bfloat16"),
        (CASES[0], torch.float16, False, "channels_last"),
        (replace(CASES[0], C=12, K=12, groups=12), torch.float16, True, "eights"),
        (replace(CASES[0], K=48), torch.float16, True, "a filter for each channel"),
        (replace(CASES[0], S=5), torch.float16, True, "7x7"),
        (replace(CASES[0], R=9, S=9, padding=(4, 4)), torch.float16, True, "7x7"),
        (replace(CASES[0], stride=(2, 2)), torch.float16, True, "stride"),
        (replace(CASES[0], dilation=(1, 2)), torch.float16, True, "dilation"),
        (replace(CASES[0], N=0), torch.float16, True, "images"),
    ],
)
def test_what_it_does_not_take(
    case: Conv2dCase, dtype: torch.dtype, channels_last: bool, reason: str,
    cuda_device: torch.device,
) -> None:  # fmt: skip
    query = query_of(case, tensors_of(case, dtype, channels_last, cuda_device))
    assert reason in cuda_candidates.depthwise_tensor_why_not(query)
    assert TENSOR not in cuda_candidates.candidates("conv2d", query)


@pytest.mark.parametrize("op", OPS)
def test_candidates(op: str, cuda_device: torch.device) -> None:
    query = query_of(CASES[0], tensors_of(CASES[0], torch.float16, True, cuda_device))
    names = cuda_candidates.candidates(op, query)
    assert names[-3:] == (TENSOR, NARROW, cuda_depthwise.NAME)
