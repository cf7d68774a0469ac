"""Run folders: where a training leaves what it made, each file written whole."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdfast.extras import require
from gdfast.files import remove_leftovers, write_atomic
from gdfast.tensor_files import checksum
from gdfast.train.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


class RunFolder:
    """A folder for one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, model: str, out: str | Path | None = None) -> RunFolder:
        """Make the folder `out`, or `runs/MODEL-1`, `runs/MODEL-2`, ... without `out`.

        Raises:
            RunError: `out` is a file or holds files already, or it cannot be made.
        """
        try:
            return cls(_numbered(Path("runs"), model) if out is None else _empty(Path(out)))
        except OSError as error:
            raise RunError(
                f"train: out: expected a folder that can be made and written to, got "
                f"{error.filename}: {error.strerror}"
            ) from None

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of a run that goes on; leftovers of a killed process are cleared away."""
        remove_leftovers(path)
        return cls(path)

    def write(self, name: str, content: bytes) -> None:
        """Write a file in place of the one before; if that fails, the one before stays whole.

        Raises:
            OSError: the folder is gone or read-only, or the disk is full.
        """
        write_atomic(self.path / name, content)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        self.write(name, (json.dumps(values, indent=2) + "\n").encode())

    def write_yaml(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a YAML file, keys in the order given."""
        yaml = require("yaml", "train", "a run folder")
        self.write(name, yaml.safe_dump(dict(values), sort_keys=False).encode())

    def write_csv(self, name: str, header: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        """Write numbers as a CSV file; they keep all their digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_number(value) for value in row] for row in rows)
        self.write(name, text.getvalue().encode())

    def write_figure(self, name: str, figure: Figure) -> None:
        """Write a matplotlib figure as PNG."""
        from gdfast.train.plots import png  # which draws what this module writes

        self.write(name, png(figure))

    def write_weights(
        self, name: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write tensors as safetensors, with a checksum of theirs in the metadata."""
        save = require("safetensors.torch", "train", "saving weights").save
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        self.write(name, save(tensors, {**metadata, "sha256": checksum(tensors)}))


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _numbered(parent: Path, model: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [
        int(path.name.removeprefix(f"{model}-"))
        for path in parent.glob(f"{model}-*")
        if path.name.removeprefix(f"{model}-").isdecimal()
    ]
    number = max(taken, default=0) + 1
    while True:
        path = parent / f"{model}-{number}"
        try:
            path.mkdir()  # fails if another process was quicker
        except FileExistsError:
            number += 1
        else:
            return path


def _empty(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise RunError(f"train: out: expected a folder, got the file {path}")
    if path.is_dir() and (found := sorted(entry.name for entry in path.iterdir())):
        raise RunError(
            f"train: out: expected a new or empty folder, got {path}, which holds {found[0]}"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}; "
            f"to go on with a run there: --resume {path}"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path
