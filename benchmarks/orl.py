"""How well faces are told apart after `gdfast train face`, on the ORL database, over several seeds.

    python benchmarks/orl.py /path/to/orl_faces --out benchmarks/results

trains and tests by two protocols, with the recipe "default". Identification: photographs 1-5 of all
40 people train, 6-10 are recognised. Verification: ten people are unseen in turn (s1-s10, s11-s20,
...), the other 30 train, and all pairs of the unseen count; the mean over the four folds is given.
Beside them stands the same with no network: the cosine of the pixels. The figures are those after
the last epoch: no epoch was chosen by the test. Five trainings a seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gdfast.bench import machine
from gdfast.data import faces
from gdfast.data.face_splits import split
from gdfast.metrics import verification
from gdfast.train import Settings, train

FOLDS = 4
MEASURES = ("rank1", "auc", "eer", "tar")


def trained(folder: str, seed: int, **options: Any) -> dict[str, float]:
    """Measures and seconds of one training."""
    with tempfile.TemporaryDirectory() as parent:
        settings = Settings(task="face", data=f"faces:{folder}", seed=seed, options=options)
        metrics = train(settings, out=Path(parent) / "run").metrics
    return {name: metrics[name] for name in (*MEASURES, "seconds")}


def of_pixels(folder: str, protocol: str, fold: int = 1) -> dict[str, float]:
    """The same measures of the images themselves, each brought to mean 0 and length 1."""
    found = split(faces.load(folder), protocol, fold=fold, folds=FOLDS)
    pixels = found.tested().images.reshape(len(found.tested()), -1).astype(np.float64)
    pixels -= pixels.mean(1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    enrolled = len(found.gallery)
    named = verification.identify(pixels[enrolled:], pixels[:enrolled], found.gallery.people)
    roc = verification.roc(found.pairs.similarities(pixels), found.pairs.same)
    rank1 = float((named.people == found.probes.people).mean())
    return dict(zip(MEASURES, (rank1, roc.auc, roc.eer, roc.tar_at()), strict=True))


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def main() -> int:
    """Train, and print and write the figures as they come."""
    parser = argparse.ArgumentParser(description="face recognition on ORL, over several seeds")
    parser.add_argument("folder", help="s1 to s40, with 1.pgm to 10.pgm each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="runs")
    args = parser.parse_args()
    folds = range(1, FOLDS + 1)
    rows: dict[str, Any] = {}

    def add(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        machine.write_rows(args.out, "orl", rows)
        print(f"{name:20}", *(f"{measure} {row[measure]:.4f}" for measure in MEASURES), sep="  ")

    add("pixels identify", of_pixels(args.folder, "identify"))
    add("pixels verify", mean([of_pixels(args.folder, "verify", fold) for fold in folds]))
    for seed in range(args.seeds):
        add(f"identify seed {seed}", trained(args.folder, seed, protocol="identify"))
        found = [
            trained(args.folder, seed, protocol="verify", fold=fold, folds=FOLDS) for fold in folds
        ]
        add(f"verify seed {seed}", {**mean(found), "folds": found})
    print(f"everything is in {machine.write_rows(args.out, 'orl', rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
