"""The convolution for Hopper, on such a GPU or in the simulator: exact sums of small integers."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_cuda_conv2d import query_of
from torch import Tensor

from gdfast.backends import cuda_candidates, cuda_conv2d
from gdfast.backends.cuda_hopper import HOPPER
from gdfast.backends.cuda_tiles import multiprocessors
from gdfast.backends.registry import Conv2dActQuery, Conv2dQuery
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
]

CASES = [
    # Parts of tiles in every axis, channels that fill neither a box nor a tile.
    Conv2dCase("3x3", 2, 72, 9, 10, 72, 3, 3, padding=(1, 1)),
    Conv2dCase("asymmetric", 1, 8, 13, 20, 64, 3, 2, padding=(1, 0), dilation=(2, 1)),
    # More padding than the window: pixels that sum nothing but padding.
    Conv2dCase("wide-padding", 1, 16, 3, 5, 8, 2, 2, padding=(3, 4)),
    # All pixels are one row; without padding they are not once the output is smaller.
    Conv2dCase("1x1", 3, 72, 7, 7, 136, 1, 1),
    Conv2dCase("1x1-padding", 2, 16, 5, 6, 24, 1, 1, padding=(1, 0)),
    # Blocks go on from tile to tile, with as many steps as there are stages, fewer and more.
    Conv2dCase("one-step", 9, 64, 16, 16, 64, 1, 1),
    Conv2dCase("six-steps", 4, 16, 16, 16, 128, 2, 3, padding=(1, 1)),
    Conv2dCase("many-steps", 8, 72, 12, 12, 64, 3, 3, padding=(1, 1)),
    # Strides: phases of the input, of the gradient; of odd sizes, and pixels that no window meets.
    Conv2dCase("3x3/2", 2, 72, 14, 14, 72, 3, 3, stride=(2, 2), padding=(1, 1)),
    Conv2dCase("3x3/2-odd", 2, 16, 13, 9, 24, 3, 3, stride=(2, 2), padding=(0, 1)),
    Conv2dCase("1x1/2", 3, 64, 10, 11, 72, 1, 1, stride=(2, 2)),
    Conv2dCase("2x5/(1,2)", 2, 24, 7, 12, 16, 2, 5, stride=(1, 2), padding=(0, 3)),
    Conv2dCase(
        "4x3/2-dilated", 1, 16, 17, 15, 64, 4, 3, stride=(2, 2), padding=(4, 1), dilation=(2, 3)
    ),
    Conv2dCase("smallest/2", 1, 8, 2, 2, 8, 3, 1, stride=(2, 2), padding=(2, 0)),
]
# The simulator runs one of them in each order of threads.
DTYPES = [(torch.bfloat16, "ascending"), (torch.float16, "descending")]


def small_integers(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Half types hold them exactly, and float32 their sums: what is rounded is the result alone."""
    values = torch.randint(-2, 3, size, device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values


def tensors(case: Conv2dCase, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    sizes = {
        "input": case.input_shape, "weight": case.weight_shape, "bias": (case.K,),
        "grad": case.output_shape,
    }  # fmt: skip
    return {name: small_integers(size, dtype, device) for name, size in sizes.items()}


def window(case: Conv2dCase) -> dict[str, Any]:
    return {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}


def check(case: Conv2dCase, dtype: torch.dtype, name: str, device: torch.device) -> None:
    values = tensors(case, dtype, device)
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    assert cuda_candidates.hopper_why_not("conv2d", query) == ""
    output = cuda_conv2d.conv2d(query, name)(input, weight, bias)
    exact = F.conv2d(input.double(), weight.double(), bias.double(), **window(case))
    assert torch.equal(output, exact.to(dtype))
    assert cuda_candidates.hopper_why_not("conv2d_grad_input", query) == ""
    grad_input = cuda_conv2d.conv2d_grad_input(query, name)(grad, weight)
    exact = torch.nn.grad.conv2d_input(input.shape, weight.double(), grad.double(), **window(case))
    assert torch.equal(grad_input, exact.to(dtype))


@pytest.mark.parametrize("dtype, order", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_native_does(
    case: Conv2dCase, dtype: torch.dtype, order: str, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
    check(case, dtype, "hopper", hopper)


@pytest.mark.parametrize("name", HOPPER)
@pytest.mark.parametrize(
    "case",
    [
        # Four or more tiles for each block of the simulator, of five steps: the ring of stages has
        # another length, so that every stage is that of every step once.
        Conv2dCase("five-steps", 6, 24, 14, 14, 40, 1, 5, padding=(0, 2)),
        Conv2dCase("wide", 1, 72, 7, 9, 264, 3, 1, padding=(1, 0)),
        Conv2dCase("strided", 5, 64, 13, 16, 200, 3, 2, stride=(2, 2), padding=(1, 1)),
    ],
    ids=str,
)
def test_every_tile_does(
    case: Conv2dCase, name: str, hopper: torch.device, thread_order: str
) -> None:
    check(case, torch.bfloat16, name, hopper)


@pytest.mark.parametrize("name", HOPPER)
@pytest.mark.parametrize(
    "case",
    [
        Conv2dCase("one-step", 1, 64, 12, 12, 64, 1, 1),
        Conv2dCase("steps", 1, 72, 12, 12, 136, 1, 2, padding=(0, 1)),
        Conv2dCase("strided", 1, 64, 23, 24, 256, 1, 1, stride=(2, 2)),
    ],
    ids=str,
)
def test_weights_stay_where_a_block_has_many_tiles(
    case: Conv2dCase, name: str, hopper: torch.device
) -> None:
    # The simulator has three multiprocessors.
    blocks = multiprocessors(hopper) if hopper.type == "cuda" else 3
    check(replace(case, N=2 * blocks * 128 // 144 + 1), torch.bfloat16, name, hopper)


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.125),
    "silu": F.silu,
    "none": lambda z: z,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_activations(activation: str, with_bias: bool, hopper: torch.device) -> None:
    case = Conv2dCase("3x1", 2, 72, 9, 10, 72, 3, 1, padding=(1, 0))
    values = tensors(case, torch.bfloat16, hopper)
    input, weight, bias, _ = values.values()
    values["input"][1, 0, 0, 0] = float("nan")
    added = bias if with_bias else None
    exact = F.conv2d(
        input.double(), weight.double(), None if added is None else added.double(), **window(case)
    )
    expected = ACTIVATIONS[activation](exact).to(torch.bfloat16)
    plainly = {f.name: getattr(query_of(case, values), f.name) for f in fields(Conv2dQuery)}
    query = Conv2dActQuery(**plainly, activation=activation, negative_slope=0.125)
    for name in ("hopper-64", "hopper-256"):
        output = cuda_conv2d.conv2d(query, name)(input, weight, added)
        # Where float32 and float64 lie on either side of the middle between two bfloat16.
        bound = 2**-8 if activation == "silu" else 0
        torch.testing.assert_close(output, expected, rtol=bound, atol=1e-30, equal_nan=True)


def test_tensors_at_any_address_and_in_any_layout(hopper: torch.device) -> None:
    case = Conv2dCase("layouts", 2, 16, 6, 5, 16, 3, 3, padding=(1, 1))
    values = tensors(case, torch.float16, hopper)
    exact = F.conv2d(values["input"].double(), values["weight"].double(), **window(case))
    odd = torch.empty(values["input"].numel() + 1, dtype=torch.float16, device=hopper)[1:]
    odd = odd.as_strided(values["input"].shape, values["input"].stride(), 1)
    values["input"] = odd.copy_(values["input"])
    values["weight"] = values["weight"].contiguous()
    query = query_of(case, values)
    assert cuda_candidates.hopper_why_not("conv2d", query) == ""
    output = cuda_conv2d.conv2d(query, "hopper")(values["input"], values["weight"], None)
    assert torch.equal(output, exact.half())


def test_gradients_of_few_channels_are_padded(hopper: torch.device) -> None:
    case = Conv2dCase("stem", 2, 3, 18, 17, 16, 5, 5, stride=(2, 2), padding=(2, 2))
    values = tensors(case, torch.bfloat16, hopper)
    input, weight, _, grad = values.values()
    exact = torch.nn.grad.conv2d_input(input.shape, weight.double(), grad.double(), **window(case))
    for layout in (torch.channels_last, torch.contiguous_format):
        values["input"] = input.contiguous(memory_format=layout)
        run = cuda_conv2d.conv2d_grad_input(query_of(case, values), "hopper-64-padded")
        grad_input = run(grad, weight)
        assert torch.equal(grad_input, exact.bfloat16())
        assert grad_input.stride() == values["input"].stride()


REFUSED = {
    "strides of 1 and 2": Conv2dCase("stride", 1, 16, 8, 8, 16, 3, 3, stride=(3, 1)),
    "images of at least the stride": Conv2dCase(
        "one row", 1, 16, 1, 8, 16, 1, 1, stride=(2, 2), padding=(1, 0)
    ),
    "one group": Conv2dCase("groups", 1, 16, 8, 8, 16, 3, 3, groups=2),
    "input: channels in eights": Conv2dCase("C", 1, 12, 8, 8, 16, 3, 3),
    "output: channels in eights": Conv2dCase("K", 1, 16, 8, 8, 12, 3, 3),
    "at least one image": Conv2dCase("N", 0, 16, 8, 8, 16, 3, 3),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_does_not_take_has_a_reason(words: str, hopper: torch.device) -> None:
    query = query_of(REFUSED[words], tensors(REFUSED[words], torch.bfloat16, hopper))
    for op in ("conv2d", "conv2d_grad_input"):
        assert cuda_candidates.hopper_why_not(op, query) == f"it takes {words}"


def test_it_takes_half_types_alone(hopper: torch.device) -> None:
    query = query_of(CASES[0], tensors(CASES[0], torch.float32, hopper))
    assert cuda_candidates.hopper_why_not("conv2d", query) == "it takes half types"


@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_it_is_a_candidate_unless_left_out(
    variable: str | None, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GDFAST_HOPPER", raising=False)
    if variable is not None:
        monkeypatch.setenv("GDFAST_HOPPER", variable)
    query = query_of(CASES[0], tensors(CASES[0], torch.bfloat16, hopper))
    found = [name for name in cuda_candidates.candidates("conv2d", query) if name in HOPPER]
    # The simulator's times tell nothing.
    left_out = variable == "0" or hopper.type != "cuda"
    assert found == ([] if left_out else ["hopper-64", "hopper-128", "hopper-128-tall"])
    assert len(cuda_candidates.candidates("conv2d", query)) > len(found)
