"""Files of tensors, in the format of safetensors: nothing in them is run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gdfast.extras import require

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "sha256"
"""Where the metadata has the checksum, in files that gdfast wrote."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata.

    Raises:
        ValueError: a damaged file or no such one, or another checksum; says what was found.
        MissingExtraError: safetensors is not installed.
    """
    library = require("safetensors", "train", "reading weights")
    try:
        with library.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # its own exception has no base class to name
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"another or a damaged file ({reason})") from None
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors):
        raise ValueError("tensors that do not match the checksum in the metadata")
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of contiguous tensors on the CPU."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
