"""Native packages' submodules, importable by the names of our packages that mirror them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


def mirror_submodules(ours: str, native: str, own: Collection[str]) -> None:
    """Lets `import ours.x` give the module `native.x`, unless x is one of `own` or private."""
    # First: a package within `native` would have its files loaded again by our name for it.
    sys.meta_path.insert(0, _Finder(ours + ".", native + ".", own))


class _Finder(MetaPathFinder):
    def __init__(self, ours: str, native: str, own: Collection[str]) -> None:
        self.ours, self.native, self.own = ours, native, own

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parts = name.removeprefix(self.ours).split(".")
        if not name.startswith(self.ours) or parts[0] in self.own:
            return None
        if any(part.startswith("_") for part in parts):
            return None
        native = self.native + ".".join(parts)
        try:
            module = importlib.import_module(native)
        except ModuleNotFoundError as error:
            if error.name != native:
                raise
            return None
        return spec_from_loader(name, _Loader(module))


class _Loader(Loader):
    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # where the import system has put ours
