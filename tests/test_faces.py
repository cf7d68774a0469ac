"""Faces from folders, LFW and drawings: what is read, what is left out, who trains and tests."""

from __future__ import annotations

from pathlib import Path

import face_files
import numpy as np
import pytest
from face_files import Image, write_people

from gdfast.data import decode, faces, identities, lfw
from gdfast.data.errors import DataError
from gdfast.data.face_splits import split
from gdfast.data.face_views import Changes, FaceViews, change, with_mirrors
from gdfast.data.faces import FaceData, FaceSet, fit, natural_key
from gdfast.data.problems import Problems

SMALL = {"height": 56, "width": 46}


def told(data: FaceData) -> str:
    return "\n".join(str(problem) for problem in data.problems)


def test_a_folder_per_person_in_natural_order(tmp_path: Path) -> None:
    written = write_people(tmp_path, {"s10": 2, "s2": 12, "s1": 3})
    data = faces.load(tmp_path, **SMALL)
    assert data.classes == ("s1", "s2", "s10")
    assert data.photos.people.tolist() == [0] * 3 + [1] * 12 + [2] * 2
    assert data.photos.names[:3] == ("s1/1.png", "s1/2.png", "s1/3.png")
    assert data.photos.names[-3:] == ("s2/12.png", "s10/1.png", "s10/2.png")
    np.testing.assert_array_equal(data.photos.images[3:15], written["s2"])
    assert not len(data.problems)


def test_natural_order() -> None:
    names = ["a10", "a9b2", "a9b10", "A1", "9", "10", "a", "a09"]
    ordered = sorted(names, key=natural_key)
    assert ordered == ["9", "10", "A1", "a", "a09", "a9b2", "a9b10", "a10"]


def test_bad_files_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_people(tmp_path, {"a": 9, "b": 9, "c": 1, "d": 3})
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    whole = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "3.png").write_bytes(b"no image at all")
    (tmp_path / "b" / "4.png").write_bytes((tmp_path / "a" / "4.png").read_bytes())
    Image.new("L", (300, 300)).save(tmp_path / "b" / "5.png")
    (tmp_path / "b" / "notes.txt").write_text("a note")
    (tmp_path / "b" / ".DS_Store").write_text("noise")
    monkeypatch.setattr(decode, "MAX_PIXELS", 80_000)
    data = faces.load(tmp_path, **SMALL, max_bad=0.5)
    assert data.classes == ("a", "b", "d")
    assert np.bincount(data.photos.people).tolist() == [6, 7, 3]
    for words in (
        "1.png: expected an image, found an empty file",
        "2.png: expected a whole image, found a damaged or truncated file",
        "3.png: expected an image, found another file",
        f"b/4.png: expected another photograph, found a copy of {tmp_path}/a/4.png",
        "5.png: expected at most 80,000 pixels, found a header that claims 300 x 300",
        "notes.txt: expected an image file",
        "c: expected 2 good photographs of a person or more, found 1",
        f"{tmp_path}/empty: expected image files, found none",
    ):
        assert words in told(data)
    assert "DS_Store" not in told(data)
    assert data.problems.skipped() == 5
    with pytest.raises(DataError, match=r"at most 1\.0% bad items, found 5 of 22"):
        faces.load(tmp_path, **SMALL)


def test_folders_without_people_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such folder"):
        faces.load(tmp_path / "none")
    with pytest.raises(DataError, match="expected a folder for each person, found none"):
        faces.load(tmp_path)
    write_people(tmp_path, {"a": 2, "b": 1})
    with pytest.raises(DataError, match="expected 2 people or more"):
        faces.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="found a file"):
        faces.load(tmp_path / "file")


def test_more_than_memory_should_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_people(tmp_path, {"a": 2, "b": 2})
    monkeypatch.setattr(faces, "MOST_BYTES", 4 * 56 * 46)
    assert len(faces.load(tmp_path, **SMALL).photos) == 4
    with pytest.raises(DataError, match="found 4 of 57 x 46"):
        faces.load(tmp_path, height=57, width=46)


def test_images_are_cut_around_the_middle(tmp_path: Path) -> None:
    image = np.zeros((40, 100, 1), np.uint8)
    image[:, 30:70] = 200  # as wide as high
    # The pixels at the edge of a cut may take something of what lies beside it.
    assert (fit(image, 20, 20)[:, 1:-1] == 200).all()
    assert fit(image, 20, 50).mean() == pytest.approx(80, abs=2)
    inner = np.zeros((40, 40, 3), np.uint8)
    inner[10:30, 10:30] = [10, 20, 30]
    found = fit(inner, 10, 10, keep=0.5)
    assert found.shape == (10, 10, 3)
    assert (found[1:-1, 1:-1] == [10, 20, 30]).all()


def test_fingerprints_see_images_and_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "PEOPLE", 3)
    data, same = identities.load(**SMALL), identities.load(**SMALL)
    assert data.fingerprint() == same.fingerprint()
    same.photos.images[7, 3, 3] ^= 1
    assert data.fingerprint() != same.fingerprint()
    people = data.photos.people.copy()
    people[0] = 1
    moved = FaceData("x", FaceSet(data.photos.images, people, data.photos.names), data.classes)
    assert data.fingerprint() != moved.fingerprint()


def test_drawn_identities_differ_and_are_the_same_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identities, "PEOPLE", 6)
    data = identities.load(**SMALL, colour=True)
    assert data.photos.images.shape == (60, 56, 46, 3)
    assert len(data.classes) == 6 and "synthetic" in data.name
    assert len({image.tobytes() for image in data.photos.images}) == 60
    few = identities.render(3, 4, height=56, width=46, seed=5)
    more = identities.render(4, 5, height=56, width=46, seed=5)
    np.testing.assert_array_equal(few.images, more.images.reshape(4, 5, 56, 46, 1)[:3, :4].reshape(
        12, 56, 46, 1))  # fmt: skip
    other = identities.render(3, 4, height=56, width=46, seed=6)
    assert (few.images != other.images).any(axis=(1, 2, 3)).all()


def test_identify_trains_on_the_first_half_of_each_person(tmp_path: Path) -> None:
    write_people(tmp_path, {"a": 5, "b": 2, "c": 4})
    found = split(faces.load(tmp_path, **SMALL), "identify")
    assert found.train.names == ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "c/1.png", "c/2.png")
    assert found.gallery.names == found.train.names
    assert found.probes.names == ("a/4.png", "a/5.png", "b/2.png", "c/3.png", "c/4.png")
    assert found.train.people.tolist() == [0, 0, 0, 1, 2, 2]
    tested = found.tested()
    assert {tested.names[i] for i in found.pairs.first} <= set(found.probes.names)
    assert len(found.pairs.first) == 10
    people = tested.people
    np.testing.assert_array_equal(
        found.pairs.same, people[found.pairs.first] == people[found.pairs.second]
    )


def test_verify_never_shows_the_tested_people(test_data: Path) -> None:
    data = faces.load(test_data / "orl_faces")
    seen: list[str] = []
    for fold in (1, 2, 3, 4):
        found = split(data, "verify", fold=fold, folds=4)
        train = {name.split("/")[0] for name in found.train.names}
        test = [name.split("/")[0] for name in found.tested().names]
        assert len(train) == 30 and not train & set(test)
        assert found.train.people.max() == 29
        assert len(found.gallery) == len(found.probes) == 50
        assert len(found.pairs.first) == 100 * 99 // 2 and found.pairs.same.sum() == 10 * 45
        seen += sorted(set(test), key=natural_key)
    assert seen == [f"s{n}" for n in range(1, 41)]


@pytest.mark.parametrize(
    ("fold", "folds", "message"),
    [(3, 2, "fold: expected 1 to 2, got 3"), (0, 2, "got 0"), (1, 1, "folds: expected 2 or more"),
     (1, 3, "for 4 people")],
)  # fmt: skip
def test_folds_that_cannot_be_are_refused(
    tmp_path: Path, fold: int, folds: int, message: str
) -> None:
    write_people(tmp_path, dict.fromkeys("abcd", 2))
    data = faces.load(tmp_path, **SMALL)
    assert len(split(data, "verify", fold=1, folds=2).train) == 4
    with pytest.raises(DataError, match=message):
        split(data, "verify", fold=fold, folds=folds)


def test_people_without_two_photographs_cannot_be_tested() -> None:
    photos = identities.render(4, 1, height=56, width=46, seed=1)
    data = FaceData("x", photos, ("a", "b", "c", "d"))
    for protocol in ("identify", "verify"):
        with pytest.raises(DataError, match="expected 2 people or more with 2 photographs each"):
            split(data, protocol, folds=2)


# Four people in pairs of one person and of two, in two folds; Eve and Fay are in none of them.
LFW = {"Ann_A": 3, "Bob_B": 3, "Cy": 1, "Dee": 2, "Eve": 4, "Fay": 3, "Gus": 1}
PAIRS = [
    "2\t2",
    "Ann_A\t1\t2",
    "Ann_A\t1\t3",
    "Ann_A\t1\tBob_B\t2",
    "Cy\t1\tDee\t2",
    "Bob_B\t1\t3",
    "Dee\t1\t2",
    "Ann_A\t2\tCy\t1",
    "Dee\t1\tBob_B\t1",
]


def write_lfw(folder: Path, lines: list[str] = PAIRS) -> None:
    write_people(folder / "lfw", LFW, "{person}_{n:04d}.jpg", size=(250, 250))
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")


def test_lfw_and_its_pairs(tmp_path: Path) -> None:
    write_lfw(tmp_path)
    data = lfw.load(tmp_path, height=40, width=30)
    assert data.photos.images.shape == (17, 40, 30, 1)
    assert data.pairs is not None
    assert data.pairs.same.tolist() == [True, True, False, False] * 2
    assert data.pairs.folds.tolist() == [0] * 4 + [1] * 4
    names = data.photos.names
    assert names[data.pairs.first[3]] == "Cy/Cy_0001"
    assert names[data.pairs.second[3]] == "Dee/Dee_0002"

    found = split(data, "verify")
    assert {name.split("/")[0] for name in found.train.names} == {"Eve", "Fay"}
    tested = found.tested().names
    named = [(tested[a], tested[b]) for a, b in zip(found.pairs.first, found.pairs.second,
             strict=True)]  # fmt: skip
    assert named[4] == ("Bob_B/Bob_B_0001", "Bob_B/Bob_B_0003")
    assert named[6] == ("Ann_A/Ann_A_0002", "Cy/Cy_0001")
    assert found.folds is not None and found.folds.tolist() == [0] * 4 + [1] * 4
    assert {name.split("/")[0] for name in split(data, "identify").train.names} == set(LFW) - {
        "Cy", "Gus"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (2, "Ann_A\t1\t9", "pairs.txt:2: expected the photograph Ann_A/Ann_A_0009, found none"),
        (2, "Ann_A\t1\t1", "pairs.txt:2: expected Name 1 4"),
        (3, "Ann_A\t1\tBob_B\t2", "pairs.txt:3: expected Name 1 4 (a pair of one person)"),
        (4, "Ann_A\t1\t2", "pairs.txt:4: expected Name 1 Other 2 (a pair of two)"),
        (4, "Ann_A\t1\tAnn_A\t2", "pairs.txt:4: expected Name 1 Other 2"),
        (5, "Cy\tx\tDee\t2", "pairs.txt:5: expected Name 1 Other 2"),
        (5, "Cy\t0\tDee\t2", "pairs.txt:5: expected Name 1 Other 2"),
        (5, "", "pairs.txt:5: expected Name 1 Other 2"),
    ],
)
def test_bad_pairs_are_left_out_and_named(tmp_path: Path, line: int, text: str, words: str) -> None:
    lines = [*PAIRS]
    lines[line - 1] = text
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    names = [f"{name}/{name}_{n:04d}" for name, count in LFW.items() for n in range(1, count + 1)]
    problems = Problems()
    pairs = lfw.read_pairs(tmp_path / "pairs.txt", names, problems, max_bad=0.2)
    assert len(pairs.same) == 7
    assert words in str(next(iter(problems)))
    with pytest.raises(DataError, match=r"expected at most 1\.0% bad pairs, found 1 of 8"):
        lfw.read_pairs(tmp_path / "pairs.txt", names, Problems())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected the number of folds and of pairs"),
        (b"Ann 1 2\n", "expected the number of folds and of pairs"),
        (b"10 300\nAnn 1 2\n", "expected 6,000 pairs, 2 x 300 for each of 10 folds"),
        (b"1000000000 1\n", "expected the number of folds"),
        (b"\xff\xfe\x00", "expected text in UTF-8"),
    ],
)
def test_lists_of_pairs_that_are_none_are_refused(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "pairs.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        lfw.read_pairs(tmp_path / "pairs.txt", ["Ann/Ann_0001"], Problems())
    with pytest.raises(DataError, match="found none"):
        lfw.read_pairs(tmp_path / "other.txt", [], Problems())


def views(changes: Changes, batch_size: int = 4) -> FaceViews:
    photos = identities.render(2, 3, height=56, width=46, seed=1)
    return FaceViews(photos, changes, views=3, batch_size=batch_size)


def test_views_show_every_photograph_as_often_and_fill_the_last_batch() -> None:
    source = views(Changes().scaled(0))
    assert len(source) == 20  # 18, and two more
    photos = identities.render(2, 3, height=56, width=46, seed=1)
    rng = np.random.default_rng(0)
    for index in range(20):
        image, person = source.item(index, 0, rng)
        np.testing.assert_array_equal(image, photos.images[index % 6])
        assert person == photos.people[index % 6]
    batch = source.collate([source.item(index, 0, rng) for index in (0, 5)])
    assert batch.images.shape == (2, 1, 56, 46)
    np.testing.assert_allclose(batch.images[1, 0], photos.images[5, :, :, 0] / 255, rtol=1e-6)
    assert batch.targets.tolist() == [0, 1]


def test_mirror_images_are_other_people() -> None:
    photos = identities.render(2, 3, height=56, width=46, seed=1)
    both = with_mirrors(photos)
    np.testing.assert_array_equal(both.images[:6], photos.images)
    np.testing.assert_array_equal(both.images[6:], photos.images[:, :, ::-1])
    assert both.people.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(both.names) == 12


def test_views_differ_and_come_from_their_generator_alone() -> None:
    source = views(Changes(blur=1.0))
    first, again, other = (source.item(0, 0, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert first.shape == (56, 46, 1) and first.dtype == np.uint8


def test_views_stay_close_in_colour_too() -> None:
    photo = identities.render(1, 1, height=56, width=46, seed=1, colour=True).images[0]
    rng = np.random.default_rng(0)
    gentle = Changes().scaled(0.1)
    for _ in range(5):
        view = change(photo, gentle, rng)
        mirrored = min(np.abs(view.astype(int) - each).mean() for each in (photo, photo[:, ::-1]))
        assert view.shape == photo.shape and 0 < mirrored < 16


def test_helpers_of_these_tests(tmp_path: Path) -> None:
    written = face_files.write_people(tmp_path, {"a": 1})
    np.testing.assert_array_equal(decode.read(tmp_path / "a" / "1.png", "L"), written["a"][0])
