"""Several processes that train together: the same losses as one process with the whole batch."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mnist_files import digits, write_pair

from gdfast import backends
from gdfast.train import Settings, SettingsError, train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


def losses(folder: Path) -> list[float]:
    with (folder / "steps.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def run(command: list[str], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "gdfast", "train", "cnn", "--out", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command, *arguments],
        env=environment, check=True, text=True, capture_output=True, timeout=240,
    )  # fmt: skip


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    # 200 to train on: the last batch of an epoch has 8, and with 31 the processes have 16 and 15.
    write_pair(tmp_path / "data", "train", *digits(250))
    options = ("--data", f"mnist:{tmp_path / 'data'}", "--epochs", "2", "--warmup", "4",
               "--batch-size", "31", "--accumulate", "2", "--weight-decay", "0.001",
               "--clip", "1", "--ema", "0.9", "--label-smoothing", "0.1")  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone = run([], tmp_path / "one", *options)
    both = run(launcher, tmp_path / "two", *options)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 14
    assert two == pytest.approx(one, rel=1e-5)
    metrics = [
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    ]
    assert [each["processes"] for each in metrics] == [1, 2]
    assert metrics[1]["test_images"] == 50
    assert metrics[1]["test_loss"] == pytest.approx(metrics[0]["test_loss"], rel=1e-4)
    # One process alone talks and writes.
    assert both.stdout.count("everything is in") == alone.stdout.count("everything is in") == 1
    assert "2 processes share every batch" in both.stdout


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_two_gpus_take_the_steps_of_one(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.distributed.is_nccl_available():
        pytest.skip("needs NCCL")
    if reason := {each.name: each.reason for each in backends.available()}[backend]:
        pytest.skip(f"needs the backend {backend}: {reason}")
    monkeypatch.setenv("GDFAST_BACKEND", backend)
    write_pair(tmp_path / "data", "train", *digits(250))
    options = ("--data", f"mnist:{tmp_path / 'data'}", "--epochs", "2", "--warmup", "4",
               "--batch-size", "32", "--device", "cuda")  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([], tmp_path / "one", *options)
    run(launcher, tmp_path / "two", *options)
    # In TF32, and sums over a batch are split differently.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_half_a_launch_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="WORLD_SIZE: expected RANK, MASTER_ADDR"):
        train(Settings(), out=tmp_path / "run")
