"""Imports go one way: a module may import only from its own row of the table and those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gdfast"

# The longest name that fits decides a module's row.
ROWS = (
    (
        "errors",
        "extras",
        "files",
        "geometry",
        "tensor_cores",
        "windows",
        "mirror",
        "processor",
        "tensor_files",
    ),
    ("native", "backends.triton"),
    ("backends",),
    ("ops",),
    ("nn", "optim"),
    ("graphs", "step_tape", "swap", "tape"),
    ("losses", "models"),
    ("data", "metrics", "face"),
    ("train",),
    ("bench", "doctor", "self_test"),
    ("explain",),
    ("cli", "__main__"),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
# Functions that the package itself offers, and the module that they come from.
OFFERED = {
    "GraphedStep": "graphs",
    "autotune": "backends",
    "backend": "backends",
    "restore_": "swap",
    "swap_": "swap",
    "swapped": "swap",
}


def row_of(module: str) -> int | None:
    """Row of a module named from within the package, such as "ops.conv2d"."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in ROW_OF:
            return ROW_OF[name]
    return None


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Line and name, within gdfast, of everything that a source imports from it, lazily too.

    `package` is the source's own package, within gdfast: relative imports start there.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = ["gdfast", *package.split(".")] if package else ["gdfast"]
                start = start[: len(start) - node.level + 1]
                base = ".".join([*start, base] if base else start)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            # `import gdfast` and then gdfast.nn.Conv2d.
            if isinstance(node.value, ast.Name) and node.value.id == "gdfast":
                names = [f"gdfast.{node.attr}"]
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else None
            first = node.args[0] if node.args else None
            if function == "import_module" and isinstance(first, ast.Constant):
                names = [str(first.value)]
        for name in names:
            if name.startswith("gdfast."):
                inside = name.removeprefix("gdfast.")
                head, _, rest = inside.partition(".")
                found.append((node.lineno, OFFERED.get(head, head) + ("." + rest if rest else "")))
    return found


def violations(source: str, module: str, package: str) -> list[str]:
    own = row_of(module)
    assert own is not None, f"{module}: in no row of the table"
    wrong = []
    for line, name in imports(source, package):
        row = row_of(name)
        if row is not None and row > own:
            wrong.append(f"gdfast.{module}:{line} imports gdfast.{name}, from a row below it")
    return wrong


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_only_from_above(path: Path) -> None:
    package = ".".join(path.relative_to(PACKAGE).parent.parts)
    assert not violations(path.read_text(), module_of(path), package)


def test_the_table_of_cases_imports_nothing_of_the_package_but_their_kinds() -> None:
    bench = PACKAGE / "bench"
    assert not imports((bench / "case_kinds.py").read_text(), "bench")
    found = imports((bench / "cases.py").read_text(), "bench")
    assert found
    assert all(name.startswith("bench.case_kinds.") for _, name in found)


@pytest.mark.parametrize(
    "source",
    [
        "from gdfast.nn import Conv2d",
        "import gdfast.nn.conv",
        "from gdfast import nn",
        "from .. import nn",
        "from ..nn.conv import Conv2d",
        "def late():\n    from ..nn import Conv2d",
        "import gdfast\n\ngdfast.nn.Conv2d",
        "import gdfast\n\ngdfast.swap_",
        "import importlib\n\nimportlib.import_module('gdfast.nn')",
    ],
)
def test_a_wrong_import_is_found(source: str) -> None:
    assert len(violations(source, "ops.conv2d", "ops")) == 1


def test_right_imports_pass() -> None:
    source = "import torch\nfrom .. import backends\nfrom ..geometry import pair\nfrom . import sgd"
    assert violations(source, "ops.conv2d", "ops") == []
