"""Trainings of a sweep on the machines of a Ray cluster.

A cell is trained in a folder of its own on its machine, from the data that lies there at the same path. What the run
has written when it has ended comes back through Ray's object store, and this process puts it into the sweep's folder.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embtables import __version__
from embtables._util.files import replacing_folder, sha256, temporary_folder, write_bytes
from embtables.sweeps.config import SweepConfig
from embtables.sweeps.runner import Job, Processes, Running, cores, run_jobs, threads_per_job
from embtables.training.loop import CHECKPOINT

MOST_STARTS = 3
"""How many times a training is started whose workers are lost, each time from its beginning."""
CONNECT_SECONDS = 10.0

#: Exit code, what was printed, and {folder of a run: {path in it: content}}.
_Trained = tuple[int, bytes, dict[str, dict[str, np.ndarray]]]


@contextmanager
def connected(address: str, config: SweepConfig) -> Iterator[Cluster]:
    """The Ray cluster at `address` for the cells of `config`, until the block ends.

    Args:
        address: ``"ray"`` starts workers on this machine, one core each. Otherwise it is that of a cluster as
            ``ray.init`` takes it: ``"auto"`` for the one to which this machine belongs, ``"HOST:PORT"`` or
            ``"ray://HOST:PORT"``.
        config: what is trained. On a GPU each training has one of its own.

    Raises:
        ValueError: Ray is missing, the cluster cannot be reached, has another version of Ray or Python, or none of its
            machines has what a training needs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user asks for it
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"--on needs Ray ({error}): pip install 'embtables[ray]'") from None
    own: dict[str, Any] = {"num_cpus": cores(), "include_dashboard": False} if address == "ray" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _refuse_unreachable(address)
        ray.init("local" if address == "ray" else address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # of many kinds; a machine that is too busy to start workers in time has a bare one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--on {address}: no Ray cluster can be used there: {reason}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process with what it is at unfinished
    try:
        trains = (config.train, *config.variants.values())
        gpus = int(any(train.training.device.startswith("cuda") for train in trains))
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        machines = [int(each.get("CPU", 0)) for each in resources if each.get("GPU", 0) >= gpus]
        if not any(machines):
            needed = "a GPU" if gpus else "a core for tasks"
            raise ValueError(f"--on {address}: none of the {len(resources)} machines of the cluster has {needed}")
        yield Cluster(config, machines, gpus)
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """``OSError`` where nobody listens: Ray itself would wait for minutes, and then end this process."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@dataclass(frozen=True)
class Cluster:
    """A cluster: the cores of each machine, and the GPUs that a training takes."""

    config: SweepConfig
    machines: list[int]
    gpus: int

    def workers(self, jobs: int, folder: Path) -> RayWorkers:
        """What trains `jobs` cells at a time of the sweep in `folder`."""
        return RayWorkers(self.config, threads_per_job(jobs, self.machines), self.gpus, folder)


class RayWorkers:
    """Jobs as tasks of the cluster to which this process is connected.

    Commands name files relative to the sweep's folder, which is another one where they run.
    """

    def __init__(self, config: SweepConfig, threads: int, gpus: int, home: Path) -> None:
        self.threads, self.folder, self._home = threads, Path(), home
        self._versions = {"embtables": __version__, "torch": str(torch.__version__)}
        self._data = {"data": config.data, "manifest_sha256": config.manifest_sha256}
        self._task = _task(threads, gpus)

    def start(self, job: Job) -> Running:
        arguments = {
            **self._data,
            "name": job.name,
            "command": list(job.command),
            "runs": list(map(str, job.runs)),
            "files": {path.name: path.read_bytes() for path in self._home.glob("train*.yaml")},
            "threads": self.threads,
            "working_directory": os.getcwd(),
        }
        return _Remote(lambda: self._task.remote(self._versions, arguments), job, self._home)


def _task(threads: int, gpus: int) -> Any:
    """What a worker does. It is sent with all that it names: what is installed there may be another version."""
    import ray

    def train(versions: dict[str, str], arguments: dict[str, Any]) -> Any:
        import socket

        try:
            import torch

            import embtables

            found = {"embtables": embtables.__version__, "torch": str(torch.__version__)}
        except ImportError as error:
            found = {str(error.name): f"that cannot be imported ({error})"}
        for name, other in found.items():
            if other != versions.get(name):
                raise ValueError(
                    f"{socket.gethostname()} has {name} {other}, and this machine {versions.get(name, 'has one')}: "
                    "install the same there, or leave that machine out of the cluster"
                )
        from embtables.sweeps.cluster import train_here

        return train_here(**arguments)

    # A lost worker is for `_Remote` to tell: Ray would start a training again without end that takes too much memory.
    return ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(train)


def train_here(
    *,
    data: str,
    manifest_sha256: str,
    name: str,
    command: list[str],
    runs: list[str],
    files: Mapping[str, bytes],
    threads: int,
    working_directory: str,
) -> _Trained:
    """Run a job on this machine, in a folder that is removed afterwards, and return what comes of it.

    Args:
        data: the prepared data.
        manifest_sha256: the checksum of its manifest, which holds those of all other files.
        name: of the job.
        command: its words, with paths relative to the folder.
        runs: the folders that it writes, that of the run itself first.
        files: what it reads beside the data, by name.
        threads: how many it may use.
        working_directory: where the sweep was started; modules are looked for there as well.

    Returns:
        The exit code, what was printed, and where the code is 0 the files in each of `runs`, without checkpoints.

    Raises:
        ValueError: there is no such data here.
    """
    manifest = Path(data) / "manifest.json"
    if not manifest.is_file() or sha256(manifest) != manifest_sha256:
        kind = "other data" if manifest.is_file() else "no data"
        raise ValueError(f"{socket.gethostname()} has {kind} at {data}: copy the folder of this machine there")
    with temporary_folder(Path(tempfile.gettempdir())) as folder:
        log = folder / "cells" / f"{name}.log"
        log.parent.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        searched = [working_directory, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        modules = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, searched))}
        job = Job(name, [sys.executable, *command[1:]], log, working_directory=folder, environment=modules)
        (ended,) = run_jobs([job], 1, Processes(threads))
        written = {run: _content(folder / run) for run in runs} if ended.code == 0 else {}
        return ended.code, log.read_bytes(), written


def _content(run: Path) -> dict[str, np.ndarray]:
    paths = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    # The checkpoint, most of the bytes, is for going on with a training, and this one has ended.
    return {name: np.fromfile(path, np.uint8) for name, path in paths.items() if Path(name).parts[0] != CHECKPOINT}


class _Remote:
    """A job on some machine, which is started again where its worker is lost."""

    def __init__(self, submit: Callable[[], Any], job: Job, home: Path) -> None:
        self._submit, self._job, self._home = submit, job, home
        self._starts, self._stopped = 1, False
        self._code: int | None = None
        self._reference = submit()

    def poll(self) -> int | None:
        import ray

        if self._code is None and ray.wait([self._reference], timeout=0, fetch_local=False)[0]:
            self._code = -signal.SIGTERM if self._stopped else self._end()
        return self._code

    def stop(self, sign: signal.Signals) -> None:
        import ray

        self._stopped = True
        ray.cancel(self._reference, force=sign == signal.SIGKILL)

    def _end(self) -> int | None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            trained: _Trained = ray.get(self._reference)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):  # a machine that is not like this one: so are all its cells
                raise ValueError(str(error.cause)) from None
            return self._failed(f"{type(error.cause).__name__} on its worker: {error.cause}")
        except RayError as error:
            if self._starts == MOST_STARTS:
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                return self._failed(f"its worker was lost {self._starts} times, the last time so: {reason}")
            self._starts += 1
            self._reference = self._submit()
            return None
        code, printed, written = trained
        write_bytes(self._job.log, printed)
        # The first folder is that of the run itself, whose metrics say that the others are there.
        for run, content in reversed(written.items()):
            _receive(self._home / run, content)
        return code

    def _failed(self, sentence: str) -> int:
        write_bytes(self._job.log, f"Error: {' '.join(sentence.split())}\n".encode())
        return 1


def _receive(run: Path, written: Mapping[str, np.ndarray]) -> None:
    with replacing_folder(run) as folder:
        for name, content in written.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content.tofile(path)
