"""A convolution and the norm behind it as one node: it gives what the two operations give."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import gdfast
from gdfast import nn
from gdfast.backends import plans
from gdfast.nn import norm as norm_module
from gdfast.ops import conv2d_dispatch
from gdfast.ops.conv2d_norm_act import Unit

pytestmark = pytest.mark.usefixtures("fresh_registry", "widened_bfloat16")

ACTIVATIONS = ["none", "relu", "relu6", "leaky_relu", "silu"]


def block(activation: str = "relu", **options: Any) -> nn.ConvNormAct:
    torch.manual_seed(0)
    layer = nn.ConvNormAct(
        3, 4, (3, 2), (2, 1), (1, 0), activation=activation, negative_slope=0.1, **options
    )
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.norm.bias.uniform_(-1, 1)
    return layer


def images(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(5, 3, 9, 8, generator=generator).to(dtype)
    if channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    return batch.requires_grad_()


def run(layer: nn.ConvNormAct, batch: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    """Output, gradients and buffers of a pass both ways."""
    output = layer(batch, residual)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    inputs = [batch, *layer.parameters()]
    if residual is not None:
        inputs.append(residual)
    wanted = [each for each in inputs if each.requires_grad]
    gradients = torch.autograd.grad(output, wanted, weights.to(output.dtype))
    return [output, *gradients, *(each.clone() for each in layer.buffers())]


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the two operations run, each as a node of its own."""
    monkeypatch.setattr(norm_module, "unit", lambda *_: None)


def nodes(output: Tensor) -> list[str]:
    """The names of the nodes from an output on, by the way of the first inputs."""
    names, node = [], output.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return names


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gives_the_same_bits(
    dtype: torch.dtype, activation: str, training: bool, with_residual: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    layer = block(activation, bias=True, dtype=dtype).train(training)
    twin, batch = copy.deepcopy(layer), images(dtype)
    residual = None
    if with_residual:
        residual = torch.randn(layer(batch).shape, dtype=dtype).requires_grad_()
        twin = copy.deepcopy(layer)
    results = [run(layer, batch, residual) for _ in range(5)]
    output = layer(batch, residual)
    assert nodes(output)[0] == "_UnitFunctionBackward"
    assert nodes(output)[1].endswith("AccumulateGrad")
    apart(monkeypatch)
    for each in results:
        same(each, run(twin, batch, residual))


@pytest.mark.parametrize("frozen", ["images", "norm", "conv bias", "nothing"])
def test_gives_the_gradients_that_are_asked_for(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, batch = block(bias=True), images(channels_last=True)
    batch.requires_grad_(frozen != "images")
    for param in layer.norm.parameters():
        param.requires_grad_(frozen != "norm")
    assert layer.conv.bias is not None
    layer.conv.bias.requires_grad_(frozen != "conv bias")
    twin = copy.deepcopy(layer)
    results = [run(layer, batch) for _ in range(5)]
    assert nodes(layer(batch))[0] == "_UnitFunctionBackward"
    apart(monkeypatch)
    for each in results:
        same(each, run(twin, batch))


def test_a_frozen_weight_is_left_to_the_two_operations() -> None:
    layer, batch = block(), images()
    layer.conv.weight.requires_grad_(False)
    run(layer, batch)
    run(layer, batch)
    assert "_UnitFunctionBackward" not in nodes(layer(batch))


def second_order(layer: nn.ConvNormAct, batch: Tensor) -> list[Tensor]:
    inputs = [batch, *layer.parameters()]
    wanted = [each for each in inputs if each.requires_grad]
    first = torch.autograd.grad(layer(batch).square().sum(), wanted, create_graph=True)
    total = torch.stack([gradient.square().sum() for gradient in first]).sum()
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


@pytest.mark.parametrize("first_layer", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu", "leaky_relu"])
def test_gradients_of_gradients(
    activation: str, first_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = block(activation, bias=True, dtype=torch.float64)
    batch = images(torch.float64).requires_grad_(not first_layer)
    run(layer, batch)
    ours = second_order(layer, batch)
    apart(monkeypatch)
    # Sums over the ways to a tensor are taken in another order.
    torch.testing.assert_close(ours, second_order(layer, batch), rtol=1e-12, atol=1e-10)


def test_a_second_backward_is_refused() -> None:
    layer, batch = block(), images()
    run(layer, batch)
    total = layer(batch).sum()
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("changed", ["weight", "batch"])
def test_what_backward_reads_may_not_be_written_to(changed: str) -> None:
    layer, batch = block(), images()
    run(layer, batch)
    total = layer(batch * 1.0 if changed == "weight" else (given := batch * 1.0)).sum()
    with torch.no_grad():
        (layer.conv.weight if changed == "weight" else given).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_checkpointing_may_begin_before_it_is_known() -> None:
    layer, batch = block(), images()
    twin = copy.deepcopy(layer)
    for _ in range(6):
        output = checkpoint(layer, batch, use_reentrant=False)
        expected = twin(batch)
        parameters = list(layer.parameters())
        ours = torch.autograd.grad(output.square().sum(), [batch, *parameters])
        theirs = torch.autograd.grad(expected.square().sum(), [batch, *twin.parameters()])
        same(list(ours), list(theirs))


def test_what_is_saved_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def saved() -> list[tuple[int, ...]]:
        sizes: list[tuple[int, ...]] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(batch)
        return sizes

    layer, batch = block(bias=True), images()
    run(layer, batch)
    ours = saved()
    apart(monkeypatch)
    assert ours == saved()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.conv.register_forward_hook(lambda *_: None),
        lambda layer: layer.conv.register_full_backward_hook(lambda *_: None),
        lambda layer: vars(layer.conv).update(forward=layer.conv.forward),
    ],
    ids=["hook", "backward hook", "own forward"],
)
def test_hooks_see_the_convolution(change: Callable[[Any], Any]) -> None:
    layer, batch = block(), images()
    run(layer, batch)
    change(layer)
    assert "_UnitFunctionBackward" not in nodes(layer(batch))


def count_units() -> int:
    return sum(isinstance(each, Unit) for each in conv2d_dispatch.units.values())


def test_other_sizes_modes_and_settings_are_other_ones() -> None:
    layer, batch = block(), images()
    twin = copy.deepcopy(layer)
    for each in (layer, layer, twin, twin):
        run(each, batch)
    assert count_units() == 1
    for change in (
        lambda each: each.eval(), lambda each: setattr(each.norm, "eps", 0.1),
        lambda each: setattr(each.conv, "padding", (2, 2)), lambda each: each.train(),
    ):  # fmt: skip
        change(layer)
        change(twin)
        ours = [run(layer, batch) for _ in range(5)]
        with pytest.MonkeyPatch.context() as patch:
            apart(patch)
            for each in ours:
                same(each, run(twin, batch))
    assert count_units() == 5


def test_batches_are_counted_once() -> None:
    layer, batch = block(), images()
    for count in range(1, 5):
        version = layer.norm.num_batches_tracked._version
        run(layer, batch)
        assert int(layer.norm.num_batches_tracked) == count
        assert layer.norm.num_batches_tracked._version == version + 1


def test_statistics_of_all_batches_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batch = block(momentum=None), images()
    twin = copy.deepcopy(layer)
    for _ in range(4):
        ours = run(layer, batch)
    apart(monkeypatch)
    for _ in range(4):
        theirs = run(twin, batch)
    same(ours, theirs)


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batch = block(), images()
    twin = copy.deepcopy(layer)

    def cast(each: nn.ConvNormAct) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = each(batch)
        return [output, *torch.autograd.grad(output.float().sum(), [batch, *each.parameters()])]

    ours = [cast(layer) for _ in range(5)]
    assert ours[2][0].dtype == torch.bfloat16
    apart(monkeypatch)
    for each in ours:
        same(each, cast(twin))


def test_without_gradients_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batch = block(), images()
    with torch.no_grad():
        layer(batch)
        twin = copy.deepcopy(layer)
        with profile() as profiled:
            ours = layer(batch)
        assert not any("conv2d" in event.key for event in profiled.key_averages())
        apart(monkeypatch)
        same([ours], [twin(batch)])
    assert ours.grad_fn is None


def test_some_of_the_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def each_alone(layer: nn.ConvNormAct) -> list[Tensor]:
        return [
            torch.autograd.grad(layer(batch).square().sum(), [each])[0]
            for _ in range(3)
            for each in (batch, *layer.parameters())
        ]

    layer, batch = block(bias=True), images()
    run(layer, batch)
    run(layer, batch)
    ours = each_alone(layer)
    apart(monkeypatch)
    same(ours, each_alone(layer))


@pytest.mark.parametrize("known_first", [True, False])
def test_saved_tensors_may_come_back_in_another_layout(known_first: bool) -> None:
    layer, batch = block(bias=True), images(channels_last=True)
    expected = run(copy.deepcopy(layer).double(), batch.detach().double().requires_grad_())
    if known_first:
        for _ in range(6):
            run(layer, batch)
    for contiguous in (True, True, False, True):
        unpack = Tensor.contiguous if contiguous else Tensor.detach
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            _, *ours = run(layer, batch)[:6]
        for our, exact in zip(ours, expected[1:6], strict=True):
            torch.testing.assert_close(our.double(), exact, rtol=1e-4, atol=1e-4)


def test_settings_may_be_lists() -> None:
    layer, batch = block(), images()
    expected = run(copy.deepcopy(layer), batch)
    layer.conv.stride, layer.conv.padding = [2, 1], [1, 0]  # type: ignore[assignment]
    same(run(layer, batch), expected)


def test_what_is_no_tensor_is_told() -> None:
    with pytest.raises(TypeError, match="conv2d"):
        block()(None)  # type: ignore[arg-type]


def test_copies_for_autocast_are_freed_with_what_is_saved() -> None:
    layer = block()
    batch = images().detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(6):
            output = layer(batch)
            output.float().sum().backward()
    assert nodes(output)[0].startswith("_UnitFunction") and output.grad_fn is not None
    assert getattr(output.grad_fn, "weight") is None  # noqa: B009


def parameter(like: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full_like(like, 0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda each: setattr(each.conv, "weight", parameter(each.conv.weight)),
        lambda each: setattr(each.conv, "bias", parameter(each.norm.bias)),
        lambda each: setattr(each.norm, "weight", None),
        lambda each: setattr(each.norm, "momentum", 0.7),
        lambda each: setattr(each.norm, "momentum", None),
        lambda each: setattr(each.norm, "eps", 0.5),
        lambda each: setattr(each.norm, "track_running_stats", False),
        lambda each: setattr(each.conv, "dilation", (2, 2)),
        lambda each: each.norm.eval(),
        lambda each: each.norm.weight.requires_grad_(False),
        lambda each: each.conv.weight.requires_grad_(False),
        lambda each: each.double(),
        lambda each: each.conv.register_forward_hook(lambda _, __, output: output * 2),
        lambda each: setattr(each, "act", torch.nn.SiLU()),
    ],
)
def test_changes_to_layers_that_ran_before(change: Callable[[Any], Any]) -> None:
    layer, batch = block(), images()
    twin = copy.deepcopy(layer)
    ours = [run(layer, batch) for _ in range(6)][-1]
    with pytest.MonkeyPatch.context() as patch:
        apart(patch)
        same(ours, [run(twin, batch) for _ in range(6)][-1])
    change(layer)
    change(twin)
    batch = batch.detach().to(layer.conv.weight.dtype).requires_grad_()
    ours = run(layer, batch)
    with pytest.MonkeyPatch.context() as patch:
        apart(patch)
        same(ours, run(twin, batch))


def test_what_decides_for_layers_that_ran_before() -> None:
    layer, batch = block(), images()
    for _ in range(5):
        run(layer, batch)
    with gdfast.backend("native"):
        assert "NativeBatchNorm" in "".join(nodes(layer(batch)))
    with torch.no_grad():
        assert layer(batch).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(batch).dtype is torch.bfloat16
    assert layer(batch.detach()).requires_grad
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    layer(batch)
    handle.remove()
    assert layer.conv in seen


def test_evaluation_without_a_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batch = block(momentum=None).eval(), images()
    ours = [run(layer, batch) for _ in range(5)]
    apart(monkeypatch)
    for each in ours:
        same(each, run(layer, batch))


@pytest.mark.parametrize("leads_back", [False, True])
def test_layers_are_freed(leads_back: bool) -> None:
    layer, batch = block(), images()
    if leads_back:
        layer.norm.owner = [layer]
    for _ in range(5):
        run(layer, batch)
    weight = weakref.ref(layer.conv.weight)
    del layer
    gc.collect()
    assert weight() is None


def test_plans_and_single_calls_give_the_same_bits() -> None:
    layer, batch = (
        block(bias=True).to(memory_format=torch.channels_last),
        images(channels_last=True),
    )
    residual = torch.randn_like(layer(batch)).requires_grad_()
    twin = copy.deepcopy(layer)
    ours = [run(layer, batch, residual) for _ in range(6)]
    with plans.disabled():
        for each in ours:
            same(each, run(twin, batch, residual))
