"""Our Triton kernels for GPUs: which queries they take, and which tile runs a convolution.

The kernels are in `gdfast.backends.triton`. Triton is imported when the first query comes, not with
the package. With TRITON_INTERPRET=1 they run in Triton's interpreter, on the CPU too: slowly, for
tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdfast.backends import batch_norm, max_pool2d, sgd
from gdfast.backends.max_pool2d import MaxPool2dQuery
from gdfast.backends.precision import is_strict
from gdfast.backends.registry import (
    Backend,
    BatchNormQuery,
    Conv2dActQuery,
    Conv2dQuery,
    Query,
)
from gdfast.tensor_cores import input_precision

if TYPE_CHECKING:
    from gdfast.backends.triton.bind_conv2d import Problem
    from gdfast.backends.triton.tiles import Tile

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MOST = 2**31 - 1
DEPTHWISE = "depthwise"  # the one way of running a depthwise layer


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


@cache
def missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed: pip install "gdfast[triton]"'
    try:
        import triton  # noqa: F401
    except Exception as error:  # a build for another system fails in many ways
        return f"triton: {error}"
    if is_interpreted():
        return ""
    return "" if torch.cuda.is_available() else "needs CUDA: torch.cuda.is_available() is False"


def why_not(query: Query) -> str:
    device = query.device.type
    if device != "cuda" and not (device == "cpu" and is_interpreted()):
        return f"it takes tensors on a GPU, not on {device}"
    if query.dtype not in _DTYPES:
        return f"it takes {', '.join(_DTYPES.values())}, not {query.dtype}"
    if query.layout is not torch.strided:
        return f"it takes dense tensors, not {query.layout}"
    if isinstance(query, Conv2dQuery):
        if query.geometry.C == 0:
            return "it takes at least one input channel"
        return _problem(query, is_strict()).why_not()
    if isinstance(query, MaxPool2dQuery):
        from gdfast.backends.triton import bind_max_pool2d

        return bind_max_pool2d.why_not(query.geometry, query.strides)
    if isinstance(query, BatchNormQuery) and prod(query.size) > _MOST:
        return "it takes tensors of less than 2^31 elements"
    return ""


def _precision(dtype: torch.dtype, strict: bool) -> str:
    return input_precision(dtype, strict)


def _problem(query: Conv2dQuery, strict: bool) -> Problem:
    return _problem_with(query, _precision(query.dtype, strict))


@lru_cache(maxsize=4096)
def _problem_with(query: Conv2dQuery, precision: str) -> Problem:
    from gdfast.backends.triton.bind_conv2d import Problem

    return Problem(query.geometry, query.strides, query.dtype, query.device, precision)


def candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    """The ways of running one pass that are worth timing, the one expected to be fastest first."""
    tiles = _problem(query, is_strict()).candidates(op)
    # The interpreter's times tell nothing.
    return tuple(map(str, tiles[:1] if is_interpreted() else tiles)) or (DEPTHWISE,)


def algorithm(op: str, query: Conv2dQuery) -> str:
    """The candidate that the cost model gives one pass."""
    return candidates(op, query)[0]


def machine(query: Conv2dQuery) -> str:
    """What times of the query hold for, beside the query itself."""
    import triton

    name = torch.cuda.get_device_name(query.device) if query.device.type == "cuda" else "no GPU"
    return f"{name} triton={triton.__version__} {_precision(query.dtype, is_strict())}"


def _bind(op: str, query: Conv2dQuery, by: str) -> Callable[..., Any]:
    """One pass by the candidate that is named, or by the first."""
    from gdfast.backends.triton import bind_conv2d
    from gdfast.backends.triton.tiles import Tile

    name = by or algorithm(op, query)
    tile: Tile | None = None if name == DEPTHWISE else Tile.named(name)
    binds: dict[str, Callable[..., Callable[..., Any]]] = {
        "conv2d": bind_conv2d.bind_forward,
        "conv2d_act": bind_conv2d.bind_forward,
        "conv2d_grad_input": bind_conv2d.bind_grad_input,
        "conv2d_grad_weight": bind_conv2d.bind_grad_weight,
    }
    bind, strict = binds[op], is_strict()
    ending: tuple[Any, ...] = ()
    if isinstance(query, Conv2dActQuery):
        ending = query.activation, query.negative_slope
    if query.dtype != torch.float32:
        return bind(_problem(query, strict), tile, *ending)
    kernels: dict[str, Callable[..., Any]] = {}
    chosen_under = _precision(torch.float32, strict)

    def kernel(*tensors: Any) -> Any:
        # Whether TF32 is allowed may change between calls, and with it which tiles fit.
        precision = _precision(torch.float32, strict)
        run = kernels.get(precision)
        if run is None:
            problem, fitting = _problem_with(query, precision), tile
            if tile is not None and precision != chosen_under:
                others = problem.candidates(op)
                fitting = tile if tile in others else others[0]
            run = kernels[precision] = bind(problem, fitting, *ending)
        return run(*tensors)

    return kernel


def conv2d(query: Conv2dQuery, by: str = "") -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return _bind("conv2d", query, by)


def conv2d_act(
    query: Conv2dActQuery, by: str = ""
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return _bind("conv2d_act", query, by)


def conv2d_grad_input(query: Conv2dQuery, by: str = "") -> Callable[[Tensor, Tensor], Tensor]:
    return _bind("conv2d_grad_input", query, by)


def conv2d_grad_weight(
    query: Conv2dQuery, by: str = ""
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    return _bind("conv2d_grad_weight", query, by)


BACKEND = Backend(
    name="triton",
    operations={
        "batch_norm_act": batch_norm.triton,
        "batch_norm_act_backward": batch_norm.triton_backward,
        "conv2d": conv2d,
        "conv2d_act": conv2d_act,
        "conv2d_grad_input": conv2d_grad_input,
        "conv2d_grad_weight": conv2d_grad_weight,
        "max_pool2d": max_pool2d.triton,
        "max_pool2d_grad": max_pool2d.triton_grad,
        "sgd_": sgd.triton,
    },
    missing=missing,
    why_not=why_not,
)
