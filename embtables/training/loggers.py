"""Where a run is logged besides its folder: MLflow, Weights & Biases, and what other packages bring."""

from __future__ import annotations

import importlib.util
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter

from embtables import plugins
from embtables._util.files import write_json
from embtables._util.reading import inside, read_json
from embtables.training.checkpoint import random_state, restore_random_state

__all__ = ["Guarded", "RunDescription", "RunLogger", "logger_kinds", "loggers_named"]


@dataclass(frozen=True)
class RunDescription:
    """What is known of a run before it begins.

    Args:
        name: of its folder.
        parameters: the name of its data as ``dataset``, and every field of its configuration as
            ``training.batch_size``.
        tags: ``embtables.version``, and as ``embtables.data_sha256`` the checksum of the data's manifest.
    """

    name: str
    parameters: Mapping[str, Any]
    tags: Mapping[str, str]


class RunLogger(ABC):
    """Is told of one run while it goes on: what ``training.log_to`` names by its ``kind``.

    Whatever a method raises becomes one warning, and the training goes on without the logger. The random numbers that
    it draws are no others' loss.
    """

    kind: ClassVar[str]
    package: ClassVar[str] = ""
    """The module without which nothing is to be trained; empty: there is none that may be missing."""

    @abstractmethod
    def start(self, run: RunDescription, known_as: str | None) -> str:
        """Begins a run, or goes on with the one that ``start`` called ``known_as`` before; returns what it is called.

        The folder of the run keeps what is returned.
        """

    @abstractmethod
    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Takes what was measured after so many steps, by names such as ``valid/auc``.

        Several calls may be of the same step, with other names. A name never comes twice with the same step, whether
        or not the run was resumed in between.
        """

    @abstractmethod
    def end(self, finished: bool, files: Sequence[Path]) -> None:
        """Ends the run, or lets it rest where it is not ``finished`` and may be resumed.

        Args:
            finished: whether the run came to its end.
            files: what is to be kept of a finished one: its configuration, environment, plan, curve and metrics.
        """


class MlflowLogger(RunLogger):
    """Logs to MLflow, where ``MLFLOW_TRACKING_URI`` and its other variables say."""

    kind = package = "mlflow"

    def start(self, run: RunDescription, known_as: str | None) -> str:
        import mlflow

        # Where the caller has a run of MLflow's under way, this one is inside it.
        nested = mlflow.active_run() is not None
        started = mlflow.start_run(known_as, run_name=run.name, nested=nested, tags=dict(run.tags))
        self._mlflow, self._id = mlflow, started.info.run_id
        # Some fields may change with a resume, and MLflow takes a parameter once.
        known = started.data.params
        mlflow.log_params({name: value for name, value in run.parameters.items() if name not in known})
        return str(self._id)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._id)

    def end(self, finished: bool, files: Sequence[Path]) -> None:
        for file in files:
            self._mlflow.log_artifact(str(file), run_id=self._id)
        self._mlflow.end_run("FINISHED" if finished else "KILLED")


class WandbLogger(RunLogger):
    """Logs to Weights & Biases, where and as ``WANDB_PROJECT``, ``WANDB_MODE`` and its other variables say."""

    kind = package = "wandb"

    def start(self, run: RunDescription, known_as: str | None) -> str:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            id=known_as,
            resume="allow",
            name=None if "WANDB_NAME" in os.environ else run.name,
            reinit="create_new",  # the caller may have a run of its own under way
        )
        self._run.config.update({**run.parameters, **run.tags}, allow_val_change=True)
        return str(self._run.id)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, finished: bool, files: Sequence[Path]) -> None:
        if files:
            artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
            for file in files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if finished else 1)


_BUILT_IN: dict[str, type[RunLogger]] = {cls.kind: cls for cls in (MlflowLogger, WandbLogger)}


def logger_kinds() -> dict[str, type[RunLogger]]:
    """Every logger that there is, by its kind: this package's own, and those of entry points ``embtables.loggers``.

    Raises:
        ValueError: an entry point is no such class, or its kind exists already.
    """
    return {**_BUILT_IN, **plugins.load("embtables.loggers", RunLogger, _BUILT_IN)}  # type: ignore[type-abstract]


def loggers_named(kinds: Sequence[str]) -> list[type[RunLogger]]:
    """The loggers of these kinds, which exist.

    Raises:
        ValueError: what has to be installed for one of them.
    """
    known = logger_kinds() if kinds else {}
    for cls in (known[kind] for kind in kinds if known[kind].package):
        spec = importlib.util.find_spec(cls.package)
        # W&B's own folder `wandb` in the working directory passes for a package without an origin.
        if spec is None or spec.origin is None:
            distribution = f"'embtables[{cls.kind}]'" if cls.kind in _BUILT_IN else cls.package
            raise ValueError(
                f"training.log_to: {cls.kind} needs the package {cls.package}, which is not installed: "
                f"pip install {distribution}"
            )
    return [known[kind] for kind in kinds]


@dataclass
class _Kept:
    """What the folder of a run keeps of a logger: what it calls the run, and the last step of each metric."""

    run: str
    steps: dict[str, int]


_KEPT = TypeAdapter(_Kept)


class Guarded:
    """A logger that can neither stop nor change a training, and that hears of each step once.

    Args:
        kind: the class of the logger, which is made and started.
        run: what it is told of the run.
        out: the run's folder, where ``logger-KIND.json`` keeps what a resume needs.
        device: whose generator of random numbers is left as it was too.
    """

    def __init__(self, kind: type[RunLogger], run: RunDescription, out: Path, device: torch.device) -> None:
        self._kind, self._device = kind, device
        self._path = out / f"logger-{kind.kind}.json"
        self._works = True
        self._kept = _Kept("", {})
        self._call(self._start, run)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Hands on what is a number, and was not handed on before the run was resumed."""
        steps = self._kept.steps
        new = {name: value for name, value in values.items() if value is not None and steps.get(name, -1) < step}
        if new:
            self._call(self._write, step, new)

    def end(self, finished: bool, files: Sequence[Path]) -> None:
        self._call(self._end, finished, files)

    def _start(self, run: RunDescription) -> None:
        if self._path.exists():
            try:
                self._kept = _KEPT.validate_python(read_json(inside(self._path.parent, self._path.name)))
            except ValueError:
                raise ValueError(f"{self._path} is damaged: delete it to have the run logged as another one") from None
        self._logger = self._kind()
        self._kept.run = self._logger.start(run, self._kept.run or None)
        self._keep()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self._logger.metrics(step, values)
        self._kept.steps.update(dict.fromkeys(values, step))
        self._keep()

    def _end(self, finished: bool, files: Sequence[Path]) -> None:
        self._logger.end(finished, files)

    def _keep(self) -> None:
        write_json(self._path, _KEPT.dump_python(self._kept))

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._works:
            return
        state = random_state(self._device)
        try:
            function(*arguments)
        except Exception as error:  # of whatever package, its server and its network
            # Each further call might wait for minutes, as its client tries again.
            self._works = False
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            warnings.warn(f"{self._kind.kind} hears no more of this run, which goes on: {reason}", stacklevel=3)
        finally:
            restore_random_state(state, self._device)
