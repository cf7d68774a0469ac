"""What reading data can raise."""

from __future__ import annotations

from gdfast.errors import UserError


class DataError(UserError, ValueError):
    """Data is missing or not what it claims to be: one line with what was expected and found."""
