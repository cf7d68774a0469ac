"""Gradients of ops.conv2d: of any order, for any subset of inputs, whatever asks for them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gdfast import nn, ops
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.errors import FallbackWarning

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
BACKENDS = ("cpu", "reference")
ASYMMETRIC = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "groups": 2}

# Small enough for numerical derivatives, off every default together.
SMALL = (
    Conv2dCase("plain", 1, 1, 3, 4, 2, 2, 2),
    Conv2dCase("asymmetric", 2, 2, 6, 3, 2, 3, 2, (2, 1), (1, 0), (2, 1), 2),
    Conv2dCase("depthwise", 1, 2, 4, 3, 4, 2, 3, (1, 2), (0, 1), groups=2),
    Conv2dCase("1x1", 2, 2, 2, 2, 3, 1, 1, stride=(1, 2)),
    Conv2dCase("empty", 0, 2, 3, 3, 2, 2, 2),
)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    # Numerical derivatives are thousands of tiny calls.
    torch.set_num_threads(1)


def function_of(case: Conv2dCase, backend: str) -> Callable[..., Tensor]:
    """The Function itself, so that the reference backend too goes through our own formulas."""
    sides = case.padding * 2

    def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.Conv2dFunction.apply(
            input, weight, bias, case.stride, sides, case.dilation, case.groups, backend
        )

    return conv2d


def tensors_of(case: Conv2dCase, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in (case.input_shape, case.weight_shape, case.K)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Conv2dCase, backend: str) -> None:
    conv2d, tensors = function_of(case, backend), tensors_of(case)
    assert gradcheck(conv2d, tensors)
    assert gradcheck(conv2d, tensors[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case: Conv2dCase, backend: str) -> None:
    conv2d, tensors = function_of(case, backend), tensors_of(case)
    assert gradgradcheck(conv2d, tensors)
    # Where no bias takes part its gradient has to stay out of the second order too.
    assert gradgradcheck(conv2d, tensors[:2])


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_gradgradcheck_of_the_operations(case: Conv2dCase) -> None:
    # The formulas registered with the dispatcher, which compiled and exported code runs.
    arguments = case.stride, case.padding * 2, case.dilation, case.groups, "auto"
    conv2d = torch.ops.gdfast.conv2d
    assert gradcheck(lambda *tensors: conv2d(*tensors, *arguments), tensors_of(case))
    assert gradgradcheck(lambda *tensors: conv2d(*tensors, *arguments), tensors_of(case))


@pytest.mark.parametrize("needed", list(product((False, True), repeat=3))[1:], ids=str)
@pytest.mark.parametrize("case", [SMALL[1], SMALL[3]], ids=str)
def test_any_subset_of_gradients(case: Conv2dCase, needed: tuple[bool, ...]) -> None:
    tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors_of(case), needed, strict=True)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    ours, native = (
        torch.autograd.grad(conv2d(*tensors, **case.geometry).square().sum(), wanted)
        for conv2d in (ops.conv2d, F.conv2d)
    )
    torch.testing.assert_close(ours, native)


@pytest.mark.parametrize("needed", list(product((False, True), repeat=3))[1:], ids=str)
def test_only_what_is_needed_is_computed(
    needed: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [
        t.requires_grad_(n)
        for t, n in zip(map(Tensor.detach, tensors_of(SMALL[1])), needed, strict=True)
    ]
    counter = FlopCounterMode(display=False)
    output = ops.conv2d(*tensors, **SMALL[1].geometry)
    with counter:
        output.sum().backward()
    assert counter.get_total_flops() == SMALL[1].flops * (needed[0] + needed[1])
    assert [tensor.grad is not None for tensor in tensors] == list(needed)


@pytest.mark.parametrize("case", [case for case in ODD if case.N], ids=str)
def test_gradients_of_expanded_and_sliced_gradients(case: Conv2dCase) -> None:
    tensors = tensors_of(case)
    n, k, p, q = case.output_shape
    expanded = torch.tensor(0.5, dtype=torch.float64).expand(case.output_shape)
    per_channel = torch.randn(k, 1, 1, dtype=torch.float64).expand(case.output_shape)
    sliced = torch.randn(n, k, p + 2, 3 * q + 1, dtype=torch.float64)[:, :, 1:-1, 1::3]
    for grad_output in (expanded, per_channel, sliced):
        ours, native = (
            torch.autograd.grad(conv2d(*tensors, **case.geometry), tensors, grad_output)
            for conv2d in (ops.conv2d, F.conv2d)
        )
        torch.testing.assert_close(ours, native)


def test_second_order_equals_native() -> None:
    # A gradient penalty, as GANs train with.
    tensors = tensors_of(SMALL[1])
    results = []
    for conv2d in (ops.conv2d, F.conv2d):
        output = conv2d(*tensors, **SMALL[1].geometry).tanh()
        grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(penalty, tensors))
    torch.testing.assert_close(*results)


def test_third_order_equals_native() -> None:
    input, weight = tensors_of(SMALL[0])[:2]
    results = []
    for conv2d in (ops.conv2d, F.conv2d):
        value = conv2d(input, weight).pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, (input, weight), create_graph=True)
            value = sum(grad.pow(2).sum() for grad in grads)
        results.append(torch.autograd.grad(value, (input, weight)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_a_change_in_place_before_backward_raises_as_natively(changed: str) -> None:
    for conv2d in (ops.conv2d, F.conv2d):
        input, weight, bias = tensors_of(SMALL[1])
        output = conv2d(input, weight, bias, **ASYMMETRIC)
        with torch.no_grad():
            {"input": input, "weight": weight}[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_a_second_backward_raises_as_natively() -> None:
    for conv2d in (ops.conv2d, F.conv2d):
        input, weight, _ = tensors_of(SMALL[0])
        output = conv2d(input, weight).sum()
        output.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.backward()


def test_saves_only_what_is_needed() -> None:
    saved: list[Tensor] = []
    input, weight, bias = tensors_of(SMALL[1])

    def count(*tensors: Tensor) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            ops.conv2d(*tensors, **ASYMMETRIC)
        return len(saved)

    assert count(input, weight, bias) == 2
    assert count(input.detach(), weight, bias) == 1
    assert count(input, weight.detach(), bias) == 1
    assert count(input.detach(), weight.detach(), bias) == 0
    with torch.no_grad():
        assert count(input, weight, bias) == 0


def test_backward_runs_on_another_thread() -> None:
    input, weight, bias = tensors_of(SMALL[1])
    output = ops.conv2d(input, weight, bias, **ASYMMETRIC, backend="cpu").sum()
    thread = threading.Thread(target=output.backward)
    thread.start()
    thread.join()
    expected = torch.autograd.grad(
        F.conv2d(input, weight, bias, **ASYMMETRIC).sum(), (input, weight, bias)
    )
    torch.testing.assert_close((input.grad, weight.grad, bias.grad), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    tensors = tensors_of(SMALL[1])

    def block(*tensors: Tensor) -> Tensor:
        return ops.conv2d(*tensors, **ASYMMETRIC).relu()

    plain = torch.autograd.grad(block(*tensors).square().sum(), tensors)
    output = checkpoint(block, *tensors, use_reentrant=use_reentrant)
    output.square().sum().backward()
    torch.testing.assert_close(tuple(tensor.grad for tensor in tensors), plain)


def test_hooks_see_native_s_gradients() -> None:
    layers = nn.Conv2d(4, 2, 3), torch.nn.Conv2d(4, 2, 3)
    layers[1].load_state_dict(layers[0].state_dict())
    input = torch.randn(2, 4, 6, 5)
    seen: list[list[Tensor]] = [[], []]
    for layer, found in zip(layers, seen, strict=True):
        leaf = input.clone().requires_grad_()
        layer.register_full_backward_hook(lambda m, gi, go, f=found: f.extend((*gi, *go)))
        layer.weight.register_hook(found.append)
        layer.weight.register_post_accumulate_grad_hook(lambda p, f=found: f.append(p.grad))
        layer(leaf).square().sum().backward()
        found.append(leaf.grad)
    assert len(seen[0]) == 5
    torch.testing.assert_close(seen[0], seen[1])


class TestTransforms:
    """torch.func, forward-mode AD and batched gradients: native's operators, and it is said."""

    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 2, 3, 2, dtype=torch.float64, generator=generator)

    @staticmethod
    def loss(conv2d: Any, input: Tensor, weight: Tensor) -> Tensor:
        return conv2d(input, weight, **ASYMMETRIC).square().sum()

    def both(self, transformed: Callable[[Any], Any]) -> tuple[Any, Any]:
        with pytest.warns(FallbackWarning, match="conv2d: running on native PyTorch"):
            ours = transformed(lambda *a, **k: ops.conv2d(*a, **k))
        return ours, transformed(F.conv2d)

    def test_grad(self) -> None:
        def transformed(conv2d: Any) -> Any:
            return torch.func.grad(lambda w: self.loss(conv2d, self.input, w))(self.weight)

        torch.testing.assert_close(*self.both(transformed))

    def test_vmap(self) -> None:
        def transformed(conv2d: Any) -> Any:
            return torch.func.vmap(lambda x: self.loss(conv2d, x, self.weight))(
                self.input.unsqueeze(1)
            )

        torch.testing.assert_close(*self.both(transformed))

    def test_per_sample_gradients(self) -> None:
        def transformed(conv2d: Any) -> Any:
            grad = torch.func.grad(lambda w, x: self.loss(conv2d, x[None], w))
            return torch.func.vmap(grad, in_dims=(None, 0))(self.weight, self.input)

        torch.testing.assert_close(*self.both(transformed))

    def test_jvp(self) -> None:
        def transformed(conv2d: Any) -> Any:
            return torch.func.jvp(
                lambda w: self.loss(conv2d, self.input, w), (self.weight,), (self.weight,)
            )

        torch.testing.assert_close(*self.both(transformed))

    def test_forward_mode(self) -> None:
        def transformed(conv2d: Any) -> Any:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(self.weight, torch.ones_like(self.weight))
                return forward_ad.unpack_dual(self.loss(conv2d, self.input, dual))[:2]

        torch.testing.assert_close(*self.both(transformed))

    def test_hessian(self) -> None:
        def transformed(conv2d: Any) -> Any:
            return torch.func.hessian(lambda w: self.loss(conv2d, self.input, w))(self.weight)

        torch.testing.assert_close(*self.both(transformed))

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_batched_gradients(self, create_graph: bool) -> None:
        # The forward pass is ours; only the batch of backward passes is native's.
        input, weight = self.input.clone().requires_grad_(), self.weight.clone().requires_grad_()
        basis = torch.randn(3, 2, 2, 2, 4, dtype=torch.float64)
        results = []
        for conv2d in (ops.conv2d, F.conv2d):
            output = conv2d(input, weight, **ASYMMETRIC)
            grads = torch.autograd.grad(
                output, (input, weight), basis, is_grads_batched=True, create_graph=create_graph
            )
            if create_graph:
                grads = torch.autograd.grad(sum(g.square().sum() for g in grads), (input, weight))
            results.append(grads)
        torch.testing.assert_close(*results)


def test_flops_are_counted_as_natively() -> None:
    for case in [case for case in ODD if case.N]:
        counts = []
        for conv2d in (ops.conv2d, F.conv2d):
            input, weight, bias = tensors_of(case, torch.float32)
            with FlopCounterMode(display=False) as counter:
                conv2d(input, weight, bias, **case.geometry).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == 3 * case.flops
        if case.groups == 1:  # native counts a grouped backward pass as if it had no groups
            assert counts[0] == counts[1], case


def test_output_of_a_layer_survives_copies() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    input = torch.randn(2, 4, 6, 5)
    expected = layer(input)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is nn.Conv2d
        assert torch.equal(twin(input), expected)
