"""Whether Triton's tests can run here: those of kernels need its interpreter, others must not."""

from __future__ import annotations

import importlib.util
import os

import pytest

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(not INSTALLED, reason="needs triton: pip install gdfast[triton]")
if INSTALLED and INTERPRETED:
    import numpy
    import triton

    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    BROKEN = versions[0] < (3, 7) and versions[1] >= (2, 4)
else:
    BROKEN = False
# Kernels decide when they are imported whether they are interpreted, for the whole process.
IN_INTERPRETER = [
    pytest.mark.triton,
    NEEDS_TRITON,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: make triton"),
    pytest.mark.skipif(BROKEN, reason="needs numpy before 2.4: Triton's interpreter before 3.7"),
]
NOT_IN_INTERPRETER = [
    NEEDS_TRITON,
    pytest.mark.skipif(INTERPRETED, reason="needs kernels that are not interpreted"),
]
