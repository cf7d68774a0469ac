"""The entries of each row that benchmarks/gpu_layers.py fills, in the order of measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu_goals import BOTH_LAYOUTS, TRITON_RIVALS
from gpu_work import Where, Work, layer, norm_both_ways, tiny, training, update

from gdfast.bench.cases import (
    RESNET50,
    SGD_CASES,
    Conv2dCase,
    NormCase,
    SgdCase,
    StepCase,
)

PASSES = ("forward", "grad_input", "grad_weight")
_IMAGES = 256
_FEWER_IMAGES = 64  # where native takes long


@dataclass(frozen=True)
class Entry:
    """One thing that is timed."""

    row: str
    name: str
    task: str
    build: Callable[[Where], Work]
    layout: str = "channels_last"

    def __str__(self) -> str:
        return f"{self.row}: {self.name}, {self.task}"


def entries(dry: bool = False) -> list[Entry]:
    """All that is timed, row by row; in a dry run one of each kind."""
    found = list(_entries(dry))
    if not dry:
        return found
    first: dict[tuple[str, str, str], Entry] = {}
    for entry in found:
        first.setdefault((entry.row, entry.task, entry.layout), entry)
    return list(first.values())


def _entries(dry: bool) -> Iterator[Entry]:
    # The layers that take most of a step come first.
    for case in sorted(RESNET50, key=lambda case: -case.count * case.flops):
        yield from _passes("ResNet-50 layers", case.with_batch(_IMAGES), dry)
    size = 32 if dry else 224
    big = StepCase("ResNet-50, N=256", "resnet50", 2 if dry else _IMAGES, 3, size, size, 1000)
    if dry:
        big = StepCase("ResNet-20, N=2", "resnet20", 2, 3, 16, 16, 10)
    yield _step("ResNet-50 step", big, amp=True)
    yield _step("ResNet-50 step", big, amp=True, place="graph")
    for C, pixels, residual in (
        (256, 56, True), (64, 56, False), (512, 28, True), (128, 28, False), (64, 112, False),
        (1024, 14, True), (2048, 7, True),
    ):  # fmt: skip
        size_of = (2, 4, 6, 5) if dry else (_IMAGES, C, pixels, pixels)
        norm = NormCase(size_of, residual)
        build = partial(norm_both_ways, case=norm, dtype=torch.bfloat16)
        yield Entry("BatchNorm + ReLU", norm.name, "both ways", build)
    for C, pixels, size in ((144, 56, 3), (576, 14, 3), (240, 28, 5), (384, 28, 7)):
        depthwise = _square(f"{size}x{size} {C} @{pixels}", C, pixels, size, C, 128)
        for layout in ("channels_last", "NCHW"):
            yield from _passes("depthwise", depthwise, dry, layout=layout)
    sgd = SgdCase("3 tensors", (10, 300, 1)) if dry else SGD_CASES[-1]
    yield Entry("SGD", sgd.name, "update", partial(update, case=sgd))
    for name, model, N, C, pixels, classes, amp in (
        ("ResNet-18, N=32", "resnet18", 32, 3, 224, 1000, True),
        ("SimpleCNN, N=64", "cnn", 64, 1, 28, 10, False),
    ):
        if dry and model != "cnn":
            continue
        small = StepCase(name, model, 2 if dry else N, C, pixels, pixels, classes)
        yield _step("small steps", small, amp=amp)
        yield _step("small steps", small, amp=amp, place="graph")
    for C, pixels in ((128, 56), (256, 28), (512, 14), (1024, 7)):  # ResNeXt-50 32x4d
        grouped = _square(f"3x3 {C} @{pixels}, 32 groups", C, pixels, 3, 32, _FEWER_IMAGES)
        yield from _passes("grouped", grouped, dry)
    for C, pixels in ((64, 56), (128, 28), (256, 14), (512, 7)):
        dense = _square(f"3x3 {C} @{pixels}", C, pixels, 3, 1, _FEWER_IMAGES)
        yield from _passes("float32 3x3", dense, dry, torch.float32)
    bottleneck = _square("3x3 64 @56", 64, 56, 3, 1, _IMAGES)
    wide = _square("3x3 256 @14", 256, 14, 3, 1, _IMAGES)
    for dense in (bottleneck, Conv2dCase("1x1 64->256 @56", _IMAGES, 64, 56, 56, 256, 1, 1)):
        yield from _passes("NCHW layers", dense, dry, layout="NCHW")
    for place in ("hooks", "in backward"):
        yield _step("ResNet-50 step, updated in backward", big, amp=True, place=place)
    for place in ("step", "graph"):
        yield _step("ResNet-50 step, compiled", big, amp=True, rival="compile", place=place)
    for dense in (bottleneck, wide):
        yield from _passes("Triton rivals", dense, dry, rivals=TRITON_RIVALS)


def _square(name: str, C: int, pixels: int, size: int, groups: int, N: int) -> Conv2dCase:
    padding = (size // 2, size // 2)
    return Conv2dCase(name, N, C, pixels, pixels, C, size, size, padding=padding, groups=groups)


def _passes(
    row: str, case: Conv2dCase, dry: bool, dtype: torch.dtype = torch.bfloat16,
    layout: str = "channels_last", rivals: tuple[str, ...] = (),
) -> Iterator[Entry]:  # fmt: skip
    case = tiny(case) if dry else case
    for task in PASSES:
        build = partial(
            layer, case=case, task=task, dtype=dtype, layout=layout,
            also_nchw=row in BOTH_LAYOUTS, rivals=rivals,
        )  # fmt: skip
        yield Entry(row, case.name, task, build, layout)


def _step(
    row: str, case: StepCase, amp: bool, rival: str = "eager", place: str = "step"
) -> Entry:  # fmt: skip
    build = partial(training, case=case, amp=amp, rival=rival, place=place)
    return Entry(row, case.name, place, build)
