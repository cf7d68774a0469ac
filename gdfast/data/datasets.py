"""Data sets for torch's DataLoader, under the names and signatures that torchvision users know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from gdfast.data import mnist
from gdfast.extras import require


class MNIST(Dataset[tuple[Any, Any]]):
    """MNIST's 60,000 training images, or its 10,000 test images with `train=False`.

    The files lie in `root` or in `root/MNIST/raw`, where torchvision keeps them and
    `download` puts them. An item is a Pillow image (28x28, mode "L") and its label, each through
    its transform. `data` [N, 28, 28] uint8 and `targets` [N] int64 hold everything.

    Raises:
        DataError: files that are missing (and `download` is False), damaged or mixed up.
    """

    classes = tuple(str(digit) for digit in range(mnist.CLASSES))

    def __init__(
        self,
        root: str | Path,
        train: bool = True,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        self.root = Path(root).expanduser()
        self.train = train
        self.transform = transform
        self.target_transform = target_transform
        split = mnist.TRAIN if train else mnist.TEST
        if download:
            mnist.fetch(self.root, split, into="MNIST/raw")
        pair = mnist.read_pair(self.root, split)
        self.data = pair.images[:, 0]
        self.targets = pair.labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = self.data[index].numpy()
        target: Any = int(self.targets[index])
        if not getattr(self.transform, "takes_arrays", False):
            image = require("PIL.Image", "train", "MNIST without ToTensor").fromarray(image)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target
