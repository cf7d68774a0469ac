"""Models by name."""

from __future__ import annotations

import pytest
import torch

import gdfast
from gdfast import models, nn


@pytest.mark.parametrize("name", models.names())
def test_every_model_trains_on_our_layers(name: str) -> None:
    model = models.create(name)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions and all(type(m) is nn.Conv2d for m in convolutions)
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_cnn_is_the_article_s() -> None:
    class Article(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(1, 32, 3)
            self.fc = torch.nn.Linear(32 * 13 * 13, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.conv1(x))
            x = torch.nn.functional.max_pool2d(x, 2)
            return self.fc(x.view(x.size(0), -1))

    torch.manual_seed(3)
    theirs = Article()
    torch.manual_seed(3)
    ours = models.create("cnn")
    # The same draws in the same order, so one seed starts both at the same weights.
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    images = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(ours(images), theirs(images))
    gdfast.restore_(ours)
    assert torch.equal(ours(images), theirs(images))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*cnn.*got 'cnm'"):
        models.create("cnm")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'cnn', which is taken"):
        models.register("cnn")(models.SimpleCNN)
