"""Batch normalisation with ReLU, and with a residual: both directions in both layouts."""

import measure
import pytest
import torch

from gdfast.bench import cases, norm, suites

VARIANTS = [f"{side} {layout}" for side in ("ours", "native") for layout in norm.LAYOUTS]


@pytest.mark.benchmark(max_time=0.3, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("variant", VARIANTS, ids=measure.identifier)
@pytest.mark.parametrize("task", norm.PASSES)
@pytest.mark.parametrize("case", cases.NORM_CASES, ids=measure.identifier)
def test_norm(benchmark, case, task, variant):
    measure.run(benchmark, suites.norm_workload, variant, case, task, torch.float32)
