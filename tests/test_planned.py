"""Layers whose passes are plans, on the CPU: they give what their operations give, and notice all
that those notice.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gdfast
from gdfast import nn
from gdfast.backends import plans
from gdfast.ops import conv2d_dispatch

pytestmark = pytest.mark.usefixtures("fresh_registry", "compiled_cpu")


class Pooled(torch.nn.Module):
    """A convolution, ReLU and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return nn.conv_relu_max_pool(self.conv, images, 2)


def layer_of(name: str) -> tuple[torch.nn.Module, Tensor]:
    """A layer, and a batch for it."""
    torch.manual_seed(0)
    if name == "linear":
        return nn.Linear(70, 9), torch.randn(64, 70)
    images = torch.randn(3, 2, 12, 11)
    if name == "conv":
        return nn.Conv2d(2, 5, 3, padding=1), images
    return (Pooled() if name == "pooled" else nn.MaxPool2d(3, 2, 1)), images


LAYERS = ["pooled", "pooling", "linear", "conv"]


def run(module: torch.nn.Module, batch: Tensor) -> list[Tensor]:
    """Output and gradients of a pass both ways."""
    output = module(batch)
    weights = torch.linspace(-1, 1, output.numel()).to(output.dtype).view(output.shape)
    wanted = [each for each in (batch, *module.parameters()) if each.requires_grad]
    if not wanted:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, wanted, weights)]


def warmed(name: str, needs: bool = True) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """A layer that runs by plans, one like it, and the batch."""
    module, batch = layer_of(name)
    twin, batch = copy.deepcopy(module), batch.requires_grad_(needs)
    for _ in range(5):
        run(module, batch)
    assert units()
    return module, twin, batch


def units() -> list[Any]:
    return [each for each in conv2d_dispatch.units.values() if each]


def by_hand(module: torch.nn.Module, batch: Tensor) -> list[Tensor]:
    with plans.disabled():
        return run(module, batch)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [each.stride() for each in ours] == [each.stride() for each in theirs]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gives_the_same_bits(name: str, needs: bool, layout: Any) -> None:
    module, batch = layer_of(name)
    if batch.dim() == 4:
        batch = batch.contiguous(memory_format=layout)
    batch.requires_grad_(needs)
    twin = copy.deepcopy(module)
    for _ in range(6):
        same(run(module, batch), by_hand(twin, batch))
    assert type(module(batch).grad_fn).__name__ in ("PlannedFunctionBackward", "NoneType")
    # A pooled convolution's gradient in its input goes by way of the convolution's output.
    if name != "pooling" and not (name == "pooled" and needs):
        assert any(each.plan for unit in units() for each in unit._backward.values())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    module, twin, batch = warmed(name)
    for each in (module, twin):
        each.to(dtype)
    batch = batch.detach().to(dtype).requires_grad_()
    for _ in range(4):
        same(run(module, batch), by_hand(twin, batch))


CHANGES: list[Callable[[torch.nn.Module], Any]] = [
    lambda each: each.requires_grad_(False),
    lambda each: next(each.parameters()).requires_grad_(False),
    lambda each: [p.requires_grad_(i == 0) for i, p in enumerate(each.parameters())],
    lambda each: [p.data.mul_(2) for p in each.parameters()],
    lambda each: each.double(),
    lambda each: each.eval(),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["pooled", "linear", "conv"])
def test_notices_changes_of_parameters(name: str, change: Any) -> None:
    module, twin, batch = warmed(name)
    change(module)
    change(twin)
    batch = batch.detach().to(next(module.parameters()).dtype).requires_grad_()
    for _ in range(4):
        same(run(module, batch), by_hand(twin, batch))


@pytest.mark.parametrize(
    "change",
    [
        lambda each: setattr(each, "stride", (2, 1)),
        lambda each: setattr(each, "padding", (1, 0)),
        lambda each: setattr(each, "padding_mode", "reflect"),
        lambda each: setattr(each, "bias", None),
        lambda each: setattr(each, "weight", torch.nn.Parameter(torch.ones(5, 2, 3, 3))),
        lambda each: each.register_forward_hook(lambda _, __, output: output * 2),
        lambda each: torch.nn.utils.parametrizations.weight_norm(each),
        lambda each: setattr(
            each, "forward", lambda images: images * each.weight.sum() + each.bias.sum()
        ),
        lambda each: setattr(
            each, "_conv_forward", lambda images, *_: images * each.weight.sum() + each.bias.sum()
        ),
    ],
)
@pytest.mark.parametrize("name", ["pooled", "conv"])
def test_notices_changes_of_a_convolution(name: str, change: Any) -> None:
    module, twin, batch = warmed(name)
    for each in (module, twin):
        torch.manual_seed(1)
        change(getattr(each, "conv", each))
    for _ in range(4):
        same(run(module, batch), by_hand(twin, batch))


def test_notices_lists_that_change() -> None:
    module, twin = nn.Conv2d(2, 5, 3), torch.nn.Conv2d(2, 5, 3)
    twin.load_state_dict(module.state_dict())
    images, sizes, windows = torch.randn(3, 2, 12, 11), [1, 1], [2, 2]
    module.stride = twin.stride = sizes
    for step in range(8):
        if step == 4:
            sizes[0], windows[0] = 2, 3
        torch.testing.assert_close(module(images), twin(images))
        pooled = torch.nn.functional.max_pool2d(twin(images).relu(), windows)
        torch.testing.assert_close(nn.conv_relu_max_pool(module, images, windows), pooled)


@pytest.mark.parametrize("name", LAYERS)
def test_refuses_what_is_no_tensor(name: str) -> None:
    module, _, _ = warmed(name)
    for wrong in ("images", [1.0], None):
        with pytest.raises(TypeError):
            module(wrong)


def test_a_pooling_with_a_parameter_of_its_own() -> None:
    class Scaled(nn.MaxPool2d):
        def __init__(self) -> None:
            super().__init__(2)
            self.scale = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, images: Tensor) -> Any:
            return super().forward(images) * self.scale

    module, images = Scaled(), torch.randn(3, 2, 12, 11)
    for _ in range(4):
        expected = torch.nn.functional.max_pool2d(images, 2) * 3
        torch.testing.assert_close(module(images), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_pass_in_another_situation_has_a_plan_too(name: str) -> None:
    module, twin, batch = warmed(name, needs=name == "pooling")
    for _ in range(3):
        output, other = module(batch), twin(batch)
        gradient = torch.linspace(-1, 1, output.numel()).view(output.shape)
        with gdfast.precision("strict"):
            wanted = [each for each in (batch, *module.parameters()) if each.requires_grad]
            ours = torch.autograd.grad(output, wanted, gradient)
            wanted = [each for each in (batch, *twin.parameters()) if each.requires_grad]
            with plans.disabled():
                same(list(ours), list(torch.autograd.grad(other, wanted, gradient)))
    passes = [each.plan for unit in units() for each in unit._backward.values()]
    assert len([each for each in passes if each]) >= 2


def test_notices_changes_of_a_pooling() -> None:
    module, twin, batch = warmed("pooling")
    for name, value in (("stride", 1), ("kernel_size", (2, 3)), ("ceil_mode", True)):
        for each in (module, twin):
            setattr(each, name, value)
        same(run(module, batch), by_hand(twin, batch))
    setattr(module, "return_indices", True)  # noqa: B010
    assert len(module(batch)) == 2


@pytest.mark.parametrize("name", LAYERS)
def test_notices_other_batches(name: str) -> None:
    module, twin, batch = warmed(name)
    others = [batch[:2], torch.cat([batch, batch]), batch.detach(), torch.zeros_like(batch)]
    if batch.dim() == 4:
        others += [batch[..., 1:], batch.transpose(2, 3), batch[0]]
    for other in (*others, batch):
        other = other.detach().requires_grad_(other.requires_grad)
        same(run(module, other), by_hand(twin, other))


@pytest.mark.parametrize("name", LAYERS)
def test_notices_modes(name: str) -> None:
    module, twin, batch = warmed(name)
    with gdfast.backend("native"):
        assert "Planned" not in type(module(batch).grad_fn).__name__
    with torch.no_grad():
        assert module(batch).grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(module(batch), twin(batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(batch).dtype == twin(batch).dtype
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    same(run(module, batch), by_hand(twin, batch))
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    same(run(module, batch), by_hand(twin, batch))
    torch.use_deterministic_algorithms(False)
    with gdfast.precision("strict"):
        same(run(module, batch), by_hand(twin, batch))
    same(run(module, batch), by_hand(twin, batch))


@pytest.mark.parametrize("name", LAYERS)
def test_operations_are_seen_by_whoever_looks(name: str) -> None:
    class Looks(TorchDispatchMode):
        seen: ClassVar[list[Any]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    module, _, batch = warmed(name)
    with Looks() as looks:
        run(module, batch)
    assert looks.seen
    if name != "pooled":  # no transform knows our fused operation's gradient
        batched = torch.func.vmap(module)(
            batch.detach().unsqueeze(1).repeat(1, 3, 1, *[1] * (batch.dim() - 2))
        )
        assert batched.shape[0] == len(batch)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_gradients(name: str) -> None:
    module, twin, batch = warmed(name)
    found = []
    for each in (module, twin):
        wanted = [batch, *each.parameters()]
        with plans.disabled() if each is twin else torch.enable_grad():
            loss = each(batch).square().sum()
            first = torch.autograd.grad(loss, wanted, create_graph=True)
            total = sum(gradient.square().sum() for gradient in first)
            found.append([*first, *torch.autograd.grad(total, wanted)])
    same(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_a_second_backward_is_refused(name: str) -> None:
    module, _, batch = warmed(name)
    output = module(batch).sum()
    output.backward(retain_graph=True)
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@pytest.mark.parametrize("name", ["pooled", "linear", "conv"])
def test_what_backward_reads_may_not_be_written_to(name: str) -> None:
    module, _, batch = warmed(name, needs=False)
    output = module(batch).sum()
    batch.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
    output = module(batch).sum()
    with torch.no_grad():
        next(module.parameters()).add_(1)  # which a batch without a gradient leaves unread
    output.backward()


@pytest.mark.parametrize("name", LAYERS)
def test_other_gradients_come_in(name: str) -> None:
    module, twin, batch = warmed(name)
    for each in (module, twin):
        each.zero_grad()
    output, other = module(batch), twin(batch)
    for make in (torch.ones_like, lambda like: torch.ones(()).expand(like.shape)):
        wanted = [batch, *module.parameters()], [batch, *twin.parameters()]
        ours = torch.autograd.grad(output, wanted[0], make(output), retain_graph=True)
        with plans.disabled():
            theirs = torch.autograd.grad(other, wanted[1], make(other), retain_graph=True)
        same(list(ours), list(theirs))
    eye = torch.stack([torch.ones_like(output)] * 2)
    batched = torch.autograd.grad(output, batch, eye, is_grads_batched=True)
    torch.testing.assert_close(batched[0][0], ours[0])


@pytest.mark.parametrize("name", LAYERS)
def test_saved_tensors_may_come_back_as_copies(name: str) -> None:
    module, twin, batch = warmed(name)
    expected = by_hand(twin, batch)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        same(run(module, batch), expected)
    output = checkpoint(module, batch, use_reentrant=False)
    output.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_freed(name: str) -> None:
    module, twin, batch = warmed(name)
    watched = weakref.ref(module)
    lead_to(module)
    run(module, batch)
    del module
    gc.collect()
    assert watched() is None
    same(run(twin, batch), run(twin, batch))


def lead_to(module: Any) -> None:
    """Has all that a memo might own lead to a layer."""
    module.model = [module]
    for each in module.parameters():
        each.model = module
        each.register_hook(lambda gradient: module and gradient)


@pytest.mark.parametrize("casts_first", [False, True])
def test_a_linear_layer_under_autocast_and_without(casts_first: bool) -> None:
    layer, batch = layer_of("linear")
    for casts in (casts_first, not casts_first) * 2:
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            outputs = [layer(batch) for _ in range(4)]
        dtype = torch.bfloat16 if casts else torch.float32
        assert [output.dtype for output in outputs] == [dtype] * 4
    # What came under autocast keeps no plan from what comes without.
    planned = [unit for key, unit in conv2d_dispatch.units.items() if key[0] == "linear"]
    assert any(planned)


def hook(layer: torch.nn.Module, kind: str, model: torch.nn.Module) -> None:
    """Sets a hook on a layer or on its parameter, that leads to the model."""
    if kind == "module":
        layer.register_forward_hook(lambda *_: model and None)
    else:
        next(layer.parameters()).register_hook(lambda _: model and None)


@pytest.mark.parametrize(
    ("name", "kind", "early"),
    [(name, "module", early) for name in ("pooling", "linear") for early in (False, True)]
    + [("linear", "parameter", True)],
)
def test_hooks_that_lead_to_a_model_do_not_keep_it(name: str, kind: str, early: bool) -> None:
    layer, batch = layer_of(name)
    model = torch.nn.Sequential(layer)

    if early:
        hook(layer, kind, model)
    for _ in range(4):
        model(batch)
    if not early:
        hook(layer, kind, model)
        model(batch)
    watched = weakref.ref(model)
    del model, layer
    gc.collect()
    assert watched() is None
