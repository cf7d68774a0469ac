"""Pictures: what is written on them."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'gdfast[train]'")

from gdfast.train import plots


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2e-3, 9.0], ["0.01", "0.1", "1", "10"]), ([0.4, 2.3], ["0.5", "1", "2"])],
)
def test_logarithmic_axes_are_labelled_with_numbers(
    values: list[float], expected: list[str]
) -> None:
    figure = plots._figure(6, 4)
    axes = figure.subplots()
    axes.plot(values)
    axes.set_yscale("log")
    axes.set_title("from $5 to $6")
    assert plots.png(figure).startswith(b"\x89PNG")
    labels = axes.get_yticklabels() + axes.get_yticklabels(minor=True)
    low, high = axes.get_ylim()
    shown = [t.get_text() for t in labels if low <= t.get_position()[1] <= high and t.get_text()]
    assert sorted(shown, key=float) == expected
    assert axes.title.get_parse_math() is False
