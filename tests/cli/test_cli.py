from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field

import embtables
from embtables.cli import app as cli
from embtables.cli.app import COMMANDS, Command, run, sentence
from embtables.datasets import PreparedDataset


def error(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What a wrong call says: one line on stderr, nothing on stdout, code 2."""
    code = run(arguments)
    printed = capfd.readouterr()
    lines = printed.err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("Error: ") and printed.out == "", printed
    return lines[0]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "embtables", *arguments], capture_output=True, text=True)


@pytest.mark.core
def test_help_imports_no_part_and_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys; from embtables.cli.app import run; code = run(['--help']); "
        "print(code, sorted({'torch', 'pandas', 'matplotlib', 'pydantic', 'embtables.sweeps'} & set(sys.modules)))"
    )
    # `import embtables` itself loads torch: the command line adds nothing to it.
    program = "import types, sys; sys.modules['embtables'] = m = types.ModuleType('embtables'); " + (
        f"m.__path__ = [{str(Path(cli.__file__).parents[1])!r}]; " + program
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
    for command in COMMANDS:
        assert command.name in done.stdout


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_has_help_with_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capfd.readouterr().out
    assert "Usage: embtables " + command in text
    if command != "prepare":  # a group: the examples are its commands' own
        assert f"embtables {command} " in text.split("Example", 1)[1]


@pytest.mark.parametrize("command", [c.name for c in COMMANDS if not c.is_group])
def test_examples_can_be_pasted(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """They are shown in whole lines, brackets and all, and hold arguments that the command knows."""
    run([command, "--help"])
    examples = capfd.readouterr().out.split("Example", 1)[1].split("\n\n")[1].replace("\\\n", " ")
    own = typer.main.get_command(cli.build(command)).commands[command]  # type: ignore[attr-defined]
    for line in examples.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["embtables", command], line
        parser = own.make_parser(click.Context(own))
        found, rest, _ = parser.parse_args(words[2:])
        assert not rest and all(value != "" for value in found.values()), line
    if command == "sweep":
        assert "{model.name: mlp, data.leave_out: [history]}" in examples


def test_without_the_extra_of_the_command_one_sentence_says_which(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "embtables", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "Error: the embtables command needs typer, which the library alone does not install: "
        "pip install 'embtables[train]'\n"
    )


@pytest.mark.core
def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capfd.readouterr().out == f"embtables {embtables.__version__}\n"


@pytest.mark.core
def test_usage_errors(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["plan"], "Missing"),
        (["plan", "x", "--mehtod", "hash"], "--mehtod"),
        (["sweep", "x", "--methods", "hash", "--budgets", "1%", "--out", "y", "--seeds", "0"], "--seeds"),
        (["sweep", "x", "--epochs", "3"], "No such option: --epochs (--set training.epochs=… is the way)"),
        (["sweep", "x", "--seed", "3"], "No such option: --seed"),
        (["train", "x", "--weight-decay", "0"], "--weight-decay (--set dense.weight_decay=… is the way)"),
    ]:
        assert run(arguments) == 2
        assert message in " ".join(capfd.readouterr().err.split())


def test_a_missing_part_breaks_its_own_command_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = Command("train", "…", "embtables.no_such_part", "train")
    monkeypatch.setattr(cli, "COMMANDS", (*[c for c in COMMANDS if c.name != "train"], gone))
    assert run(["--help"]) == 0 and run(["plan", "--help"]) == 0
    capfd.readouterr()
    assert "embtables.no_such_part" in error(["train", "--help"], capfd)


def raising(problem: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command that raises `problem`."""

    def command() -> None:
        raise problem

    monkeypatch.setattr(Command, "load", lambda self: command)
    return run(["plan"])


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What is said is true of the command: ``plan`` keeps nothing."""
    assert raising(KeyboardInterrupt(), monkeypatch) == 130
    assert capfd.readouterr().err.strip() == "Error: Interrupted."
    kept = {command.name: command.interrupted for command in COMMANDS}
    assert kept["prepare"] == "Nothing was written." and "goes on from the last checkpoint" in kept["train"]
    assert [name for name, text in kept.items() if not text] == ["plan"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_alike(number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is an exit code of its own, after a cleanup that the same signal, sent twice, does not disturb."""
    cleared: list[str] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)
            cleared.append("away")

    monkeypatch.setattr(Command, "load", lambda self: work)
    found = signal.signal(number, signal.default_int_handler)  # it may be ignored, as in jobs in the background
    try:
        assert run(["report"]) == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, found)
    assert cleared == ["away"] and "Interrupted. The sweep is as it was" in capfd.readouterr().err


def test_a_file_that_ends_early_is_no_interrupt(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert raising(EOFError("no data left"), monkeypatch) == 2
    assert capfd.readouterr().err.strip() == "Error: a file ends too early: no data left"


@pytest.mark.core
def test_errors_become_sentences(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for problem, message in [
        (ValueError("table 'x':\n  too many ids"), "Error: table 'x': too many ids"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "Error: a/b: No such file or directory"),
        (OSError(28, "No space left on device", "out/x.csv"), "Error: out/x.csv: No space left on device"),
        (OSError(28, "No space left on device", "source", None, "target"), "Error: target: No space left on device"),
        (MemoryError("Unable to allocate 21.8 TiB"), "Error: not enough memory: Unable to allocate 21.8 TiB"),
        (OSError("libfbgemm.so cannot be opened"), "Error: libfbgemm.so cannot be opened"),
        (FloatingPointError("NaN in step 3"), "Error: NaN in step 3"),
    ]:
        assert raising(problem, monkeypatch) == 2
        assert capfd.readouterr().err.strip() == message
    with pytest.raises(KeyError):  # a bug is not hidden
        raising(KeyError("x"), monkeypatch)
    monkeypatch.setenv("EMBTABLES_TRACEBACK", "1")
    with pytest.raises(ValueError):
        raising(ValueError("x"), monkeypatch)


def test_pydantic_errors_name_the_field() -> None:
    class Inner(BaseModel):
        model_config = ConfigDict(extra="forbid")
        size: int = Field(ge=1)

    class Outer(BaseModel):
        inner: Inner

    for values, expected in [
        ({"inner": {"size": 0}}, "inner.size: Input should be greater than or equal to 1, got 0"),
        ({"inner": {"size": 1, "sise": 2}}, "unknown field 'inner.sise'"),
        ({"inner": {}}, "field 'inner.size' is missing"),
    ]:
        with pytest.raises(ValueError) as caught:
            Outer(**values)
        assert sentence(caught.value) == expected


@pytest.mark.core
def test_plan_prints_bytes_within_the_budget(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(data), "--method", "hash", "--budget", "10%"]
    assert run(arguments) == 0
    text = capfd.readouterr().out
    assert all(name in text for name in PreparedDataset(data).feature_names) and "budget" in text
    assert run([*arguments, "--json", "--embedding-dim", "8"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert {table["embedding_dim"] for table in plan["tables"]} == {8}
    assert plan["budget_bytes"] == sum(PreparedDataset(data).num_embeddings.values()) * 8 * 4 // 10
    assert run(["plan", str(data), "--method", "full"]) == 0
    assert "100.00%" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--method", "hsah", "--budget", "10%"], "unknown method 'hsah'"),
        (["--method", "{kind: hash, sides: 3}", "--budget", "10%"], "sides"),
        (["--method", "{kind: ", "--budget", "10%"], "method"),
        (["--method", "hash", "--budget", "0"], "budget 0"),
        (["--method", "hash", "--budget", "-1"], "budget -1"),
        (["--method", "hash", "--budget", "0.0"], "budget 0.0"),
        (["--method", "hash", "--budget", "101%"], "101%"),
        (["--method", "hash", "--budget", "ten"], "'ten'"),
        (["--method", "hash", "--budget", "10 parsecs"], "10 parsecs"),
        (["--method", "hash", "--budget", "127"], "the floor is 128 bytes"),
        (["--method", "hash"], "needs a budget"),
        (["--method", "hash", "--budget", "10%", "--optimizer", "adamw"], "optimizer"),
        (["--method", "hash", "--budget", "10%", "--training-budget", "100"], "training budget"),
    ],
)
def test_plan_refuses(arguments: list[str], culprit: str, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert culprit in error(["plan", str(data), *arguments], capfd)


def test_data_that_is_missing_or_damaged(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gone = str(tmp_path / "gone")
    assert gone in error(["plan", gone, "--method", "hash", "--budget", "10%"], capfd)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    assert "manifest.json" in error(["plan", str(broken), "--method", "hash", "--budget", "10%"], capfd)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"--methods": "hash,hsah"}, "unknown method 'hsah'"),
        ({"--methods": ","}, "method"),
        ({"--budgets": "10%,"}, "empty entry"),
        ({"--budgets": "10%,ten"}, "'ten'"),
        ({"--budgets": "0"}, "budget 0"),
        ({"--config": "gone.yaml"}, "gone.yaml"),
        ({"--set": "training.epoch=3"}, "training.epoch"),
        ({"--set": "epochs"}, "epochs"),
        ({"--tune": "tables.learning_rate"}, "--tune 'tables.learning_rate' is not of the form FIELD=VALUE,VALUE"),
        ({"--tune": "tables.learning_rate=0.1,fast"}, "--tune tables.learning_rate=fast: tables.learning_rate: "),
        ({"--tune": "tables.learning_rate=0"}, "--tune tables.learning_rate=0: tables.learning_rate: "),
        ({"--tune-at": "10%"}, "give the grid by --tune"),
        ({"--tune": "tables.l2=0", "--tune-at": "1%"}, "--tune-at 1% is not among --budgets (10%)"),
        ({"--best": "2", "--seeds": "1"}, "--best 2"),
    ],
)
def test_sweep_refuses_before_it_writes(
    changes: dict[str, str],
    culprit: str,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = {"--methods": "hash", "--budgets": "10%", "--out": str(tmp_path / "out"), **changes}
    arguments = ["sweep", str(data), *[text for pair in options.items() for text in pair]]
    assert culprit in error(arguments, capfd)
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_whole_configuration_is_a_sentence(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, common = str(tmp_path / "out"), ["--preset", "bars"]
    file = tmp_path / "run.yaml"
    file.write_text("training: {average: 0.4}\ntables: {fused: false}\n")
    message = "training.average needs tables.fused=true: a fused optimizer keeps the mean of its rows"
    for arguments, where in (
        (["train", *common, "--set", "training.average=0.4"], ""),
        (["train", "--config", str(file)], f"{file}: "),
        (["sweep", *common, "--set", "training.average=0.4"], ""),
        (["sweep", *common, "--variant", "mean: {training.average: 0.4}"], ""),
        (["sweep", *common, "--tune", "training.average=0.4"], "--tune training.average=0.4: "),
    ):
        assert error([*arguments, str(data), "--out", out], capfd) == f"Error: {where}{message}"
    assert not Path(out).exists()


def test_sweep_refuses_a_directory_of_something_else(
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "notes.txt").touch()
    arguments = ["sweep", str(data), "--methods", "hash", "--budgets", "10%", "--out", str(tmp_path)]
    assert "is not a sweep (it holds notes.txt)" in error(arguments, capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_report_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "it has no sweep.yaml" in error(["report", str(tmp_path)], capfd)
    assert not list(tmp_path.iterdir())


def test_the_process_ends_with_the_code(data: Path, tmp_path: Path) -> None:
    done = call("plan", str(data), "--method", "hash", "--budget", "ten")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert "\x1b" not in done.stderr  # no color into files
    done = call("plan", str(data), "--method", "hash", "--budget", "10%")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("(with adam state)")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_reader_that_goes_is_no_error(data: Path) -> None:
    command = f"{sys.executable} -m embtables plan {data} --method hash --budget 10% --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "{" and done.stderr == ""
