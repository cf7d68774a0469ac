"""Choices of how convolutions run, as values that files keep: each may have been tampered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

MOST = 4096  # choices in one file; a model has dozens
_LONGEST_KEY = 2000
_LONGEST_NAME = 40
_MOST_CANDIDATES = 20


@dataclass(frozen=True)
class Choice:
    """The name of the candidate that runs a query, and the seconds per call it was chosen by.

    `seconds` has a value for every candidate that was timed; it is empty where a cost model chose.
    """

    name: str
    seconds: Mapping[str, float] = field(default_factory=dict)


def to_plain(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """Choices as strings, numbers and dicts."""
    return {
        key: {"choice": choice.name, "seconds": dict(choice.seconds)}
        for key, choice in choices.items()
    }


def from_plain(values: Any) -> dict[str, Choice]:
    """The inverse of `to_plain`. Raises ValueError for anything that it does not give."""
    if not isinstance(values, dict) or len(values) > MOST:
        raise ValueError(f"expected at most {MOST} choices, got {_short(values)}")
    return {_checked_key(key): _checked(value) for key, value in values.items()}


def _checked_key(key: Any) -> str:
    if not isinstance(key, str) or len(key) > _LONGEST_KEY:
        raise ValueError(f"expected a choice's key, got {_short(key)}")
    return key


def _checked(value: Any) -> Choice:
    if not isinstance(value, dict) or value.keys() != {"choice", "seconds"}:
        raise ValueError(f"expected a choice and its seconds, got {_short(value)}")
    name, seconds = value["choice"], value["seconds"]
    if not _is_name(name):
        raise ValueError(f"expected a choice's name, got {_short(name)}")
    if not isinstance(seconds, dict) or len(seconds) > _MOST_CANDIDATES:
        raise ValueError(f"expected seconds by candidate, got {_short(seconds)}")
    for candidate, time in seconds.items():
        if not _is_name(candidate) or type(time) is not float or not isfinite(time) or time < 0:
            raise ValueError(f"expected seconds of a candidate, got {_short(time)}")
    return Choice(name, seconds)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME


def _short(value: Any) -> str:
    text = repr(value)[:60] if isinstance(value, (str, int, float)) else type(value).__name__
    return text.replace("\n", " ")
