"""Does work in processes that may be killed, which need not start Python and import the library anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKS = Path(__file__).parent / "damage" / "kill_works.py"

Work = tuple[str, list[Any]]
"""A work of ``kill_works``, and its arguments."""


class Server:
    """The process of ``kill_works``, which does one work at a time."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(WORKS.parents[1]), *(path for path in sys.path if path)])
        self._process = subprocess.Popen(
            [sys.executable, str(WORKS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        self._child = 0

    def start(self, work: Work) -> int:
        """The number of the process that does the work."""
        assert self._process.stdin is not None
        environment = {name: os.environ[name] for name in os.environ if name == "FAKE" or name.startswith("RAY_")}
        print(json.dumps([*work, environment]), file=self._process.stdin, flush=True)
        self._child = self._answer()
        return self._child

    def ended(self) -> int:
        """The exit code of the process that was started."""
        code = self._answer()
        self._child = 0
        return code

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._child:
            os.kill(self._child, signal.SIGKILL)  # which a test that failed may have left at work
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
