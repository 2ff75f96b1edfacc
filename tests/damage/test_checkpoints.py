"""A checkpoint in which single values were changed: it is refused before anything trusts a size that it claims."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embtables.cli.app import run as main

Content = dict[str, Any]


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    quick = [
        "--model",
        "mlp",
        "--method",
        "hash",
        "--budget",
        "20%",
        "--epochs",
        "2",
        "--embedding-dim",
        "4",
        "--quiet",
    ]
    return ["train", str(data), "--out", str(out), *quick, *more]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    assert main(arguments(data, folder)) == 0
    return folder


def under_way(content: Content, checkpoint: Path) -> None:
    """As the checkpoint was after the first of the two epochs, but for the weights."""
    progress = content["state"]["progress"]
    first = progress["curve"][0]
    shutil.copytree(checkpoint / f"best-{progress['best_step']}", checkpoint / "first", dirs_exist_ok=True)
    progress |= {"epoch": 1, "batch": 0, "step": first["step"], "curve": [first], "finished": False, "stale": 0}
    progress |= {"best_step": first["step"], "best": first["valid_auc"]}
    if not (checkpoint / f"best-{first['step']}").exists():
        (checkpoint / "first").rename(checkpoint / f"best-{first['step']}")
    shutil.rmtree(checkpoint / "first", ignore_errors=True)


def change_of(*path: Any) -> Callable[[Any], Callable[[Content], None]]:
    """What puts a value into a place of the checkpoint's state."""

    def with_value(value: Any) -> Callable[[Content], None]:
        def change(content: Content) -> None:
            inner: Any = content["state"]
            for part in path[:-1]:
                inner = inner[part]
            inner[path[-1]] = value

        return change

    return with_value


def without(*path: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        inner: Any = content["state"]
        for part in path[:-1]:
            inner = inner[part]
        del inner[path[-1]]

    return change


DENSE = ("optimization", "dense", "state", 0)
GROUP = ("optimization", "dense", "param_groups", 0)
CHANGES: dict[str, Callable[[Content], None]] = {
    "a smaller state, behind whose end kernels would write": change_of(*DENSE, "exp_avg")(torch.zeros(3)),
    "a state of 2 GiB in eight bytes": change_of(*DENSE, "exp_avg_sq")(torch.zeros(1).expand(2**29)),
    "a state of float64": change_of(*DENSE, "exp_avg")(torch.zeros(64, 12, dtype=torch.float64)),
    "a word as state": change_of(*DENSE, "exp_avg")("x"),
    "a state that is missing": without(*DENSE, "exp_avg"),
    "a number of steps that is no tensor": change_of(*DENSE, "step")(3),
    "a parameter that there is not": change_of("optimization", "dense", "state", 99)({}),
    "another weight decay": change_of(*GROUP, "weight_decay")(5.0),
    "betas cut short": change_of(*GROUP, "betas")((0.9,)),
    "no betas": without(*GROUP, "betas"),
    "learning rates without end": change_of("optimization", "learning_rates")([math.nan, math.inf]),
    "learning rates in words": change_of("optimization", "learning_rates")(["a", "b"]),
    "the state of another rule": change_of("model", "embeddings.optimizer_state.rule")(
        torch.tensor(list(b"sgd"), dtype=torch.uint8)
    ),
    "a learning rate of the tables below 0": change_of("model", "embeddings.optimizer_state.learning_rate")(
        torch.tensor(-7.0, dtype=torch.float64)
    ),
    "a generator beyond its words": lambda content: content["state"]["random"]["numpy"].__setitem__(2, 10**8),
    "a best value that no evaluation had": change_of("progress", "best")(math.nan),
    "patience that is used up": change_of("progress", "stale")(10**9),
    "a loss without end": change_of("progress", "loss_sum")(math.nan),
    "examples in no time": change_of("progress", "train_seconds")(0.0),
    "a curve of NaN": lambda content: [
        row.update({name: math.nan for name in row if name != "step"}) for row in content["state"]["progress"]["curve"]
    ][0],
    "all epochs, and no end": lambda content: content["state"]["progress"].update(epoch=2, step=2 * content["steps"]),
}


def files(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_values_are_refused(
    name: str, trained: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "metrics.json").unlink()
    path = out / "checkpoint" / "last.pt"
    content = torch.load(path, weights_only=True)
    under_way(content, out / "checkpoint")
    content["steps"] = content["state"]["progress"]["step"]
    CHANGES[name](content)
    del content["steps"]
    torch.save(content, path)
    before = files(out)
    assert main(arguments(data, out)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"{path} is damaged (" in error and "delete it to start again" in error
    assert {name: data for name, data in files(out).items() if name != "environment.json"} == {
        name: data for name, data in before.items() if name != "environment.json"
    }


def test_what_is_not_changed_goes_on(trained: Path, data: Path, tmp_path: Path) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "metrics.json").unlink()
    content = torch.load(out / "checkpoint" / "last.pt", weights_only=True)
    under_way(content, out / "checkpoint")
    torch.save(content, out / "checkpoint" / "last.pt")
    assert main(arguments(data, out)) == 0 and (out / "metrics.json").exists()


def test_values_that_cannot_be_compared(
    trained: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "metrics.json").unlink()
    path = out / "checkpoint" / "last.pt"
    content = torch.load(path, weights_only=True)
    content["identity"]["training.seed"] = torch.zeros(3)
    torch.save(content, path)
    assert main(arguments(data, out)) == 2
    assert "belongs to another run: training.seed was tensor" in capfd.readouterr().err


def test_a_best_model_that_is_gone_or_elsewhere(
    trained: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "metrics.json").unlink()
    (best,) = (out / "checkpoint").glob("best-*")
    secret = tmp_path / "secret.txt"
    secret.write_text("of somebody else")
    (best / "tables.safetensors").unlink()
    (best / "tables.safetensors").symlink_to(secret)
    shutil.rmtree(out / "served")
    assert main(arguments(data, out)) == 2
    assert "is a link out of its folder" in capfd.readouterr().err and not (out / "served").exists()
    shutil.rmtree(best)
    assert main(arguments(data, out)) == 2
    error = capfd.readouterr().err
    assert f"{best} is missing" in error and "to start again" in error
    last = out / "checkpoint" / "last.pt"
    last.rename(tmp_path / "last.pt")
    last.symlink_to(tmp_path / "last.pt")
    assert main(arguments(data, out)) == 2
    assert "last.pt is a link out of its folder" in capfd.readouterr().err


def test_of_patterns_the_order_is_a_part_of_the_run(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(data, out, "--set", "dense.weight_decay={hidden.*: 0.0001, '*.weight': 0.1}")) == 0
    (out / "metrics.json").unlink()
    before = files(out)
    assert main(arguments(data, out, "--set", "dense.weight_decay={'*.weight': 0.1, hidden.*: 0.0001}")) == 2
    assert "belongs to another run: dense.weight_decay was {'hidden.*'" in capfd.readouterr().err
    assert files(out) == before
    assert main(arguments(data, out, "--set", "dense.weight_decay={hidden.*: 0.0001, '*.weight': 0.1}")) == 0
