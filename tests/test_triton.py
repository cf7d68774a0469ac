"""The Triton backend beside the others: the interpreter's tests, refusals, late imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_here import INTERPRETED, NEEDS_TRITON

from gdfast import ops
from gdfast.backends import Conv2dQuery, triton_backend
from gdfast.errors import BackendError
from gdfast.geometry import Conv2dGeometry

TESTS = Path(__file__).parent


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@NEEDS_TRITON
@pytest.mark.skipif(INTERPRETED, reason="is run by this very test")
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    # In processes of their own, since TRITON_INTERPRET holds for all kernels of a process; in two
    # at once, since the interpreter has one thread and half of the time goes into convolutions.
    files = sorted(TESTS.glob("test_triton_*.py"))
    shares = {
        "conv2d": [path for path in files if path.stem == "test_triton_conv2d"],
        "others": [path for path in files if path.stem != "test_triton_conv2d"],
    }
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = {}
    for name, share in shares.items():
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "triton", *share]
        with (tmp_path / name).open("w") as output:
            running[name] = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
    for name, process in running.items():
        status, told = process.wait(), (tmp_path / name).read_text()
        assert status == 0, told[-5000:]
        assert " passed" in told or "needs numpy before 2.4" in told


@pytest.mark.skipif(INTERPRETED, reason="needs kernels that are not interpreted")
def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(BackendError, match=r"'triton' was asked for .*(needs CUDA|not installed)"):
        ops.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), backend="triton")


def test_the_package_imports_no_triton_until_it_is_needed() -> None:
    code = (
        "import sys, torch, gdfast.ops, gdfast.nn, gdfast.optim\n"
        "gdfast.ops.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))\n"
        "print([name for name in sys.modules if name.startswith('gdfast.backends.triton.')])"
    )
    assert run(code, TRITON_INTERPRET="0").strip() == "[]"


def test_a_triton_that_is_not_there_is_a_reason() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from gdfast.backends import available\n"
        "print([e.reason for e in available() if e.name == 'triton'])"
    )
    assert "triton is not installed: pip install" in run(code)


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("dtype", "size", "weight", "why"),
    [
        (torch.float64, (2, 3, 8, 8), (4, 3, 3, 3), "not torch.float64"),
        (torch.float32, (2, 0, 8, 8), (4, 0, 3, 3), "at least one input channel"),
        (torch.bfloat16, (1, 3, 40_000, 40_000), (64, 3, 3, 3), "less than 2\\^31 elements"),
        (torch.bfloat16, (600, 64, 300, 300), (64, 64, 3, 3), ""),  # in parts
    ],
    ids=str,
)
def test_refusals(
    dtype: torch.dtype, size: tuple[int, ...], weight: tuple[int, ...], why: str
) -> None:
    geometry = Conv2dGeometry.of("conv2d", size, weight, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    strides = tuple(
        torch.empty(size, device="meta").stride()
        for size in (geometry.input_size, geometry.weight_size, geometry.output_size)
    )
    query = Conv2dQuery(torch.device("cuda"), dtype, geometry=geometry, strides=strides)
    reason = triton_backend.why_not(query)
    assert (reason == "") == (why == "")
    assert why.replace("\\", "") in reason


def test_other_devices_are_refused() -> None:
    from gdfast.backends import Query

    assert "not on meta" in triton_backend.why_not(Query(torch.device("meta"), torch.float32))
