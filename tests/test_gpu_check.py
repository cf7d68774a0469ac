"""benchmarks/gpu_check.sh and its table of layers, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_stops_and_says_why(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    result = subprocess.run(
        [bash, BENCHMARKS / "gpu_check.sh", tmp_path / "out"], capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    assert "machine: cannot be used: torch.cuda.is_available() is False" in result.stdout
    assert "machine: cannot be used" in (tmp_path / "out" / "summary.txt").read_text()


def test_the_table_tells_ratios_and_failures(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    seconds = {"native": [2e-4, 2e-4], "triton": [1e-4, 1e-4], "native again": [2e-4, 2e-4]}
    layers = [
        {
            "layer": "3x3",
            "pass": "forward",
            "seconds": seconds,
            "flops": 10**11,
            "tile": ["a-tile"],
        },
        {"layer": "1x1", "pass": "forward", "wrong": "error 1, allowed 0"},
        {"layer": "1x1", "pass": "grad_input", "failed": "RuntimeError: no"},
    ]
    document = {"gpu": "a GPU", "torch": "2", "cudnn": 9, "layers": layers}
    file.write_text(json.dumps(document))
    command = [sys.executable, BENCHMARKS / "gpu_layers.py", file, "--table"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| 3x3 | forward | 200.0 | 100.0 | 2.00 | 1.00 | 1000 | a-tile |" in text
    assert "| 1x1 | forward | error 1, allowed 0 |" in text
    assert "| 1x1 | grad_input | RuntimeError: no |" in text
