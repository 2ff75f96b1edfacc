"""What ``plan`` promises about bytes, over random tables, methods and budgets; and what it refuses."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import (
    NEEDS_COUNTS,
    PRECISIONS,
    Case,
    all_methods,
    cases,
    counted_bytes,
    examples,
    falling_counts,
    log_integers,
    method_id,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embtables import SGD, Adam, EmbeddingTables, InfeasibleBudget, Plan, RowWiseAdagrad, TableConfig, methods, plan
from embtables.methods import Method, kinds

pytestmark = pytest.mark.core

TRAINED = ["fp32", "bf16"]
HASHES = ["hash", "multi_hash", "unified", "robe"]


def solve(case: Case, budget: Any, **others: Any) -> Plan:
    # Robe has no rows, and so refuses the default optimizer.
    optimizer = others.pop("optimizer", "adagrad")
    return plan(case.tables, case.method, budget, case.frequencies, optimizer, precision=case.precision, **others)


def feasible(case: Case, budget: int, **others: Any) -> Plan | None:
    try:
        return solve(case, budget, **others)
    except InfeasibleBudget:
        return None


def own_bytes(solved: Plan) -> dict[str, int]:
    frame = solved.to_pandas()
    own = frame[frame["embedding_dim"].notna()]
    assert frame["inference_bytes"].sum() == solved.inference_bytes
    return dict(zip(own["table"], own["inference_bytes"]))


@pytest.mark.slow
@given(
    cases(max_rows=2_000, precisions=PRECISIONS)
    | cases(max_rows=10**9, use=[k for k in kinds() if k not in NEEDS_COUNTS], precisions=PRECISIONS),
    st.data(),
)
@settings(max_examples=examples(250))
def test_never_above_the_budget_and_infeasible_exactly_below_the_floor(case: Case, data: st.DataObject) -> None:
    full = case.full_bytes
    small = data.draw(log_integers(1, full + 100))
    large = data.draw(log_integers(small, 2 * full + 200) | st.integers(small, small + 300))
    first, second = feasible(case, small), feasible(case, large)
    if first is None:
        with pytest.raises(InfeasibleBudget) as caught:
            solve(case, small)
        floor = caught.value.floor_bytes
        # Of a row or two the scales alone may be more than the rows are in fp32.
        packed = plan(case.tables, "full", precision=case.precision).inference_bytes
        assert small < floor <= max(full, packed) and f"{floor:,}" in str(caught.value)
        assert 0 < solve(case, floor).inference_bytes <= floor
        with pytest.raises(InfeasibleBudget):
            solve(case, floor - 1)
        assert (second is not None) == (large >= floor)
    else:
        assert first.inference_bytes <= small and first.full_bytes == full
        assert second is not None and second.inference_bytes <= large
        assert first.inference_bytes <= second.inference_bytes
        before, after = own_bytes(first), own_bytes(second)
        assert all(before[name] <= after[name] for name in before), (before, after)


@given(
    cases(max_rows=300, precisions=PRECISIONS),
    st.floats(0.02, 1.1),
    st.tuples(st.sampled_from(["sgd", "adagrad", "adam"]), st.sampled_from(TRAINED)) | st.just((None, "fp32")),
)
@settings(max_examples=examples(150))
def test_equals_the_built_tensors_to_the_byte(case: Case, share: float, training: tuple[str | None, str]) -> None:
    budget = max(1, int(share * case.full_bytes))
    others: dict[str, Any] = dict(zip(("optimizer", "training_precision"), training))
    try:
        solved = solve(case, budget, **others)
    except InfeasibleBudget as error:
        solved = solve(case, error.floor_bytes, **others)
    tables = EmbeddingTables(solved)
    state = tables.store.optimizer_state()
    extra = sum(t.untyped_storage().nbytes() for name, t in state.items() if name != "hyper")
    gradients = sum(p.numel() * p.element_size() for p in tables.parameters())
    assert counted_bytes(tables) + extra + gradients == solved.training_bytes == tables.memory().training_bytes
    assert tables.memory().inference_bytes == solved.inference_bytes
    tables.finalize()
    assert counted_bytes(tables) == solved.inference_bytes == tables.memory().inference_bytes


@given(cases(max_rows=500, precisions=PRECISIONS), st.floats(0.02, 1.0), st.sampled_from(TRAINED))
@settings(max_examples=examples(100))
def test_survives_json(case: Case, share: float, trained: str) -> None:
    solved = feasible(case, max(1, int(share * case.full_bytes)), training_precision=trained)
    assume(solved is not None)
    assert solved is not None
    again = Plan.from_dict(json.loads(json.dumps(solved.to_dict())))
    assert again == solved and again.fingerprint == solved.fingerprint
    assert again.inference_bytes == solved.inference_bytes and again.training_bytes == solved.training_bytes
    assert str(again) == str(solved)


@given(cases(max_rows=10**7, min_rows=10**5, use=HASHES, patterns=False), st.floats(0.0005, 1.0), st.booleans())
@settings(max_examples=examples(75))
def test_hash_like_methods_use_the_budget(case: Case, share: float, counted: bool) -> None:
    if counted:
        tables = [TableConfig(t.name, 10**5, t.embedding_dim) for t in case.tables]
        case = Case(tables, case.method, {t.name: falling_counts(10**5) for t in tables})
    budget = int(share * case.full_bytes)
    assert 0.95 * budget <= solve(case, budget).inference_bytes <= budget


@pytest.mark.parametrize("kind", [k for k in kinds() if k not in (*NEEDS_COUNTS, "full")])
def test_a_billion_ids_are_planned_without_a_table_of_them(kind: str) -> None:
    tables = [TableConfig("ids", 10**9, 16), TableConfig("small", 10, 16)]
    try:
        solved = plan(tables, kind, "1%", optimizer="adagrad")
    except InfeasibleBudget as error:
        solved = plan(tables, kind, error.floor_bytes, optimizer="adagrad")
    assert solved.inference_bytes <= (solved.budget_bytes or 0)


@pytest.mark.parametrize("method", [{"kind": "robe"}, {"kind": "robe", "block_size": 32}])
@pytest.mark.parametrize("shape", [(3, 2), (2, 8), (1, 1)])
def test_tables_smaller_than_a_block_are_stored_in_full(method: dict[str, Any], shape: tuple[int, int]) -> None:
    solved = plan([TableConfig("a", *shape)], method, "100%", optimizer="adagrad")
    assert solved.inference_bytes == 4 * shape[0] * shape[1]


@pytest.mark.parametrize("kind", HASHES)
@pytest.mark.parametrize("budget", [2**63, 10**30])
def test_no_budget_is_too_large_for_raw_ids(kind: str, budget: int) -> None:
    solved = plan([TableConfig("a", None, 8)], kind, budget, optimizer="adagrad", precision="int4")
    assert 2**40 < solved.inference_bytes <= budget


@given(cases(max_rows=500), st.floats(0.05, 1.0), st.floats(0.1, 2.5), st.sampled_from(TRAINED))
@settings(max_examples=examples(100))
def test_training_budget_is_respected(case: Case, share: float, training_share: float, trained: str) -> None:
    free = feasible(case, max(1, int(share * case.full_bytes)), training_precision=trained)
    assume(free is not None)
    assert free is not None
    bound = max(1, int(training_share * case.full_bytes))
    budget = free.budget_bytes
    try:
        bounded = solve(case, budget, training_budget=bound, training_precision=trained)
    except InfeasibleBudget as error:
        assert error.floor_bytes > bound and "training" in str(error)
        # Larger tables may train in less, where narrow rows with a state of their own become full ones without.
        least = solve(case, budget, training_budget=error.floor_bytes, training_precision=trained)
        assert least.training_bytes <= error.floor_bytes
        with pytest.raises(InfeasibleBudget):
            solve(case, budget, training_budget=error.floor_bytes - 1, training_precision=trained)
    else:
        assert bounded.training_bytes <= bound and bounded.inference_bytes <= free.inference_bytes
        assert bounded == free or free.training_bytes > bound


def test_frequencies_move_bytes_to_the_table_that_is_looked_up() -> None:
    tables = [TableConfig("hot", 50_000, 8), TableConfig("cold", 50_000, 8)]
    counts = {"hot": np.full(50_000, 100), "cold": np.full(50_000, 1)}
    own = own_bytes(plan(tables, "hash", "10%", counts))
    # m is proportional to the root of the traffic, here 10 to 1 (methods.md, the Lagrange solution of Σ T/m).
    assert own["hot"] / own["cold"] == pytest.approx(10, rel=0.01)
    even = own_bytes(plan(tables, "hash", "10%"))
    assert even["hot"] == even["cold"]


def test_tables_that_are_dropped_by_name_leave_their_bytes_to_the_others() -> None:
    tables = [TableConfig("a", 5_000, 16), TableConfig("b", 400, 16), TableConfig("c", 600, 16)]
    dropped = {"a": {"kind": "drop_feature", "keep_small": False}, "*": "hash"}
    for budget in (128, 7_000, 63_999, 64_000, 10**9):
        solved, alone = plan(tables, dropped, budget), plan(tables[1:], "hash", budget)
        assert solved.groups[0].layout.serving.num_bytes == 0
        assert solved.groups[1].layout.serving == alone.groups[0].layout.serving


def test_patterns_share_one_budget_and_the_first_that_matches_counts() -> None:
    tables = [TableConfig(n, 1000, 8) for n in ("user_id", "user_city", "item_id")]
    solved = plan(tables, {"user_id": "full", "user_*": "hash", "*": {"kind": "hash"}}, "60%")
    lines = solved.to_pandas().set_index("table")
    assert list(lines["method"]) == ["full", "hash", "hash"]
    assert lines.loc["user_id", "inference_bytes"] == 32_000
    assert solved.inference_bytes <= 0.6 * 96_000
    assert [table.name for table in solved.tables] == ["user_id", "user_city", "item_id"]


def test_full_needs_no_budget_and_refuses_one_that_is_too_small() -> None:
    tables = [TableConfig("a", 100, 4), TableConfig("b", 10, 3, on_out_of_range="oov")]
    solved = plan(tables, "full")
    assert solved.budget_bytes is None and solved.inference_bytes == solved.full_bytes == 4 * (100 * 4 + 11 * 3)
    with pytest.raises(InfeasibleBudget) as caught:
        plan(tables, "full", "50%")
    assert caught.value.floor_bytes == 4 * (100 * 4 + 11 * 3)


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 1), ("adagrad", 2), (None, 2)])
def test_training_bytes_of_full(optimizer: str | None, factor: int) -> None:
    assert plan([TableConfig("a", 100, 8)], "full", optimizer=optimizer).training_bytes == factor * 3200


def test_training_bytes_of_row_wise_state_and_of_adam() -> None:
    table = TableConfig("a", 100, 8)
    assert plan([table], "full", optimizer=RowWiseAdagrad()).training_bytes == 3200 + 400
    assert plan([table], "full", optimizer=Adam()).training_bytes == 3 * 3200 + 8


def test_ids_without_a_vocabulary() -> None:
    table = TableConfig("raw", None, 16)
    solved = plan([table], "hash", 64_000)
    assert solved.full_bytes is None and solved.inference_bytes == 64_000
    with pytest.raises(ValueError, match="give bytes"):
        plan([table], "hash", "10%")
    with pytest.raises(ValueError, match="table 'raw'.*num_embeddings"):
        plan([table], "full", 64_000)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_prints_every_table_and_its_bytes(method: Method) -> None:
    tables = [TableConfig("users", 4000, 8), TableConfig("cities", 30, 8)]
    counts = {t.name: falling_counts(t.num_embeddings or 0) for t in tables}
    text = str(plan(tables, method, None if method.kind == "full" else "50%", counts, "adagrad"))
    assert "users" in text and "cities" in text and method.kind in text
    assert "inference" in text and "training" in text


def test_the_same_arguments_give_the_same_plan_and_a_seed_is_part_of_it() -> None:
    tables = [TableConfig("a", 1000, 8)]
    assert plan(tables, "hash", "10%") == plan(tables, "hash", "10%")
    assert plan(tables, "hash", "10%").fingerprint != plan(tables, "hash", "10%", hash_seed=1).fingerprint
    # Neither budget nor optimizer changes an address, so weights may move between such plans.
    other = plan(tables, "hash", plan(tables, "hash", "10%").inference_bytes + 1, optimizer="adam")
    assert plan(tables, "hash", "10%").fingerprint == other.fingerprint


# ---- bad input: every message names the culprit ----------------------------------------------------------------------

TABLES = [TableConfig("user", 100, 8), TableConfig("item", 50, 8)]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nope", "unknown method 'nope'.*hash"),
        ({"kind": "nope"}, "unknown method.*nope"),
        ({"kind": "hash", "size": 3}, "method hash has no field 'size'"),
        ({"kind": "multi_hash", "num_hashes": 1}, "method multi_hash, field 'num_hashes'.*not 1"),
        ({"kind": "multi_hash", "operation": "max"}, "method multi_hash, field 'operation'"),
        ({"kind": "banded", "precisions": ["int4", "int3"]}, "method banded, field 'precisions': unknown.*'int3'"),
        ({"kind": "banded", "widths": [4, 0]}, "method banded, field 'widths.1'.*not 0"),
        ({"user": "hash"}, "matches table 'item'"),
        ({"user": "hash", "*": "hash", "none_*": "hash"}, "pattern 'none_\\*'"),
        ({"*": "nope"}, "unknown method 'nope'"),
        ({}, "empty mapping"),
        ({1: "hash"}, "patterns of table names to methods, and 1 is no text"),
        (7, "unknown method 7"),
        (None, "unknown method None"),
    ],
)
def test_bad_methods(method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(TABLES, method, "10%")


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        ({"nobody": [1]}, "frequencies name 'nobody'"),
        ({"user": np.ones(99, int)}, "table 'user' hold 99 counts, but it has 100 ids"),
        ({"user": np.full(100, -1)}, "table 'user' hold a negative"),
        ({"user": np.full(100, np.nan)}, "table 'user' hold a negative or non-finite"),
        ({"user": np.full(100, np.inf)}, "table 'user' hold a negative or non-finite"),
        ({"user": np.full(100, 0.01)}, "table 'user' hold fractions"),
        ({"user": np.ones((10, 10), int)}, "table 'user' must be a 1-D array"),
        ({"user": ["a"] * 100}, "table 'user' must be a 1-D array"),
        ({"user": [[1], [1, 2]]}, "table 'user' must be a 1-D array"),
        ({"user": np.full(100, 2**62)}, r"table 'user' add up to more than 2\*\*62"),
        ({"user": np.full(100, 1e300)}, r"table 'user' add up to more than 2\*\*62"),
        ([1, 2], "map table names"),
    ],
)
def test_bad_frequencies(frequencies: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(TABLES, "hash", "10%", frequencies)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("lion", "unknown optimizer 'lion'"),
        ({"kind": "sgd", "eps": 1}, "optimizer sgd has no field 'eps'"),
        ({"kind": "adam", "lr": -1}, "Adam.lr must be a non-negative number, not -1"),
        ({"lr": 1}, "unknown optimizer"),
        (3, "unknown optimizer 3"),
    ],
)
def test_bad_optimizers(optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(TABLES, "hash", "10%", optimizer=optimizer)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="two tables are named 'user'"):
        plan([TABLES[0], TABLES[0]], "hash", "10%")
    with pytest.raises(ValueError, match="no tables"):
        plan([], "hash", "10%")
    with pytest.raises(ValueError, match="TableConfig, not str"):
        plan(["user"], "hash", "10%")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one table 'user'"):
        plan(TABLES[0], "hash", "10%")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hash_seed must be an integer, not '1'"):
        plan(TABLES, "hash", "10%", hash_seed="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hash needs a budget"):
        plan(TABLES, "hash")
    with pytest.raises(ValueError, match="robe.*rowwise_adagrad.*adagrad"):
        plan(TABLES, "robe", "10%", optimizer="rowwise_adagrad")
    for kind in NEEDS_COUNTS:
        with pytest.raises(ValueError, match=f"table 'user'.*{kind}.*frequencies"):
            plan(TABLES, kind, "10%")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name must be a non-empty string"),
        ({"num_embeddings": 0}, "table 't': num_embeddings.*not 0"),
        ({"num_embeddings": True}, "table 't': num_embeddings.*not True"),
        ({"num_embeddings": 2.0}, "table 't': num_embeddings"),
        ({"num_embeddings": 2**41}, "table 't': num_embeddings"),
        ({"embedding_dim": 0}, "table 't': embedding_dim.*not 0"),
        ({"feature_names": "abc"}, "table 't': feature_names"),
        ({"feature_names": None}, "table 't': feature_names"),
        ({"feature_names": ["a", "a"]}, "table 't': feature_names lists 'a' twice"),
        ({"feature_names": [3]}, "table 't': feature_names holds 3"),
        ({"pooling": "max"}, "table 't': pooling must be one of sum, mean, not 'max'"),
        ({"on_out_of_range": "clip"}, "table 't': on_out_of_range"),
        ({"num_embeddings": None, "on_out_of_range": "oov"}, "table 't': on_out_of_range"),
        ({"padding_idx": 10}, "table 't': padding_idx 10"),
        ({"padding_idx": -1}, "table 't': padding_idx -1"),
        ({"init_fn": 3}, "table 't': init_fn"),
    ],
)
def test_bad_table_configs(fields: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"name": "t", "num_embeddings": 10, "embedding_dim": 4}
    with pytest.raises(ValueError, match=message):
        TableConfig(**(values | fields))


@pytest.mark.parametrize("damage", [5, {}, {"format_version": 99}, "drop", "kind"])
def test_bad_plan_data(damage: Any) -> None:
    data = plan(TABLES, "hash", "10%").to_dict()
    if damage == "drop":
        del data["groups"]
    elif damage == "kind":
        data["groups"][0]["method"]["kind"] = "nope"
    else:
        data = damage
    with pytest.raises(ValueError, match="plan|unknown method"):
        Plan.from_dict(data)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_names_that_look_like_parts_of_the_storage_work_or_are_refused(method: Method) -> None:
    names = [method.kind, f"{method.kind}/rank", "a", "a/0", "a/1", "a/0/1", f"{method.kind}#1"]
    # The small ones are kept in full, under their own names.
    tables = [TableConfig(name, 400 if name == "a" else 4, 8) for name in names] + [TableConfig("big", 400, 8)]
    counts = {t.name: falling_counts(t.num_embeddings or 0)[::-1].copy() for t in tables}
    try:
        solved = plan(tables, method, None if method.kind == "full" else "60%", counts, "adagrad")
    except ValueError as error:
        assert "rename" in str(error) and any(f"'{name}'" in str(error) for name in names)
    else:
        built = EmbeddingTables(solved)
        assert counted_bytes(built.finalize()) == solved.inference_bytes
        with torch.no_grad():
            assert built(torch.zeros(2, len(tables), dtype=torch.int64)).shape == (2, 8 * len(tables))


def test_the_default_optimizer_suits_the_methods() -> None:
    for method, kind in (("hash", "rowwise_adagrad"), ("robe", "adagrad"), ({"user": "robe", "*": "hash"}, "adagrad")):
        optimizer = plan(TABLES, method, "20%").optimizer
        assert optimizer is not None and optimizer.kind == kind


def test_unified_says_where_it_is_a_plain_hash() -> None:
    with pytest.warns(UserWarning, match="unified looks up a single row for each id of embedding_dim 17, which is odd"):
        plan([TableConfig("user", 1000, 17), TableConfig("item", 1000, 17)], "unified", "20%")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan([TableConfig("user", 1000, 16)], "unified", "20%")
        plan([TableConfig("user", 1000, 17)], {"kind": "unified", "width": 17}, "20%")


def test_integers_of_numpy_are_integers() -> None:
    ids = np.array([3, 9, 4], dtype=np.int16)
    config = TableConfig("user", ids.max() + 1, np.int32(16), padding_idx=np.uint8(2))
    assert config == TableConfig("user", 10, 16, padding_idx=2)
    assert TableConfig("user", torch.tensor(10), 16, padding_idx=2) == config  # type: ignore[arg-type]
    solved = plan([config], "hash", np.int64(320), optimizer={"kind": "sgd", "lr": np.float32(0.5)}, hash_seed=ids[0])
    assert Plan.from_dict(json.loads(json.dumps(solved.to_dict()))) == solved
    assert solved == plan([config], "hash", 320, optimizer=SGD(lr=0.5), hash_seed=3)


@pytest.mark.parametrize(
    ("method", "guess"),
    [
        ("Hash", "hash"),
        ("multi-hash", "multi_hash"),
        ("mixed dimension", "mixed_dimension"),
        ("compositonal", "compositional"),
    ],
)
def test_a_method_that_is_nearly_right_is_guessed(method: str, guess: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown method '{method}' \(did you mean '{guess}'\?\): choose one of"):
        plan(TABLES, method, "10%")
    with pytest.raises(ValueError, match=r"unknown optimizer 'Row-wise_Adagrad' \(did you mean 'rowwise_adagrad'\?\)"):
        plan(TABLES, "hash", "10%", optimizer="Row-wise_Adagrad")
    with pytest.raises(ValueError, match="unknown method 'xyz': choose one of"):
        plan(TABLES, "xyz", "10%")


def test_a_budget_without_its_percent_sign_is_guessed() -> None:
    with pytest.raises(InfeasibleBudget, match='of 10 bytes is too small.*A share .* has a percent sign: "10%"'):
        plan(TABLES, "hash", "10")
    with pytest.raises(InfeasibleBudget) as caught:
        plan(TABLES, "full", 101)
    assert "percent" not in str(caught.value)


def test_a_plan_is_short_in_a_console_and_a_table_in_a_notebook() -> None:
    solved = plan([TableConfig(f"<t{i}>", 1000, 16) for i in range(26)], "hash", "10%")
    assert repr(solved) == f"<Plan of 26 tables, hash: {solved.inference_bytes:,} bytes>"
    html = solved._repr_html_()
    assert html.count("<tr") == 27 and "&lt;t25&gt;" in html and "<t25>" not in html
    assert f"inference {solved.inference_bytes:,} B" in html


def test_completion_knows_the_methods() -> None:
    assert {"Hash", "Full", "Pruned", "from_config"} <= set(dir(methods))


def test_bytes_by_kind_are_printed_and_add_up() -> None:
    tables = [TableConfig("user", 20_000, 16)]
    solved = plan(tables, "pruned", "10%")
    kinds = solved.bytes_by_kind()
    assert set(kinds) == {"weights", "index"} and sum(kinds.values()) == solved.inference_bytes
    assert f"weights {kinds['weights']:,} B, index {kinds['index']:,} B" in str(solved)
    assert set(plan(tables, "hash", "10%").bytes_by_kind()) == {"weights"}


def test_constants_are_listed_and_not_counted() -> None:
    tables = [TableConfig(f"table_{i}", 20_000, 16) for i in range(4)]
    module = EmbeddingTables(plan(tables, "hash", "10%"))
    memory = module.memory()
    parameters = sum(weight.untyped_storage().nbytes() for weight in module.store.state_dict().values())
    assert [name for name, _ in module.named_buffers() if name.startswith(("blocks.", "lookups."))] == []
    inside = (vars(part).values() for name, part in module.named_modules() if name.startswith(("blocks.", "lookups.")))
    constants = {id(t): t for values in inside for t in values if isinstance(t, torch.Tensor)}
    assert memory.constants == sum(t.untyped_storage().nbytes() for t in constants.values()) > 0
    assert memory.inference_bytes == parameters
    assert "constants" in str(memory)
