"""What the tests of the faces share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def only_objects_of_these_tests() -> Iterator[None]:
    """``compress_`` looks at every object of the process, of which a process of tests has millions."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
