"""Who is on new photographs: `gdfast predict` with a face network and a gallery."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gdfast import face
from gdfast.train import plots, plots_face
from gdfast.train.errors import RunError, SettingsError

_SHOWN = 4


class FacePredictor:
    """A face network and a gallery, asked for one image at a time."""

    def __init__(
        self,
        model: nn.Module,
        metadata: Mapping[str, str],
        *,
        gallery: str = "",
        threshold: float | None = None,
        **others: Any,
    ) -> None:
        """`gallery` is a folder with a folder for each person, or a file of enrolled people.

        Raises:
            RunError: metadata that is not a face network's.
            SettingsError: no gallery, or an unknown option.
            DataError: a gallery that cannot be read, or of another network.
        """
        if others:
            raise SettingsError(
                f"predict: {min(others)}: expected gallery or threshold for faces, got this"
            )
        if not gallery:
            raise SettingsError(
                "predict: gallery: expected a folder with a folder for each person, or a file of "
                "enrolled people, got none"
            )
        try:
            self.recogniser = face.Recogniser.of(model, metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"predict: expected weights of a face network, found: {error}") from None
        self.threshold = self.recogniser.threshold if threshold is None else threshold
        if Path(gallery).is_dir():
            self.gallery = face.Gallery.enrol(self.recogniser, gallery)
        else:
            self.gallery = face.Gallery.load(gallery)
            self.gallery.check(self.recogniser)

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """The name, "unknown" if nobody is as alike as the threshold, and the nearest people."""
        nearest = face.identify(self.recogniser, image, self.gallery, most=_SHOWN, threshold=-1.0)
        best = nearest[0]
        known = best.similarity >= self.threshold
        words = f"{best.name} ({best.similarity:.3f})"
        return {
            "name": best.name if known else face.UNKNOWN,
            "similarity": best.similarity,
            "threshold": self.threshold,
            "nearest": [each._asdict() for each in nearest],
            "summary": words if known else f"{face.UNKNOWN} (nearest: {words})",
        }

    def draw(self, image: np.ndarray, answer: dict[str, Any]) -> bytes:
        """The image beside a photograph of each of the nearest people."""
        nearest = [(each["name"], each["similarity"]) for each in answer["nearest"]]
        faces = [self.gallery.read(each["photo"]) for each in answer["nearest"]]
        title = answer["summary"]
        return plots.png(plots_face.named(image, nearest, faces, answer["threshold"], title))
