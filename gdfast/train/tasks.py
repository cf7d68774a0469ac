"""The tasks that `gdfast train` knows: what each is for, its recipes, and its own options.

Nothing here needs torch, so that the command line can answer before it is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gdfast.train.errors import SettingsError
from gdfast.train.recipe import Recipe, Settings

if TYPE_CHECKING:
    from gdfast.train.task import Task


@dataclass(frozen=True)
class Option:
    """A setting that only one task has: its default (whose type it keeps), and what it means.

    `choices` are the values that it may have, all of its type if empty; `minimum` its least, and
    `maximum` its most.
    """

    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float = 1e6

    def check(self, name: str, value: Any) -> None:
        """Raises:
        SettingsError: a value that the option cannot have.
        """
        kind = type(self.default)
        if isinstance(value, bool) is not (kind is bool) or not isinstance(
            value, (int, float) if kind is float else kind
        ):
            expected = {int: "a whole number", float: "a number", bool: "yes or no"}.get(
                kind, "text"
            )
        elif self.choices and value not in self.choices:
            expected = " or ".join(map(str, self.choices))
        elif self.minimum is not None and not self.minimum <= value <= self.maximum:
            expected = f"{self.minimum:g} to {self.maximum:g}"
        else:
            return
        raise SettingsError(f"train: {name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class TaskInfo:
    """What can be said of a task without building it.

    `summary` is one line for the command line's help, `data` what it trains on when nothing is
    named, `data_help` the kinds of data that it takes. `recipes` has "default". `kind` is the
    class, as module:name.
    """

    summary: str
    data: str
    data_help: str
    recipes: Mapping[str, Recipe]
    kind: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def load(self) -> type[Task]:
        """The class that does the task."""
        module, _, name = self.kind.partition(":")
        task: type[Task] = getattr(importlib.import_module(module), name)
        return task


_CLASSIFY_DATA = (
    "digits (1,797 images that come with scikit-learn), mnist:DIR (a folder of idx files, gzip or "
    "not) or folder:DIR (a folder of images for each class)"
)

TASKS: dict[str, TaskInfo] = {
    "cnn": TaskInfo(
        summary="a small convolutional network that reads handwritten digits",
        data="digits",
        data_help=_CLASSIFY_DATA,
        recipes={
            "default": Recipe(),
            "article": Recipe(lr=0.01, momentum=0.0, schedule="constant", warmup=0),
        },
        kind="gdfast.train.classify:SimpleCNN",
    ),
    "resnet": TaskInfo(
        summary="a residual network that names what an image shows",
        data="digits",
        data_help=_CLASSIFY_DATA,
        recipes={
            "default": Recipe(
                lr=0.1, epochs=30, weight_decay=5e-4, nesterov=True, label_smoothing=0.05
            )
        },
        kind="gdfast.train.classify:ResNet",
        options={
            "model": Option(
                "resnet20",
                "20, 32 and 56 are for small images, the others for photographs",
                choices=(
                    "resnet20", "resnet32", "resnet56",
                    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
                ),
            ),
            "size": Option(
                0, "height and width that images are brought to (0: as they are, or 224)",
                minimum=0, maximum=4096,
            ),
            "augment": Option(
                "auto",
                "random changes of the training images: names joined by commas, of affine, flip, "
                "crop, jitter, erase and mixup; none; or auto, which goes by the data",
            ),
            "weights": Option("", "begin with the weights in this file (safetensors or .pt)"),
        },
    ),
    "face": TaskInfo(
        summary="an embedding of faces: alike for one person, unlike for two",
        data="identities",
        data_help=(
            "identities (synthetic people, drawn), faces:DIR (a folder for each person) or lfw:DIR "
            "(Labeled Faces in the Wild, with pairs.txt)"
        ),
        recipes={
            "default": Recipe(lr=0.05, weight_decay=5e-4, nesterov=True, batch_size=32),
        },
        kind="gdfast.train.face:Face",
        options={
            "protocol": Option(
                "identify",
                "identify: half of everyone's photographs train, the rest is recognised; verify: "
                "the people of one fold are never seen in training, and told apart",
                choices=("identify", "verify"),
            ),
            "fold": Option(1, "whom verify leaves unseen, from 1", minimum=1, maximum=1000),
            "folds": Option(
                4, "into how many folds verify parts the people",
                minimum=2, maximum=1000,
            ),
            "head": Option(
                "arcface",
                "what the embedding is trained under",
                choices=("arcface", "cosine", "softmax"),
            ),
            "scale": Option(30.0, "factor of the head's cosines", minimum=1, maximum=1000),
            "margin": Option(0.3, "of arcface, in radians", minimum=0, maximum=1.57),
            "margin_warmup": Option(
                0, "steps until the margin is whole",
                minimum=0, maximum=1000000000,
            ),
            "depth": Option(1, "residual blocks in each of four stages", minimum=1, maximum=64),
            "channels": Option(16, "channels of the first stage", minimum=1, maximum=1024),
            "dropout": Option(0.0, "before the embedding's linear layer", minimum=0, maximum=0.99),
            "height": Option(56, "height that images are brought to", minimum=16, maximum=4096),
            "width": Option(46, "width that images are brought to", minimum=16, maximum=4096),
            "colour": Option(False, "see colours, not only grey"),
            "mirrors": Option(
                True, "count mirror images as other people, so that there are twice as many"
            ),
            "views": Option(
                0,
                "how often an epoch shows a photograph, each time altered (0: so that it has 3,200 "
                "views or more)",
                minimum=0, maximum=100000,
            ),
            "changes": Option(
                1.0, "how strongly photographs are altered; 0: not at all", minimum=0, maximum=10
            ),
        },
    ),
    "yolo": TaskInfo(
        summary="YOLO-lite, a small network that finds objects and the boxes around them",
        data="scenes",
        data_help=(
            "scenes (1,200 drawn here of scikit-learn's digits), voc:DIR (Pascal VOC: Annotations, "
            "JPEGImages, ImageSets/Main), coco:JSON,IMAGES (or two such pairs) or yolo:YAML"
        ),
        recipes={
            "default": Recipe(
                lr=0.03, weight_decay=5e-4, nesterov=True, batch_size=8, ema=0.998, clip=10.0
            )
        },
        kind="gdfast.train.detect:Detect",
        options={
            "size": Option(
                0,
                "longer side of the model's input in pixels, rounded up to 32s (0: as the images, "
                "416 at most)",
                minimum=0, maximum=4096,
            ),
            "strides": Option(
                "8,16,32",
                "of the cells that look for boxes; coarse ones alone are faster",
                choices=("8,16,32", "16,32", "8,16", "8", "16", "32"),
            ),
            "flips": Option(
                "auto",
                "mirror images to train on; all: quarter turns too; auto goes by the data",
                choices=("auto", "none", "horizontal", "all"),
            ),
            "scale": Option(
                1.5, "most that training images grow or shrink; less where all objects of a kind "
                "are of one size", minimum=1, maximum=8,
            ),
            "mosaic": Option(
                0.5, "share of the training images made of four",
                minimum=0, maximum=1,
            ),
            "mixup": Option(
                0.05, "share of the others blended with one more",
                minimum=0, maximum=1,
            ),
            "close": Option(
                0.15, "share of the last epochs without mosaic and mixup",
                minimum=0, maximum=1,
            ),
            "weights": Option("", "begin with the weights in this file (safetensors or .pt)"),
        },
    ),
}  # fmt: skip


def settle(settings: Settings, epochs: int | None = None) -> Settings:
    """Settings with nothing left open but, without `epochs`, the number of epochs.

    Raises:
        SettingsError: an unknown task or option, or a value that an option cannot have.
    """
    if settings.task not in TASKS:
        known = ", ".join(TASKS)
        raise SettingsError(f"train: task: expected one of {known}, got {settings.task!r}")
    info = TASKS[settings.task]
    for name, value in settings.options.items():
        if name not in info.options:
            known = ", ".join(info.options) or "none"
            raise SettingsError(
                f"train: options: expected one that {settings.task} has ({known}), got {name!r}"
            )
        info.options[name].check(name, value)
    recipe = settings.recipe or info.recipes["default"]
    return replace(
        settings,
        data=settings.data or info.data,
        recipe=replace(recipe, epochs=recipe.epochs or epochs),
        options={name: option.default for name, option in info.options.items()} | settings.options,
    )
