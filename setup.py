"""Builds the native lookup, a plain shared library: it needs a C++ compiler, but neither torch nor Python's headers.

Where that fails, the package is installed without it, and looks tables up in PyTorch.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("embtables/ops/csrc")
# -ffp-contract=off: a sum has the same bits whatever the instruction set.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fPIC",
    "-Wno-psabi",
]
# In this order the linker takes what all of them compile alike from the first, which every processor can run.
INSTRUCTIONS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTIONS["avx2"] = ["-mavx2", "-mbmi2"]
    INSTRUCTIONS["avx512"] = [*INSTRUCTIONS["avx2"], *(f"-mavx512{name}" for name in ("f", "dq", "bw", "vl"))]
    INSTRUCTIONS["avx512"].append("-mprefer-vector-width=512")
SOURCES = {name: [str(FOLDER / f"{name}.cpp"), *flags] for name, flags in {**INSTRUCTIONS, "library": []}.items()}


class build_native(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # Nothing in it depends on the version of Python.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the native lookup is written for g++ and clang++")

        def compiled(source: list[str]) -> list[str]:
            file, *flags = source
            extra = [*FLAGS, *flags, *os.environ.get("EMBTABLES_CXXFLAGS", "").split()]
            objects: list[str] = self.compiler.compile([file], self.build_temp, extra_postargs=extra)
            return objects

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for found in pool.map(compiled, SOURCES.values()) for o in found]
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        libraries = ["dl"] if platform.system() == "Linux" else []
        extra = ["-pthread", *os.environ.get("EMBTABLES_LDFLAGS", "").split()]
        # A process that has the old library loaded keeps it: the new one takes its place as another file.
        fresh = f"{path}.{os.getpid()}"
        self.compiler.link_shared_object(objects, fresh, libraries=libraries, extra_postargs=extra, target_lang="c++")
        os.replace(fresh, path)


class wheel_for_any_python(bdist_wheel):
    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        # Without the library the wheel suits any machine, and is told from one with it by its name.
        built = self.get_finalized_command("build_ext").get_outputs()
        if not any(map(os.path.isfile, built)):
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "embtables.ops._native",
            [source[0] for source in SOURCES.values()],
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            optional=True,
        )
    ],
    cmdclass={"build_ext": build_native, "bdist_wheel": wheel_for_any_python},
)
