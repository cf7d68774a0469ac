"""Telling faces apart with a trained network: compare two, enrol a gallery, find who it is.

    recogniser = face.load("runs/face-1")
    face.compare(recogniser, "a.jpg", "b.jpg")            # similarity, -1 to 1
    gallery = face.Gallery.enrol(recogniser, "people")    # a folder per person
    gallery.save("people.safetensors")
    face.identify(recogniser, "who.jpg", gallery)         # [("ann", 0.81), ("bob", 0.33), ...]

Photographs are used as they are: crop them to the face beforehand, as those of the training were.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gdfast import models, tensor_files
from gdfast.data import decode
from gdfast.data.errors import DataError
from gdfast.data.faces import fit, person_folders
from gdfast.data.problems import DEFAULT_SHARE, Problems
from gdfast.extras import require
from gdfast.files import write_atomic

UNKNOWN = "unknown"
_BATCH = 100
_FORMAT = "gdfast face gallery 1"
_MOST_BYTES = 1 << 30  # of a gallery's file, or of weights: far more than either needs

Image = str | os.PathLike[str] | np.ndarray
"""A file, or bytes [H, W], [H, W, 1] or [H, W, 3]."""


@dataclass(frozen=True)
class Recogniser:
    """A network and what it expects: images of `height` x `width`, in `colour` or grey.

    Pairs at least as alike as `threshold` are taken for one person; `network` is the fingerprint
    of its weights: galleries are of one network.
    """

    net: nn.Module
    height: int
    width: int
    colour: bool
    threshold: float
    network: str

    @classmethod
    def of(cls, net: nn.Module, metadata: Mapping[str, str]) -> Recogniser:
        """A network in eval mode with the metadata of its weights: "shape" and "threshold".

        Raises:
            KeyError, TypeError, ValueError: metadata of another kind of network.
        """
        channels, height, width = (int(size) for size in json.loads(metadata["shape"]))
        threshold = float(metadata["threshold"])
        if channels not in (1, 3) or min(height, width) < 1 or not -1 <= threshold <= 1:
            raise ValueError(f"shape {[channels, height, width]}, threshold {threshold}")
        network = fingerprint(net.state_dict())
        return cls(net, height, width, channels == 3, threshold, network)

    def embed(self, images: Sequence[Image]) -> np.ndarray:
        """Embeddings [N, features] of length 1.

        Raises:
            DataError: an image that cannot be read. ValueError: an array that is no image.
        """
        read = [self.read(image) for image in images]
        shape = (0, int(getattr(self.net, "features", 0)))
        return embed(self.net, np.stack(read)) if read else np.zeros(shape, np.float32)

    def read(self, image: Image) -> np.ndarray:
        """An image as the network sees it, bytes [height, width, C]."""
        if not isinstance(image, np.ndarray):
            pixels = decode.read(Path(image), "RGB" if self.colour else "L")
        else:
            pixels = image[:, :, None] if image.ndim == 2 else image
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
                raise ValueError(
                    "face: image: expected bytes [H, W], [H, W, 1] or [H, W, 3], got "
                    f"{image.dtype} {list(image.shape)}"
                )
            if self.colour and pixels.shape[2] == 1:
                pixels = pixels.repeat(3, axis=2)
            elif not self.colour and pixels.shape[2] == 3:
                # As reading a file does it.
                pillow = require("PIL.Image", "train", "images in grey")
                pixels = np.asarray(pillow.fromarray(pixels).convert("L"))[:, :, None]
        return fit(pixels, self.height, self.width)


def load(path: str | os.PathLike[str]) -> Recogniser:
    """A recogniser from a run's folder (its best epoch), or from a file of weights.

    Raises:
        DataError: no such file, or one that does not hold a face network.
        MissingExtraError: safetensors is not installed.
    """
    file = Path(path)
    if file.is_dir():
        best = file / "best.safetensors"
        file = best if best.is_file() else file / "weights.safetensors"
    tensors, metadata = _read_safetensors(file, "weights of a face network")
    try:
        # Without memory, until the weights are seen to be there in the sizes that were asked for.
        with torch.device("meta"):
            net = models.create(metadata["model"], **json.loads(metadata["options"]))
        net.load_state_dict(tensors, assign=True)
        return Recogniser.of(net.eval(), metadata)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"face: {file}: expected weights of a face network, found others: "
            f"{str(error).splitlines()[0][:120]}"
        ) from None


def compare(recogniser: Recogniser, a: Image, b: Image) -> float:
    """How alike two faces are: the cosine of their embeddings, -1 to 1.

    Raises:
        DataError: an image that cannot be read.
    """
    first, second = recogniser.embed([a, b])
    return float(first @ second)


def verify(recogniser: Recogniser, a: Image, b: Image, threshold: float | None = None) -> bool:
    """Whether two faces are taken for one person; `threshold` None is the recogniser's own."""
    least = recogniser.threshold if threshold is None else threshold
    return compare(recogniser, a, b) >= least


class Match(NamedTuple):
    """A person, how alike the probe is to them (-1 to 1), and their photograph that is so, which
    `Gallery.read` reads."""

    name: str
    similarity: float
    photo: str = ""


def identify(
    recogniser: Recogniser,
    image: Image,
    gallery: Gallery,
    *,
    most: int = 5,
    threshold: float | None = None,
) -> list[Match]:
    """The people of a gallery whom a face is most like, the best first, `most` at the most.

    If not even the best is as alike as `threshold` (None: the recogniser's own), the list begins
    with "unknown" at that threshold.

    Raises:
        DataError: an image that cannot be read, or a gallery of another network.
    """
    gallery.check(recogniser)
    least = recogniser.threshold if threshold is None else threshold
    found = gallery.nearest(recogniser.embed([image])[0])[:most]
    return found if found[0].similarity >= least else [Match(UNKNOWN, least), *found]


@dataclass(frozen=True)
class Gallery:
    """Photographs of the people whom a network is to recognise.

    `embeddings` [G, features] are of length 1, `names` [G] say whom each shows, `photos` [G] the
    file that it was, within `folder` (None: not known). `network` is the fingerprint of the
    network.
    """

    names: tuple[str, ...]
    photos: tuple[str, ...]
    embeddings: np.ndarray
    network: str
    folder: Path | None = None

    @classmethod
    def enrol(
        cls,
        recogniser: Recogniser,
        folder: str | os.PathLike[str],
        *,
        max_bad: float = DEFAULT_SHARE,
        problems: Problems | None = None,
    ) -> Gallery:
        """Enrol people from a folder that holds one folder of photographs for each.

        One photograph of a person is enough. `problems` collects what was left out.

        Raises:
            DataError: no such folder, no people, or more than `max_bad` (0 to 1) bad images.
        """
        folder = Path(folder).expanduser()
        spec = f"faces:{folder}"
        problems = Problems() if problems is None else problems
        people = person_folders(folder, spec, problems)
        names: list[str] = []
        photos: list[str] = []
        images: list[np.ndarray] = []
        for name, files in people.items():
            for path in files:
                try:
                    images.append(recogniser.read(path))
                except DataError as error:
                    problems.add(path, str(error).removeprefix(f"data: {path}: "))
                    continue
                names.append(name)
                photos.append(str(path.relative_to(folder)))
        problems.refuse_beyond(max_bad, sum(map(len, people.values())), spec)
        if not images:
            raise DataError(f"face: {folder}: expected photographs of people, found none")
        embeddings = recogniser.embed(images)
        return cls(tuple(names), tuple(photos), embeddings, recogniser.network, folder)

    @property
    def people(self) -> tuple[str, ...]:
        """The names of those enrolled, each once."""
        return tuple(dict.fromkeys(self.names))

    def check(self, recogniser: Recogniser) -> None:
        """Raises:
        DataError: the gallery was enrolled with another network: its embeddings mean nothing here.
        """
        if self.network != recogniser.network:
            raise DataError(
                f"face: gallery: expected one enrolled with this network ({recogniser.network}), "
                f"found one of another ({self.network}): enrol the people again"
            )

    def nearest(self, embedding: np.ndarray) -> list[Match]:
        """All people, each by the photograph most like an embedding [features] of length 1."""
        similarities = self.embeddings @ embedding
        found: dict[str, Match] = {}
        for index in np.argsort(-similarities, kind="stable"):
            name = self.names[index]
            photo = self.photos[index]
            found.setdefault(name, Match(name, float(similarities[index]), photo))
        return list(found.values())

    def read(self, photo: str) -> np.ndarray | None:
        """An enrolled photograph, bytes [H, W, 3]; None if it has gone, or was never enrolled from
        `folder`, whatever the gallery's file says."""
        if self.folder is None:
            return None
        try:
            root = Path(os.path.realpath(self.folder))
            path = Path(os.path.realpath(self.folder / photo))
            within = root in path.parents and path.suffix.lower() in decode.SUFFIXES
            return decode.read(path) if within else None
        except (DataError, ValueError):  # the latter: a name that no file has
            return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gallery as a safetensors file, whole or not at all.

        The photographs stay where they are: whoever loads the file sees them if their folder is
        beside or below it.

        Raises:
            OSError: the folder is missing or read-only, the disk is full, ...
            MissingExtraError: safetensors is not installed.
        """
        save = require("safetensors.torch", "train", "saving a gallery").save
        metadata = {
            "format": _FORMAT,
            "network": self.network,
            "names": json.dumps(self.names),
            "photos": json.dumps(self.photos),
        }
        if self.folder is not None:
            # A path that leads out would let a file of others have any file read.
            own = os.path.realpath(Path(path).parent)
            relative = os.path.relpath(os.path.realpath(self.folder), own)
            if _leads_within(relative):
                metadata["folder"] = relative
        tensors = {"embeddings": torch.from_numpy(np.ascontiguousarray(self.embeddings))}
        metadata[tensor_files.CHECKSUM] = tensor_files.checksum(tensors)
        write_atomic(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gallery:
        """Read a gallery that `save` wrote.

        Raises:
            DataError: no such file, or another, damaged or overlarge one.
            MissingExtraError: safetensors is not installed.
        """
        file = Path(path)
        tensors, metadata = _read_safetensors(file, "a gallery of faces")
        try:
            if metadata["format"] != _FORMAT:
                raise ValueError(f"format {metadata['format']!r}")
            names, photos = (
                tuple(str(each) for each in json.loads(metadata[part]))
                for part in ("names", "photos")
            )
            embeddings = tensors["embeddings"].float().numpy()
            if embeddings.ndim != 2 or not len(embeddings) == len(names) == len(photos) > 0:
                raise ValueError(f"{len(names)} names, embeddings {list(embeddings.shape)}")
            if not np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3):
                raise ValueError("embeddings that are not of length 1")
            network, folder = metadata["network"], metadata.get("folder")
        except KeyError as error:
            raise DataError(
                f"face: {file}: expected a gallery of faces, found none with {error}"
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"face: {file}: expected a gallery of faces, found {str(error)[:120]}"
            ) from None
        place = file.parent / folder if folder is not None and _leads_within(folder) else None
        return cls(names, photos, embeddings, network, place)


def embed(net: nn.Module, images: np.ndarray, *, flip: bool = True) -> np.ndarray:
    """Embeddings [N, features] of length 1, float32, of photographs [N, H, W, C] in bytes.

    With `flip`, each is the mean of a photograph's and its mirror image's. The network, which
    should be in eval mode, runs where its weights are.
    """
    device = next(net.parameters()).device
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + _BATCH]))
            batch = part.to(device).permute(0, 3, 1, 2).contiguous().float().div_(255)
            embeddings = net(batch).float()
            if flip:
                embeddings = embeddings + net(batch.flip(3)).float()
            found.append(F.normalize(embeddings).cpu())
    return torch.cat(found).numpy()


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """Twelve digits that tell networks apart by their weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{list(weights[name].shape)}".encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _leads_within(path: str) -> bool:
    return not os.path.isabs(path) and os.pardir not in Path(path).parts


def _read_safetensors(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        found = "something else" if path.exists() else "no such file"
        raise DataError(f"face: {path}: expected {what}, found {found}")
    if path.stat().st_size > _MOST_BYTES:
        raise DataError(f"face: {path}: expected {what}, found a file of more than 1 GiB")
    try:
        return tensor_files.read(path)
    except ValueError as error:
        raise DataError(f"face: {path}: expected {what}, found {error}") from None
