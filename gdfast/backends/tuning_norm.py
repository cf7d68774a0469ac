"""What runs where a batch normalisation follows a convolution, for the tuner to time.

A kernel that takes the moments of what it writes saves that a pass: it may be the better choice
though another one is faster alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gdfast import native
from gdfast.backends import batch_norm
from gdfast.backends.cuda_conv2d import Kernel
from gdfast.backends.registry import BatchNormQuery, Conv2dQuery
from gdfast.geometry import is_channels_last


def followed(
    calls: Mapping[str, Callable[..., Any]], query: Conv2dQuery
) -> dict[str, Callable[..., Any]]:
    """The forward passes of a convolution, each with a batch normalisation behind it."""
    size, strides = query.geometry.output_size, query.strides[2]
    norm = BatchNormQuery(
        query.device, query.dtype, query.layout, size=size, strides=strides,
        channels_last=is_channels_last(size, strides), param_dtype=query.dtype, training=True,
        eps=1e-5, activation="none", negative_slope=0.0, pre_activation="input",
    )  # fmt: skip
    if native.cuda is None or batch_norm.cuda_why_not(norm):
        return dict(calls)
    normalise = batch_norm.CudaForward(norm)

    def then_normalise(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if isinstance(kernel, Kernel):
                output, moments = kernel.with_moments(*arguments)
            else:
                output, moments = kernel(*arguments), None
            return normalise(output, None, None, None, None, None, 0.0, moments)

        return run

    return {name: then_normalise(kernel) for name, kernel in calls.items()}
