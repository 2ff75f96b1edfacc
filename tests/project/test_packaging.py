"""What an installation holds, and what importing it costs."""

from __future__ import annotations

import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import wheels
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    "torchrec",
    "torch._dynamo",
    "fbgemm_gpu",
    "pandas",
    "polars",
    "pyarrow",
    "tensorboard",
    "matplotlib",
    "plotly",
    "typer",
    "rich",
    "mlflow",
    "wandb",
)

# Plans, builds and runs tables, so that "it imports" means "it works".
USE_CORE = """
import torch
import embtables
tables = [embtables.TableConfig("item", 1000, 8), embtables.TableConfig("user", 50, 8)]
module = embtables.EmbeddingTables(embtables.plan(tables, "hash", budget=0.5))
assert module(torch.tensor([[999, 49], [0, 1]])).shape == (2, 16)
"""


def python(code: str, *paths: Path) -> str:
    """Run `code` in a fresh interpreter with `paths` in front of its import path; what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light() -> None:
    code = f"{USE_CORE}\nimport sys\nprint([name for name in {OPTIONAL} if name in sys.modules])"
    assert python(code).strip() == "[]"


@pytest.mark.parametrize(
    "error", ["ImportError('no module named torchrec')", "OSError('libnvidia-ml.so.1: no such file')"]
)
def test_core_works_without_torchrec(tmp_path: Path, error: str) -> None:
    """Absent, and present but broken: fbgemm's CUDA build raises OSError on a host without a driver."""
    for package in ("torchrec", "fbgemm_gpu"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise {error}\n")
    python(USE_CORE, tmp_path)


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for top in ("embtables", "models", "datasets") for path in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.slow
def test_wheel_and_source_archive_hold_every_file(tmp_path: Path) -> None:
    """Every file of the package, with models/ and datasets/ inside it, and as many bytes of each as there are here."""
    source = tmp_path / "source"
    for name in ("embtables", "models", "datasets"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for unit in (source / "embtables" / "ops" / "csrc").glob("*.cpp"):
        unit.write_text("// what is compiled does not matter here, and takes half a minute\n")
    expected = {}
    for top, inside in (("embtables", "embtables"), ("models", "embtables/models"), ("datasets", "embtables/datasets")):
        for path in (source / top).rglob("*"):
            if path.is_file():
                expected[f"{inside}/{path.relative_to(source / top).as_posix()}"] = path.stat().st_size
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import setuptools.build_meta as b; print(); print(b.build_wheel('out')); print(b.build_sdist('out'))"
    result = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {item.filename: item.file_size for item in archive.infolist() if ".dist-info/" not in item.filename}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    # The native library where there is a compiler, in place of its sources; for any Python, whatever made it.
    compiled = held.pop("embtables/ops/_native.so", None)
    assert (compiled is not None) == any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    assert held == {name: size for name, size in expected.items() if not name.startswith("embtables/ops/csrc/")}
    assert "-py3-none-" in wheel.name and wheel.name.endswith("-any.whl") == (compiled is None)
    # torchrec among the requirements would pull in the CUDA build of fbgemm-gpu.
    assert not re.search(r"^Requires-Dist: torchrec\b", metadata, re.MULTILINE)

    (sdist,) = (source / "out").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {item.name.split("/", 1)[1]: item.size for item in archive.getmembers() if item.isfile()}
    assert {name: size for name, size in members.items() if name.startswith("embtables/")} == expected


def test_the_version_stands_in_one_place(tmp_path: Path) -> None:
    """Another version in the package is the one of the distribution, whose setup reads it without importing torch."""
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    code = (ROOT / "embtables" / "__init__.py").read_text(encoding="utf-8")
    changed, count = re.subn(r'^__version__ = ".*"$', '__version__ = "9.8.7"', code, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "embtables").mkdir()
    (tmp_path / "embtables" / "__init__.py").write_text(changed, encoding="utf-8")
    (tmp_path / "torch.py").write_text("raise ImportError('torch takes seconds')\n")
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split()[-1:] == ["9.8.7"], result.stderr


def test_constraints_pin_the_matching_set() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert {"torch==2.13.0", "fbgemm-gpu-cpu==1.8.0", "torchrec==1.8.0"} <= set(lines)
    unpinned = [line for line in lines if line and not line.startswith("#") and "==" not in line]
    assert unpinned == []


def required(requirements: list[str], python: str, extra: str = "") -> list[Requirement]:
    """Those of the requirements that hold on ``python``, each without its marker."""
    parsed = map(Requirement, requirements)
    asked = wheels.markers(python) | {"extra": extra}
    return [item for item in parsed if item.marker is None or item.marker.evaluate(asked)]


def own_requirements(python: str) -> list[Requirement]:
    """What ``embtables[dev]`` requires by setup.cfg, with the extras that it asks of itself."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    found, asked = required(setup["options"]["install_requires"].split("\n")[1:], python), ["dev"]
    for extra in asked:
        lines = [line for line in setup["options.extras_require"][extra].split("\n") if line]
        for item in required(lines, python):
            if item.name == "embtables":
                asked.extend(item.extras)
            else:
                found.append(item)
    return found


@pytest.mark.parametrize("python", wheels.PYTHONS)
def test_the_pinned_set_is_what_the_public_wheels_require(python: str) -> None:
    """On Linux, x86_64, whatever Python runs the test. torch's CUDA libraries alone are left to torch's own pins."""
    pins, released = wheels.pins(python), json.loads(wheels.FILE.read_text(encoding="utf-8"))
    waiting, seen, unpinned = [("embtables", item) for item in own_requirements(python)], set(), set()
    while waiting:
        asker, item = waiting.pop()
        name = canonicalize_name(item.name)
        if name not in pins:
            unpinned.add((asker, re.split("[-_]", name)[0]))
            continue
        assert item.specifier.contains(pins[name]), f"{asker} requires {item}; constraints.txt pins {pins[name]}"
        release = f"{name}=={pins[name]}"
        assert release in released, f"wheels.json lacks {release}: python tests/wheels.py"
        if release not in seen:
            seen.add(release)
            waiting += [(release, inner) for inner in required(released[release]["requires"], python)]
    assert {name for name, _ in unpinned} == {f"torch=={pins['torch']}"}
    assert {family for _, family in unpinned} == {"cuda", "nvidia"}


@pytest.mark.parametrize("python", wheels.PYTHONS)
def test_every_pinned_release_has_a_public_wheel(python: str) -> None:
    released = json.loads(wheels.FILE.read_text(encoding="utf-8"))
    version = tuple(map(int, python.split(".")))
    interpreter = f"cp{python.replace('.', '')}"
    fitting = {
        *cpython_tags(version, abis=[interpreter], platforms=wheels.PLATFORMS),
        *compatible_tags(version, interpreter, wheels.PLATFORMS),
    }
    for name, pin in wheels.pins(python).items():
        assert f"{name}=={pin}" in released, f"wheels.json lacks {name}=={pin}: python tests/wheels.py"
        release = released[f"{name}=={pin}"]
        wanted = release["requires_python"]
        assert SpecifierSet(wanted).contains(f"{python}.0"), f"{name}=={pin} is for Python {wanted}, not {python}"
        parsed = [parse_wheel_filename(wheel) for wheel in release["wheels"]]
        assert {(wheel[0], str(wheel[1])) for wheel in parsed} == {(name, pin)}
        assert any(fitting & wheel[3] for wheel in parsed), f"{name}=={pin} has no wheel for Python {python}"


@pytest.mark.parametrize(
    ("step", "left_out"),
    [
        ("--editable", ""),
        ("torchrec", ""),
        ("fuxictr", "FuxiCTR and DeepCTR-Torch"),
        ("pytorch-lightning", "Lightning and Accelerate"),
        ("onnxruntime", "ONNX Runtime"),
        ("mlflow-skinny", "MLflow and Weights & Biases"),
        ("uvicorn", "FastAPI, Uvicorn and HTTPX"),
    ],
)
def test_make_shows_what_pip_says_when_it_fails(tmp_path: Path, step: str, left_out: str) -> None:
    """A pip that explains itself at length on one of the installations; where tests can do without, make goes on."""
    for name in ("Makefile", "setup.cfg", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(
        f"""#!/bin/sh
case "$*" in
*--quiet* | *" -q "*) exit 1 ;;
*" install "*"{step}"*) echo "torch depends on triton==1"; echo "ERROR: ResolutionImpossible" >&2; exit 1 ;;
*) echo "a line of pip's" ;;
esac
"""
    )
    interpreter.chmod(0o755)
    result = subprocess.run(["make", "venv"], cwd=tmp_path, capture_output=True, text=True)
    assert "torch depends on triton==1\nERROR: ResolutionImpossible\n" in result.stderr
    skipped = re.findall(r"^(.*) cannot be installed for this Python; the tests", result.stdout, re.MULTILINE)
    assert skipped == ([left_out] if left_out else [])
    assert (result.returncode == 0) == (tmp_path / ".venv" / ".installed").exists() == bool(left_out)


def test_every_page_names_the_same_pythons() -> None:
    """From the oldest that setup.cfg allows to the newest whose wheels are known, without a gap."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    classified = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", setup["metadata"]["classifiers"], re.M)
    assert tuple(classified) == wheels.PYTHONS
    oldest, newest = wheels.PYTHONS[0], wheels.PYTHONS[-1]
    assert setup["options"]["python_requires"] == f">={oldest}"
    assert f"\nPython {oldest}–{newest}. " in (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"Any Python {oldest}–{newest} with" in makefile
    assert f"embtables needs Python {oldest} to {newest} with" in makefile
    with (ROOT / "pyproject.toml").open(encoding="utf-8") as file:
        assert re.findall(r"python_version = \"(.*)\"|target-version = \"py3(.*)\"", file.read()) == [
            ("", oldest[2:]),
            (oldest, ""),
        ]


@pytest.mark.parametrize("version", ["3.9", *wheels.PYTHONS, "3.15"])
def test_make_takes_each_supported_python(tmp_path: Path, version: str) -> None:
    """By its own name; another is refused even as ``python3``. No other interpreter is on the path."""
    name = f"python{version}" if version in wheels.PYTHONS else "python3"
    fake = tmp_path / name
    shown = re.sub(r"\D", ", ", version)
    # Runs what make asks of it, as the interpreter of another version would.
    fake.write_text(
        f"""#!/bin/sh
test "$1" = -c || exit 0
exec {sys.executable} -c "import sys; sys.version_info = ({shown}, 0); exec(sys.argv[1])" "$2"
"""
    )
    fake.chmod(0o755)
    command = [shutil.which("make"), "--dry-run", "venv", "VENV=missing"]
    result = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    chosen = re.search(r"(\S*) -m venv missing", result.stdout)
    assert chosen is not None, result.stderr
    assert chosen[1] == (name if version in wheels.PYTHONS else "")


def test_readme_opens_with_the_two_commands() -> None:
    blocks = re.findall(
        r"```(?:sh|bash|console)?\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert [command for command in commands if command][:2] == ["make demo", "make test"]


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def _announced(requires: list[str], has_gpu: bool) -> str:
    return str(
        runpy.run_path(str(ROOT / ".ci" / "announce.py"))["sentence"](
            {"version": "2.13.0", "requires_dist": requires}, has_gpu
        )
    )


def test_a_host_without_a_gpu_is_told_what_it_is_about_to_download() -> None:
    here = sys.platform
    cuda = [f'nvidia-nccl; sys_platform == "{here}"', f'cuda-toolkit[cublas]==13.0; sys_platform == "{here}"']
    plain = ["filelock", "numpy", 'nvidia-nccl; sys_platform == "somewhere else"', 'cuda-extra; extra == "more"']
    assert _announced(plain, False) == _announced(plain, True) == "pip takes torch 2.13.0."
    told = _announced([*plain, *cuda], False)
    assert told.startswith("pip takes torch 2.13.0 and 2 packages of CUDA libraries with it, several gigabytes.")
    assert "No NVIDIA GPU is seen here" in told and "make … PIP_FLAGS='--extra-index-url ADDRESS'" in told
    assert "PIP_FLAGS" not in _announced([*plain, *cuda], True)


def test_the_build_that_pip_takes_is_asked_of_pip(tmp_path: Path) -> None:
    """From a folder with one wheel, which is never unpacked, and from an empty one, of which pip tells later."""
    command = [sys.executable, str(ROOT / ".ci" / "announce.py"), "-c", str(ROOT / "constraints.txt"), "--no-index"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    for number, expected in ((0, ""), (1, "pip takes torch 2.13.0.\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number:
            with zipfile.ZipFile(folder / "torch-2.13.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(
                    "torch-2.13.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
                )
                wheel.writestr("torch-2.13.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
                wheel.writestr("torch-2.13.0.dist-info/RECORD", "")
        told = subprocess.run(
            [*command, "--find-links", str(folder)],
            env=own | {"PIP_CONFIG_FILE": os.devnull},
            capture_output=True,
            text=True,
        )
        assert (told.returncode, told.stdout, told.stderr) == (0, expected, "")
