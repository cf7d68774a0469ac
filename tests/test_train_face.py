"""Training face recognition: a small run end to end, and what it leaves behind."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from face_files import write_people

from gdfast import face
from gdfast.data import DataError, decode, identities
from gdfast.data.check import check
from gdfast.data.faces import NamedPairs
from gdfast.train import Recipe, RunError, Settings, SettingsError, examples, train
from gdfast.train.errors import DivergedError
from gdfast.train.face import Face
from gdfast.train.tasks import settle

SMALL = {"height": 28, "width": 23, "channels": 4, "views": 2, "margin_warmup": 4}
RECIPE = Recipe(lr=0.05, batch_size=8, epochs=2, warmup=2, ema=0.9)


def settings(people: Path, **options: Any) -> Settings:
    return Settings(task="face", data=f"faces:{people}", recipe=RECIPE, options=SMALL | options)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    write_people(tmp_path / "people", dict.fromkeys("abcdef", 4), size=(28, 23))
    return tmp_path / "people"


def test_a_run_leaves_weights_measures_and_pictures(tmp_path: Path, people: Path) -> None:
    out = tmp_path / "run"
    chosen = settings(people, protocol="verify", folds=3, head="cosine")
    metrics = train(chosen, out=out, stream=io.StringIO()).metrics
    names = {path.name for path in out.iterdir()}
    assert names >= {"roc.png", "similarities.png", "pairs.png", "mistakes.png", "curves.png"}
    assert (metrics["train_images"], metrics["test_images"], metrics["pairs"]) == (16, 8, 28)

    recogniser = face.load(out / "weights.safetensors")
    assert recogniser.threshold == metrics["threshold"]
    weights = {name.split(".")[0] for name in recogniser.net.state_dict()}
    assert "conv1" in weights and "head" not in weights

    # The measures again, of the network that was saved, by their definitions.
    files = [people / name / f"{n}.png" for name in "ab" for n in (1, 2, 3, 4)]
    points = recogniser.embed(files).reshape(2, 4, -1)
    enrolled = points[:, :2].reshape(4, -1)
    right = [(enrolled @ probe).argmax() // 2 == who for who in (0, 1) for probe in points[who, 2:]]
    assert metrics["rank1"] == pytest.approx(np.mean(right))
    similarity = points.reshape(8, -1) @ points.reshape(8, -1).T
    alike = [similarity[a, b] for a in range(8) for b in range(a) if a // 4 == b // 4]
    unlike = [similarity[a, b] for a in range(8) for b in range(a) if a // 4 != b // 4]
    auc = np.mean([a > b for a in alike for b in unlike])
    assert metrics["auc"] == pytest.approx(auc, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"head": "softmax", "changes": 0.0, "colour": True}])
def test_a_step_moves_every_weight(people: Path, options: dict[str, Any]) -> None:
    chosen = settle(settings(people, **options))
    task = Face(chosen, Face.load(chosen))
    rng = np.random.default_rng(0)
    batch = task.source.collate([task.source.item(n, 0, rng) for n in range(8)])
    measures = task.loss(task.forward(task.model.train(), batch), batch)
    assert set(measures) == {"loss", *task.terms}
    measures["loss"].backward()
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def trained(people: Path) -> tuple[torch.nn.Module, dict[str, str]]:
    chosen = settle(settings(people))
    task = Face(chosen, Face.load(chosen))
    with torch.inference_mode():
        task.evaluate(task.model.eval())
    return task.exported(task.model), dict(task.metadata())


def test_predicting_names_the_nearest_of_a_gallery(tmp_path: Path, people: Path) -> None:
    net, metadata = trained(people)
    predict = Face.predictor(net, metadata, gallery=str(people), threshold=-1.0)
    image = decode.read(people / "c" / "1.png")
    answer = predict(image)
    expected = face.identify(predict.recogniser, image, predict.gallery, threshold=-1.0)
    assert answer["name"] == expected[0].name
    assert [each["name"] for each in answer["nearest"]] == [each.name for each in expected[:4]]
    json.dumps(answer)
    assert predict.draw(image, answer).startswith(b"\x89PNG")

    predict.gallery.save(tmp_path / "gallery.safetensors")
    strict = Face.predictor(
        net, metadata, gallery=str(tmp_path / "gallery.safetensors"), threshold=1.1
    )
    unknown = strict(image)
    assert unknown["name"] == face.UNKNOWN and unknown["nearest"] == answer["nearest"]
    assert unknown["summary"].startswith("unknown (nearest: ")


def test_predicting_needs_a_gallery(people: Path) -> None:
    net, metadata = trained(people)
    with pytest.raises(SettingsError, match="expected a folder with a folder for each person"):
        Face.predictor(net, metadata)
    with pytest.raises(SettingsError, match="predict: iou: expected gallery or threshold"):
        Face.predictor(net, metadata, iou=0.5)
    with pytest.raises(RunError, match="expected weights of a face network"):
        Face.predictor(net, {}, gallery=str(people))
    with pytest.raises(DataError, match="found no such file"):
        Face.predictor(net, metadata, gallery=str(people / "none"))


def test_faces_are_checked_and_shown(people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "PEOPLE", 2)
    (people / "b" / "2.png").write_bytes(b"")
    for number in (2, 3, 4):
        (people / "c" / f"{number}.png").unlink()
    problems, summary = check(f"faces:{people}")
    assert summary == "21 photographs of 6 people"
    told = [str(problem) for problem in problems]
    assert told == [
        f"{people}/c: expected 2 photographs or more, found 1",
        f"{people}/b/2.png: expected an image, found an empty file",
    ]
    shown = examples.rows("identities", 3, seed=0)
    assert [len(row) for row in shown.values()] == [3] * 6


def test_an_embedding_learns_to_tell_drawn_people_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "PEOPLE", 10)
    chosen = settle(
        Settings(
            task="face",
            recipe=Recipe(lr=0.1, batch_size=16, epochs=1, warmup=5),
            options=SMALL | {"channels": 8, "views": 1, "changes": 0.3},
        ),
    )
    data = Face.load(chosen)
    torch.manual_seed(0)
    task = Face(chosen, data)
    before = task.evaluate(task.model.eval())
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)
    task.model.train()
    rng = np.random.default_rng(0)
    for _ in range(40):
        items = [task.source.item(int(n), 0, rng) for n in rng.integers(len(task.source), size=32)]
        batch = task.source.collate(items)
        optimizer.zero_grad()
        task.loss(task.forward(task.model, batch), batch)["loss"].backward()
        optimizer.step()
    after = task.evaluate(task.model.eval())
    assert after["auc"] > before["auc"] + 0.05 and after["eer"] < before["eer"]


@pytest.mark.parametrize("folds", [1, 2])
def test_accuracy_needs_two_folds(people: Path, folds: int) -> None:
    chosen = settle(settings(people, protocol="verify"))
    data = Face.load(chosen)
    # Pairs of two photographs of a, and of one of a and one of b.
    first, second = np.array([0, 0, 1, 1]), np.array([1, 4, 2, 5])
    pairs = NamedPairs(first, second, np.array([1, 0, 1, 0], bool), np.array([0, 0, 1, 1]) % folds)
    task = Face(chosen, replace(data, pairs=pairs))
    assert ("accuracy" in task.evaluate(task.model.eval())) == (folds == 2)


def test_embeddings_that_are_not_finite_end_the_run_in_one_line(people: Path) -> None:
    chosen = settle(settings(people))
    task = Face(chosen, Face.load(chosen))
    with torch.no_grad():
        next(task.model.net.parameters()).fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"embeddings: expected finite .* lower lr than 0\.05"):
        task.evaluate(task.model.eval())


def test_the_margin_grows_over_steps_however_many_batches_each_has(people: Path) -> None:
    chosen = settle(replace(settings(people), recipe=replace(RECIPE, accumulate=3)))
    assert Face(chosen, Face.load(chosen)).model.head.warmup == 3 * SMALL["margin_warmup"]


@pytest.mark.parametrize("spec", ["identities:x", "faces", "lfw:", "mnist:x"])
def test_data_of_another_kind_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="expected identities, faces:DIR or lfw:DIR"):
        Face.load(settle(Settings(task="face", data=spec)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": 2.0}, "margin: expected 0 to 1.57"),
        ({"dropout": 1.5}, "dropout: expected 0 to 0.99"),
    ],
)
def test_options_out_of_range_are_refused(
    people: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        chosen = settle(settings(people, **options))
        Face(chosen, Face.load(chosen))


def test_bad_photographs_are_allowed_up_to_a_share(people: Path) -> None:
    (people / "a" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"at most 1\.0% bad items, found 1 of 24"):
        Face.load(settle(settings(people)))
    chosen = Settings(task="face", data=f"faces:{people}", options=dict(SMALL), max_bad=0.1)
    data = Face.load(settle(chosen))
    assert len(data.photos) == 23
