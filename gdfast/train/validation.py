"""Measuring a trained model on the test part of its data, or of other data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import gdfast
from gdfast import backends
from gdfast.backends.registry import REFERENCE
from gdfast.extras import require
from gdfast.train import predict, rng, weights
from gdfast.train.errors import RunError
from gdfast.train.folder import RunFolder
from gdfast.train.here import settle_here
from gdfast.train.recipe import Settings
from gdfast.train.tasks import TASKS, settle


def validate(
    run: str | Path,
    *,
    data_spec: str | None = None,
    weights_file: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    backend: str | None = None,
) -> tuple[dict[str, float], Path | None]:
    """Measure the best weights of the run in a folder, or those in `weights_file`.

    Returns the measures, and the folder of the pictures and metrics.json, if `out` names one.

    Raises:
        RunError: no such run, or weights that do not fit it.
        DataError, SettingsError: as in `train`.
    """
    path = Path(run).expanduser()
    settings = _settings(path)
    settings = settle_here(
        replace(
            settings,
            device=device,
            data=settings.data if data_spec is None else data_spec,
            backend=settings.backend if backend is None else backend,
        )
    )
    kind = TASKS[settings.task].load()
    data = kind.load(settings)
    rng.seed_all(settings.seed)
    task = kind(settings, data)
    settings = settle(settings, task.epochs)
    file = predict.find_weights(path if weights_file is None else weights_file)
    tensors, metadata = weights.read(file)
    _refuse_other_answers(task.metadata(), metadata, settings.data, file)
    weights.load(task.exported(task.model), tensors, file)
    model = task.model.to(torch.device(settings.device)).eval()
    if settings.backend == REFERENCE:
        gdfast.restore_(model)
    with backends.backend(settings.backend), torch.inference_mode():
        measures = task.evaluate(model)
    if out is None:
        return measures, None
    folder = RunFolder.create(f"val-{settings.task}", out)
    extra: dict[str, Any] = task.write_results(model, folder)
    about = {"weights": str(file), "data": settings.data, "data_fingerprint": data.fingerprint()}
    folder.write_json("metrics.json", {**measures, **about, **extra})
    return measures, folder.path


def _refuse_other_answers(
    now: Mapping[str, str], then: Mapping[str, str], data: str, file: Path
) -> None:
    """Raise RunError for data that the weights were not made for."""
    for name, what in (("classes", "the classes"), ("shape", "images in the shape")):
        if name in now and name in then and json.loads(now[name]) != json.loads(then[name]):
            raise RunError(
                f"val: {data}: expected {what} that {file} was trained on, {then[name][:80]}, "
                f"found {now[name][:80]}"
            )


def _settings(path: Path) -> Settings:
    yaml = require("yaml", "train", "gdfast val")
    try:
        values = yaml.safe_load((path / "args.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "no YAML"
        raise RunError(
            f"val: {path}: expected a run's folder with args.yaml, found: {reason}"
        ) from None
    if not isinstance(values, dict):
        raise RunError(f"val: {path / 'args.yaml'}: expected a run's settings, found other YAML")
    return Settings.from_dict(values)
