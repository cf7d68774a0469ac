"""What errors say, in one form: `op: argument: expected ..., got ...`, then the fix."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right; the command line prints its one line and no trace."""


class BackendError(UserError, RuntimeError):
    """A backend was asked for by name and cannot run what it was given."""


class FallbackWarning(UserWarning):
    """Something runs on native PyTorch because no faster backend takes it."""


def mismatch(op: str, argument: str, expected: str, got: object, fix: str = "") -> str:
    """The words for an argument that is not what `op` takes.

    `fix` is a sentence that tells what to do about it, without its full stop.
    """
    text = f"{op}: {argument}: expected {expected}, got {got}"
    return f"{text}. {fix}." if fix else text
