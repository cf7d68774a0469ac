"""Tabulates what the compiled CUDA kernels take: registers, stacks, and their instructions.

    python benchmarks/cuda_registers.py                     of the installed gdfast._cuda
    python benchmarks/cuda_registers.py build/_cuda.so      of another file

writes results/cuda/registers.md beside this file. Nothing is run, and no speed is told.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gdfast.bench import cuda_code
from gdfast.bench.cuda_code import Code
from gdfast.files import write_atomic

RESULT = Path(__file__).parent / "results" / "cuda" / "registers.md"
HEAD = """# What the CUDA kernels take

Compiled by nvcc as CMake has it, read with `python benchmarks/cuda_registers.py`; nothing was run.
Registers are those of one thread; a stack, in bytes, is what spilled. `matrix` counts instructions
of the tensor cores, `copies` those from global to shared memory, `wide` loads and stores of 16
bytes in global memory.

| GPU | kernel | of | registers | stack | matrix | copies | wide |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(code: Code) -> str:
    cells = [
        code.architecture, code.kernel.removesuffix("_kernel"), " ".join(code.arguments),
        code.registers, code.stack_bytes, code.count("HMMA|HGMMA"), code.count("LDGSTS|UTMALDG"),
        code.count(r"(LDG|STG)\.(.*\.)?128"),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a compiled module or cubin")
    file = parser.parse_args().file or cuda_code.module()
    if file is None:
        print("cuda_registers: gdfast._cuda: expected a build with nvcc, found none")
        return 1
    codes = cuda_code.kernels(file)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULT, (HEAD + "\n".join(map(row, codes)) + "\n").encode())
    spilling = [code for code in codes if code.stack_bytes]
    print(f"{RESULT}: {len(codes)} kernels, {len(spilling)} with a stack")
    return 0


if __name__ == "__main__":
    sys.exit(main())
