"""Compiles the Triton kernels for GPUs that need not be here, and tabulates what they take.

    python benchmarks/triton_aot.py            every tile that the cost model may time
    python benchmarks/triton_aot.py --best     the tile that it prefers, for each pass

writes results/triton/registers.md beside this file. Nothing is run, and no speed is told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from gdfast.bench import triton_code
from gdfast.bench.triton_code import Code
from gdfast.files import write_atomic

RESULT = Path(__file__).parent / "results" / "triton" / "registers.md"
ARCHITECTURES = (80, 90)
NUMBERS = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3"))


def compiled(every_tile: bool) -> Iterator[tuple[str, Code]]:
    """What is compiled for, in words, and the code."""
    for capability in ARCHITECTURES:
        for dtype, precision in NUMBERS:
            kind = precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")
            for case in triton_code.LAYERS:
                with triton_code.ahead_of_time(capability) as codes:
                    triton_code.launch_conv2d(
                        case, dtype, precision, "every" if every_tile else "best"
                    )
                yield from ((f"{case.name}, {kind}", code) for code in codes)
        for dtype in (torch.bfloat16, torch.float32):
            with triton_code.ahead_of_time(capability) as codes:
                triton_code.launch_batch_norm((256, 256, 56, 56), dtype)
                triton_code.launch_max_pool2d((256, 64, 112, 112), dtype)
                triton_code.launch_sgd(dtype)
            kind = str(dtype).removeprefix("torch.")
            for code in codes:
                master = ", master copies" if code.settings.get("MASTER") else ""
                yield f"ResNet-50, {kind}{master}", code


def row(task: str, code: Code) -> str:
    name = code.kernel.removesuffix("_kernel")
    if code.settings.get("SWAPPED"):  # the one kernel that makes two passes
        name += ", grad_input"
    axes = [axis for axis in "IPQMNK" if f"BLOCK_{axis}" in code.settings]
    blocks = [code.settings[f"BLOCK_{axis}"] for axis in axes]
    cells = [
        f"sm_{code.capability}", name, task,
        "x".join(map(str, blocks)) or str(code.settings.get("BLOCK", "")), code.warps, code.stages,
        code.registers, code.stack_bytes, code.shared_bytes,
        code.count("HGMMA") or code.count("HMMA"), f"{code.wide_loads} of {code.loads}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def is_as_meant(code: Code) -> bool:
    """Whether nothing spills, and what is made for descriptors and wgmma uses them."""
    by_descriptors = code.kernel == "conv2d_tma_kernel"
    return code.stack_bytes == 0 and (
        not by_descriptors or (code.count("UTMALDG") > 0 and code.count("HGMMA") > 0)
    )


def save(rows: list[str]) -> None:
    text = (
        "# What the Triton kernels take\n\n"
        f"Compiled by Triton {triton.__version__} with `make triton-aot`; nothing was run. "
        "Registers are those of one\nthread, bytes those of one program; a stack is what spilled. "
        "`matrix` counts instructions of the\ntensor cores (HGMMA on sm_90, HMMA on sm_80), `wide` "
        "loads of 16 bytes for each thread,\nor by conv2d_tma of boxes through descriptors "
        "(UTMALDG). Its tiles are images x rows x columns x filters\nx step.\n\n"
        "| GPU | kernel | of | tile | warps | stages | registers | stack | shared | matrix | wide "
        "|\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULT, (text + "\n".join(rows) + "\n").encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--best", action="store_true", help="only the tile that the model prefers")
    arguments = parser.parse_args()
    rows: list[str] = []
    failing = 0
    for task, code in compiled(every_tile=not arguments.best):
        line = row(task, code)
        if line not in rows:
            rows.append(line)
            failing += not is_as_meant(code)
            print(line, flush=True)
            save(rows)  # as they come: all take minutes
    print(f"{len(rows)} kernels, {failing} of them spill or miss their instructions; {RESULT}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
