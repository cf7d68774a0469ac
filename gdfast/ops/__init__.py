"""The operations as functions, with their gradients."""

from gdfast.ops.batch_norm import batch_norm_act
from gdfast.ops.conv2d import Conv2dFunction, conv2d
from gdfast.ops.sgd import SgdFunction, sgd, sgd_

__all__ = ["Conv2dFunction", "SgdFunction", "batch_norm_act", "conv2d", "sgd", "sgd_"]
