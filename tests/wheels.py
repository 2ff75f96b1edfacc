"""What the public wheels of the pinned releases require, kept in wheels.json; ``python tests/wheels.py`` adds new pins.

``python tests/wheels.py --all`` asks for all of them again.
Through pip, which reads the METADATA of a wheel alone where the index serves parts of files, and else loads the wheel.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "wheels.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Linux on x86_64 with a C library as old as torch allows, the newest first.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def markers(python: str) -> dict[str, str]:
    """What the markers of requirements are about, as CPython ``python`` (``"3.13"``) on Linux would say it."""
    return {
        "extra": "",
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def pins(python: str) -> dict[str, str]:
    """The pinned version of each package that constraints.txt has for ``python``."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(markers(python)):
            (version,) = (specifier.version for specifier in pin.specifier)
            name = canonicalize_name(pin.name)
            if name in found:
                raise ValueError(f"constraints.txt pins {name} twice for Python {python}")
            found[name] = version
    return found


def report(python: str, known: dict[str, dict]) -> list[dict]:
    """What pip would install on ``python`` of the pinned releases that are not known, each without what it requires."""
    releases = [f"{name}=={version}" for name, version in pins(python).items()]
    releases = [release for release in releases if release not in known]
    if not releases:
        return []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--use-feature=fast-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        subprocess.run([*command, f"--target={folder}", f"--report={file}", *releases], check=True)
        return json.loads(file.read_text(encoding="utf-8"))["install"]


def main() -> None:
    pinned = {f"{name}=={version}" for python in PYTHONS for name, version in pins(python).items()}
    known = {} if "--all" in sys.argv[1:] else json.loads(FILE.read_text(encoding="utf-8"))
    releases = {release: held for release, held in known.items() if release in pinned}
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(lambda python: report(python, known), PYTHONS))
    for items in reports:
        for item in items:
            metadata = item["metadata"]
            name = canonicalize_name(metadata["name"])
            release = f"{name}=={metadata['version']}"
            if "+" in release:
                sys.exit(f"{release} is no public wheel: pip has an index or find-links with other builds")
            required = {
                "requires_python": metadata.get("requires_python", ""),
                # No package is pinned for the sake of another's extras.
                "requires": [line for line in metadata.get("requires_dist", []) if "extra ==" not in line],
            }
            held = releases.setdefault(release, {**required, "wheels": []})
            wheel = item["download_info"]["url"].rsplit("/", 1)[1]
            if required != {key: held[key] for key in required}:
                sys.exit(f"{wheel} requires something else than {held['wheels'][0]}")
            if wheel not in held["wheels"]:
                held["wheels"].append(wheel)
    FILE.write_text(json.dumps(dict(sorted(releases.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
