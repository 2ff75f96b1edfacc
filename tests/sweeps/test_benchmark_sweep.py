from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kill_server import Server
from sweep_cases import config_of, fake_cell, read, run, started

import embtables.sweeps.sweep as sweep_module
from embtables._util.files import sealed, write_json
from embtables.cli.app import run as main
from embtables.datasets import PreparedDataset
from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic
from embtables.methods import kinds
from embtables.sweeps.cells import (
    Cell,
    in_precisions,
    parse_budgets,
    parse_methods,
    parse_variants,
    points,
    with_baselines,
)
from embtables.sweeps.config import SweepConfig, describe
from embtables.sweeps.planning import cell_config
from embtables.sweeps.report import markdown
from embtables.sweeps.runner import Job, Processes, last_line, run_jobs, threads_per_job
from embtables.sweeps.summary import summarize
from embtables.sweeps.sweep import first_difference, run_sweep, train_command
from embtables.training import Trainer
from embtables.training.config import load_config
from embtables.training.loop import Run


def test_names_are_unique_and_fit_for_files() -> None:
    assert Cell("hash", "10%", 0).name == "hash-10pct-s0"
    assert Cell("full", "", 2).name == "full-s2"
    assert Cell("hash", "1%", 0, "tables.regularization=0.1").name == "hash-1pct-s0-regularization=0.1"
    several = "tables.learning_rate=0.03 model.hyperparameters.units=[8, 4]"
    assert Cell("robe", "64MB", 1, several).name == "robe-64MB-s1-learning_rate=0.03-units=_8_4"
    odd = Cell("compositional(operation=add,k=2)", "0.1", 0).name
    assert odd == "compositional_operation=add_k=2-0.1-s0"


def test_methods_and_budgets_of_the_command_line() -> None:
    methods = parse_methods("full, hash,{kind: compositional, operation: add}")
    assert methods == {
        "full": "full",
        "hash": "hash",
        "compositional(operation=add)": {"kind": "compositional", "operation": "add"},
    }
    assert parse_budgets(" 50%,10% ,64MB,10%") == ["50%", "10%", "64MB"]
    assert points(methods, ["50%", "1%"]) == [
        ("full", ""),
        ("hash", "50%"),
        ("hash", "1%"),
        ("compositional(operation=add)", "50%"),
        ("compositional(operation=add)", "1%"),
    ]
    fewer = ["fewer_dimensions", "fewer_dimensions(projection=True)"]
    low = ["full(precision=int8)", "full(precision=int4)"]
    added = list(with_baselines(parse_methods("hash")))
    assert added == ["full", "hash", *low, "drop_feature", "frequency_cutoff", *fewer]
    assert with_baselines(parse_methods("hash"))[fewer[1]] == {"kind": "fewer_dimensions", "projection": True}
    given = "hash,drop_feature,full,{kind: fewer_dimensions, projection: true}"
    assert list(with_baselines(parse_methods(given))) == [
        "hash",
        "drop_feature",
        "full",
        fewer[1],
        *low,
        "frequency_cutoff",
        fewer[0],
    ]
    for text in ("", "hash,{kind: ", "hash,3"):
        with pytest.raises(ValueError, match="method"):
            parse_methods(text)
    with pytest.raises(ValueError, match="empty entry"):
        parse_budgets("50%,,1%")


def test_methods_in_several_precisions() -> None:
    methods = parse_methods("full,{kind: hash, precision: int2},{user_id: full, '*': robe}")
    found = in_precisions(methods, "fp32, int4")
    assert list(found) == [
        "full(precision=fp32)",
        "full(precision=int4)",
        "hash(precision=int2)",
        "user_id: full(precision=fp32), *: robe(precision=fp32)",
        "user_id: full(precision=int4), *: robe(precision=int4)",
    ]
    # Each says its precision, so that none of the configuration takes its place.
    assert found["full(precision=fp32)"] == {"precision": "fp32", "kind": "full"}
    assert in_precisions(methods, None) == methods
    # Full tables in fp32 and in int4 are there already, the others are not.
    missing = ["drop_feature", "frequency_cutoff", "fewer_dimensions", "fewer_dimensions(projection=True)"]
    assert list(with_baselines(found)) == [*found, "full(precision=int8)", *missing]
    with pytest.raises(ValueError, match="unknown precision 'int5'"):
        in_precisions(methods, "fp32,int5")


def test_all_methods_can_be_asked_for_by_one_word() -> None:
    assert list(parse_methods("all")) == kinds()
    methods = parse_methods("hash, all, {kind: compositional, operation: add}")
    assert list(methods)[0] == "hash" and len(methods) == len(kinds()) + 1


def test_the_command_of_a_cell(data: Path) -> None:
    config = describe(data, parse_methods("{kind: multi_hash, num_hashes: 2}"), ["10%"], 1, load_config())
    (label,) = config.methods
    command = train_command(config, Cell(label, "10%", 4, "tables.learning_rate=0.1 tables.l2=0.0"), Path("/s/cells/x"))
    assert command[3:] == [
        "train",
        str(data.resolve()),
        *("--out", "/s/cells/x"),
        *("--config", "/s/train.yaml"),
        *("--method", '{"kind": "multi_hash", "num_hashes": 2}'),
        *("--budget", "10%"),
        *("--seed", "4"),
        *("--set", "tables.learning_rate=0.1"),
        *("--set", "tables.l2=0.0"),
    ]


def test_a_whole_sweep(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    rows = run(config_of(data), out, jobs=2)
    read_rows = read(out)
    assert list(read_rows[0])[:16] == (
        "dataset,model,method,budget,seed,inference_bytes,training_bytes,ratio,valid_auc,test_auc,test_logloss,"
        "best_epoch,examples_per_second,train_seconds,peak_rss_bytes,status"
    ).split(",")
    assert [(r["method"], r["budget"], r["seed"], r["status"]) for r in read_rows[:6]] == [
        ("full", "", "0", "ok"),
        ("full", "", "1", "ok"),
        ("hash", "50%", "0", "ok"),
        ("hash", "50%", "1", "ok"),
        ("hash", "1%", "0", "ok"),
        ("hash", "1%", "1", "ok"),
    ]
    assert len(read_rows) == len(rows) == 2 + 3 * 3 * 2
    infeasible = [r for r in read_rows if r["status"] == "infeasible"]
    # One row of 16 floats for each of two tables is hash's floor: 8 bytes are too few.
    assert ("hash", "8", "128") in {(r["method"], r["budget"], r["floor_bytes"]) for r in infeasible}
    assert all(r["test_auc"] == "" and "too small" in r["message"] for r in infeasible)
    # Seed by seed, full first; nothing infeasible was started, nothing twice.
    order = started(fake)
    # At 8 bytes drop_feature has what it has at 1 %, nothing, and is served by that training.
    trained = [r for r in read_rows if r["status"] == "ok" and (r["method"], r["budget"]) != ("drop_feature", "8")]
    assert len(order) == len(set(order)) == len(trained)
    # Two cells run at a time and note their own start, so the two at the border may change places.
    half = len(order) // 2
    assert {name.rsplit("-s", 1)[1] for name in order[: half - 1]} == {"0"}
    assert {name.rsplit("-s", 1)[1] for name in order[half + 1 :]} == {"1"}
    ok = next(r for r in read_rows if r["method"] == "hash" and r["budget"] == "50%")
    metrics = json.loads((out / "cells" / ok["cell"] / "metrics.json").read_text())
    assert float(ok["test_auc"]) == metrics["test_auc"] and int(ok["inference_bytes"]) <= 552 * 16 * 4 // 2
    assert ok["dataset"] == PreparedDataset(data).name and ok["test_auc_unseen"] == ""
    labels = np.concatenate([batch.labels.numpy() for batch in PreparedDataset(data).batches("test", 1000)])
    assert np.array_equal(np.load(out / "test_labels.npy"), labels)
    assert yaml.safe_load((out / "train.yaml").read_text())["tables"]["embedding_dim"] == 16
    assert json.loads((out / "environment.json").read_text())["jobs"] == 2
    assert list((out / "tensorboard" / ok["cell"]).glob("events*"))
    assert not list(out.glob("**/*.tmp"))


def test_budgets_that_one_training_serves_start_it_once(data: Path, fake: Path, tmp_path: Path) -> None:
    methods, budgets = parse_methods("matryoshka"), ["50%", "25%", "12.5%", "1%"]
    rows = run(describe(data, methods, budgets, 2, load_config()), tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["ok"] * 2 * 3 + ["infeasible"] * 2
    assert len({row["inference_bytes"] for row in rows[:6]}) == 3
    assert started(fake) == ["matryoshka-50pct-s0", "matryoshka-50pct-s1"]


def test_finished_cells_are_not_redone_and_failed_ones_are(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    (fake / "fail-hash").touch()
    failed = [row for row in run(config_of(data, budgets="50%"), out) if row["status"] == "failed"]
    assert [row["method"] for row in failed] == ["hash"] * 2
    assert {row["message"] for row in failed} == {"the loss is NaN at step 7"}
    (fake / "fail-hash").unlink()
    # What says why they failed is damaged, as by a full disk: they are tried again anyway.
    for row, text in zip(failed, ("{", "[1]"), strict=True):
        (out / "cells" / f"{row['cell']}.failed.json").write_text(text)
    before = started(fake)
    rows = run(config_of(data, budgets="50%"), out)
    again = started(fake)[len(before) :]
    assert sorted(again) == sorted(row["cell"] for row in failed)
    assert not [row for row in rows if row["status"] == "failed"] and not list(out.glob("cells/*.failed.json"))
    assert len(run(config_of(data, budgets="50%"), out)) == len(rows) and started(fake) == [*before, *again]


def test_a_killed_cell_is_failed_and_says_so(data: Path, fake: Path, tmp_path: Path) -> None:
    (fake / "die").touch()
    rows = run(config_of(data, seeds=1, budgets="50%"), tmp_path / "sweep")
    assert {row["message"] for row in rows if row["status"] == "failed"} == {
        "killed by SIGKILL, perhaps for want of memory"
    }


def test_planning_comes_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    train = load_config()
    for methods, budgets, message in [
        ("hash,hsah", ["10%"], "unknown method 'hsah'"),
        ("hash,{kind: hash, sides: 2}", ["10%"], "sides"),
        ("hash", ["10%", "ten"], "'ten'"),
        ("hash", ["0"], "0"),
        ("hash", ["-5%"], "-5%"),
        ("hash", ["120%"], "120%"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(describe(data, parse_methods(methods), budgets, 1, train), out)
        assert not out.exists()


def test_a_fixed_hash_seed_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="tables.hash_seed is 3"):
        config_of(data, **{"tables.hash_seed": 3})


@pytest.mark.parametrize(
    ("set_to", "message"),
    [
        ("tables.method=hash", "the configuration sets tables.method, .* of its own: give --methods"),
        ("tables.budget=10%", "the configuration sets tables.budget, .* of its own: give --budgets"),
        ("training.seed=7", "the configuration sets training.seed, .* of its own: give --seeds"),
        ("tables.precision=int8", "the configuration sets tables.precision, .* of its own: leave out --precisions"),
    ],
)
def test_what_would_be_ignored_is_refused(
    set_to: str, message: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Be it set on the command line, in a file or by a variant; what a preset says of the seed is no wish."""
    section, _, assignment = set_to.partition(".")
    name, _, value = assignment.partition("=")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: {value}}}\n")
    command = ["sweep", str(data), "--out", str(tmp_path / "sweep"), "--preset", "bars", "--methods", "full"]
    command += ["--precisions", "fp32,int8"] if name == "precision" else []
    by_variant = ["--variant", "a: {}", "--variant", f"b: {{{section}.{name}: {value}}}"]
    for options, wanted in (
        (["--set", set_to], message),
        (["--config", str(tmp_path / "run.yaml")], message),
        (by_variant, message.replace("the configuration", "variant 'b'")),
    ):
        assert main([*command, *options]) == 2
        assert re.search(wanted, capfd.readouterr().err)
    assert not (tmp_path / "sweep").exists()


def test_a_precision_of_the_configuration_is_that_of_methods_without_one(data: Path) -> None:
    variants = {name: load_config(fields={"tables.precision": name}) for name in ("int2", "int4")}
    config = describe(data, parse_methods("full"), [], 1, load_config(), variants)
    assert [train.tables.precision for train in config.trains.values()] == ["int2", "int4"]


def test_cells_that_would_share_a_folder_are_refused(data: Path) -> None:
    alike = parse_methods("{'feature_*': hash, '*': full}, {'feature_?': hash, '*': full}")
    with pytest.raises(ValueError, match="two cells would both be named 'feature__hash_full-10pct-s0'"):
        describe(data, alike, ["10%"], 1, load_config())
    with pytest.raises(ValueError, match="values of --tune are too alike"):
        decays = [{"a*": 0.1}, {"a?": 0.1}]
        describe(data, parse_methods("hash"), ["10%"], 1, load_config(), tune={"dense.weight_decay": decays})


def test_another_sweep_in_the_directory_is_refused(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    run(config_of(data, seeds=1, budgets="50%"), out)
    with pytest.raises(ValueError, match=r"another train.training.batch_size: 2048 there, 64 now"):
        run(config_of(data, seeds=1, budgets="50%", **{"training.batch_size": 64}), out)
    with pytest.raises(ValueError, match=r"another seeds: 1 there, 2 now"):
        run(config_of(data, seeds=2, budgets="50%"), out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is not a sweep \(it holds thesis.tex\)"):
        run(config_of(data, seeds=1, budgets="50%"), other)
    with pytest.raises(ValueError, match="is a file"):
        run(config_of(data, seeds=1, budgets="50%"), other / "thesis.tex")


def test_changed_data_is_another_sweep(fake: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_synthetic(folder, Synthetic(rows=2000, cardinalities=(50,), seed=3))
    run(config_of(folder, seeds=1, budgets="50%"), tmp_path / "sweep")
    os.rename(folder, tmp_path / "old")
    prepare_synthetic(folder, Synthetic(rows=2000, cardinalities=(50,), seed=4))
    with pytest.raises(ValueError, match="another manifest_sha256"):
        run(config_of(folder, seeds=1, budgets="50%"), tmp_path / "sweep")


def test_a_damaged_shard_stops_the_sweep(fake: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_synthetic(folder, Synthetic(rows=2000, cardinalities=(50,), seed=3))
    shard = next((folder / "valid").glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=shard.name):
        run(config_of(folder, seeds=1), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_first_difference() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", "1", "2")
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == ("c", "nothing", "2")


def wait_until(true: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody reaps (its new parent may not) does no work any more.
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_children_and_goes_on(
    sign: signal.Signals, data: Path, fake: Path, tmp_path: Path, server: Server
) -> None:
    if sign == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux ends the children of a killed process")
    out = tmp_path / "sweep"
    (fake / "slow").touch()
    child = server.start(("sweep", [str(data), str(out)]))
    wait_until(lambda: len(started(fake)) == 2)
    if sign == signal.SIGINT:
        with pytest.raises(ValueError, match=f"in use by process {child}"):
            run(config_of(data, seeds=1, budgets="50%"), out)
    pids = [int(line.split()[1]) for line in (fake / "started").read_text().splitlines()]
    os.kill(child, sign)
    server.ended()
    wait_until(lambda: not any(map(alive, pids)), 30)
    (fake / "slow").unlink()
    rows = run(config_of(data, seeds=1, budgets="50%"), out)
    assert len([row for row in rows if row["status"] == "ok"]) == len(set(started(fake)))
    assert not [row for row in rows if row["status"] == "failed"]


def test_jobs_run_side_by_side_with_their_share_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embtables.sweeps.runner.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (threads_per_job(2), threads_per_job(3), threads_per_job(16)) == (4, 2, 1)
    # On machines of other sizes, each job on one of them.
    assert [threads_per_job(jobs, [4, 16]) for jobs in (1, 2, 3, 5, 100)] == [16, 8, 5, 4, 1]
    # Each waits for the others: one at a time they would never end.
    program = (
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); print(os.environ['OMP_NUM_THREADS'])\n"
        "while len(list(pathlib.Path(sys.argv[1]).parent.glob('*.up'))) < 3: time.sleep(0.02)"
    )
    jobs = [
        Job(str(i), [sys.executable, "-c", program, str(tmp_path / f"{i}.up")], tmp_path / f"{i}.log") for i in range(3)
    ]
    assert [item.code for item in run_jobs(jobs, 3, Processes(threads_per_job(3)))] == [0, 0, 0]
    assert last_line(tmp_path / "0.log") == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_per_job(2) == 1


def test_leaving_the_jobs_ends_them(tmp_path: Path) -> None:
    begin = "import os, signal, time; "
    wait = "print(os.getpid(), flush=True); time.sleep(99)"
    programs = ["pass", begin + wait, begin + "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + wait]
    jobs = [Job(str(i), [sys.executable, "-c", text], tmp_path / f"{i}.log") for i, text in enumerate(programs)]
    running = run_jobs(jobs, 3, Processes(1))
    assert next(running).job.name == "0"
    wait_until(lambda: all(last_line(tmp_path / f"{i}.log") for i in (1, 2)))
    pids = [int(last_line(tmp_path / f"{i}.log")) for i in (1, 2)]
    assert all(map(alive, pids))
    running.close()  # type: ignore[attr-defined]
    assert not any(map(alive, pids))


def test_the_last_line_is_found_behind_a_progress_bar(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"10%\r20%\r\x1b[31mError: no room\x1b[0m\n\n")
    assert last_line(log) == "no room"
    log.write_bytes(b"")
    assert last_line(log) == ""


@pytest.mark.slow
def test_a_real_sweep_that_is_killed_ends_with_the_same_numbers(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare_synthetic(tmp_path / "data", Synthetic(rows=20_000, cardinalities=(2000, 100), num_dense=2, seed=3))
    command = ["sweep", str(tmp_path / "data"), "--methods", "full,hash", "--budgets", "10%", "--seeds", "1"]
    command += ["--no-baselines", "--jobs", "2", "--out", str(tmp_path / "killed")]
    sets = ["epochs=2", "batch_size=256", "threads=1"]
    command += [part for field in sets for part in ("--set", field)]
    # A checkpoint after each step, so that the sweep is killed in the midst of its cells.
    command += ["--set", "training.checkpoint_seconds=0"]
    child = server.start(("commands", [command]))
    wait_until(lambda: bool(list((tmp_path / "killed").glob("cells/*/checkpoint/*"))))
    os.kill(child, signal.SIGKILL)
    server.ended()
    assert not list((tmp_path / "killed").glob("cells/*/metrics.json"))
    assert main(command) == 0
    assert capfd.readouterr().out.startswith("2 ok, 0 infeasible, 0 failed")
    killed = read(tmp_path / "killed")
    assert [(row["method"], row["budget"]) for row in killed] == [("full", ""), ("hash", "10%")]
    assert float(killed[0]["test_auc"]) > 0.6
    for row in killed:
        own = cell_config(load_config(overrides=sets), row["method"], row["budget"], seed=0)
        whole = Trainer(own, PreparedDataset(tmp_path / "data"), tmp_path / row["method"]).run()
        assert [str(whole[name]) for name in ("test_auc", "valid_auc")] == [row["test_auc"], row["valid_auc"]]
    log = (tmp_path / "killed" / "cells" / "full-s0.log").read_text()
    assert "test AUC" in log
    # The figure as users get it, which runs of the tests' own process leave out.
    curve = "".join(
        ElementTree.parse(tmp_path / "killed" / "cells" / "full-s0" / "validation.svg").getroot().itertext()
    )
    assert "log loss" in curve and "kept" in curve


def test_one_training_is_scored_in_every_precision(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where sizes are the same, as those of full tables; each with the numbers of a run of its own."""
    prepare_synthetic(tmp_path / "data", Synthetic(rows=6_000, cardinalities=(300, 100), num_dense=2, seed=3))
    sets = ["epochs=3", "batch_size=256", "threads=1", "tables.learning_rate=0.1"]
    command = ["sweep", str(tmp_path / "data"), "--methods", "full", "--seeds", "1"]
    command += ["--no-baselines", "--precisions", "int4,binary", "--out", str(tmp_path / "sweep")]
    command += [part for field in sets for part in ("--set", field)]
    assert main(command) == 0
    rows = read(tmp_path / "sweep")
    specs = in_precisions(parse_methods("full"), "int4,binary")
    assert [(row["method"], row["trained_with"]) for row in rows] == list(zip(specs, ["", rows[0]["cell"]]))
    assert [log.stem for log in (tmp_path / "sweep" / "cells").glob("*.log")] == [rows[0]["cell"]]
    assert main(["report", str(tmp_path / "sweep")]) == 0
    assert "full(precision=binary)" in capfd.readouterr().out
    for row in rows:
        config = cell_config(load_config(overrides=sets), specs[row["method"]], "", seed=0)
        whole = Trainer(config, PreparedDataset(tmp_path / "data"), tmp_path / row["method"]).run()
        for name in ("test_auc", "valid_auc", "test_logloss", "best_epoch", "epochs", "inference_bytes"):
            assert str(whole[name]) == row[name], (row["method"], name)


def trainings(config: SweepConfig, folder: Path, finished: Sequence[str] = ()) -> list[list[str]]:
    """The names of the cells of each training that is left."""
    sweep = sweep_module._Sweep(config, folder, sweep_module._plans(config, PreparedDataset(Path(config.data))))
    for name in finished:
        (folder / "cells" / name).mkdir(parents=True)
        write_json(folder / "cells" / name / "metrics.json", sealed({"status": "ok"}))
    return [[cell.name for cell in each] for each in sweep.trainings(sweep.main_cells())]


def test_cells_of_one_training(data: Path, tmp_path: Path) -> None:
    methods = in_precisions(parse_methods("full,hash"), "fp32,int8,binary")
    fp32, int8, binary = (f"full_precision={p}-s0" for p in ("fp32", "int8", "binary"))
    hashed = [[f"hash_precision={p}-10pct-s0"] for p in ("fp32", "int8", "binary")]

    def described(*overrides: str) -> SweepConfig:
        return describe(data, methods, ["10%"], 1, load_config(overrides=overrides))

    assert trainings(described(), tmp_path / "a") == [[fp32, int8, binary], *hashed]
    # What comes after the first that is left goes along, finished or not.
    assert trainings(described(), tmp_path / "b", [int8]) == [[fp32, int8, binary], *hashed]
    assert trainings(described(), tmp_path / "c", [fp32]) == [[int8, binary], *hashed]
    assert trainings(described(), tmp_path / "d", [fp32, int8, binary]) == hashed
    # Of a training that depends on how it is served there are as many as forms.
    for option in ("training.quantize_from=1", "training.plateau_factor=0.5"):
        assert trainings(described(option), tmp_path / option) == [[fp32], [int8], [binary], *hashed]
    several = describe(data, methods, ["10%"], 2, load_config())
    assert [len(each) for each in trainings(several, tmp_path / "e")] == [3, 1, 1, 1] * 2


def test_a_training_whose_company_has_changed_starts_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does with the finalists, where a cell that failed at the first start does not at the second."""
    overrides = ["training.batch_size=800", "training.epochs=2", "training.threads=1"]
    methods = in_precisions(parse_methods("full"), "fp32,int8,int4")
    config = describe(data, methods, [], 1, load_config(overrides=overrides))
    sweep = sweep_module._Sweep(config, tmp_path, sweep_module._plans(config, PreparedDataset(data)))
    first, int8, int4 = config.cells([0])

    def train(*beside: Cell) -> dict[str, Any]:
        """What the sweep's job does, in this process."""
        job = sweep.job(first, beside, train_command)
        assert job.command.count("--also") == len(beside)
        own, *others = (cell_config(config.train, methods[cell.method], "", seed=0) for cell in (first, *beside))
        also = dict(zip(map(sweep.run, beside), others))
        return Trainer(own, PreparedDataset(data), sweep.run(first), also=also).run()

    checkpoint = sweep.run(first) / "checkpoint" / "last.pt"
    save = Run._save

    def stopped(run: Run) -> None:
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(int8, int4)
    assert checkpoint.exists()
    sweep.job(first, [int8, int4], train_command)
    assert checkpoint.exists()
    assert train(int8)["status"] == "ok"
    assert (sweep.run(int8) / "metrics.json").exists() and not (sweep.run(int4) / "metrics.json").exists()
    checkpoint.write_bytes(b"damaged")
    sweep.job(first, [int8, int4], train_command)
    assert checkpoint.exists()  # it is for the run to say so


# ---- variants --------------------------------------------------------------------------------------------------------

VARIANTS = {
    "small": {"model.name": "mlp", "data.leave_out": ["feature_0"]},
    "wide & deep": {"model.name": "mlp", "model.hyperparameters.units": [8, 4], "training.monitor": "logloss"},
}


def varied(data: Path, methods: str = "full", budgets: str = "", **options: Any) -> SweepConfig:
    trains = {name: load_config(fields=fields) for name, fields in VARIANTS.items()}
    listed = budgets.split(",") if budgets else []
    return describe(data, parse_methods(methods), listed, 2, load_config(), trains, **options)


def test_variants_of_the_command_line() -> None:
    assert parse_variants(["DIN: {model.name: din, data.max_history: 20}", "'no history': {data.leave_out: [h]}"]) == {
        "DIN": {"model.name": "din", "data.max_history": 20},
        "no history": {"data.leave_out": ["h"]},
    }
    for texts, message in [
        (["DIN"], "'DIN' is not of the form NAME: {FIELD: VALUE}"),
        (["DIN: din"], "is not of the form"),
        (["DIN: {a: 1"], "is not of the form"),
        (["{}"], "is not of the form"),
        (["a: {}", "a: {}"], "--variant 'a' is given twice"),
        (["'–': {}"], "needs a name with letters or digits"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_variants(texts)


def test_a_sweep_over_variants(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    config = varied(data, "full,hash", "50%")
    run(config, out)
    rows = read(out)
    assert [(r["variant"], r["model"], r["method"], r["budget"], r["seed"]) for r in rows[:5]] == [
        ("small", "mlp", "full", "", "0"),
        ("small", "mlp", "full", "", "1"),
        ("small", "mlp", "hash", "50%", "0"),
        ("small", "mlp", "hash", "50%", "1"),
        ("wide & deep", "mlp", "full", "", "0"),
    ]
    assert [r["cell"] for r in rows[::4]] == ["small-full-s0", "wide_deep-full-s0"]
    # What is left out has no table: the plans of the two differ.
    sizes = {(p["variant"], p["method"]): p["full_bytes"] for p in json.loads((out / "plans.json").read_text())}
    both = sum(PreparedDataset(data).num_embeddings.values()) * 64
    assert sizes["wide & deep", "full"] == both and sizes["small", "full"] < both / 5
    assert yaml.safe_load((out / "train-small.yaml").read_text())["data"]["leave_out"] == ["feature_0"]
    assert yaml.safe_load((out / "train-wide_deep.yaml").read_text())["model"]["hyperparameters"] == {"units": [8, 4]}
    assert not (out / "train.yaml").exists()
    command = train_command(config, Cell("full", "", 1, "", "wide & deep"), out / "cells" / "x")
    assert command[command.index("--config") + 1] == str(out / "train-wide_deep.yaml")
    assert len(run(config, out)) == len(rows) and len(started(fake)) == len(rows)
    with pytest.raises(ValueError, match="another variants.wide & deep.training.epochs"):
        changed = config.variants["wide & deep"].model_copy(deep=True)
        changed.training.epochs = 3
        run(config.model_copy(update={"variants": {**config.variants, "wide & deep": changed}}), out)


def test_the_report_of_variants(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    run(varied(data, "full,hash", "50%"), out)
    summary = summarize(out, resamples=20)
    by_place = {(r["variant"], r["method"], r["seed"]): float(r["test_auc"]) for r in read(out)}
    for variant, method, other in [
        ("small", "hash", ("small", "full")),
        ("wide & deep", "hash", ("wide & deep", "full")),
        ("wide & deep", "full", ("small", "full")),
    ]:
        point = summary.point(method, "50%" if method == "hash" else "", variant)
        assert point is not None
        wanted = [by_place[variant, method, seed] - by_place[(*other, seed)] for seed in "01"]
        assert [d.difference for d in point.differences] == pytest.approx(wanted, abs=1e-12)
    first, second = (summary.point("full", "", variant) for variant in ("small", "wide & deep"))
    assert first is not None and first.differences == [] and second is not None
    # Full tables in another precision are compared with full of their own variant.
    served = replace(second, spec={"kind": "full", "precision": "int8"}, method="full(precision=int8)")
    references = [replace(summary, points=[*summary.points, served]).reference(point) for point in (served, second)]
    assert [point.place for point in references if point] == [("wide & deep", "full", ""), ("small", "full", "")]
    text = markdown(summary, 20, [])
    assert "Differences are to full of the same variant; those of full itself are to full of small." in text
    assert "2 variants of mlp · 2 seeds" in text and "| wide & deep | hash" in text


def test_variants_without_budgets(data: Path, fake: Path, tmp_path: Path) -> None:
    from embtables.sweeps.report import write_report

    out = tmp_path / "sweep"
    run(varied(data), out)
    assert [row["method"] for row in read(out)] == ["full"] * 4
    assert [path.name for path in write_report(out, resamples=20).files] == ["report.html", "report.md"]
    with pytest.raises(ValueError, match="method hash needs a budget: give for example --budgets"):
        varied(data, "full,hash")


def test_a_variant_with_a_wrong_field_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training.epoch is not a field"):
        load_config(fields={"training.epoch": 3})
    trains = {"odd": load_config(fields={"data.leave_out": ["nothing"]})}
    with pytest.raises(ValueError, match=r"variant 'odd': .* has no feature 'nothing'"):
        run(describe(data, parse_methods("full"), [], 1, load_config(), trains), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    for fields, cure in (
        ({"tables.method": "hash"}, "tables.method, .*: give --methods"),
        ({"tables.budget": "10%"}, "tables.budget, .*: give --budgets"),
        ({"training.seed": 1}, "training.seed, .*: give --seeds"),
        ({"tables.learning_rate": 0.3}, "tables.learning_rate, .*: leave out --tune"),
    ):
        trains = {"like no other": load_config(fields=fields)}
        with pytest.raises(ValueError, match=f"variant 'like no other' sets {cure}"):
            describe(data, parse_methods("full"), [], 1, load_config(), trains, tune={"tables.learning_rate": [0.1]})
    with pytest.raises(ValueError, match="two cells would both be named 'a_b-full-s0': variants"):
        describe(
            data,
            parse_methods("full"),
            [],
            1,
            load_config(),
            {"a b": load_config(), "a_b": load_config()},
        )


def test_a_wrong_hyperparameter_costs_seconds(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--variant", "one: {model.name: mlp}", "--preset", "bars", "--set", "model.hyperparameters.top_units=[8]"]
    assert main(["sweep", str(data), *flags, "--out", str(tmp_path / "sweep")]) == 2
    assert "variant 'one': model 'mlp' has no hyperparameter 'top_units'" in capfd.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_variants_from_the_command_line(
    data: Path, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_module, "run_sweep", partial(run_sweep, command=fake_cell))
    flags = ["--variant", "one: {model.name: mlp, data.leave_out: [feature_0]}", "--variant", "two: {tables.l2: 0.1}"]
    flags += ["--preset", "bars", "--seeds", "1", "--out", str(tmp_path / "sweep")]
    assert main(["sweep", str(data), *flags]) == 0
    one, two = (yaml.safe_load((tmp_path / "sweep" / f"train-{name}.yaml").read_text()) for name in ("one", "two"))
    assert one["model"]["hyperparameters"] == {"units": [400, 400, 400], "batch_norm": True}
    assert two["model"]["name"] == "dlrm" and two["tables"]["l2"] == 0.1 and two["training"]["epochs"] == 100
    assert [row["variant"] for row in read(tmp_path / "sweep")] == ["one", "two"]
    assert main(["report", str(tmp_path / "sweep")]) == 0
    assert "2 variants of mlp, dlrm" in capfd.readouterr().out
    config = summarize(tmp_path / "sweep", resamples=20).config
    alone = config.model_copy(update={"variants": {"one": config.variants["one"]}})
    assert replace(summarize(tmp_path / "sweep", resamples=20), config=alone).title == "tiny · 1 variant of mlp"
