"""Trained models as ONNX files, for programs that have no PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gdfast
from gdfast import backends
from gdfast.extras import require
from gdfast.files import write_atomic
from gdfast.train import predict
from gdfast.train.errors import RunError

_TOLERANCE = 1e-3  # of the largest output: what float32 sums in another order come to, with room


def export(run: str | Path, out: str | Path | None = None) -> tuple[Path, float]:
    """Write the model of a run, with its best weights, as ONNX, and check it with onnxruntime.

    The images are an input "images" [N, C, H, W] of any N, prepared as in training (the file's
    metadata says how); gdfast's layers become PyTorch's first. `out` None is model.onnx beside the
    weights. Returns the file's path and the largest difference between its outputs and the model's,
    as a share of the largest output.

    Raises:
        RunError: no weights there, or a file whose outputs are not the model's.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "gdfast export")
    trained = predict.load(run)
    path = trained.path.parent / "model.onnx" if out is None else Path(out).expanduser()
    model = trained.model
    gdfast.restore_(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *trained.shape(), generator=generator)
    with backends.backend("native"), torch.no_grad():
        content = _to_onnx(model, images, trained.metadata)
        error = max(_difference(model, content, each) for each in (images, images[:1]))
    if not error <= _TOLERANCE:
        raise RunError(
            f"export: {path}: expected the model's own outputs from onnxruntime, got a difference "
            f"of {error:.1e} of the largest; nothing was written"
        )
    write_atomic(path, content)
    return path, error


def _to_onnx(model: nn.Module, images: Tensor, metadata: dict[str, str]) -> bytes:
    onnx = require("onnx", "export", "gdfast export")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (images,),
            str(file),
            input_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        exported: Any = onnx.load(str(file))
    onnx.helper.set_model_props(exported, {f"gdfast.{key}": v for key, v in metadata.items()})
    onnx.checker.check_model(exported)
    content: bytes = exported.SerializeToString()
    return content


def _difference(model: nn.Module, content: bytes, images: Tensor) -> float:
    runtime = require("onnxruntime", "export", "gdfast export")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"images": images.numpy()})
    ours = [tensor.numpy() for tensor in _flat(model(images))]
    if [each.shape for each in ours] != [each.shape for each in theirs]:
        return float("inf")
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(a).max() or 1)) for a, b in pairs)


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _flat(value)]


@contextlib.contextmanager
def _quiet() -> Any:
    # The exporter tells of each of its stages, on both streams and by warnings of its own.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
