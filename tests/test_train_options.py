"""What recipes can ask for beyond plain descent, and tasks with augmentation."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mnist_files import digits, write_pair
from PIL import Image
from safetensors.torch import load_file
from short_runs import no_pictures, one_thread, quiet  # noqa: F401  (fixtures)
from torch import nn

import gdfast
from gdfast.data import DataError
from gdfast.files import write_atomic
from gdfast.train import (
    InterruptedRun,
    Recipe,
    RunError,
    Settings,
    SettingsError,
    checkpoint,
    find_learning_rate,
    resume,
    train,
    validate,
)
from gdfast.train.ema import EMA
from gdfast.train.lessons import lessons
from gdfast.train.optimizer import parameter_groups
from gdfast.train.progress import Progress
from gdfast.train.state import State

QUICK = Recipe(epochs=2, batch_size=32, warmup=4)
EVERYTHING = replace(
    QUICK, weight_decay=1e-3, nesterov=True, accumulate=2, clip=1.0, ema=0.9, label_smoothing=0.1,
    schedule="poly",
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    write_pair(folder, "train", *digits(250))
    return f"mnist:{folder}"


def weights(folder: Path, name: str = "weights.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def steps(folder: Path) -> list[float]:
    column: torch.Tensor = checkpoint.load(folder / checkpoint.NAME)["state"]["steps"]["loss"]
    return column.tolist()


def test_parts_of_a_batch_make_the_same_steps(small: str, tmp_path: Path) -> None:
    whole = quiet(Settings(data=small, recipe=QUICK), tmp_path / "whole")
    parts = quiet(Settings(data=small, recipe=replace(QUICK, accumulate=5)), tmp_path / "parts")
    assert steps(parts.folder) == pytest.approx(steps(whole.folder), rel=1e-5)
    assert steps(parts.folder) != steps(whole.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.1}, {"nesterov": True}, {"clip": 1.0}, {"label_smoothing": 0.2},
        {"schedule": "poly"}, {"schedule": "step"}, {"amp": "bf16"},
    ],
    ids=str,
)  # fmt: skip
def test_each_setting_matters(change: dict[str, float], small: str, tmp_path: Path) -> None:
    plain = quiet(Settings(data=small, recipe=QUICK), tmp_path / "plain")
    other = quiet(Settings(data=small, recipe=replace(QUICK, **change)), tmp_path / "other")
    assert steps(plain.folder)[-1] != steps(other.folder)[-1]
    assert other.metrics["test_accuracy"] > 0.2


def test_clipping_bounds_the_step(small: str, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=200, warmup=0, momentum=0, schedule="constant", lr=1.0)
    clipped = quiet(Settings(data=small, recipe=replace(recipe, clip=0.125)), tmp_path / "run")
    torch.manual_seed(0)
    before = gdfast.models.create("cnn").state_dict()
    after = weights(clipped.folder)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    assert moved.item() == pytest.approx(0.125, rel=1e-4)


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(gdfast.nn.Conv2d(3, 4, 3), gdfast.nn.BatchNorm2d(4))
    decays, rest = parameter_groups(model, 0.1)
    assert [p.shape for p in decays["params"]] == [(4, 3, 3, 3)] and decays["weight_decay"] == 0.1
    assert len(rest["params"]) == 3 and rest["weight_decay"] == 0.0
    assert len(parameter_groups(model, 0.0)) == 1


def test_ema_is_the_running_mean_of_the_weights() -> None:
    model = nn.BatchNorm2d(2)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.num_batches_tracked.fill_(7)
    ema.update(model)  # keeps (1 + 0) / (10 + 0) of the old 1.0
    assert ema.model.weight.tolist() == pytest.approx([1.9, 1.9])
    for _ in range(20):
        ema.update(model)
    assert ema.model.weight.tolist() == pytest.approx([2.0, 2.0], abs=1e-5)
    assert ema.model.num_batches_tracked.item() == 7 and not ema.model.training


def test_what_is_measured_and_saved_is_the_mean(small: str, tmp_path: Path) -> None:
    run = quiet(Settings(data=small, recipe=replace(QUICK, ema=0.8)), tmp_path / "run")
    content = checkpoint.load(run.folder / checkpoint.NAME)
    saved = weights(run.folder)
    assert torch.equal(saved["fc.weight"], content["ema"]["model"]["fc.weight"])
    assert not torch.equal(saved["fc.weight"], content["model"]["fc.weight"])
    measures, _ = validate(run.folder, weights_file=run.folder / "weights.safetensors")
    assert measures["test_accuracy"] == run.metrics["test_accuracy"]


@pytest.mark.parametrize("stop_at", [7, 10])
def test_a_run_with_everything_goes_on_bit_by_bit(
    stop_at: int, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        task="resnet", data=small, recipe=EVERYTHING, seed=5,
        options={"augment": "affine,jitter,erase,mixup", "size": 12},
    )  # fmt: skip
    whole = quiet(settings, tmp_path / "whole")

    def interrupt(progress: Progress, state: State) -> None:
        if len(state.steps["loss"]) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", interrupt)
        with pytest.raises(InterruptedRun):
            quiet(settings, tmp_path / "parts")
    torch.manual_seed(77)
    resume(tmp_path / "parts", stream=io.StringIO())
    for name in ("weights.safetensors", "best.safetensors"):
        one, two = weights(whole.folder, name), weights(tmp_path / "parts", name)
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert steps(whole.folder) == steps(tmp_path / "parts")


def test_the_best_epoch_is_kept(small: str, tmp_path: Path) -> None:
    # So high a rate that the score goes up and down.
    recipe = replace(QUICK, epochs=5, lr=0.6, schedule="constant", momentum=0.95)
    run = quiet(Settings(data=small, recipe=recipe, seed=1), tmp_path / "run")
    epochs = checkpoint.load(run.folder / checkpoint.NAME)["state"]["epochs"]
    scores = [row["test_accuracy"] for row in epochs]
    assert run.metrics["best_test_accuracy"] == max(scores)
    assert run.metrics["best_epoch"] == scores.index(max(scores)) + 1
    measures, _ = validate(run.folder)
    assert measures["test_accuracy"] == max(scores)


def test_patience_ends_a_run_that_gets_no_better(small: str, tmp_path: Path) -> None:
    recipe = replace(QUICK, epochs=40, lr=1e-9, patience=2)
    run = quiet(Settings(data=small, recipe=recipe), tmp_path / "run")
    assert run.metrics["epochs_done"] == 3 and run.metrics["best_epoch"] == 1
    again = resume(run.folder, stream=io.StringIO())
    assert again.metrics["epochs_done"] == 3


def test_the_search_for_a_rate_leaves_a_plot_and_a_rate(small: str, tmp_path: Path) -> None:
    told = io.StringIO()
    settings = Settings(data=small, recipe=QUICK)
    rate = find_learning_rate(settings, out=tmp_path / "run", stream=told)
    assert 1e-3 < rate < 0.1 and f"--lr {rate:.2g}" in told.getvalue()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lr.csv", "lr.png"}
    good = quiet(Settings(data=small, recipe=replace(QUICK, lr=rate)), tmp_path / "good")
    assert steps(good.folder)[-1] < steps(good.folder)[0]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("resnet", {"model": "resnet19"}, "model: expected resnet20 or"),
        ("resnet", {"size": -1}, "size: expected 0 to 4096, got -1"),
        ("resnet", {"size": 5000}, "size: expected 0 to 4096, got 5000"),
        ("resnet", {"size": 3.5}, "size: expected a whole number, got 3.5"),
        ("resnet", {"colour": 1}, r"options: expected one that resnet has \(model, .*got 'colour'"),
        ("cnn", {"size": 1}, r"options: expected one that cnn has \(none\)"),
        ("sing", {}, "task: expected one of cnn, resnet"),
    ],
)
def test_options_are_checked(
    task: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        train(Settings(task=task, options=options), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_of_weights_is_refused(small: str, tmp_path: Path) -> None:
    run = quiet(Settings(data=small, recipe=replace(QUICK, epochs=1)), tmp_path / "run").folder
    content = bytearray((run / "best.safetensors").read_bytes())
    content[-3] ^= 1
    write_atomic(run / "best.safetensors", bytes(content))
    with pytest.raises(RunError, match="found tensors that do not match the checksum"):
        validate(run)
    content = bytearray((run / checkpoint.NAME).read_bytes())
    place = bytes(content).index(weights(run)["fc.bias"].numpy().tobytes())
    content[place] ^= 1
    write_atomic(run / checkpoint.NAME, bytes(content))
    with pytest.raises(RunError, match=r"damaged or foreign file \(.*(checksum|CRC)"):
        resume(run)


def test_tensorboard_is_written_when_asked_for(small: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    recipe = replace(QUICK, epochs=1)
    run = train(
        Settings(data=small, recipe=recipe), out=tmp_path / "run", tensorboard=True,
        stream=io.StringIO(),
    )  # fmt: skip
    assert [path.name for path in (run.folder / "tensorboard").iterdir()]


def test_lessons_tell_what_the_curves_show() -> None:
    def told(train_loss: float, **last: float) -> str:
        row = {"train_loss": train_loss, **last}
        return " ".join(lessons(State(steps={"loss": [2.0] * 10}, epochs=[row]), 0.1))

    assert "works, the learning rate (0.1) fits" in told(0.1)
    assert "it falls, but slowly" in told(1.9)
    assert "it does not fall" in told(2.1)
    assert "by heart" in told(0.1, train_accuracy=0.99, test_accuracy=0.8)
    assert "holds for new images" in told(0.1, train_accuracy=0.9, test_accuracy=0.9)
    rising = [{"train_loss": 0.1, "test_loss": loss} for loss in (1.0, 0.5, 0.6, 0.9)]
    assert "lowest after epoch 2" in " ".join(
        lessons(State(steps={"loss": [2.0] * 10}, epochs=rising), 0.1)
    )


def test_metrics_are_json(small: str, tmp_path: Path) -> None:
    recipe = replace(QUICK, epochs=1)
    settings = Settings(task="resnet", data=small, recipe=recipe, options={"size": 8})
    run = quiet(settings, tmp_path / "run")
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["options"]["size"] == 8 and metrics["task"] == "resnet"
    assert metrics["classes"] == [str(n) for n in range(10)] and "test_top5" in metrics


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twelve coloured images, in a folder with a comma in its name."""
    root = tmp_path_factory.mktemp("two, letters")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("$a", "b$\\q")):
        (root / name).mkdir()
        for index in range(12):
            pixels = rng.integers(0, 100, (40, 30, 3), dtype=np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
    return root


def of_letters(root: Path, **options: Any) -> Settings:
    recipe = Recipe(epochs=1, batch_size=8, warmup=1)
    return Settings(task="resnet", data=f"folder:{root}", recipe=recipe,
                    options={"size": 16}, **options)  # fmt: skip


class TestFolders:
    def test_names_may_be_anything(
        self, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()  # with pictures
        run = quiet(of_letters(letters), tmp_path / "run")
        assert run.metrics["classes"] == ["$a", "b$\\q"]
        assert (run.folder / "mistakes.png").stat().st_size > 1000

    def test_images_that_cannot_be_decoded_are_counted_and_left_out(
        self, letters: Path, tmp_path: Path
    ) -> None:
        root = tmp_path / "bad"
        shutil.copytree(letters, root)
        for name in ("$a/02.png", "$a/00.png"):  # of the test part, and of the training part
            (root / name).write_bytes((root / name).read_bytes()[:300])
        with pytest.raises(DataError, match=r"at most 1.0% bad items, found \d of 24: "):
            quiet(of_letters(root), tmp_path / "strict")
        told = io.StringIO()
        run = train(of_letters(root, max_bad=0.1), out=tmp_path / "run", stream=told)
        assert (run.metrics["skipped_images"], run.metrics["test_images"]) == (2, 3)
        assert "2 bad items were left out" in told.getvalue()

    def test_a_run_is_not_measured_on_other_classes(
        self, letters: Path, small: str, tmp_path: Path
    ) -> None:
        run = quiet(of_letters(letters), tmp_path / "run")
        with pytest.raises(RunError, match=r"expected the classes that .* was trained on"):
            validate(run.folder, data_spec="digits")

    def test_the_first_weights_are_read_once(self, letters: Path, tmp_path: Path) -> None:
        first = quiet(of_letters(letters), tmp_path / "first")
        file = tmp_path / "moved.safetensors"
        (first.folder / "weights.safetensors").rename(file)
        settings = of_letters(letters)
        settings = replace(settings, options={**settings.options, "weights": str(file)})
        second = quiet(settings, tmp_path / "second")
        file.unlink()
        assert validate(second.folder)[0] and resume(second.folder, stream=io.StringIO())


def test_one_image_for_batch_normalisation_is_told_in_one_line(small: str, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=1)
    settings = Settings(task="resnet", data=small, recipe=recipe, options={"size": 1})
    with pytest.raises(SettingsError, match="two images or more in each part of a batch"):
        quiet(settings, tmp_path / "run")
