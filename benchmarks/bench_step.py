"""Whole training steps: zero_grad, forward, loss, backward, SGD step."""

import measure
import pytest
import torch

from gdfast.bench import cases, suites
from gdfast.bench.workload import LAYOUTS

# Native's SGD variant is the quickest one for the model, which only the workload knows.
VARIANTS = [f"{side} {layout}" for side in ("ours", "native") for layout in LAYOUTS]


@pytest.mark.benchmark(max_time=0.5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("variant", VARIANTS, ids=measure.identifier)
@pytest.mark.parametrize("case", cases.STEPS, ids=measure.identifier)
def test_step(benchmark, case, variant):
    measure.run(benchmark, suites.step_workload, variant, case, torch.float32)
