"""Runs torchrec's own tests of its two collections with ours in their place, and says why those that fail do.

    python tests/run_torchrec_tests.py /path/to/torchrec

The argument is a checkout of https://github.com/pytorch/torchrec, of the release that is installed or one near it: the
installed package has no tests. ``parameterized`` and ``iopath`` have to be installed for them.

Every test runs with torchrec's own collections first; where it fails so, it says nothing of ours. A test that fails
with ours is run again under one change after another, and the change under which it passes is the reason:

- ``TorchScript``: without ``torch.jit.script``, for which our collections are not made;
- ``literals``: from the initial weights that torchrec's collection draws, since the test compares with numbers that
  those gave under a seed;
- ``class``: with our class in torchrec's modules too, since they ask ``isinstance`` for torchrec's own, or name it.

It ends with 1 where a test fails for another reason.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import unittest
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torchrec
import torchrec.distributed.test_utils
from torchrec.modules import embedding_modules as stock

import embtables.torchrec as ours

# The tests that build one of the two collections. Others ask for a GPU, or are of the classes for quantized, fused or
# sharded tables, which are made from the private parts of torchrec's collections.
FILES = (
    "modules/tests/test_embedding_modules.py",
    "modules/tests/test_fp_embedding_modules.py",
    "modules/tests/test_mc_embedding_modules.py",
    "schema/api_tests/test_embedding_module_schema.py",
    "optim/tests/test_optim.py",
    "models/tests/test_dlrm.py",
    "models/tests/test_deepfm.py",
    "models/experimental/test_transformerdlrm.py",
)
NAMES = ("EmbeddingBagCollection", "EmbeddingCollection")
CHANGES = ("TorchScript", "literals", "class")


def _from_stock_weights(name: str) -> type:
    """Our collection, from the initial weights of torchrec's."""
    collection: Any = getattr(ours, name)

    def build(self: Any, *arguments: Any, **named: Any) -> None:
        of_stock = getattr(stock, name)(*arguments, **named)
        collection.__init__(self, *arguments, **named)
        if self.device.type != "meta":
            self.load_state_dict(of_stock.state_dict())

    return type(name, (collection,), {"__init__": build})


@contextlib.contextmanager
def _in_place(module: ModuleType, changes: tuple[str, ...]) -> Iterator[None]:
    """Our collections in the test's module, under some of the changes."""
    own = {getattr(stock, name): getattr(ours, name) for name in NAMES}
    if "literals" in changes:
        own = {getattr(stock, name): _from_stock_weights(name) for name in NAMES}
    others = [m for name, m in sys.modules.items() if name.startswith("torchrec.") and m is not stock]
    with contextlib.ExitStack() as stack:
        for m in [module, *(others if "class" in changes else [])]:
            for name, value in list(vars(m).items()):
                if isinstance(value, type) and value in own:
                    stack.enter_context(mock.patch.object(m, name, own[value]))
        if "TorchScript" in changes:
            stack.enter_context(mock.patch.object(torch.jit, "script", lambda module: module))
        yield


def _passes(test: unittest.TestCase) -> bool | None:
    """``None`` for a test that was skipped."""
    result = unittest.TestResult()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        test.run(result)
    return None if result.skipped else result.wasSuccessful()


def _load(path: Path, root: Path) -> ModuleType:
    name = "of_torchrec_" + "_".join(path.relative_to(root).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tests(module: ModuleType) -> list[str]:
    found = []
    for case in vars(module).values():
        if isinstance(case, type) and issubclass(case, unittest.TestCase) and case.__module__ == module.__name__:
            found += [f"{case.__name__}.{name}" for name in unittest.defaultTestLoader.getTestCaseNames(case)]
    return found


def _outcome(module: ModuleType, name: str) -> str:
    case, method = name.split(".")

    def run() -> bool | None:
        return _passes(getattr(module, case)(method))

    with_stock = run()
    if with_stock is not True:
        return "skipped" if with_stock is None else "fails with torchrec's own"
    for count in range(len(CHANGES) + 1):
        for changes in combinations(CHANGES, count):
            with _in_place(module, changes):
                if run():
                    return "passes" if not changes else " + ".join(changes)
    return "FAILS"


def outcomes(checkout: Path, files: Sequence[str] = FILES) -> dict[str, str]:
    """``{file::Case.test: outcome}`` of all tests in ``files``."""
    root = checkout / "torchrec"
    # What the tests import and the installed package lacks.
    torchrec.__path__.append(str(root))
    torchrec.distributed.test_utils.__path__.append(str(root / "distributed" / "test_utils"))
    found = {}
    for file in files:
        module = _load(root / file, root)
        for name in _tests(module):
            found[f"{file}::{name}"] = _outcome(module, name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of torchrec's repository")
    checkout = parser.parse_args(arguments).checkout
    if not (checkout / "torchrec" / FILES[0]).is_file():
        print(f"{checkout} is no checkout of torchrec: it has no torchrec/{FILES[0]}", file=sys.stderr)
        return 2
    found = outcomes(checkout)
    for name, outcome in found.items():
        print(f"{outcome:<26} {name}")
    counts = {outcome: list(found.values()).count(outcome) for outcome in sorted(set(found.values()))}
    print(", ".join(f"{outcome}: {count}" for outcome, count in counts.items()))
    return int("FAILS" in counts)


if __name__ == "__main__":
    sys.exit(main())
