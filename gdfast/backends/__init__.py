"""The ways of running an operation, and the choice between them.

cpu        our kernels for x86 and other processors
cuda       our kernels for NVIDIA GPUs
triton     our kernels for GPUs in Triton's language
reference  native PyTorch ("native" is another name for it); it takes everything
"""

from gdfast.backends import cpu, cuda, reference, triton_backend, tuning
from gdfast.backends import precision as _precision
from gdfast.backends.precision import is_strict, precision
from gdfast.backends.registry import (
    Availability,
    Backend,
    BatchNormQuery,
    Conv2dActQuery,
    Conv2dQuery,
    Query,
    available,
    backend,
    canonical,
    choose_from_environment,
    chosen,
    fall_back,
    preview,
    register,
    resolve,
)
from gdfast.backends.tuning import autotune

__all__ = [
    "Availability",
    "Backend",
    "BatchNormQuery",
    "Conv2dActQuery",
    "Conv2dQuery",
    "Query",
    "autotune",
    "available",
    "backend",
    "canonical",
    "chosen",
    "fall_back",
    "is_strict",
    "precision",
    "preview",
    "register",
    "resolve",
    "tuning",
]

for _module in (cpu, cuda, triton_backend, reference):
    register(_module.BACKEND)
choose_from_environment()
_precision.choose_from_environment()
tuning.choose_from_environment()
