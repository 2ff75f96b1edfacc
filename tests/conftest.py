from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Time limits on single examples fail on a busy machine and say nothing about the code.
settings.register_profile("embtables", deadline=None)
settings.load_profile("embtables")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The test processes already fill the cores; one thread also fixes the order of sums."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets; tests that ask for it are skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("EMBTABLES_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no public data sets at {path}; set EMBTABLES_DATA to the folder that holds them")
    return path
