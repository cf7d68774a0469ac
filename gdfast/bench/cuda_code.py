"""What nvcc made of the CUDA kernels: registers, stacks and instructions of a built module.

It needs no GPU, but `cuobjdump`: that of the CUDA toolkit, or the one in Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gdfast import native


@dataclass(frozen=True)
class Code:
    """One compiled kernel: `arguments` are those of its template, `instructions` by name."""

    kernel: str
    arguments: tuple[str, ...]
    architecture: str
    registers: int
    stack_bytes: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """How many instructions have a name that a regular expression matches from its start."""
        found = re.compile(pattern)
        return sum(n for name, n in self.instructions.items() if found.match(name))


def module() -> Path | None:
    """The file of gdfast._cuda, if it was built for GPUs."""
    if native.cuda is not None and not native.cuda_is_simulated:
        return Path(str(native.cuda.__file__))
    return None


def cuobjdump() -> str:
    """The path of the disassembler, or "" where there is none."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME",) if name in os.environ]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        homes.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, homes)])
    return shutil.which("cuobjdump", path=path) or ""


def architectures(file: Path) -> tuple[set[str], set[str]]:
    """What a compiled file holds machine code for, and what PTX, as "sm_80".

    Raises RuntimeError where there is no cuobjdump.
    """
    lists = _run("--list-elf", file), _run("--list-ptx", file)
    code, ptx = (
        set(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)$", text, re.MULTILINE)) for text in lists
    )
    return code, ptx


def resources(file: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers of a thread and bytes of its stack, by architecture and mangled symbol.

    Raises RuntimeError where there is no cuobjdump.
    """
    return {
        (architecture, symbol): (int(registers), int(stack))
        for architecture, text in _by_architecture(_run("-res-usage", file))
        for symbol, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    }


def kernels(file: Path) -> list[Code]:
    """All kernels in a compiled file, for each architecture that it holds machine code of.

    Raises RuntimeError where there is no cuobjdump.
    """
    usage = resources(file)
    codes = []
    for architecture, text in _by_architecture(_run("-sass", file)):
        for part in re.split(r"Function : ", text)[1:]:
            symbol = part.split(None, 1)[0]
            name, *arguments = names(symbol)
            instructions = re.findall(
                r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", part, re.MULTILINE
            )
            codes.append(
                Code(name, tuple(arguments), architecture, *usage[architecture, symbol],
                     Counter(instructions))
            )  # fmt: skip
    return sorted(codes, key=lambda code: (code.architecture, code.kernel, code.arguments))


def _run(option: str, file: Path) -> str:
    tool = cuobjdump()
    if not tool:
        raise RuntimeError(
            "cuda_code: cuobjdump: expected it in PATH, CUDA_HOME/bin or Triton's wheel, found none"
        )
    return subprocess.run(
        [tool, option, str(file)], capture_output=True, text=True, check=True
    ).stdout


def _by_architecture(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^arch = (\w+)$", text, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


_BUILTIN = {"f": "float", "d": "double"}
_TOKEN = re.compile(r"S[0-9A-Z]*_|L[a-z](?P<number>\d+)E|(?P<length>\d+)|(?P<other>\w)")


def names(symbol: str) -> list[str]:
    """A kernel's name and its template's arguments, in the order of a mangled symbol."""
    found: list[str] = []
    at, depth = 0, 0
    # A namespace's names come first; then from the I that opens the template's arguments to the E
    # that closes them.
    while match := _TOKEN.match(symbol, at):
        at = match.end()
        other = match["other"] if found else None
        if length := match["length"]:
            name = symbol[at : at + int(length)]
            at += int(length)
            if found or name.endswith("_kernel"):
                found.append(name)
                continue  # a name closes nothing
        elif found and (number := match["number"]):
            found.append(number)
        elif other in ("I", "N", "J"):
            depth += 1
        elif other == "E":
            depth -= 1
        elif other in _BUILTIN:
            found.append(_BUILTIN[other])
        if found and depth == 0:
            break
    return found or [symbol]
