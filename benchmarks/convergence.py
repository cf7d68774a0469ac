"""Whether a short training ends where native PyTorch's does, over several seeds.

    python benchmarks/convergence.py --out benchmarks/results

trains ResNet-20 on scikit-learn's digits from each seed by three programs: native in NCHW, native
in channels_last, and ours. All three see the same weights and batches; they round differently, and
training amplifies that, so that native's own two layouts end apart. Ours must end within the range
of native's. About a minute and a half on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.nn import functional as F

from gdfast import data, models, optim
from gdfast.bench import machine, suites
from gdfast.bench.workload import LAYOUTS
from gdfast.files import write_atomic

_BATCH = 64
_LR, _MOMENTUM = 0.05, 0.9
_LAST = 10  # steps whose mean is the final loss: single batches differ too much


def train(model: torch.nn.Module, make: Any, layout: str, digits: data.ImageData, seed: int,
          steps: int) -> dict[str, float]:  # fmt: skip
    """Final training loss, and loss and accuracy on the test images, of one training."""
    model = model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    optimizer = make(model.parameters(), lr=_LR, momentum=_MOMENTUM)
    # Down to nothing: what is left at the end is where training went, not the last batch's noise.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = data.Loader(digits.train, _BATCH, seed=seed)
    whole = (
        batch
        for epoch in range(steps)
        for batch in batches.epoch(epoch)
        if len(batch.targets) == _BATCH
    )
    losses = []
    for images, labels in islice(whole, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(memory_format=LAYOUTS[layout])), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        (test,) = data.Loader(digits.test, len(digits.test)).epoch()
        logits = model(test.images.to(memory_format=LAYOUTS[layout]))
    return {
        "loss": mean(losses[-_LAST:]),
        "test_loss": F.cross_entropy(logits, test.targets).item(),
        "test_accuracy": (logits.argmax(1) == test.targets).float().mean().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=88, metavar="N", help="default: 88, 4 epochs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits = data.load("digits")
    found: dict[str, list[dict[str, float]]] = {"native NCHW": [], "native ch_last": [], "ours": []}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        ours, plain = suites.on_both_sides(models.create("resnet20", in_channels=1))
        for name, model, make, layout in (
            ("native NCHW", copy.deepcopy(plain), torch.optim.SGD, "NCHW"),
            ("native ch_last", plain, torch.optim.SGD, "channels_last"),
            ("ours", ours, optim.SGD, "channels_last"),
        ):
            found[name].append(train(model, make, layout, digits, seed, args.steps))
            values = found[name][-1]
            print(
                f"seed {seed}  {name:14}  loss {values['loss']:.4f}  test loss "
                f"{values['test_loss']:.4f}  accuracy {values['test_accuracy']:.3f}",
                flush=True,
            )

    within = True
    for key in ("loss", "test_loss", "test_accuracy"):
        native = [run[key] for side in ("native NCHW", "native ch_last") for run in found[side]]
        ours_values = [run[key] for run in found["ours"]]
        apart = [
            abs(one[key] - other[key])
            for one, other in zip(found["native NCHW"], found["native ch_last"], strict=True)
        ]
        inside = min(native) <= mean(ours_values) <= max(native)
        within &= inside
        spread = f"{min(native):.4f} to {max(native):.4f}; its layouts {mean(apart):.4f} apart"
        deviation = stdev(ours_values) if len(ours_values) > 1 else 0.0
        print(
            f"{key}: native {mean(native):.4f} ({spread}), ours {mean(ours_values):.4f} "
            f"+- {deviation:.4f}: {'within' if inside else 'OUTSIDE'} native's range"
        )
    stem = "-".join(filter(None, [machine.slug(), "convergence", machine.held()]))
    path = args.out / f"{stem}.json"
    document = {"schema": 1, "machine": machine.describe(), "steps": args.steps, "runs": found}
    write_atomic(path, f"{json.dumps(document, indent=1)}\n".encode())
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
