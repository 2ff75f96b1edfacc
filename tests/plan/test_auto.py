"""What ``auto`` stands for, and how what tables are worth changes the sizes that are solved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embtables import EmbeddingTables, InfeasibleBudget, TableConfig, plan
from embtables.formats import row_format
from embtables.methods import Banded, kinds
from embtables.methods.ranking import counts_by_rank, runs_by_rank
from embtables.plan.probe import Entrant, Probe, Race
from embtables.plan.solver import Plan

TABLES = [TableConfig("a", 1000, 16), TableConfig("b", 500, 16), TableConfig("c", 20, 16)]
FULL_BYTES = 4 * 16 * 1520


def zipf(n: int, exponent: float) -> np.ndarray:
    counts = np.floor(30_000 / np.arange(1, n + 1) ** exponent).astype(np.int64)
    counts[:2] = 0  # reserved for values that are missing or unseen
    return counts


COUNTS = {"a": zipf(1000, 1.1), "b": zipf(500, 0.8), "c": zipf(20, 0.5)}


def entrant(method: Any, loss: float, error: float = 0.001) -> Entrant:
    return Entrant(method=method, loss=loss, error=error, valid=0.75 - loss, epochs=3)


def probe(*races: tuple[int, list[Entrant]], **worth: float) -> Probe:
    found = tuple(Race(budget_bytes=budget, entrants=tuple(entrants)) for budget, entrants in races)
    fields = {"data": "d" * 64, "model": "dlrm", "monitor": "auc", "reference": 0.75, "reference_epochs": 3}
    return Probe(**fields, regularization=0.1, tables=worth, how=dict.fromkeys(worth, "ablation"), races=found)


def methods_of(solved: Plan) -> dict[str, str]:
    return {table.name: g.method.kind for g in solved.groups for table in g.group.tables}


# ---- without a probe -------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("budget", ["0.3%", "1%", "10%", "30%"])
def test_counts_alone_speak_for_bands(budget: str) -> None:
    solved = plan(TABLES, "auto", budget, COUNTS)
    same = plan(TABLES, Banded(precision="int8"), budget, COUNTS)
    assert solved == same and solved.fingerprint == same.fingerprint
    (choice,) = solved.explain()["choices"]
    assert choice["method"] == {"kind": "banded", "precision": "int8"} and choice["tables"] == "*"
    assert choice["expected"] is None and choice["runner_up"] is None
    assert "counts of ids alone" in str(solved) and "embtables probe" in str(solved)
    assert EmbeddingTables(solved).finalize().memory().inference_bytes == solved.inference_bytes


@pytest.mark.core
def test_a_budget_for_all_tables_keeps_them_as_they_are() -> None:
    solved = plan(TABLES, "auto", "100%", COUNTS)
    assert solved == plan(TABLES, "full", "100%", COUNTS)
    assert solved.explain()["choices"][0]["expected"] == {"loss": 0.0, "low": 0.0, "high": 0.0}
    # A precision that is asked for is kept to.
    assert plan(TABLES, {"kind": "auto", "precision": "int4"}, "100%", COUNTS).bytes_by_kind()["scales"] > 0


@pytest.mark.core
def test_a_larger_budget_never_yields_smaller_tables() -> None:
    sizes = [plan(TABLES, "auto", budget, COUNTS).inference_bytes for budget in range(10, FULL_BYTES + 1, 997)]
    assert sizes == sorted(sizes) and all(size <= budget for size, budget in zip(sizes, range(10, 10**6, 997)))


@pytest.mark.core
def test_pinned_tables_stay_as_they_are() -> None:
    solved = plan(TABLES, {"b": "full", "*": "auto"}, "60%", COUNTS)
    assert methods_of(solved) == {"a": "banded", "b": "full", "c": "banded"}
    assert {line["table"]: line["inference_bytes"] for line in solved.lines()}["b"] == 4 * 16 * 500
    assert solved.explain()["choices"][0]["tables"] == "a, c"
    assert solved.inference_bytes <= int(0.6 * FULL_BYTES)
    with pytest.raises(InfeasibleBudget, match="the floor is 32,000 bytes"):
        plan(TABLES, {"b": "full", "*": "auto"}, "10%", COUNTS)


@pytest.mark.core
def test_what_auto_cannot_do_is_one_sentence() -> None:
    with pytest.raises(ValueError, match='^method auto needs a budget, such as budget="10%"'):
        plan(TABLES, "auto", None, COUNTS)
    with pytest.raises(ValueError, match="^table 'a': method banded needs to know how often ids occur"):
        plan(TABLES, "auto", "10%")
    with pytest.raises(ValueError, match='^there is nothing to explain: method "auto" had no part'):
        plan(TABLES, "hash", "10%").explain()
    with pytest.raises(ValueError, match="^unknown method 'autom' .did you mean 'auto'"):
        plan(TABLES, "autom", "10%")
    with pytest.raises(ValueError, match="^table 'b': method banded, field 'worth' does not say"):
        plan(TABLES, Banded(worth={"a": 1.0, "c": 1.0}), "10%", COUNTS)
    with pytest.raises(ValueError, match="method banded, field 'worth.a'"):
        Banded(worth={"a": -1.0})
    assert "auto" not in kinds()


# ---- what tables are worth -------------------------------------------------------------------------------------------


def value(solved: Plan, worth: dict[str, float], prior: float = 100.0) -> float:
    """What the ids of a plan of bands are worth, in scalar loops."""
    total = 0.0
    for g in solved.groups:
        for table in g.group.tables:
            counts = COUNTS[table.name].astype(float)
            ranked = [counts.max()] * 2 + sorted(counts[2:], reverse=True)
            own = [n * n / (n + prior) if n else 0.0 for n in ranked]
            values = g.layout.entries[table.name].values
            rows, precisions = values.get("rows", len(own)), values.get("precisions", [g.group.format.name])
            rows = [rows] if isinstance(rows, int) else rows
            kept, first = 0.0, 0
            for number, precision in zip(rows, precisions):
                kept += sum(own[first : first + number]) * rounding(precision)
                first += number
            total += worth[table.name] * kept / sum(own)
    return total


def rounding(precision: str) -> float:
    """1 − E‖x − x̂‖²/E‖x‖² of normal rows of 16, by rounding them."""
    rows = np.random.default_rng(1).standard_normal((4096, 16)).astype(np.float32)
    import torch

    from embtables.lookup.stored_rows import StoredRows

    stored = StoredRows(row_format(precision), 16)
    stored.add(len(rows))
    back = stored.read(*row_format(precision).pack(torch.from_numpy(rows)), torch.arange(len(rows))).numpy()
    return 1 - float(((back - rows) ** 2).sum() / (rows**2).sum())


@pytest.mark.parametrize("worth", [{"a": 0.1, "b": 0.001, "c": 0.01}, {"a": 0.001, "b": 0.2, "c": 0.001}])
@pytest.mark.parametrize("budget", [600, 2000, 6000])
def test_bytes_go_where_they_are_worth_most(worth: dict[str, float], budget: int) -> None:
    """No plan for other worths of the same tables is worth as much; and none beats it by more than a row's bytes."""
    best = value(plan(TABLES, Banded(precision="int8", worth=worth), budget, COUNTS), worth)
    for a, b in itertools.product([0.01, 0.1, 1, 10, 100], repeat=2):
        others = {"a": worth["a"] * a, "b": worth["b"] * b, "c": worth["c"]}
        other = value(plan(TABLES, Banded(precision="int8", worth=others), budget, COUNTS), worth)
        assert other <= best * 1.002


@pytest.mark.core
def test_tables_that_are_worth_nothing_come_last() -> None:
    def own_bytes(budget: str, **worth: float) -> dict[str, int]:
        solved = plan(TABLES, Banded(precision="int8", worth=worth), budget, COUNTS)
        return {line["table"]: line["inference_bytes"] for line in solved.lines()}

    assert own_bytes("2%", a=1, b=0, c=1)["b"] == 0
    assert own_bytes("2%", a=0, b=0, c=1) == own_bytes("2%", a=0, b=0, c=7)
    everything = own_bytes("90%", a=1, b=0, c=1)
    assert everything["b"] == row_format("int8").slab_bytes(500, 16)


@pytest.mark.core
def test_worth_says_what_counts_say_if_it_is_in_their_proportion() -> None:
    own = {name: float((c / np.maximum(c + 100.0, 1) * c).sum()) for name, c in COUNTS.items()}
    # Ids 0 and 1 count as often as the most frequent one.
    own = {name: own[name] + 2 * float(COUNTS[name].max() ** 2 / (COUNTS[name].max() + 100)) for name in own}
    weighted = plan(TABLES, Banded(precision="int8", worth=own), "3%", COUNTS)
    plain = plan(TABLES, Banded(precision="int8"), "3%", COUNTS)
    assert [g.layout for g in weighted.groups] == [g.layout for g in plain.groups]
    assert plain.groups[0].method.to_dict() == Banded(precision="int8").to_dict() and "worth" not in str(
        plain.to_dict()
    )


def test_the_share_that_is_kept_is_that_of_scalar_loops() -> None:
    for budget, worth in itertools.product(["0.5%", "3%", "20%"], [None, {"a": 1.0, "b": 0.1, "c": 3.0}]):
        spec = {"kind": "auto"}
        known = None if worth is None else probe(**worth)
        solved = plan(TABLES, spec, budget, COUNTS, probe=known)
        for table in solved.explain()["tables"]:
            only = {"a": 0.0, "b": 0.0, "c": 0.0, table["table"]: 1.0}
            # What rounding leaves is measured on other random rows: 512 of them, of which one bit keeps 0.637 ± 0.003.
            assert table["kept"] == pytest.approx(value(solved, only), rel=5e-3, abs=1e-6)


# ---- with a probe ----------------------------------------------------------------------------------------------------

DROP_B = {"b": {"kind": "drop_feature", "keep_small": False}, "*": {"kind": "banded", "precision": "int4"}}
RACED = probe(
    (500, [entrant(DROP_B, 0.03)]),
    (5000, [entrant({"kind": "robe", "precision": "int4"}, 0.01, 0.002), entrant("hash", 0.02)]),
    a=0.05,
    b=-0.001,
    c=0.01,
)


@pytest.mark.core
def test_the_winner_of_the_nearest_race_is_taken() -> None:
    solved = plan(TABLES, "auto", 5000, COUNTS, probe=RACED)
    assert set(methods_of(solved).values()) == {"robe"} and solved.optimizer is not None
    assert solved.optimizer.kind == "adagrad"  # blocks have no rows
    (choice,) = solved.explain()["choices"]
    assert choice["expected"] == pytest.approx({"loss": 0.01, "low": 0.008, "high": 0.012})
    assert choice["runner_up"] == pytest.approx({"method": "hash", "loss": 0.02, "low": 0.019, "high": 0.021})
    assert "nearest" not in choice["why"]
    solved = plan(TABLES, "auto", 500, COUNTS, probe=RACED)
    assert methods_of(solved) == {"a": "banded", "b": "drop_feature", "c": "banded"}
    assert 475 <= solved.inference_bytes <= 500


@pytest.mark.core
def test_losses_between_two_races_lie_on_a_line_of_the_logarithm() -> None:
    both = probe((500, [entrant("hash", 0.05), entrant("robe", 0.06)]), (50_000, [entrant("hash", 0.01, 0.003)]))
    (choice,) = plan(TABLES, "auto", 4000, COUNTS, probe=both).explain()["choices"]
    share = np.log(4000 / 500) / np.log(50_000 / 500)
    loss = 0.05 - share * 0.04
    assert choice["expected"] == pytest.approx({"loss": loss, "low": loss - 0.003, "high": loss + 0.003})
    assert "nearest budget" in choice["why"]
    # Of a method that ran in one of the two alone nothing is known in between but what it lost there.
    (choice,) = plan(TABLES, "auto", 1500, COUNTS, probe=RACED).explain()["choices"]
    assert choice["method"] == DROP_B and choice["expected"] == pytest.approx(
        {"loss": 0.03, "low": 0.029, "high": 0.031}
    )
    passed = probe((15_000, [entrant("hash", 0.02)]), (90_000, [entrant("full", 0.0), entrant("unified", 0.03)]))
    (choice,) = plan(TABLES, "auto", 70_000, COUNTS, probe=passed).explain()["choices"]
    assert choice["method"] == "unified" and choice["expected"] == pytest.approx(
        {"loss": 0.03, "low": 0.0, "high": 0.06}
    )
    beyond = plan(TABLES, "auto", 9000, COUNTS, probe=RACED).explain()["choices"][0]["expected"]
    assert beyond == pytest.approx({"loss": 0.01, "low": 0.0, "high": 0.02})


@pytest.mark.core
def test_what_does_not_fit_or_has_no_such_tables_is_passed_over() -> None:
    raced = probe((400, [entrant("full", 0.0), entrant({"z": "hash", "a": "hash"}, 0.0), entrant("hash", 0.04)]))
    solved = plan(TABLES, "auto", 400, COUNTS, probe=raced)
    assert set(methods_of(solved).values()) == {"hash"}
    assert "the best that fits of 3" in solved.explain()["choices"][0]["why"]
    none = probe((400, [entrant("full", 0.0)]))
    assert "no probe" in plan(TABLES, "auto", 400, COUNTS, probe=none).explain()["choices"][0]["why"]


@pytest.mark.core
def test_of_some_of_the_tables_no_loss_is_expected() -> None:
    raced = probe((9000, [entrant("hash", 0.01), entrant("robe", 0.02)]))
    (choice,) = plan(TABLES, {"c": "full", "*": "auto"}, 9000, COUNTS, probe=raced).explain()["choices"]
    assert (choice["method"], choice["expected"], choice["runner_up"]) == ("hash", None, None)
    assert "in which all tables took part" in choice["why"]


@pytest.mark.core
def test_numbers_without_measure_are_refused_or_harmless() -> None:
    for fields in ({"budget_bytes": 10**400}, {"budget_bytes": 0}, {"budget_bytes": 5, "entrants": ()}):
        with pytest.raises(ValueError):
            Race(**{"budget_bytes": 5, "entrants": (entrant("hash", 0),), **fields})
    for method in ("auto", {"kind": "auto"}, {"a": "auto", "*": "hash"}, {}):
        with pytest.raises(ValueError):
            entrant(method, 0)
    with pytest.raises(ValueError):
        probe(a=1e308)
    with pytest.raises(ValueError, match="^probe must be a Probe, or the path of one, not a int"):
        plan(TABLES, "auto", "5%", COUNTS, probe=5)  # type: ignore[arg-type]
    with pytest.raises(OSError):
        plan(TABLES, "auto", "5%", COUNTS, probe="nowhere/probe.json")
    none = {name: np.zeros_like(counts) for name, counts in COUNTS.items()}
    for worth in ({"a": 1e9, "b": 0.0, "c": 1e-9}, {"a": 0.0, "b": 0.0, "c": 0.0}):
        for counts in (none, COUNTS):
            solved = plan(TABLES, "auto", "5%", counts, probe=probe(**worth))
            assert 0.9 * 0.05 * FULL_BYTES < solved.inference_bytes <= 0.05 * FULL_BYTES
    assert "nothing that raced fits" in str(
        plan(TABLES, "auto", 400, COUNTS, probe=probe((400, [entrant("full", 0.0)]), a=1.0, b=0.0, c=0.0))
    )


@pytest.mark.core
def test_what_tables_are_worth_is_used_without_a_race() -> None:
    worth = {"a": 0.05, "b": -0.01, "c": 0.01}
    solved = plan(TABLES, "auto", "2%", COUNTS, probe=probe(**worth))
    expected = Banded(precision="int8", worth={"a": 0.05, "b": 0.0, "c": 0.01})
    assert [g.layout for g in solved.groups] == [g.layout for g in plan(TABLES, expected, "2%", COUNTS).groups]
    told = str(solved)
    assert "what tables are worth (auc lost without them): a 0.0500, c 0.0100, b -0.0100" in told
    assert "worth=…" in told and "0.05," not in told.split("auto:")[1].splitlines()[0]


@pytest.mark.core
def test_patterns_share_a_budget_by_what_their_tables_are_worth() -> None:
    def own(known: Probe | None) -> dict[str, int]:
        solved = plan(TABLES, {"a": "hash", "*": "hash"}, 9000, COUNTS, probe=known)
        return {line["table"]: line["inference_bytes"] for line in solved.lines()}

    rows = own(probe(a=0.01, b=0.03, c=0.0))
    assert rows["a"] == pytest.approx(9000 / 4, abs=64)
    assert own(probe(a=0.01))["a"] == own(None)["a"] == pytest.approx(9000 * 1000 / 1520, abs=64)


@pytest.mark.core
def test_a_probe_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    RACED.save(path)
    assert Probe.load(path) == RACED == Probe.load(tmp_path)
    assert plan(TABLES, "auto", 5000, COUNTS, probe=path) == plan(TABLES, "auto", 5000, COUNTS, probe=RACED)
    whole = path.read_text(encoding="utf-8")
    for damaged, sentence in (
        (whole[:-5], "not valid JSON"),
        ("[]", "is no probe, or a damaged one"),
        (whole.replace('"hash"', '"hush"'), "unknown method 'hush'"),
        (whole.replace('"loss": 0.03', '"loss": NaN'), "loss: Input should be a finite number"),
        (whole.replace('"format_version": 1', '"format_version": 2'), "format_version"),
        (whole.replace('"reference"', '"referee"'), "reference"),
    ):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=f"probe.json .*{sentence}"):
            Probe.load(path)


def test_thousands_of_tables_are_planned_in_seconds() -> None:
    rng = np.random.default_rng(0)
    many = [TableConfig(f"t{i}", int(n), 16) for i, n in enumerate(rng.integers(10, 20_000, 1000))]
    counts = {t.name: zipf(int(t.num_embeddings or 0), rng.uniform(0.5, 1.5)) for t in many}
    worth = {t.name: float(w) for t, w in zip(many, rng.exponential(size=1000))}
    solved = plan(many, "auto", "1%", counts, probe=probe(**worth))
    assert 0.99 <= solved.inference_bytes / (0.01 * (solved.full_bytes or 0)) <= 1
    assert len(str(solved).splitlines()) < 80 and "more" in str(solved)


@pytest.mark.core
def test_runs_of_counts_are_those_of_the_ranking() -> None:
    rng = np.random.default_rng(0)
    for number in range(400):
        counts = rng.integers(0, 6, int(rng.integers(1, 12)))
        if number % 2:  # as prepared data number ids
            counts[2:] = np.sort(counts[2:])[::-1]
        values, starts, ends = runs_by_rank(counts)
        assert np.array_equal(np.repeat(values, ends - starts), counts_by_rank(counts))
        assert (np.diff(values) < 0).all() and starts[0] == 0 and np.array_equal(starts[1:], ends[:-1])
