"""Batches drawn from a source of items, so that any of them can be had again bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gdfast.data.errors import DataError

_SPREAD = 1_000_003  # of seeds, so that those of neighbouring epochs lie apart


class Batch(NamedTuple):
    """`images` [N, C, H, W] as float32 in 0 to 1, and what they show: `targets`."""

    images: Tensor
    targets: Any


@runtime_checkable
class Source(Protocol):
    """Items to train on or to test with, and how they become a batch."""

    def __len__(self) -> int: ...

    def item(self, index: int, epoch: int, rng: np.random.Generator) -> Any:
        """Item `index` as `epoch` (from 0) shows it; all that is random in it comes from `rng`.

        Raises:
            DataError: the item is bad: it is left out.
        """

    def collate(self, items: Sequence[Any]) -> Batch:
        """One batch of one or more items."""


@runtime_checkable
class Table(Protocol):
    """A source that holds everything in memory and has nothing random: whole batches at once."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Batch:
        """The items of these indices [N]."""


class Loader:
    """Batches of a source, shuffled anew for every epoch.

    The order of an epoch depends on `seed` and the epoch's number alone, and an item's random
    numbers on those and its index: any batch of any epoch can be had again, whatever the number of
    `workers`, and an interrupted run goes on exactly where it stopped. The last batch may be
    smaller. Of `ranks` processes, each takes every `ranks`-th item of each batch. In training (with
    a seed) a last batch with less than two items for each of them is left out: batch normalisation
    cannot take a single one.
    """

    def __init__(
        self,
        source: Source | Table,
        batch_size: int,
        *,
        seed: int | None = None,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """`batch_size` counts the items of all processes; `seed` None keeps them in order."""
        self.source = source
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.skipped: dict[int, str] = {}
        self._seed = seed
        self._workers = workers
        self._rank = rank
        self._ranks = ranks
        # The least items that a batch, or a part of one, must have.
        self._least = ranks if seed is None or batch_size < 2 * ranks else 2 * ranks

    def __len__(self) -> int:
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole + (rest >= self._least)

    @property
    def images(self) -> int:
        """How many images one epoch shows, in all processes together."""
        return len(self.source)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0), from batch `start` on.

        A bad item is left out, and the message about it kept in `skipped`, by the item's index.
        """
        for batches in self.steps(number, start):
            yield from batches

    def steps(self, number: int = 0, start: int = 0, parts: int = 1) -> Iterator[list[Batch]]:
        """Like `epoch`, each batch cut into at most `parts` of about one size.

        All processes get the same number of parts, but for those with bad items alone.
        """
        batches = [
            [
                part[self._rank :: self._ranks].tolist()
                for part in batch.tensor_split(max(1, min(parts, len(batch) // self._least)))
            ]
            for batch in self._order(number).split(self.batch_size)[start : len(self)]
        ]
        read = self._table if isinstance(self.source, Table) else self._items
        each_part = read(number, [part for batch in batches for part in batch])
        for batch in batches:
            read_parts = [next(each_part) for _ in batch]
            yield [part for part in read_parts if part is not None]

    def _table(self, epoch: int, parts: list[list[int]]) -> Iterator[Batch | None]:
        assert isinstance(self.source, Table)
        for part in parts:
            yield _to(self.source.take(torch.tensor(part)), self.device)

    def _items(self, epoch: int, parts: list[list[int]]) -> Iterator[Batch | None]:
        assert isinstance(self.source, Source)
        loader = DataLoader(
            _Items(self.source),
            batch_sampler=[[(self._seed or 0, epoch, index) for index in part] for part in parts],
            num_workers=self._workers,
            collate_fn=_as_they_are,
            # Its own generator: starting workers draws a number, which must not be the model's.
            generator=torch.Generator(),
        )
        for items in loader:
            self.skipped.update({item.place: item.reason for item in items if _is_bad(item)})
            good = [item for item in items if not _is_bad(item)]
            yield _to(self.source.collate(good), self.device) if good else None

    def _order(self, epoch: int) -> Tensor:
        if self._seed is None:
            return torch.arange(len(self.source))
        # An own generator: the order does not depend on what else draws random numbers.
        seed = (self._seed * _SPREAD + epoch) % (1 << 63)
        return torch.randperm(len(self.source), generator=torch.Generator().manual_seed(seed))


class _Bad(NamedTuple):
    place: int
    reason: str


def _is_bad(item: Any) -> bool:
    return isinstance(item, _Bad)


class _Items(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        seed, epoch, index = key
        try:
            return self._source.item(index, epoch, np.random.default_rng((seed, epoch, index)))
        except DataError as error:
            return _Bad(index, str(error))


def _as_they_are(items: list[Any]) -> list[Any]:
    return items


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Batch):
        return Batch(_to(value.images, device), _to(value.targets, device))
    if isinstance(value, (list, tuple)):
        return [_to(each, device) for each in value]
    return value
