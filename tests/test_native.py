"""The compiled modules: what they link, what they export, how they are chosen and reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gdfast import native

ROOT = Path(__file__).parents[1]
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def binutil(name: str, *arguments: str) -> str:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"needs {name} (binutils)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def test_cpu_module_is_there() -> None:
    assert native.cpu is not None, native.failure("cpu")
    assert native.failure("cpu") == ""


def test_what_is_missing_has_a_reason() -> None:
    assert (native.cuda is None) == bool(native.failure("cuda"))


def test_supported_isas_are_in_order_and_end_with_the_default() -> None:
    supported = native.cpu.supported_isas()
    assert supported == [isa for isa in ISAS if isa in supported]
    assert supported[0] == "baseline"
    result = python("from gdfast import native; print(native.cpu.isa())", GDFAST_CPU_ISA="")
    assert result.stdout.strip() == supported[-1]


def test_select_isa() -> None:
    before = native.cpu.isa()
    try:
        for isa in native.cpu.supported_isas():
            assert native.cpu.select_isa(isa)
            assert native.cpu.isa() == isa
        assert not native.cpu.select_isa("sse9")
        assert native.cpu.isa() == native.cpu.supported_isas()[-1]
        # For tests alone, and so not among those that are supported.
        assert native.cpu.select_isa("emulated_bf16")
        assert native.cpu.isa() == "emulated_bf16"
    finally:
        native.cpu.select_isa(before)


@pytest.mark.parametrize("isa", native.cpu.supported_isas() if native.cpu else [])
def test_isa_from_the_environment(isa: str) -> None:
    result = python("from gdfast import native; print(native.cpu.isa())", GDFAST_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_unknown_isa_in_the_environment_is_an_error_that_lists_the_known() -> None:
    result = python("from gdfast import native", GDFAST_CPU_ISA="sse9")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: GDFAST_CPU_ISA: expected")
    assert "baseline" in last and "'sse9'" in last


def test_a_module_that_does_not_load_is_kept_as_a_reason(tmp_path: Path) -> None:
    code = "from gdfast import native; print(native.cpu, native.failure('cpu'))"
    result = python(code, GDFAST_NATIVE_DIR=str(tmp_path))
    assert result.stdout.startswith("None GDFAST_NATIVE_DIR: expected"), result.stderr


def test_a_broken_module_is_kept_as_a_reason(tmp_path: Path) -> None:
    (tmp_path / Path(native.cpu.__file__).name).write_bytes(b"not a library")
    code = "from gdfast import native; print(native.cpu, native.failure('cpu'))"
    result = python(code, GDFAST_NATIVE_DIR=str(tmp_path))
    assert result.stdout.startswith("None "), result.stderr
    assert "invalid ELF header" in result.stdout or "file too short" in result.stdout


def test_the_cuda_simulator_is_loaded_in_the_place_of_cuda_where_asked_for(tmp_path: Path) -> None:
    shutil.copy(native.cpu.__file__, tmp_path)
    code = "from gdfast import native; print(native.summary())"
    result = python(code, GDFAST_NATIVE_DIR=str(tmp_path), GDFAST_CUDA_SIMULATE="1")
    assert f"no CUDA kernels: GDFAST_NATIVE_DIR: expected {tmp_path}/_cuda_simulated" in (
        result.stdout
    ), result.stderr


def test_links_neither_torch_nor_python() -> None:
    dynamic = binutil("readelf", "-d", native.cpu.__file__)
    needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [line for line in needed if "torch" in line or "python" in line or "c10" in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("kernels_first", [False, True])
def test_shares_one_openmp_runtime_with_torch(kernels_first: bool) -> None:
    code = (
        f"import ctypes; ctypes.CDLL({native.cpu.__file__ if kernels_first else None!r})\n"
        "import torch\n"
        "from gdfast import native\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(*{part for part in maps if 'libgomp' in part or 'libomp' in part}, sep='\\n')"
    )
    result = python(code, GDFAST_NATIVE_DIR="")
    assert len(result.stdout.split()) == 1, result.stdout + result.stderr


def kernel_objects() -> list[Path]:
    tag = sys.implementation.cache_tag
    return sorted((ROOT / "build").glob(f"cmake-{tag}-*/CMakeFiles/kernels_*.dir/csrc/cpu/*.o"))


def test_kernel_objects_export_only_their_own_namespace() -> None:
    """A weak symbol is shared between objects: the linker may keep the copy made for AVX-512."""
    objects = kernel_objects()
    if not objects:
        pytest.skip("needs the object files of a build in this checkout")
    for path in objects:
        isa = path.parents[2].name.removeprefix("kernels_").removesuffix(".dir")
        namespace = f"_ZN6gdfast3cpu{len(isa)}{isa}"
        symbols = binutil("nm", "--extern-only", "--defined-only", str(path)).splitlines()
        assert symbols, f"{path}: exports nothing"
        for symbol in symbols:
            _, kind, name = symbol.split()
            if name.startswith("DW.ref."):
                continue  # a pointer to the C++ run-time's exception handler: no code
            assert kind == "T", f"{path}: {name} is of kind {kind}"
            assert name.startswith(namespace), f"{path}: {name} is outside of {isa}"


def test_module_exports_only_its_entry_point() -> None:
    symbols = binutil("nm", "--dynamic", "--extern-only", "--defined-only", native.cpu.__file__)
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert "PyInit__cpu" in names
    assert not {name for name in names if "gdfast" in name}
