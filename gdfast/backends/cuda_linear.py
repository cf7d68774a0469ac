"""Linear layers on the CUDA kernels: which they take, and plans of them.

Native PyTorch asks a library for the best kernel at every call, twice more in backward, which takes
longer than the products do in a step of a small model. These have one launch each way. Under
autocast they read float32 as it is and write float32 gradients: nothing is cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import plans
from gdfast.backends.max_pool2d import DTYPES
from gdfast.backends.plans import NONE, Draft, Plan

_HALF_TYPES = {torch.bfloat16, torch.float16}
# Rows of weight that are multiplied one by one; more go by tiles, which are of half types.
_MOST_OUTPUTS = 32
_LEAST_COLUMNS = 64
# Above these the GPU's time counts, and native's kernels take less of it.
_MOST_PRODUCTS = 2**26
_MOST_WIDE_PRODUCTS = 2**29
_MOST_WIDE_WEIGHTS = 2**22
_EIGHTH = 8  # of so many elements are wide layers' vectors
_MOST_PLANS = 64


def fits_layer(in_features: int, out_features: int) -> bool:
    """Whether the kernels may be the faster way for a layer on a GPU, for some batches."""
    if native.cuda is None or in_features < _LEAST_COLUMNS:
        return False
    return 1 <= out_features <= _MOST_OUTPUTS or (
        in_features % _EIGHTH == out_features % _EIGHTH == 0
        and in_features * out_features <= _MOST_WIDE_WEIGHTS
    )


def find(
    input: Tensor, weight: Tensor, bias: Tensor | None, cast: torch.dtype | None
) -> Layer | None:
    """What runs a layer on ordinary tensors like these, where the kernels take them and are the
    faster way; `cast` is the type that autocast asks for, if it does.
    """
    if native.cuda is None or input.dim() != 2 or weight.dim() != 2:
        return None
    (N, C), (K, columns), device = input.shape, weight.shape, input.device
    dtype = input.dtype if cast is None or input.dtype == torch.float64 else cast
    is_wide = K > _MOST_OUTPUTS
    most = _MOST_WIDE_PRODUCTS if is_wide else _MOST_PRODUCTS
    if not (
        device.type == ("cpu" if native.cuda_is_simulated else "cuda")
        and columns == C
        and fits_layer(C, K)
        and 1 <= N * C * K <= most
        and (cast is not None or weight.dtype == input.dtype)  # else native raises
        and _has_kernels(input.dtype, weight.dtype, dtype, is_wide)
        and weight.device == device
        and input.stride(1) == 1
        and not (is_wide and input.stride(0) % _EIGHTH)
        and weight.is_contiguous()
    ):
        return None
    if bias is not None and not (
        bias.shape == (K,)
        and bias.dtype == weight.dtype
        and bias.device == device
        and bias.is_contiguous()
    ):
        return None
    if native.cuda.why_not_device(device.index or 0):
        return None
    return Layer(input, weight, bias, dtype)


def _has_kernels(
    input: torch.dtype, weight: torch.dtype, output: torch.dtype, is_wide: bool
) -> bool:
    if is_wide and output not in _HALF_TYPES:
        return False
    if weight == output:
        return input == output and output in DTYPES
    return output in _HALF_TYPES and weight == torch.float32 and input in (output, torch.float32)


class Layer:
    """A linear layer on tensors of certain sizes, strides and dtypes."""

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        assert native.cuda is not None
        (N, C), (K, _) = input.shape, weight.shape
        self.dtypes = input.dtype, weight.dtype
        self._sizes, self._dtype, self._device = (N, C, K), dtype, input.device
        self._strides = input.stride()
        self._problem = native.cuda.LinearProblem(
            N, C, K, input.stride(0), *(DTYPES[t] for t in (*self.dtypes, dtype))
        )
        self._place = plans.place(input.device, True)
        draft = Draft(3)
        output = draft.fresh(self._new(dtype, N, K))
        launch = native.cuda.linear_launch(self._problem)
        draft.launch(launch, 0, 1, NONE if bias is None else 2, output)
        self._align(draft, 0, 1)
        self._forward = draft.plan((output,), device=input.device)
        # By facts of grad_output, input and weight, and which gradients are wanted.
        self._backward: dict[Any, Plan | None] = {}

    def _new(self, dtype: torch.dtype, *size: int) -> partial[Tensor]:
        return partial(torch.empty, size, dtype=dtype, device=self._device)

    def _align(self, draft: Draft, *tensors: int) -> None:
        if self._problem.needs_alignment:
            draft.align(*tensors)

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output, or None where an address is not as the kernels need it."""
        results = self._forward((input, weight, bias), 0.0, *self._place())
        return None if results is None else results[0]

    def gradients(
        self, facts: Any, tensors: tuple[Any, ...], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...] | None:
        """The gradients of input, weight and bias that are needed, of grad_output, input and
        weight; or None where these are not as the kernels need them. `facts` are theirs.
        """
        key = facts, needs
        if key not in self._backward:
            if len(self._backward) >= _MOST_PLANS:
                self._backward.clear()
            self._backward[key] = self._backward_plan(*tensors, *needs[:3])
        plan = self._backward[key]
        return None if plan is None else plan(tensors, 0.0, *self._place())

    def _backward_plan(
        self, grad_output: Tensor, input: Tensor | None, weight: Tensor | None, *needs: bool
    ) -> Plan | None:
        assert native.cuda is not None
        N, C, K = self._sizes
        input_dtype, weight_dtype = self.dtypes
        of_input, of_weight, of_bias = needs
        as_expected = (
            self._is(grad_output, self._dtype, (N, K), (K, 1))
            and not (of_weight and not self._is(input, input_dtype, (N, C), self._strides))
            and not (of_input and not self._is(weight, weight_dtype, (K, C), (C, 1)))
        )
        if not as_expected:
            return None
        draft = Draft(3)
        results = (
            draft.fresh(self._new(input_dtype, N, C)) if of_input else NONE,
            draft.fresh(self._new(weight_dtype, K, C)) if of_weight else NONE,
            draft.fresh(self._new(weight_dtype, K)) if of_bias else NONE,
        )
        given = 0, 1 if of_weight else NONE, 2 if of_input else NONE
        draft.launch(native.cuda.linear_backward_launch(self._problem), *given, *results)
        self._align(draft, *given)
        return draft.plan(results, device=self._device)

    def _is(self, tensor: Any, dtype: torch.dtype, size: Any, strides: Any) -> bool:
        return (
            tensor is not None
            and tensor.dtype == dtype
            and tensor.shape == size
            and tensor.stride() == strides
            and tensor.device == self._device
        )
