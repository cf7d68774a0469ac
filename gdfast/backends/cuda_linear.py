"""Linear layers as plans of CUDA kernels: small ones, whose host's time is what a step waits for.

Native PyTorch has cuBLAS look for a kernel at each call, which takes ten times as long as the
product: on a slow host 250 us forward and twice 120 backward. Layers of few outputs have kernels of
their own, others in half types are 1x1 convolutions of images of one pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_conv2d
from gdfast.backends.cuda_candidates import candidates, why_not
from gdfast.backends.cuda_operands import plan_cast
from gdfast.backends.plans import NONE, Draft, Plan, draft_of
from gdfast.backends.registry import Conv2dQuery
from gdfast.backends.sgd import DTYPES, HALF_TYPES
from gdfast.geometry import Conv2dGeometry, dense_strides

_FEW = 16  # outputs
_MOST_ROWS = 512  # of the kernels for few
# Above these the product takes long enough to be worth cuBLAS's search.
_MOST_PRODUCTS_OF_FEW = 1 << 23
_MOST_PRODUCTS = 1 << 26


def fits_layer(in_features: int, out_features: int) -> bool:
    """Whether a batch of a layer may be small enough."""
    return 1 <= in_features * out_features <= _MOST_PRODUCTS


class Layer(NamedTuple):
    """A layer of a batch [N, C], contiguous as all of its tensors are; `dtype` is what it is
    computed in. Where that is not the weight's, that and the bias are cast, from float32."""

    N: int
    C: int
    K: int
    dtype: torch.dtype
    device: torch.device
    casts: bool

    def fits(self) -> bool:
        """Whether plans take it."""
        N, C, K, dtype, _, casts = self
        if native.cuda is None or (casts and dtype not in HALF_TYPES) or min(N, C, K) < 1:
            return False
        if K <= _FEW:
            is_small = N <= _MOST_ROWS and N * C * K <= _MOST_PRODUCTS_OF_FEW
            return is_small and dtype in (torch.float32, *HALF_TYPES)
        if dtype not in HALF_TYPES or N * C * K > _MOST_PRODUCTS:
            return False
        return not why_not(self.query())

    def query(self) -> Conv2dQuery:
        """That of the convolution."""
        N, C, K, dtype, device, _ = self
        sizes = (N, C, 1, 1), (K, C, 1, 1), (N, K, 1, 1)
        geometry = Conv2dGeometry.of("linear", *sizes[:2], (1, 1), (0, 0, 0, 0), (1, 1), 1)
        x, w, y = (dense_strides(size, True) for size in sizes)
        return Conv2dQuery(device, dtype, geometry=geometry, strides=(x, w, y))

    def _empty(self, *size: int, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
        return partial(torch.empty, size, dtype=dtype or self.dtype, device=self.device)

    def _cast(self, draft: Draft, tensor: int, size: tuple[int, ...], to_half: bool) -> int:
        if not self.casts or tensor == NONE:
            return tensor
        strides = [*size[1:], 1]
        to = self.dtype if to_half else torch.float32
        return plan_cast(draft, tensor, size, strides, to, self.dtype, self.device)

    def forward(self, has_bias: bool) -> Plan | None:
        """A plan that takes input, weight and bias, and gives the output and the weight where it
        was cast, else None."""
        assert native.cuda is not None
        N, C, K, *_ = self
        draft = Draft(3)
        draft.align(0, 1)
        weight = self._cast(draft, 1, (K, C), True)
        bias = self._cast(draft, 2 if has_bias else NONE, (K,), True)
        make_output = self._empty(N, K)
        if K <= _FEW:
            output = draft.fresh(make_output)
            launch = native.cuda.linear_launch(N, C, K, DTYPES[self.dtype])
            draft.launch(launch, 0, weight, bias, output)
        else:
            made = self._convolve(draft, "conv2d", [make_output], 0, weight, bias, False)
            if made is None:
                return None
            output, *_ = made
        results = output, weight if self.casts else NONE
        return draft.plan(results, device=self.device)

    def backward(self, needs: Sequence[bool]) -> Plan | None:
        """A plan that takes grad_output and what a layer saves, and gives the gradients of its
        tensors, and a None."""
        assert native.cuda is not None
        N, C, K, *_ = self
        need_input, need_weight, need_bias = needs[:3]
        draft = Draft(3)
        draft.align(0, 1, 2)
        makers = self._empty(N, C), self._empty(K, C), self._empty(K)
        grads = [NONE, NONE, NONE]
        if K <= _FEW:
            grads = [
                draft.fresh(make) if need else NONE
                for make, need in zip(makers, needs, strict=False)
            ]
            launch = native.cuda.linear_backward_launch(N, C, K, DTYPES[self.dtype])
            given = 1 if need_weight else NONE, 2 if need_input else NONE
            draft.launch(launch, 0, *given, *grads)
        else:
            if need_input:
                made = self._convolve(draft, "conv2d_grad_input", [makers[0]], 0, 2)
                if made is None:
                    return None
                grads[0] = made
            if need_weight:
                of_weight = list(makers[1:])
                made = self._convolve(draft, "conv2d_grad_weight", of_weight, 0, 1, need_bias)
                if made is None:
                    return None
                grads[1:] = made
            elif need_bias:
                return None
        input, weight, bias = grads
        weight = self._cast(draft, weight, (K, C), False)
        bias = self._cast(draft, bias, (K,), False)
        return draft.plan((input, weight, bias, NONE), device=self.device)

    def _convolve(
        self, draft: Draft, op: str, results: list[Callable[[], Tensor]], *arguments: Any
    ) -> Any:
        """What the draft of the first way that has one gives, with results made by these."""
        query = self.query()
        for by in candidates(op, query):
            make = draft_of(getattr(cuda_conv2d, op)(query, by))
            if make is not None:
                made = make(_Results(draft, results), *arguments)
                if made is not None:
                    return made
        return None


class _Results:
    """A draft whose fresh tensors are of other sizes: images of one pixel are rows."""

    def __init__(self, draft: Draft, makers: list[Callable[[], Tensor]]) -> None:
        self._makers = iter(makers)
        self.align, self.scratch, self.launch = draft.align, draft.scratch, draft.launch
        self._fresh = draft.fresh

    def fresh(self, _: Callable[[], Tensor]) -> int:
        return self._fresh(next(self._makers))
