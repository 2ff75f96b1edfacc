"""One run: prepared data, a model over planned tables, early stop on validation, and what is served in the end.

A run is one folder::

    config.yaml  environment.json  plan.json  tensorboard/
    validation.csv  validation.svg                every evaluation, and the curve of them
    checkpoint/last.pt, checkpoint/best-<step>/   for an exact resume
    served/                                       the best model in its served form (see ``load_served``)
    test_scores.npy                               float32 logits of the test split in file order
    metrics.json                                  written last: its presence says that the run is finished
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from embtables._util.allocator import keep_freed_memory
from embtables._util.files import (
    check_seal,
    followed,
    really,
    remove_leftovers,
    sealed,
    sha256,
    unsealed,
    write_json,
    write_text,
)
from embtables._util.lock import locked
from embtables._util.reading import inside, read_json
from embtables.datasets import PreparedDataset
from embtables.models import build_model
from embtables.plan.solver import Plan
from embtables.sizes.budget import InfeasibleBudget
from embtables.tables import EmbeddingTables
from embtables.training.checkpoint import check_identity
from embtables.training.compilation import check_compiler
from embtables.training.config import AS_SERVED, RunConfig, config_of
from embtables.training.environment import environment
from embtables.training.initialization import initialize
from embtables.training.loop import CHECKPOINT, Run
from embtables.training.outcome import Outcome
from embtables.training.planning import labels, plan_tables, selected

__all__ = ["Trainer"]

# Fields that may differ between a run and its resume: they do not touch the result.
_FREE = (
    "training.threads",
    "training.log_every",
    "training.log_to",
    "training.checkpoint_seconds",
    "training.keep_checkpoint",
)

# Fields by which runs of one training may differ, as far as their plans train the same.
_OF_THE_FORM = ("tables.method", "tables.budget", "tables.precision")


class Trainer:
    """Trains one model into ``out``, or goes on with what an interrupted run left there.

    Args:
        config: of the run.
        data: the prepared data.
        out: the run's folder.
        also: further runs of the very same training that serve it in another form, such as another precision: their
            configurations, by their folders. Each has the numbers that it would have in a training of its own.
        show_progress: whether to draw a bar.

    Example::

        config = load_config(flags={"tables.method": "hash", "tables.budget": "10%"})
        result = Trainer(config, PreparedDataset("data/demo"), Path("runs/hash")).run()
        print(result["test_auc"])
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedDataset,
        out: Path,
        *,
        also: Mapping[Path, RunConfig] | None = None,
        show_progress: bool = False,
    ) -> None:
        self.others = [Trainer(other, data, folder) for folder, other in (also or {}).items()]
        self.config, self.data, self.show_progress = config, selected(config, data), show_progress
        self.out = followed(out)
        self.device = torch.device(config.training.device)
        self.checkpoint = self.out / CHECKPOINT

    # ---- the whole run -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, evaluate and write everything; returns what metrics.json holds.

        A finished run is not run again. A budget that no tables fit gives ``status`` "infeasible" with ``floor_bytes``.

        Raises:
            ValueError: wrong configuration or data, or ``out`` belongs to another run or is in use by another process.
            OSError: a file cannot be read or written.
            FloatingPointError: a loss, gradient or weight became NaN or infinite; the sentence names step and tensor.
        """
        result = self._run(None)
        assert result is not None  # as it was not to pause
        return result

    def run_until(self, epochs: float) -> dict[str, Any] | None:
        """As ``run``, but to the first evaluation after so many epochs, where the training can go on later.

        Returns:
            What metrics.json holds, where the run is finished; else ``None``. ``validation.csv`` has the evaluations.

        Raises:
            ValueError: as ``run``, and for a number of epochs that is not above 0.
        """
        if not epochs > 0:
            raise ValueError(f"epochs must be a number above 0, not {epochs!r}")
        return self._run(epochs)

    def _run(self, until: float | None) -> dict[str, Any] | None:
        identity = self._identity()
        self._refuse_nested()
        for each in (self, *self.others):
            each._refuse_links()
            # What a killed run was writing when it died.
            remove_leftovers(each.out, each.checkpoint)
            each._refuse_other(each._identity())
        if (self.out / "metrics.json").exists():
            return self._metrics()
        for split in ("train", "valid", "test"):
            if not self.data.num_rows(split):
                raise ValueError(f"split '{split}' of {self.data.path} has no rows")
        monitor = self.config.training.monitor
        if monitor.startswith("gauc") and self.data.group_feature is None:
            raise ValueError(
                f"training.monitor is {monitor}, but {self.data.path} has no groups: monitor auc or logloss, "
                "or prepare the data with a group feature"
            )
        if self.config.training.compile:
            check_compiler(self.device)
        try:
            plan = plan_tables(self.config, self.data)
        except InfeasibleBudget as error:
            return self._write_infeasible(identity, error)
        plans = [other._plan_beside(self.config, plan) for other in self.others]
        if self.others:
            names = [each.out.name for each in (self, *self.others)]
            if len(set(names)) < len(names):
                raise ValueError(f"the folders of one training need names of their own, not {', '.join(names)}")
            identity["also"] = {other.out.name: found.fingerprint.hex() for other, found in zip(self.others, plans)}
        keep_freed_memory()
        with _threads(self.config.training.threads), _own_random_numbers(self.device):
            _seed(self.config.training.seed)
            tables = EmbeddingTables(
                plan,
                seed=self.config.training.seed,
                device=self.device,
                std=self.config.tables.init_std,
                sparse=self.config.tables.sparse_gradients,
            )
            settings = self.config.model
            model = build_model(settings.name, tables, len(self.data.dense_features), settings.hyperparameters)
            initialize(model, settings.initialization)
            model.to(self.device)
            with ExitStack() as locks:
                for each in (self, *self.others):
                    each.out.mkdir(parents=True, exist_ok=True)
                    locks.enter_context(locked(each.out))
                    each._refuse_other(each._identity())  # again: another process may have been here meanwhile
                if (self.out / "metrics.json").exists():
                    return self._metrics()
                others = [Outcome(o.config, o.data, o.out, found) for o, found in zip(self.others, plans)]
                run = Run(
                    *(self.config, self.data, self.out, identity, tables, model),
                    others=others,
                    show_progress=self.show_progress,
                )
                run.resume()  # before anything is written: a start that is refused leaves the folder as it was
                for each, found in ((self, plan), *zip(self.others, plans)):
                    each._write_start(each._identity(), found)
                return run.run(until)

    def _plan_beside(self, config: RunConfig, plan: Plan) -> Plan:
        """The plan of this run, which is to be served beside one of ``config`` that trains ``plan``.

        Raises:
            ValueError: where the two would not train the same.
        """
        which = next((name for name in AS_SERVED if getattr(config.training, name) is not None), None)
        if which is not None:
            raise ValueError(
                f"training.{which} lets the training depend on how the tables are served: train {self.out} by itself"
            )
        mine, theirs = (
            {name: value for name, value in each.flat().items() if name not in _OF_THE_FORM}
            for each in (self.config, config)
        )
        found = plan_tables(self.config, self.data)
        if mine != theirs or found.training_fingerprint != plan.training_fingerprint:
            raise ValueError(
                f"{self.out} would be another training: what is served beside a run may differ in precision, and in "
                "the budget of a method that trains the same for every budget, as matryoshka does"
            )
        return found

    def _metrics(self) -> dict[str, Any]:
        """The metrics of this run, which is finished.

        Raises:
            ValueError: where they are damaged, or another run of the same training is not finished.
        """
        path = self.out / "metrics.json"
        try:
            done = read_json(inside(self.out, path.name))
            if not isinstance(done, dict) or "status" not in done:
                raise ValueError("it has no status")
            check_seal(done, path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: delete it to go on from the checkpoint ({error})") from None
        lacking = [str(other.out) for other in self.others if not (other.out / "metrics.json").exists()]
        if lacking and done["status"] == "ok":  # what is infeasible has trained nothing that others could be served of
            raise ValueError(
                f"{self.out} is finished, and {lacking[0]} is not, so that this takes a training of its own"
            )
        return unsealed(done)

    def _refuse_nested(self) -> None:
        """The folders of one training lie beside each other: a run replaces parts of its own."""
        for one, other in permutations((self, *self.others), 2):
            if really(other.out).is_relative_to(really(one.out)):
                raise ValueError(
                    f"{other.out} is in {one.out}, the folder of another run of the same training: give it one beside"
                )

    def _refuse_links(self) -> None:
        """Nothing is written, or removed, behind a link that stands in the place of a part of the run."""
        for part in (CHECKPOINT, "served", "tensorboard"):
            if (self.out / part).is_symlink():
                raise ValueError(
                    f"{self.out / part} is a link, and a run writes into its own folder: give another --out"
                )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for two starts to be the same run."""
        fields = {name: value for name, value in self.config.flat().items() if name not in _FREE}
        return {"data": sha256(self.data.path / "manifest.json"), **fields}

    def _refuse_other(self, identity: dict[str, Any]) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file: give a folder to --out")
        path = self.out / "config.yaml"
        if not path.exists():
            if self.out.exists() and any(not entry.name.startswith(".") for entry in self.out.iterdir()):
                raise ValueError(
                    f"{self.out} exists and is not a run (it has no config.yaml): give a new folder to --out"
                )
            return
        try:
            config, data = config_of(self.out)
        except ValueError as error:
            raise ValueError(f"{error}: give another --out, or delete that folder") from None
        found = {name: value for name, value in config.flat().items() if name not in _FREE}
        check_identity(str(path), {"data": data, **found}, identity)

    def _write_start(self, identity: dict[str, Any], plan: Plan | None) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        # First, so that a folder that holds anything says whose it is.
        content = sealed({"data_sha256": identity["data"], **self.config.model_dump(mode="json")})
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_text(self.out / "config.yaml", f"# the prepared data: {self.data.name}\n{text}")
        write_json(self.out / "environment.json", environment(self.device, torch.get_num_threads()))
        if plan is not None:
            write_json(self.out / "plan.json", plan.to_dict())

    def _write_infeasible(self, identity: dict[str, Any], error: InfeasibleBudget) -> dict[str, Any]:
        self._write_start(identity, None)
        result = {
            "status": "infeasible",
            **labels(self.config, self.data),
            "floor_bytes": error.floor_bytes,
            "message": str(error),
        }
        write_json(self.out / "metrics.json", sealed(result))
        return result


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """What a run draws does not depend on its caller, and leaves the caller's generators as they were."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
