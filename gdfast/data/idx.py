"""Reader for the idx format of MNIST (http://yann.lecun.com/exdb/mnist/), plain or gzip.

A file is: two zero bytes, a type byte (8 = unsigned byte), a byte with the number of dimensions,
each dimension as a big-endian 32-bit integer, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from gdfast.data.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 8
# DEFLATE shrinks by at most 1032:1, so a header that claims more than that is lying.
_MAX_GZIP_RATIO = 1032
_MAX_BYTES = 1 << 30
_CHUNK = 1 << 20


def read(path: Path, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes with `ndim` dimensions.

    Memory is bounded by what the file really holds: the size that the header claims is checked
    before anything is allocated, and compressed data is read in pieces up to that size.

    Raises:
        DataError: not a readable idx file, another type or number of dimensions, or a length that
            differs from what the header says.
    """
    try:
        if not path.is_file():
            raise DataError(f"data: {path}: expected a file, found a folder or a device")
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            # GzipFile is file-like enough, but no IO[bytes] to a type checker.
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if zipped else raw
            return _parse(path, stream, ndim, zipped)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"data: {path}: expected a whole gzip file, found a truncated or damaged one ({error})"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"data: {path}: expected a readable file, found: {reason}") from None


def _parse(path: Path, stream: IO[bytes], ndim: int, zipped: bool) -> np.ndarray:
    magic = _header(path, stream, 4)
    if magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE or magic[3] != ndim:
        raise DataError(f"data: {path}: expected {_kind(ndim)}, found {_describe(magic)}")
    shape = struct.unpack(f">{ndim}I", _header(path, stream, 4 * ndim))
    size = math.prod(shape)
    claim = f"{' x '.join(map(str, shape))} = {size:,} bytes"
    if size == 0:
        raise DataError(f"data: {path}: expected at least one item, found dimensions {claim}")
    on_disk = path.stat().st_size
    room = on_disk * _MAX_GZIP_RATIO if zipped else on_disk - 4 - 4 * ndim
    if size > _MAX_BYTES:
        raise DataError(
            f"data: {path}: expected at most {_MAX_BYTES:,} bytes of values, found a header that "
            f"claims {claim}"
        )
    if size > room:
        raise DataError(
            f"data: {path}: expected {claim} as the header says, found a file of {on_disk:,} bytes"
        )

    content = bytearray()
    while len(content) < size:
        piece = stream.read(min(_CHUNK, size - len(content)))
        if not piece:
            raise DataError(
                f"data: {path}: expected {claim} as the header says, found {len(content):,}: "
                "the file is truncated"
            )
        content += piece
    if stream.read(1):
        raise DataError(f"data: {path}: expected {claim} as the header says, found more")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _header(path: Path, stream: IO[bytes], size: int) -> bytes:
    header = stream.read(size)
    if len(header) < size:
        raise DataError(f"data: {path}: expected an idx header, found the end of the file")
    return header


def _kind(ndim: int) -> str:
    number = (_UNSIGNED_BYTE << 8) | ndim
    names = {1: "labels", 3: "images"}
    return f"an idx file of {names.get(ndim, f'{ndim}-dimensional bytes')} (magic {number})"


def _describe(magic: bytes) -> str:
    if magic[:2] == b"\0\0" and magic[2] == _UNSIGNED_BYTE and magic[3] in (1, 3):
        return f"{_kind(magic[3])}: are images and labels swapped?"
    return f"magic {int.from_bytes(magic, 'big')}"
