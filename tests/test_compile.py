"""What traces, compiles and exports code sees of ops.conv2d."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdfast
from gdfast import nn, ops
from gdfast.ops.conv2d_autograd import _OPERATIONS

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
ASYMMETRIC: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "groups": 2}
ARGUMENTS = (2, 1), (1, 0, 2, 1), (2, 1), 2, "auto"


class Net(torch.nn.Module):
    """Two of our layers with another between."""

    def __init__(self) -> None:
        super().__init__()
        # No bias in front of BatchNorm: its gradient would be 0.
        self.first = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, 3, padding="same", groups=1, padding_mode="reflect")

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.norm(self.first(input)).relu()).mean((2, 3))


@pytest.fixture
def inductor() -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which torch.compile's inductor runs")
    torch.compiler.reset()


def trained(model: torch.nn.Module, batch: Tensor, steps: int = 3) -> tuple[list[float], Any]:
    """Losses and parameters after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch).square().sum()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool, requires_grad: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(memory_format=memory_format).requires_grad_(requires_grad)

    input, weight, grad = tensor(2, 4, 9, 8), tensor(6, 2, 3, 2), tensor(2, 6, 4, 8)
    bias = torch.randn(6, requires_grad=requires_grad)
    calls = {
        "conv2d": [(input, weight, bias), (input, weight, None)],
        "conv2d_grad_input": [(grad, weight, (2, 4, 9, 8), channels_last)],
        "conv2d_grad_weight": [
            (grad, input, (6, 2, 3, 2), channels_last, True),
            (grad, input, (6, 2, 3, 2), channels_last, False),
        ],
    }
    for name, (op, *_) in _OPERATIONS.items():
        for arguments in calls[name]:
            torch.library.opcheck(op, (*arguments, *ARGUMENTS))


def test_opcheck_of_an_empty_batch() -> None:
    input, weight = torch.randn(0, 4, 9, 8), torch.randn(6, 2, 3, 2)
    torch.library.opcheck(torch.ops.gdfast.conv2d.default, (input, weight, None, *ARGUMENTS))


def test_compiled_whole_and_trained(inductor: None) -> None:
    eager, batch = Net(), torch.randn(3, 2, 8, 7)
    compiled = Net()
    compiled.load_state_dict(eager.state_dict())
    losses, parameters = trained(torch.compile(compiled, fullgraph=True), batch)
    expected, expected_parameters = trained(eager, batch)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in expected_parameters.items():
        torch.testing.assert_close(parameters[f"_orig_mod.{name}"], parameter, rtol=1e-4, atol=1e-5)


@pytest.fixture
def graphs() -> Any:
    """A backend for torch.compile that keeps the graphs, which is faster than inductor."""
    torch.compiler.reset()
    kept: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.append(graph)
        return graph.forward

    yield backend, kept
    torch.compiler.reset()


def test_the_graph_has_our_operation_and_nothing_about_it(graphs: Any) -> None:
    backend, kept = graphs
    compiled = torch.compile(
        lambda x, w, b: ops.conv2d(x, w, b, **ASYMMETRIC), fullgraph=True, backend=backend
    )
    tensors = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 2), torch.randn(6)
    torch.testing.assert_close(compiled(*tensors), F.conv2d(*tensors, **ASYMMETRIC))
    (graph,) = kept
    graph.graph.eliminate_dead_code()
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.gdfast.conv2d.default]


def test_a_change_of_the_switch_compiles_again(graphs: Any) -> None:
    backend, kept = graphs
    compiled = torch.compile(lambda x, w: ops.conv2d(x, w), fullgraph=True, backend=backend)
    input, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 2)
    for choice in ("auto", "native", "auto"):
        with gdfast.backend(choice):
            torch.testing.assert_close(compiled(input, weight), F.conv2d(input, weight))
    targets = [{node.target for node in graph.graph.nodes} for graph in kept]
    assert [torch.ops.gdfast.conv2d.default in target for target in targets] == [True, False]


def test_compiled_for_changing_sizes(graphs: Any) -> None:
    backend, kept = graphs
    weight = torch.randn(7, 5, 4, 3, requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.conv2d(x, weight, stride=2), fullgraph=True, backend=backend, dynamic=True
    )
    # No two sizes alike: torch.compile takes equal ones for one variable.
    for size in ((2, 5, 9, 8), (6, 5, 11, 10), (12, 5, 14, 13)):
        input = torch.randn(size)
        torch.testing.assert_close(compiled(input), F.conv2d(input, weight, stride=2))
    assert len(kept) == 1


def test_compiled_under_autocast(graphs: Any) -> None:
    backend, _ = graphs
    input, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 2)
    compiled = torch.compile(lambda x, w: ops.conv2d(x, w), fullgraph=True, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(input, weight), ops.conv2d(input, weight))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_compiled_transforms(transform: Any, graphs: Any) -> None:
    backend, _ = graphs
    input, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 2)

    def transformed(conv2d: Any) -> Any:
        if transform is torch.func.vmap:
            return transform(lambda scale: conv2d(input, scale * weight))
        return transform(lambda scale: conv2d(input, scale * weight).square().sum())

    scale = torch.rand(3) if transform is torch.func.vmap else torch.rand(())
    compiled = torch.compile(transformed(ops.conv2d), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(scale), transformed(F.conv2d)(scale))


def test_the_function_itself_compiles(graphs: Any) -> None:
    backend, _ = graphs
    weight = torch.randn(6, 2, 3, 2, requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.Conv2dFunction.apply(x, weight, None, *ARGUMENTS),
        fullgraph=True,
        backend=backend,
    )
    input = torch.randn(2, 4, 9, 8)
    output = compiled(input)
    torch.testing.assert_close(output, ops.Conv2dFunction.apply(input, weight, None, *ARGUMENTS))
    assert output.requires_grad


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_trains(strict: bool) -> None:
    model, batch = Net(), torch.randn(3, 2, 8, 7)
    # A copy: the exported module trains the parameters of the one that it was made of.
    exported = torch.export.export(copy.deepcopy(model), (batch,), strict=strict)
    ours = torch.ops.gdfast.conv2d.default
    assert sum(node.target == ours for node in exported.graph.nodes) == 2
    losses, _ = trained(exported.module(), batch)
    expected, _ = trained(model, batch)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def test_exported_for_any_batch_size() -> None:
    model = Net().eval()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model, (torch.randn(3, 2, 8, 7),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        input = torch.randn(size, 2, 8, 7)
        torch.testing.assert_close(exported.module()(input), model(input))


def test_fx_traces_the_call() -> None:
    model = Net()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes].count(ops.conv2d) == 2
    batch = torch.randn(3, 2, 8, 7)
    torch.testing.assert_close(traced.eval()(batch), model.eval()(batch))
    assert trained(traced.train(), batch)[0]


def test_make_fx_sees_the_backward_operations() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradients(input: Tensor, weight: Tensor, bias: Tensor) -> Any:
        output = ops.conv2d(input, weight, bias, **ASYMMETRIC)
        return torch.autograd.grad(output.square().sum(), (input, weight, bias))

    tensors = [torch.randn(size, requires_grad=True) for size in ((2, 4, 9, 8), (6, 2, 3, 2), (6,))]
    traced = make_fx(gradients)(*tensors)
    targets = [str(node.target) for node in traced.graph.nodes]
    for name in _OPERATIONS:
        assert f"gdfast.{name}.default" in targets
    torch.testing.assert_close(traced(*tensors), gradients(*tensors))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace_runs_without_us() -> None:
    model, batch = Net().eval(), torch.randn(3, 2, 8, 7)
    with pytest.warns(gdfast.errors.FallbackWarning, match="traced model"):
        traced = torch.jit.trace(model, batch)
    assert "gdfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(batch), model(batch))
