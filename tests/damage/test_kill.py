"""Commands that are killed or interrupted, at whatever moment: the next one ends as if nothing had been.

``make kill`` kills many more times than the tests do: KILLS of each command.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sweep_cases import config_of
from sweep_cases import run as run_sweep

import embtables.cli.sweep  # noqa: F401  # what commands import is there before the forks
import embtables.sweeps.report  # noqa: F401
from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.files import PREFIX, unsealed
from embtables._util.interrupts import interruptible
from embtables.cli.app import run as main
from embtables.training import loop

KILLS = int(os.environ.get("EMBTABLES_KILLS", "4"))
TIMES = {"examples_per_second", "train_seconds", "compile_seconds", "peak_rss_bytes", "lookup_latency_us"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(work: Callable[[], int]) -> int:
    """The id of a process that does the work, whose exit code is what it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        return child
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        # As the console script, whose first signals count from here on.
        with interruptible() as received:
            try:
                os.write(writing, b".")
                code = work()
            except KeyboardInterrupt:
                code = received.code
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(PREFIX)]


def content(path: Path) -> Any:
    """What a file says, without times."""
    if path.name == "metrics.json":
        return {name: value for name, value in unsealed(json.loads(path.read_text())).items() if name not in TIMES}
    return path.read_bytes()


def results(folder: Path) -> dict[str, Any]:
    """Everything in a folder that must not depend on interruptions."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    # Times are in last.pt, and host names in the names of TensorBoard's files.
    kept = [path for path in files if "tensorboard" not in path.parts and path.suffix not in (".pt", ".log")]
    return {str(path.relative_to(folder)): content(path) for path in kept}


def check(
    work: Callable[[Path], int], folder: Path, label: str, prepared: Callable[[Path], None] = lambda folder: None
) -> int:
    """Kills ``work`` in folders of its own at random moments, and then lets it end; how often it met it at work.

    ``prepared`` puts into such a folder what the work begins with.
    """
    (folder / "whole").mkdir(parents=True)
    prepared(folder / "whole")
    began = time.monotonic()
    assert ended(start(partial(work, folder / "whole"))) == 0
    seconds = time.monotonic() - began
    whole = results(folder / "whole")
    assert whole and leftovers(folder / "whole") == []
    generator = random.Random(label)
    met = 0
    for number in range(KILLS):
        own = folder / f"killed-{number}"
        own.mkdir()
        prepared(own)
        for _ in range(generator.choice((1, 1, 2))):
            number_of_signal = generator.choice(SIGNALS)
            child = start(partial(work, own))
            time.sleep(generator.random() * seconds)
            os.kill(child, number_of_signal)
            code = ended(child)
            assert code in (0, CODES[number_of_signal]), (label, number, number_of_signal, code)
            met += code != 0
            if number_of_signal != signal.SIGKILL:
                assert leftovers(own) == [], (label, number, "an interrupt leaves nothing")
        assert ended(start(partial(work, own))) == 0, (label, number)
        assert results(own) == whole, (label, number)
        assert leftovers(own) == [], (label, number)
    return met


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    rows = [f"{generator.randrange(300)},{generator.randrange(200)},{60 * time}" for time in range(30_000)]
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    return path


def commands(*each: list[str]) -> int:
    """Runs them one after another, as a shell would that ends with the first that fails."""
    return next((code for code in map(main, each) if code), 0)


def test_prepare(log: Path, tmp_path: Path) -> None:
    def work(folder: Path) -> int:
        return main(["prepare", "interactions", str(log), str(folder / "data"), "--history", "4"])

    assert check(work, tmp_path, "prepare")


def options(epochs: int) -> list[str]:
    flags = ["--model", "mlp", "--method", "hash", "--budget", "50%", "--batch-size", "200", "--epochs", str(epochs)]
    return [*flags, "--embedding-dim", "4", "--set", "training.checkpoint_seconds=0", "--quiet"]


def draw(rows: list[Any], monitor: str, path: Path) -> None:
    """Drawing takes longer than all the rest of these runs, and most kills would meet it."""
    path.write_text(repr(rows))


def test_train(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "draw_curve", draw)

    def work(folder: Path) -> int:
        return main(["train", str(data), "--out", str(folder / "run"), *options(3)])

    assert check(work, tmp_path, "train")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(data), "--out", str(folder), *options(1)]) == 0
    return folder


def test_export(run: Path, tmp_path: Path) -> None:
    def work(folder: Path) -> int:
        return commands(*(["export", str(run), str(folder / name)] for name in ("one", "two", "three")))

    assert check(work, tmp_path, "export")


def test_save(tmp_path: Path) -> None:
    tables = EmbeddingTables(plan([TableConfig("a", 200_000, 16)], "full"), seed=1)

    def work(folder: Path) -> int:
        tables.save(folder / "tables.safetensors")
        return 0

    assert check(work, tmp_path, "save")


def test_sweep(data: Path, fake: Path, tmp_path: Path) -> None:
    def work(folder: Path) -> int:
        run_sweep(config_of(data, 1, "50%"), folder / "sweep", 2)
        return 0

    assert check(work, tmp_path, "sweep")


def test_report(data: Path, fake: Path, tmp_path: Path) -> None:
    run_sweep(config_of(data, 1, "50%"), tmp_path / "sweep", 2)

    def prepared(folder: Path) -> None:
        shutil.copytree(tmp_path / "sweep", folder / "sweep")

    def work(folder: Path) -> int:
        return main(["report", str(folder / "sweep"), "--resamples", "50"])

    assert check(work, tmp_path / "kills", "report", prepared)
