"""Checkpoints: everything that is needed to go on, in one file."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gdfast.train.errors import RunError

NAME = "checkpoint.pt"
_FORMAT = "gdfast checkpoint 1"


def to_bytes(content: dict[str, Any]) -> bytes:
    """A checkpoint's file: `content` is tensors and plain values."""
    # In memory: torch's own writer reports a full disk as a RuntimeError about positions.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, buffer)
    return buffer.getvalue()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are unpickled.

    Raises:
        RunError: no such file, or not a whole checkpoint of this package.
    """
    try:
        _refuse_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"train: {path}: expected a checkpoint, found no such file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"train: {path}: expected a checkpoint, found: {reason}") from None
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"train: {path}: expected a checkpoint, found a damaged or foreign file ({reason[:80]})"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise RunError(f"train: {path}: expected a checkpoint of gdfast train, found another file")
    return content


def _refuse_bomb(path: Path) -> None:
    # torch stores its records uncompressed; one that would unpack to more is not torch's.
    with zipfile.ZipFile(path) as archive:
        if any(record.file_size > record.compress_size for record in archive.infolist()):
            raise ValueError("compressed records")
