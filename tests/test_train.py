"""Training runs: what they leave behind, how they stop and go on, and parity with native."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mnist_files import digits, write_pair
from PIL import Image
from safetensors.torch import load_file
from short_runs import no_pictures, one_thread, quiet  # noqa: F401  (fixtures)

from gdfast import data, models
from gdfast.data import DataError
from gdfast.files import write_atomic
from gdfast.train import (
    TASKS,
    DivergedError,
    InterruptedRun,
    Recipe,
    Result,
    RunError,
    Settings,
    SettingsError,
    checkpoint,
    resume,
    train,
)
from gdfast.train.progress import Progress
from gdfast.train.state import State

QUICK = Recipe(epochs=3, batch_size=32, warmup=4)
FILES = {
    "args.yaml", "best.safetensors", "checkpoint.pt", "confusion.png", "curves.png", "kernels.png",
    "metrics.json", "mistakes.png", "results.csv", "steps.csv", "weights.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like MNIST's with 250 digits: 7 batches of 32 in an epoch, the last one smaller."""
    folder = tmp_path_factory.mktemp("small")
    write_pair(folder, "train", *digits(250), zipped=True)
    return folder


@pytest.fixture(scope="module")
def settings(small: Path) -> Settings:
    return Settings(data=f"mnist:{small}", recipe=QUICK, seed=3)


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that nobody interrupted."""
    return quiet(settings, tmp_path_factory.mktemp("finished") / "run")


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def same_bits(first: Path, second: Path) -> bool:
    one, two = (checkpoint.load(path / checkpoint.NAME) for path in (first, second))
    weights = zip(one["model"].values(), two["model"].values(), strict=True)
    steps = zip(one["state"]["steps"].values(), two["state"]["steps"].values(), strict=True)
    return all(torch.equal(a, b) for a, b in [*weights, *steps])


class TestRunFolder:
    def test_holds_everything(self, finished: Result) -> None:
        assert {path.name for path in finished.folder.iterdir()} == FILES

    def test_metrics_and_tables_agree(self, finished: Result, settings: Settings) -> None:
        metrics = json.loads((finished.folder / "metrics.json").read_text())
        epochs, steps = (rows(finished.folder / f"{name}.csv") for name in ("results", "steps"))
        assert metrics == finished.metrics
        assert (len(epochs), len(steps)) == (3, 21) == (metrics["epochs_done"], metrics["steps"])
        assert metrics["test_accuracy"] == epochs[-1]["test_accuracy"]
        last = steps[-7:]
        mean = sum(row["loss"] * row["images"] for row in last) / 200
        assert metrics["train_loss"] == pytest.approx(mean, rel=1e-12)
        assert [row["images"] for row in last] == [32] * 6 + [8]
        assert (metrics["train_images"], metrics["test_images"]) == (200, 50)
        assert metrics["parameters"] == 54_410
        assert metrics["images_per_second"] > 0 and 0 < metrics["seconds"] < 600
        args = yaml.safe_load((finished.folder / "args.yaml").read_text())
        assert Settings.from_dict(args) == settings
        assert args["data"] == settings.data and args["lr"] == 0.1 and args["seed"] == 3

    def test_the_accuracy_is_that_of_the_saved_weights(
        self, finished: Result, settings: Settings
    ) -> None:
        model = models.create("cnn")
        model.load_state_dict(load_file(finished.folder / "weights.safetensors"))
        test = data.load(settings.data).test
        with torch.no_grad():
            right = model(test.images / 255).argmax(1) == test.labels
        assert finished.metrics["test_accuracy"] == right.double().mean().item()
        assert finished.metrics["test_accuracy"] > 0.5  # it has learned something

    def test_pictures_are_whole(self, finished: Result) -> None:
        for name in ("confusion", "curves", "kernels", "mistakes"):
            with Image.open(finished.folder / f"{name}.png") as picture:
                picture.load()
                assert picture.width > 800 and len(picture.getcolors(1 << 24) or []) > 50

    def test_the_kernels_before_are_those_of_the_seed(self, finished: Result) -> None:
        torch.manual_seed(3)
        weight = models.create("cnn").conv1.weight
        content = checkpoint.load(finished.folder / checkpoint.NAME)
        assert torch.equal(content["kernels_before"], weight)
        assert not torch.equal(content["model"]["conv1.weight"], weight)

    def test_folders_are_numbered(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        brief = replace(settings, recipe=replace(QUICK, epochs=1))
        (tmp_path / "runs" / "cnn-7").mkdir(parents=True)
        stream = io.StringIO()
        assert train(brief, stream=stream).folder == Path("runs/cnn-8")
        assert "everything is in runs/cnn-8" in stream.getvalue()

    def test_a_folder_in_use_is_refused(self, finished: Result, settings: Settings) -> None:
        before = {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()}
        with pytest.raises(RunError, match=r"expected a new or empty folder, .*--resume"):
            quiet(settings, finished.folder)
        assert before == {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()}
        with pytest.raises(RunError, match="expected a folder, got the file"):
            quiet(settings, finished.folder / "args.yaml")
        with pytest.raises(RunError, match="expected a folder that can be made"):
            quiet(settings, finished.folder / "args.yaml" / "below")

    def test_bad_data_leaves_no_folder(self, settings: Settings, tmp_path: Path) -> None:
        with pytest.raises(DataError):
            quiet(replace(settings, data="mnist:/nowhere"), tmp_path / "run")
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=["auto", "native"])
def whole(
    request: pytest.FixtureRequest,
    settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Result:
    """A run of each kind that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return quiet(replace(settings, backend=request.param), folder)


class TestResume:
    # Of 21 steps in 3 epochs of 7: the first, in the midst, the last of an epoch, the last but one.
    @pytest.mark.parametrize("stop_at", [1, 10, 14, 20])
    def test_is_bit_exact(
        self,
        stop_at: int,
        whole: Result,
        settings: Settings,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        settings = replace(settings, backend=whole.metrics["backend"])

        def interrupt(progress: Progress, state: State) -> None:
            if len(state.steps["loss"]) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "step", interrupt)
            with pytest.raises(InterruptedRun) as caught:
                quiet(settings, tmp_path / "parts")
        assert caught.value.signal == signal.SIGINT and caught.value.folder == tmp_path / "parts"
        assert not (tmp_path / "parts" / "metrics.json").exists()
        torch.manual_seed(77)  # whatever else has drawn numbers meanwhile
        resumed = resume(tmp_path / "parts", stream=io.StringIO())
        assert same_bits(whole.folder, tmp_path / "parts")
        timings = ("seconds", "seconds_per_step", "images_per_second")
        for name in set(whole.metrics) - set(timings):
            assert resumed.metrics[name] == whole.metrics[name], name
        assert {path.name for path in resumed.folder.iterdir()} == FILES
        steps = [path / "steps.csv" for path in (whole.folder, tmp_path / "parts")]
        assert steps[0].read_text() == steps[1].read_text()

    def test_of_a_finished_run_writes_its_results_again(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        first = quiet(settings, tmp_path / "run")
        (first.folder / "metrics.json").unlink()
        again = resume(first.folder / checkpoint.NAME, stream=io.StringIO())
        assert again.metrics["test_accuracy"] == first.metrics["test_accuracy"]
        assert {path.name for path in again.folder.iterdir()} == FILES

    def test_wants_the_same_data(self, settings: Settings, tmp_path: Path) -> None:
        run = quiet(settings, tmp_path / "run").folder
        write_pair(tmp_path / "other", "train", *digits(251))
        with pytest.raises(
            DataError, match=r"expected the data that the run .* found other images"
        ):
            resume(run, data_spec=f"mnist:{tmp_path / 'other'}")
        with pytest.raises(DataError, match="expected digits, mnist:DIR or folder:DIR, got ''"):
            resume(run, data_spec="")
        write_pair(tmp_path / "moved", "t10k", *digits(250))
        resume(run, data_spec=f"mnist:{tmp_path / 'moved'}", stream=io.StringIO())

    def test_random_states_come_back(self) -> None:
        import random

        import numpy as np

        from gdfast.train import rng

        def draw() -> list[float]:
            return [torch.rand(1).item(), np.random.rand(), random.random()]

        state = rng.capture()
        first = draw()
        rng.restore(state)
        assert draw() == first

    @pytest.mark.parametrize(
        "content",
        [b"", b"garbage" * 99, b"PK\3\4 not a zip", torch.zeros(3), {"format": "x"}, "cut", "bomb"],
        ids=["empty", "garbage", "zip", "tensor", "foreign", "cut", "bomb"],
    )
    def test_refuses_a_file_that_is_no_checkpoint(
        self, content: Any, finished: Result, tmp_path: Path
    ) -> None:
        path = tmp_path / checkpoint.NAME
        if content == "cut":
            path.write_bytes((finished.folder / checkpoint.NAME).read_bytes()[:-1000])
        elif content == "bomb":
            _write_compressed(finished.folder / checkpoint.NAME, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(RunError, match=r"expected a checkpoint.*found") as caught:
            resume(tmp_path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    @pytest.mark.parametrize("missing", ["model", "optimizer", "state", "rng", "settings"])
    def test_refuses_a_checkpoint_with_a_part_missing(
        self, missing: str, finished: Result, tmp_path: Path
    ) -> None:
        content = checkpoint.load(finished.folder / checkpoint.NAME)
        del content[missing]
        (tmp_path / checkpoint.NAME).write_bytes(checkpoint.to_bytes(content))
        with pytest.raises(RunError, match="expected a whole checkpoint, found one that does not"):
            resume(tmp_path, stream=io.StringIO())

    # Each leaves a whole checkpoint, of a finished run with 3 epochs of 7 batches.
    @pytest.mark.parametrize(
        ("part", "change"),
        [
            ("settings", {"task": "nope"}),
            ("settings", {"options": {"nope": 1}}),
            ("settings", {"options": []}),
            ("settings", {"data": 5}),
            ("settings", {"device": 0}),
            ("settings", {"epochs": None}),
            ("settings", {"epochs": 2}),
            ("settings", {"batch_size": 32.5}),
            ("state", {"epoch": -1}),
            ("state", {"epoch": 99}),
            ("state", {"epoch": "3"}),
            ("state", {"batch": 10**9}),
            ("state", {"batch": -1}),
            ("state", {"epoch": 2, "batch": 0}),
            ("state", {"steps": {}}),
            ("state", {"steps": {"loss": torch.ones(21)}}),
            ("state", {"epochs": []}),
            ("state", {"epochs": [{}, {}, {}]}),
            ("state", {"seconds": "long"}),
            ("state", {"seconds": float("nan")}),
            ("state", {"training_seconds": 0.0}),
            ("rng", {"numpy": []}),
            ("kernels_before", 5),
            ("kernels_before", None),
            ("conditions", []),
        ],
    )
    def test_refuses_content_that_no_run_leaves(
        self, part: str, change: Any, finished: Result, tmp_path: Path
    ) -> None:
        content = checkpoint.load(finished.folder / checkpoint.NAME)
        content[part] = content[part] | change if isinstance(change, dict) else change
        (tmp_path / checkpoint.NAME).write_bytes(checkpoint.to_bytes(content))
        with pytest.raises((RunError, SettingsError), match=r"expected .*") as caught:
            resume(tmp_path, stream=io.StringIO())
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]

    def test_refuses_weights_of_another_shape(self, finished: Result, tmp_path: Path) -> None:
        content = checkpoint.load(finished.folder / checkpoint.NAME)
        content["model"]["fc.bias"] = torch.zeros(11)
        (tmp_path / checkpoint.NAME).write_bytes(checkpoint.to_bytes(content))
        with pytest.raises(RunError, match=r"does not fit: .*SimpleCNN"):
            resume(tmp_path, stream=io.StringIO())

    def test_runs_no_code_of_a_foreign_pickle(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return open, (str(tmp_path / "sprung"), "w")

        torch.save({"format": "gdfast checkpoint 2", "model": Trap()}, tmp_path / checkpoint.NAME)
        with pytest.raises(RunError, match="damaged or foreign"):
            resume(tmp_path)
        assert not (tmp_path / "sprung").exists()

    def test_leftovers_of_a_killed_process_go(self, finished: Result, tmp_path: Path) -> None:
        (tmp_path / ".gdfast-abc.tmp").write_bytes(b"half")
        write_atomic(tmp_path / checkpoint.NAME, (finished.folder / checkpoint.NAME).read_bytes())
        resume(tmp_path, stream=io.StringIO())
        assert not list(tmp_path.glob(".gdfast-*"))

    def test_says_where_there_is_nothing_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="expected a checkpoint, found no such file"):
            resume(tmp_path)


def _write_compressed(source: Path, target: Path) -> None:
    import zipfile

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(1 << 20))


class TestProcess:
    """Real processes and real signals."""

    def start(self, out: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gdfast", "train", "cnn", "--out", str(out), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def wait_for(self, path: Path, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def test_control_c_leaves_a_checkpoint_to_go_on_from(self, tmp_path: Path) -> None:
        # One image a step: an epoch is long enough that the signal falls into its midst.
        recipe = replace(QUICK, epochs=2, batch_size=1, lr=0.001)
        options = ("--epochs", "2", "--batch-size", "1", "--lr", "0.001", "--warmup", "4")
        process = self.start(tmp_path / "run", *options)
        self.wait_for(tmp_path / "run" / checkpoint.NAME, process)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors.startswith("gdfast: stopped in epoch ") and errors.count("\n") == 1
        assert f"go on with: gdfast train cnn --resume {tmp_path / 'run'}" in errors
        state = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["state"]
        assert 0 < len(state["steps"]["loss"]) < 2 * 1438 and state["batch"] > 0

        resume(tmp_path / "run", stream=io.StringIO())
        quiet(Settings(recipe=recipe), tmp_path / "whole")
        assert same_bits(tmp_path / "run", tmp_path / "whole")

    def test_kill_leaves_the_last_checkpoint_whole(self, small: Path, tmp_path: Path) -> None:
        process = self.start(tmp_path / "run", "--data", f"mnist:{small}", "--epochs", "100000")
        self.wait_for(tmp_path / "run" / "results.csv", process)
        time.sleep(0.3)
        process.kill()
        process.communicate(timeout=60)
        content = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
        assert content["state"]["epoch"] > 0
        assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.parametrize("recipe", TASKS["cnn"].recipes)
def test_losses_are_native_s_step_by_step(recipe: str, tmp_path: Path) -> None:
    # The recipe as it is: in a shorter run the learning rate rises faster, and rounding grows more
    # than tenfold within these steps, between native's own layouts too.
    settings = Settings(recipe=TASKS["cnn"].recipes[recipe])
    losses = []
    for backend in ("auto", "native"):
        folder = quiet(replace(settings, backend=backend), tmp_path / backend).folder
        losses.append([row["loss"] for row in rows(folder / "steps.csv")])
    pairs = list(zip(*losses, strict=True))[:50]
    assert len(pairs) == 50
    assert max(abs(ours - theirs) / theirs for ours, theirs in pairs) < 1e-5
    assert losses[0][-1] < 0.8 * losses[0][0]  # and they do fall


def test_the_native_backend_is_plain_pytorch(settings: Settings, tmp_path: Path) -> None:
    result = quiet(replace(settings, backend="native"), tmp_path / "run")
    assert type(result.model.get_submodule("conv1")) is torch.nn.Conv2d
    assert result.metrics["backend"] == "reference"


def test_a_loss_that_is_no_number_stops_with_its_batch(settings: Settings, tmp_path: Path) -> None:
    wild = replace(settings, recipe=replace(QUICK, lr=1e30, warmup=0))
    with pytest.raises(
        DivergedError, match=r"got (nan|inf) at epoch 1, batch \d of 7: try a lower"
    ):
        quiet(wild, tmp_path / "run")
    content = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
    assert all(value.isfinite().all() for value in content["model"].values())
