"""Values at the edge of what can be written, and beyond: one sentence, or what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embtables.cli.app import run as main
from embtables.sweeps.cells import parse_budgets
from embtables.training import RunConfig, load_config

VALUES = [
    "0",
    "-1",
    "1000000",
    str(2**31),
    str(2**63),
    str(10**400),
    "1e308",
    "1e999",
    ".nan",
    "null",
    "''",
    "[]",
    "{}",
]
FIELDS = [f"{section}.{name}" for section, fields in RunConfig().model_dump().items() for name in fields]


def test_every_field_takes_or_refuses_every_value() -> None:
    refused = 0
    for field in FIELDS:
        for value in VALUES:
            try:
                load_config(overrides=[f"{field}={value}"])
            except ValueError as error:
                assert field.split(".")[0] in str(error) and "\n" not in str(error), (field, value, str(error))
                refused += 1
    assert refused > 3 * len(FIELDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.threads=1000000"], "training.threads: give a number from 1 to "),
        (["--model", "..:x"], "model '..:x' is unknown"),
        (["--method", "null"], "--method null: a value is needed"),
        (["--budget", "~"], "--budget ~: a value is needed"),
        (["--method", "hash", "--budget", str(10**400)], None),
        (["--method", "hash", "--budget", "1e-300%"], "1e-300%"),
        (["--set", f"training.batch_size={2**62}"], None),
        (["--set", f"training.evaluation_batch_size={2**62}"], None),
        (["--set", f"training.log_every={10**30}"], None),
        (["--set", "training.checkpoint_seconds=.inf"], None),
        (["--set", "training.evaluations_per_epoch=1e308"], None),
        (["--set", "tables.embedding_dim=65537"], "embedding_dim"),
        (["--set", "tables.learning_rate=1e300"], "step"),
        (["--seed", str(2**63 - 1)], None),
        (["--set", "model.hyperparameters.units=[0]"], "units"),
        (["--set", f"model.hyperparameters.units=[{2**62}]"], ""),
    ],
)
def test_extremes_of_a_run(
    arguments: list[str], message: str | None, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quick = ["--model", "mlp", "--epochs", "1", "--set", "tables.embedding_dim=4", "--quiet"]
    code = main(["train", str(data), "--out", str(tmp_path / "run"), *quick, *arguments])
    lines = capfd.readouterr().err.strip().splitlines()
    if message is None:
        assert code == 0, lines
    else:
        assert code == 2 and len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10%,10.0%,0.1,.1", ["10%"]),
        ("64MB,64000000,64_000_000,64MiB", ["64MB", "64MiB"]),
        ("10%,1%,100%,1.0", ["10%", "1%", "100%"]),
        ("x,x,y", ["x", "y"]),
    ],
)
def test_budgets_that_mean_the_same_are_one(text: str, found: list[str]) -> None:
    assert parse_budgets(text) == found


@pytest.mark.parametrize(
    "arguments", [["interactions", "LOG", "OUT", "--separator", ""], ["reczoo", "LOG", "OUT", "--separator", ""]]
)
def test_a_separator_that_separates_nothing(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log: Any = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\n1,2,3\n")
    places = {"LOG": str(log), "OUT": str(tmp_path / "out")}
    assert main(["prepare", *(places.get(word, word) for word in arguments)]) == 2
    assert "separator" in capfd.readouterr().err and not (tmp_path / "out").exists()
