"""The loop of one run: steps, evaluations, checkpoints, and the numbers at the end."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from embtables import __version__
from embtables._util.files import sealed, sha256, write_json
from embtables.datasets import Batch, PreparedDataset
from embtables.tables import EmbeddingTables
from embtables.training.averaging import RunningMean
from embtables.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from embtables.training.compilation import Compilation, uncompiled
from embtables.training.config import RunConfig, check_threads
from embtables.training.environment import peak_rss_bytes
from embtables.training.evaluation import check_logits, share_of_colliding_ids, table_norms, to_device
from embtables.training.learning_curve import COLUMNS, Row, value_of, write_curve
from embtables.training.loggers import Guarded, RunDescription, loggers_named
from embtables.training.logs import Events, Logs, ProgressBar, write_hparams
from embtables.training.nan_guard import Watch
from embtables.training.optimization import Optimization
from embtables.training.outcome import CHECKPOINT, Outcome, Selection, epochs_of
from embtables.training.planning import (
    horizon_of,
    hyperparameters,
    last_step,
    method_label,
    quantization_step,
    steps_per_epoch,
)

__all__ = ["CHECKPOINT", "Run"]


@dataclass
class _Progress(Selection):
    """How far a run is: what a checkpoint holds beside tensors. What is chosen is the run's own served form."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    examples: int = 0  # of the steps in ``train_seconds``
    train_seconds: float = 0.0
    compile_seconds: float = 0.0  # of the steps that compiled the model
    peak_rss_bytes: int = 0
    loss_sum: float = 0.0  # of the examples since the last evaluation
    loss_examples: int = 0
    finished: bool = False
    others: dict[str, Selection] = field(default_factory=dict)  # of further served forms, by their folders' names

    def counted(self, quantization: int | None) -> list[Row]:
        """The evaluations that count: once training rounds rows, from the step ``quantization`` on, those after it."""
        begun = quantization is not None and self.step > quantization
        return [row for row in self.curve if row["step"] > quantization] if begun else self.curve

    def check(self, last: int, steps_per_epoch: int, monitor: str, quantization: int | None) -> None:
        """``ValueError`` where no run of so many steps, the ``last`` one included, chosen so, can be so far."""
        steps = self.epoch * steps_per_epoch + self.batch
        within = 0 <= self.batch < steps_per_epoch and 0 <= self.epoch and self.step <= last
        if self.step != steps or not within:
            raise ValueError(f"step {self.step} is not in batch {self.batch} of epoch {self.epoch}")
        if self.step == last and not self.finished:
            raise ValueError("all its epochs are over, and it is not finished")
        counted = (self.examples, self.loss_examples, self.train_seconds, self.compile_seconds)
        if min(counted) < 0 or not all(map(math.isfinite, (*counted, self.loss_sum))):
            raise ValueError("something was counted below 0, or without end")
        if self.examples and not self.train_seconds:
            raise ValueError("it took no time")
        self.check_curve(self.counted(quantization), monitor)
        for other in self.others.values():
            other.check_curve(other.curve, monitor)
        if self.finished and not self.counted(quantization):
            raise ValueError("it is finished without an evaluation")


_PROGRESS = TypeAdapter(_Progress)


class Run:
    """A run that is under way in the folder ``out``; ``identity`` is what a resume must have in common with it.

    ``others`` are further forms in which the same training is served, each chosen, and stopped, as in a run of its own.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedDataset,
        out: Path,
        identity: dict[str, Any],
        tables: EmbeddingTables,
        model: nn.Module,
        *,
        others: Sequence[Outcome] = (),
        show_progress: bool = False,
    ) -> None:
        self.config, self.data, self.out, self.show_progress = config, data, out, show_progress
        self.tables, self.model = tables, model
        self.device = torch.device(config.training.device)
        self.identity = {**identity, "plan": tables.plan.fingerprint.hex()}
        self.checkpoint = out / CHECKPOINT
        self.outcomes = [Outcome(config, data, out, tables.plan), *others]
        self._follow(_Progress(others={other.out.name: Selection() for other in others}))
        self.steps_per_epoch, self.last_step = steps_per_epoch(config, data), last_step(config, data)
        self.optimization = Optimization(config, model, tables)
        self.quantization = quantization_step(config, data, tables.plan)
        horizon = horizon_of(config, data)
        self.mean = None if horizon is None else RunningMean(model, tables, horizon)
        varying = bool(data.list_features or data.histories)
        self.compilation = Compilation(model, config.training.batch_size, varying) if config.training.compile else None

    def _follow(self, progress: _Progress) -> None:
        """Goes on from here."""
        own, *others = self.outcomes
        self.progress = own.selection = progress
        for other in others:
            other.selection = progress.others[other.out.name]

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self, until: float | None = None) -> dict[str, Any] | None:
        """Trains to the end, or to the first evaluation after ``until`` epochs; ``None`` where that is not the end."""
        self._remove_stale()
        if self.config.tables.regularization:
            # Only now do ids have the rows with which the training goes on: in some methods they move.
            self.tables.regularize(self.config.tables.regularization, self.data.frequencies)
        logs = _logs(self.outcomes[0], self.progress.step, self.device)
        try:
            if not self.progress.finished:
                self._train(logs, until)
            if not self.progress.finished:
                return None
            result = self._finish(logs)
        finally:
            logs.close()
        if not self.config.training.keep_checkpoint:
            for outcome in self.outcomes:
                shutil.rmtree(outcome.out / CHECKPOINT, ignore_errors=True)
        return result

    def _train(self, logs: Logs, until: float | None) -> None:
        training, progress = self.config.training, self.progress
        pause = math.inf if until is None else until * self.steps_per_epoch
        if progress.curve and progress.curve[-1]["step"] >= pause:
            return
        # On a CPU a number is there when it is asked for; elsewhere asking at each step would hold up the device.
        watch = Watch(self.model, self.tables, self.data.dense_features, waits=self.device.type == "cpu")
        name = method_label(self.config.tables.method)
        with ProgressBar(self.show_progress, progress.step, self.last_step, name) as bar:
            meter = _Meter(logs, bar, training.log_every)
            last_checkpoint = time.monotonic()
            while not progress.finished:
                self.model.train()
                batches = self.data.batches(
                    "train", training.batch_size, seed=training.seed, epoch=progress.epoch, skip=progress.batch
                )
                for batch, seconds in _timed(batches):
                    start = time.perf_counter()
                    watch.step = progress.step + 1
                    compiles = self.compilation is not None and self.compilation.is_due(batch)
                    if compiles:
                        bar.note("compiling the model …")
                    if progress.step == self.quantization:
                        self._quantize()
                    self._step(batch, watch)
                    self._advance()
                    if self.mean is not None:
                        self.mean.update(progress.step)
                    evaluates = self._evaluation_is_due()
                    saves = evaluates or time.monotonic() - last_checkpoint >= training.checkpoint_seconds
                    if watch.waits or saves or progress.step % training.log_every == 0:
                        losses = watch.settle()
                        self._count_losses(losses)
                        meter.losses += losses
                    seconds += time.perf_counter() - start
                    if compiles:
                        progress.compile_seconds += seconds
                        bar.note(f"compiled in {progress.compile_seconds:.0f} s")
                    else:
                        progress.examples += len(batch.labels)
                        progress.train_seconds += seconds
                        meter.count(len(batch.labels), seconds)
                    meter.show(progress.step, self.optimization.learning_rates())
                    if evaluates:
                        bar.monitor(training.monitor, self._evaluate(logs))
                        self._lower_learning_rates_or_stop()
                        self._save()
                        last_checkpoint = time.monotonic()
                        if progress.finished or progress.step >= pause:
                            watch.close()
                            return
                        self.model.train()
                    elif saves:
                        self._save()
                        last_checkpoint = time.monotonic()

    def _step(self, batch: Batch, watch: Watch) -> None:
        batch = to_device(batch, self.device)
        self.optimization.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.autocast is not None):
            logits = self.model(batch) if self.compilation is None else self.compilation.call(batch)
        check_logits(self.model, logits, batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.labels)
        watch.loss(loss, logits, batch)
        loss.backward()
        watch.gradients()
        self.optimization.step()

    def _quantize(self) -> None:
        """Training rounds rows from now on. What was best before was trained for other rows, and does not count."""
        self.tables.fake_quantize()
        self.progress.begin_anew()

    def _advance(self) -> None:
        progress = self.progress
        progress.step += 1
        progress.batch += 1
        if progress.batch == self.steps_per_epoch:
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _count_losses(self, losses: list[tuple[float, int]]) -> None:
        for loss, examples in losses:
            self.progress.loss_sum += loss * examples
            self.progress.loss_examples += examples

    def _evaluation_is_due(self) -> bool:
        """At the first step that is past a multiple of an evaluation's share of an epoch, and at the end."""
        progress = self.progress
        spacing = self.steps_per_epoch / Fraction(str(self.config.training.evaluations_per_epoch))
        number = progress.step // spacing
        is_past = number >= 1 and math.ceil(number * spacing) == progress.step
        return is_past or progress.step == self.last_step

    def _lower_learning_rates_or_stop(self) -> None:
        progress, training = self.progress, self.config.training
        patience = training.patience
        if progress.stale and training.plateau_factor is not None and self._stages_done():
            self.optimization.lower_learning_rates(training.plateau_factor, training.min_learning_rate)
        for selection in (outcome.selection for outcome in self._under_way()):
            selection.over = patience is not None and selection.stale >= patience and self._stages_done()
        progress.finished = progress.step == self.last_step or not self._under_way()

    def _under_way(self) -> list[Outcome]:
        """The served forms that are not out of patience."""
        return [outcome for outcome in self.outcomes if not outcome.selection.over]

    def _stages_done(self) -> bool:
        """Whether nothing is to come, such as the end of pruning or rounded rows, when the AUC may fall and recover."""
        begun = self.quantization is None or self.progress.step > self.quantization
        return begun and all(stage.done() for stage in self.tables.stages)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, logs: Logs) -> float:
        """Validation of each served form; the best one so far is kept on disk. Returns the first one's monitor."""
        progress, monitor = self.progress, self.config.training.monitor
        rates = self.optimization.learning_rates()
        under_way = self._under_way()
        with nullcontext(self.tables.serve) if self.mean is None else self.mean.applied() as serve:
            for outcome in under_way:
                served = serve(outcome.plan)
                with _serving(self.model, self.tables, served), uncompiled():
                    measured = outcome.evaluate(self.model, served, self.device, progress.step)
                outcome.selection.curve.append(
                    {
                        "step": progress.step,
                        "epoch": epochs_of(progress.step, self.steps_per_epoch),
                        "train_loss": progress.loss_sum / progress.loss_examples,
                        **measured,
                        **{name.replace("/", "_"): rate for name, rate in rates.items()},
                    }
                )
        progress.loss_sum, progress.loss_examples = 0.0, 0
        shown = under_way[0].selection
        measured = {name: shown.curve[-1][name] for name in COLUMNS if name.startswith("valid_")}
        if shown is progress:
            memory = self.tables.memory()
            logs.write(
                progress.step,
                {
                    "epoch": progress.curve[-1]["epoch"],
                    **{name.replace("_", "/", 1): metric for name, metric in measured.items()},
                    f"valid/best_{monitor}": abs(progress.best),
                    "bytes/inference": memory.inference_bytes,
                    "bytes/training": memory.training_bytes,
                },
            )
            # There may be thousands of tables, and names of any characters, which not every logger takes.
            logs.events.write(progress.step, table_norms(self.tables))
        return abs(value_of(measured, monitor))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        folder = self.checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        self.progress.peak_rss_bytes = self._peak_rss()
        state = {
            "progress": asdict(self.progress),
            "threads": torch.get_num_threads(),
            "random": random_state(self.device),
            "model": dict(self.model.state_dict()),
            "optimization": self.optimization.state_dict(),
            **({} if self.mean is None else {"mean": self.mean.state_dict()}),
        }
        save_checkpoint(folder / "last.pt", self.identity, state)
        for outcome in self.outcomes:
            write_curve(outcome.selection.curve, outcome.out / "validation.csv")
        # Only now does no checkpoint refer to an earlier best.
        self._remove_stale()

    def _remove_stale(self) -> None:
        for outcome in self.outcomes:
            outcome.remove_stale()

    def resume(self) -> None:
        """Go on from the last checkpoint, where there is one; ``ValueError`` where it is damaged."""
        path = self.checkpoint / "last.pt"
        if not path.exists():
            return
        state = load_checkpoint(path, self.identity)
        try:
            self._follow(_PROGRESS.validate_python(state["progress"]))
            training = self.config.training
            self.progress.check(self.last_step, self.steps_per_epoch, training.monitor, self.quantization)
            if self.quantization is not None and self.progress.step > self.quantization:
                self.tables.fake_quantize()  # its scales are a part of the state
            if training.threads is None:
                # The order of sums depends on the number of threads.
                torch.set_num_threads(check_threads(state["threads"]))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # such as that of the state of another optimizer
                self.model.load_state_dict(state["model"])
            self.optimization.load_state_dict(state["optimization"])
            if self.mean is not None:
                self.mean.load_state_dict(state["mean"])
            restore_random_state(state["random"], self.device)
        except Exception as error:  # values of any type may stand in the place of others
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{path} is damaged ({reason}): delete it to start again") from error

    def _peak_rss(self) -> int:
        return max(self.progress.peak_rss_bytes, peak_rss_bytes() or 0)

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self, logs: Logs) -> dict[str, Any]:
        """Measures every served form and writes its metrics.json; that of this run, which is returned, comes last."""
        own, *others = self.outcomes
        for outcome in self.outcomes:
            if not outcome.best.is_dir():
                raise ValueError(f"{outcome.best} is missing: delete {self.checkpoint / 'last.pt'} to start again")
        for other in others:
            curve = other.selection.curve
            result = other.finish(type(self.model), self.device, curve, self._of_training)
            logs_of_other = _logs(other, self.progress.step, self.device)
            _publish(other, self.progress.step, logs_of_other, {**result, "trained_with": self.out.name})
        counted = self.progress.counted(self.quantization)
        result = own.finish(type(self.model), self.device, counted, self._of_training)
        _publish(own, self.progress.step, logs, result)
        return result

    def _of_training(self) -> dict[str, Any]:
        """What the metrics of every form that is served say of the training."""
        progress = self.progress
        return {
            "training_bytes": self.tables.memory().training_bytes,
            "examples_per_second": progress.examples / progress.train_seconds if progress.examples else None,
            "train_seconds": progress.train_seconds,
            "compile_seconds": progress.compile_seconds if self.compilation is not None else None,
            "peak_rss_bytes": self._peak_rss() or None,
            "collision_share": share_of_colliding_ids(self.tables),
        }


def _logs(outcome: Outcome, step: int, device: torch.device) -> Logs:
    """What a served form is logged to, from a step on."""
    config, data, out = outcome.config, outcome.data, outcome.out
    fields = {name: value for name, value in config.flat().items() if name != "training.log_to"}
    tags = {"embtables.version": __version__, "embtables.data_sha256": sha256(data.path / "manifest.json")}
    described = RunDescription(out.name, {"dataset": data.name, **fields}, tags)
    loggers = [Guarded(each, described, out, device) for each in loggers_named(config.training.log_to)]
    return Logs(Events(out / "tensorboard", step), loggers)


def _publish(outcome: Outcome, step: int, logs: Logs, result: dict[str, Any]) -> None:
    """Logs what a served form came to, and writes its metrics.json, after which it is finished."""
    out, content = outcome.out, sealed(result)
    tested = {name: value for name, value in result.items() if name.startswith("test_") and "scores" not in name}
    sizes = {f"bytes/{name}": result[f"{name}_bytes"] for name in ("inference", "training", "full")}
    logs.write(step, {name.replace("_", "/", 1): value for name, value in tested.items()} | sizes)
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "metrics.json", content)
        files = [out / name for name in ("config.yaml", "environment.json", "plan.json", "validation.csv")]
        logs.close(finished=True, files=[*files, Path(folder) / "metrics.json"])
    write_hparams(out / "tensorboard", hyperparameters(outcome.config, outcome.data), result)
    write_json(out / "metrics.json", content)


class _Meter:
    """Loss and speed, averaged between TensorBoard entries; ``losses``: (loss, examples) of each step."""

    def __init__(self, logs: Logs, bar: ProgressBar, log_every: int) -> None:
        self.logs, self.bar, self.log_every = logs, bar, log_every
        self.losses: list[tuple[float, int]] = []
        self.examples, self.seconds = 0, 0.0

    def count(self, examples: int, seconds: float) -> None:
        self.examples += examples
        self.seconds += seconds

    def show(self, step: int, rates: dict[str, float | None]) -> None:
        self.bar.step(step)
        if step % self.log_every == 0:
            mean = sum(loss for loss, _ in self.losses) / len(self.losses)
            speed = self.examples / self.seconds if self.examples else None
            self.logs.write(step, {"train/loss": mean, "train/examples_per_second": speed, **rates})
            self.bar.loss(mean)
            self.losses, self.examples, self.seconds = [], 0, 0.0


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that it took to make."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - start


@contextmanager
def _serving(model: nn.Module, tables: EmbeddingTables, served: EmbeddingTables) -> Iterator[None]:
    """The model with its tables in their served form."""
    model.embeddings = served
    try:
        yield
    finally:
        model.embeddings = tables
