"""Training face recognition: a small run end to end, and what it leaves behind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from face_files import write_people

from gdfast import face
from gdfast.data import DataError
from gdfast.train import Recipe, Settings, resume, train
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


@pytest.mark.parametrize(
    ("options", "train_images"),
    [
        ({}, 12),
        ({"protocol": "verify", "fold": 2, "folds": 3, "head": "cosine"}, 16),
        ({"head": "softmax", "changes": 0.0}, 12),
    ],
)
def test_a_run_leaves_weights_measures_and_pictures(
    tmp_path: Path, people: Path, options: dict[str, Any], train_images: int
) -> None:
    out = tmp_path / "run"
    result = train(settings(people, **options), out=out, stream=io.StringIO())
    names = {path.name for path in out.iterdir()}
    assert names >= {"roc.png", "similarities.png", "pairs.png", "mistakes.png", "curves.png"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == result.metrics and metrics["train_images"] == train_images
    for name in ("rank1", "auc", "eer", "tar", "train_accuracy"):
        assert 0 <= metrics[name] <= 1

    recogniser = face.load(out)
    assert recogniser.threshold == metrics["threshold"]
    photo = people / "a" / "4.png"
    gallery = face.Gallery.enrol(recogniser, people)
    assert face.identify(recogniser, photo, gallery, threshold=-1)[0].name in "abcdef"
    weights = {name.split(".")[0] for name in recogniser.net.state_dict()}
    assert "conv1" in weights and "head" not in weights


def test_measures_are_those_of_the_saved_network(tmp_path: Path, people: Path) -> None:
    chosen = settle(settings(people, protocol="verify", folds=3))
    result = train(chosen, out=tmp_path / "run", stream=io.StringIO())
    recogniser = face.load(tmp_path / "run")
    files = [people / name / f"{n}.png" for name in "ab" for n in (1, 2, 3, 4)]
    points = recogniser.embed(files).reshape(2, 4, -1)
    means = points[:, :2].sum(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    right = [(means @ probe).argmax() == who for who in (0, 1) for probe in points[who, 2:]]
    assert result.metrics["rank1"] == pytest.approx(np.mean(right))
    similarity = points.reshape(8, -1) @ points.reshape(8, -1).T
    alike = [similarity[a, b] for a in range(8) for b in range(a) if a // 4 == b // 4]
    unlike = [similarity[a, b] for a in range(8) for b in range(a) if a // 4 != b // 4]
    auc = np.mean([a > b for a in alike for b in unlike])
    assert result.metrics["auc"] == pytest.approx(auc, abs=1e-3)


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path, people: Path) -> None:
    whole = train(settings(people), out=tmp_path / "whole", stream=io.StringIO())
    again = resume(tmp_path / "whole", stream=io.StringIO())
    for name in ("rank1", "auc", "eer", "tar", "train_loss"):
        assert whole.metrics[name] == again.metrics[name]


def test_an_embedding_learns_to_tell_drawn_people_apart() -> None:
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


@pytest.mark.parametrize("spec", ["identities:x", "faces", "lfw:", "mnist:x"])
def test_data_of_another_kind_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="expected identities, faces:DIR or lfw:DIR"):
        Face.load(settle(Settings(task="face", data=spec)))


def test_bad_photographs_are_allowed_up_to_a_share(people: Path) -> None:
    (people / "a" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"at most 1\.0% bad items, found 1 of 24"):
        Face.load(settle(settings(people)))
    chosen = Settings(task="face", data=f"faces:{people}", options=dict(SMALL), max_bad=0.1)
    data = Face.load(settle(chosen))
    assert len(data.photos) == 23
