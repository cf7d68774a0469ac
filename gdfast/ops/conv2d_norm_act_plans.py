"""Plans of the kernels that a convolution with the norm behind it runs, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdfast.backends import cpu_conv2d_norm
from gdfast.backends.batch_norm import CudaForward
from gdfast.backends.cuda_operands import plan_cast
from gdfast.backends.plans import NONE, Draft, Plan, draft_of


def forward_plan(
    conv: Any, norm: Any, tensors: Sequence[Any], between: Tensor, *, training: bool,
    has_moments: bool, wants_mask: bool, casts: bool = False,
) -> Plan | None:  # fmt: skip
    """A plan that takes the nine tensors of `conv2d_norm_act.Tensors`, and gives output, the
    convolution's output, mean, invstd, mask, and None; or None where kernels or tensors do not
    allow it. A plan that `casts` takes the weight in float32, on a GPU, and gives the weight of the
    input's type in the place of that None.
    """
    _, _, bias, *params, residual, batches = tensors
    draft_conv, draft_norm = draft_of(conv), draft_of(norm)
    if draft_conv is None or draft_norm is None or not _are_packed(bias, *params):
        return None
    if not _lie_alike(between, residual) or not _is_counter(batches, between):
        return None
    draft = Draft(len(tensors))
    given, weight = _numbers(tensors), NONE
    if casts:
        given[1] = weight = _cast_weight(draft, 1, tensors[1], tensors[0].dtype)
    if isinstance(norm, CudaForward):
        made = draft_conv(draft, *given[:3], has_moments)
        if made is None:
            return None
        made, moments, splits = made
        *results, mask = draft_norm(
            draft, made, *given[3:], moments=moments, splits=splits, wants_mask=wants_mask
        )
    else:
        made, mask = draft_conv(draft, *given[:3]), NONE
        results = draft_norm(draft, made, *given[3:])
        if launch := cpu_conv2d_norm.forward_launch(conv, norm):
            draft.join(2, launch)
    output, mean, invstd = results
    written = [each for each in (*given[5:7], given[-1]) if each != NONE]
    results = output, made, mean, invstd, mask, weight
    return draft.plan(results, written if training else (), between.device)


def backward_plan(
    norm: Any, conv_input: Any, conv_weight: Any, grad_output: Tensor, saved: Sequence[Any],
    needs: Sequence[bool], weight_like: Tensor | None = None,
) -> Plan | None:  # fmt: skip
    """A plan that takes grad_output and what was saved, and gives the gradients of input, weight
    and bias and of the norm's weight, bias and residual; `needs` tells for the function's inputs
    which are asked for. None where kernels or tensors do not allow it. With `weight_like` the
    weight's gradient is made float32, as that is.
    """
    _, _, image, *params, other, _, _ = saved
    of_norm, of_input, of_weight = map(draft_of, (norm, conv_input, conv_weight))
    if of_norm is None or of_weight is None or (needs[0] and of_input is None):
        return None
    is_image = other is not None and other.dim() == image.dim()  # and no mask
    images = [grad_output, other] if is_image else [grad_output]
    if not _are_packed(*params) or not _lie_alike(image, *images):
        return None
    draft = Draft(1 + len(saved))
    launch = cpu_conv2d_norm.backward_launch(norm, conv_input, conv_weight) if needs[0] else None
    # Where all is one, the gradient between norm and convolution is never stored.
    wanted = launch is None, needs[3], needs[4], needs[7]
    output, input, weight, *rest = _numbers((grad_output, *saved))
    grad, *of_params = of_norm(draft, output, *rest, wanted=wanted)
    grad_input = of_input(draft, grad, weight) if needs[0] and of_input is not None else NONE
    # Some kernels store what is rounded as float32 themselves.
    wide = weight_like is not None and not needs[2] and getattr(conv_weight, "drafts_wide", False)
    gradients = of_weight(draft, grad, input, needs[2], *([True] if wide else []))
    if grad_input is None or gradients is None:
        return None
    if launch is not None:
        draft.join(3, launch)
    if weight_like is not None and not wide:
        grad_weight, *rest_of = gradients
        gradients = _cast_weight(draft, grad_weight, weight_like, image.dtype, False), *rest_of
    return draft.plan((grad_input, *gradients, *of_params), device=image.device)


def _cast_weight(
    draft: Draft, number: int, weight: Tensor, half: torch.dtype, to_half: bool = True
) -> int:
    to = half if to_half else torch.float32
    return plan_cast(draft, number, weight.shape, weight.stride(), to, half, weight.device)


def _numbers(tensors: Sequence[Any]) -> list[int]:
    return [NONE if tensor is None else number for number, tensor in enumerate(tensors)]


def _are_packed(*params: Tensor | None) -> bool:
    return all(param is None or param.is_contiguous() for param in params)


def _lie_alike(first: Tensor, *images: Tensor | None) -> bool:
    """Whether all are dense, in the memory order of the first."""
    layout = torch.channels_last
    is_dense = first.is_contiguous() or first.is_contiguous(memory_format=layout)
    strides = first.stride()
    return is_dense and all(each is None or each.stride() == strides for each in images)


def _is_counter(batches: Tensor | None, like: Tensor) -> bool:
    """Whether kernels can count batches in a tensor, if there is one."""
    if batches is None:
        return True
    return batches.dtype == torch.int64 and batches.dim() == 0 and batches.device == like.device
