"""What the compiler makes of the Triton kernels for GPUs that are not here: nothing is run."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from triton_here import NOT_IN_INTERPRETER

from gdfast.bench import triton_code
from gdfast.bench.triton_code import LAYERS, Code

pytestmark = NOT_IN_INTERPRETER
ARCHITECTURES = pytest.mark.parametrize("capability", [80, 90])
LAYER = {case.name.split()[0]: case for case in LAYERS}


@cache
def layer(name: str, capability: int, dtype: torch.dtype, precision: str = "ieee") -> list[Code]:
    """Three passes: forward, grad_input, grad_weight, and the sum of the splits."""
    with triton_code.ahead_of_time(capability) as codes:
        triton_code.launch_conv2d(LAYER[name], dtype, precision)
    assert len(codes) == 4
    return codes[:3]


@pytest.mark.parametrize("name", ["3x3", "3x3/2", "1x1"])
def test_hopper_multiplies_from_shared_memory_and_loads_16_bytes(name: str) -> None:
    for code in layer(name, 90, torch.bfloat16):
        assert code.count("HGMMA") and not code.count("HMMA"), code.kernel
        assert code.loads == code.wide_loads == code.count("LDGSTS") > 0, code.kernel
        assert code.stack_bytes == 0, code.kernel
        assert code.shared_bytes <= 227 << 10


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_hopper_multiplies_boxes_from_where_descriptors_load_them(name: str) -> None:
    with triton_code.ahead_of_time(90) as codes:
        triton_code.launch_conv2d(LAYER[name], torch.bfloat16, tiles="tma")
    assert {code.kernel for code in codes} == {"conv2d_tma_kernel"}
    assert {code.settings["SWAPPED"] for code in codes} == {True, False}
    for code in codes:
        # Nothing but whole boxes is loaded, stored, or carried through registers to be multiplied.
        assert code.count("HGMMA") and not code.count("HMMA"), code.settings
        assert code.loads == code.count("UTMALDG") > 0 and code.count("UTMASTG"), code.settings
        assert not code.count(r"LDS|STG\."), code.settings
        assert code.stack_bytes == 0 and code.shared_bytes <= 227 << 10


def test_ampere_multiplies_on_its_tensor_cores() -> None:
    for code in layer("3x3", 80, torch.bfloat16):
        assert code.count("HMMA") and code.wide_loads and code.stack_bytes == 0, code.kernel
        assert code.shared_bytes <= 163 << 10


def test_few_channels() -> None:
    forward, _, grad_weight = layer("stem", 90, torch.bfloat16)
    for code in (forward, grad_weight):
        assert code.count("HGMMA") and code.stack_bytes == 0, code.kernel


def test_float32_takes_three_products_of_tf32_where_tf32_is_not_allowed() -> None:
    for one, three in zip(
        layer("3x3", 90, torch.float32, "tf32"), layer("3x3", 90, torch.float32, "tf32x3"),
        strict=True,
    ):  # fmt: skip
        assert one.count("HGMMA") and three.count("HGMMA")
        assert one.stack_bytes == three.stack_bytes == 0, one.kernel
        # Corrections that are NaN, as those of infinities are, are left out.
        assert three.count(r"FSETP\.NAN") and not one.count(r"FSETP\.NAN"), three.kernel


def test_float16_multiplies_as_bfloat16_does() -> None:
    for half, other in zip(
        layer("3x3", 90, torch.float16), layer("3x3", 90, torch.bfloat16), strict=True
    ):
        assert half.count("HGMMA") == other.count("HGMMA") > 0, half.kernel
        assert half.wide_loads == other.wide_loads and half.stack_bytes == 0, half.kernel


@ARCHITECTURES
def test_bias_and_activation_stay_in_the_kernel_and_in_registers(capability: int) -> None:
    with triton_code.ahead_of_time(capability) as codes:
        triton_code.launch_conv2d_act(LAYER["3x3"], torch.bfloat16, "silu")
    (code,) = codes
    assert code.settings["BIAS"] and code.settings["ACTIVATION"] == "silu"
    assert code.count("HGMMA|HMMA") and code.count(r"MUFU\.EX2") and code.stack_bytes == 0


@ARCHITECTURES
def test_depthwise_layers_load_16_bytes(capability: int) -> None:
    with triton_code.ahead_of_time(capability) as codes:
        triton_code.launch_conv2d(LAYER["depthwise"], torch.bfloat16)
    for code in codes[:3]:
        assert code.wide_loads and code.stack_bytes == 0, code.kernel


@ARCHITECTURES
def test_what_is_bound_by_memory_loads_and_stores_16_bytes(capability: int) -> None:
    with triton_code.ahead_of_time(capability) as codes:
        triton_code.launch_batch_norm((256, 256, 56, 56), torch.bfloat16)
        triton_code.launch_max_pool2d((256, 64, 112, 112), torch.bfloat16)
        triton_code.launch_sgd(torch.float32)
        triton_code.launch_sgd(torch.bfloat16)
    assert len(codes) == 11
    assert [code.settings["MASTER"] for code in codes[-3:]] == [False, False, True]
    for code in codes:
        assert code.stack_bytes == 0, code.kernel
        if code.kernel not in ("statistics_kernel", "parameters_kernel"):  # of one row
            assert code.wide_loads, code.kernel
        if code.kernel in ("normalise_kernel", "gradients_kernel", "sgd_kernel"):
            assert code.count(r"STG\.E\.128"), code.kernel
