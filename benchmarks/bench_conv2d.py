"""Convolution layers of SimpleCNN, ResNet-18, ResNet-50 and a YOLO backbone, pass by pass."""

import measure
import pytest
import torch

from gdfast.bench import cases, layers, suites
from gdfast.bench.workload import LAYOUTS

LAYERS = [layer for table in cases.LAYERS.values() for layer in table]
VARIANTS = [f"{side} {layout}" for side in ("ours", "native") for layout in LAYOUTS]


@pytest.mark.benchmark(max_time=0.3, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("variant", VARIANTS, ids=measure.identifier)
@pytest.mark.parametrize("task", layers.PASSES)
@pytest.mark.parametrize("case", LAYERS, ids=measure.identifier)
def test_conv2d(benchmark, case, task, variant):
    measure.run(benchmark, suites.layer_workload, variant, case, task, torch.float32)
