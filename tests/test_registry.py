"""The five rules of backends: order, refusal with reasons, the visible fallback, names, parts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gdfast
from gdfast import backends, ops
from gdfast.backends import Backend, Query
from gdfast.backends.registry import preview
from gdfast.errors import BackendError, FallbackWarning

pytestmark = pytest.mark.usefixtures("fresh_registry")

QUERY = Query(torch.device("cpu"), torch.float32)


def backend_named(name: str, **arguments: Any) -> Backend:
    arguments.setdefault("operations", {"conv2d": lambda query: None})
    return Backend(name, **arguments)


def counting(calls: list[str], name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A convolution for a Backend that notes its calls and computes natively."""

    def bind(query: Query) -> Callable[..., Any]:
        kernel = made(query)

        def run(*tensors: Any) -> Any:
            calls.append(name)
            return kernel(*tensors)

        return run

    return bind


def test_the_first_without_a_reason_runs() -> None:
    gone = backend_named("gone", missing=lambda: "not built")
    no_floats = backend_named(
        "no-floats", why_not=lambda q: "no floats" if q.dtype.is_floating_point else ""
    )
    for backend in (gone, no_floats, backend_named("third"), backend_named("fourth")):
        backends.register(backend)
    cpu_was_first = backends.resolve("conv2d", QUERY).name
    meta = Query(torch.device("meta"), torch.float32)
    assert cpu_was_first in ("cpu", "third")  # without the compiled module there is no "cpu"
    assert backends.resolve("conv2d", meta).name == "third"
    assert backends.resolve("conv2d", Query(torch.device("meta"), torch.int32)).name == "no-floats"


def test_order_of_registration_is_the_order_of_preference_and_the_reference_is_last() -> None:
    backends.register(backend_named("late"))
    names = [entry.name for entry in backends.available()]
    assert names[:2] == ["cpu", "cuda"]
    assert names[-2:] == ["late", "reference"]


def test_registering_the_same_name_takes_its_place() -> None:
    before = [entry.name for entry in backends.available()]
    other = backend_named("cpu")
    backends.register(other)
    assert [entry.name for entry in backends.available()] == before
    assert backends.resolve("conv2d", QUERY) is other


@pytest.mark.parametrize("name", ["auto", "native"])
def test_names_with_a_meaning_cannot_be_registered(name: str) -> None:
    with pytest.raises(ValueError, match="register: name: expected"):
        backends.register(backend_named(name))


def test_operations_resolve_one_by_one() -> None:
    half = backend_named("cpu", operations={"conv2d": lambda query: None})
    backends.register(half)
    assert backends.resolve("conv2d", QUERY).name == "cpu"
    with pytest.warns(FallbackWarning, match="cpu: it has no conv2d_grad_input kernel"):
        assert backends.resolve("conv2d_grad_input", QUERY).name == "reference"


def test_falling_to_the_reference_warns_once_with_every_reason() -> None:
    query = Query(torch.device("meta"), torch.float32)
    with pytest.warns(FallbackWarning) as caught:
        assert backends.resolve("conv2d", query).name == "reference"
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("conv2d: running on native PyTorch (cpu: ")
    assert "; cuda: " in message
    backends.registry._resolved.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("conv2d", query).name == "reference"


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(BackendError, match=r"'cuda' was asked for and cannot run this: .+"):
        backends.resolve("conv2d", QUERY, "cuda")
    with pytest.raises(BackendError, match="'cuda' was asked for"):
        ops.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), backend="cuda")


def test_unknown_names_list_the_known() -> None:
    for call in (
        lambda: backends.resolve("conv2d", QUERY, "gpu"),
        lambda: gdfast.backend("gpu").__enter__(),
        lambda: ops.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), backend="gpu"),
    ):
        with pytest.raises(
            ValueError, match=r"one of auto, cpu, cuda, .*reference, native.* 'gpu'"
        ):
            call()


def test_the_switch_concerns_auto_only_and_ends_with_its_context() -> None:
    with gdfast.backend("native"):
        assert backends.resolve("conv2d", QUERY).name == "reference"
        assert backends.chosen() == "reference"
        assert backends.chosen("cpu") == "cpu"
        with gdfast.backend("auto"):
            assert backends.chosen() == "auto"
        assert backends.chosen() == "reference"
    assert backends.chosen() == "auto"
    with pytest.raises(KeyError), gdfast.backend("native"):
        raise KeyError
    assert backends.chosen() == "auto"


def test_the_switch_holds_on_every_thread() -> None:
    seen = []
    with gdfast.backend("native"):
        thread = threading.Thread(target=lambda: seen.append(backends.chosen()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_preview_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preview("conv2d", Query(torch.device("meta"), torch.float32)) == "reference"
        with gdfast.backend("native"):
            assert preview("conv2d", QUERY) == "reference"


def test_available_tells_why_not() -> None:
    entries = {entry.name: entry for entry in backends.available()}
    assert entries["reference"].ok
    for entry in entries.values():
        assert entry.ok == (entry.reason == "")


def test_a_partial_backend_is_used_for_what_it_has() -> None:
    calls: list[str] = []
    reference = backends.registry._backends["reference"].operations
    forward_only = {"conv2d": counting(calls, "forward", reference["conv2d"])}
    backends.register(Backend("cpu", forward_only))
    input = torch.randn(2, 3, 6, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 2, requires_grad=True)
    with pytest.warns(FallbackWarning, match="has no conv2d_grad_"):
        ops.conv2d(input, weight).square().sum().backward()
    assert calls == ["forward"]
    expected = torch.autograd.grad(F.conv2d(input, weight).square().sum(), (input, weight))
    torch.testing.assert_close((input.grad, weight.grad), expected)


def test_backward_keeps_the_backend_of_its_forward() -> None:
    # Also where the switch has another position by then.
    calls: list[str] = []
    reference = backends.registry._backends["reference"].operations
    passes = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")
    operations = {name: counting(calls, name, reference[name]) for name in passes}
    backends.register(Backend("mine", operations))
    input = torch.randn(2, 3, 6, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 2, requires_grad=True)
    with gdfast.backend("mine"):
        output = ops.conv2d(input, weight)
    with gdfast.backend("native"):
        output.sum().backward()
    assert calls == [*passes]


def test_queries_see_geometry_and_strides() -> None:
    seen: list[Any] = []

    def why_not(query: Any) -> str:
        seen.append(query)
        return "it only looks"

    backends.register(Backend("cpu", {"conv2d": lambda query: None}, why_not=why_not))
    input = torch.randn(2, 6, 9, 8).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 3, 3, 2)
    with pytest.warns(FallbackWarning, match="it only looks"):
        ops.conv2d(input, weight, stride=(2, 1), padding=(1, 0), groups=2)
    (query,) = seen
    assert (query.device.type, query.dtype, query.layout) == ("cpu", torch.float32, torch.strided)
    assert query.geometry.output_size == (2, 4, 5, 7)
    assert (query.geometry.stride, query.geometry.padding) == ((2, 1), (1, 0, 1, 0))
    assert query.strides == (input.stride(), weight.stride(), (140, 1, 28, 4))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_environment_chooses() -> None:
    code = "from gdfast import backends; print(backends.chosen())"
    result = run_python(code, GDFAST_BACKEND="native")
    assert result.stdout.strip() == "reference", result.stderr


def test_a_wrong_name_in_the_environment_is_an_error_that_names_it() -> None:
    result = run_python("from gdfast import ops", GDFAST_BACKEND="gpu")
    assert result.returncode != 0
    assert "GDFAST_BACKEND=gpu: backend: name: expected one of auto, cpu" in result.stderr


def test_without_the_compiled_module_everything_runs_and_says_so(tmp_path: Path) -> None:
    code = (
        "import torch, warnings, gdfast; from gdfast import backends, ops\n"
        "print([e.reason for e in backends.available() if e.name == 'cpu'])\n"
        "warnings.simplefilter('error')\n"
        "ops.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))\n"
    )
    result = run_python(code, GDFAST_NATIVE_DIR=str(tmp_path))
    assert "gdfast._cpu: " in result.stdout
    assert "FallbackWarning: conv2d: running on native PyTorch (cpu: gdfast._cpu: " in result.stderr
