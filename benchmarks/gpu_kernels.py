"""Every CUDA kernel once, on tiny tensors: for compute-sanitizer, which takes a long time for each.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
        python benchmarks/gpu_kernels.py

Tensors are made on the CPU and results compared there, in float64, so that next to no kernels but
ours run. Without a GPU it runs in the simulator where that is loaded (GDFAST_CUDA_SIMULATE=1), and
with --backend reference on native PyTorch. The exit status is 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_exact import (
    activated,
    moments,
    multiplied,
    normalised,
    passes,
    pooled,
    updated,
    updated_in_backward,
    weight_gradient,
    with_norm,
)
from torch import Tensor

import gdfast
from gdfast import native
from gdfast.backends import (
    cuda_depthwise,
    cuda_grouped,
    cuda_hopper,
    cuda_hopper_float32,
    cuda_hopper_grad_weight,
    cuda_hopper_halo,
    cuda_hopper_planes,
    cuda_tiles,
)
from gdfast.backends.activation import ACTIVATIONS
from gdfast.bench.cases import Conv2dCase
from gdfast.bench.workload import LAYOUTS, relative_error

Run = Callable[[], list[tuple[Tensor, Tensor]]]  # results with what they should be, in float64

_ERROR = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}
_TF32_ERROR = 2e-3
_MEAN_ERROR = 1e-4  # of means near zero
_NORM_ERROR = 5e-2  # of float32 sums too, over what half types have rounded

# Read number by number; in chunks of 16 bytes, with parts of tiles; few channels.
_CONVOLUTIONS = (
    Conv2dCase("c17-k10", 2, 17, 9, 7, 10, 3, 3, padding=(1, 1)),
    Conv2dCase("groups-2", 2, 48, 13, 11, 144, 3, 2, (2, 1), (1, 1), (1, 2), groups=2),
    Conv2dCase("1x1-stride-2", 2, 24, 9, 8, 40, 1, 1, stride=(2, 2)),
    Conv2dCase("stem", 2, 3, 19, 22, 16, 7, 7, stride=(2, 2), padding=(3, 3)),
)
# Rows, columns and outputs: one by one, whole vectors, several rows of a block, tiles.
_LINEAR = ((5, 67, 9), (9, 1064, 10), (520, 64, 3), (37, 200, 72))
_HOPPER = (
    Conv2dCase("3x3", 2, 72, 9, 10, 72, 3, 3, padding=(1, 1)),
    Conv2dCase("1x1", 3, 72, 7, 7, 136, 1, 1),
    Conv2dCase("3x3-stride-2", 2, 72, 9, 10, 72, 3, 3, stride=(2, 2), padding=(1, 1)),
    # More tiles than multiprocessors.
    Conv2dCase("weights-stay", 2, 64, 96, 96, 64, 1, 1),
)
# Several images a tile; a part of one, and more tiles than multiprocessors; weights in a ring.
_HALO = (
    Conv2dCase("7x7", 9, 72, 7, 7, 72, 3, 3, padding=(1, 1)),
    Conv2dCase("weights-stay", 20, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
    Conv2dCase("many-steps", 3, 136, 14, 14, 136, 3, 3, padding=(1, 1)),
)
# Parts of tiles; more of them than multiprocessors.
_PLANES = (
    Conv2dCase("1x1", 2, 72, 12, 14, 136, 1, 1),
    Conv2dCase("weights-stay", 20, 64, 56, 56, 64, 1, 1),
)
# Parts of slabs and of tiles; tiles in two parts, and more of them than one block makes.
_GROUPED = (
    Conv2dCase("4s", 3, 72, 9, 19, 72, 3, 3, padding=(1, 1), groups=18),
    Conv2dCase("8s", 2, 64, 7, 7, 64, 3, 3, padding=(1, 1), groups=8),
    Conv2dCase("16s-many-tiles", 8, 64, 56, 56, 64, 3, 3, padding=(1, 1), groups=4),
    Conv2dCase("32s-stride-2", 2, 96, 15, 18, 96, 3, 3, (2, 2), (1, 1), groups=3),
)
# Images that are a slot each, in the last of eights by shared padding; bands of images.
_GROUPED_HOPPER = (
    Conv2dCase("4s", 3, 72, 9, 19, 72, 3, 3, padding=(1, 1), groups=18),
    Conv2dCase("8s-56", 5, 128, 56, 56, 128, 3, 3, padding=(1, 1), groups=16),
    Conv2dCase("16s-columns", 2, 64, 30, 75, 64, 3, 3, padding=(1, 0), groups=4),
    Conv2dCase("32s-7", 64, 96, 7, 7, 96, 3, 3, padding=(1, 1), groups=3),
)
_DEPTHWISE = (
    Conv2dCase("3x3", 3, 8, 9, 11, 8, 3, 3, padding=(1, 1), groups=8),
    Conv2dCase("5x5-stride-2", 2, 8, 11, 9, 8, 5, 5, (2, 2), (2, 2), groups=8),
    Conv2dCase("7x7", 1, 12, 9, 10, 12, 7, 7, padding=(3, 3), groups=12),
    Conv2dCase("multiplier-3", 2, 7, 7, 6, 21, 3, 2, (2, 1), (1, 0), (1, 2), groups=7),
)
# Images that a block has whole, or walks down: an odd number of them, and a slab that is not full.
_GROUPED_WHOLE = (
    Conv2dCase("octets", 9, 96, 7, 7, 96, 3, 3, padding=(1, 1), groups=3),
    Conv2dCase("quads", 5, 80, 14, 14, 80, 3, 3, padding=(1, 1), groups=5),
    Conv2dCase("strips", 3, 72, 28, 28, 72, 3, 3, padding=(1, 1), groups=9),
    Conv2dCase("wide-strips", 2, 72, 56, 56, 72, 3, 3, padding=(1, 1), groups=18),
)
# Slabs that are half full; images side by side, and rows in strips.
_DEPTHWISE_TENSOR = (
    Conv2dCase("3x3", 7, 24, 30, 11, 24, 3, 3, padding=(1, 1), groups=24),
    Conv2dCase("3x3-strips", 2, 48, 19, 130, 48, 3, 3, padding=(1, 1), groups=48),
    Conv2dCase("5x5", 5, 40, 28, 28, 40, 5, 5, padding=(2, 2), groups=40),
    Conv2dCase("7x7", 5, 24, 14, 14, 24, 7, 7, padding=(3, 3), groups=24),
)
# Rows in strips, and channels of more boxes than one.
_BANDS = Conv2dCase("5x5-strips", 2, 72, 19, 130, 72, 5, 5, padding=(2, 2), groups=72)
_DEPTHWISE_HOPPER = {
    3: (cuda_depthwise.ROWS, cuda_depthwise.BOXES),
    5: (cuda_depthwise.TOEPLITZ,),
    7: (cuda_depthwise.TOEPLITZ,),
}


def everything(device: str, backend: str) -> Iterator[tuple[str, Run, float]]:
    """Names, what to run, and the largest error that is right (0: the dtype's)."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    where: dict[str, str] = {"device": device, "backend": backend}
    for case in _CONVOLUTIONS:
        run = partial(passes, case, layout="channels_last", **where)
        yield f"conv2d {case}, bfloat16", partial(run, bfloat16), 0
        yield f"conv2d {case}, tf32", partial(run, float32, tf32=True), _TF32_ERROR
        yield f"conv2d {case}, tf32x3", partial(run, float32), 0
        yield f"conv2d {case}, ieee", partial(run, float32, strict=True), 0
    yield "conv2d NCHW", partial(passes, _CONVOLUTIONS[0], bfloat16, "NCHW", **where), 0
    if backend == "cuda":
        for tile in cuda_tiles.TILES:
            run = partial(passes, _CONVOLUTIONS[1], layout="channels_last", by=tile, **where)
            yield f"conv2d in tiles of {tile}, bfloat16", partial(run, bfloat16), 0
            yield f"conv2d in tiles of {tile}, tf32", partial(run, float32, tf32=True), _TF32_ERROR
            yield f"conv2d in tiles of {tile}, tf32x3", partial(run, float32), 0
        for case in _GROUPED:
            for dtype in (bfloat16, torch.float16):
                run = partial(passes, case, dtype, "channels_last", by="grouped", **where)
                yield f"conv2d in groups {case}, {dtype}", run, 0
        for layout in LAYOUTS:
            run = partial(passes, _CONVOLUTIONS[3], layout=layout, by="stem", **where)
            yield f"conv2d by stem, {layout}, bfloat16", partial(run, bfloat16), 0
            yield f"conv2d by stem, {layout}, tf32", partial(run, float32, tf32=True), _TF32_ERROR
            yield f"conv2d by stem, {layout}, tf32x3", partial(run, float32), 0
        for case in _DEPTHWISE_TENSOR:
            for by, dtype in (
                ("depthwise-tensor", bfloat16),
                ("depthwise-tensor-narrow", torch.float16),
            ):
                run = partial(passes, case, dtype, "channels_last", by=by, **where)
                yield f"{by} {case}, {dtype}", run, 0
    for case in _DEPTHWISE:
        for layout in LAYOUTS:
            for dtype in (bfloat16, float32):
                run = partial(passes, case, dtype, layout, **where)
                yield f"depthwise {case}, {layout}, {dtype}", run, 0
    for layout in LAYOUTS:
        for dtype in (bfloat16, float32):
            for residual in (False, True):
                run = partial(normalised, dtype, layout, residual, **where)
                most = _NORM_ERROR if dtype == bfloat16 else 0
                yield f"batch_norm_act, {layout}, {dtype}, residual {residual}", run, most
            yield f"max_pool2d, {layout}, {dtype}", partial(pooled, dtype, layout, **where), 0
    for dtype, masters in ((float32, False), (bfloat16, False), (bfloat16, True)):
        yield f"sgd_, {dtype}, masters {masters}", partial(updated, dtype, masters, **where), 0
    for case in (*_CONVOLUTIONS[:2], _CONVOLUTIONS[3]):
        for dtype, most in ((bfloat16, _NORM_ERROR), (float32, 0)):
            yield f"ConvNormAct {case}, {dtype}", partial(with_norm, case, dtype, **where), most
    for activation in ACTIVATIONS:
        run = partial(activated, _CONVOLUTIONS[1], activation, bfloat16, **where)
        yield f"conv2d_act, {activation}", run, 0
    for dtype in (float32, bfloat16):
        for bias in (False, True):
            run = partial(updated_in_backward, dtype, bias, **where)
            yield f"sgd_ in backward, {dtype}, bias {bias}", run, 0
    yield from _other_dtypes(where)
    if backend == "cuda":
        yield from _linear(where)
        yield from _hopper(where)


def _linear(where: dict[str, str]) -> Iterator[tuple[str, Run, float]]:
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    few = [(dtype, dtype, dtype) for dtype in (float32, torch.float64)]
    for sizes in _LINEAR:
        for dtypes in (
            *(few if sizes[2] <= 32 else []),
            (float16, float16, float16),
            (bfloat16, bfloat16, bfloat16),
            (bfloat16, float32, bfloat16),
            (float32, float32, float16),
        ):
            most = _NORM_ERROR if dtypes[1] != dtypes[2] else 0
            run = partial(multiplied, sizes, dtypes, **where)
            yield f"linear {sizes}, {dtypes}", run, most


def _other_dtypes(where: dict[str, str]) -> Iterator[tuple[str, Run, float]]:
    """Instances of the same templates: float16, and float64 where a backend has it."""
    dtypes = (torch.float16,) if where["backend"] == "triton" else (torch.float16, torch.float64)
    for dtype in dtypes:
        for name, case in (("conv2d", _CONVOLUTIONS[1]), ("depthwise", _DEPTHWISE[0])):
            run = partial(passes, case, dtype, "channels_last", **where)
            yield f"{name} {case}, {dtype}", run, 0
        run = partial(normalised, dtype, "channels_last", True, **where)
        yield f"batch_norm_act, {dtype}", run, 0 if dtype == torch.float64 else _NORM_ERROR
        yield f"max_pool2d, {dtype}", partial(pooled, dtype, "channels_last", **where), 0
        yield f"sgd_, {dtype}", partial(updated, dtype, False, **where), 0


def _hopper(where: dict[str, str]) -> Iterator[tuple[str, Run, float]]:
    assert native.cuda is not None
    if reason := native.cuda.hopper_missing(0):
        print(f"conv2d for Hopper: not run: {reason}", flush=True)
        return
    for case in _HOPPER:
        for name in cuda_hopper.HOPPER:
            if name != "hopper":
                run = partial(passes, case, torch.bfloat16, "channels_last", by=name, **where)
                yield f"conv2d {case} by {name}", run, 0
                yield (
                    f"moments of {case} by {name}",
                    partial(moments, case, name, **where),
                    _MEAN_ERROR,
                )
    for case in _HALO:
        for name in cuda_hopper_halo.HALO:
            run = partial(passes, case, torch.bfloat16, "channels_last", by=name, **where)
            yield f"conv2d {case} by {name}", run, 0
            run = partial(moments, case, name, **where)
            yield f"moments of {case} by {name}", run, _MEAN_ERROR
    for case in _GROUPED_HOPPER:
        for dtype in (torch.bfloat16, torch.float16):
            run = partial(passes, case, dtype, "channels_last", by=cuda_grouped.HOPPER, **where)
            yield f"conv2d in groups {case} for Hopper, {dtype}", run, 0
    for case in _GROUPED_WHOLE:
        run = partial(passes, case, torch.bfloat16, "channels_last", by=cuda_grouped.WHOLE, **where)
        yield f"conv2d in groups {case} for Hopper, whole images", run, 0
    for case in (*_DEPTHWISE_TENSOR, _BANDS):
        for by in _DEPTHWISE_HOPPER[case.R]:
            run = partial(passes, case, torch.bfloat16, "channels_last", by=by, **where)
            yield f"{by} {case} for Hopper, bfloat16", run, 0
    for case in _PLANES:
        name = cuda_hopper_planes.NAME
        run = partial(passes, case, torch.bfloat16, "NCHW", by=name, **where)
        yield f"conv2d {case} by {name}", run, 0
        for name in cuda_hopper_grad_weight.PLANES_BLOCKS:
            run = partial(weight_gradient, case, torch.bfloat16, name, layout="NCHW", **where)
            yield f"grad_weight {case} by {name}", run, 0
    for case in _HOPPER:
        for name in cuda_hopper_grad_weight.BLOCKS:
            run = partial(weight_gradient, case, torch.bfloat16, name, **where)
            yield f"grad_weight {case} by {name}", run, 0
    for case in _HOPPER:
        for name in cuda_hopper_float32.TILES:
            run = partial(passes, case, torch.float32, "channels_last", by=name, **where)
            yield f"conv2d {case} by {name}", run, 0
        for name in cuda_hopper_float32.BLOCKS:
            run = partial(weight_gradient, case, torch.float32, name, **where)
            yield f"grad_weight {case} by {name}", run, 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton", "reference"))
    parser.add_argument("--device", help="default: cuda, but for the simulator and the reference")
    parser.add_argument("-k", default="", metavar="PART", help="those with this in their name")
    arguments = parser.parse_args()
    simulated = native.cuda_is_simulated or arguments.backend == "reference"
    device = arguments.device or ("cpu" if simulated else "cuda")
    wrong = count = 0
    with gdfast.autotune("off"):
        for name, run, most in everything(device, arguments.backend):
            if arguments.k.lower() not in name.lower():
                continue
            count += 1
            print(name, end=": ", flush=True)  # before it may crash
            torch.manual_seed(0)  # the same numbers, whatever -k leaves out
            try:
                pairs = run()
                if device == "cuda":
                    torch.cuda.synchronize()
                errors = [
                    (relative_error(ours, exact), most or _ERROR[ours.dtype])
                    for ours, exact in pairs
                ]
                bad = [f"{error:.1e}" for error, allowed in errors if not error <= allowed]
                print(f"WRONG: errors {', '.join(bad)}" if bad else "right", flush=True)
            except Exception as error:
                bad = [str(error)]
                print(f"failed: {type(error).__name__}: {error}", flush=True)
            wrong += bool(bad)
    print(f"{count - wrong} of {count} right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
