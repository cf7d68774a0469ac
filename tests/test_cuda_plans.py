"""Plans of CUDA kernels: they give what single calls give, in the simulator or on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gdfast
from gdfast import native, nn
from gdfast.backends import plans
from gdfast.ops import conv2d_dispatch
from gdfast.ops.conv2d_norm_act import Unit

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


def passes(layer: nn.ConvNormAct, images: Tensor, residual: Tensor | None) -> list[Tensor]:
    """Output, gradients and buffers of a pass both ways."""
    inputs = [images, *layer.parameters(), *([] if residual is None else [residual])]
    output = layer(images, residual)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).to(output.dtype)
    weights = weights.view(output.shape).contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(output, inputs, weights)
    return [output.detach(), *gradients, *(each.clone() for each in layer.buffers())]


def units_with_norms() -> list[Unit]:
    return [each for each in conv2d_dispatch.units.values() if isinstance(each, Unit)]


def planned() -> tuple[int, int]:
    """How many units have plans forward, and how many backward."""
    units = units_with_norms()
    backward = [any(each.plan for each in unit._backward.values()) for unit in units]
    return sum(unit._plan is not None for unit in units), sum(backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_casts_weights_for_autocast(
    dtype: torch.dtype, bias: bool, cuda_device: torch.device
) -> None:
    torch.manual_seed(0)
    layer = nn.ConvNormAct(8, 16, 3, bias=bias, device=cuda_device)
    layer = layer.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(layer)
    images = torch.randn(3, 8, 6, 5).to(cuda_device, memory_format=torch.channels_last)
    images.requires_grad_()
    with gdfast.backend("cuda"), torch.autocast(cuda_device.type, dtype):
        for step in range(7):
            given = images.to(dtype) if step % 3 else images
            ours = passes(layer, given, None)
            with plans.disabled():
                theirs = passes(twin, given, None)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    units = units_with_norms()
    assert any(unit._wide_plan for unit in units)
    wide = [each for unit in units for each in unit._backward.values() if each.how[1]]
    assert wide and (bias or all(each.plan for each in wide))


def test_gradients_of_gradients_under_autocast(cuda_device: torch.device) -> None:
    torch.manual_seed(0)
    layer = nn.ConvNormAct(8, 16, 3, device=cuda_device, activation="silu")
    layer = layer.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(layer)
    images = torch.randn(3, 8, 6, 5).to(cuda_device, torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()

    def second_order(each: nn.ConvNormAct) -> list[Tensor]:
        inputs = [images, *each.parameters()]
        output = each(images)
        gradients = torch.autograd.grad(output.float().square().sum(), inputs, create_graph=True)
        total = sum(each.float().square().sum() for each in gradients)
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, inputs))

    with gdfast.backend("cuda"), torch.autocast(cuda_device.type, torch.bfloat16):
        for _ in range(6):
            passes(layer, images, None)
        ours = second_order(layer)
        with plans.disabled():
            theirs = second_order(twin)
    # A weight's gradient is a sum, of half types here and of float32 there.
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 2 * torch.finfo(torch.bfloat16).eps * other.norm()


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gives_the_same_bits(
    dtype: torch.dtype, activation: str, with_residual: bool, cuda_device: torch.device
) -> None:
    torch.manual_seed(0)
    options = {"activation": activation, "device": cuda_device, "dtype": dtype}
    layer = nn.ConvNormAct(8, 16, 3, bias=with_residual, **options)
    layer = layer.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(layer)

    def randoms(channels: int) -> Tensor:
        images = torch.randn(3, channels, 6, 5).to(cuda_device, dtype)
        return images.contiguous(memory_format=torch.channels_last).requires_grad_()

    images, residual = randoms(8), randoms(16) if with_residual else None
    with gdfast.backend("cuda"):
        for _ in range(6):
            ours = passes(layer, images, residual)
            with plans.disabled():
                theirs = passes(twin, images, residual)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    forward, backward = planned()
    # Hopper's kernel for half types leaves a bias's gradient to torch.
    assert forward == 1 and (backward == 1 or (with_residual and dtype == torch.bfloat16))


def test_tf32_may_be_allowed_between_calls(cuda_device: torch.device) -> None:
    layer = nn.ConvNormAct(8, 16, 3, device=cuda_device).to(memory_format=torch.channels_last)
    images = torch.randn(3, 8, 6, 5).to(cuda_device, memory_format=torch.channels_last)
    images.requires_grad_()
    results = {}
    with gdfast.backend("cuda"):
        for allowed in (True, False) * 3:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
                *ours, _, _, _ = passes(layer, images, None)
                with plans.disabled():
                    *theirs, _, _, _ = passes(copy.deepcopy(layer), images, None)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            results[allowed] = ours[0]
    assert not torch.equal(results[True], results[False])


def both_ways(module: torch.nn.Module, images: Tensor) -> list[Tensor]:
    """Output and gradients."""
    output = module(images)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).to(output.dtype)
    wanted = [each for each in (images, *module.parameters()) if each.requires_grad]
    gradients = torch.autograd.grad(output, wanted, weights.view(output.shape))
    return [output.detach(), *gradients]


class Pooled(torch.nn.Module):
    """A convolution, ReLU and pooling."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 32, 3, **options)

    def forward(self, images: Tensor) -> Tensor:
        return nn.conv_relu_max_pool(self.conv, images, 2)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_convolutions_give_the_same_bits(
    dtype: torch.dtype, layout: Any, channels: int, with_gradient: bool, cuda_device: torch.device
) -> None:
    torch.manual_seed(0)
    module = Pooled(channels, device=cuda_device, dtype=dtype).to(memory_format=layout)
    twin = copy.deepcopy(module)
    images = torch.randn(3, channels, 12, 11).to(cuda_device, dtype, memory_format=layout)
    images.requires_grad_(with_gradient)
    with gdfast.backend("cuda"):
        for _ in range(5):
            ours = both_ways(module, images)
            with plans.disabled():
                theirs = both_ways(twin, images)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    units = [each for each in conv2d_dispatch.units.values() if each]
    # On Hopper what gradients of few channels, and a bias's beside many, go through has no plan.
    has_plan = native.cuda_is_simulated or (channels < 16 and not with_gradient)
    if layout is torch.channels_last and has_plan:
        assert any(each.plan for unit in units for each in unit._backward.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_gives_the_same_bits(layout: Any, cuda_device: torch.device) -> None:
    module = nn.MaxPool2d(3, 2, 1)
    images = torch.randn(3, 8, 12, 11).to(cuda_device, memory_format=layout).requires_grad_()
    with gdfast.backend("cuda"):
        for _ in range(5):
            ours = both_ways(module, images)
            with plans.disabled():
                theirs = both_ways(module, images)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    units = [each for each in conv2d_dispatch.units.values() if each]
    assert any(each.plan for unit in units for each in unit._backward.values())
