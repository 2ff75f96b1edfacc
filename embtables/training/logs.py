"""What a run shows while it runs: TensorBoard events and a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from embtables._util.files import naming

__all__ = ["Events", "ProgressBar"]


class Events:
    """Scalars for TensorBoard, which is imported here and nowhere else.

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
        self._progress.update(self._task, completed=done)

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
