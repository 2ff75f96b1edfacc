"""Packages of others, as pip installs them."""

from __future__ import annotations

from pathlib import Path

from embtables import methods

FOLDER = Path(__file__).parent / "third_party"


def install(site: Path, name: str, points: dict[str, str], group: str = methods.GROUP) -> None:
    """What pip leaves in site-packages of a package with entry points."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
