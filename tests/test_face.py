"""The face library: recognisers, comparing, galleries and finding who it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from face_files import write_people

from gdfast import face, models
from gdfast.data.errors import DataError
from gdfast.data.problems import Problems
from gdfast.files import write_atomic

save = pytest.importorskip("safetensors.torch").save
OPTIONS = {"depth": 1, "width": 4, "in_channels": 1}


def write_weights(path: Path, seed: int = 0, **changed: str) -> Path:
    torch.manual_seed(seed)
    net = models.create("face_resnet", **OPTIONS)
    metadata = {"model": "face_resnet", "options": json.dumps(OPTIONS)}
    metadata |= {"shape": "[1, 56, 46]", "threshold": "0.9"}
    write_atomic(path, save(net.state_dict(), {**metadata, **changed}))
    return path


@pytest.fixture
def recogniser(tmp_path: Path) -> face.Recogniser:
    return face.load(write_weights(tmp_path / "weights.safetensors"))


def test_a_recogniser_embeds_files_and_arrays_alike(
    tmp_path: Path, recogniser: face.Recogniser
) -> None:
    photos = write_people(tmp_path / "people", {"a": 3})["a"]
    files = [tmp_path / "people" / "a" / f"{n}.png" for n in (1, 2, 3)]
    found = recogniser.embed(files)
    assert found.shape == (3, 512)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    arrays = [photos[0], photos[1][:, :, 0], photos[2].repeat(3, axis=2)]
    np.testing.assert_allclose(recogniser.embed(arrays), found, atol=1e-6)
    np.testing.assert_array_equal(recogniser.embed(arrays[:2]), recogniser.embed(files[:2]))
    assert recogniser.embed([]).shape == (0, 512)


def test_mirror_images_have_one_embedding(recogniser: face.Recogniser) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (1, 56, 46, 1)).astype(np.uint8)
    mirrored = photo[:, :, ::-1]
    net = recogniser.net
    np.testing.assert_allclose(face.embed(net, photo), face.embed(net, mirrored), atol=1e-5)
    one, other = face.embed(net, photo, flip=False), face.embed(net, mirrored, flip=False)
    assert np.abs(one - other).max() > 1e-3
    mean = (one + other) / np.linalg.norm(one + other)
    np.testing.assert_allclose(face.embed(net, photo), mean, atol=1e-5)


def test_comparing_and_verifying(tmp_path: Path, recogniser: face.Recogniser) -> None:
    a, b = write_people(tmp_path / "people", {"a": 1, "b": 1}).values()
    assert face.compare(recogniser, a[0], a[0]) == pytest.approx(1, abs=1e-5)
    first, second = recogniser.embed([a[0], b[0]])
    similarity = face.compare(recogniser, a[0], b[0])
    assert similarity == pytest.approx(float(first @ second), abs=1e-5)
    assert similarity == pytest.approx(face.compare(recogniser, b[0], a[0]), abs=1e-5)
    assert face.verify(recogniser, a[0], a[0])
    assert not face.verify(recogniser, a[0], b[0], threshold=similarity + 0.01)
    assert face.verify(recogniser, a[0], b[0], threshold=similarity - 0.01)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(
    recogniser: face.Recogniser, image: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=r"face: image: expected bytes \[H, W\]"):
        recogniser.embed([image])


def test_a_gallery_names_whom_it_knows(tmp_path: Path, recogniser: face.Recogniser) -> None:
    photos = write_people(tmp_path / "people", {"bob": 1, "ann": 3, "cy": 2})
    gallery = face.Gallery.enrol(recogniser, tmp_path / "people")
    assert gallery.people == ("ann", "bob", "cy")
    assert gallery.names == ("ann", "ann", "ann", "bob", "cy", "cy")
    assert gallery.folder == tmp_path / "people" and Path(gallery.photos[4]) == Path("cy/1.png")
    np.testing.assert_allclose(gallery.embeddings[:3], recogniser.embed(photos["ann"]), atol=1e-6)

    probe = recogniser.embed(photos["cy"])[0]
    for match in gallery.nearest(probe):
        best = (recogniser.embed(photos[match.name]) @ probe).argmax()
        assert match.similarity == pytest.approx(
            float(recogniser.embed(photos[match.name])[best] @ probe), abs=1e-5
        )
        assert Path(match.photo) == Path(match.name, f"{best + 1}.png")
        np.testing.assert_array_equal(gallery.read(match.photo)[:, :, :1], photos[match.name][best])
    found = face.identify(recogniser, photos["bob"][0], gallery)
    assert found[0].name == "bob"
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    assert [match.similarity for match in found] == sorted(
        (match.similarity for match in found), reverse=True
    )
    assert len(face.identify(recogniser, photos["bob"][0], gallery, most=2)) == 2
    stranger = face.identify(recogniser, photos["bob"][0], gallery, threshold=1.5)
    assert stranger[0] == face.Match(face.UNKNOWN, 1.5) and stranger[1].name == "bob"


def test_a_gallery_outlives_its_process(tmp_path: Path, recogniser: face.Recogniser) -> None:
    write_people(tmp_path / "people", {"bob": 1, "Ümit": 2})
    gallery = face.Gallery.enrol(recogniser, tmp_path / "people")
    gallery.save(tmp_path / "gallery.safetensors")
    again = face.Gallery.load(tmp_path / "gallery.safetensors")
    assert (again.names, again.photos, again.network, again.folder) == (
        gallery.names, gallery.photos, gallery.network, gallery.folder
    )  # fmt: skip
    np.testing.assert_array_equal(again.embeddings, gallery.embeddings)
    assert not list(tmp_path.glob(".gdfast-*"))


def test_a_gallery_reads_photographs_of_its_folder_alone(
    tmp_path: Path, recogniser: face.Recogniser
) -> None:
    write_people(tmp_path / "people", {"bob": 1})
    write_people(tmp_path / "others", {"eve": 1})
    secret = tmp_path / "others" / "eve" / "1.png"
    (tmp_path / "people" / "bob" / "link.png").symlink_to(secret)
    (tmp_path / "people" / "bob" / "1.txt").write_bytes(secret.read_bytes())
    gallery = face.Gallery.enrol(recogniser, tmp_path / "people", max_bad=1.0)
    assert gallery.read("bob/1.png") is not None
    for photo in (str(secret), "../others/eve/1.png", "bob/link.png", "bob/1.txt", "", "a\0.png"):
        assert gallery.read(photo) is None

    gallery.save(tmp_path / "people.safetensors")
    assert face.Gallery.load(tmp_path / "people.safetensors").read("bob/1.png") is not None
    (tmp_path / "away").mkdir()
    gallery.save(tmp_path / "away" / "people.safetensors")
    assert face.Gallery.load(tmp_path / "away" / "people.safetensors").read("bob/1.png") is None
    metadata = {"format": "gdfast face gallery 1", "names": '["a"]', "photos": '["eve/1.png"]'}
    metadata["network"] = "x"
    for folder in (str(tmp_path / "others"), "../others"):
        tensors = {"embeddings": torch.ones(1, 4) / 2}
        write_atomic(tmp_path / "away" / "bad", save(tensors, {**metadata, "folder": folder}))
        assert face.Gallery.load(tmp_path / "away" / "bad").read("eve/1.png") is None


def test_damaged_tensors_are_noticed(tmp_path: Path, recogniser: face.Recogniser) -> None:
    write_people(tmp_path / "people", {"bob": 1})
    face.Gallery.enrol(recogniser, tmp_path / "people").save(tmp_path / "gallery")
    content = bytearray((tmp_path / "gallery").read_bytes())
    content[-4] ^= 1
    (tmp_path / "gallery").write_bytes(content)
    with pytest.raises(DataError, match="found tensors that do not match the checksum"):
        face.Gallery.load(tmp_path / "gallery")
    write_weights(tmp_path / "weights", sha256="0")
    with pytest.raises(DataError, match="found tensors that do not match the checksum"):
        face.load(tmp_path / "weights")


def test_a_gallery_of_another_network_is_refused(
    tmp_path: Path, recogniser: face.Recogniser
) -> None:
    photo = write_people(tmp_path / "people", {"a": 1})["a"][0]
    other = face.load(write_weights(tmp_path / "other.safetensors", seed=1))
    gallery = face.Gallery.enrol(other, tmp_path / "people")
    with pytest.raises(DataError, match="expected one enrolled with this network"):
        face.identify(recogniser, photo, gallery)


def test_bad_photographs_are_not_enrolled(tmp_path: Path, recogniser: face.Recogniser) -> None:
    write_people(tmp_path / "people", {"a": 2, "b": 1})
    (tmp_path / "people" / "a" / "1.png").write_bytes(b"")
    (tmp_path / "people" / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"at most 1\.0% bad items, found 2 of 3"):
        face.Gallery.enrol(recogniser, tmp_path / "people")
    problems = Problems()
    gallery = face.Gallery.enrol(recogniser, tmp_path / "people", max_bad=1.0, problems=problems)
    assert gallery.names == ("a",) and problems.skipped() == 2
    (tmp_path / "people" / "a" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match="expected photographs of people, found none"):
        face.Gallery.enrol(recogniser, tmp_path / "people", max_bad=1.0)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such file"):
        face.load(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match=r"weights\.safetensors: .* found no such file"):
        face.load(tmp_path)
    (tmp_path / "bad").write_bytes(b"\x10" * 100)
    with pytest.raises(DataError, match="found another or a damaged file"):
        face.load(tmp_path / "bad")
    cut = write_weights(tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(DataError, match="found another or a damaged file"):
        face.load(tmp_path / "cut")
    for changed in ({"model": "none"}, {"options": "{"}, {"options": '{"width": 8}'},
                    {"shape": "[]"}, {"shape": "[2, 5, 5]"}, {"threshold": "nan"}):  # fmt: skip
        write_weights(tmp_path / "changed", **changed)
        with pytest.raises(DataError, match="expected weights of a face network"):
            face.load(tmp_path / "changed")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({}, {}),
        ({"embeddings": torch.ones(1, 4) / 2}, {"format": "gdfast face gallery 9"}),
        ({"embeddings": torch.ones(1, 4) / 2}, {"names": '["a", "b"]'}),
        ({"embeddings": torch.ones(1, 4)}, {}),
        ({"embeddings": torch.full((1, 4), torch.nan)}, {}),
        ({"others": torch.ones(1, 4) / 2}, {}),
        ({"embeddings": torch.ones(1, 4) / 2}, {"names": "["}),
        ({"embeddings": torch.ones(1, 4) / 2}, {"names": "[" * 100_000}),
        ({"embeddings": torch.ones(1, 4) / 2}, {"network": None}),
    ],
)
def test_files_that_are_no_galleries_are_refused(
    tmp_path: Path, tensors: dict, metadata: dict
) -> None:
    usual = {
        "format": "gdfast face gallery 1",
        "names": '["a"]',
        "photos": '["a/1.png"]',
        "network": "x",
    }
    changed = {**usual, **metadata} if tensors else {}
    content = {name: value for name, value in changed.items() if value is not None}
    write_atomic(tmp_path / "gallery", save(tensors, content))
    with pytest.raises(DataError, match="expected a gallery of faces"):
        face.Gallery.load(tmp_path / "gallery")
