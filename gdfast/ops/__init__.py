"""The operations as functions, with their gradients."""

from gdfast.ops.batch_norm import batch_norm_act
from gdfast.ops.conv2d import Conv2dFunction, conv2d
from gdfast.ops.conv2d_act import Conv2dActFunction, conv2d_act
from gdfast.ops.conv2d_moments import conv2d_moments
from gdfast.ops.conv2d_relu_max_pool2d import ConvReluMaxPool2dFunction, conv2d_relu_max_pool2d
from gdfast.ops.cross_entropy import cross_entropy
from gdfast.ops.linear import LinearFunction, linear
from gdfast.ops.max_pool2d import MaxPool2dFunction, max_pool2d
from gdfast.ops.nms import nms
from gdfast.ops.sgd import SgdFunction, sgd, sgd_

__all__ = [
    "Conv2dActFunction",
    "Conv2dFunction",
    "ConvReluMaxPool2dFunction",
    "LinearFunction",
    "MaxPool2dFunction",
    "SgdFunction",
    "batch_norm_act",
    "conv2d",
    "conv2d_act",
    "conv2d_moments",
    "conv2d_relu_max_pool2d",
    "cross_entropy",
    "linear",
    "max_pool2d",
    "nms",
    "sgd",
    "sgd_",
]
