"""What settings mean on this machine: the device, the backend, and where files lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gdfast import backends
from gdfast.data.problems import absolute
from gdfast.train import distributed
from gdfast.train.errors import SettingsError
from gdfast.train.recipe import Settings
from gdfast.train.tasks import settle


def settle_here(settings: Settings) -> Settings:
    """Settings with nothing left open but the epochs: they mean the same in every continuation."""
    settings = settle(settings)
    try:
        backend = backends.chosen(settings.backend)
    except ValueError as error:
        raise SettingsError(f"train: {error}") from None
    for each in backends.available():
        if each.name == backend and not each.ok:
            raise SettingsError(f"train: backend: {backend!r} cannot be used here: {each.reason}")
    options = settings.options
    if options.get("weights"):
        options = {**options, "weights": str(Path(options["weights"]).absolute())}
    return replace(
        settings,
        data=absolute(settings.data),
        device=str(find_device(settings.device)),
        backend=backend,
        options=options,
    )


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        SettingsError: a device that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(torch.device(name))
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"train: device: expected auto, cpu, or a device that is here, got {name!r}: {reason}"
        ) from None
    return device
