"""What is wrong with data, said item by item: which file, which line, what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gdfast.data.errors import DataError

DEFAULT_SHARE = 0.01
_NAMED = 3


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, its line (from 1) where it has lines, and what is wrong.

    A problem of an `item` takes one image, or one image's labels, out of the data; the others (an
    empty class, say) are about the data as a whole and take nothing out.
    """

    path: Path
    what: str
    line: int | None = None
    item: bool = True

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line is not None else str(self.path)
        return f"{where}: {self.what}"


def absolute(spec: str) -> str:
    """A spec like voc:DIR with absolute paths, so that it means the same from any folder.

    Raises:
        DataError: the home of a user that is not known.
    """
    kind, colon, where = spec.partition(":")
    if not (colon and where):
        return spec
    # COCO's has several paths; a comma is part of any other.
    parts = where.split(",") if kind == "coco" else [where]
    try:
        return f"{kind}:{','.join(str(Path(part).expanduser().resolve()) for part in parts)}"
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"data: {spec!r}: expected paths, found: {error}") from None


class Problems:
    """The problems that a reader met; it leaves the bad items out and goes on."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def add(self, path: Path, what: str, *, line: int | None = None, item: bool = True) -> None:
        """Note a problem."""
        self._found.append(Problem(path, what, line, item))

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def skipped(self) -> int:
        """How many items were left out: the files that have problems of an item."""
        return len({problem.path for problem in self._found if problem.item})

    def refuse_beyond(self, share: float, total: int, spec: str) -> None:
        """Refuse data of which more than `share` (0 to 1) of the `total` items is bad.

        Raises:
            DataError: it is; names the first problems and how to see them all.
        """
        skipped = self.skipped()
        if skipped <= share * total:
            return
        bad = [problem for problem in self._found if problem.item]
        named = "; ".join(str(problem) for problem in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        raise DataError(
            f"data: {spec}: expected at most {share:.1%} bad items, found {skipped:,} of "
            f"{total:,}: {named}{more}. `gdfast data check {spec}` lists all; --max-bad allows more"
        )
