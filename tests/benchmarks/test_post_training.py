"""Tables that are compressed after training: what the script leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import post_training
from embtables.datasets import PreparedDataset
from embtables.training import Trainer, load_config


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["post_training", *map(str, arguments)])
    post_training.main()


def test_a_run_that_is_not_there_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, tmp_path / "gone", data, tmp_path / "out")
    assert ended.value.code == 2 and f"{tmp_path / 'gone'} is no finished run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_are_kept_and_not_run_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(overrides=["epochs=1", "batch_size=800"])
    Trainer(config, PreparedDataset(data), tmp_path / "run").run()
    options = ["--methods", "{kind: full, precision: int8},hash", "--budgets", "50%,1"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for _ in range(2):
        call(monkeypatch, tmp_path / "run", data, tmp_path / "out", *options)
    rows = pd.read_csv(tmp_path / "out" / "results.csv", keep_default_na=False)
    assert list(zip(rows["method"], rows["budget"], rows["status"])) == [
        ("full(precision=int8)", "", "ok"),
        ("hash", "50%", "ok"),
        ("hash", "1", "infeasible"),
    ]
    about = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert about["threads"] == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["environment.json", "results.csv"]
