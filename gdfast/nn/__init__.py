"""`torch.nn` with our layers in place of native's where there are any.

`from gdfast import nn` serves a model written for `from torch import nn`: every name that is not
ours is torch.nn's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn

if TYPE_CHECKING:
    from torch.nn import *  # noqa: F403

from gdfast.mirror import mirror_submodules as _mirror_submodules
from gdfast.nn import functional as functional  # type: ignore[no-redef]
from gdfast.nn.conv import Conv2d as Conv2d
from gdfast.nn.conv_act import ConvAct as ConvAct
from gdfast.nn.linear import Linear as Linear
from gdfast.nn.norm import BatchNorm2d as BatchNorm2d
from gdfast.nn.norm import BatchNormAct2d as BatchNormAct2d
from gdfast.nn.norm import ConvNormAct as ConvNormAct
from gdfast.nn.pool import MaxPool2d as MaxPool2d
from gdfast.nn.pool import conv_relu_max_pool as conv_relu_max_pool


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.nn, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*dir(torch.nn), *globals()})


# Ours go by the names of torch's. What torch has not is here too, but no star imports it.
__all__ = [name for name in dir(torch.nn) if not name.startswith("_")]
_mirror_submodules(
    __name__, "torch.nn", own=("block", "conv", "conv_act", "functional", "linear", "norm", "pool")
)
