"""All checks that need a GPU: the kernels' tests, every method's lookups against the CPU, and the speed.

    python -m benchmarks.gpu_check                 # about five minutes, never more than eight

Saves in --out what the parts print (log.txt), what they found (lookups.csv, speed/), check.json, and report.md, which
sums it up. Ends with 1, and one sentence, where there is no GPU or a part fails; the others run all the same. Needs
what embtables requires, torch's build for CUDA with Triton, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import BAG, NO_DEVICE, OURS, describe
from embtables._util.files import replacing
from embtables.ops import gpu

ROOT = Path(__file__).parents[1]
NO_KERNELS = (
    "the kernels are not in force here, so nothing was checked: install Triton, and leave EMBTABLES_OPS=reference away"
)
MINUTES = 8.0
# Small enough for the minutes that are left, large enough to be compared with docs/gpu.md.
SPEED = ("--rounds", "5", "--dims", "16,64", "--batches", "2048,65536")
RESULTS, SPEED_RESULTS = ("log.txt", "check.json", "report.md", "lookups.csv"), "speed/results.csv"


class Part(NamedTuple):
    """A check in a process of its own, whose last line says what came out, and which fails by its exit status."""

    name: str
    cost: str
    command: Sequence[str]


class Outcome(NamedTuple):
    name: str
    passed: bool
    seconds: float
    said: str


def parts(out: Path) -> list[Part]:
    python = sys.executable
    # Without a GPU's share of them: the interpreter and the compiler, which need none.
    tests = [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests/ops/test_ops_gpu.py"]
    return [
        Part("tests", "about two minutes, most of them for compiling kernels; 5 GB of the GPU's memory", tests),
        Part("lookups", "less than a minute", [python, "-m", "benchmarks.gpu_lookups", "--out", str(out)]),
        Part(
            "speed",
            "about two minutes; up to 30 GB of the GPU's memory, where what does not fit is left out",
            [python, "-m", "benchmarks.gpu", *SPEED, "--out", str(out / "speed")],
        ),
    ]


def run(part: Part, log: Path, seconds: float) -> Outcome:
    """Shows what the part prints and appends it to the log; a part that takes longer than ``seconds`` is stopped."""
    start, late = time.monotonic(), threading.Event()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    said = ""
    with open(log, "ab") as file:
        file.write(f"\n==== {part.name}: {' '.join(part.command)}\n".encode())
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(0.0, seconds), stop)
        timer.start()
        try:
            while chunk := os.read(process.stdout.fileno(), 2**16):
                file.write(chunk)
                text = chunk.decode(errors="replace")
                sys.stderr.write(text)
                sys.stderr.flush()
                said = (said + text)[-(2**14) :]
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    took = time.monotonic() - start
    if late.is_set():
        return Outcome(part.name, False, took, f"stopped after {took:.0f} s, when the time was up")
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    return Outcome(part.name, status == 0, took, lines[-1] if lines else f"ended with {status}")


def check(planned: Sequence[Part], out: Path, about: Mapping[str, Any], minutes: float) -> list[Outcome]:
    """Runs the parts one after another, and saves what is known after each."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*RESULTS, SPEED_RESULTS):  # none of an earlier check may be taken for this one's
        (out / name).unlink(missing_ok=True)
    log, outcomes = out / "log.txt", []
    end = time.monotonic() + 60 * minutes
    for number, part in enumerate(planned, 1):
        print(f"{number} of {len(planned)}: {part.name}, {part.cost}", file=sys.stderr, flush=True)
        outcomes.append(run(part, log, end - time.monotonic()))
        save(out, about, outcomes)
    return outcomes


def save(out: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    known = {"environment": about, "parts": [outcome._asdict() for outcome in outcomes]}
    with replacing(out / "check.json") as path:
        Path(path).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    with replacing(out / "report.md") as path:
        Path(path).write_text(report(about, outcomes, _rows(out / SPEED_RESULTS)), encoding="utf-8")


def report(about: Mapping[str, Any], outcomes: Sequence[Outcome], speed: Sequence[Mapping[str, str]]) -> str:
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["| part | | seconds | what it said last |", "| --- | --- | ---: | --- |"]
    lines += [
        f"| {o.name} | {'passed' if o.passed else 'failed'} | {o.seconds:.0f} | {o.said.replace('|', '/')} |"
        for o in outcomes
    ]
    ours, theirs = (
        {(r["phase"], r["dim"], r["batch"], r["optimizer"]): float(r["median_ms"]) for r in speed if _is_bags(r, name)}
        for name in (OURS, BAG)
    )
    if ours:
        lines += ["", "Pooled bags of one table, median milliseconds of a call; more in speed/report.md:", ""]
        lines += [f"| phase | D | batch | optimizer | {OURS} | {BAG} | ratio |"]
        lines += ["| --- | ---: | ---: | --- | ---: | ---: | ---: |"]
    for key, mine in ours.items():
        other = theirs.get(key)
        cells = ["", ""] if other is None else [f"{other:.3f}", f"{mine / other:.2f}"]
        lines.append(f"| {' | '.join([*key, f'{mine:.3f}', *cells])} |")
    return "\n".join(lines) + "\n"


def _is_bags(row: Mapping[str, str], contestant: str) -> bool:
    return row["contestant"] == contestant and "bags of" in row["phase"]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the results")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    if "cuda" not in gpu.registered:
        raise SystemExit(NO_KERNELS)
    about, out = describe(torch.device("cuda")), chosen.out.resolve()
    planned = parts(out)
    print(
        f"On {about['device']}: {', '.join(part.name for part in planned)}, one after another. About five minutes, and"
    )
    print(f"stopped after {MINUTES:.0f}; the GPU should be idle. Results go to {chosen.out}.", flush=True)
    outcomes = check(planned, out, about, MINUTES)
    failed = [f"{outcome.name} ({outcome.said})" for outcome in outcomes if not outcome.passed]
    if failed:
        raise SystemExit(f"the GPU check failed in {', '.join(failed)}; what there is stands in {chosen.out}")
    print(f"the GPU check passed; {chosen.out / 'report.md'} sums it up")


if __name__ == "__main__":
    main()
