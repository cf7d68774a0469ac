"""Face recognition: an embedding learned from some photographs, then tested on others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from gdfast import face, models
from gdfast.data import face_data
from gdfast.data.face_splits import split
from gdfast.data.face_views import Changes, FaceViews, with_mirrors
from gdfast.data.faces import FaceData
from gdfast.data.loader import Batch
from gdfast.losses import ArcFaceHead, SoftmaxHead
from gdfast.metrics import verification
from gdfast.train import plots_face
from gdfast.train.errors import DivergedError, SettingsError
from gdfast.train.face_predict import FacePredictor
from gdfast.train.folder import RunFolder
from gdfast.train.recipe import Settings
from gdfast.train.task import Task

MODEL = "face_resnet"
_EPOCH = 3_200  # views of an epoch, if the photographs are fewer
_VIEWS = 28_800  # of few photographs: more, and the embedding learns them by heart


class FaceClassifier(nn.Module):
    """The embedding network `net`, and `head`, which gives logits of the people trained on."""

    def __init__(self, net: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = head

    def forward(self, images: Tensor, people: Tensor | None = None) -> Tensor:
        """Embeddings [N, features]; with `people` [N], logits to train on."""
        embeddings = self.net(images)
        return embeddings if people is None else self.head(embeddings, people)


class Face(Task):
    """Trains `face_resnet` under a head that names the people in the training photographs.

    `evaluate` gives `rank1`, the share of the probes whose most similar photograph of the gallery
    shows their person, and of pairs `auc`, `eer` and `tar` at a false acceptance rate of 1e-2; on
    data whose pairs have two folds or more, `accuracy` too, as LFW measures it.
    """

    score = "auc"
    terms = ("accuracy",)

    @classmethod
    def load(cls, settings: Settings, *, download: bool = False) -> FaceData:
        """Read `identities`, `faces:DIR` or `lfw:DIR`.

        Raises:
            DataError: an unknown name, or data that is missing or bad.
        """
        options = settings.options
        return face_data.load(
            settings.data,
            height=options["height"],
            width=options["width"],
            colour=options["colour"],
            max_bad=settings.max_bad,
        )

    def __init__(self, settings: Settings, data: FaceData) -> None:
        options, recipe = settings.options, settings.descent
        self._data = data
        self._settings = settings
        self.split = split(data, options["protocol"], fold=options["fold"], folds=options["folds"])
        self._tested = self.split.tested()
        self._network = {
            "depth": options["depth"],
            "width": options["channels"],
            "in_channels": 3 if options["colour"] else 1,
            "dropout": options["dropout"],
        }
        train, changes = self.split.train, Changes().scaled(options["changes"])
        if options["mirrors"]:
            train, changes = with_mirrors(train), replace(changes, flip=0.0)
        people = int(train.people.max()) + 1
        try:
            net = models.FaceResNet(**self._network)
            head = _head(net.features, people, options, parts=recipe.accumulate)
            self.model = FaceClassifier(net, head)
        except ValueError as error:
            raise SettingsError(f"train: {error}") from None
        self.source = FaceViews(
            train,
            changes,
            views=options["views"] or max(1, round(_EPOCH / len(train))),
            batch_size=recipe.batch_size,
        )

    @property
    def epochs(self) -> int:
        """As many as few photographs need, or 20 views of each of many."""
        return max(1, round(max(_VIEWS, 20 * len(self.split.train)) / len(self.source)))

    def sizes(self) -> tuple[int, int]:
        """How many photographs train, and how many are in the pairs of the test."""
        pairs = self.split.pairs
        return len(self.split.train), len(np.union1d(pairs.first, pairs.second))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [N, people] of the training's people."""
        logits: Tensor = model(batch.images, batch.targets)
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy, and the share of the views whose person has the largest logit."""
        smoothing = self._settings.descent.label_smoothing
        loss = F.cross_entropy(outputs, batch.targets, label_smoothing=smoothing)
        return {"loss": loss, "accuracy": (outputs.argmax(1) == batch.targets).float().mean()}

    def exported(self, model: nn.Module) -> nn.Module:
        """The embedding network: the head knows the training's people alone."""
        net: Any = model.net
        return net

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures on the test's photographs, each seen with its mirror image.

        Raises:
            DivergedError: an embedding that is not finite.
        """
        split = self.split
        embeddings = face.embed(self.exported(model), self._tested.images)
        if not np.isfinite(embeddings).all():
            raise DivergedError(
                "train: embeddings: expected finite numbers, got NaN or infinity: try a lower lr "
                f"than {self._settings.descent.lr}"
            )
        enrolled = len(split.gallery)
        self._similarities = split.pairs.similarities(embeddings)
        self._roc = verification.roc(self._similarities, split.pairs.same)
        self._identified = verification.identify(
            embeddings[enrolled:], embeddings[:enrolled], split.gallery.people
        )
        right = self._identified.people == split.probes.people
        measures = {
            "rank1": float(right.mean()),
            "auc": self._roc.auc,
            "eer": self._roc.eer,
            "tar": self._roc.tar_at(),
        }
        if split.folds is not None and len(np.unique(split.folds)) > 1:
            accuracies = verification.fold_accuracies(
                self._similarities, split.pairs.same, split.folds
            )
            measures["accuracy"] = float(accuracies.mean())
        return measures

    def write_results(self, model: nn.Module, folder: RunFolder) -> dict[str, Any]:
        """Draw the ROC, the similarities, the hardest pairs and the mistaken probes."""
        split, options = self.split, self._settings.options
        title = f"face on {self._data.name}, {options['protocol']}, seed {self._settings.seed}"
        same, threshold = split.pairs.same, self._threshold()
        folder.write_figure("roc.png", plots_face.roc(self._roc, title))
        folder.write_figure(
            "similarities.png",
            plots_face.similarities(self._similarities, same, threshold, title),
        )
        folder.write_figure(
            "pairs.png",
            plots_face.worst_pairs(self._tested, split.pairs, self._similarities, title),
        )
        folder.write_figure(
            "mistakes.png",
            plots_face.mistaken(
                split.gallery, split.probes, self._identified, self._data.classes, title
            ),
        )
        return {
            "threshold": threshold,
            "people_train": int(split.train.people.max()) + 1,
            "people_test": len(np.unique(split.gallery.people)),
            "pairs": len(same),
            "pairs_same": int(same.sum()),
            "probes": len(split.probes),
            "left_out": self._data.problems.skipped(),
        }

    def _threshold(self) -> float:
        # Infinite where the most similar of fewer than 100 different pairs comes first of all.
        return min(self._roc.threshold_at(), 1.0)

    def metadata(self) -> dict[str, str]:
        """The network, the shape of its images, and the threshold at a FAR of 1e-2."""
        options = self._settings.options
        shape = [self._network["in_channels"], options["height"], options["width"]]
        return {
            "model": MODEL,
            "options": json.dumps(self._network),
            "shape": json.dumps(shape),
            "threshold": repr(self._threshold()),
        }

    @classmethod
    def predictor(
        cls, model: nn.Module, metadata: Mapping[str, str], **options: Any
    ) -> FacePredictor:
        """Says who is shown: `gallery` is a folder of people or a file of them, `threshold` the
        least similarity."""
        return FacePredictor(model, metadata, **options)


def _head(features: int, people: int, options: Mapping[str, Any], parts: int) -> nn.Module:
    """The head; `parts` is how many batches a step of gradient descent sums up."""
    if options["head"] == "arcface":
        return ArcFaceHead(
            features,
            people,
            scale=options["scale"],
            margin=options["margin"],
            warmup=options["margin_warmup"] * parts,
        )
    return SoftmaxHead(features, people, scale=options["scale"], cosine=options["head"] == "cosine")
