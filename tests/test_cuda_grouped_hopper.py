"""The kernels for groups of few channels on Hopper, on such a GPU or in the simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda_conv2d import check, check_bias_and_activation, passes, query_of, tensors_of
from test_cuda_grouped import OPS, ours, small_integers

from gdfast import native
from gdfast.backends import cuda_candidates, cuda_conv2d, cuda_grouped
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

HOPPER, WHOLE = "grouped-hopper", "grouped-whole"
SAME = {"padding": (1, 1)}
# Twins of small images, the last without one; other small images, and bands of larger ones; parts
# of slabs, bands and columns. Where 7 columns and padding make up 8, a row ends in the next one.
CASES = [
    Conv2dCase("32s-7x7", 5, 128, 7, 7, 128, 3, 3, groups=4, **SAME),
    Conv2dCase("16s-14x10", 3, 32, 14, 10, 32, 3, 3, groups=2, **SAME),
    Conv2dCase("8s-7x7", 2, 16, 7, 7, 16, 3, 3, groups=2, **SAME),
    Conv2dCase("8s-8x7", 2, 24, 8, 7, 24, 3, 3, groups=3, **SAME),
    Conv2dCase("16s-11x14", 2, 80, 11, 14, 80, 3, 3, groups=5, **SAME),
    Conv2dCase("2s-no-padding", 1, 16, 10, 15, 16, 3, 3, groups=8),
    Conv2dCase("4s-wide-padding", 1, 8, 5, 4, 8, 3, 3, padding=(3, 4), groups=2),
    Conv2dCase("4s-rows", 2, 72, 22, 13, 72, 3, 3, groups=18, **SAME),
    Conv2dCase("32s-rows", 1, 96, 23, 16, 96, 3, 3, groups=3, **SAME),
    Conv2dCase("16s-columns", 1, 32, 7, 61, 32, 3, 3, padding=(2, 1), groups=2),
    Conv2dCase("8s-many-rows", 1, 16, 69, 6, 16, 3, 3, groups=2, **SAME),
]
OFTEN = [CASES[i] for i in (0, 1, 2, 7, 8)]


def exact_of(case: Conv2dCase, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return passes(case, {name: t.double() for name, t in values.items()}, "reference")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case: Conv2dCase, hopper: torch.device) -> None:
    values = small_integers(case, torch.float16, hopper)
    for our, expected in zip(ours(case, values, HOPPER), exact_of(case, values), strict=True):
        assert expected.abs().max() <= 2048
        assert torch.equal(our.double(), expected)


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_no_bias(case: Conv2dCase, hopper: torch.device, thread_order: str) -> None:
    """Twins are not for sums that something is done to."""
    values = small_integers(case, torch.bfloat16, hopper)
    input, weight, bias, _ = values.values()
    output = cuda_conv2d.conv2d(query_of(case, values), HOPPER)(input, weight, None)
    expected = exact_of(case, values)[0] - bias.double()[:, None, None]
    assert torch.equal(output, expected.to(output.dtype))


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_bfloat16(case: Conv2dCase, hopper: torch.device) -> None:
    values = tensors_of(case, torch.bfloat16, True, hopper)
    check(case, values, ours(case, values, HOPPER))


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_thread_orders(case: Conv2dCase, hopper: torch.device, thread_order: str) -> None:
    """What is compared is exact, and so is the same in any order."""
    values = small_integers(case, torch.bfloat16, hopper)
    for our, expected in zip(ours(case, values, HOPPER), exact_of(case, values), strict=True):
        assert torch.equal(our, expected.to(our.dtype))


@pytest.mark.parametrize("name", ["input", "weight", "grad"])
def test_what_is_copied_first(name: str, hopper: torch.device) -> None:
    """What the TMA unit does not read where it lies; a weight of any layout is read there."""
    case = CASES[0]
    values = small_integers(case, torch.float16, hopper)
    expected = ours(case, values, HOPPER)
    whole = torch.zeros(values[name].numel() + 1, dtype=torch.float16, device=hopper)
    moved = whole[1:].as_strided(values[name].shape, values[name].stride())
    values[name] = moved.copy_(values[name])
    for result, right in zip(ours(case, values, HOPPER), expected, strict=True):
        assert torch.equal(result, right)


# As many images as a block has and some more; a slab of all its groups and some of one.
WHOLE_CASES = [
    Conv2dCase("32s-7x7", 19, 96, 7, 7, 96, 3, 3, groups=3, **SAME),
    Conv2dCase("16s-14x14", 5, 80, 14, 14, 80, 3, 3, groups=5, **SAME),
    Conv2dCase("8s-28x28", 3, 72, 28, 28, 72, 3, 3, groups=9, **SAME),
    Conv2dCase("4s-56x56", 2, 72, 56, 56, 72, 3, 3, groups=18, **SAME),
]


@pytest.mark.parametrize("case", WHOLE_CASES, ids=str)
def test_whole_images(case: Conv2dCase, hopper: torch.device, thread_order: str) -> None:
    for values, exact in (
        (small_integers(case, torch.bfloat16, hopper), True),
        (tensors_of(case, torch.bfloat16, True, hopper), False),
    ):
        query = query_of(case, values)
        assert not any(cuda_candidates.grouped_why_not(op, query, WHOLE) for op in OPS)
        input, weight, _, grad = values.values()
        results = [
            (
                cuda_conv2d.conv2d(query, by)(input, weight, None),
                cuda_conv2d.conv2d_grad_input(query, by)(grad, weight),
                *cuda_conv2d.conv2d_grad_weight(query, by)(grad, input, True),
            )
            for by in (WHOLE, HOPPER)
        ]
        for our, other in zip(*results, strict=True):
            if exact:
                assert torch.equal(our, other)
            else:
                torch.testing.assert_close(our, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group_of_whole_images(
    value: float, hopper: torch.device
) -> None:
    case = Conv2dCase("4s", 1, 16, 56, 56, 16, 3, 3, groups=4, **SAME)
    values = small_integers(case, torch.bfloat16, hopper)
    values["weight"] = torch.where(values["weight"] == 0, 1, values["weight"])
    values["bias"] = torch.zeros_like(values["bias"])
    # In corners, and in rows whose place in a ring another one takes.
    for row, column in ((0, 0), (17, 20), (18, 31), (38, 48), (55, 55)):
        values["input"][0, 5, row, column] = values["grad"][0, 6, row, column] = value
    exact = exact_of(case, values)
    query = query_of(case, values)
    output = cuda_conv2d.conv2d(query, WHOLE)(values["input"], values["weight"], None)
    grad_input = cuda_conv2d.conv2d_grad_input(query, WHOLE)(values["grad"], values["weight"])
    for our, right in zip((output, grad_input), exact[:2], strict=True):
        assert torch.equal(our.isfinite(), right.isfinite())
        assert torch.equal(our.isnan(), right.isnan())
        kept = right.isfinite()
        assert torch.equal(our[kept].double(), right[kept])


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_bias_and_activation(activation: str, hopper: torch.device) -> None:
    case = CASES[7]
    values = tensors_of(case, torch.float16, True, hopper)
    check_bias_and_activation(case, values, HOPPER, activation, exact_of(case, values)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [*OFTEN, CASES[5]], ids=str)
def test_what_is_not_finite_stays_in_its_group(
    case: Conv2dCase, value: float, hopper: torch.device
) -> None:
    values = small_integers(case, torch.float16, hopper)
    values["weight"] = torch.where(values["weight"] == 0, 1, values["weight"])
    values["input"][:, 5] = value
    values["input"][0, 0, -1, -1] = value  # beside what a tile has beyond the image
    # In float64: on a GPU, native's half types let it into other groups.
    exact = exact_of(case, values)
    results = ours(case, values, HOPPER)
    for i in (0, 2, 3):
        assert torch.equal(results[i].isfinite(), exact[i].isfinite())
        assert torch.equal(results[i].isnan(), exact[i].isnan())
    values = small_integers(case, torch.float16, hopper)
    values["weight"] = torch.where(values["weight"] == 0, 1, values["weight"])
    values["grad"][:, 3, 1:] = value
    exact = exact_of(case, values)
    results = ours(case, values, HOPPER)
    for i in (1, 2, 3):
        assert torch.equal(results[i].isfinite(), exact[i].isfinite())


@pytest.mark.parametrize("place", ["input", "grad"])
@pytest.mark.parametrize("case", WHOLE_CASES, ids=str)
def test_what_is_beside_an_image_does_not_count(
    case: Conv2dCase, place: str, hopper: torch.device
) -> None:
    """Corners in infinities: what a tile has beyond an image, and beside it, does not meet them."""
    case = replace(case, N=2)
    values = small_integers(case, torch.bfloat16, hopper)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        values[place][-1, :, row, column] = torch.inf
    other = "grad" if place == "input" else "input"
    values[other] = torch.where(values[other] == 0, 1, values[other])
    exact = exact_of(case, values)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(case, values), WHOLE)
    for our, expected in zip(kernel(values["grad"], values["input"], True), exact[2:], strict=True):
        assert torch.equal(our.isfinite(), expected.isfinite())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(CASES[0], N=0), "at least one image"),
        (replace(CASES[0], R=5, padding=(2, 1)), "3 x 3"),
        (replace(CASES[0], stride=(1, 2)), "stride 1"),
        (replace(CASES[0], groups=1), "groups"),
    ],
)
def test_what_it_does_not_take(case: Conv2dCase, reason: str, hopper: torch.device) -> None:
    query = query_of(case, tensors_of(case, torch.float16, True, hopper))
    assert reason in cuda_candidates.grouped_why_not("conv2d", query, HOPPER)


@pytest.mark.parametrize(
    ("case", "most"), [(WHOLE_CASES[0], 2**30), *((case, 65535) for case in WHOLE_CASES[2:])],
    ids=str,
)  # fmt: skip
def test_images_that_a_grid_has_no_blocks_for(
    case: Conv2dCase, most: int, hopper: torch.device
) -> None:
    query = query_of(case, tensors_of(case, torch.bfloat16, True, hopper))
    for more in (0, 1):
        many = replace(query, geometry=replace(query.geometry, N=most + more))
        for op in OPS[:2]:
            reason = cuda_candidates.grouped_why_not(op, many, WHOLE)
            assert ("fewer images" in reason) == bool(more)


def test_it_is_the_first_choice_on_a_gpu(hopper: torch.device) -> None:
    case = CASES[7]
    query = query_of(case, tensors_of(case, torch.float16, True, hopper))
    query = replace(query, device=torch.device("cuda", 0))
    for op in (*OPS, "conv2d_act"):
        assert cuda_candidates.candidates(op, query)[:2] == (HOPPER, "grouped")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("by", "case"), [(HOPPER, CASES[0]), *((WHOLE, case) for case in WHOLE_CASES)], ids=str
)
def test_parts_become_gradients_and_updates(
    by: str, case: Conv2dCase, splits: int, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdfast.backends.sgd import SgdHyper, SgdTensors

    values = small_integers(case, torch.bfloat16, hopper)
    assert native.cuda is not None
    splits_of = f"conv2d_{cuda_grouped.BINDINGS[by]}_splits"
    monkeypatch.setattr(native.cuda, splits_of, lambda problem: splits)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(case, values), by)
    grad, input, weight = values["grad"], values["input"], values["weight"]
    gradient, _ = kernel(grad, input, False)
    begun, grad_bias = kernel.begin(grad, input, True)  # type: ignore[attr-defined]
    assert torch.equal(begun.gradient(), gradient)
    assert torch.equal(grad_bias, kernel(grad, input, True)[1])
    updated = weight.float()
    expected = updated.double() - 0.25 * exact_of(case, values)[2]
    begun, _ = kernel.begin(grad, input, False)  # type: ignore[attr-defined]
    hyper = SgdHyper(0.25, 0.0, 0.0, 0.0, False, False, True, False, None, None)
    begun.update(SgdTensors([updated], [], [], []), hyper)
    assert torch.equal(updated.double(), expected)
