"""The layers that normalise: torch.nn's state and behaviour, alone, compiled and exported."""

from __future__ import annotations

import copy
import inspect
import pickle
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdfast
from gdfast import nn, ops

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

NORMS: tuple[dict[str, Any], ...] = (
    {},
    {"eps": 1e-3, "momentum": 0.3},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
)
NATIVE_ACTS: dict[str, Any] = {
    "none": torch.nn.Identity,
    "relu": torch.nn.ReLU,
    "relu6": torch.nn.ReLU6,
    "leaky_relu": lambda: torch.nn.LeakyReLU(0.2),
    "silu": torch.nn.SiLU,
}


def passes(layer: Any, input: Tensor, *more: Tensor) -> list[Tensor]:
    """Outputs, gradients and buffers over three batches in training and one in evaluation."""
    results = []
    for step in range(4):
        layer.train(step < 3)
        leaf = (input + step).requires_grad_()
        output = layer(leaf, *more)
        output.square().sum().backward()
        results += [output, leaf.grad]
    return [*results, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("arguments", NORMS, ids=str)
def test_batch_norm_2d_is_native_s(arguments: dict[str, Any]) -> None:
    ours, native = nn.BatchNorm2d(6, **arguments), torch.nn.BatchNorm2d(6, **arguments)
    assert repr(ours) == repr(native)
    assert isinstance(ours, torch.nn.BatchNorm2d)
    input = torch.randn(4, 6, 5, 7, dtype=arguments.get("dtype"))
    torch.testing.assert_close(passes(ours, input), passes(native, input), rtol=1e-4, atol=1e-4)
    native.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.state_dict(), native.state_dict())


def test_batch_norm_2d_has_native_s_constructor_and_errors() -> None:
    assert inspect.signature(nn.BatchNorm2d) == inspect.signature(torch.nn.BatchNorm2d)
    with pytest.raises(ValueError, match="expected 4D input"):
        nn.BatchNorm2d(3)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(3)(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("activation", NATIVE_ACTS)
def test_batch_norm_act_2d(activation: str) -> None:
    class Native(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = torch.nn.BatchNorm2d(6), NATIVE_ACTS[activation]()

        def forward(self, input: Tensor, residual: Any = None) -> Tensor:
            output = self.norm(input)
            return self.act(output if residual is None else output + residual)

    ours, native = nn.BatchNormAct2d(6, activation=activation, negative_slope=0.2), Native()
    native.norm.load_state_dict(ours.state_dict())
    input, residual = torch.randn(4, 6, 5, 7), torch.randn(4, 6, 5, 7)
    for more in ((), (residual,)):
        expected = passes(native, input, *more)
        torch.testing.assert_close(passes(ours, input, *more), expected, rtol=1e-4, atol=1e-4)
    assert f"activation={activation}" in repr(ours)


@pytest.mark.parametrize("activation", NATIVE_ACTS)
def test_conv_norm_act(activation: str) -> None:
    ours = nn.ConvNormAct(4, 6, 3, stride=2, activation=activation, negative_slope=0.2)
    assert set(ours.state_dict()) == {
        "conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip
    native = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, 2, 1, bias=False),
        torch.nn.BatchNorm2d(6),
        NATIVE_ACTS[activation](),
    )
    native.load_state_dict(dict(zip(native.state_dict(), ours.state_dict().values(), strict=True)))
    input = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(passes(ours, input), passes(native, input), rtol=1e-4, atol=1e-4)
    same = nn.ConvNormAct(4, 6, (3, 5), dilation=(2, 1), bias=True)
    assert same(input).shape == (3, 6, 9, 8)
    assert same.conv.bias is not None


def test_conv_norm_act_runs_what_it_is_given() -> None:
    layer, input = nn.ConvNormAct(4, 6, 3), torch.randn(3, 4, 9, 8)
    residual = torch.randn(3, 6, 9, 8)
    fused = layer(input, residual)
    seen = []
    handle = layer.norm.register_forward_hook(lambda *_: seen.append("norm"))
    torch.testing.assert_close(layer(input, residual), fused)
    handle.remove()
    handle = layer.act.register_forward_pre_hook(lambda *_: seen.append("act"))
    torch.testing.assert_close(layer(input, residual), fused)
    handle.remove()
    assert seen == ["norm", "act"]
    layer.act = torch.nn.Tanh()
    torch.testing.assert_close(
        layer(input), torch.tanh(F.batch_norm(layer.conv(input), None, None, training=True))
    )
    layer.act = torch.nn.LeakyReLU(0.5)
    assert layer(input).min() < -0.3


@pytest.mark.parametrize("layer", [nn.BatchNormAct2d, lambda c, **k: nn.ConvNormAct(c, c, **k)])
def test_unknown_activations_raise(layer: Any) -> None:
    with pytest.raises(ValueError, match="activation: expected one of none, relu"):
        layer(3, activation="tanh")


def test_copies_and_pickles() -> None:
    model = torch.nn.Sequential(nn.ConvNormAct(4, 6, 3), nn.BatchNormAct2d(6, activation="silu"))
    input = torch.randn(3, 4, 9, 8)
    model(input)
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input), model(input))
        assert repr(other) == repr(model)


def test_nn_gives_ours_by_name() -> None:
    assert nn.BatchNorm2d is not torch.nn.BatchNorm2d
    assert nn.BatchNorm1d is torch.nn.BatchNorm1d
    for name in ("BatchNorm2d", "BatchNormAct2d", "ConvNormAct"):
        assert name in dir(nn)
        assert getattr(nn, name).__module__ == "gdfast.nn.norm"


def test_autocast_runs_on_our_kernels() -> None:
    layer, input = nn.ConvNormAct(4, 6, 3), torch.randn(3, 4, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(input)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert layer.norm.weight.grad.dtype == torch.float32


# --- what traces, compiles and exports code sees of it ---


class Net(torch.nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ConvNormAct(3, 8, 3, activation="leaky_relu")
        self.first = nn.ConvNormAct(8, 8, 3)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNormAct2d(8)
        self.last = nn.BatchNormAct2d(8, activation="silu")

    def forward(self, input: Tensor) -> Tensor:
        stem = self.stem(input)
        output = self.norm(self.second(self.first(stem)), stem)
        return self.last(output, stem).mean((2, 3))


def trained(model: Any, batch: Tensor) -> tuple[list[float], list[Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(batch).square().sum()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses, [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def image() -> Tensor:
        return torch.randn(2, 4, 5, 6).to(memory_format=memory_format)

    forward = torch.ops.gdfast.batch_norm_act.default
    backward = torch.ops.gdfast.batch_norm_act_backward.default
    weight, bias = torch.rand(4, requires_grad=True), torch.randn(4, requires_grad=True)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    for activation, residual, source in (
        ("relu", None, "input"), ("relu", image(), "output"), ("silu", image(), "residual"),
    ):  # fmt: skip
        settings = 1e-5, activation, 0.1
        for training in (True, False):
            running = (None, None) if training else (mean, var)
            input = image().requires_grad_()
            arguments = input, weight, bias, *running, residual, training, *settings, "auto"
            torch.library.opcheck(forward, arguments)
            output, m, s, _ = forward(*arguments)
            other = {"input": None, "output": output, "residual": residual}[source]
            tensors = image(), input, weight, bias, other, m, s
            for wanted in ([True] * 3 + [residual is not None], [False, True, False, False]):
                torch.library.opcheck(
                    backward,
                    (*(None if t is None else t.detach() for t in tensors), wanted, training,
                     *settings, source, "auto"),
                )  # fmt: skip


@pytest.fixture
def eager_graphs() -> Any:
    """A backend for torch.compile that keeps the graphs, which is faster than inductor."""
    torch.compiler.reset()
    yield lambda graph, _: graph.forward
    torch.compiler.reset()


def test_compiled_whole_and_trained() -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which torch.compile's inductor runs")
    torch.compiler.reset()
    eager, batch = Net(), torch.randn(3, 3, 8, 7)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    (losses, ours), (expected, eagers) = trained(compiled, batch), trained(eager, batch)
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-5)


def test_compiled_in_evaluation_and_for_changing_sizes(eager_graphs: Any) -> None:
    model = Net()
    model(torch.randn(3, 3, 8, 7))
    for mode in (model.eval(), model.train()):
        compiled = torch.compile(mode, fullgraph=True, backend=eager_graphs, dynamic=True)
        for size in ((2, 3, 8, 7), (4, 3, 10, 9)):
            input = torch.randn(size)
            twin = copy.deepcopy(model)
            torch.testing.assert_close(compiled(input), twin(input))
            torch.testing.assert_close(list(model.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_trains(strict: bool) -> None:
    model, batch = Net(), torch.randn(3, 3, 8, 7)
    exported = torch.export.export(copy.deepcopy(model), (batch,), strict=strict)
    ours = torch.ops.gdfast.batch_norm_act.default
    assert sum(node.target == ours for node in exported.graph.nodes) == 4
    losses, _ = trained(exported.module(), batch)
    expected, _ = trained(model, batch)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_fx_traces_the_layers_as_native_s() -> None:
    model, batch = Net(), torch.randn(3, 3, 8, 7)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    layers = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert layers == ["stem", "first", "norm", "last"]
    torch.testing.assert_close(traced(batch), model(batch))
    torch.testing.assert_close(traced.eval()(batch), model.eval()(batch))
    alone = torch.fx.symbolic_trace(nn.BatchNormAct2d(3).eval())
    assert [node.target for node in alone.graph.nodes].count(ops.batch_norm_act) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace_runs_without_us() -> None:
    model, batch = Net().eval(), torch.randn(3, 3, 8, 7)
    with pytest.warns(gdfast.errors.FallbackWarning, match="traced model"):
        traced = torch.jit.trace(model, batch)
    assert "gdfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(batch), model(batch))


def test_checkpointing_recomputes() -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.BatchNormAct2d(4)
    twin = copy.deepcopy(model)
    inputs = [torch.randn(2, 4, 5, 6).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    checkpoint(model, inputs[0], use_reentrant=False).square().sum().backward()
    twin(inputs[1]).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
