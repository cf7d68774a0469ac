"""The rows that benchmarks/gpu_layers.py fills: against whom, and what is aimed at. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("cuda", "triton")
# What users get: for each convolution the fastest of those and of native, as the tuner finds it.
AUTO = "auto"
# A kernel of "cuda" that waits for loads: where one never comes, the process loses its GPU. What
# fails is done again without it before all of "cuda" is given up. Where other kernels run besides,
# these may be to blame as well: it is left out once.
SUSPECT = "hopper"
SUSPECT_ONCE = "hopper, this once"

# Seconds for each row, most valuable first: what is left of one then goes untimed.
SECONDS = {
    "ResNet-50 layers": 75.0,
    "ResNet-50 step": 60.0,
    "BatchNorm + ReLU": 25.0,
    "depthwise": 22.0,
    "SGD": 8.0,
    "small steps": 40.0,
    "grouped": 12.0,
    "float32 3x3": 16.0,
    "NCHW layers": 8.0,
    "ResNet-50 step, updated in backward": 45.0,
    "ResNet-50 step, compiled": 110.0,
    "Triton rivals": 75.0,
}
# Whole training steps.
STEPS = tuple(row for row in SECONDS if "step" in row)
# What a single entry may take, compilers included; the last row but one has but one.
SECONDS_OF_ENTRY = {
    **dict.fromkeys(SECONDS, 35.0), **dict.fromkeys(STEPS, 60.0),
    "ResNet-50 step, compiled": 110.0, "Triton rivals": 50.0,
}  # fmt: skip
# TF32 is off in these.
WITHOUT_TF32 = ("float32 3x3",)
# Native has its choice of the layout in these: without TF32 cuDNN has Winograd's algorithm in NCHW.
BOTH_LAYOUTS = ("float32 3x3",)
# What one layer may run by besides, where it is installed.
TRITON_RIVALS = ("inductor", "flag_gems", "attorch")


@dataclass(frozen=True)
class Goal:
    """The ratio to reach, by backend: geometric mean over a row's entries, all or those of one task
    or layout. A rival "X" is the faster of the native ways "X" and "X NCHW"."""

    row: str
    rival: str
    ratio: dict[str, float]
    task: str = ""
    layout: str = ""

    @property
    def title(self) -> str:
        words = (self.row, self.task, self.layout)
        return " ".join(word for word in words if word and not self.row.endswith(f" {word}"))


def backends(row: str) -> tuple[str, ...]:
    """By which of ours a row's entries are run."""
    return (*BACKENDS, AUTO) if row in STEPS else BACKENDS


def _both(ratio: float) -> dict[str, float]:
    return dict.fromkeys(BACKENDS, ratio)


def _all(ratio: float) -> dict[str, float]:
    return dict.fromkeys((*BACKENDS, AUTO), ratio)


GOALS = (
    Goal("ResNet-50 layers", "cuDNN", {"cuda": 1.0, "triton": 0.85}),
    Goal("ResNet-50 layers", "cuDNN", {"cuda": 1.0, "triton": 0.9}, task="forward"),
    Goal("ResNet-50 step", "eager", _all(1.3), task="step"),
    Goal("ResNet-50 step", "eager", _all(1.3), task="graph"),
    Goal("BatchNorm + ReLU", "eager", _both(2.0)),
    Goal("BatchNorm + ReLU", "compile", _both(1.1)),
    Goal("depthwise", "cuDNN", _both(3.0), layout="channels_last"),
    Goal("depthwise", "cuDNN", _both(3.0), layout="NCHW"),
    Goal("SGD", "fused", {"cuda": 1.1, "triton": 1.0}),
    Goal("SGD", "copy", _both(0.9)),
    Goal("small steps", "eager", _all(1.5), task="step"),
    Goal("small steps", "eager", _all(1.5), task="graph"),
    Goal("small steps", "graph", _all(1.0), task="graph"),
    Goal("grouped", "cuDNN", _both(3.0)),
    Goal("float32 3x3", "cuDNN", _both(1.5)),
    Goal("NCHW layers", "cuDNN", _both(1.0)),
    Goal("ResNet-50 step, updated in backward", "eager", _all(1.3), task="in backward"),
    Goal("ResNet-50 step, compiled", "compile", _all(1.1), task="step"),
    Goal("ResNet-50 step, compiled", "compile", _all(1.1), task="graph"),
    *(Goal("Triton rivals", rival, _both(1.0)) for rival in TRITON_RIVALS),
)
