"""What a launch that fails says: the operation, what went wrong, and of which sizes and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gdfast import native, ops
from gdfast.backends.cuda_stream import current

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("fresh_registry"),
    pytest.mark.skipif(not native.cuda_is_simulated, reason="needs `make cuda-simulator`"),
]

CONV2D = "[2, 4, 6, 5], weight [8, 2, 3, 3], stride [2, 1], padding [1, 0], dilation [1, 1], groups"
DEPTHWISE = CONV2D.replace("[8, 2,", "[8, 1,")
BATCH_NORM, MAX_POOL = "[2, 4, 30]", "[2, 4, 6, 5], window [3, 2], stride [2, 1]"


def conv2d(groups: int, which: str) -> None:
    input, weight = torch.ones(2, 4, 6, 5), torch.ones(8, 4 // groups, 3, 3)
    settings = (2, 1), (1, 0, 1, 0), (1, 1), groups, "cuda"
    grad, operations = torch.ones(2, 8, 3, 3), torch.ops.gdfast
    if which == "conv2d":
        operations.conv2d(input, weight, None, *settings)
    elif which == "conv2d_grad_input":
        operations.conv2d_grad_input(grad, weight, input.shape, False, *settings)
    else:
        operations.conv2d_grad_weight(grad, input, weight.shape, False, True, *settings)


def batch_norm(which: str) -> None:
    problem = native.cuda.BatchNormProblem(2, 4, 30, False, "float16", "float32", "none", 0.0, 1e-5)
    if which == "batch_norm_act":
        native.cuda.batch_norm(problem, *[0] * 10, True, 0.1, 0, 0, 0, *current(CPU))
    else:
        addresses = [0] * 7 + [16] + [0] * 3  # only the gradient in the input is wanted
        native.cuda.batch_norm_backward(problem, *addresses, True, "input", 0, *current(CPU))


def max_pool2d(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = torch.ones(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    if backward:
        monkeypatch.delenv(ORDER)
    output = ops.max_pool2d(leaf, (3, 2), (2, 1), backend="cuda")
    monkeypatch.setenv(ORDER, "none")
    output.sum().backward()


CPU = torch.device("cpu")
ORDER = "GDFAST_CUDA_SIMULATOR_ORDER"  # looked at by every launch, and refused by it
LAUNCHES: dict[str, tuple[Callable[..., object], str]] = {
    **{
        name: (lambda patch, name=name: conv2d(2, name), f"float32, input {CONV2D} 2")
        for name in ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")
    },
    **{
        f"depthwise {name}": (
            lambda patch, name=name: conv2d(4, name), f"float32, input {DEPTHWISE} 4",
        )
        for name in ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")
    },
    **{
        name: (lambda patch, name=name: batch_norm(name), f"float16, input {BATCH_NORM}")
        for name in ("batch_norm_act", "batch_norm_act_backward")
    },
    "max_pool2d": (lambda patch: max_pool2d(False, patch), f"float64, input {MAX_POOL}"),
    "max_pool2d_grad": (lambda patch: max_pool2d(True, patch), f"float64, input {MAX_POOL}"),
    "sgd_": (
        lambda patch: ops.sgd_([torch.ones(5), torch.ones(2, 3)], [torch.ones(5), torch.ones(2, 3)],
                               lr=0.1, backend="cuda"),
        "float32, 2 params of 11 elements in all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_operation_and_its_sizes_are_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, sizes = LAUNCHES[name]
    monkeypatch.setenv(ORDER, "none")
    with pytest.raises(RuntimeError) as told:
        launch(monkeypatch)
    text = str(told.value)
    assert text.startswith(name.split()[-1]) and f"{ORDER}: expected ascending" in text
    assert text.endswith(f"got none ({sizes})")


def test_a_grid_that_is_too_large() -> None:
    channels = 70_000
    problem = native.cuda.Conv2dProblem(
        (1, channels, 1, 1, channels, 1, 1, 1, 1), (1, 1), (0, 0), (1, 1), channels, "bfloat16",
        *[(channels, 1, 1, 1)] * 3,
    )  # fmt: skip
    way = native.cuda.Conv2dWay("ieee", "64x64")
    expected = r"^conv2d: CUDA simulator: grid: .* \(bfloat16, input \[1, 70000, 1, 1\], weight"
    with pytest.raises(RuntimeError, match=expected):
        native.cuda.conv2d(problem, way, *[0] * 6, *current(CPU))
