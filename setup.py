"""Hands CMakeLists.txt to pip. Everything about the package stands in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
# Without the extension the package runs on its PyTorch reference path, so a failed build is a warning unless asked.
REQUIRED = os.environ.get("SUPY_REQUIRE_EXTENSION") == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(work),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DSUPY_VERSION={VERSION}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work), "--target", "install"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"supy's native kernels were not built: {error}") from error


setup(
    ext_modules=[Extension("supy._C", sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": CMakeBuild},
)
