"""A process that does work in forks of itself: ``python kill_works.py``, one request per line of standard input.

Forks of a process in which other tests ran would inherit what no fork can use: the locks of threads that it has not.
This one imports what commands import, runs nothing, and so has none.

A request is ``[name, arguments, environment]`` as JSON, with the name of a work below. The answers are two lines, the
number of the process when signals begin to count, and its exit code when it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_svg  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from matplotlib.figure import Figure
from sweep_cases import cell_of_cluster, config_of
from sweep_cases import run as run_sweep

import embtables.cli.sweep  # noqa: F401  # what commands import is there before the forks
import embtables.sweeps.report  # noqa: F401
from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.interrupts import interruptible
from embtables.cli.app import run as main
from embtables.training import outcome


def commands(*each: list[str]) -> int:
    """Runs them one after another, as a shell would that ends with the first that fails."""
    return next((code for code in map(main, each) if code), 0)


def train(*arguments: str) -> int:
    """Drawing takes longer than all the rest of these runs, and most kills would meet it."""
    outcome.draw_curve = lambda rows, monitor, path: path.write_text(repr(rows))  # type: ignore[assignment]
    return main(list(arguments))


def report(*arguments: str) -> int:
    """Rendering takes longer than all the rest, and most kills would meet it: each file says what it would show."""
    Figure.savefig = lambda self, path, **options: Path(path).write_text(repr((self.axes[0].get_title(), options)))  # type: ignore[method-assign]
    return main(["report", *arguments])


def save(path: str) -> int:
    EmbeddingTables(plan([TableConfig("a", 200_000, 16)], "full"), seed=1).save(path)
    return 0


def sweep(data: str, out: str) -> int:
    run_sweep(config_of(Path(data), 1, "50%"), Path(out), 2)
    return 0


def sweep_on(data: str, out: str, address: str) -> int:
    run_sweep(config_of(Path(data), 1, "50%"), Path(out), 2, cell_of_cluster, on=address)
    return 0


WORKS = {"commands": commands, "train": train, "report": report, "save": save, "sweep": sweep, "sweep_on": sweep_on}


def child(name: str, arguments: list[Any], environment: dict[str, str], ready: int) -> int:
    """Does the work in this process, as the console script would, and says to the pipe ``ready`` when it begins."""
    os.setsid()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    # As the console script, whose first signals count from here on.
    with interruptible() as received:
        try:
            os.write(ready, b".")
            return WORKS[name](*arguments)
        except KeyboardInterrupt:
            return received.code


def serve() -> None:
    process = 0
    for line in sys.stdin:
        if process:
            os.waitpid(process, 0)
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = child(*json.loads(line), writing)
            finally:
                os._exit(code)
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        print(process, flush=True)
        # Its number stays its own until the next request, whoever sends it signals.
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)


if __name__ == "__main__":
    serve()
