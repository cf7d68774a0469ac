"""Recipes and settings: the learning rate of each step, and values that no training can have."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from gdfast.train import TASKS, Recipe, Settings, SettingsError, train


class TestRecipe:
    def test_default_and_article(self) -> None:
        recipes = TASKS["cnn"].recipes
        default, article = recipes["default"], recipes["article"]
        assert (default.lr, default.momentum, default.schedule) == (0.1, 0.9, "cosine")
        assert (article.lr, article.momentum, article.schedule) == (0.01, 0.0, "constant")
        assert {article.learning_rate(step, 500) for step in range(500)} == {0.01}

    def test_learning_rate_rises_then_follows_the_cosine(self) -> None:
        rates = [Recipe(lr=0.5, warmup=10).learning_rate(step, 110) for step in range(110)]
        assert rates[0] == pytest.approx(0.5 / 11) and rates[10] == max(rates) == 0.5
        assert rates[60] == pytest.approx(0.25) and rates[109] < 0.001
        assert all(a < b for a, b in pairwise(rates[:11]))
        assert all(a > b for a, b in pairwise(rates[10:]))
        # A short run still reaches its peak.
        assert max(Recipe(lr=0.5).learning_rate(step, 6) for step in range(6)) == 0.5

    @pytest.mark.parametrize(
        ("name", "values"),
        {
            "lr": [0.0, -1.0, float("nan"), float("inf")],
            "momentum": [-0.1, 1.0, float("nan")],
            "schedule": ["", "linear"],
            "warmup": [-1],
            "batch_size": [0, -3],
            "epochs": [0, -1],
        }.items(),
    )
    def test_refuses_what_no_training_can_have(self, name: str, values: list[Any]) -> None:
        for value in values:
            with pytest.raises(SettingsError, match=f"train: {name}: expected .*, got"):
                Recipe(**{name: value})

    @pytest.mark.parametrize("seed", [-1, 1 << 63])
    def test_refuses_seeds_out_of_range(self, seed: int) -> None:
        with pytest.raises(SettingsError, match="seed: expected 0 to"):
            Settings(seed=seed)

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
    def test_refuses_a_device_that_is_not_here(self, device: str) -> None:
        with pytest.raises(SettingsError, match="device: expected auto, cpu, or"):
            train(Settings(device=device))
