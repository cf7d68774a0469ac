"""Augmentations: each keeps the kind of image and draws from its generator alone."""

from __future__ import annotations

import numpy as np
import pytest

from gdfast.data import DataError, ImageSet, augment
from gdfast.data.classified import Classified, Shape

ALL = {**augment.BY_NAME, "resized crop": augment.RandomResizedCrop((24, 18))}


def image(channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 18, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_keeps_the_kind_of_image(name: str, channels: int) -> None:
    original = image(channels)
    kept = original.copy()
    results = [ALL[name](original, np.random.default_rng(seed)) for seed in range(12)]
    assert all(each.shape == original.shape and each.dtype == np.uint8 for each in results)
    assert np.array_equal(original, kept)
    again = ALL[name](original, np.random.default_rng(3))
    assert np.array_equal(again, results[3])
    assert len({each.tobytes() for each in results}) > 1


def test_flip_mirrors() -> None:
    assert np.array_equal(
        augment.RandomFlip(1.0)(image(), np.random.default_rng()), image()[:, ::-1]
    )


def test_affine_without_room_is_the_image() -> None:
    same = augment.RandomAffine(0, 0, 0, 0)(image(), np.random.default_rng(0))
    assert np.array_equal(same, image())


def test_affine_moves_what_it_shows() -> None:
    dot = np.zeros((31, 31, 1), np.uint8)
    dot[14:17, 14:17] = 255
    places = set()
    for seed in range(30):
        moved = augment.RandomAffine(0, 0.2, 0, 0)(dot, np.random.default_rng(seed))
        weights = moved[:, :, 0].astype(float)
        centre = (weights.sum(1) @ np.arange(31)) / weights.sum()
        assert abs(weights.sum() - 9 * 255) < 30  # nothing of it is lost
        assert abs(centre - 15) <= 0.2 * 31 + 0.1
        places.add(round(centre))
    assert len(places) > 5


def test_erase_paints_the_mean() -> None:
    erased = augment.RandomErase(p=1.0)(image(), np.random.default_rng(1))
    changed = (erased != image()).any(2)
    assert 0.01 < changed.mean() < 0.3
    assert np.unique(erased[changed], axis=0).shape[0] == 1


def test_names_are_parsed() -> None:
    changes, mixup = augment.parse("flip,mixup,jitter")
    assert changes == [augment.RandomFlip(), augment.ColourJitter()] and mixup
    assert augment.parse("none") == ([], False) == augment.parse("")
    with pytest.raises(DataError, match=r"expected names of affine, .*, got 'spin'"):
        augment.parse("flip,spin")


def test_mixup_mixes_images_as_it_mixes_labels() -> None:
    import torch

    values = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    source = Classified(ImageSet(values, torch.tensor([0, 1])), Shape(1, (4, 4)), mixup=True,
                        classes=2)  # fmt: skip
    items = [source.item(n % 2, 0, np.random.default_rng(n)) for n in range(40)]
    batch = source.collate(items)
    assert batch.targets.shape == (40, 2)
    assert torch.allclose(batch.targets.sum(1), torch.ones(40))
    shown = batch.images.amax((1, 2, 3)) * 255 / 200
    assert torch.allclose(shown, batch.targets[:, 1], atol=0.01)
    assert 0 < ((shown > 0.01) & (shown < 0.99)).sum() < 40
