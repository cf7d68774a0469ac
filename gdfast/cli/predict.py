"""`gdfast predict`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gdfast.cli.train import text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gdfast predict` to a parser."""
    add = parser.add_argument
    add("run", type=text, metavar="RUN", help="a run's folder, or a file of its weights")
    add("images", type=text, nargs="+", metavar="IMAGE", help="images, or folders of them")
    add(
        "--out", type=text, metavar="DIR", default="predictions",
        help="folder for the pictures and predictions.json (default: predictions)",
    )  # fmt: skip
    add("--no-pictures", action="store_true", help="write predictions.json alone")
    add("--threshold", type=float, metavar="X", help="least confidence or similarity to report")
    add("--gallery", type=text, metavar="PATH",
        help="people to recognise faces by: a folder with a folder for each person, or a file of "
        "enrolled ones")  # fmt: skip
    add("--device", type=text, default="cpu", metavar="NAME", help="cpu (default), cuda, ...")
    add("--backend", type=text, default="auto", metavar="NAME", help="auto (default), native, ...")


def main(args: argparse.Namespace) -> int:
    """Predict; returns 0, or 1 if an image could not be read."""
    from gdfast import backends
    from gdfast.data import DataError, decode
    from gdfast.files import write_atomic
    from gdfast.train import predict
    from gdfast.train.here import find_device

    given = {"threshold": args.threshold, "gallery": args.gallery}
    options = {name: value for name, value in given.items() if value is not None}
    trained = predict.load(args.run, find_device(args.device))
    paths = list(predict.image_files(args.images))
    answers: list[dict[str, Any]] = []
    bad = 0
    with backends.backend(args.backend):
        predictor = trained.predictor(**options)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for path in paths:
            try:
                image = decode.read(path)
            except DataError as error:
                print(f"gdfast: {error}: left out", file=sys.stderr)
                bad += 1
                continue
            answer = predictor(image)
            answers.append({"image": str(path), **answer})
            if not args.no_pictures:
                name = f"{len(answers):04}-{path.stem}.png"
                answers[-1]["picture"] = name
                write_atomic(out / name, predictor.draw(image, answer))
            print(f"{path}: {_in_words(answer)}", flush=True)
    write_atomic(out / "predictions.json", (json.dumps(answers, indent=2) + "\n").encode())
    print(f"{len(answers):,} images; everything is in {out}")
    return 1 if bad or not answers else 0


def _in_words(answer: dict[str, Any]) -> str:
    if "class" in answer:
        return f"{answer['class']} ({answer['probabilities'][answer['class']]:.1%})"
    if "summary" in answer:
        return str(answer["summary"])
    return json.dumps(answer)
