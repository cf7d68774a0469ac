"""Checkpoints: everything that is needed to go on, in one file."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gdfast.train.errors import RunError

NAME = "checkpoint.pt"
_KIND = "gdfast checkpoint"
_FORMAT = f"{_KIND} 2"
_CHECKSUM = "archive/sha256"


def to_bytes(content: dict[str, Any]) -> bytes:
    """A checkpoint's file: `content` is tensors and plain values."""
    # In memory: torch's own writer reports a full disk as a RuntimeError about positions.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(_CHECKSUM, _checksum(archive))
    return buffer.getvalue()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are unpickled.

    Raises:
        RunError: no such file, or not a whole checkpoint of this package.
    """
    try:
        _verify(path)
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
    if not isinstance(content, dict) or not str(content.get("format")).startswith(_KIND):
        raise RunError(f"train: {path}: expected a checkpoint of gdfast train, found another file")
    if content["format"] != _FORMAT:
        raise RunError(
            f"train: {path}: expected {_FORMAT}, found {content['format']}: another version of "
            "gdfast wrote it; its weights.safetensors can be used still"
        )
    return content


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip file whose records unpack to more than they take.

    torch stores its records uncompressed: such a file is none of torch's.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(record.file_size > record.compress_size for record in archive.infolist()):
                raise ValueError("compressed records")


def _verify(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        refuse_compressed(path)
        if _CHECKSUM not in archive.namelist():
            return  # no checkpoint of ours, or none of this version: the content will tell
        if archive.read(_CHECKSUM) != _checksum(archive):
            raise ValueError("its checksum is another")


def _checksum(archive: zipfile.ZipFile) -> bytes:
    """SHA-256 over the names and the contents of a file's records."""
    digest = hashlib.sha256()
    for name in sorted(archive.namelist()):
        if name != _CHECKSUM:
            digest.update(f"{name} {archive.getinfo(name).file_size} ".encode())
            with archive.open(name) as record:
                while piece := record.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest().encode()
