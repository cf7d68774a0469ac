"""1x1 convolution in NCHW by Hopper's tensor cores, without copies."""

from __future__ import annotations

from typing import Any

from gdfast import native

NAME = "hopper-planes"


def why_not(op: str, problem: Any) -> str:
    """Why the kernel does not run one pass, or ""."""
    assert native.cuda is not None
    if op == "conv2d_grad_weight":
        return str(native.cuda.conv2d_grad_weight_planes_why_not(problem))
    return str(native.cuda.conv2d_planes_why_not(problem, op == "conv2d_grad_input"))
