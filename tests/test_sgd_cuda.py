"""SGD by the CUDA kernel, on a GPU or in the simulator; and its share of elements among threads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sgd_kernels import DTYPES, LR, SETTINGS, assert_as_close_as_native, native_loop
from torch.nn import Parameter

from gdfast import native, ops, optim
from gdfast.backends import backend

NEEDS_MODULE = pytest.mark.skipif(
    native.cuda is None, reason=f"needs gdfast._cuda: {native.failure('cuda')}"
)


def test_blocks_and_threads_on_the_cpu(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source, program = Path(__file__).with_name("sgd_chunks_test.cpp"), tmp_path / "sgd_chunks_test"
    if not (source.parents[1] / "csrc").is_dir():
        pytest.skip("needs the sources beside the tests")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *sanitizers, source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, env={})
    assert result.returncode == 0, result.stdout + result.stderr


@NEEDS_MODULE
def test_the_module_loads_without_a_driver_and_refuses_what_does_not_fit() -> None:
    assert native.cuda is not None
    arguments: list[Any] = [LR, 0.0, 0.0, 0.0, False, False, False, False, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="grads: expected 1 entries"):
        native.cuda.sgd([64], [], [], [], [1], "float32", *arguments)
    with pytest.raises(ValueError, match="dtype: expected float32"):
        native.cuda.sgd([64], [64], [], [], [1], "int32", *arguments)
    assert not native.cuda.sgd([64, 64], [64, 64], [], [], [1, 1], "float32", *arguments)
    if not torch.cuda.is_available() and not native.cuda_is_simulated:
        with pytest.raises(RuntimeError, match="sgd_: CUDA: "):
            native.cuda.sgd([64], [64], [], [], [1], "float32", *arguments)


@pytest.mark.cuda_simulator
@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_setting_matches_the_default_loop(
    dtype: torch.dtype, first_step: bool, cuda_device: torch.device, thread_order: str
) -> None:
    sizes = [1, 7, 33, 8191, 8193, 100_003, *[5] * 120]
    for settings in SETTINGS:
        momentum = settings["momentum"]
        whole = [torch.randn(sum(sizes), device=cuda_device).to(dtype) for _ in range(3)]
        before = whole[2] if momentum and not first_step else None
        exact, _ = native_loop(*whole[:2], before, torch.float64, **settings)
        natives, _ = native_loop(*whole[:2], before, dtype, **settings)
        # Views that begin anywhere: most of them are not aligned.
        params, grads, buffers = (list(t.split(sizes)) for t in whole)
        ops.sgd_(
            params, grads, buffers if momentum else [], lr=LR, backend="cuda",
            first_step=bool(momentum) and first_step, **settings,
        )  # fmt: skip
        assert_as_close_as_native(whole[0], natives, exact)


@pytest.mark.cuda_simulator
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("infinite", [False, True])
def test_scalars_on_the_device(zero_grad: bool, infinite: bool, cuda_device: torch.device) -> None:
    p, g = torch.randn(2, 20_000, device=cuda_device).unbind()
    before, gradient = p.clone(), g.clone()
    lr, scale = torch.tensor(LR, device=cuda_device), torch.tensor(4.0, device=cuda_device)
    found = torch.tensor(float(infinite), device=cuda_device)
    ops.sgd_(p, g, lr=lr, grad_scale=scale, found_inf=found, zero_grad=zero_grad, backend="cuda")
    torch.testing.assert_close(p, before if infinite else before - LR * gradient / 4)
    kept = gradient if infinite else gradient / 4
    torch.testing.assert_close(g, torch.zeros_like(g) if zero_grad else kept)


@pytest.mark.cuda_simulator
@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_copies_are_updated_as_by_the_reference(
    dtype: torch.dtype, first_step: bool, cuda_device: torch.device
) -> None:
    sizes = [1, 7, 33, 8191, 8193, *[5] * 120]
    for settings in SETTINGS[::3]:
        momentum = settings["momentum"]
        master, buffer = torch.randn(2, sum(sizes)).unbind()
        param, grad = master.to(dtype), torch.randn(sum(sizes)).to(dtype)
        param[::7] = 3
        results = []
        for name, device in (("reference", torch.device("cpu")), ("cuda", cuda_device)):
            whole = [t.to(device, copy=True) for t in (param, grad * 4, buffer, master)]
            params, grads, buffers, masters = (list(t.split(sizes)) for t in whole)
            ops.sgd_(
                params, grads, buffers if momentum else [], lr=torch.tensor(LR, device=device),
                master_weights=masters, first_step=bool(momentum) and first_step, backend=name,
                grad_scale=torch.tensor(4.0, device=device), **settings,
            )  # fmt: skip
            results.append([t.cpu() for t in whole])
        torch.testing.assert_close(*results)


@pytest.mark.cuda_simulator
@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_skipped_step_leaves_master_copies_alone(
    zero_grad: bool, cuda_device: torch.device
) -> None:
    master = torch.randn(9000, device=cuda_device)
    p, g = master.half(), torch.ones(9000, device=cuda_device).half()
    p[3] = 77  # which only an update would take over
    before = p.clone(), master.clone()
    found = torch.tensor(1.0, device=cuda_device)
    ops.sgd_(
        p, g, lr=LR, master_weights=master, found_inf=found, zero_grad=zero_grad, backend="cuda"
    )
    assert torch.equal(p, before[0]) and torch.equal(master, before[1])
    assert g.any() != zero_grad


@pytest.mark.cuda_simulator
@pytest.mark.parametrize("in_backward", [False, True])
def test_the_optimizer_with_master_weights(in_backward: bool, cuda_device: torch.device) -> None:
    results = []
    for name in ("cuda", "native"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(50, 40).to(cuda_device).half()
        optimizer = optim.SGD(
            layer.parameters(), lr=LR, momentum=0.9, master_weights=True, in_backward=in_backward
        )
        for _ in range(3):
            input = torch.randn(4, 50, device=cuda_device).half()
            with backend(name):
                (layer(input) * 1.5).sum().backward()
                optimizer.step()
            optimizer.zero_grad()
        results.append([optimizer.state[p]["master_weight"] for p in layer.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.gpu
@NEEDS_MODULE
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_cuda_graph_follows_lr(backend: str) -> None:
    p, g = torch.ones(1000, device="cuda"), torch.ones(1000, device="cuda")
    lr = torch.tensor(0.5, device="cuda")
    for _ in range(2):
        ops.sgd_(p, g, lr=lr, backend=backend)  # what is compiled and cached is so before
    p.fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sgd_(p, g, lr=lr, backend=backend)
    graph.replay()
    lr.fill_(0.25)
    graph.replay()
    assert (p == 0.25).all()


@pytest.mark.gpu
@NEEDS_MODULE
def test_the_current_stream_is_used() -> None:
    p, g = torch.zeros(1_000_000, device="cuda"), torch.zeros(1_000_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        g.fill_(1)
        ops.sgd_(p, g, lr=1.0, backend="cuda")
        result = p.sum().item()
    assert result == -1_000_000


@pytest.mark.cuda_simulator
def test_the_optimizer_with_a_grad_scaler(cuda_device: torch.device) -> None:
    results = []
    for make in (torch.optim.SGD, optim.SGD):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(n, device=cuda_device)) for n in (3, 1000)]
        optimizer = make(params, lr=LR, momentum=0.9)
        scaler = torch.amp.GradScaler(cuda_device.type, init_scale=8.0)
        for step in range(4):
            scaler.scale(torch.ones((), device=cuda_device))
            for p in params:
                p.grad = torch.randn_like(p) * scaler.get_scale()
            if step in (0, 3):
                params[1].grad[2] = torch.inf
            with backend("cuda"):
                scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)
