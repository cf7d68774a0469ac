"""Image files to arrays, with a bound on what a file may ask for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from gdfast.data.errors import DataError
from gdfast.extras import require

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm", ".webp", ".tif", ".tiff", ".gif")
# 100 million pixels are 300 MB as RGB: no photograph of a data set is larger, and a file of a few
# kilobytes can claim far more.
MAX_PIXELS = 100_000_000
_FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}


def read(path: Path, mode: str = "RGB") -> np.ndarray:
    """Decode an image file as bytes [H, W, 3] (`mode` "RGB") or [H, W, 1] ("L"), turned upright.

    Raises:
        DataError: missing, empty, truncated, damaged, no image, or of more than `MAX_PIXELS`.
        MissingExtraError: Pillow is not installed.
    """
    with _opened(path) as image:
        ops = require("PIL.ImageOps", "train", "reading image files")
        try:
            upright = ops.exif_transpose(image)
            pixels = np.asarray(_eight_bits(upright, mode))
        except Exception as error:
            # Pillow's decoders raise what they stumble over: OSError, SyntaxError, struct.error.
            raise DataError(
                f"data: {path}: expected a whole image, found a damaged or truncated file "
                f"({_reason(error)})"
            ) from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def kind(path: Path) -> str:
    """The format of an image file, by its content: "JPEG", "PNG", ...; raises DataError."""
    with _opened(path) as image:
        return "JPEG" if image.format == "MPO" else str(image.format)


def suffixes(path: Path) -> tuple[str, ...]:
    """The endings that a file's name may have for what is in it; raises DataError."""
    return _FORMATS[kind(path)]


def size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, upright, from its header alone.

    Raises:
        DataError: missing, empty, no image, or of more than `MAX_PIXELS`.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = False
        try:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception:  # damaged EXIF data: Pillow then shows the image as it lies
            turned = False
    return (width, height) if turned else (height, width)


def _opened(path: Path) -> Any:
    pillow = require("PIL.Image", "train", "reading image files")
    try:
        if not path.is_file():
            found = "something else" if path.exists() else "no such file"
            raise DataError(f"data: {path}: expected an image file, found {found}")
        if path.stat().st_size == 0:
            raise DataError(f"data: {path}: expected an image, found an empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own, looser bound
            image = pillow.open(path, formats=tuple(_FORMATS))
    except DataError:
        raise
    except Exception as error:
        reason = _reason(error)
        raise DataError(f"data: {path}: expected an image, found another file ({reason})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise DataError(
            f"data: {path}: expected at most {MAX_PIXELS:,} pixels, found a header that claims "
            f"{width:,} x {height:,}"
        )
    return image


def _eight_bits(image: Any, mode: str) -> Any:
    if image.mode.startswith(("I;16", "I")):  # 16 bits: Pillow would clip them at 255
        values = np.asarray(image).astype(np.float64)
        image = require("PIL.Image", "train", "reading image files").fromarray(
            (values.clip(0, 65535) / 257).round().astype(np.uint8)
        )
    if image.mode in ("P", "LA", "PA", "RGBA"):
        # Where the image is transparent its colour is arbitrary: show it on white.
        image = image.convert("RGBA")
        ground = require("PIL.Image", "train", "reading image files").new(
            "RGBA", image.size, "white"
        )
        ground.alpha_composite(image)
        image = ground
    return image.convert(mode)


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:80]
