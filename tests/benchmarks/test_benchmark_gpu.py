"""benchmarks/gpu*.py: trials of them on the CPU, and what they say where there is no GPU."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_check, gpu_lookups
from benchmarks.gpu_check import Part
from embtables.methods import kinds
from embtables.sizes.layout import FULL


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_trial_saves_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--divisor", "1000", "--dims", "4,8", "--batches", "4", "--bags", "3", "--rounds", "2", "--calls", "2"]
    gpu.main([*small, "--device", "cpu", "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and "no GPU: a trial on the CPU" in text
    about = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert all(f"- {name}: {value}" in text for name, value in about.items()) and about["torch"] in torch.__version__
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = {(r["contestant"], r["optimizer"]) for r in rows if r["phase"] == "step"}
    assert steps == {(gpu.OURS, rule) for rule in gpu.RULES} | {
        (n, o) for n in (gpu.LOOP, gpu.FLAT) for o in gpu.SPARSE
    }
    for phase, optimizers in (("step", gpu.BAG_RULES), ("forward", [""])):
        found = [(r["contestant"], r["optimizer"], r["dim"]) for r in rows if r["phase"] == f"{phase}, bags of 3"]
        assert sorted(found) == sorted((n, o, d) for n in (gpu.OURS, gpu.BAG) for o in optimizers for d in "48")
    assert {(r["dim"], r["calls"]) for r in rows} == {("4", "4"), ("8", "4")}
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"])
        own = [
            r
            for r in rows
            if all(r[k] == row[k] for k in ("dim", "phase", "optimizer")) and r["contestant"] == gpu.OURS
        ]
        if own:
            assert float(row["times_ours"]) == float(row["median_ms"]) / float(own[0]["median_ms"])


def test_what_a_step_has_to_move() -> None:
    data = gpu.Batches(gpu.Workload([3, 5], 4, 6, batches=1), torch.device("cpu"))
    distinct = len({(f, int(i)) for row in data.ids[0] for f, i in enumerate(row)})
    assert data.forward_bytes() == 12 * (8 + 16 + 16)
    assert data.update_bytes("adam") == 12 * (8 + 16) + distinct * 2 * (16 + 2 * 16)
    assert data.update_bytes("rowwise_adagrad") == 12 * (8 + 16) + distinct * 2 * (16 + 4)


def test_what_a_step_over_bags_has_to_move() -> None:
    data = gpu.Bags(100, 4, 6, 5, torch.device("cpu"))
    assert [ids.shape for ids in data.ids] == [(30,)] * gpu.BATCHES and data.offsets.tolist() == list(range(0, 31, 5))
    forward, distinct = 6 * 8 + 30 * (8 + 16) + 6 * 16, sum(len(set(ids.tolist())) for ids in data.ids) / gpu.BATCHES
    assert data.forward_bytes() == forward
    assert data.step_bytes("adagrad") == forward + 30 * 8 + 6 * 16 + distinct * 2 * (16 + 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no CUDA device here, so nothing was measured"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_lookups_of_every_method_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal where they are; and one that is not, or cannot be looked up, is named, and the others are compared."""
    gpu_lookups.main(["--device", "cpu", "--out", str(tmp_path)])
    with open(tmp_path / "lookups.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == set(kinds()) and len(rows) == 4 * len(kinds())
    assert {row["equal"] for row in rows} == {"True"}
    for method in kinds():
        for solved in gpu_lookups.plans(method):
            variants = {entry.variant for group in solved.groups for entry in group.layout.entries.values()}
            assert (variants == {FULL}) == (method == "full"), method

    def cases(method: str) -> Any:
        def run(device: str) -> list[Tensor]:
            if method == "robe" and device == "cpu:0":
                raise RuntimeError("no such rows")
            return [torch.ones(3), torch.full((2,), 1.0 + (method == "hash" and device == "cpu:0") / 100)]

        yield "steps", run

    monkeypatch.setattr(gpu_lookups, "cases", cases)
    with pytest.raises(SystemExit, match="^2 of .* differ from the reference on the CPU: hash, steps; robe, steps$"):
        gpu_lookups.main(["--device", "cpu:0", "--out", str(tmp_path)])
    with open(tmp_path / "lookups.csv", encoding="utf-8", newline="") as file:
        found = {row["method"]: row for row in csv.DictReader(file)}
    assert float(found["hash"]["largest_difference"]) == pytest.approx(0.01) and found["hash"]["error"] == ""
    assert found["robe"]["error"] == "RuntimeError: no such rows" and found["full"]["equal"] == "True"


def test_a_part_that_fails_leaves_the_others_their_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each in its process; one that takes too long is stopped, and what a check before has left is gone."""
    (tmp_path / "lookups.csv").write_text("of another check")
    header, speed = "phase,dim,batch,optimizer,contestant,median_ms", tmp_path / "speed"
    rows = [f"{phase},16,64,sgd,{n},{ms}" for phase in ("step, bags of 10", "step") for n, ms in (("A", 1), ("B", 4))]
    lines = [header, *(f'"{row[:16]}"{row[16:]}' if "bags" in row else row for row in rows)]
    lines = [line.replace("A,", f'"{gpu.OURS}",').replace("B,", f"{gpu.BAG},") for line in lines]
    speed.mkdir()
    write = f"open({str(speed / 'results.csv')!r}, 'w').write({chr(10).join(lines)!r}); print('saved')"
    planned = [
        Part("first", "nothing", [sys.executable, "-c", "print('well'); raise SystemExit('it | broke')"]),
        Part("second", "nothing", [sys.executable, "-c", write]),
        Part("third", "nothing", [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]),
    ]
    start = time.monotonic()
    outcomes = gpu_check.check(planned, tmp_path, {"device": "none"}, minutes=0.1)
    assert time.monotonic() - start < 60
    assert [(o.name, o.passed) for o in outcomes] == [("first", False), ("second", True), ("third", False)]
    assert [o.said for o in outcomes[:2]] == ["it | broke", "saved"] and outcomes[2].said.startswith("stopped after ")
    shown = capfd.readouterr().err
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    for text in ("well\n", "it | broke\n", "begun\n"):
        assert text in shown and text in log
    assert "2 of 3: second, nothing" in shown and not (tmp_path / "lookups.csv").exists()
    known = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert known["environment"] == {"device": "none"} and [p["passed"] for p in known["parts"]] == [False, True, False]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- device: none" in text and "| first | failed | 0 | it / broke |" in text
    assert "| step, bags of 10 | 16 | 64 | sgd | 1.000 | 4.000 | 0.25 |" in text and text.count("| sgd |") == 1


def test_the_parts_of_a_check_can_be_started() -> None:
    """Their arguments are taken: each gets as far as it can without a GPU, which is to collect, or to say so."""
    tests, *others = gpu_check.parts(Path("out"))
    collected = subprocess.run([*tests.command, "--collect-only"], cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert collected.returncode == 0 and "test_a_step_equals_float64" in collected.stdout
    assert "test_in_the_interpreter" not in collected.stdout
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for part in others:
        result = subprocess.run(part.command, cwd=gpu_check.ROOT, env=hidden, capture_output=True, text=True)
        assert result.returncode == 1 and result.stderr.strip().endswith(gpu.NO_DEVICE)


def test_a_check_says_beforehand_what_it_costs_and_ends_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"^{gpu.NO_DEVICE}$"):
        gpu_check.main(["--out", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.gpu, "registered", set())
    with pytest.raises(SystemExit, match="^the kernels are not in force here, so nothing was checked: install Triton"):
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(gpu_check.gpu, "registered", {"cuda"})
    monkeypatch.setattr(gpu_check, "describe", lambda device: {"device": "a GPU"})
    said = "print('3 failed, 2 passed'); raise SystemExit(1)"
    planned = [Part("tests", "a minute", [sys.executable, "-c", said])]
    monkeypatch.setattr(gpu_check, "parts", lambda out: planned)
    with pytest.raises(SystemExit, match=r"^the GPU check failed in tests \(3 failed, 2 passed\); what there is"):
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert "On a GPU: tests, one after another. About five minutes, and" in capsys.readouterr().out
    planned[0] = Part("tests", "a minute", [sys.executable, "-c", "print('5 passed')"])
    gpu_check.main(["--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith(f"the GPU check passed; {tmp_path / 'out' / 'report.md'} sums it up\n")


def test_a_check_takes_no_package_that_trains() -> None:
    """Of what the tests and the benchmarks import; the device's machine may have neither polars nor pandas."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polars", "pandas", "pyarrow", "torchrec", "fbgemm_gpu", "matplotlib", "typer"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import benchmarks.gpu_check, benchmarks.gpu_lookups, pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/ops/test_ops_gpu.py", "-k", "in_force"]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]
