"""Builds the compiled modules with CMake and Ninja; everything else is in pyproject.toml.

Environment: CXX, CUDACXX, CUDA_HOME and TORCH_CUDA_ARCH_LIST as usual; FORCE_CUDA=1 makes a missing
nvcc an error; GDFAST_NO_CUDA=1 (or FORCE_CUDA=0) leaves the CUDA module out; GDFAST_BASELINE_ONLY=1
leaves out the AVX2 and AVX-512 kernels, as on other processors; GDFAST_WERROR=1 makes errors of the
compilers' warnings.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  pip checks, `python setup.py` does not
    sys.exit(
        "gdfast: Python: expected 3.10 or newer, got {}.{}; "
        "fix: make the venv with a newer one, e.g. `python3.11 -m venv .venv`".format(
            *sys.version_info[:2]
        )
    )

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(what: str, fix: str) -> NoReturn:
    sys.exit(f"gdfast: {what}; fix: {fix}")


def find_tool(name: str) -> str:
    """Path of cmake or ninja: the Python package's where it is installed, else the one in PATH."""
    try:
        if name == "cmake":
            import cmake as package
        else:
            import ninja as package
        folder = getattr(package, "CMAKE_BIN_DIR", None) or package.BIN_DIR
        return str(Path(folder) / name)
    except ImportError:
        found = shutil.which(name)
        if found is None:
            fail(
                f"{name}: not found",
                f"`pip install {name}`, or install without --no-build-isolation",
            )
        return found


def find_nvcc() -> "str | None":
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    for home in ("CUDA_HOME", "CUDA_PATH"):
        found = shutil.which(str(Path(os.environ.get(home, "")) / "bin" / "nvcc"))
        if found:
            return found
    return shutil.which("nvcc")


def check_toolchain() -> None:
    """Ends the build with one line where a tool is missing, before CMake says it in fifty."""
    compilers = (
        [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    if not any(shutil.which(name) for name in compilers):
        fail(
            f"C++ compiler: expected {' or '.join(compilers)} in PATH, found none",
            "`apt install g++`, or set CXX",
        )
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        fail(
            f"Python.h: expected in {include}, found none",
            "`apt install python{}.{}-dev` (or python3-dev)".format(*sys.version_info[:2]),
        )
    if os.environ.get("FORCE_CUDA") == "1" and find_nvcc() is None:
        fail(
            "FORCE_CUDA=1: expected nvcc in PATH, CUDACXX or CUDA_HOME, found none",
            "install the CUDA toolkit and set CUDA_HOME to it, or unset FORCE_CUDA",
        )


def cuda_options() -> "list[str]":
    if os.environ.get("GDFAST_NO_CUDA", "0") != "0" or os.environ.get("FORCE_CUDA") == "0":
        return [
            "-DGDFAST_CUDA=OFF",
            "-DGDFAST_WHY_NO_CUDA=built without CUDA, as asked by GDFAST_NO_CUDA or FORCE_CUDA=0",
        ]
    nvcc = find_nvcc()
    if nvcc is None:
        return [
            "-DGDFAST_CUDA=OFF",
            "-DGDFAST_WHY_NO_CUDA=built without nvcc: none in PATH, CUDACXX or CUDA_HOME",
        ]
    return ["-DGDFAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]


def switch(name: str) -> str:
    """An option of CMake, as the environment variable of that name has it."""
    return f"-D{name}={'ON' if os.environ.get(name, '0') != '0' else 'OFF'}"


def run_cmake(*arguments: str) -> None:
    try:
        subprocess.run([find_tool("cmake"), *arguments], check=True)
    except subprocess.CalledProcessError:
        sys.exit(
            "gdfast: CMake failed, for the reason in the lines above; fix where it is nvcc's: "
            "set CUDAHOSTCXX to a compiler that nvcc supports, or GDFAST_NO_CUDA=1"
        )


class Build(build):
    def run(self) -> None:
        check_toolchain()
        # Else a source that has since been deleted or renamed would go into the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildModules(build_ext):
    """Runs CMake once; CMake decides which of the modules there are."""

    def run(self) -> None:
        check_toolchain()
        # setuptools builds into a folder of its own and then copies into the source tree.
        self.into_sources = bool(self.inplace)
        super().run()

    def build_extensions(self) -> None:
        import pybind11

        cuda = cuda_options()
        options = [*cuda, switch("GDFAST_BASELINE_ONLY"), switch("GDFAST_WERROR")]
        # Kept between installs, so that only what changed is compiled again.
        flavour = "cuda" if "-DGDFAST_CUDA=ON" in cuda else "cpu"
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{flavour}"
        # What CMake cannot change in a folder that it has configured before.
        fixed = "\n".join(
            [str(ROOT), os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", ""), *options]
        )
        configured_for = folder / "configured_for.txt"
        if folder.exists() and not (
            configured_for.exists() and configured_for.read_text() == fixed
        ):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        configured_for.write_text(fixed)

        # Python, pybind11 and Ninja are named on every configure: those of an isolated build are
        # gone when the next one begins.
        run_cmake(
            "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        )  # fmt: skip
        run_cmake("--build", str(folder))
        for extension in self.extensions:
            self.take(folder, extension.name)

    def take(self, folder: Path, name: str) -> None:
        target = Path(self.get_ext_fullpath(name))
        built = folder / target.name
        if built.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
            return
        # Left by an earlier build that had nvcc.
        target.unlink(missing_ok=True)
        if self.into_sources:
            (ROOT / "gdfast" / target.name).unlink(missing_ok=True)


setup(
    ext_modules=[Extension("gdfast._cpu", []), Extension("gdfast._cuda", [], optional=True)],
    cmdclass={"build": Build, "build_ext": BuildModules},
)
