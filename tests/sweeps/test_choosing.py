"""What validation decides in a sweep: tuned values of each method, and who is trained with every seed."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from sweep_cases import fake_cell, read, run, started

import embtables.sweeps.sweep as sweep_module
from embtables._util.files import sealed, unsealed
from embtables.cli.app import run as main
from embtables.datasets import PreparedDataset
from embtables.sweeps.cells import (
    Cell,
    Place,
    assignments,
    grid,
    in_precisions,
    is_baseline,
    parse_methods,
    parse_tune,
    same_budget,
)
from embtables.sweeps.choosing import chosen, finalists, num_finalists, tuned_at, tuning_cells
from embtables.sweeps.config import SweepConfig, describe, read_config
from embtables.sweeps.report import head, learning_rates, line, markdown, remarks, tuned
from embtables.sweeps.summary import Summary, summarize
from embtables.training.config import load_config, parse_value

PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
GRID = {"tables.regularization": [0.1, 0.3]}


def described(data: Path, methods: str, budgets: str, seeds: int, **options: Any) -> SweepConfig:
    listed = budgets.split(",") if budgets else []
    return describe(data, parse_methods(methods), listed, seeds, load_config(), **options)


def row_of(summary: Summary, method: str, budget: str) -> dict[str, str]:
    point = summary.point(method, budget)
    assert point is not None
    cells = line(point, summary)
    return {"seeds": cells[-2], "note": cells[-1]}


def text_of(out: Path) -> str:
    return markdown(summarize(out, resamples=20), 20, [])


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_grids_of_the_command_line() -> None:
    units = "model.hyperparameters.units=[64, 32],[128]"
    assert parse_tune(["tables.l2=0.10,1", units]) == {
        "tables.l2": [0.1, 1],
        "model.hyperparameters.units": [[64, 32], [128]],
    }
    for text in ("tables.l2", "=0.1", "tables.l2=", "tables.l2=[0.1", "tables.l2=0.1,,0.3"):
        with pytest.raises(ValueError, match="is not of the form FIELD=VALUE,VALUE"):
            parse_tune([text])
    with pytest.raises(ValueError, match="--tune tables.l2 is given twice"):
        parse_tune(["tables.l2=0.1", "tables.l2=0.3"])


def test_a_grid_is_the_product_and_its_texts_mean_its_values() -> None:
    tune = {"tables.l2": [1e-5, 2.0], "model.hyperparameters.units": [[64, 32], [8]], "dense.optimizer": ["sgd", None]}
    texts = grid(tune)
    assert len(texts) == len(set(texts)) == 8 and grid({}) == []
    read_back = []
    for text in texts:
        pairs = [part.partition("=") for part in assignments(text)]
        assert [field for field, _, _ in pairs] == list(tune)
        read_back.append([parse_value(value, field) for field, _, value in pairs])
    assert read_back == [[a, b, c] for a in tune["tables.l2"] for b in [[64, 32], [8]] for c in ("sgd", None)]


def test_values_are_those_that_the_configuration_holds(data: Path) -> None:
    config = described(data, "hash", "10%", 1, tune={"tables.l2": [0.1, "1e-1", 1], "training.epochs": [3, 3]})
    assert config.tune == {"tables.l2": [0.1, 1.0], "training.epochs": [3]}
    assert grid(config.tune) == ["tables.l2=0.1 training.epochs=3", "tables.l2=1.0 training.epochs=3"]
    # What is wrong with the one alone is right with the other, and what is wrong for all may be right for each variant.
    described(data, "hash", "10%", 1, tune={"training.epochs": [30], "training.quantize_from": [20]})
    longer = {"longer": load_config(fields={"training.epochs": 30})}
    described(data, "hash", "10%", 1, variants=longer, tune={"training.quantize_from": [20]})
    # Without a value each optimizer has its own.
    both = {kind: load_config(fields={"tables.optimizer": kind}) for kind in ("adam", "sgd")}
    with pytest.raises(ValueError, match="--tune tables.learning_rate=null: it stands for another value in each"):
        described(data, "hash", "10%", 1, variants=both, tune={"tables.learning_rate": [0.1, None]})
    assert described(data, "hash", "10%", 1, tune={"tables.learning_rate": [None]}).tune == {
        "tables.learning_rate": [load_config().tables.learning_rate]
    }


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"tables.regularisation": [1]}, "--tune tables.regularisation=1: .*did you mean tables.regularization"),
        ({"regularization": [1]}, "--tune regularization=1: .*did you mean tables.regularization"),
        ({"tables.regularization": [0.1, -1]}, "--tune tables.regularization=-1: .*greater than or equal to 0, not -1"),
        ({"tables.l2.x": [1]}, "--tune tables.l2.x=1: tables.l2 holds a single value"),
        ({"model.hyperparameters.unit": [1]}, "--tune model.hyperparameters.unit=1: model 'dlrm' has no .*'unit'"),
        (
            {"training.epochs": [2], "training.quantize_from": [5]},
            "--tune training.epochs=2 training.quantize_from=5: ",
        ),
        ({"tables.l2": []}, "--tune has 0 combinations"),
        ({"tables.l2": [0.1] * 40, "tables.regularization": [0.1] * 40}, "--tune has 1,600 combinations"),
        ({"tables.method": ["hash"]}, "--tune tables.method: every cell .* from --methods"),
        ({"tables.budget": ["1%"]}, "--tune tables.budget: every cell .* from --budgets"),
        ({"training.seed": [1]}, "--tune training.seed: every cell .* from --seeds"),
        ({"tables.hash_seed": [1]}, "--tune tables.hash_seed: every cell .* from --seeds"),
        *[
            ({f"tables.{name}": [1]}, f"--tune tables.{name}: it changes the tables themselves.* use --variant")
            for name in (
                *("embedding_dim", "precision", "training_precision", "training_budget", "optimizer"),
                *("optimizer.kind", "fused", "sparse_gradients"),
            )
        ],
        ({"data.max_history": [1]}, "--tune data.max_history: .*use --variant"),
        ({"model.name": ["mlp"]}, "--tune model.name: .*use --variant"),
        ({"training.monitor": ["logloss"]}, "--tune training.monitor: .*use --variant"),
        ({"tables": [{}]}, "--tune tables: it is a section"),
        (
            {"model.hyperparameters": [{}], "model.hyperparameters.units": [[8]]},
            "--tune model.hyperparameters.units: it is a part of model.hyperparameters",
        ),
        *[
            (
                {"model.hyperparameters.activation": ["relu", text]},
                "--tune model.hyperparameters.activation: the value ",
            )
            for text in ("a\nb", "relu training.epochs=1", "\x85relu")
        ],
    ],
)
def test_what_no_grid_can_have(tune: dict[str, list[Any]], message: str, data: Path) -> None:
    with pytest.raises(ValueError, match=message):
        described(data, "hash", "10%", 1, tune=tune)


@pytest.mark.parametrize(
    ("methods", "fields", "tune", "message"),
    [
        (
            "hash,{kind: pruned, precision: int8}",
            {"tables.optimizer": "adagrad"},
            {"training.quantize_from": [None, 0.5]},
            r"pruned\(precision=int8\) at 10%: --tune training.quantize_from=0.5: method pruned serves something else",
        ),
        (
            "hash",
            {"tables.optimizer": {"kind": "averaged_adam"}},
            {"training.epochs": [2, 3], "training.average": [0.1, None]},
            "hash at 10%: --tune training.epochs=2 training.average=0.1: the optimizer averaged_adam keeps a running",
        ),
        (
            "hash",
            {"tables.fused": False, "tables.sparse_gradients": True},
            {"tables.l2": [0, 0.1]},
            "--tune tables.l2=0.1: tables.l2 is not for adam with tables.sparse_gradients",
        ),
    ],
)
def test_what_cannot_be_trained_with_a_value_is_refused_before_anything_is_written(
    methods: str, fields: dict[str, Any], tune: dict[str, list[Any]], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train = load_config(fields=fields)
        run(describe(data, parse_methods(methods), ["10%"], 1, train, tune=tune), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_options_that_do_not_go_together(data: Path) -> None:
    for options, message in (
        ({"tune_at": "1%"}, "give the grid by --tune, or leave --tune-at out"),
        ({"tune_at": "2%", "tune": GRID}, r"--tune-at 2% is not among --budgets \(10%, 1%\)"),
        ({"best": 1}, "--best 1 says who gets further seeds: give --seeds 2"),
    ):
        with pytest.raises(ValueError, match=message):
            described(data, "hash", "10%,1%", 1, **options)
    assert described(data, "hash", "10%,1%", 1, tune=GRID, tune_at="0.01").tune_at == "1%"
    assert same_budget("64MB", ["64MiB", "64000000"]) == "64000000" and same_budget("1%", ["10%"]) is None


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_where_values_are_chosen(data: Path) -> None:
    config = described(data, "full,hash,robe", "50%,10%,1%", 2, tune=GRID, tune_at="10%")
    infeasible = {("", "robe", "10%"), ("", "robe", "50%")}
    places = {
        (method, budget): tuned_at(config, infeasible, ("", method, budget)) for _, method, budget in config.points
    }
    assert places == {
        ("full", ""): ("", "full", ""),
        **{("hash", budget): ("", "hash", "10%") for budget in config.budgets},
        **{("robe", budget): ("", "robe", "1%") for budget in config.budgets},
    }
    texts = ["tables.regularization=0.1", "tables.regularization=0.3"]
    tried = [("full", ""), ("hash", "10%"), ("robe", "1%")]
    cells = tuning_cells(config, infeasible)
    assert cells == [Cell(method, budget, 0, text) for method, budget in tried for text in texts]
    everywhere = config.model_copy(update={"tune_at": None})
    assert len(tuning_cells(everywhere, infeasible)) == 2 * (1 + 3 + 1)
    nowhere = {("", "hash", budget) for budget in config.budgets}
    assert tuned_at(config, nowhere, ("", "hash", "1%")) is None
    # Better is more; what failed loses; a grid that is not done decides nothing; of what all failed the first stands.
    values: dict[Cell, float | None] = {cells[0]: -0.4, cells[1]: -0.3, cells[2]: 0.5, cells[3]: None, cells[4]: None}
    found = chosen(config, infeasible, values)
    assert found == {("", "full", ""): texts[1], **{("", "hash", budget): texts[0] for budget in config.budgets}}
    found = chosen(config, infeasible, {**values, cells[5]: None})
    assert {found["", "robe", budget] for budget in config.budgets} == {texts[0]}


def test_baselines_in_either_form() -> None:
    fp32, int4 = (in_precisions(parse_methods("drop_feature,full,hash"), text) for text in ("fp32", "int4"))
    assert [is_baseline(label) for label in fp32] == [True, True, False]
    # Full tables in int4 cost nothing to try; other baselines in int4 are candidates like others.
    assert [is_baseline(label) for label in int4] == [False, True, False]
    assert is_baseline("fewer_dimensions(projection=True)") and is_baseline("full(precision=int8)")


def test_finalists_against_a_loop(data: Path) -> None:
    config = described(data, "full,drop_feature,hash,robe,unified,pruned", "10%,1%", 3, best=2)
    config = config.model_copy(update={"variants": {"a": config.train, "b": config.train}})
    draw = random.Random(0)
    undecided = decided = 0
    for _ in range(200):
        values: dict[Place, float | None] = {}
        for place in config.points:
            kind = draw.random()
            if kind < 0.75:
                values[place] = draw.choice([draw.random(), 0.5])
            elif kind < 0.95:
                values[place] = None
        wanted: set[Place] = set()
        in_the_end = 0
        for variant in "ab":
            wanted |= {(variant, "full", ""), (variant, "drop_feature", "10%"), (variant, "drop_feature", "1%")}
            in_the_end += 3
            for budget in ("10%", "1%"):
                group = [(variant, method, budget) for method in ("hash", "robe", "unified", "pruned")]
                scores = [values.get(place, "missing") for place in group]
                in_the_end += min(2, 4 - scores.count(None))
                undecided += "missing" in scores
                decided += "missing" not in scores
                for number, (place, score) in enumerate(zip(group, scores)):
                    if "missing" in scores or score is None:
                        continue
                    # How many are better, or as good and before it.
                    ahead = sum(
                        other is not None and (other > score or (other == score and earlier < number))
                        for earlier, other in enumerate(scores)
                    )
                    wanted |= {place} if ahead < 2 else set()
        assert finalists(config, values) == wanted
        assert num_finalists(config, config.points, values) == in_the_end
    assert undecided > 20 and decided > 20
    everyone = config.model_copy(update={"best": None})
    assert finalists(everyone, {}) == set(config.points) and num_finalists(everyone, config.points, {}) == 22


def sweep_of(config: SweepConfig, folder: Path) -> sweep_module._Sweep:
    return sweep_module._Sweep(config, folder, sweep_module._plans(config, PreparedDataset(Path(config.data))))


def test_forms_of_one_training_share_it_at_each_value(data: Path, tmp_path: Path) -> None:
    methods = in_precisions(parse_methods("full"), "fp32,int8")

    def sizes(**tune: list[float]) -> list[int]:
        grid = {f"training.{name}": values for name, values in tune.items()}
        sweep = sweep_of(describe(data, methods, [], 1, load_config(), tune=grid), tmp_path)
        return [len(cells) for cells in sweep.trainings(next(sweep.stages()))]

    assert sizes(average=[0.1, 0.2, 0.4]) == [2, 2, 2]
    # By these training depends on the form that is served.
    assert sizes(plateau_factor=[0.1, 0.2]) == sizes(quantize_from=[1, 2]) == [1, 1, 1, 1]


def test_the_command_line_hands_its_options_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[SweepConfig] = []
    monkeypatch.setattr(sweep_module, "run_sweep", lambda config, out, jobs, on: asked.append(config) or [])
    options = ["--methods", "hash", "--budgets", "50%,1%", "--seeds", "3", "--best", "5", "--tune-at", "0.01"]
    options += ["--tune", "tables.regularization=0.10,0.3", "--tune", "tables.l2=0,1e-5", "--out", str(tmp_path)]
    assert main(["sweep", str(data), *options]) == 0
    assert asked[0].tune == {"tables.regularization": [0.1, 0.3], "tables.l2": [0.0, 1e-5]}
    assert (asked[0].tune_at, asked[0].best, asked[0].seeds) == ("1%", 5, 3)
    assert capfd.readouterr().err == ""
    # The option that `--tune` has replaced.
    assert main(["sweep", str(data), "--learning-rates", "0.1,0.3", "--out", str(tmp_path)]) == 0
    assert asked[1].tune == {"tables.learning_rate": [0.1, 0.3]}
    assert "give --tune tables.learning_rate=0.1,0.3 in its place" in capfd.readouterr().err


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_a_field_is_tuned_at_every_budget(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    config = described(data, "full,hash", "50%,8", 2, tune={"tables.learning_rate": [0.1, 0.3]})
    printed = io.StringIO()
    rows = run(config, out, console=Console(file=printed, width=20))
    ok = [row for row in rows if row["status"] == "ok"]
    # Lines are whole, however narrow; of what is only tried they show nothing that comes from test rows.
    first, *lines = printed.getvalue().splitlines()
    assert first == "hash at 8 is infeasible: its floor is 128 bytes"
    wanted = {}
    for cell in started(fake):
        metrics = json.loads((out / "cells" / cell / "metrics.json").read_text())
        valid, test = (f"{metrics[f'{split}_auc']:.4f}" for split in ("valid", "test"))
        wanted[cell] = f"validation AUC {valid}" if "-s0-" in cell else f"test AUC {test}"
    assert [re.split(r"  \d+ s  ", text) for text in lines if text] == [list(item) for item in wanted.items()]
    # TensorBoard has what was chosen alone; what of it is missing is written by the next start.
    in_tensorboard = [path.name for path in (out / "tensorboard").iterdir()]
    assert sorted(in_tensorboard) == sorted(row["cell"] for row in ok)
    shutil.rmtree(out / "tensorboard" / ok[0]["cell"])
    run(config, out)
    assert list((out / "tensorboard" / ok[0]["cell"]).glob("events*"))
    # Where the fake cell has least noise.
    assert {(row["tuned"], row["learning_rate"]) for row in ok} == {("tables.learning_rate=0.3", 0.3)}
    assert [row["cell"] for row in rows] == [
        *("full-s0-learning_rate=0.3", "full-s1-learning_rate=0.3"),
        *("hash-50pct-s0-learning_rate=0.3", "hash-50pct-s1-learning_rate=0.3"),
        *("hash-8-s0", "hash-8-s1"),
    ]
    # The grid for the first seed, the choice alone for the second.
    assert sum("-s0-" in name for name in started(fake)) == 2 * sum("-s1-" in name for name in started(fake))
    with (out / "tuning.csv").open() as file:
        tried = list(csv.DictReader(file))
    assert list(tried[0]) == ["variant", "method", "budget", "tuned", "monitor", "valid", "chosen"]
    assert [(row["method"], row["tuned"], row["chosen"]) for row in tried] == [
        (method, f"tables.learning_rate={value}", str(int(value == 0.3)))
        for method in ("full", "hash")
        for value in (0.1, 0.3)
    ]
    text = text_of(out)
    wanted = (
        "Chosen on validation with seed 0 for each method and budget: tables.learning_rate from 0.1, 0.3 (tuning.csv)."
    )
    assert wanted in text and text.count("| tables.learning_rate=0.3") == 2
    # The rate that was not tuned is shared, and of the one that was nothing of the kind is said.
    assert "Of the learning rates these were shared by all methods: dense.learning_rate 0.001." in text
    assert "none was tuned" not in text
    summary = summarize(out, resamples=20)
    both = summary.config.model_copy(update={"tune": {"tables.learning_rate": [0.1], "dense.learning_rate": [0.1]}})
    assert learning_rates(replace(summary, config=both)) == ""
    small = summary.config.model_copy(update={"tune": {"tables.l2": [1e-5], "training.clip_norm": [None]}})
    assert "budget: tables.l2 from 1.0e-05; training.clip_norm from null (" in tuned(replace(summary, config=small))
    with pytest.raises(ValueError, match=r"another tune.tables.learning_rate: \[0.1, 0.3\] there, \[0.3\] now"):
        run(described(data, "full,hash", "50%,8", 2, tune={"tables.learning_rate": [0.3]}), out)


def test_values_follow_the_monitor_of_their_variant(data: Path, fake: Path, tmp_path: Path) -> None:
    fields: tuple[dict[str, Any], ...] = ({"model.name": "mlp"}, {"model.name": "mlp", "training.monitor": "logloss"})
    trains = {name: load_config(fields=own) for name, own in zip(("small", "deep"), fields)}
    printed = io.StringIO()
    config = described(data, "full", "", 2, variants=trains, tune=GRID)
    rows = run(config, tmp_path / "sweep", console=Console(file=printed))
    deep = [text for text in printed.getvalue().splitlines() if text.startswith("deep-full-s0")]
    assert len(deep) == 2 and all("  validation log loss 0." in text for text in deep)
    assert {(row["variant"], row["tuned"]) for row in rows} == {
        ("small", "tables.regularization=0.3"),
        ("deep", "tables.regularization=0.1"),  # the fake log loss is best where the AUC is worst
    }
    with (tmp_path / "sweep" / "tuning.csv").open() as file:
        assert {(row["variant"], row["monitor"]) for row in csv.DictReader(file)} == {
            ("small", "auc"),
            ("deep", "logloss"),
        }
    text = text_of(tmp_path / "sweep")
    assert "for each variant, method and budget: tables.regularization from 0.1, 0.3" in text
    assert "Learning rates were shared by all methods, none was tuned for a method: tables.learning_rate 0.05" in text


def stopping(after: int) -> Callable[..., list[str]]:
    """Stands for Ctrl-C when so many trainings have been started."""
    numbers = count()

    def command(config: SweepConfig, cell: Cell, run: Path) -> list[str]:
        if next(numbers) == after:
            raise KeyboardInterrupt
        return fake_cell(config, cell, run)

    return command


def test_a_whole_protocol_stopped_in_each_of_its_stages(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    config = described(data, "full,hash,robe,drop_feature", "50%,1%,100", 2, tune=GRID, tune_at="100", best=1)
    first, second = ("regularization=0.1", "regularization=0.3")
    # Hash is infeasible at 100 bytes, and tuned at the first budget where it is not.
    tried = ["full", "hash-50pct", "robe-100", "drop_feature-100"]
    wanted = [f"{place}-s0-{value}" for place in tried for value in (first, second)]
    others = ["hash-1pct", "robe-50pct", "robe-1pct", "drop_feature-50pct", "drop_feature-1pct"]
    wanted += [f"{place}-s0-{second}" for place in others]
    # By the noise of the fake cells, robe is better than hash; one training serves drop_feature at 1 % and below.
    best = ["full", "robe-50pct", "robe-1pct", "robe-100", "drop_feature-50pct", "drop_feature-1pct"]
    wanted += [f"{place}-s1-{second}" for place in best]
    expected = {
        "within the grid": 3,
        "after it": 8,
        "within seed 0": 10,
        "after it, too": 13,
        "within the finalists": 15,
    }
    before = 0
    for number in expected.values():
        with pytest.raises(KeyboardInterrupt):
            run(config, out, command=stopping(number - before))
        before = number
        assert started(fake) == wanted[:number]
        assert sweep_of(config, out).num_runs() == len(tried) * 2 + len(others) + 1 + 3 + 3
        summary = summarize(out, resamples=20)
        assert summary.is_partial and summary.num_expected == 2 + 3 * 1 + 3 * 2 + 3 * 2
    rows = run(config, out)
    assert started(fake) == wanted
    assert sweep_of(config, out).num_runs() == len(list(out.glob("cells/*/metrics.json")))
    summary = summarize(out, resamples=20)
    assert not summary.is_partial and summary.num_expected == summary.num_finished == len(rows)
    assert head(summary) == [
        "tiny · dlrm · 2 seeds for baselines and the best of each budget on validation, 1 for the rest"
    ]
    ends = {p.place[1:]: line(p, summary)[-2:] for p in summary.points if p.method in ("hash", "robe")}
    assert ends == {
        ("hash", "50%"): ("1/1", "tables.regularization=0.3 (chosen at 50%)"),
        ("hash", "1%"): ("1/1", "tables.regularization=0.3 (chosen at 50%)"),
        ("hash", "100"): ("0/1", "infeasible: floor 128 bytes"),
        **{("robe", budget): ("2/2", "tables.regularization=0.3") for budget in config.budgets},
    }


def test_the_best_on_validation_get_every_seed(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    (fake / "fail-robe").touch()
    config = described(data, "full,hash,multi_hash,robe,unified", "50%", 5, best=2)
    assert run(config, out, jobs=2)[-1]["status"] == "ok"
    # By the noise of the fake cells: hash (1.5), unified (1.55), multi_hash (1.7); robe would be the best.
    rows = [(row["method"], row["seed"], row["status"]) for row in read(out)]
    assert rows == [
        *(("full", str(seed), "ok") for seed in range(5)),
        *(("hash", str(seed), "ok") for seed in range(5)),
        ("multi_hash", "0", "ok"),
        ("robe", "0", "failed"),
        *(("unified", str(seed), "ok") for seed in range(5)),
    ]
    summary = summarize(out, resamples=20)
    assert {p.method: row_of(summary, p.method, p.budget)["seeds"] for p in summary.points} == {
        "full": "5/5",
        "hash": "5/5",
        "multi_hash": "1/1",
        "robe": "0/1",
        "unified": "5/5",
    }
    assert head(summary)[0].endswith(
        "5 seeds for baselines and the 2 best of each budget on validation, 1 for the rest"
    )
    assert (summary.num_finished, summary.num_expected) == (16, 17)
    assert "No p-values for methods with 1 seed: they need at least 5." in remarks(summary)
    hashed, single = summary.point("hash", "50%"), summary.point("multi_hash", "50%")
    assert hashed is not None and hashed.p_value is not None and single is not None and single.p_value is None
    # A finalist in work, and one that is not chosen yet.
    lines = (out / "results.csv").read_text().splitlines(keepends=True)
    (out / "results.csv").write_text("".join(text for text in lines if ",hash-50pct-s4," not in text))
    assert row_of(summarize(out, resamples=20), "hash", "50%")["seeds"] == "4/5"
    (out / "results.csv").write_text("".join(text for text in lines if "multi_hash" not in text))
    undecided = summarize(out, resamples=20)
    assert row_of(undecided, "multi_hash", "50%")["seeds"] == "0/1" and undecided.num_expected == 17


def test_where_a_whole_grid_fails_the_row_says_so(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    (fake / "fail-hash-1%").touch()
    config = described(data, "full,hash", "50%,1%", 1, tune=GRID, tune_at="1%")
    failed = [(row["cell"], row["message"]) for row in run(config, out) if row["status"] == "failed"]
    names = ("hash-1pct-s0-regularization=0.1", "hash-1pct-s0-regularization=0.3")
    assert failed == [(name, "the loss is NaN at step 7") for name in names]
    assert len(started(fake)) == len(set(started(fake)))  # what failed waits for the next start
    summary = summarize(out, resamples=20)
    first = "tables.regularization=0.1 (the first of the grid: all of it failed at 1%)"
    assert row_of(summary, "hash", "50%")["note"] == first
    assert row_of(summary, "hash", "1%")["note"] == "1 failed: the loss is NaN at step 7"
    # Once it can be trained, the choice is another.
    (fake / "fail-hash-1%").unlink()
    assert {row["tuned"] for row in run(config, out)} == {"tables.regularization=0.3"}
    text = text_of(out)
    assert (
        "method, at 1% or else the first budget that is feasible, and used at all: tables.regularization from" in text
    )


def test_what_fails_of_a_grid_is_not_passed_over(
    data: Path, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_module, "run_sweep", partial(sweep_module.run_sweep, command=fake_cell))
    folder = tmp_path / "sweep"
    command = ["sweep", str(data), "--seeds", "2", "--tune", "tables.learning_rate=0.3,1e38", "--out", str(folder)]
    lost = "full-s0-learning_rate=1.0e+38"
    (fake / f"fail-{lost}").touch()
    assert main(command) == 1
    out, err = capfd.readouterr()
    assert out.startswith(f"2 ok, 0 infeasible, 1 failed: {folder / 'results.csv'}\n")
    reason = f"the loss is NaN at step 7 (log: {folder / 'cells' / lost}.log). The same command tries it again."
    assert err.endswith(f"Error: 1 cell failed, first {lost}: {reason}\n")
    with (folder / "tuning.csv").open() as file:
        good, bad = csv.DictReader(file)
    # The results have the cell that was chosen, and all else is nothing to compare with.
    assert [row["tuned"] for row in read(folder)] == ["tables.learning_rate=0.3"] * 2
    assert (good["valid"], good["chosen"]) == (read(folder)[0]["valid_auc"], "1")
    asked = {"variant": "", "method": "full", "budget": "", "tuned": "tables.learning_rate=1.0e+38", "monitor": "auc"}
    assert bad == asked | {"valid": "", "chosen": "0"}
    (fake / f"fail-{lost}").unlink()
    assert main(command) == 0
    assert capfd.readouterr().out.startswith("2 ok, 0 infeasible, 0 failed")


# ---- sweeps of before ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ml-100k", "sports-din"])  # before there were variants, and after
def test_published_sweeps_can_be_reported_on(name: str, tmp_path: Path) -> None:
    for file in ("sweep.yaml", "results.csv"):
        shutil.copy(PUBLISHED / name / file, tmp_path)
    summary = summarize(tmp_path, resamples=20)
    assert not summary.is_partial and summary.config.tune == {} and summary.config.best is None
    assert {point.tuned for point in summary.points} == {""}


def test_a_sweep_from_before_there_were_grids_goes_on(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    config = described(data, "full", "", 2)
    run(config, out)
    now = unsealed(yaml.safe_load((out / "sweep.yaml").read_text()))
    before = {name: value for name, value in now.items() if name not in ("tune", "tune_at", "best")}
    (out / "sweep.yaml").write_text(yaml.safe_dump(sealed(before | {"learning_rates": []})))
    assert len(run(config, out)) == len(started(fake)) == 2
    assert unsealed(yaml.safe_load((out / "sweep.yaml").read_text())) == now
    (out / "sweep.yaml").write_text(yaml.safe_dump(sealed(before | {"learning_rates": [0.1, 0.3]})))
    with pytest.raises(ValueError, match=r"sweep.yaml has a grid of learning_rates, which an earlier version wrote"):
        read_config(out)
    (out / "sweep.yaml").write_text(yaml.safe_dump(sealed(now | {"seeds": 0})))
    with pytest.raises(
        ValueError, match=r"sweep.yaml is damaged \(seeds: Input should be .* equal to 1\): give another"
    ):
        read_config(out)
    (out / "sweep.yaml").write_text(yaml.safe_dump(sealed(now | {"tune": {"tables.l2": ["1\n2"]}})))
    with pytest.raises(
        ValueError, match=r"sweep.yaml is damaged \(--tune tables.l2: the value '1\\n2' holds a line end"
    ):
        read_config(out)
