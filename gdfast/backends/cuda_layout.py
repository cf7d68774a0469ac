"""Dense images from one layout to the other, by our CUDA kernel that transposes matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_stream
from gdfast.geometry import dense_strides

# Blocks of a grid have 2^31 - 1 numbers; with 8 channels or more each has at least 4 elements.
_MOST = 2**33
_LEAST_CHANNELS = 8


def channels_last(images: Tensor) -> Tensor:
    """Images [N, C, H, W] on the kernels' device, dense in channels_last."""
    if images.is_contiguous(memory_format=torch.channels_last):
        return images
    if not images.is_contiguous() or not _fits(images):
        return images.contiguous(memory_format=torch.channels_last)
    _, C, H, W = images.shape
    return _transposed(images, C, H * W, to_channels_last=True)


def contiguous(images: Tensor) -> Tensor:
    """Images [N, C, H, W] on the kernels' device, dense in NCHW."""
    if images.is_contiguous():
        return images
    if not images.is_contiguous(memory_format=torch.channels_last) or not _fits(images):
        return images.contiguous()
    _, C, H, W = images.shape
    return _transposed(images, H * W, C, to_channels_last=False)


def _fits(images: Tensor) -> bool:
    return images.shape[1] >= _LEAST_CHANNELS and images.numel() < _MOST


def _transposed(images: Tensor, rows: int, columns: int, to_channels_last: bool) -> Tensor:
    assert native.cuda is not None
    size, dtype = images.shape, images.dtype
    strides = dense_strides(size, to_channels_last)
    result = torch.empty_strided(size, strides, dtype=dtype, device=images.device)
    native.cuda.transpose(
        images.data_ptr(), result.data_ptr(), size[0], rows, columns, dtype.itemsize,
        *cuda_stream.current(images.device),
    )  # fmt: skip
    return result
