"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gdfast.files import write_atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(file: Any) -> None:
        file.write(b"half of the ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, fail)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_files_have_ordinary_rights(tmp_path: Path) -> None:
    write_atomic(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
