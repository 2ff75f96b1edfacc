"""Speed and memory of embtables against others, side by side on this machine.

    python -m benchmarks.bench                 # about half an hour on two cores
    python -m benchmarks.bench --quick         # three minutes
    python -m benchmarks.bench --full          # every configuration: hours
    python -m benchmarks.bench --suites tables,dlrm --out runs/bench-tables

prints the results and saves results.csv, report.md and run.json in --out. It is saved after every configuration: stop
it at any time, and the same command goes on. What is measured and how stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import jobs, machine, report, scaling
from benchmarks.results import RESULTS, RUN
from embtables._util.files import replacing

OUT = Path("runs/bench")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="the main configuration alone, fewer rounds")
    mode.add_argument("--full", action="store_true", help="every size × D × batch × threads × operators")
    parser.add_argument(
        "--suites", default=",".join(jobs.SUITES), help=f"some of {', '.join(jobs.SUITES)}; all by default"
    )
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--threads", type=int, default=min(2, cores), help="threads of the main configuration (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what --out holds, and begin anew")
    chosen = parser.parse_args(arguments)
    chosen.suites = [suite.strip() for suite in chosen.suites.split(",") if suite.strip()]
    chosen.mode = "quick" if chosen.quick else "full" if chosen.full else "default"
    unknown = [suite for suite in chosen.suites if suite not in jobs.SUITES]
    if unknown or not chosen.suites:
        name = unknown[0] if unknown else ""
        parser.error(f"--suites has no '{name}': choose among {', '.join(jobs.SUITES)}")
    if not 1 <= chosen.threads <= cores:
        parser.error(f"--threads {chosen.threads}: this machine has {cores} cores, so give 1 to {cores}")
    return chosen


class Store:
    """The folder of a run: rows as they come, and what run they belong to."""

    def __init__(self, folder: Path, run: dict[str, Any], fresh: bool = False) -> None:
        self.folder, self.csv = folder, folder / RESULTS
        if fresh:
            for name in (RESULTS, RUN, report.REPORT, scaling.FIGURE):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RUN
        if self.csv.exists():
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            changed = [name for name in run if before.get(name) != run[name]]
            if changed:
                raise ValueError(
                    f"{folder} holds a run with another {changed[0]}, which cannot be continued: "
                    "name another --out, or give --fresh to begin anew"
                )
            self.rows = pd.read_csv(self.csv)
        else:
            self.rows = pd.DataFrame({"job": []})
            self._save()
            path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def has(self, job: jobs.Job) -> bool:
        return bool((self.rows["job"] == job.name).any())

    def add(self, job: jobs.Job, rows: Sequence[dict[str, Any]]) -> None:
        new = pd.DataFrame([{"job": job.name, **row} for row in rows])
        self.rows = new if self.rows.empty else pd.concat([self.rows, new], ignore_index=True)
        self._save()

    def _save(self) -> None:
        with replacing(self.csv) as temporary:
            self.rows.to_csv(temporary, index=False, float_format="%.6g")


def measure(planned: Sequence[jobs.Job], store: Store, console: Console) -> int:
    """Runs what is not done yet; the number of jobs that failed."""
    failed = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        every = bar.add_task("", total=len(planned), completed=sum(store.has(job) for job in planned))
        for number, job in enumerate(planned, 1):
            if store.has(job):
                continue
            bar.update(every, description=f"{number} of {len(planned)}")
            one = bar.add_task(job.name, total=1.0)
            start = time.monotonic()
            try:
                store.add(job, jobs.in_a_process(job, lambda share, one=one: bar.update(one, completed=share)))  # type: ignore[misc]
            except jobs.JobFailed as error:
                failed += 1
                console.print(f"{job.name} failed: {error}", markup=False, highlight=False)
            else:
                console.print(f"{job.name}: {time.monotonic() - start:.0f} s", highlight=False)
            bar.remove_task(one)
            bar.advance(every)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    console = Console(stderr=True)
    run = {"mode": chosen.mode, "threads": chosen.threads, "machine": machine.describe()}
    try:
        store = Store(chosen.out, run, chosen.fresh)
    except ValueError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    failed = measure(jobs.planned(chosen.mode, chosen.suites, chosen.threads), store, console)
    text = report.write(chosen.out)
    width = max(140, shutil.get_terminal_size().columns)
    shown = "\n".join(line for line in text.splitlines() if not line.startswith("<!--"))
    Console(width=width).print(Markdown(shown))
    console.print(f"saved {chosen.out / RESULTS} and {chosen.out / report.REPORT}", highlight=False)
    if failed:
        console.print(f"{failed} configurations failed; the same command tries them again", highlight=False)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
