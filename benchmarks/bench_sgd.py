"""SGD updates of 10 thousand to 25 million parameters, in one tensor and in ResNet-50's 161."""

import measure
import pytest
import torch

from gdfast.bench import cases, sgd, suites

VARIANTS = ["ours SGD", *(f"native {name}" for name in sgd.native_variants(torch.float32))]


@pytest.mark.benchmark(max_time=0.3, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("variant", VARIANTS, ids=measure.identifier)
@pytest.mark.parametrize("case", cases.SGD_CASES, ids=measure.identifier)
def test_sgd(benchmark, case, variant):
    measure.run(benchmark, suites.sgd_workload, variant, case, torch.float32)
