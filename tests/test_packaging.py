"""What the package says of itself: metadata, extras, and the files that agree with each other."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gdfast

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def metadata() -> importlib.metadata.PackageMetadata:
    return importlib.metadata.metadata("gdfast")


def requirements(extra: str | None = None) -> set[str]:
    """Names required always (None) or by one extra, lower case."""
    names = set()
    for line in importlib.metadata.requires("gdfast") or []:
        requirement, _, marker = line.partition(";")
        found = re.search(r"""extra\s*==\s*['"]([^'"]+)""", marker)
        if (found.group(1) if found else None) == extra:
            name = re.match(r"[\w.-]+", requirement)
            assert name is not None
            names.add(name.group().lower())
    return names


def test_version_is_the_same_everywhere(metadata: importlib.metadata.PackageMetadata) -> None:
    assert metadata["Version"] == gdfast.__version__
    assert f"## [{gdfast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_metadata(metadata: importlib.metadata.PackageMetadata) -> None:
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_core_needs_torch_and_numpy_only() -> None:
    assert requirements() == {"torch", "numpy"}


def test_build_does_not_need_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    build_system = text.partition("[build-system]")[2].partition("\n[")[0]
    assert '"pybind11' in build_system
    assert '"torch' not in build_system


def test_extras(metadata: importlib.metadata.PackageMetadata) -> None:
    extras = {"train", "triton", "export", "tensorboard", "dev"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras
    assert requirements("train") >= {"matplotlib", "scikit-learn", "safetensors"}
    assert requirements("triton") == {"triton"}
    assert requirements("export") == {"onnx", "onnxscript", "onnxruntime"}
    assert requirements("dev") >= {"pytest", "ruff", "mypy", "gdfast"}


def test_constraints_pin_every_requirement() -> None:
    pinned = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert "==" in line, line
            pinned.add(line.partition("==")[0].lower())
    # torch requires the one triton that it was built with.
    extras = (None, "train", "export", "tensorboard", "dev")
    wanted = set().union(*map(requirements, extras)) - {"gdfast"}
    assert wanted <= pinned, wanted - pinned


def test_ships_type_hints() -> None:
    assert (Path(gdfast.__file__).parent / "py.typed").exists()


def test_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="gdfast")
    assert {script.value for script in scripts} == {"gdfast.cli:main"}


def test_import_does_not_need_the_extras() -> None:
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'sklearn', 'safetensors', 'yaml', 'PIL', 'triton', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        "import gdfast\n"
        "gdfast.nn, gdfast.optim, gdfast.ops, gdfast.swap_, gdfast.models, gdfast.data\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there() -> None:
    for name in gdfast.__all__:
        assert getattr(gdfast, name) is not None
    assert callable(gdfast.swap)
    with pytest.raises(AttributeError, match="no attribute 'swop'"):
        _ = gdfast.swop
