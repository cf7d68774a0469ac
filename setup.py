"""Builds the compiled modules with CMake and Ninja; everything else is in pyproject.toml."""

import sys

if sys.version_info < (3, 10):
    sys.exit(
        "gdfast: Python: expected 3.10 or newer, got {}.{}; fix: make a venv with a newer one, "
        "for example `python3.11 -m venv .venv`".format(*sys.version_info[:2])
    )

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Path of cmake or ninja: the Python package's where it is installed, else the one in PATH."""
    try:
        if name == "cmake":
            import cmake

            return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which(name)
        if found is None:
            sys.exit(f"gdfast: {name}: not found; fix: `pip install {name}`")
        return found


class CMakeBuild(build_ext):
    """Configures and builds once; CMake decides which of the modules there are."""

    def run(self) -> None:
        self.cmake_done = False
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        if not self.cmake_done:
            configure = [
                tool("cmake"),
                "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run([tool("cmake"), "--build", str(build)], check=True)
            self.cmake_done = True
        module = ext.name.rpartition(".")[2]
        built = build / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
        target = Path(self.get_ext_fullpath(ext.name))
        if built.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)


setup(
    ext_modules=[Extension("gdfast._cpu", []), Extension("gdfast._cuda", [], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
