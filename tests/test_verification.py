"""Measures of face recognition, against definitions written out and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest

from gdfast.metrics import verification
from gdfast.metrics.verification import (
    Pairs,
    best_threshold,
    fold_accuracies,
    identify,
    pairs_of,
    person_means,
    roc,
)


def drawn(count: int = 400, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of pairs, few values of them with `levels`, and which are of one person."""
    rng = np.random.default_rng(3)
    same = rng.random(count) < 0.3
    similarities = rng.normal(0.3, 0.3, count) + 0.4 * same
    return (np.round(similarities * levels) / levels if levels else similarities), same


@pytest.mark.parametrize("levels", [0, 5])
def test_auc_is_the_chance_that_a_same_pair_is_more_alike(levels: int) -> None:
    similarities, same = drawn(levels=levels)
    alike, unlike = similarities[same][:, None], similarities[~same][None]
    expected = ((alike > unlike) + 0.5 * (alike == unlike)).mean()
    assert roc(similarities, same).auc == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [0, 5])
def test_each_threshold_accepts_what_it_says(levels: int) -> None:
    similarities, same = drawn(levels=levels)
    curve = roc(similarities, same)
    assert curve.thresholds[0] == np.inf
    assert (np.diff(curve.thresholds) < 0).all()
    for far, tar, threshold in zip(*curve, strict=True):
        accepted = similarities >= threshold
        assert far == pytest.approx(accepted[~same].mean())
        assert tar == pytest.approx(accepted[same].mean())


@pytest.mark.parametrize("levels", [0, 5])
def test_auc_is_scikit_learns(levels: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    similarities, same = drawn(levels=levels)
    curve = roc(similarities, same)
    assert curve.auc == pytest.approx(metrics.roc_auc_score(same, similarities), abs=1e-12)
    far, tar, _ = metrics.roc_curve(same, similarities, drop_intermediate=False)
    np.testing.assert_allclose(curve.far, far)
    np.testing.assert_allclose(curve.tar, tar)


def test_eer_lies_between_two_thresholds() -> None:
    # Same: 4 3 1, different: 3.5 2 0. Error rates (FAR, 1 - TAR) while the threshold falls:
    # (0, 2/3) at 4, (1/3, 2/3) at 3.5, (1/3, 1/3) at 3.
    curve = roc(np.array([4, 3, 1, 3.5, 2, 0]), np.array([1, 1, 1, 0, 0, 0], bool))
    assert curve.eer == pytest.approx(1 / 3)
    # Same: 3 1, different: 2 2 2 0: (0, 1/2) at 3, then (3/4, 1/2) at 2: they cross at 1/2.
    curve = roc(np.array([3, 1, 2, 2, 2, 0.0]), np.array([1, 1, 0, 0, 0, 0], bool))
    assert curve.eer == pytest.approx(0.5)
    # All tie: half of each is as good as any threshold gets.
    assert roc(np.zeros(4), np.array([1, 0, 0, 1], bool)).eer == pytest.approx(0.5)


def test_eer_is_where_a_fine_search_finds_it() -> None:
    similarities, same = drawn(5000)
    grid = np.linspace(similarities.min(), similarities.max(), 20_000)
    far = np.array([(similarities[~same] >= t).mean() for t in grid])
    miss = np.array([(similarities[same] < t).mean() for t in grid])
    nearest = np.abs(far - miss).argmin()
    assert roc(similarities, same).eer == pytest.approx(
        (far[nearest] + miss[nearest]) / 2, abs=1e-3
    )


def test_perfect_and_reversed_similarities() -> None:
    same = np.array([1, 1, 0, 0], bool)
    perfect = roc(np.array([4.0, 3, 2, 1]), same)
    assert (perfect.auc, perfect.eer, perfect.tar_at()) == (1.0, 0.0, 1.0)
    reverse = roc(np.array([1.0, 2, 3, 4]), same)
    assert (reverse.auc, reverse.eer, reverse.tar_at()) == (0.0, 1.0, 0.0)
    assert reverse.threshold_at() == np.inf


def test_tar_at_far_never_accepts_more_than_it_may() -> None:
    similarities, same = drawn(levels=20)
    curve = roc(similarities, same)
    for far in (0.0, 1e-2, 0.1, 0.5, 1.0):
        threshold = curve.threshold_at(far)
        assert (similarities[~same] >= threshold).mean() <= far
        lower = similarities[similarities < threshold]
        if len(lower):
            assert (similarities[~same] >= lower.max()).mean() > far
        assert curve.tar_at(far) == pytest.approx((similarities[same] >= threshold).mean())


@pytest.mark.parametrize(
    ("similarities", "same", "message"),
    [
        ([0.1, 0.2], [True, True], "expected pairs of one person and pairs of two, got 2 and 0"),
        ([0.1, 0.2], [False, False], "got 0 and 2"),
        ([0.1, np.nan], [True, False], "expected finite numbers"),
        ([0.1], [True, False], "expected one value for each similarity"),
    ],
)
def test_a_roc_of_nothing_is_refused(similarities: list, same: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc(np.array(similarities), np.array(same))


def embeddings(people: np.ndarray, noise: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(people.max() + 1, 16))
    found = centres[people] + noise * rng.normal(size=(len(people), 16))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_all_pairs_and_their_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_PART", 4)
    people = np.array([0, 0, 1, 2, 2])
    points = embeddings(people)
    pairs = pairs_of(people)
    expected = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert list(zip(pairs.first, pairs.second, strict=True)) == expected
    assert pairs.same.tolist() == [people[a] == people[b] for a, b in expected]
    similarities = [float(points[a] @ points[b]) for a, b in expected]
    np.testing.assert_allclose(pairs.similarities(points), similarities, rtol=1e-5)


def test_of_too_many_same_pairs_some_are_drawn() -> None:
    people = np.repeat([0, 1], [300, 20])[np.random.default_rng(0).permutation(320)]
    pairs = pairs_of(people, most=4000)
    assert len(pairs.first) <= 4000 and 1800 < pairs.same.sum() <= 2000
    assert (~pairs.same).sum() > 100
    assert (pairs.first < pairs.second).all()
    assert len(set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))) == len(pairs[0])
    # A person of 40,000 photographs has 800 million pairs.
    many = pairs_of(np.repeat([0, 1], [40_000, 1000]), most=10_000)
    assert 4000 < many.same.sum() <= 5000 and len(many.first) <= 10_000
    assert abs(np.median(many.second[many.same]) - 40_000 / 2**0.5) < 1000  # of all alike


def test_of_too_many_pairs_all_same_ones_stay() -> None:
    people = np.repeat(np.arange(40), 5)[np.random.default_rng(0).permutation(200)]
    full, some = pairs_of(people), pairs_of(people, most=3000)
    assert len(some.first) <= 3000 < len(full.first)

    def as_set(pairs: Pairs, same: bool) -> set[tuple[int, int]]:
        chosen = pairs.same == same
        return set(zip(pairs.first[chosen].tolist(), pairs.second[chosen].tolist(), strict=True))

    assert as_set(some, True) == as_set(full, True)
    assert as_set(some, False) < as_set(full, False)
    assert len(as_set(some, False)) + some.same.sum() == len(some.first)
    assert len(as_set(some, False)) > 2000
    assert all(np.array_equal(a, b) for a, b in zip(some, pairs_of(people, 3000), strict=True))


@pytest.mark.parametrize("by", ["mean", "each"])
def test_identify_finds_the_most_alike(by: str) -> None:
    people = np.repeat([4, 0, 7], 5)
    points = embeddings(people, 0.8)
    gallery, probes = np.arange(15) % 5 < 3, np.arange(15) % 5 >= 3
    found = identify(points[probes], points[gallery], people[gallery], by=by)
    for probe, person, similarity in zip(points[probes], *found, strict=True):
        scores = {}
        for known in (0, 4, 7):
            own = points[gallery & (people == known)]
            mean = own.sum(0) / np.linalg.norm(own.sum(0))
            scores[known] = float(mean @ probe if by == "mean" else (own @ probe).max())
        best = max(scores, key=scores.__getitem__)
        assert (person, similarity) == (best, pytest.approx(scores[best], rel=1e-5))


def test_identify_compares_few_probes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    people = np.repeat([4, 0, 7], 5)
    points = embeddings(people % 3, 0.8)
    whole = identify(points, points[::2], people[::2])
    sizes = []

    class Probes(np.ndarray):
        def __matmul__(self, other: np.ndarray) -> np.ndarray:
            sizes.append(self.shape[0])
            return np.asarray(self) @ other

    monkeypatch.setattr(verification, "_CELLS", 35)
    parts = identify(points.view(Probes), points[::2], people[::2])
    assert sizes == [4, 4, 4, 3]
    assert parts.people.tolist() == whole.people.tolist()
    np.testing.assert_allclose(parts.similarity, whole.similarity, rtol=1e-6)


def test_identify_refuses() -> None:
    points = embeddings(np.array([0, 1]))
    with pytest.raises(ValueError, match="expected one embedding or more"):
        identify(points, points[:0], np.zeros(0, int))
    with pytest.raises(ValueError, match="expected 'each' or 'mean', got 'best'"):
        identify(points, points, np.array([0, 1]), by="best")


def test_person_means_have_length_one() -> None:
    means, people = person_means(embeddings(np.array([1, 0, 1])), np.array(["b", "a", "b"]))
    assert people.tolist() == ["a", "b"]
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, rtol=1e-6)


def test_best_threshold_tells_most_pairs_right() -> None:
    for levels in (0, 5):
        similarities, same = drawn(60, levels)
        candidates = [*similarities, similarities.max() + 1]
        most = max(((similarities >= t) == same).sum() for t in candidates)
        assert ((similarities >= best_threshold(similarities, same)) == same).sum() == most
    # Between the widest gap of those that are as good: 0.9 | 0.5 0.4.
    assert best_threshold(np.array([0.9, 0.5, 0.4]), np.array([1, 0, 0], bool)) == 0.7


def test_fold_accuracies_never_see_their_own_fold() -> None:
    similarities, same = drawn(90)
    folds = np.arange(90) % 3
    found = fold_accuracies(similarities, same, folds)
    for fold, accuracy in enumerate(found):
        others = folds != fold
        threshold = best_threshold(similarities[others], same[others])
        right = (similarities[~others] >= threshold) == same[~others]
        assert accuracy == pytest.approx(right.mean())
    # A fold that lies higher than all the others is misjudged at their threshold.
    shifted = similarities + 10.0 * (folds == 2)
    assert fold_accuracies(shifted, same, folds)[2] == pytest.approx(same[folds == 2].mean())
    with pytest.raises(ValueError, match="expected two or more, got 1"):
        fold_accuracies(similarities, same, np.zeros(90))
