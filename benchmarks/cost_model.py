"""How well the CPU's cost model chooses: our algorithms' times beside what it would take.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --fit

Every algorithm of 3x3 layers is timed, in each pass and layout: the layers of the benchmarks'
models, and a spread of others, mostly small, where the choice is close. The figures are the chosen
algorithm's time over the best one's. `--fit` prints constants for `cpu_algorithms._COSTS` that fit
this machine better, and what they would give. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from statistics import geometric_mean
from typing import NamedTuple

import torch

from gdfast import native
from gdfast.backends import cpu, cpu_algorithms
from gdfast.backends.cpu_algorithms import DIRECT, WINOGRAD
from gdfast.backends.registry import Conv2dQuery
from gdfast.bench import cases, timer
from gdfast.bench.workload import LAYOUTS
from gdfast.geometry import Conv2dGeometry

_CHANNELS = (
    (8, 8), (8, 32), (16, 16), (12, 20), (16, 64), (24, 24), (32, 32), (32, 8), (48, 48), (64, 64),
    (64, 16), (96, 96), (128, 128), (128, 32), (192, 192), (256, 256), (512, 128),
)  # fmt: skip
_IMAGES = ((1, 14), (1, 56), (4, 28), (32, 8), (2, 7))  # batch, pixels along an axis
_LEAST_FLOPS, _MOST_FLOPS = 2e6, 1.2e9
_ROUNDS = 3
_MOST_PARTED = 0.5  # of logarithms: how much faster the better algorithm is does not matter then
_WORST = 10


class Row(NamedTuple):
    """One pass of one layer in one layout, and the seconds that each algorithm takes."""

    of_model: bool
    op: str
    geometry: Conv2dGeometry
    channels_last: bool
    seconds: dict[str, float]

    @property
    def chosen(self) -> str:
        assert native.cpu is not None
        return cpu_algorithms.choose(self.op, self.geometry, native.cpu.isa(), self.channels_last)

    @property
    def excess(self) -> float:
        return self.seconds[self.chosen] / min(self.seconds.values())

    def __str__(self) -> str:
        g = self.geometry
        times = ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in self.seconds.items())
        layout = "channels_last" if self.channels_last else "NCHW"
        return (
            f"{self.excess:5.2f}  {self.op} {g.N} x {g.C}->{g.K} @{g.H}/{g.stride[0]} {layout}: "
            f"{times}, chosen {self.chosen}"
        )


def layers() -> Iterator[tuple[bool, Conv2dGeometry]]:
    """Whether a layer is of a model, and its geometry; each once."""
    shapes: dict[tuple[int, ...], bool] = {}
    for table in cases.LAYERS.values():
        for case in table:
            if (case.R, case.groups) == (3, 1) and min(case.C, case.K) >= 8:
                shapes[case.N, case.C, case.H, case.K, case.stride[0]] = True
    for stride in (1, 2):
        for C, K in _CHANNELS:
            for N, H in _IMAGES:
                if _LEAST_FLOPS < 18 * N * (H // stride) ** 2 * C * K < _MOST_FLOPS:
                    shapes.setdefault((N, C, H, K, stride), False)
    for (N, C, H, K, stride), of_model in shapes.items():
        yield (
            of_model,
            Conv2dGeometry.of(
                "conv2d", (N, C, H, H), (K, C, 3, 3), (stride,) * 2, (1, 1, 1, 1), (1, 1), 1
            ),
        )


def measure(of_model: bool, geometry: Conv2dGeometry, layout: str) -> Iterator[Row]:
    """The three passes of a layer."""
    channels_last = layout == "channels_last"
    generator = torch.Generator().manual_seed(0)
    sizes = geometry.input_size, geometry.weight_size, geometry.output_size
    input, weight, grad_output = (
        torch.randn(size, generator=generator).contiguous(memory_format=LAYOUTS[layout])
        for size in sizes
    )
    query = Conv2dQuery(
        torch.device("cpu"), torch.float32, torch.strided, geometry=geometry,
        strides=(input.stride(), weight.stride(), grad_output.stride()),
    )  # fmt: skip
    for op, arguments in (
        ("conv2d", (input, weight, None)),
        ("conv2d_grad_input", (grad_output, weight)),
        ("conv2d_grad_weight", (grad_output, input, False)),
    ):
        names = cpu_algorithms.candidates(op, query, strict=False)
        calls = {
            name: partial(cpu.BACKEND.operations[op](query, name), *arguments) for name in names
        }
        times = timer.compare(calls, _ROUNDS, min_seconds=5e-4)
        seconds = {name: times.median(name) for name in names}
        yield Row(of_model, op, geometry, channels_last, seconds)


def summary(rows: list[Row]) -> str:
    """The geometric means, and how many are off by more than a tenth."""
    lines = []
    for of_model, group in ((True, "layers of models"), (False, "others")):
        for stride in (1, 2):
            some = [
                row for row in rows
                if row.of_model == of_model and row.geometry.stride[0] == stride
            ]  # fmt: skip
            if not some:
                continue
            over = sum(row.excess > 1.1 for row in some)
            mean = geometric_mean(row.excess for row in some)
            lines.append(
                f"{group}, stride {stride}: chosen over best {mean:.3f}, "
                f"{over} of {len(some)} over 1.1"
            )
    worst = sorted(rows, key=lambda row: row.excess, reverse=True)[:_WORST]
    return "\n".join([*lines, *map(str, worst)])


def fit(rows: list[Row], stride: int, op: str) -> None:
    """Changes the constants of one stride and operation as long as that brings the ratio of the
    predicted costs, and what is chosen by it, nearer to the measured.
    """
    some = [row for row in rows if row.op == op and row.geometry.stride[0] == stride]
    best = _loss(some)
    for factor in (2.0, 1.5, 1.25, 1.1, 1.05):
        changed = True
        while changed:
            changed = False
            for name in cpu_algorithms._Costs._fields:
                for by in (factor, 1 / factor):
                    before = cpu_algorithms._COSTS[stride, op]
                    value = float(f"{getattr(before, name) * by:.3g}")
                    cpu_algorithms._COSTS[stride, op] = before._replace(**{name: value})
                    if (loss := _loss(some)) < best * (1 - 1e-6):
                        best, changed = loss, True
                    else:
                        cpu_algorithms._COSTS[stride, op] = before


def _loss(rows: list[Row]) -> float:
    assert native.cpu is not None
    lanes = cpu_algorithms._LANES[native.cpu.isa()]

    def limited(ratio: float) -> float:
        return max(-_MOST_PARTED, min(_MOST_PARTED, math.log(ratio)))

    total = 0.0
    for row in rows:
        winograd, direct = cpu_algorithms._costs(row.op, row.geometry, lanes, row.channels_last)
        measured = row.seconds[WINOGRAD] / row.seconds[DIRECT]
        weight = 3 if row.of_model else 1
        total += weight * (limited(winograd / direct) - limited(measured)) ** 2
        total += weight * 2 * math.log(row.excess)
    return total / len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="print constants that fit better")
    args = parser.parse_args()
    rows: list[Row] = []
    for of_model, geometry in layers():
        for layout in LAYOUTS:
            rows += measure(of_model, geometry, layout)
    print(summary(rows))
    if args.fit:
        for stride, op in cpu_algorithms._COSTS:
            fit(rows, stride, op)
            print(f"{stride, op}: {cpu_algorithms._COSTS[stride, op]}")
        print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
