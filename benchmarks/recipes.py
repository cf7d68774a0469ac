"""Every recipe's training step, ours beside native PyTorch, on the recipe's own batches.

    python benchmarks/recipes.py --out benchmarks/results
    python benchmarks/recipes.py yolo=voc:DIR face=faces:DIR

Each task is built twice from one seed, with `--backend auto` and `--backend native`. First their
losses over a few steps are compared, then single steps are timed in turns: whole steps of the
training loop, on batches that have been read before. About a minute for each task on two cores.
"""

from __future__ import annotations

import argparse
import io
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from gdfast import backends
from gdfast.backends import tuning
from gdfast.bench import machine
from gdfast.bench.timer import compare
from gdfast.train import TASKS, Settings, rng
from gdfast.train.distributed import Group
from gdfast.train.here import settle_here
from gdfast.train.run import Run

_BATCHES = 4
_CHECKED_STEPS = 3
_LR = 1e-3  # low, so that the compared losses do not part by rounding alone
_FIRST, _LATER = 1e-4, 1e-2  # relative: of the same weights, and of weights after a step or two


class Step:
    """One step of a task's training, again and again, on a few batches held in memory."""

    def __init__(self, task: str, data: str, backend: str) -> None:
        settings = settle_here(Settings(task=task, data=data, backend=backend, workers=0))
        rng.seed_all(settings.seed)
        loaded = TASKS[task].load().load(settings)
        run = Run(settings, loaded, Group(), io.StringIO())
        self.trainer = run.trainer()
        self.backend = settings.backend
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = _LR
        self.trainer.model.train()
        accumulate = self.trainer.recipe.accumulate
        self.batches = list(islice(self.trainer.batches.steps(0, parts=accumulate), _BATCHES))
        self.next = cycle(self.batches)

    def __call__(self) -> float:
        parts = next(self.next)
        with backends.backend(self.backend):
            return self.trainer.step(parts, sum(len(part.images) for part in parts))["loss"]


def measure(task: str, data: str, rounds: int) -> dict[str, Any]:
    """Both ways' losses compared, and their steps timed."""
    with tuning.recorded({}):
        steps = {name: Step(task, data, name) for name in ("auto", "native")}
        losses = {name: [step() for _ in range(_CHECKED_STEPS)] for name, step in steps.items()}
        for number, (ours, native) in enumerate(zip(*losses.values(), strict=True)):
            if not abs(ours - native) <= (_LATER if number else _FIRST) * abs(native):
                raise SystemExit(f"{task}: expected losses alike, got {losses}")
        compared = compare(steps, rounds, baselines=["native"])
    low, high = compared.spread("auto", "native")
    return {
        "task": task,
        "data": Path(data).name or TASKS[task].data,
        "batch": steps["auto"].trainer.recipe.batch_size,
        "image": list(steps["auto"].batches[0][0].images.shape[1:]),
        "ms": {name: 1e3 * compared.median(name) for name in steps},
        "ratio": compared.ratio("auto", "native"),
        "spread": [low, high],
        "null": list(compared.null_spread),
        "losses": losses,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK[=DATA]", help="default: all, own data")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--out", metavar="DIR", help="folder for the JSON file")
    args = parser.parse_args()
    chosen = dict(each.partition("=")[::2] for each in args.tasks or TASKS)
    rows = []
    print(
        f"{'task':<8}{'data':<12}{'batch':<22}{'ours':>9}{'native':>10}{'ratio':>7}  spread, null"
    )
    for task, data in chosen.items():
        row = measure(task, data, args.rounds)
        rows.append(row)
        shape = f"{row['batch']} x {'x'.join(map(str, row['image']))}"
        print(
            f"{task:<8}{row['data']:<12}{shape:<22}{row['ms']['auto']:>6.1f} ms"
            f"{row['ms']['native']:>7.1f} ms{row['ratio']:>7.2f}  "
            f"{row['spread'][0]:.2f}-{row['spread'][1]:.2f}  "
            f"{row['null'][0]:.2f}-{row['null'][1]:.2f}",
            flush=True,
        )
    if args.out:
        path = machine.write_rows(args.out, f"recipes-{torch.get_num_threads()}t", rows)
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
