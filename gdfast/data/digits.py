"""The handwritten digits that scikit-learn ships: real data with no download."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from gdfast.data.images import ImageData, ImageSet
from gdfast.extras import require

SIZE = 28
_LEVELS = 16  # scikit-learn's pixels count inked dots of a 4x4 cell: 0 to 16.


def load() -> ImageData:
    """1,797 digits (https://archive.ics.uci.edu/dataset/80) scaled from 8x8 to 28x28, bilinear.

    Every fifth image of each class is for testing: a stratified 80/20 split that never changes.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "train", "--data digits").load_digits()
    small = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None]
    large = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images = (large * (255 / _LEVELS)).round().to(torch.uint8)
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))

    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        of_class = (labels == label).nonzero().flatten()
        test[of_class[2::5]] = True
    return ImageData(
        name="digits",
        train=ImageSet(images[~test], labels[~test]),
        test=ImageSet(images[test], labels[test]),
        classes=tuple(str(digit) for digit in range(10)),
        epochs=20,
    )
