"""benchmarks/gpu.py: a trial of it on the CPU, and what it says where there is no GPU."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_trial_saves_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--divisor", "1000", "--dims", "4,8", "--batches", "4", "--rounds", "2", "--calls", "2"]
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no CUDA device here, so nothing was measured"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
