"""Measures of face recognition, from embeddings and from similarities of pairs; numpy alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FAR = 1e-2
_PART = 100_000  # pairs at once: 200 MB of embeddings
_CELLS = 20_000_000  # cosines at once: 80 MB


class Roc(NamedTuple):
    """What each threshold accepts: `far` and `tar` [T], both rising, as `thresholds` [T] fall.

    A pair is accepted as one person if its similarity is at least the threshold. `far` is the
    share of the different pairs that are accepted, `tar` that of the same. The first threshold is
    infinite and accepts none, the last accepts all.
    """

    far: np.ndarray
    tar: np.ndarray
    thresholds: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the curve: the chance that a same pair is more alike than a different one.

        Exact: ties count a half.
        """
        widths = np.diff(self.far)
        return float(np.sum(widths * (self.tar[1:] + self.tar[:-1]) / 2))

    @property
    def eer(self) -> float:
        """Equal error rate: where as many same pairs are refused as different ones accepted.

        Linear between the two thresholds around it.
        """
        gap = self.far - (1.0 - self.tar)  # -1 at the first threshold, 1 at the last, rising
        after = int(np.searchsorted(gap, 0.0))
        if gap[after] == 0.0:
            return float(self.far[after])
        share = -gap[after - 1] / (gap[after] - gap[after - 1])
        return float(self.far[after - 1] + share * (self.far[after] - self.far[after - 1]))

    def tar_at(self, far: float = FAR) -> float:
        """Share of the same pairs accepted by the lowest threshold whose FAR is at most `far`."""
        return float(self.tar[self._last(far)])

    def threshold_at(self, far: float = FAR) -> float:
        """The lowest threshold whose FAR is at most `far`: infinite if only accepting none is."""
        return float(self.thresholds[self._last(far)])

    def _last(self, far: float) -> int:
        return int(np.searchsorted(self.far, far, side="right")) - 1


def roc(similarities: np.ndarray, same: np.ndarray) -> Roc:
    """The ROC of pairs: their similarities [P], and whether each shows one person, [P] bool.

    Raises:
        ValueError: no same or no different pair, or a similarity that is not finite.
    """
    similarities = np.asarray(similarities, dtype=np.float64)
    same = np.asarray(same, dtype=bool)
    if similarities.shape != same.shape or similarities.ndim != 1:
        raise ValueError(
            f"roc: same: expected one value for each similarity, got {same.shape} for "
            f"{similarities.shape}"
        )
    if same.all() or not same.any():
        raise ValueError(
            f"roc: same: expected pairs of one person and pairs of two, got {int(same.sum())} and "
            f"{int((~same).sum())}"
        )
    if not np.isfinite(similarities).all():
        raise ValueError("roc: similarities: expected finite numbers, got NaN or infinity")
    order = np.argsort(-similarities, kind="stable")
    ranked, hits = similarities[order], same[order]
    # Equal similarities pass any threshold together: only the last of each counts.
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    accepted = np.cumsum(hits)[ends]
    tar = accepted / same.sum()
    far = (ends + 1 - accepted) / (~same).sum()
    return Roc(
        np.concatenate([[0.0], far]),
        np.concatenate([[0.0], tar]),
        np.concatenate([[np.inf], ranked[ends]]),
    )


class Pairs(NamedTuple):
    """Pairs of photographs: `first` and `second` [P] index them; `same` [P], if of one person."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray

    def similarities(self, embeddings: np.ndarray) -> np.ndarray:
        """Cosine [P] of each pair, from the photographs' embeddings [N, features] of length 1."""
        found = np.empty(len(self.first), embeddings.dtype)
        for start in range(0, len(found), _PART):
            part = slice(start, start + _PART)
            first, second = embeddings[self.first[part]], embeddings[self.second[part]]
            found[part] = np.einsum("pf,pf->p", first, second)
        return found


def pairs_of(people: np.ndarray, most: int = 2_000_000) -> Pairs:
    """Every pair of photographs, given who each [N] shows.

    If there are more than `most`, at most so many are drawn, always the same ones: all pairs of one
    person, or half of `most` if they are more, and of the others as many as that leaves room for.
    """
    people = np.asarray(people)
    if len(people) * (len(people) - 1) // 2 <= most:
        first, second = np.triu_indices(len(people), k=1)
        return Pairs(first, second, people[first] == people[second])
    rng = np.random.default_rng(0)
    same = _same_pairs(people, most // 2, rng)
    wanted = most - same.shape[1]
    drawn = np.sort(rng.integers(len(people), size=(2, wanted)), axis=0)
    drawn = np.unique(drawn[:, people[drawn[0]] != people[drawn[1]]], axis=1)
    first, second = np.concatenate([same, drawn], axis=1)
    return Pairs(first, second, people[first] == people[second])


def _same_pairs(people: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs [2, P] of one person: all of them, or about `most` that are drawn."""
    order = np.argsort(people, kind="stable")
    _, starts, sizes = np.unique(people[order], return_index=True, return_counts=True)
    counts = sizes * (sizes - 1) // 2
    ends = np.cumsum(counts)
    total = int(ends[-1])
    chosen = np.arange(total) if total <= most else np.unique(rng.integers(total, size=most))
    owner = np.searchsorted(ends, chosen, side="right")
    # A person's pairs in the order (0, 1), (0, 2), (1, 2), (0, 3), ...
    place = chosen - (ends - counts)[owner]
    larger = ((1 + np.sqrt(1 + 8 * place)) / 2).astype(np.int64)
    smaller = place - larger * (larger - 1) // 2
    pairs: np.ndarray = np.sort(order[starts[owner] + np.stack([smaller, larger])], axis=0)
    return pairs


class Identified(NamedTuple):
    """Whom each probe was taken for: `people` [N], and how alike the two are, `similarity` [N]."""

    people: np.ndarray
    similarity: np.ndarray


def identify(
    probes: np.ndarray, gallery: np.ndarray, people: np.ndarray, *, by: str = "each"
) -> Identified:
    """The most similar of the people enrolled.

    `probes` [N, features] and `gallery` [G, features] are of length 1, `people` [G] says whom the
    gallery shows. `by` "each" compares with every embedding of the gallery, "mean" with the mean of
    each person's, brought to length 1.

    Raises:
        ValueError: an empty gallery, or another `by`.
    """
    if not len(gallery):
        raise ValueError("identify: gallery: expected one embedding or more, got none")
    if by == "mean":
        gallery, people = person_means(gallery, people)
    elif by != "each":
        raise ValueError(f"identify: by: expected 'each' or 'mean', got {by!r}")
    best = np.empty(len(probes), np.int64)
    similarity = np.empty(len(probes), np.result_type(probes, gallery))
    rows = max(1, _CELLS // len(gallery))
    for start in range(0, len(probes), rows):
        part = slice(start, start + rows)
        cosines = probes[part] @ gallery.T
        best[part], similarity[part] = cosines.argmax(1), cosines.max(1)
    return Identified(np.asarray(people)[best], similarity)


def person_means(embeddings: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean embedding [K, features] of each person, of length 1, and who they are, [K]."""
    known, index = np.unique(people, return_inverse=True)
    sums = np.zeros((len(known), embeddings.shape[1]), embeddings.dtype)
    np.add.at(sums, index, embeddings)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.maximum(lengths, np.finfo(sums.dtype).tiny), known


def fold_accuracies(similarities: np.ndarray, same: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """LFW's measure: accuracy [K] of each fold, at the threshold that is best on all the others.

    `folds` [P] says which fold each pair is of. The paper reports their mean.
    Huang et al., "Labeled faces in the wild", 2007.

    Raises:
        ValueError: fewer than two folds.
    """
    similarities, same, folds = (np.asarray(each) for each in (similarities, same, folds))
    names = np.unique(folds)
    if len(names) < 2:
        raise ValueError(f"fold_accuracies: folds: expected two or more, got {len(names)}")
    found = []
    for name in names:
        held_out = folds == name
        threshold = best_threshold(similarities[~held_out], same[~held_out])
        found.append(((similarities[held_out] >= threshold) == same[held_out]).mean())
    return np.array(found)


def best_threshold(similarities: np.ndarray, same: np.ndarray) -> float:
    """The threshold that tells most pairs right; of several, the one between the widest gap.

    It lies halfway between two neighbouring similarities, or just beyond all of them.
    """
    ranked = np.sort(np.unique(similarities))
    middles = (ranked[1:] + ranked[:-1]) / 2
    candidates = np.concatenate([[ranked[0] - 1.0], middles, [ranked[-1] + 1.0]])
    alike = np.sort(similarities[same])
    unlike = np.sort(similarities[~same])
    right = len(alike) - np.searchsorted(alike, candidates) + np.searchsorted(unlike, candidates)
    best = np.flatnonzero(right == right.max())
    gaps = np.concatenate([[0.0], np.diff(ranked), [0.0]])
    return float(candidates[best[gaps[best].argmax()]])
