"""How the cost of a training step grows: with the batch, with the image, with a second thread.

    python benchmarks/scaling.py --out benchmarks/results

times steps of ResNet-18 on our layers, on native PyTorch (the better of its layouts) and sets both
beside the floor: the step's arithmetic at the machine's measured peak. Every point is saved as soon
as it is measured; run again, it goes on where it was interrupted (--again starts afresh). It takes
about eight minutes on two cores; --batches and --sizes choose points.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gdfast.bench import machine, peak, suites, timer
from gdfast.bench.cases import StepCase
from gdfast.bench.workload import Workload, relative_error
from gdfast.extras import MissingExtraError, require
from gdfast.files import write_atomic

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # of images of 112 x 112
SIZES = (32, 64, 128, 224, 416)  # at a batch of 8
_BATCH, _SIZE = 8, 112
_CLASSES = 10  # that labels are drawn from: any model has so many
# Whether gradients are right is for `gdfast bench --suite step` to say. Here it is only made sure
# that both sides train on the same: a ReLU that falls to the other side of its kink is no error.
_ALIKE = 0.2


def cases(
    model: str, batches: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[str, StepCase]]:
    """Each point with the sweep that it belongs to."""
    for N in batches:
        yield "batch", StepCase(f"{model} N={N}", model, N, 3, _SIZE, _SIZE, _CLASSES)
    for size in sizes:
        yield "size", StepCase(f"{model} @{size}", model, _BATCH, 3, size, size, _CLASSES)


def measure(sweep: str, case: StepCase, limits: peak.Peak, rounds: int) -> dict[str, Any]:
    """One point: seconds of ours and of native's best, their ratio, and the floor."""
    workload = suites.step_workload(case, torch.float32)
    _check(workload)
    ours, _ = timer.shortlist(workload.ours, workload.shortlist)
    native, _ = timer.shortlist(workload.native, workload.shortlist)
    rivals = [f"native {name}" for name in native]
    names = [*(f"ours {name}" for name in ours), *rivals]
    twin = workload.twin
    assert twin is not None
    times = timer.compare(
        {name: workload.calls[name] for name in names},
        rounds,
        baselines=rivals,
        twin=lambda name: twin(name.removeprefix("native ")),
    )
    best_ours, best_native = times.best(set(names) - set(rivals)), times.best(rivals)
    return {
        "sweep": sweep,
        "threads": torch.get_num_threads(),
        "N": case.N,
        "size": case.H,
        "ours": times.median(best_ours),
        "native": times.median(best_native),
        "best_ours": best_ours,
        "best_native": best_native,
        "ratio": times.ratio(best_ours, best_native),
        "spread": times.spread(best_ours, best_native),
        "null_spread": times.null_spread,
        "flops": workload.flops,
        "floor": workload.flops / limits.flops,
    }


def _check(workload: Workload) -> None:
    gradients = {}
    for name, step in workload.calls.items():
        step()
        gradients[name] = step.gradients()  # type: ignore[attr-defined]
    reference = gradients[f"native {next(iter(workload.native))}"]
    for name, gradient in gradients.items():
        error = relative_error(gradient, reference)
        if not error < _ALIKE:
            raise SystemExit(f"{workload.name}: {name}: gradients differ by {error:.1e}")


def table(points: list[dict[str, Any]]) -> str:
    """Milliseconds of a step, by sweep and threads."""
    lines = [
        "threads   batch  pixels     native       ours  ratio      floor  ours/floor  us/image"
    ]
    before = None
    for p in sorted(points, key=lambda p: (p["threads"], p["sweep"], p["N"], p["size"])):
        if before not in (None, (p["threads"], p["sweep"])):
            lines.append("")
        before = p["threads"], p["sweep"]
        lines.append(
            f"{p['threads']:7} {p['N']:7} {p['size']:7} {p['native'] * 1e3:10.2f} "
            f"{p['ours'] * 1e3:10.2f} {p['ratio']:6.2f} {p['floor'] * 1e3:10.2f} "
            f"{p['ours'] / p['floor']:11.2f} {p['ours'] / p['N'] * 1e6:9.0f}"
        )
    return "\n".join(lines)


def plot(points: list[dict[str, Any]], title: str, path: Path) -> None:
    """Step time over batch and over image size, for each number of threads."""
    require("matplotlib", "train", "the plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=120)
    FigureCanvasAgg(figure)
    sides = (("native", "#d62728", "-"), ("ours", "#1f77b4", "-"), ("floor", "#888888", ":"))
    sweeps = (("batch", "N", f"images in the batch, {_SIZE} x {_SIZE}"),
              ("size", "size", f"height and width in pixels, batch {_BATCH}"))  # fmt: skip
    for position, (sweep, key, label) in enumerate(sweeps, 1):
        axes = figure.add_subplot(1, 2, position)
        for threads in sorted({p["threads"] for p in points}):
            chosen = sorted(
                (p for p in points if p["sweep"] == sweep and p["threads"] == threads),
                key=lambda p: p[key],
            )
            marker = "o" if threads == 1 else "s"
            for side, colour, line in sides:
                axes.plot(
                    [p[key] for p in chosen], [p[side] * 1e3 for p in chosen], line, color=colour,
                    marker=marker, markersize=4, linewidth=1.2,
                    label=f"{side}, {threads} thread{'s' * (threads > 1)}",
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({p[key] for p in points if p["sweep"] == sweep})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("milliseconds for a training step")
        axes.grid(color="#dddddd", linewidth=0.6)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="default: resnet18")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES, metavar="N")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, metavar="PIXELS")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR")
    parser.add_argument("--again", action="store_true", help="measure every point anew")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stem = "-".join(filter(None, [machine.slug(), "scaling", args.model, machine.held()]))
    path = args.out / f"{stem}.json"
    if unfair := machine.unfair():
        print(unfair, file=sys.stderr)

    points: list[dict[str, Any]] = []
    if path.exists() and not args.again:
        points = json.loads(path.read_text(encoding="utf-8"))["points"]
    done = {(p["threads"], p["sweep"], p["N"], p["size"]) for p in points}
    facts = machine.describe()
    for threads in args.threads:
        torch.set_num_threads(threads)
        wanted = [
            (sweep, case)
            for sweep, case in cases(args.model, args.batches, args.sizes)
            if (threads, sweep, case.N, case.H) not in done
        ]
        limits = peak.measure() if wanted else peak.Peak(0.0, 0.0)
        for sweep, case in wanted:
            point = measure(sweep, case, limits, args.rounds)
            points.append(point)
            print(f"{case}, threads {threads}: ratio {point['ratio']:.2f}", file=sys.stderr)
            document = {"schema": 1, "machine": facts, "rounds": args.rounds, "points": points}
            write_atomic(path, f"{json.dumps(document, indent=1)}\n".encode())
    print(table(points))
    try:
        plot(points, f"{args.model} on {facts['cpu']}, float32", path.with_suffix(".png"))
    except MissingExtraError as error:
        print(f"no plot: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
