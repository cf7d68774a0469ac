"""What tests of training runs share: one thread, no pictures, no words."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gdfast.train import Result, Settings, train
from gdfast.train.folder import RunFolder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as the subprocesses have, so that sums are rounded in the same way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these trainings; fixtures of a whole module do draw."""
    monkeypatch.setattr(RunFolder, "write_figure", lambda self, name, figure: self.write(name, b""))


def quiet(settings: Settings, out: Path) -> Result:
    return train(settings, out=out, stream=io.StringIO())
