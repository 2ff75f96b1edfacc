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
from pathlib import Path
from typing import Any

import pytest
from kill_server import Server, Work
from sweep_cases import config_of
from sweep_cases import run as run_sweep

from embtables._util.files import PREFIX, unsealed
from embtables.cli.app import run as main

KILLS = int(os.environ.get("EMBTABLES_KILLS", "2"))
TIMES = {"examples_per_second", "train_seconds", "compile_seconds", "peak_rss_bytes", "lookup_latency_us"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


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
    server: Server,
    work: Callable[[Path], Work],
    folder: Path,
    label: str,
    prepared: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Kills a work in folders of its own at random moments, and then lets it end.

    It goes on beyond KILLS until one of them has met the work before its end: where a machine is busy at first, and
    the work takes longer than it does later, all may come too late.

    Args:
        server: what does the work.
        work: what is done in a folder.
        folder: for all folders.
        label: of the moments.
        prepared: puts into such a folder what the work begins with.
    """
    (folder / "whole").mkdir(parents=True)
    prepared(folder / "whole")
    server.start(work(folder / "whole"))
    began = time.monotonic()
    assert server.ended() == 0
    seconds = time.monotonic() - began
    whole = results(folder / "whole")
    assert whole and leftovers(folder / "whole") == []
    generator = random.Random(label)
    number = met = 0
    while number < KILLS or not met:
        own = folder / f"killed-{number}"
        own.mkdir()
        prepared(own)
        for _ in range(generator.choice((1, 1, 2))):
            number_of_signal = generator.choice(SIGNALS)
            child = server.start(work(own))
            time.sleep(generator.random() * seconds)
            os.kill(child, number_of_signal)
            code = server.ended()
            assert code in (0, CODES[number_of_signal]), (label, number, number_of_signal, code)
            met += code != 0
            if number_of_signal != signal.SIGKILL:
                assert leftovers(own) == [], (label, number, "an interrupt leaves nothing")
        server.start(work(own))
        assert server.ended() == 0, (label, number)
        assert results(own) == whole, (label, number)
        assert leftovers(own) == [], (label, number)
        number += 1


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    rows = [f"{generator.randrange(300)},{generator.randrange(200)},{60 * time}" for time in range(10_000)]
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    return path


def test_prepare(log: Path, tmp_path: Path, server: Server) -> None:
    def work(folder: Path) -> Work:
        return "commands", [["prepare", "interactions", str(log), str(folder / "data"), "--history", "4"]]

    check(server, work, tmp_path, "prepare")


def options(epochs: int) -> list[str]:
    flags = ["--model", "mlp", "--method", "hash", "--budget", "50%", "--batch-size", "200", "--epochs", str(epochs)]
    return [*flags, "--embedding-dim", "4", "--set", "training.checkpoint_seconds=0", "--quiet"]


def test_train(data: Path, tmp_path: Path, server: Server) -> None:
    def work(folder: Path) -> Work:
        return "train", ["train", str(data), "--out", str(folder / "run"), *options(2)]

    check(server, work, tmp_path, "train")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(data), "--out", str(folder), *options(1)]) == 0
    return folder


def test_export(run: Path, tmp_path: Path, server: Server) -> None:
    def work(folder: Path) -> Work:
        return "commands", [["export", str(run), str(folder / name)] for name in ("one", "two", "three")]

    check(server, work, tmp_path, "export")


def test_save(tmp_path: Path, server: Server) -> None:
    check(server, lambda folder: ("save", [str(folder / "tables.safetensors")]), tmp_path, "save")


def test_sweep(data: Path, fake: Path, tmp_path: Path, server: Server) -> None:
    check(server, lambda folder: ("sweep", [str(data), str(folder / "sweep")]), tmp_path, "sweep")


def test_report(data: Path, fake: Path, tmp_path: Path, server: Server) -> None:
    run_sweep(config_of(data, 1, "50%"), tmp_path / "sweep", 2)

    def prepared(folder: Path) -> None:
        shutil.copytree(tmp_path / "sweep", folder / "sweep")

    def work(folder: Path) -> Work:
        return "report", [str(folder / "sweep"), "--resamples", "50"]

    check(server, work, tmp_path / "kills", "report", prepared)
