"""Whole training steps: zero_grad, forward, loss, backward, SGD step."""

import measure
import pytest
import torch

from gdfast.bench import cases, sgd, suites
from gdfast.bench.workload import LAYOUTS

VARIANTS = [
    *(f"ours {layout}" for layout in LAYOUTS),
    *(f"native {layout} {name}" for layout in LAYOUTS
      for name in sgd.native_variants(torch.float32)),
]  # fmt: skip


@pytest.mark.benchmark(max_time=0.5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("variant", VARIANTS, ids=measure.identifier)
@pytest.mark.parametrize("case", cases.STEPS, ids=measure.identifier)
def test_step(benchmark, case, variant):
    measure.run(benchmark, suites.step_workload, variant, case, torch.float32)
