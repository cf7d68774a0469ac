"""Our CUDA kernels: convolution, normalisation, pooling and the fused SGD update.

With GDFAST_CUDA_SIMULATE=1 a simulator runs them, on tensors of the CPU alone: slowly, for tests.
"""

from __future__ import annotations

from functools import cache

import torch

from gdfast import native
from gdfast.backends import batch_norm, cuda_candidates, cuda_conv2d, cuda_stream, max_pool2d, sgd
from gdfast.backends.cuda_candidates import algorithm, candidates
from gdfast.backends.cuda_tiles import machine
from gdfast.backends.max_pool2d import MaxPool2dQuery
from gdfast.backends.registry import Backend, BatchNormQuery, Conv2dQuery, Query

__all__ = ["BACKEND", "algorithm", "candidates", "machine", "missing", "why_not"]


def missing() -> str:
    if native.cuda is None:
        return f"gdfast._cuda: {native.failure('cuda')}"
    if native.cuda_is_simulated:
        return ""
    return "" if torch.cuda.is_available() else "needs CUDA: torch.cuda.is_available() is False"


@cache
def _why_not_device(device: torch.device) -> str:
    assert native.cuda is not None
    return str(native.cuda.why_not_device(cuda_stream.current(device)[0]))


def why_not(query: Query) -> str:
    if native.cuda_is_simulated and query.device.type != "cpu":
        return f"its simulator takes tensors on the CPU, not on {query.device.type}"
    if not native.cuda_is_simulated and query.device.type != "cuda":
        return f"it takes tensors on a GPU, not on {query.device.type}"
    if reason := _why_not_device(query.device):
        return reason
    if query.dtype not in sgd.DTYPES:
        return f"it takes {', '.join(sgd.DTYPES.values())}, not {query.dtype}"
    if query.layout is not torch.strided:
        return f"it takes dense tensors, not {query.layout}"
    if isinstance(query, Conv2dQuery):
        return cuda_candidates.why_not(query)
    if isinstance(query, BatchNormQuery):
        return batch_norm.cuda_why_not(query)
    if isinstance(query, MaxPool2dQuery):
        return max_pool2d.cuda_why_not(query)
    return ""


BACKEND = Backend(
    name="cuda",
    operations={
        "batch_norm_act": batch_norm.CudaForward,
        "batch_norm_act_backward": batch_norm.cuda_backward,
        "conv2d": cuda_conv2d.conv2d,
        "conv2d_act": cuda_conv2d.conv2d,
        "conv2d_grad_input": cuda_conv2d.conv2d_grad_input,
        "conv2d_grad_weight": cuda_conv2d.conv2d_grad_weight,
        "max_pool2d": max_pool2d.cuda,
        "max_pool2d_grad": max_pool2d.cuda_grad,
        "sgd_": sgd.cuda,
    },
    missing=missing,
    why_not=why_not,
)
