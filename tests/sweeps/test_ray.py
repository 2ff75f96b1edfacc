"""Sweeps whose cells are trained by the workers of a Ray cluster: two on this machine."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kill_server import Server
from sweep_cases import cell_of_cluster, config_of, read, run, started

from embtables._util.files import PREFIX, unsealed
from embtables.cli.app import run as main
from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic
from embtables.sweeps import cluster

pytest.importorskip("ray", reason="Ray is not installed; it is not there for every Python")
from ray._raylet import Config  # noqa: E402

TIMES = {"examples_per_second", "train_seconds", "peak_rss_bytes", "lookup_latency_us"}
HEAD = """
import ray, sys
for left in (2, 1, 0):
    try:
        context = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        break
    except Exception:  # a busy machine needs longer than Ray waits
        ray.shutdown()
        if not left:
            raise
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder for Ray's sockets and the workers' own folders: names of sockets are short."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def address(short: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        # A secret of its own, so that nobody's is read or written.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        Config.initialize("")  # Ray reads the mode when it is imported, which another test may have done
        own = {"RAY_TMPDIR": str(short), "TMPDIR": str(short), "RAY_USAGE_STATS_ENABLED": "0"}
        paths = os.pathsep.join(path for path in sys.path if path)
        head = subprocess.Popen(
            [sys.executable, "-c", HEAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **own, "PYTHONPATH": paths},
        )
        assert head.stdin is not None and head.stdout is not None
        found = head.stdout.readline().strip()
        assert found, "Ray has not started"
        yield found
        head.stdin.close()
        head.wait()
        head.stdout.close()
    Config.initialize("")


@pytest.fixture
def out(fake: Path) -> Path:
    return fake.parent / "sweep"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def cells(fake: Path, name: str = "") -> list[int]:
    """The processes of the cells that were started, or of the one of this name."""
    return _processes(fake / "started", name)


def workers(fake: Path, name: str) -> list[int]:
    """The processes of the workers that started the cell of this name."""
    return _processes(fake / "workers", name)


def _processes(file: Path, name: str) -> list[int]:
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [int(line[1]) for line in lines if line[0] == name or not name]


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(PREFIX)]


def content(path: Path) -> Any:
    """What a file says, without times."""
    if path.name != "metrics.json":
        return path.read_bytes()
    return {name: value for name, value in unsealed(json.loads(path.read_text())).items() if name not in TIMES}


def numbers(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """All that a sweep's cells have written, and its results, without what a cluster does not send and times."""
    files = [path for path in sorted((folder / "cells").rglob("*")) if path.is_file() and path.suffix != ".log"]
    kept = [path for path in files if not {"checkpoint", "tensorboard"} & set(path.parts)]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in read(folder)]
    return {str(path.relative_to(folder)): content(path) for path in kept}, rows


@pytest.mark.slow
def test_cells_have_the_bits_of_a_local_sweep(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prepare_synthetic(tmp_path / "data", Synthetic(rows=6000, cardinalities=(500, 50), num_dense=2, seed=3))
    command = ["sweep", str(tmp_path / "data"), "--methods", "full,hash", "--precisions", "fp32,int8", "--seeds", "1"]
    command += ["--budgets", "10%", "--no-baselines", "--jobs", "2", "--set", "training.epochs=1"]
    assert main([*command, "--out", str(tmp_path / "local")]) == 0
    assert main([*command, "--out", str(tmp_path / "ray"), "--on", address]) == 0
    assert capfd.readouterr().out.count("4 ok, 0 infeasible, 0 failed") == 2
    files, rows = numbers(tmp_path / "ray")
    assert (files, rows) == numbers(tmp_path / "local")
    assert json.loads(files["cells/full_precision=fp32-s0/environment.json"])["threads"] == 1
    # One training is served in two precisions; its log, curves and tables are there, and no checkpoint is.
    assert rows[1]["trained_with"] == "full_precision=fp32-s0"
    trained = tmp_path / "ray" / "cells" / "full_precision=fp32-s0"
    assert "test AUC" in trained.with_name(f"{trained.name}.log").read_text()
    assert list((trained / "tensorboard").iterdir()) and (trained / "served" / "tables.safetensors").exists()
    assert not list((tmp_path / "ray").rglob("checkpoint")) and leftovers(tmp_path / "ray") == []
    assert main(["report", str(tmp_path / "ray")]) == 0


@pytest.mark.slow
def test_a_lost_worker_s_cell_is_started_again_and_a_failed_one_is_not(
    address: str, data: Path, fake: Path, out: Path, short: Path
) -> None:
    (fake / "slow").touch()
    (fake / "fail-hash").touch()
    config = config_of(data, 1, "50%")

    def kill() -> None:
        wait_until(lambda: len(cells(fake)) == 2)
        os.kill(workers(fake, "full-s0")[0], signal.SIGKILL)
        wait_until(lambda: len(cells(fake, "full-s0")) == 2)
        wait_until(lambda: not alive(cells(fake, "full-s0")[0]))
        (fake / "slow").unlink()

    killing = threading.Thread(target=kill)
    killing.start()
    rows = run(config, out, 2, cell_of_cluster, on=address)
    killing.join()
    assert {row["method"]: row["status"] for row in rows if row["status"] != "ok"} == {"hash": "failed"}
    assert next(row["message"] for row in rows if row["method"] == "hash") == "the loss is NaN at step 7"
    assert len(rows) == len(set(started(fake))) == len(started(fake)) - 1
    assert started(fake).count("hash-50pct-s0") == 1 and leftovers(short) == []
    # The next start tries it again, and a worker that is lost each time is given up.
    (fake / "fail-hash").unlink()
    (fake / "slow").touch()

    def kill_all() -> None:
        for number in range(cluster.MOST_STARTS):
            wait_until(lambda number=number: len(cells(fake, "hash-50pct-s0")) == 2 + number)
            os.kill(workers(fake, "hash-50pct-s0")[-1], signal.SIGKILL)

    killing = threading.Thread(target=kill_all)
    killing.start()
    failed = [row for row in run(config, out, 2, cell_of_cluster, on=address) if row["status"] == "failed"]
    killing.join()
    assert [row["method"] for row in failed] == ["hash"]
    assert failed[0]["message"].startswith("its worker was lost 3 times, the last time so: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_same_command_goes_on_after_the_sweep_was_stopped(
    number: signal.Signals, address: str, data: Path, fake: Path, out: Path, short: Path, server: Server
) -> None:
    (fake / "slow").touch()
    child = server.start(("sweep_on", [str(data), str(out), address]))
    wait_until(lambda: len(cells(fake)) == 2)
    os.kill(child, number)
    assert server.ended() == (143 if number == signal.SIGTERM else -number)
    wait_until(lambda: not any(map(alive, cells(fake))), 30)
    assert number == signal.SIGKILL or leftovers(short) == []
    (fake / "slow").unlink()
    rows = run(config_of(data, 1, "50%"), out, 2, cell_of_cluster, on=address)
    assert rows and all(row["status"] == "ok" for row in rows)
    assert leftovers(out) == leftovers(short) == []


def test_a_worker_that_is_not_like_this_machine_is_refused(
    address: str, data: Path, fake: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data, 1, "50%")
    other = config.model_copy(update={"manifest_sha256": "0" * 64})
    with pytest.raises(ValueError, match=f" has other data at {data}: copy the folder of this machine there$"):
        run(other, out, 2, cell_of_cluster, on=address)
    shutil.rmtree(out)
    monkeypatch.setattr(cluster, "__version__", "0.0.1")
    with pytest.raises(ValueError, match=" has embtables .*, and this machine 0.0.1: install the same there"):
        run(config, out, 2, cell_of_cluster, on=address)
    assert not started(fake)


def test_without_ray_or_a_cluster_it_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(data), "--out", str(tmp_path / "sweep"), "--on"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
    for wrong in (nobody, f"ray://{nobody}", "nobody"):
        assert main([*command, wrong]) == 2
        assert f"Error: --on {wrong}: no Ray cluster can be used there: " in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "ray"]) == 2
    assert "pip install 'embtables[ray]'" in capfd.readouterr().err
    assert not (tmp_path / "sweep").exists()
