"""What all tests share: seeds, memory that shows what was not written, and skips that say why."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

# Read when torch loads libgomp. Thousands of tiny kernels on two threads take ten times as long
# where other work keeps the threads from being there at once, if those that wait spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The same algorithms in every run: what is timed comes out as the machine pleases.
os.environ["GDFAST_AUTOTUNE"] = "off"

import numpy as np
import pytest
import torch

import gdfast
from gdfast import native
from gdfast.backends import (
    cuda_grad_weight,
    cuda_grouped,
    cuda_stem,
    cuda_tiles,
    precision,
    registry,
)
from gdfast.ops import batch_norm_dispatch, conv2d_dispatch, in_backward, max_pool2d_dispatch

ISAS = native.cpu.supported_isas() if native.cpu is not None else []


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A share of the tests, always the same one, where all take too long: under sanitizers in CI.
    one_in = int(os.environ.get("GDFAST_TEST_ONE_IN", "1"))
    left_out = [item for item in items if crc32(item.nodeid.encode()) % one_in]
    if left_out:
        left_out[0].config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    on_gpu = torch.cuda.is_available()
    kernels_on_gpu = on_gpu and native.cuda is not None and not native.cuda_is_simulated
    for item in items:
        if item.get_closest_marker("gpu") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if item.get_closest_marker("cuda_simulator") and kernels_on_gpu:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an element which nobody wrote fails the test."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def compiled_cpu() -> None:
    if native.cpu is None:
        pytest.skip(f"needs the compiled module gdfast._cpu: {native.failure('cpu')}")


@pytest.fixture
def widened_bfloat16(compiled_cpu: None) -> Iterator[None]:
    """No products of bfloat16: where the processor has them, and without times, native runs."""
    before = native.cpu.isa()
    if before == "avx512_bf16":
        native.cpu.select_isa("avx512")
    yield
    native.cpu.select_isa(before)


@pytest.fixture
def cuda_device() -> torch.device:
    """Where the CUDA kernels run: a GPU, or the CPU where their simulator is loaded."""
    if native.cuda is None:
        pytest.skip(f"needs gdfast._cuda or `make cuda-simulator`: {native.failure('cuda')}")
    if native.cuda_is_simulated:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA or `make cuda-simulator`")
    return torch.device("cuda")


@pytest.fixture
def hopper(cuda_device: torch.device) -> torch.device:
    """Where the kernels for Hopper run."""
    if reason := native.cuda.hopper_missing(cuda_device.index or 0):
        pytest.skip(f"needs a Hopper GPU: {reason}")
    return cuda_device


@pytest.fixture
def by_cuda_alone(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA kernels compute all they can, in their smallest tile, float32 in full; and no optimizer
    is left that asked for gradients."""
    monkeypatch.setattr(cuda_tiles, "candidates", lambda op, query: (cuda_tiles.SMALLEST,))
    monkeypatch.setattr(cuda_stem, "fits", lambda op, query: False)
    monkeypatch.setattr(cuda_grouped, "why_not", lambda *arguments: "it is left out")
    with gdfast.backend("cuda"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    gc.collect()
    assert not in_backward.targets


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of weights, as they are updated in the last pass of their gradient."""
    shapes: list[tuple[int, ...]] = []
    update = cuda_grad_weight.BegunGradWeight.update

    def noted(begun: Any, tensors: Any, hyper: Any) -> None:
        shapes.append(tuple(tensors.params[0].shape))
        update(begun, tensors, hyper)

    monkeypatch.setattr(cuda_grad_weight.BegunGradWeight, "update", noted)
    return shapes


@pytest.fixture(params=["ascending", "descending"])
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which order the simulator runs threads; results must not depend on it."""
    if not native.cuda_is_simulated and request.param == "descending":
        pytest.skip("needs `make cuda-simulator`")
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", request.param)
    return request.param


@pytest.fixture(params=ISAS or ["none"])
def isa(request: pytest.FixtureRequest, compiled_cpu: None) -> Iterator[str]:
    """Each instruction set that this machine runs, in turn."""
    before = native.cpu.isa()
    assert native.cpu.select_isa(request.param)
    yield request.param
    native.cpu.select_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back to what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def strict() -> Iterator[None]:
    """Rules out the algorithms whose error is larger than native's."""
    with precision("strict"):
        yield


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """Forgets what was resolved and warned of; backends that a test registers go again."""

    def forget() -> None:
        registry._resolved.clear()
        registry._warned.clear()
        batch_norm_dispatch.forget_kernels()
        conv2d_dispatch.forget_kernels()
        max_pool2d_dispatch.forget_kernels()

    before, switch = dict(registry._backends), registry._switch
    forget()
    yield
    registry._backends.clear()
    registry._backends.update(before)
    registry._switch = switch
    forget()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of test data: GDFAST_TEST_DATA, else ../shared/data beside the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("GDFAST_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"needs test data: no folder {folder} (GDFAST_TEST_DATA)")
    return folder
