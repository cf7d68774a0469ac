"""Packages beyond torch and numpy, imported when first needed."""

from __future__ import annotations

import importlib
from typing import Any

from gdfast.errors import UserError


class MissingExtraError(UserError, ImportError):
    """A package of one of gdfast's extras is not installed; the message says how to get it."""


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an extra.

    Raises:
        MissingExtraError: it is not installed; the message names `pip install "gdfast[extra]"`.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks something of its own is another problem: show that.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise MissingExtraError(
            f'{purpose} needs {package}, which is not installed: pip install "gdfast[{extra}]"'
        ) from None
