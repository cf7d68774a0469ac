"""What reading data can raise."""

from __future__ import annotations


class DataError(ValueError):
    """Data is missing or not what it claims to be: one line with what was expected and found."""
