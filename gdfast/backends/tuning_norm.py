"""What runs where a batch normalisation follows a convolution, for the tuner to check and time.

A kernel that takes the moments of what it writes saves that a pass: it may be the better choice
though another one is faster alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import batch_norm, tuning_check
from gdfast.backends.cuda_conv2d import Kernel
from gdfast.backends.registry import BatchNormQuery, Conv2dQuery
from gdfast.errors import FallbackWarning
from gdfast.geometry import is_channels_last

_MOMENTS_ERROR = 2.0**-12  # of float32 sums, relative to the variance


def agreeing(calls: Mapping[str, Callable[..., Any]], arguments: tuple[Any, ...]) -> list[str]:
    """Names of the calls whose moments, if any, are those of their output.

    Warns of the others, and passes over what raises, as `tuning_check.agreeing` does.
    """
    arguments = tuple(
        tuning_check.random_like(a) if isinstance(a, Tensor) else a for a in arguments
    )
    names = []
    for name, call in calls.items():
        if not isinstance(call, Kernel):
            names.append(name)
            continue
        try:
            output, moments = call.with_moments(*arguments)
            if moments is not None:
                # Again, in memory that has none of them: what a kernel does not write shows.
                moments.fill_(float("nan"))
                del output, moments
                output, moments = call.with_moments(*arguments)
            right = moments is None or _are_of(moments, output)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where the GPU is lost to this process
            continue
        if right:
            names.append(name)
        else:
            warnings.warn(
                f"conv2d_moments: {name}: expected the moments of the output but for rounding, got "
                "others; it is not used. Please report this, with the output of `gdfast doctor`.",
                FallbackWarning,
                stacklevel=2,
            )
    return names


def _are_of(moments: Tensor, output: Tensor) -> bool:
    wide = batch_norm.sum_dtype(output.dtype)
    variance, mean = torch.var_mean(output.to(wide), (0, 2, 3), correction=0)
    counts, means, squares = moments.double().unbind(1)
    count = counts.sum(0)
    ours = (counts * means).sum(0) / count
    our_variance = (squares + counts * (means - ours).square()).sum(0) / count
    bound = _MOMENTS_ERROR * variance + torch.finfo(wide).tiny
    return bool(
        (count == output[:, 0].numel()).all()
        & ((ours - mean).square() <= bound).all()
        & ((our_variance - variance).abs() <= bound).all()
    )


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
