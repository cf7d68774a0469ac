"""Several processes that train one model, each with its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from gdfast.train.errors import SettingsError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Group:
    """This process among those that train together: number `rank` of `ranks`, from 0."""

    rank: int = 0
    ranks: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over all processes."""
        if self.ranks == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.tolist()

    def from_leader(self, value: Any) -> Any:
        """The leader's value, in every process."""
        if self.ranks == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model, with gradients averaged over all processes.

        On GPUs batch normalisation takes its statistics from all processes too; on the CPU, where
        PyTorch has no such layer, each process has its own.
        """
        if self.ranks == 1:
            return model
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
        return nn.parallel.DistributedDataParallel(model)


def launched() -> bool:
    """Whether torchrun, or something like it, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of GPUs, each process on a machine takes one."""
    if device.type == "cuda" and device.index is None and launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def group(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started, for as long as the training takes.

    Raises:
        SettingsError: some of torchrun's variables are missing.
    """
    if not launched():
        yield Group()
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise SettingsError(
            f"train: WORLD_SIZE: expected {', '.join(missing)} beside it: start several processes "
            "by torchrun --nproc-per-node N -m gdfast train ..."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Plain numbers go over gloo, whatever the gradients take.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
