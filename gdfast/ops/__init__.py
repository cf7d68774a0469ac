"""The operations as functions, with their gradients."""

from gdfast.ops.conv2d import Conv2dFunction, conv2d

__all__ = ["Conv2dFunction", "conv2d"]
