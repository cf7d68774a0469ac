"""Reading weights from files that others wrote: nothing in them is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gdfast import tensor_files
from gdfast.train import checkpoint
from gdfast.train.errors import RunError


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata: safetensors, or a state_dict that torch saved.

    Raises:
        RunError: no such file, not one of weights, or one whose checksum is another.
        MissingExtraError: safetensors is not installed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RunError(f"weights: {path}: expected a file of weights, found no such file")
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path), {}
    try:
        return tensor_files.read(path)
    except ValueError as error:
        raise RunError(f"weights: {path}: expected safetensors (or .pt), found {error}") from None


def load_matching(model: nn.Module, path: str | Path, *, skip: Sequence[str] = ()) -> None:
    """Load a file's weights into a model; those under the names `skip` only where they fit.

    Raises:
        RunError: `read` raises it; or weights that are missing, unknown, or of another shape.
    """
    tensors, _ = read(path)
    own = model.state_dict()
    for name in [name for name in own if name.startswith(tuple(skip))] if skip else []:
        if name not in tensors or tensors[name].shape != own[name].shape:
            tensors[name] = own[name]
    load(model, tensors, path)


def load(
    model: nn.Module, tensors: dict[str, Tensor], path: str | Path, *, assign: bool = False
) -> None:
    """Load weights into a model, every one of them; `assign` makes them the model's own tensors.

    Raises:
        RunError: weights that are missing, unknown, or of another shape.
    """
    try:
        model.load_state_dict(tensors, strict=True, assign=assign)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[1:] or lines)[:200]
        kind = type(model).__name__
        raise RunError(f"weights: {path}: expected the weights of a {kind}: {reason}") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        checkpoint.refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail at whatever they say wrong first
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise RunError(
            f"weights: {path}: expected a state_dict that torch saved, found another or a damaged "
            f"file ({reason})"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise RunError(f"weights: {path}: expected a state_dict, found {type(content).__name__}")
    return content
