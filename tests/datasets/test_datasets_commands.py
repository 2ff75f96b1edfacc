"""`embtables prepare` on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from embtables.cli.prepare import app
from embtables.datasets import PreparedDataset

ROOT = Path(__file__).resolve().parents[2]
KINDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def prepare(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_every_kind(tmp_path: Path) -> None:
    prepare("synthetic", "-", tmp_path / "s", "--rows", "500", "--cardinalities", "50,5", "--unseen", "0.1")
    assert PreparedDataset(tmp_path / "s").manifest["config"]["cardinalities"] == [50, 5]

    row = "\t".join(["1", *["3"] * 13, *["68fd1e64"] * 26]) + "\n"
    (tmp_path / "train.txt").write_text(row * 60)
    prepare("criteo", tmp_path / "train.txt", tmp_path / "c", "--split", "random", "--min-count", "2", "--seed", "1")
    assert PreparedDataset(tmp_path / "c").num_embeddings["C26"] == 3

    lines = [f"{user},{item},{user + item},{item % 2}\n" for user in range(20) for item in range(20, 30)]
    (tmp_path / "log.csv").write_text("uid,sku,ts,bought\n" + "".join(lines))
    arguments = ["--user", "uid", "--item", "sku", "--time", "ts", "--label", "bought", "--split", "leave-last-out"]
    prepare("interactions", tmp_path / "log.csv", tmp_path / "i", *arguments)
    assert PreparedDataset(tmp_path / "i").num_rows("test") == 20

    ratings = [f"{user}\t{item}\t{item % 5 + 1}\t{item}\n" for user in range(20) for item in range(10)]
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "u.data").write_text("".join(ratings))
    prepare("movielens", tmp_path / "ml", tmp_path / "m", "--split", "time", "--history", "3")
    assert PreparedDataset(tmp_path / "m").feature_names == ["user_id", "item_id"]


@pytest.mark.parametrize("kind", KINDS)
def test_help_has_an_example(kind: str) -> None:
    result = CliRunner().invoke(app, [kind, "--help"])
    assert result.exit_code == 0 and f"embtables prepare {kind}" in result.output


def test_every_kind_is_on_the_page_of_data_sets() -> None:
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"| `{kind}` |" not in page] == []


def test_an_error_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "embtables",
        "prepare",
        "criteo",
        str(tmp_path / "none.txt"),
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"COLUMNS": "300"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "none.txt: no such file" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    for arguments, sentence in (
        (["synthetic", "-", str(tmp_path / "out"), "--cardinalities", "5,x"], "--cardinalities '5,x': numbers"),
        (["synthetic", "-", str(tmp_path / "out"), "--cardinalities", "5,inf"], "--cardinalities '5,inf': numbers"),
        (["synthetic", "here", str(tmp_path / "out")], "INPUT 'here'"),
        (["interactions", "x.csv", str(tmp_path / "out"), "--negative-window", "soon"], "duration 'soon'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
