"""Peak memory of a training step, ours and native's, each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from gdfast.backends import tuning
from gdfast.bench.cases import STEPS, StepCase

_STEPS = 3  # the first allocates gradients and momentum; what a pool keeps shows in the later ones


def compare(case: StepCase, dtype: torch.dtype, ours: str, native: str) -> tuple[int, int]:
    """Peak bytes of training by ours and by native, each in the layout named.

    What this process has chosen, the others find in the file: they train as it does, and use no
    memory for timing candidates.

    Raises:
        subprocess.CalledProcessError: a process did not get to its end.
    """
    tuning.save()
    name = str(dtype).removeprefix("torch.")
    found = []
    for side, layout in (("ours", ours), ("native", native)):
        command = [
            sys.executable, "-m", __name__, case.name, side, layout, name,
            str(torch.get_num_threads()),
        ]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(int(done.stdout))
    return found[0], found[1]


def peak(case: StepCase, side: str, layout: str, dtype: torch.dtype) -> int:
    """Bytes by which this process's largest size grows over a few steps, the model's included.

    It says something only in a process that has done nothing before.
    """
    from gdfast import optim
    from gdfast.bench import sgd, step, suites

    before = _status("VmRSS")
    ours, native = suites.both_models(case)
    if side == "ours":
        training = step.Training(case, ours, optim.SGD, layout, dtype)
    else:
        rivals = sgd.native_variants(dtype)
        make = rivals["fused" if "fused" in rivals else "loop"]
        training = step.Training(case, native, make, layout, dtype)
    del ours, native
    for _ in range(_STEPS):
        training()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """This process's memory now (VmRSS) or at its largest (VmHWM), in bytes."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        # Elsewhere the largest size is all there is to know, in bytes there.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in text.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=[case.name for case in STEPS])
    parser.add_argument("side", choices=("ours", "native"))
    parser.add_argument("layout")
    parser.add_argument("dtype")
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = next(case for case in STEPS if case.name == args.case)
    print(peak(case, args.side, args.layout, getattr(torch, args.dtype)))


if __name__ == "__main__":
    _main()
