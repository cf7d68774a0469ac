"""Models of the package on the Triton kernels, in the interpreter, against native layers."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from torch import Tensor
from triton_here import IN_INTERPRETER

import gdfast
from gdfast import models, self_test
from gdfast.bench.workload import relative_error
from gdfast.doctor import examine
from gdfast.models.resnet import CifarResNet
from gdfast.models.yolo_lite import YoloLiteBackbone

pytestmark = [
    *IN_INTERPRETER,
    pytest.mark.usefixtures("fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
# No layer is there twice: a ResNet's three stages have one block each, and YOLO-lite ends where the
# channels alone would grow.
MODELS = {
    "cnn": (lambda: models.create("cnn"), (2, 1, 28, 28)),
    "resnet": (lambda: CifarResNet(8, num_classes=4, in_channels=1), (2, 1, 8, 8)),
    "yolo_lite": (
        lambda: torch.nn.Sequential(*islice(YoloLiteBackbone().children(), 3)),
        (1, 3, 16, 16),
    ),
}


def test_the_doctor_tests_the_kernels() -> None:
    report = examine()
    checks = [check for check in report["self_test"] if check["backend"] == "triton"]
    assert [check["operation"] for check in checks] == list(self_test._operations())
    assert all(check["ok"] and check["error"] < 1e-6 for check in checks)


def step(model: torch.nn.Module, images: Tensor, backend: str) -> dict[str, Tensor]:
    with gdfast.backend(backend):
        model.zero_grad()
        output = model(images)
        output.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach()} | {n: g.clone() for n, g in grads.items() if g is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_native_layers(name: str) -> None:
    build, size = MODELS[name]
    torch.manual_seed(0)
    model = build()
    # In evaluation: statistics of few pixels make a model chaotic.
    model.eval()
    gdfast.swap_(model, fuse=True)
    images = torch.randn(size)
    exact = step(copy.deepcopy(model).double(), images.double(), "native")
    natives = step(copy.deepcopy(model), images, "native")
    ours = step(copy.deepcopy(model), images, "triton")
    assert ours.keys() == exact.keys()
    for part, expected in exact.items():
        allowed = 3 * relative_error(natives[part], expected) + 2e-6
        assert relative_error(ours[part], expected) <= allowed, part
