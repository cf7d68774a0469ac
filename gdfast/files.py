"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TEMP_PREFIX = ".gdfast-"


def write_atomic(
    path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], object]
) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    `content` is the bytes themselves, or a function that writes them to the binary file it is
    given. The bytes go to a temporary file in the same folder, reach the disk, and are renamed.

    Raises:
        OSError: the folder is missing or read-only, the disk is full, ...; the target is untouched.
    """
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=_TEMP_PREFIX, suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; give the mode that open() would have given.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            # Of the same kind, but naming the file that was wanted (a full disk names none).
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    for leftover in Path(folder).glob(f"{_TEMP_PREFIX}*.tmp"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
