from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Threads that wait for each other sleep instead of spinning: here processes fill the cores, and whoever spins takes the
# core from the thread that it waits for, for milliseconds each time. It counts where it is set before torch comes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings
from kill_server import Server

# Time limits on single examples fail on a busy machine and say nothing about the code.
settings.register_profile("embtables", deadline=None)
settings.load_profile("embtables")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The test processes already fill the cores; one thread also fixes the order of sums."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def curves_in_words() -> Iterator[None]:
    """Runs leave what they would draw as text: drawing their curves takes longer than all the rest of small runs.

    The figure itself is tested in ``test_training_options.py``, and processes that tests start draw theirs.
    """
    try:
        from embtables.training import outcome
    except ModuleNotFoundError:  # the kernels are also tested where nothing is installed that trains
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "draw_curve", lambda rows, kept, path: path.write_text(repr((rows, kept))))
        yield


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    """Every test may compile the same code for tables of its own, of which torch allows eight in a process."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets; tests that ask for it are skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("EMBTABLES_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no public data sets at {path}; set EMBTABLES_DATA to the folder that holds them")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set, which nothing may change."""
    from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic

    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_synthetic(folder, Synthetic(rows=4000, cardinalities=(500, 50), seed=3))
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Does the works of ``kill_works``."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the cells of ``sweep_cases`` say what they do."""
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that share out the files end together if the last ones are short."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="module")
def _spare_what_stays() -> None:
    """Spares every garbage collection the objects of modules, and the caches of compilers, which stay until the end.

    ``compress_`` looks through all objects there are, of which the tests of torch.compile leave millions.
    """
    gc.collect()
    gc.freeze()
