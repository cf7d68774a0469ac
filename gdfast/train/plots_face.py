"""The pictures of face recognition: ROC, similarities, pairs and probes that were misjudged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdfast.data.faces import FaceSet
from gdfast.metrics.verification import FAR, Identified, Pairs, Roc
from gdfast.train.plots import _figure as new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SAME, _DIFFERENT = "tab:blue", "tab:orange"
_SHOWN = 12


def roc(curve: Roc, title: str) -> Figure:
    """True against false acceptance, the latter on a log scale: security asks for its low end."""
    figure = new_figure(6.5, 5)
    axes = figure.subplots()
    least = float(curve.far[curve.far > 0].min())
    axes.step(np.maximum(curve.far, least / 2), curve.tar, where="post", color=_SAME)
    axes.axvline(FAR, color="0.6", linewidth=0.8)
    if least <= FAR:
        axes.plot(FAR, curve.tar_at(), "o", color=_SAME)
        axes.annotate(f" TAR {curve.tar_at():.3f} at FAR {FAR:g}", (FAR, curve.tar_at()), va="top")
    chance = np.geomspace(least, 1, 100)
    axes.plot(chance, chance, color="0.6", linestyle=":", label="chance")
    axes.axline((0, 1), slope=0, color="0.9", linewidth=0.8)
    axes.plot(curve.eer, 1 - curve.eer, "s", color=_DIFFERENT, label=f"EER {curve.eer:.3f}")
    axes.set_xscale("log")
    axes.set_xlim(least / 2, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("false acceptance rate (log scale)")
    axes.set_ylabel("true acceptance rate")
    axes.set_title(f"{title}\nAUC {curve.auc:.4f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def similarities(values: np.ndarray, same: np.ndarray, threshold: float, title: str) -> Figure:
    """How alike pairs of one person and of two are: [P] similarities, [P] bool."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    bins = np.linspace(values.min(), values.max(), 60).tolist()
    for kind, colour, label in ((~same, _DIFFERENT, "two people"), (same, _SAME, "one person")):
        axes.hist(
            values[kind],
            bins=bins,
            weights=np.full(int(kind.sum()), 1 / kind.sum()),
            color=colour,
            alpha=0.6,
            label=f"{label}: {int(kind.sum()):,} pairs",
        )
    if np.isfinite(threshold):
        axes.axvline(threshold, color="0.3", label=f"threshold at FAR {FAR:g}: {threshold:.3f}")
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("share of the pairs")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def worst_pairs(photos: FaceSet, pairs: Pairs, values: np.ndarray, title: str) -> Figure:
    """The pairs of one person that are least alike, and the pairs of two that are most alike."""
    figure = new_figure(11, 7.6)
    figure.suptitle(f"{title}: hardest pairs")
    halves: Any = figure.subfigures(2, 1)
    for half, same in zip(halves, (True, False), strict=True):
        kind = np.flatnonzero(pairs.same == same)
        order = kind[np.argsort(values[kind] if same else -values[kind], kind="stable")][:_SHOWN]
        half.suptitle(
            "one person, least alike first" if same else "two people, most alike first",
            color=_SAME if same else _DIFFERENT,
        )
        for place, index in zip(half.subplots(2, _SHOWN // 2).flat, order, strict=False):
            first, second = int(pairs.first[index]), int(pairs.second[index])
            side_by_side = np.concatenate([photos.images[first], photos.images[second]], axis=1)
            names = f"{photos.names[first]} - {photos.names[second]}"
            _show(place, side_by_side, f"{values[index]:.3f}\n{names}")
        for place in half.axes:
            place.axis("off")
    return figure


def mistaken(
    gallery: FaceSet, probes: FaceSet, found: Identified, names: tuple[str, ...], title: str
) -> Figure:
    """Probes taken for somebody else, most certain first: probe, who it is, who it was taken for.

    `names` are those of the people that the sets count.
    """
    wrong = np.flatnonzero(found.people != probes.people)
    shown = wrong[np.argsort(-found.similarity[wrong], kind="stable")][:_SHOWN]
    columns = 4
    rows = max(1, -(-len(shown) // columns))
    figure = new_figure(11, 0.8 + 2.2 * rows)
    figure.suptitle(
        f"{title}: {len(wrong):,} of {len(probes):,} probes taken for somebody else\n"
        "each: the probe, whom it shows, whom it was taken for"
    )
    for place, index in zip(figure.subplots(rows, columns).flat, shown, strict=False):
        true, taken = int(probes.people[index]), int(found.people[index])
        three = [probes.images[index], *(_example(gallery, person) for person in (true, taken))]
        words = f"{names[true]} taken for {names[taken]}, {found.similarity[index]:.3f}"
        _show(place, np.concatenate(three, axis=1), f"{words}\n{probes.names[index]}")
    for place in figure.axes:
        place.axis("off")
    return figure


def named(
    image: np.ndarray,
    nearest: Sequence[tuple[str, float]],
    faces: Sequence[np.ndarray | None],
    threshold: float,
    title: str,
) -> Figure:
    """A face beside those of the people nearest to it: names with similarities, and a photograph
    of each where there is one."""
    columns = 1 + len(nearest)
    figure = new_figure(2.2 * columns, 3.2)
    figure.suptitle(title)
    places = figure.subplots(1, columns)
    _show(places[0], image, "the face")
    for place, (name, similarity), shown in zip(places[1:], nearest, faces, strict=True):
        words = f"{name}\n{similarity:.3f}"
        if shown is not None:
            _show(place, shown, words)
        else:
            place.set_title(words, fontsize=7)
        colour = _SAME if similarity >= threshold else "0.6"
        place.title.set_color(colour)
    for place in places:
        place.axis("off")
    return figure


def _example(gallery: FaceSet, person: int) -> np.ndarray:
    """A photograph of the person; a grey square where the gallery has none."""
    own = np.flatnonzero(gallery.people == person)
    return gallery.images[own[0]] if len(own) else np.full_like(gallery.images[0], 128)


def _show(axes: Axes, image: np.ndarray, words: str) -> None:
    axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
    axes.set_title(words, fontsize=7)
