"""Batch normalisation layers on our kernels, with the activation and the residual in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdfast import native, ops
from gdfast.nn import memo
from gdfast.nn.block import (
    ACTIVATIONS,
    NAMES,
    check_activation,
    has_hooks,
    is_traced,
    same_padding,
    slope_of,
    traced,
)
from gdfast.nn.conv import Conv2d
from gdfast.nn.conv_act import padded
from gdfast.ops.batch_norm import count_batch
from gdfast.ops.conv2d_norm_act import unit


def convolve_for(norm: Any, conv: Any, input: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(input), and the moments of it that `normalise` takes where it needs any, or None.

    norm is the `torch.nn.BatchNorm2d` that follows; any module may be in the place of conv.
    """
    if (
        native.cuda is None
        or torch.compiler.is_compiling()
        or not isinstance(input, Tensor)
        or type(conv) is not Conv2d
        or not _needs_statistics(norm)
        or has_hooks(conv)
        or "_conv_forward" in vars(conv)
    ):
        return conv(input), None
    input, padding = padded(conv, input)
    return ops.conv2d_moments(
        input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups
    )


def _needs_statistics(norm: Any) -> bool:
    """Whether a norm normalises with the statistics of the batch."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def normalise(
    norm: Any, input: Tensor, residual: Tensor | None, activation: str, negative_slope: float,
    moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """activation(norm(input) + residual) for a `torch.nn.BatchNorm2d`, its statistics updated.

    input and residual are [N, C, H, W]; activation as in `BatchNormAct2d`; moments are those that
    `convolve_for` gave with the input. Raises what `gdfast.ops.batch_norm_act` raises.
    """
    if isinstance(input, Tensor) and input.dim() != 4:
        norm._check_input_dim(input)
    training, weight, bias, mean, variance, _ = _state(norm)
    return ops.batch_norm_act(
        input, weight, bias, mean, variance, residual, training=training,
        momentum=_next_momentum(norm), eps=norm.eps, activation=activation,
        negative_slope=negative_slope, moments=moments,
    )  # fmt: skip


def run_as_one(
    norm: Any, conv: Any, input: Tensor, residual: Tensor | None, activation: str,
    negative_slope: float,
) -> Tensor | None:  # fmt: skip
    """What `convolve_for` and `normalise` give, in one, or None where they have to be called."""
    if torch.compiler.is_compiling() or type(conv) is not Conv2d:
        return None
    ending = activation, negative_slope
    output = memo.run_again(norm, ending, input, residual, conv)
    if output is not None:
        return output
    # A module's attributes take Python a tenth of a microsecond each, those of its dict a fifth.
    of_conv, of_norm = vars(conv), vars(norm)
    parameters = of_conv["_parameters"]
    if (
        of_conv["padding_mode"] != "zeros"
        or "_conv_forward" in of_conv
        or has_hooks(conv)
        or "weight" not in parameters
        or "bias" not in parameters
    ):
        return None
    training, weight, bias, mean, variance, batches = _state(norm)
    momentum = of_norm["momentum"]
    counts = batches is not None and momentum is not None  # the average needs the count
    given = (
        input, parameters["weight"], parameters["bias"], weight, bias, mean, variance, residual,
        batches if counts else None,
    )  # fmt: skip
    found = unit(
        given,
        (of_conv["stride"], of_conv["padding"], of_conv["dilation"], of_conv["groups"]),
        (training, of_norm["eps"], activation, negative_slope),
        native.cuda is not None and training,
    )
    if found is None:
        return None
    run, tensors = found
    if counts or batches is None:
        casts, factor = tensors is not given, 0.0 if momentum is None else momentum
        memo.note(norm, ending, given, run, casts, conv, factor)
    return run.run(tensors, momentum if counts else _next_momentum(norm))


def _state(norm: Any) -> tuple[Any, ...]:
    """Whether the statistics are the batch's; weight, bias and the running statistics in use; and
    the counter of batches, where it is to be raised."""
    of_norm = vars(norm)
    training, tracks = of_norm["training"], of_norm["track_running_stats"]
    weight, bias, mean, variance, batches = _tensors(norm)
    if training:
        if not tracks:
            mean = variance = batches = None
        return training, weight, bias, mean, variance, batches
    is_batch = mean is None and variance is None
    return is_batch, weight, bias, mean, variance, None


def _next_momentum(norm: Any) -> float:
    """The momentum of the running statistics for one more batch, which is counted in training."""
    momentum, batches = norm.momentum, _state(norm)[-1]
    if batches is not None:
        count_batch(batches)
        if momentum is None:  # the average of all batches so far
            momentum = 1.0 / float(batches)
    return 0.0 if momentum is None else momentum


def _tensors(norm: Any) -> tuple[Any, ...]:
    # Module.__getattr__ takes a third of a microsecond for each.
    parameters, buffers = norm._parameters, norm._buffers
    if "weight" in parameters and "bias" in parameters and "running_mean" in buffers:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, variance = buffers["running_mean"], buffers["running_var"]
        return weight, bias, mean, variance, buffers.get("num_batches_tracked")
    # Pruning, for one, makes a plain attribute of the weight.
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that runs on our kernels: same arguments, parameters and state.

    input [N, C, H, W]; dtypes, layout of the result and errors are those of
    `gdfast.ops.batch_norm_act`. `gdfast.backend` and GDFAST_BACKEND choose what it runs on.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(self, input):
            return traced(self, input)
        return normalise(self, input, None, "none", 0.0)


class BatchNormAct2d(BatchNorm2d):
    """`activation(BatchNorm2d(input) + residual)` in one pass each way.

    Arguments, parameters and state_dict are those of `torch.nn.BatchNorm2d`; `activation` is
    "none", "relu", "relu6", "leaky_relu" (with `negative_slope`) or "silu". input and the optional
    residual are [N, C, H, W]. Raises ValueError for another activation.
    """

    def __init__(
        self, num_features: int, *args: Any, activation: str = "relu",
        negative_slope: float = 0.01, **kwargs: Any,
    ) -> None:  # fmt: skip
        check_activation("BatchNormAct2d", activation)
        super().__init__(num_features, *args, **kwargs)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_traced(self, input):
            return traced(self, input, residual)
        return normalise(self, input, residual, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" * (self.activation == "leaky_relu")
        return f"{super().extra_repr()}, activation={self.activation}{slope}"


class ConvNormAct(torch.nn.Module):
    """Convolution, batch normalisation and activation: `act(norm(conv(input)) + residual)`.

    The first arguments are those of `torch.nn.Conv2d`; padding None keeps the size of the image
    for odd kernels and stride 1: dilation * (kernel_size - 1) // 2. `eps` and `momentum` are the
    norm's, `activation` as in `BatchNormAct2d`. `conv`, `norm` and `act` are modules with the
    state_dict keys conv.weight, norm.weight and so on; norm and act run in one pass unless one of
    them was replaced or carries hooks. input [N, C, H, W], residual as the output, or None.

    Raises ValueError for another activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        activation: str = "relu",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation("ConvNormAct", activation)
        super().__init__()
        if padding is None:
            padding = same_padding(kernel_size, dilation)
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.norm = BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.act = ACTIVATIONS[activation](negative_slope)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_traced(self, input):
            return traced(self, input, residual)
        conv, norm, act = self.conv, self.norm, self.act
        name = NAMES.get(type(act))
        if name is not None and type(norm) is BatchNorm2d and not has_hooks(norm, act):
            slope = slope_of(act)
            output = run_as_one(norm, conv, input, residual, name, slope)
            if output is None:
                between, moments = convolve_for(norm, conv, input)
                output = normalise(norm, between, residual, name, slope, moments)
            return output
        output = norm(conv(input))
        return act(output if residual is None else output + residual)
