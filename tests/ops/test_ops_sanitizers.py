"""The native library's kernels in a program of their own, ``native/driver.cpp``, under sanitizers.

``EMBTABLES_SANITIZE_SEEDS`` is how many random cases there are. Without it nothing is compiled: sanitizers take minutes
to compile the kernels of each instruction set. ``make sanitize`` sets it; run it after every change of the kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embtables import ops

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "embtables" / "ops" / "csrc"
DRIVER = Path(__file__).parents[1] / "native" / "driver.cpp"
SEEDS = os.environ.get("EMBTABLES_SANITIZE_SEEDS")

# As in setup.py, but for the optimization: sanitizers need lines, and compile several times faster without any.
FLAGS = "-std=c++17 -g1 -fno-math-errno -ffp-contract=off -Wno-psabi -pthread".split()
INSTRUCTIONS = {
    "baseline": "",
    "avx2": "-mavx2 -mbmi2",
    "avx512": "-mavx2 -mbmi2 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512",
}


BUILDS = {
    # Rows in windows of a few thousand, as there are several of where tables take tens of gigabytes.
    "address,undefined": "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all -DEMBTABLES_ROW_BITS=11",
    "thread": "-O0 -fsanitize=thread",
}


def compiler() -> str:
    """The C++ compiler that setup.py would take."""
    name = os.environ.get("CXX", "c++").split()[0]
    found = shutil.which(name) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs a C++ compiler: install g++ or clang++")
    return found


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def this_processor_has(instructions: str) -> bool:
    best = ops.instructions() or "baseline"
    return list(INSTRUCTIONS).index(instructions) <= list(INSTRUCTIONS).index(best)


@pytest.mark.skipif(SEEDS is None, reason="compiling the kernels for sanitizers takes minutes: make sanitize")
@pytest.mark.parametrize("name", BUILDS)
def test_random_programs(name: str, tmp_path: Path) -> None:
    """Values, updates and gradients of random programs are those of loops in float64, and no sanitizer complains."""
    assert SEEDS is not None
    cxx = compiler()
    flags = [*FLAGS, *BUILDS[name].split()]
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    made = run(cxx, *flags, str(probe), "-o", str(tmp_path / "probe"))
    if made.returncode or run(str(tmp_path / "probe")).returncode:
        pytest.skip(f"{cxx} {BUILDS[name]} makes no program that runs here: install the sanitizers' runtime")

    sets = [s for s in INSTRUCTIONS if this_processor_has(s)]
    named = "-DINSTRUCTION_SETS=" + " ".join(f"SET({s})" for s in sets)
    # library.cpp knows all sets: those that are not compiled here are the first for it.
    absent = [f"-D{s}_functions={sets[0]}_functions" for s in INSTRUCTIONS if s not in sets]
    # As in setup.py, the linker takes what several compile alike from the first.
    units = [(SOURCES / f"{s}.cpp", INSTRUCTIONS[s].split()) for s in sets]
    units += [(SOURCES / "library.cpp", absent), (DRIVER, [named])]

    def compile_unit(unit: tuple[Path, list[str]]) -> str:
        source, own = unit
        target = tmp_path / f"{source.stem}.o"
        done = run(cxx, *flags, *own, "-c", str(source), "-o", str(target))
        assert not done.returncode, done.stderr
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("JOBS", "1"))) as pool:
        objects = list(pool.map(compile_unit, units))
    driver = str(tmp_path / "driver")
    linked = run(cxx, *flags, *objects, *["-ldl"] * (platform.system() == "Linux"), "-o", driver)
    assert not linked.returncode, linked.stderr
    done = run(driver, "0", SEEDS, TSAN_OPTIONS="halt_on_error=1", UBSAN_OPTIONS="print_stacktrace=1")
    assert not done.returncode, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip() == f"{SEEDS} seeds passed"
