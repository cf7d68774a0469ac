"""Batches of items: the same whenever and however they are drawn, and without the bad ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from gdfast.data import Batch, DataError, Loader


class Noise:
    """Ten items of random numbers; some may be bad."""

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 10

    def item(self, index: int, epoch: int, rng: np.random.Generator) -> tuple[float, int]:
        if index in self.bad:
            raise DataError(f"data: item {index}: expected a good one, found a bad one")
        return rng.random() + epoch, index

    def collate(self, items: Sequence[tuple[float, int]]) -> Batch:
        values, indices = zip(*items, strict=True)
        return Batch(torch.tensor(values), torch.tensor(indices))


def flat(batches: Sequence[Batch]) -> list[tuple[float, int]]:
    return [
        pair for b in batches for pair in zip(b.images.tolist(), b.targets.tolist(), strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_the_same_whoever_reads_it(workers: int) -> None:
    whole = list(Loader(Noise(), 4, seed=3).epoch(5))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = list(Loader(Noise(), 4, seed=3, workers=workers).epoch(5))
    assert flat(again) == flat(whole) and [len(b.targets) for b in again] == [4, 4, 2]
    assert torch.equal(torch.get_rng_state(), before)  # the model's numbers are its own
    rest = list(Loader(Noise(), 4, seed=3, workers=workers).epoch(5, start=1))
    assert flat(rest) == flat(whole)[4:]


def test_items_change_with_the_epoch_and_the_seed() -> None:
    def values(seed: int, epoch: int) -> dict[int, float]:
        return {index: value - epoch for value, index in flat(list(
            Loader(Noise(), 10, seed=seed).epoch(epoch)))}  # fmt: skip

    first = values(0, 0)
    assert len(set(first.values())) == 10
    for other in (values(1, 0), values(0, 1)):
        assert all(other[index] != pytest.approx(first[index]) for index in first)


def test_ranks_share_every_batch() -> None:
    whole = [set(b.targets.tolist()) for b in Loader(Noise(), 6, seed=1).epoch()]
    shares = [list(Loader(Noise(), 6, seed=1, rank=r, ranks=2).epoch()) for r in (0, 1)]
    for batch, first, second in zip(whole, *shares, strict=True):
        one, two = set(first.targets.tolist()), set(second.targets.tolist())
        assert one | two == batch and not one & two


def test_a_last_batch_too_small_for_all_ranks_is_left_out() -> None:
    loaders = [Loader(Noise(), 3, seed=1, rank=rank, ranks=2) for rank in (0, 1)]
    assert [len(loader) for loader in loaders] == [3, 3]
    assert [len(list(loader.epoch())) for loader in loaders] == [3, 3]
    assert len(Loader(Noise(), 3)) == 4


def test_parts_make_up_the_batch() -> None:
    for batch, parts in zip(
        Loader(Noise(), 4, seed=2).epoch(), Loader(Noise(), 4, seed=2).steps(parts=3), strict=True
    ):
        assert flat(parts) == flat([batch]) and len(parts) <= 3


def test_bad_items_are_left_out_and_told_of() -> None:
    loader = Loader(Noise(bad=(2, 7)), 5, seed=0)
    assert sorted(index for _, index in flat(list(loader.epoch()))) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert sorted(loader.skipped) == [2, 7] and "item 2" in loader.skipped[2]
    list(loader.epoch(1))
    assert len(loader.skipped) == 2  # each counts once
    some = Loader(Noise(bad=(8, 9)), 4)  # the last batch has bad ones alone
    assert [len(batch.targets) for batch in some.epoch()] == [4, 4]
    assert [len(parts) for parts in Loader(Noise(bad=(0,)), 4, seed=1).steps(parts=4)] == [2, 2, 1]


@pytest.mark.parametrize("batch", [5, 8, 9])
def test_ranks_take_as_many_parts_each(batch: int) -> None:
    loaders = [Loader(Noise(), batch, seed=1, rank=rank, ranks=2) for rank in (0, 1)]
    counts = [[len(parts) for parts in loader.steps(parts=3)] for loader in loaders]
    assert counts[0] == counts[1]


def test_no_training_batch_has_a_single_item() -> None:
    assert [len(b.targets) for b in Loader(Noise(), 9, seed=1).epoch()] == [9]
    assert [len(b.targets) for b in Loader(Noise(), 9).epoch()] == [9, 1]
    assert len(Loader(Noise(), 1, seed=1)) == 10
