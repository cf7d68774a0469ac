"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mnist_files import digits, write_pair

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_mnist_cnn_learns(tmp_path: Path) -> None:
    # Its download finds both pairs in place, a few images each, and fetches nothing.
    images, labels = digits(1300)
    write_pair(tmp_path / "data/MNIST/raw", "train", images[:1000], labels[:1000])
    write_pair(tmp_path / "data/MNIST/raw", "t10k", images[1000:], labels[1000:])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "mnist_cnn.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.5
    accuracy = re.search(r"test accuracy ([\d.]+)", done.stdout)
    assert accuracy and float(accuracy[1]) > 0.6


def test_mnist_cnn_differs_from_pytorch_s_in_its_imports_alone() -> None:
    text = (EXAMPLES / "mnist_cnn.py").read_text()
    lines = [line for line in text.splitlines() if re.match(r"(from|import) gdfast", line)]
    assert lines == ["from gdfast import nn, optim", "from gdfast.data import datasets, transforms"]
    body = text.split("transforms\n", 1)[1]
    assert "gdfast" not in body
    for step in ("optimizer.zero_grad()", "loss.backward()", "optimizer.step()"):
        assert step in body
