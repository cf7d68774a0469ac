"""Convolution, bias and activation in one kernel, against the two functions in turn."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gdfast
from gdfast import nn, ops
from gdfast.backends.activation import ACTIVATIONS, activate, output_tells
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.errors import BackendError, FallbackWarning
from gdfast.ops import conv2d_act_dispatch

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu", "threads"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Each activation with a slope; the last needs its argument for the gradient, as SiLU does.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"activation": name, "negative_slope": 0.2} for name in ACTIVATIONS},
    "leaky_relu turned": {"activation": "leaky_relu", "negative_slope": -0.3},
}
OF_OUTPUT = [name for name, setting in SETTINGS.items() if output_tells(*setting.values())]
CASES = (
    *ODD,
    # Ways through the kernels that no other case ends: Winograd's, several parts of a reduction
    # with few channels, and lines that are computed by overlapping vectors.
    Conv2dCase("winograd", 2, 70, 9, 14, 68, 3, 3, padding=(1, 1)),
    Conv2dCase("few-in-parts", 1, 8, 5, 21, 16, 7, 7, padding=(3, 3)),
    Conv2dCase("few-out-in-parts", 1, 60, 5, 53, 3, 3, 3, padding=(1, 1)),
)
SMALL = (
    Conv2dCase("asymmetric", 2, 2, 6, 3, 2, 3, 2, (2, 1), (1, 0), (2, 1), 2),
    Conv2dCase("depthwise", 1, 2, 4, 3, 4, 2, 3, (1, 2), (0, 1), groups=2),
    Conv2dCase("empty", 0, 2, 3, 3, 2, 2, 2),
)
CASE = SMALL[0]


def composed(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "relu",
    negative_slope: float = 0.01, **geometry: Any,
) -> Tensor:  # fmt: skip
    return activate(F.conv2d(input, weight, bias, **geometry), activation, negative_slope)


def tensors_of(
    case: Conv2dCase, dtype: torch.dtype = torch.float64, layout: str = "NCHW", whole: bool = False
) -> list[Tensor]:
    """With values that relu6 cuts at both ends."""
    draw = (lambda size: torch.randint(-2, 3, size)) if whole else torch.randn
    tensors = [2 * draw(size) for size in (case.input_shape, case.weight_shape, (case.K,))]
    tensors[:2] = [t.to(memory_format=LAYOUTS[layout]) for t in tensors[:2]]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_the_activation_of_the_convolution_s(
    case: Conv2dCase, dtype: torch.dtype, layout: str, isa: str
) -> None:
    input, weight, bias = (tensor.detach() for tensor in tensors_of(case, dtype, layout))
    for some in (bias, None):
        before = ops.conv2d(input, weight, some, **case.geometry)
        for settings in SETTINGS.values():
            output = ops.conv2d_act(input, weight, some, **case.geometry, **settings)
            expected = activate(before, **settings)
            assert output.stride() == before.stride()
            if settings["activation"] in ("none", "relu", "relu6"):
                assert torch.equal(output, expected)  # rounding and they commute
            else:
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(output, expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.kernels
def test_nan_and_infinity_come_through(isa: str) -> None:
    input, weight = torch.randn(2, 3, 9, 17), torch.randn(8, 3, 1, 1)
    input.view(-1)[::7] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(44)[:132]
    for settings in SETTINGS.values():
        ours, native = (f(input, weight, None, **settings) for f in (ops.conv2d_act, composed))
        torch.testing.assert_close(ours, native, equal_nan=True)


@pytest.mark.kernels
def test_depthwise_weights_that_are_not_finite_spare_the_borders(isa: str) -> None:
    input, weight, bias = torch.rand(2, 3, 5, 21) + 1, torch.randn(3, 1, 3, 3), torch.randn(3)
    weight[0, 0, 1, 0], weight[1, 0, 0, 1] = torch.inf, -torch.inf
    geometry = {"padding": 1, "groups": 3}
    before = ops.conv2d(input, weight, bias, **geometry)
    assert before[0, 0, :, 0].isfinite().all() and before[0, 1, 0].isfinite().all()
    for settings in SETTINGS.values():
        output = ops.conv2d_act(input, weight, bias, **geometry, **settings)
        torch.testing.assert_close(output, activate(before, **settings), equal_nan=True)


@pytest.mark.kernels
def test_bits_do_not_depend_on_the_threads() -> None:
    input, weight, bias = (t.detach() for t in tensors_of(CASES[1], torch.float32))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([
            ops.conv2d_act(input, weight, bias, **CASES[1].geometry, **settings)
            for settings in SETTINGS.values()
        ])  # fmt: skip
    assert all(map(torch.equal, *results))


def passes(
    function: Any, tensors: list[Tensor], case: Conv2dCase, settings: dict[str, Any]
) -> list[Tensor]:
    output = function(*tensors, **case.geometry, **settings)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_gradients_is_at_most_twice_native_s(
    dtype: torch.dtype, setting: str, strict: None
) -> None:
    # Whole numbers are summed without rounding: which side of a kink a value is on is then certain.
    for case, layout in product((*ODD[:7], ODD[-1]), LAYOUTS):
        settings = SETTINGS[setting]
        tensors = tensors_of(case, dtype, layout, whole=True)
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        ours, native = (passes(f, tensors, case, settings) for f in (ops.conv2d_act, composed))
        exact = passes(composed, wide, case, settings)
        eps = torch.finfo(dtype).eps * (10 if dtype == torch.float64 else 1)
        for mine, theirs, true in zip(ours, native, exact, strict=True):
            assert mine.shape == theirs.shape
            error, allowed = ((t.double() - true).norm() for t in (mine, theirs))
            assert error <= 2 * allowed + 4 * eps * true.norm()


def checked_arguments(case: Conv2dCase, setting: str, backend: str = "auto") -> tuple[Any, ...]:
    return (
        case.stride, case.padding * 2, case.dilation, case.groups, *SETTINGS[setting].values(),
        backend,
    )  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_of_any_order(case: Conv2dCase, setting: str) -> None:
    torch.set_num_threads(1)
    tensors = tensors_of(case)

    def function(*tensors: Tensor) -> Tensor:
        return ops.conv2d_act(*tensors, **case.geometry, **SETTINGS[setting])

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)
    assert gradgradcheck(lambda x, w: function(x, w, None), tensors[:2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_function_on_each_backend(setting: str, backend: str) -> None:
    torch.set_num_threads(1)
    arguments = checked_arguments(CASE, setting, backend)

    def function(*tensors: Tensor) -> Tensor:
        return ops.Conv2dActFunction.apply(*tensors, *arguments)

    tensors = tensors_of(CASE)
    torch.testing.assert_close(
        function(*tensors), composed(*tensors, **CASE.geometry, **SETTINGS[setting])
    )
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_operation(setting: str) -> None:
    torch.set_num_threads(1)
    op, arguments = torch.ops.gdfast.conv2d_act, checked_arguments(CASE, setting)
    assert gradcheck(lambda *tensors: op(*tensors, *arguments), tensors_of(CASE))
    assert gradgradcheck(lambda *tensors: op(*tensors, *arguments), tensors_of(CASE))
    if setting not in ("relu", "silu"):
        return  # for each way to its gradient once
    for layout, dtype in (("NCHW", torch.float64), ("channels_last", torch.float32)):
        torch.library.opcheck(op.default, (*tensors_of(CASE, dtype, layout), *arguments))


@pytest.mark.parametrize("setting", ["relu", "silu"])
@pytest.mark.parametrize("needed", list(product((False, True), repeat=3))[1:], ids=str)
def test_any_subset_of_gradients(needed: tuple[bool, ...], setting: str) -> None:
    tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors_of(CASE), needed, strict=True)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    results, flops = [], []
    for function in (ops.conv2d_act, composed):
        counter = FlopCounterMode(display=False)
        with counter:
            output = function(*tensors, **CASE.geometry, **SETTINGS[setting])
            results.append(torch.autograd.grad(output.square().sum(), wanted))
        flops.append(counter.get_total_flops())
    torch.testing.assert_close(*results)
    assert flops[0] == CASE.flops * (1 + needed[0] + needed[1])


@pytest.mark.parametrize("setting", OF_OUTPUT)
def test_what_is_kept_is_the_output_alone(setting: str) -> None:
    tensors, kept = tensors_of(CASE), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = ops.conv2d_act(*tensors, **CASE.geometry, **SETTINGS[setting])
    known = {tensor.data_ptr() for tensor in (*tensors, output)}
    assert {tensor.data_ptr() for tensor in kept} <= known
    output.sum().backward()


@pytest.mark.parametrize("changed", [0, 1, "output"])
def test_a_change_in_place_before_backward_raises(changed: Any) -> None:
    tensors = tensors_of(CASE)
    output = ops.conv2d_act(*tensors, **CASE.geometry)
    with torch.no_grad():
        (output if changed == "output" else tensors[changed]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("setting", SETTINGS)
def test_batched_gradients_and_checkpoints(setting: str) -> None:
    tensors, results = tensors_of(CASE), []
    for function in (ops.conv2d_act, composed):
        settings = {**CASE.geometry, **SETTINGS[setting]}
        output = function(*tensors, **settings)
        generator = torch.Generator().manual_seed(3)
        basis = torch.randn((3, *output.shape), generator=generator, dtype=torch.float64)
        batched = torch.autograd.grad(output, tensors, basis, is_grads_batched=True)
        output = checkpoint(function, *tensors, use_reentrant=False, **settings)
        results.append((*batched, *torch.autograd.grad(output, tensors, basis[0])))
    torch.testing.assert_close(*results)


def test_transforms_run_on_native() -> None:
    input, weight, bias = (t.detach() for t in tensors_of(CASE))
    with pytest.warns(FallbackWarning, match="conv2d_act: running on native"):
        ours, native = (
            torch.func.grad(lambda w, f=f: f(input, w, bias, **CASE.geometry).square().sum())(
                weight
            )
            for f in (ops.conv2d_act, composed)
        )
    torch.testing.assert_close(ours, native)
    with pytest.raises(BackendError, match="'cpu' was asked for"):
        torch.func.grad(lambda w: ops.conv2d_act(input, w, backend="cpu", groups=2).sum())(weight)


@pytest.mark.parametrize("setting", SETTINGS)
def test_autocast(setting: str) -> None:
    tensors = tensors_of(CASE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, native = (
            f(*tensors, **CASE.geometry, **SETTINGS[setting]) for f in (ops.conv2d_act, composed)
        )
    assert ours.dtype == native.dtype == torch.bfloat16
    torch.testing.assert_close(ours, native)
    grads = [torch.autograd.grad(output.float().sum(), tensors) for output in (ours, native)]
    assert all(grad.dtype == torch.float32 for grad in grads[0])


def test_strict_precision_rules_winograd_out() -> None:
    case = Conv2dCase("", 2, 64, 20, 20, 64, 3, 3, padding=(1, 1))
    tensors = [tensor.detach() for tensor in tensors_of(case, torch.float32)]
    exact = composed(*(t.double() for t in tensors), **case.geometry)
    free = ops.conv2d_act(*tensors, **case.geometry)
    with gdfast.precision("strict"):
        strict = ops.conv2d_act(*tensors, **case.geometry)
    errors = [((t.double() - exact).norm() / exact.norm()).item() for t in (strict, free)]
    assert errors[0] < 3e-7 < errors[1] < 1.5e-6


def test_an_unbatched_image_and_named_padding() -> None:
    input, weight, bias = torch.randn(2, 9, 8), torch.randn(5, 2, 3, 2), torch.randn(5)
    for padding, setting in product(("same", "valid", (2, 1)), SETTINGS.values()):
        torch.testing.assert_close(
            ops.conv2d_act(input, weight, bias, padding=padding, **setting),
            composed(input, weight, bias, padding=padding, **setting),
        )


@pytest.mark.parametrize(
    "change", [{"groups": 3}, {"stride": 0}, {"padding": "other"}, {"dilation": 1.5}], ids=str
)
def test_wrong_arguments_raise_as_natively(change: dict[str, Any]) -> None:
    tensors, arguments = tensors_of(CASE), CASE.geometry | change
    with pytest.raises((RuntimeError, TypeError, ValueError)) as native:
        composed(*tensors, **arguments)
    with pytest.raises(native.type, match="conv2d_act: "):
        ops.conv2d_act(*tensors, **arguments)


@pytest.mark.parametrize("backend", ["auto", "cpu", "native"])
def test_unknown_activations_raise(backend: str) -> None:
    input, weight = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 2, 2)
    with pytest.raises(ValueError, match="conv2d_act: activation: expected one of none, relu"):
        ops.conv2d_act(input, weight, activation="tanh", backend=backend)
    with pytest.raises(ValueError, match="conv2d_act: activation: expected one of none, relu"):
        torch.ops.gdfast.conv2d_act(
            input, weight, None, (1, 1), (0,) * 4, (1, 1), 1, "no", 0, "cpu"
        )


def test_torch_function_overrides_see_it() -> None:
    class Mine(torch.Tensor):
        pass

    output = ops.conv2d_act(torch.randn(1, 2, 3, 3).as_subclass(Mine), torch.randn(1, 2, 2, 2))
    assert type(output) is Mine


def test_one_kernel_runs_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    kernel = conv2d_act_dispatch.conv2d_act
    monkeypatch.setattr(
        conv2d_act_dispatch, "conv2d_act", lambda *a: calls.append(a[-3]) or kernel(*a)
    )
    for setting, settings in SETTINGS.items():
        ops.conv2d_act(*tensors_of(CASE), **CASE.geometry, **settings)
        with torch.no_grad():
            ops.conv2d_act(*tensors_of(CASE), **CASE.geometry, **settings)
        inference = [settings["activation"]] * (setting != "none")
        assert calls == inference * (2 if setting in OF_OUTPUT else 1)
        calls.clear()


# --- what compiles and exports code sees of it ---


class Net(torch.nn.Module):
    """One layer for each activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList(
            nn.ConvAct(3, 3, 3, activation=s["activation"], negative_slope=s["negative_slope"])
            for s in SETTINGS.values()
        )

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = input + layer(input)
        return input.mean((2, 3))


def gradients(model: Any, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    model, batch = Net(), torch.randn(2, 3, 7, 6)
    expected = gradients(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(list(gradients(compiled, batch).values()), list(expected.values()))
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), model(batch))
    torch.compiler.reset()


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_model_trains(training: bool) -> None:
    # Exported without gradients, all activations are part of the operation.
    model, batch = Net(), torch.randn(2, 3, 7, 6)
    with torch.set_grad_enabled(training):
        exported = torch.export.export(model, (batch,))
    targets = [node.target for node in exported.graph.nodes]
    operations = targets.count(torch.ops.gdfast.conv2d_act.default)
    assert operations == len(OF_OUTPUT) - 1 if training else len(SETTINGS) - 1
    torch.testing.assert_close(gradients(exported.module(), batch), gradients(model, batch))


# --- the layer ---


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_layer(setting: str) -> None:
    ours = nn.ConvAct(4, 6, 3, stride=2, **SETTINGS[setting])
    assert set(ours.state_dict()) == {"conv.weight", "conv.bias"}
    native = torch.nn.Conv2d(4, 6, 3, 2, 1)
    native.load_state_dict(ours.conv.state_dict())
    input = torch.randn(3, 4, 9, 8)
    expected = activate(native(input), **SETTINGS[setting])
    torch.testing.assert_close(ours(input), expected)
    restored = copy.deepcopy(ours)
    gdfast.restore_(restored)
    assert type(restored.conv) is torch.nn.Conv2d
    assert torch.equal(restored(input), expected)
    assert nn.ConvAct(4, 6, (3, 5), dilation=(2, 1), bias=False)(input).shape == (3, 6, 9, 8)


def test_the_layer_runs_what_it_is_given() -> None:
    layer, input = nn.ConvAct(4, 6, 3), torch.randn(3, 4, 9, 8)
    fused, seen = layer(input), []
    for module in (layer.conv, layer.act):
        handle = module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        torch.testing.assert_close(layer(input), fused)
        handle.remove()
    assert seen == ["Conv2d", "ReLU"]
    layer.act = torch.nn.Tanh()
    torch.testing.assert_close(layer(input), torch.tanh(layer.conv(input)))
    layer.conv.padding_mode = "reflect"
    layer.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    layer.act = torch.nn.LeakyReLU(0.5)
    padded = F.pad(input, (1, 1, 1, 1), mode="reflect")
    expected = F.leaky_relu(F.conv2d(padded, layer.conv.weight, layer.conv.bias), 0.5)
    torch.testing.assert_close(layer(input), expected)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    torch.testing.assert_close(traced(input), expected)
    with pytest.raises(ValueError, match="ConvAct: activation: expected one of none, relu"):
        nn.ConvAct(3, 3, activation="tanh")
