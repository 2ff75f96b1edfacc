"""`embtables prepare KIND INPUT OUT`: every module in the folder `readers` brings its own command."""

from __future__ import annotations

import importlib
import pkgutil

from embtables.datasets import readers
from embtables.datasets.options import app

__all__ = ["app"]

for _module in sorted(pkgutil.iter_modules(readers.__path__), key=lambda module: module.name):
    importlib.import_module(f"{readers.__name__}.{_module.name}")
