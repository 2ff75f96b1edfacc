"""`embtables prepare KIND INPUT OUT`: every module of this folder that has a command brings it along."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from .options import app

__all__ = ["app"]

for _module in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda module: module.name):
    importlib.import_module(f"embtables.datasets.{_module.name}")
