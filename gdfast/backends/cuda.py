"""Our CUDA kernels: the fused SGD update; convolutions on a GPU run on native PyTorch.

With GDFAST_CUDA_SIMULATE=1 a simulator runs them, on tensors of the CPU alone: slowly, for tests.
"""

from __future__ import annotations

import torch

from gdfast import native
from gdfast.backends import sgd
from gdfast.backends.registry import Backend, Query


def missing() -> str:
    if native.cuda is None:
        return f"gdfast._cuda: {native.failure('cuda')}"
    if native.cuda_is_simulated:
        return ""
    return "" if torch.cuda.is_available() else "needs CUDA: torch.cuda.is_available() is False"


def why_not(query: Query) -> str:
    if native.cuda_is_simulated and query.device.type != "cpu":
        return f"its simulator takes tensors on the CPU, not on {query.device.type}"
    if not native.cuda_is_simulated and query.device.type != "cuda":
        return f"it takes tensors on a GPU, not on {query.device.type}"
    if query.dtype not in sgd.DTYPES:
        return f"it takes {', '.join(sgd.DTYPES.values())}, not {query.dtype}"
    return ""


BACKEND = Backend(name="cuda", operations={"sgd_": sgd.cuda}, missing=missing, why_not=why_not)
