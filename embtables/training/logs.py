"""What a run shows while it runs: TensorBoard events, loggers and a progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from embtables._util.files import naming
from embtables.training.loggers import Guarded

__all__ = ["Events", "Logs", "ProgressBar", "write_hparams"]


class Events:
    """Scalars for TensorBoard.

    After a resume at ``step`` what an interrupted run wrote beyond it is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with naming(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        with naming(self._folder):
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()


class Logs:
    """TensorBoard and the loggers of one run, which are told the same."""

    def __init__(self, events: Events, loggers: Sequence[Guarded]) -> None:
        self.events, self._loggers = events, loggers

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        self.events.write(step, values)
        for logger in self._loggers:
            logger.write(step, values)

    def close(self, finished: bool = False, files: Sequence[Path] = ()) -> None:
        """Ends the loggers, with the files that they keep of a finished run. What is closed stays so."""
        self.events.close()
        for logger in self._loggers:
            logger.end(finished, files)
        self._loggers = ()


_HPARAMS = ".hparams"


def write_hparams(folder: Path, parameters: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Writes the one entry that a folder of TensorBoard's has for the HParams page; an earlier one is replaced.

    Args:
        folder: of TensorBoard's events.
        parameters: what the run was given; ``None`` is left out, and what is no number, flag or text stands as text.
        results: what it came to, of which the numbers count; they become ``result/NAME``.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    given = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in parameters.items()
        if value is not None
    }
    measured = {
        f"result/{name}": float(value)
        for name, value in results.items()
        if name not in parameters and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    with naming(folder):
        for earlier in folder.glob(f"events.*{_HPARAMS}"):
            earlier.unlink()
        # A file of its own, so that a run that ends a second time finds it; after all others, as TensorBoard reads
        # the files of a folder in their order.
        with SummaryWriter(str(folder), filename_suffix=_HPARAMS) as writer:
            for summary in hparams(given, measured):
                writer.file_writer.add_summary(summary)
            for name, value in measured.items():
                writer.add_scalar(name, value)


class ProgressBar:
    """Steps, loss and the monitored metric on stderr; silent when ``visible`` is false."""

    def __init__(self, visible: bool, done: int, total: int, description: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]} {task.fields[monitor]}"),
            console=Console(stderr=True),
            disable=not visible,
        )
        self._task = self._progress.add_task(description, total=total, completed=done, loss="", monitor="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, done: int) -> None:
        total = self._progress.tasks[0].total or 0
        self._progress.update(self._task, completed=done, total=max(total, done))

    def loss(self, loss: float) -> None:
        self.note(f"loss {loss:.4f}")

    def note(self, text: str) -> None:
        """Shown in the place of the loss until the next one."""
        self._progress.update(self._task, loss=text, refresh=True)

    def say(self, text: str) -> None:
        """A line above the bar, also where no bar is shown."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def monitor(self, name: str, value: float) -> None:
        self._progress.update(self._task, monitor=f"valid {name} {value:.4f}")
