"""Choices of a training run: a resumed one has those that it began with."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mnist_files import digits, write_pair
from test_tuning import PLAIN, Stopwatch, start_anew, stopwatch, tensors  # noqa: F401  (a fixture)

import gdfast
from gdfast import ops
from gdfast.backends import cpu_algorithms, tuning
from gdfast.backends.choices import Choice
from gdfast.models import SimpleCNN
from gdfast.train import Recipe, Settings, checkpoint, resume, train

pytestmark = pytest.mark.usefixtures("compiled_cpu", "threads")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("data")
    write_pair(folder, "train", *digits(250))
    return Settings(data=f"mnist:{folder}", recipe=Recipe(epochs=2, batch_size=64, warmup=2))


@pytest.fixture(scope="module")
def trained(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a finished run, by the cost model alone."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(settings, out=out, stream=io.StringIO())
    return checkpoint.load(out / checkpoint.NAME)


class TestTraining:
    @pytest.fixture(autouse=True)
    def unfused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A convolution by itself has a choice; the kernel that it shares with a pool has none."""

        def forward(model: SimpleCNN, x: torch.Tensor) -> torch.Tensor:
            x = F.max_pool2d(torch.relu(model.conv1(x)), 2)
            return model.fc(torch.flatten(x, 1))

        monkeypatch.setattr(SimpleCNN, "forward", forward)
        monkeypatch.setattr(gdfast, "swap_", lambda model, fuse: None)  # or it would find them

    def outcome(self, folder: Path) -> list[float]:
        """Losses and weights: the last bits of one kernel may not show in the losses."""
        content = checkpoint.load(folder / checkpoint.NAME)
        losses = content["state"]["steps"]["loss"].tolist()
        return [*losses, *(x for w in content["model"].values() for x in w.flatten().tolist())]

    def test_a_resumed_run_keeps_its_choices(
        self,
        stopwatch: Stopwatch,  # noqa: F811
        settings: Settings,
        tmp_path: Path,
    ) -> None:
        from gdfast.train.errors import InterruptedRun
        from gdfast.train.progress import Progress

        native_first = {**dict.fromkeys(cpu_algorithms.ALGORITHMS, 1.0), "native": 0.1}
        ours_first = {**native_first, "native": 9.0}

        def run(name: str, seconds: dict[str, float]) -> list[float]:
            stopwatch.seconds = seconds
            start_anew()
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            train(settings, out=tmp_path / name, stream=io.StringIO())
            return self.outcome(tmp_path / name)

        whole = run("whole", native_first)
        assert run("other", ours_first) != whole  # or this test would show nothing

        def interrupt(progress: Progress, state: Any) -> None:
            if len(state.steps["loss"]) == 5:
                os.kill(os.getpid(), 2)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Progress, "step", interrupt)
            with pytest.raises(InterruptedRun):
                run("parts", native_first)
        stored = checkpoint.load(tmp_path / "parts" / checkpoint.NAME)["choices"]
        assert "native" in {value["choice"] for value in stored.values()}
        shutil.rmtree(tmp_path / "cache")
        start_anew()
        stopwatch.seconds = ours_first
        resume(tmp_path / "parts", stream=io.StringIO())
        assert self.outcome(tmp_path / "parts") == whole

    @pytest.mark.parametrize(
        "choices", [5, [], {"key": 5}, {"key": {"choice": "direct", "seconds": {"direct": -1.0}}}]
    )
    def test_choices_that_are_none_are_refused(
        self, choices: Any, trained: dict[str, Any], tmp_path: Path
    ) -> None:
        content = {**trained, "choices": choices}
        (tmp_path / checkpoint.NAME).write_bytes(checkpoint.to_bytes(content))
        with pytest.raises(gdfast.train.RunError, match="one that does not fit: expected"):
            resume(tmp_path, stream=io.StringIO())

    def test_a_choice_that_does_not_exist_is_made_anew(self, stopwatch: Stopwatch) -> None:  # noqa: F811
        arguments = tensors()
        choices: dict[str, Choice] = {}
        with tuning.recorded(choices):
            ops.conv2d(*arguments)
        hostile = dict.fromkeys(choices, Choice("os.system"))
        with tuning.recorded(hostile) as uses:
            ops.conv2d(*arguments)
        assert [use.choice.name for use in uses] == ["winograd"]

    def test_choices_hold_whatever_the_mode(self, stopwatch: Stopwatch) -> None:  # noqa: F811
        arguments = tensors()
        stopwatch.seconds = {**PLAIN, "native": 0.1}
        choices: dict[str, Choice] = {}
        with tuning.recorded(choices):
            ops.conv2d(*arguments)
        with gdfast.autotune("off"), tuning.recorded(choices) as uses:
            ops.conv2d(*arguments)
        assert [use.choice.name for use in uses] == ["native"]
