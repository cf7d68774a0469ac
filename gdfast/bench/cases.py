"""The one table of shapes: tests, benchmarks and `gdfast bench` all read it.

Pure data. It imports the standard library and `case_kinds` alone, so anything may import it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import prod

from gdfast.bench.case_kinds import (
    Conv2dCase,
    FusedPoolCase,
    NormCase,
    PoolCase,
    SgdCase,
    StepCase,
)

# Correctness: small, off every default, asymmetric, on the edges of what is legal.
ODD: tuple[Conv2dCase, ...] = (
    Conv2dCase("plain-3x3", 2, 4, 7, 9, 6, 3, 3),
    Conv2dCase("same-3x3", 3, 16, 10, 8, 16, 3, 3, padding=(1, 1)),
    Conv2dCase("everything-asymmetric", 2, 6, 11, 9, 4, 3, 2, (2, 1), (1, 0), (2, 1), 2),
    Conv2dCase("everything-asymmetric-turned", 3, 4, 8, 13, 6, 2, 3, (1, 2), (0, 1), (1, 2), 2),
    Conv2dCase("batch-0", 0, 3, 6, 7, 5, 3, 2, (2, 1), (1, 0)),
    Conv2dCase("batch-1", 1, 5, 9, 6, 7, 3, 3, (1, 2), (1, 1)),
    Conv2dCase("batch-33", 33, 3, 6, 5, 4, 3, 2, (2, 1), (1, 0)),
    Conv2dCase("simple-cnn-stem", 3, 1, 28, 28, 32, 3, 3),
    Conv2dCase("c1-k1", 2, 1, 8, 7, 1, 3, 2, padding=(0, 1)),
    Conv2dCase("c17-k10", 2, 17, 9, 7, 10, 3, 3, padding=(1, 1)),
    Conv2dCase("c70-k130", 2, 70, 6, 5, 130, 3, 3, padding=(1, 1)),
    Conv2dCase("c130-k70-1x1", 2, 130, 7, 5, 70, 1, 1),
    Conv2dCase("1x1", 3, 17, 6, 9, 33, 1, 1),
    Conv2dCase("1x1-stride-2", 2, 20, 9, 8, 18, 1, 1, stride=(2, 2)),
    Conv2dCase("1x1-padding-1", 2, 5, 4, 6, 3, 1, 1, padding=(1, 1)),
    Conv2dCase("3x3-stride-2", 2, 16, 12, 11, 20, 3, 3, stride=(2, 2), padding=(1, 1)),
    Conv2dCase("7x7-stride-2", 2, 3, 19, 22, 10, 7, 7, stride=(2, 2), padding=(3, 3)),
    Conv2dCase("5x5", 2, 6, 11, 8, 9, 5, 5, padding=(2, 2)),
    Conv2dCase("stride-3-2", 2, 3, 14, 11, 4, 4, 3, stride=(3, 2), padding=(2, 1)),
    Conv2dCase("stride-over-kernel", 2, 3, 13, 15, 4, 2, 1, stride=(3, 4)),
    Conv2dCase("padding-over-kernel", 2, 3, 4, 5, 6, 2, 3, padding=(4, 5)),
    Conv2dCase("dilation-over-image", 1, 3, 4, 5, 6, 3, 3, padding=(5, 6), dilation=(6, 7)),
    Conv2dCase("kernel-is-image", 3, 4, 6, 5, 7, 6, 5),
    Conv2dCase("kernel-over-image", 2, 3, 2, 3, 4, 5, 4, padding=(2, 1)),
    Conv2dCase("width-1", 2, 4, 15, 1, 5, 3, 1, stride=(2, 1), padding=(1, 0)),
    Conv2dCase("height-1", 2, 4, 1, 15, 5, 1, 3, stride=(1, 2), padding=(0, 1)),
    Conv2dCase("pixel-1x1", 2, 3, 1, 1, 5, 3, 3, padding=(1, 1)),
    Conv2dCase("tall", 1, 3, 67, 2, 4, 5, 2, padding=(2, 1)),
    Conv2dCase("wide", 1, 3, 2, 67, 4, 2, 5, padding=(1, 2)),
    Conv2dCase("c3-k70", 1, 3, 9, 33, 70, 3, 3, stride=(1, 2), padding=(1, 1)),
    Conv2dCase("c8-k20-7x7", 1, 8, 4, 19, 20, 7, 7, padding=(3, 2)),
    Conv2dCase("c1-k16-5x3", 2, 1, 6, 37, 16, 5, 3, (2, 1), (4, 3), (2, 3)),
    Conv2dCase("c30-k3-5x5", 1, 30, 4, 37, 3, 5, 5, padding=(2, 2)),
    Conv2dCase("groups-2", 2, 34, 6, 7, 10, 3, 3, padding=(1, 1), groups=2),
    Conv2dCase("groups-8-of-4", 2, 32, 7, 21, 32, 3, 3, padding=(1, 1), groups=8),
    Conv2dCase("groups-5-stride-2", 1, 30, 9, 39, 15, 3, 3, (2, 2), (1, 1), groups=5),
    Conv2dCase("groups-5-1x1", 2, 15, 5, 6, 10, 1, 1, groups=5),
    Conv2dCase("depthwise", 2, 17, 8, 9, 17, 3, 3, padding=(1, 1), groups=17),
    Conv2dCase("depthwise-stride-2", 2, 33, 9, 10, 33, 5, 3, (2, 1), (2, 0), (1, 2), groups=33),
    Conv2dCase("depthwise-3x3-stride-2", 2, 19, 10, 13, 19, 3, 3, (2, 2), (1, 1), groups=19),
    Conv2dCase("depthwise-5x5", 1, 20, 9, 12, 20, 5, 5, padding=(2, 2), groups=20),
    Conv2dCase("depthwise-7x7-stride-2", 1, 18, 11, 9, 18, 7, 7, (2, 2), (3, 3), groups=18),
    Conv2dCase("depthwise-multiplier-2", 2, 9, 7, 8, 18, 3, 2, (1, 2), (1, 1), groups=9),
)


ODD_POOLS: tuple[PoolCase, ...] = (
    PoolCase("2x2", 2, 3, 8, 9, (2, 2), (2, 2)),
    PoolCase("resnet-stem", 2, 17, 11, 13, (3, 3), (2, 2), (1, 1)),
    PoolCase("wide-image", 1, 2, 10, 300, (3, 3), (2, 2), (1, 1)),
    PoolCase("tall-image", 1, 2, 300, 9, (2, 3), (2, 2), (1, 1)),
    PoolCase("many-channels", 1, 130, 4, 5, (3, 3), (2, 2), (1, 1)),
    PoolCase("asymmetric", 1, 20, 7, 6, (3, 2), (2, 1), (1, 0), (2, 1), True),
    PoolCase("stride-over-kernel", 2, 5, 13, 16, (2, 3), (3, 5), (1, 1)),
    PoolCase("ceil-mode", 2, 33, 8, 9, (2, 2), (3, 3), (0, 1), ceil_mode=True),
    PoolCase("stride-1", 2, 3, 6, 5, (2, 3), (1, 1), (0, 1)),
    PoolCase("dilation-over-image", 1, 2, 9, 3, (5, 2), (2, 1), (2, 1), (1, 3)),
    PoolCase("window-of-272", 1, 1, 18, 17, (17, 16), (1, 2), (8, 7)),
    PoolCase("batch-0", 0, 3, 5, 5, (2, 2), (2, 2)),
    PoolCase("pixel", 1, 3, 1, 1, (1, 1), (1, 1)),
    PoolCase("global", 3, 16, 7, 5, (7, 5), (7, 5)),
)

FUSED_POOLS: tuple[FusedPoolCase, ...] = (
    FusedPoolCase("simple-cnn", Conv2dCase("", 3, 1, 28, 28, 32, 3, 3)),
    FusedPoolCase("small", Conv2dCase("", 2, 1, 6, 7, 3, 2, 3)),
    FusedPoolCase(
        "small-asymmetric",
        Conv2dCase("", 1, 2, 9, 8, 2, 3, 2, (2, 1), (1, 1), (1, 2)),
        (1, 3), (2, 3),
    ),
    FusedPoolCase("small-overlapping", Conv2dCase("", 1, 2, 6, 6, 2, 3, 3), (3, 2), (2, 1),
                  (1, 0), fused=False),
    FusedPoolCase("asymmetric", Conv2dCase("", 2, 3, 15, 19, 5, 3, 2, (2, 1), (1, 2), (1, 2))),
    FusedPoolCase("gaps", Conv2dCase("", 2, 4, 20, 23, 7, 3, 3, padding=(1, 1), dilation=(2, 1)),
                  (3, 2), (3, 4)),
    FusedPoolCase("37-outputs", Conv2dCase("", 3, 3, 20, 18, 37, 3, 3, padding=(1, 1))),
    FusedPoolCase("5x5-bands", Conv2dCase("", 2, 1, 150, 200, 6, 5, 5, padding=(2, 2))),
    FusedPoolCase("wide", Conv2dCase("", 1, 1, 6, 400, 3, 3, 3, padding=(1, 1))),
    FusedPoolCase("one-line", Conv2dCase("", 2, 3, 4, 24, 5, 3, 3)),
    FusedPoolCase("one-output", Conv2dCase("", 2, 1, 5, 5, 3, 3, 3), (3, 2), (9, 9)),
    FusedPoolCase("batch-0", Conv2dCase("", 0, 1, 8, 8, 2, 3, 3)),
    FusedPoolCase("8-channels", Conv2dCase("", 2, 8, 12, 12, 5, 3, 3, padding=(1, 1)), fused=False),
    FusedPoolCase("groups", Conv2dCase("", 2, 4, 12, 11, 6, 3, 3, groups=2), fused=False),
    FusedPoolCase("resnet-stem", Conv2dCase("", 2, 3, 16, 17, 5, 7, 7, (2, 2), (3, 3)), (3, 3),
                  (2, 2), (1, 1), fused=False),
)  # fmt: skip


def _layer(model: str, C: int, H: int, K: int, R: int, stride: int, batch: int) -> Conv2dCase:
    """A square layer that keeps the image's size but for its stride."""
    name = f"{R}x{R}{f'/{stride}' if stride > 1 else ''} {C}->{K} @{H}"
    pad = (R - 1) // 2
    return Conv2dCase(name, batch, C, H, H, K, R, R, (stride, stride), (pad, pad), model=model)


def _distinct(layers: Iterable[Conv2dCase]) -> tuple[Conv2dCase, ...]:
    """Each different layer once, in order of first use, with its number of occurrences."""
    return tuple(replace(layer, count=count) for layer, count in Counter(layers).items())


def _resnet(model: str, depths: tuple[int, ...], bottleneck: bool) -> tuple[Conv2dCase, ...]:
    """Convolutions of a ResNet v1.5 (stride on the 3x3) for 8 images of 224 x 224."""
    stem = _layer(model, 3, 224, 64, 7, 2, 8)
    return _distinct([stem, *_residual(model, 64, 56, depths, bottleneck, 8)])


def _residual(
    model: str, C: int, H: int, depths: tuple[int, ...], bottleneck: bool, batch: int
) -> list[Conv2dCase]:
    """The stages after the stem, which gives C channels of H x H; each stage doubles the width."""
    layers = []
    first = C
    for stage, depth in enumerate(depths):
        width = first << stage
        out = 4 * width if bottleneck else width
        for block in range(depth):
            stride = 2 if block == 0 and stage > 0 else 1
            if bottleneck:
                layers += [
                    _layer(model, C, H, width, 1, 1, batch),
                    _layer(model, width, H, width, 3, stride, batch),
                    _layer(model, width, H // stride, out, 1, 1, batch),
                ]
            else:
                layers += [
                    _layer(model, C, H, width, 3, stride, batch),
                    _layer(model, width, H // stride, width, 3, 1, batch),
                ]
            if stride > 1 or out != C:  # the shortcut needs a projection
                layers.append(_layer(model, C, H, out, 1, stride, batch))
            C, H = out, H // stride
    return layers


def _cifar_resnet(model: str, depth: int) -> tuple[Conv2dCase, ...]:
    """Convolutions of a ResNet for CIFAR, for 64 images of 32 x 32."""
    stem = _layer(model, 3, 32, 16, 3, 1, 64)
    blocks = (depth - 2) // 6
    return _distinct([stem, *_residual(model, 16, 32, (blocks,) * 3, False, 64)])


def _mobilenet() -> tuple[Conv2dCase, ...]:
    """Convolutions of MobileNetV2 for 8 images of 224 x 224."""
    model, batch = "mobilenet", 8
    layers = [_layer(model, 3, 224, 32, 3, 2, batch)]
    C, H = 32, 112
    for expansion, K, blocks, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            stride, width = first if block == 0 else 1, C * expansion
            if expansion > 1:
                layers.append(_layer(model, C, H, width, 1, 1, batch))
            depthwise = _layer(model, width, H, width, 3, stride, batch)
            name = depthwise.name.replace(f"{width}->{width}", f"depthwise {width}")
            layers.append(replace(depthwise, name=name, groups=width))
            H //= stride
            layers.append(_layer(model, width, H, K, 1, 1, batch))
            C = K
    layers.append(_layer(model, C, H, 1280, 1, 1, batch))
    return _distinct(layers)


def _yolo_lite() -> tuple[Conv2dCase, ...]:
    """A backbone for 4 images of 416 x 416: each stage halves the image, then convolves once."""
    model, batch = "yolo", 4
    layers = [_layer(model, 3, 416, 16, 3, 2, batch)]
    C, H = 16, 208
    for K in (32, 64, 128, 256):
        layers += [
            _layer(model, C, H, K, 3, 2, batch),
            _layer(model, K, H // 2, K, 3, 1, batch),
        ]
        C, H = K, H // 2
    layers.append(_layer(model, C, H, 512, 3, 1, batch))
    return _distinct(layers)


SIMPLE_CNN: tuple[Conv2dCase, ...] = (
    Conv2dCase("3x3 1->32 @28", 64, 1, 28, 28, 32, 3, 3, model="simple_cnn"),
)
RESNET18 = _resnet("resnet18", (2, 2, 2, 2), bottleneck=False)
RESNET50 = _resnet("resnet50", (3, 4, 6, 3), bottleneck=True)
RESNET20 = _cifar_resnet("resnet20", 20)
YOLO_LITE = _yolo_lite()
MOBILENET = _mobilenet()
# 3x3 layers with stride 1 from 16 to 512 channels, where fewer multiplications can win.
WINOGRAD = tuple(
    _layer("winograd", channels, size, channels, 3, 1, batch)
    for channels, size, batch in (
        (64, 56, 8), (128, 28, 8), (256, 14, 8), (512, 7, 8), (32, 64, 16), (16, 32, 64),
    )
)  # fmt: skip

LAYERS: dict[str, tuple[Conv2dCase, ...]] = {
    "simple_cnn": SIMPLE_CNN,
    "resnet20": RESNET20,
    "resnet18": RESNET18,
    "resnet50": RESNET50,
    "yolo": YOLO_LITE,
    "mobilenet": MOBILENET,
    "winograd": WINOGRAD,
}


def _resnet50_parameters() -> tuple[int, ...]:
    """Elements of ResNet-50's 161 parameter tensors: convolutions, their norms, the classifier."""
    sizes: list[int] = []
    for layer in RESNET50:
        sizes += layer.count * [prod(layer.weight_shape), layer.K, layer.K]
    return (*sizes, 2048 * 1000, 1000)


def _like_resnet50(parameters: int) -> tuple[int, ...]:
    """About so many parameters, as unevenly spread over 161 tensors as ResNet-50's own."""
    sizes = _resnet50_parameters()
    return tuple(max(1, size * parameters // sum(sizes)) for size in sizes)


SGD_CASES: tuple[SgdCase, ...] = (
    SgdCase("10 k, 1 tensor", (10_000,)),
    SgdCase("10 k, 161 tensors", _like_resnet50(10_000)),
    SgdCase("100 k, 1 tensor", (100_000,)),
    SgdCase("100 k, 161 tensors", _like_resnet50(100_000)),
    SgdCase("1 M, 1 tensor", (1_000_000,)),
    SgdCase("1 M, 161 tensors", _like_resnet50(1_000_000)),
    SgdCase("10 M, 1 tensor", (10_000_000,)),
    SgdCase("10 M, 161 tensors", _like_resnet50(10_000_000)),
    SgdCase("25.6 M, 1 tensor", (sum(_resnet50_parameters()),)),
    SgdCase("25.6 M, ResNet-50's 161", _resnet50_parameters()),
)

NORM_CASES: tuple[NormCase, ...] = tuple(
    NormCase((N, C, H, H), residual)
    for N, C, H, residuals in (
        # ResNet-18 and ResNet-50
        (8, 64, 112, (False,)), (8, 64, 56, (False, True)), (8, 256, 56, (False, True)),
        (8, 128, 28, (False, True)), (8, 512, 28, (False, True)), (8, 256, 14, (False, True)),
        (8, 512, 7, (False, True)), (8, 2048, 7, (False, True)),
        # ResNet-20, YOLO-lite
        (64, 16, 32, (False, True)), (4, 16, 208, (False,)), (4, 64, 52, (False,)),
    )
    for residual in residuals
)  # fmt: skip

STEPS: tuple[StepCase, ...] = (
    StepCase("SimpleCNN, batch 64", "cnn", 64, 1, 28, 28, 10),
    StepCase("ResNet-20, batch 64, 32x32", "resnet20", 64, 3, 32, 32, 10),
    StepCase("ResNet-18, batch 8, 224x224", "resnet18", 8, 3, 224, 224, 1000),
    StepCase("ResNet-50, batch 8, 224x224", "resnet50", 8, 3, 224, 224, 1000),
    StepCase(
        "YOLO-lite backbone, batch 4, 416x416", "yolo_lite_backbone", 4, 3, 416, 416, 20,
        {"num_classes": 20},
    ),
    StepCase(
        "MobileNetV2, batch 8, 224x224", "mobilenet_v2", 8, 3, 224, 224, 1000, {"dropout": 0.0}
    ),
)  # fmt: skip
