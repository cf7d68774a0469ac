"""Annotation files, read with a bound on what they may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from gdfast.data.errors import DataError

# An image's annotation has some kilobytes; all of COCO's training set is 450 MB of JSON.
MAX_XML = 16 << 20
MAX_TEXT = 64 << 20
MAX_JSON = 1 << 30
_DEEPEST = 32
_MOST_ELEMENTS = 200_000


def read(path: Path, most: int) -> bytes:
    """The bytes of a file of at most `most` bytes.

    Raises:
        DataError: missing, unreadable, no plain file, or longer.
    """
    try:
        if not path.is_file():
            found = "something else" if path.exists() else "no such file"
            raise DataError(f"data: {path}: expected a file, found {found}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"data: {path}: expected a readable file, found: {reason}") from None
    if len(content) > most:
        raise DataError(f"data: {path}: expected at most {most:,} bytes, found more")
    return content


def read_lines(path: Path, most: int = MAX_TEXT) -> list[str]:
    """The lines of a text file in UTF-8, without spaces around them.

    Raises:
        DataError: as `read`, or no text.
    """
    try:
        return [line.strip() for line in read(path, most).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"data: {path}: expected text in UTF-8, found other bytes") from None


@dataclass
class Element:
    """An element of an XML file: its name, its line from 1, its own text in parts, what it
    contains."""

    name: str
    line: int
    parts: list[str] = field(default_factory=list)
    children: list[Element] = field(default_factory=list)

    def first(self, path: str) -> Element | None:
        """The first element at a path such as "bndbox/xmin"."""
        name, _, rest = path.partition("/")
        for child in self.children:
            if child.name == name:
                return child.first(rest) if rest else child
        return None

    def text_of(self, path: str) -> str | None:
        """The text of the first element at a path, None where there is none."""
        found = self.first(path)
        return None if found is None else "".join(found.parts).strip()


def read_xml(path: Path) -> Element:
    """The root element of an XML file that declares no types and no entities.

    Raises:
        DataError: as `read`; not XML; a DOCTYPE, whose entities may expand without bound or name
            other files; too many elements, or elements nested too deeply.
    """
    stack = [Element("", 0)]
    count = 0
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > _MOST_ELEMENTS:
            raise _Refused(f"at most {_MOST_ELEMENTS:,} elements", "more")
        if len(stack) > _DEEPEST:
            raise _Refused(f"at most {_DEEPEST} nested elements", "more")
        element = Element(name, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(name: str) -> None:
        stack.pop()

    def text(content: str) -> None:
        stack[-1].parts.append(content)

    def refuse(*found: object) -> None:
        raise _Refused("XML without DOCTYPE and entities", "a declaration of them")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.buffer_text = True
    try:
        parser.Parse(read(path, MAX_XML), True)
    except _Refused as refused:
        expected, found = refused.args
        raise DataError(
            f"data: {path}:{parser.CurrentLineNumber}: expected {expected}, found {found}"
        ) from None
    except (expat.ExpatError, ValueError, LookupError) as error:  # the latter two: odd encodings
        reason = str(error).partition(":")[0]
        line = getattr(error, "lineno", parser.CurrentLineNumber)
        raise DataError(f"data: {path}:{line}: expected XML, found: {reason}") from None
    return stack[0].children[0]


class _Refused(Exception):
    pass
