"""Models by name: `create("resnet18", num_classes=10)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.nn import Module

_Builder = TypeVar("_Builder", bound=Callable[..., Module])
_builders: dict[str, Callable[..., Module]] = {}


def register(name: str) -> Callable[[_Builder], _Builder]:
    """Class or function decorator that makes a model known under a name.

    Raises:
        ValueError: the name is taken.
    """

    def add(builder: _Builder) -> _Builder:
        if name in _builders:
            raise ValueError(
                f"models.register: name: expected a new name, got {name!r}, which is taken"
            )
        _builders[name] = builder
        return builder

    return add


def names() -> list[str]:
    """The names that `create` knows."""
    return sorted(_builders)


def create(name: str, **options: Any) -> Module:
    """Build a model with freshly drawn weights; `options` go to the model's constructor.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _builders:
        raise ValueError(f"models.create: name: expected one of {', '.join(names())}, got {name!r}")
    return _builders[name](**options)


# Models register themselves when imported, so these come after register.
from gdfast.models.cnn import SimpleCNN  # noqa: E402
from gdfast.models.face import FaceResNet  # noqa: E402
from gdfast.models.mobilenet import MobileNetV2  # noqa: E402
from gdfast.models.resnet import CifarResNet, ResNet  # noqa: E402
from gdfast.models.yolo_lite import YoloLite, YoloLiteBackbone  # noqa: E402

__all__ = [
    "CifarResNet",
    "FaceResNet",
    "MobileNetV2",
    "ResNet",
    "SimpleCNN",
    "YoloLite",
    "YoloLiteBackbone",
    "create",
    "names",
    "register",
]
