"""Hashes: golden vectors from an independent computation, uniformity, independence, and addresses that never move."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from core_cases import all_methods, falling_counts, method_id
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar import MASK, balanced_address, balanced_row, bucket, hash_address, mix64, seed_of, sign_of, turn_of

from embtables import EmbeddingTables, Plan, TableConfig, plan
from embtables.hashing import balanced_ids, hash_ids, hash_signs, mix, seed_for, to_range, turn_for
from embtables.methods import Method, from_config
from embtables.tables.reading import block_of

pytestmark = pytest.mark.core

int64s = st.integers(-(2**63), 2**63 - 1)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of the generator seeded with 1234567, as published with its reference implementation.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    increment = 0x9E3779B97F4A7C15
    states = [(1234567 + i * increment) & MASK for i in range(5)]
    assert [mix64(s) for s in states] == published
    signed = tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [int(v) & MASK for v in mix(signed)] == published


# id, seed, size → address, computed once with Python's integers (tests/scalar.py).
GOLDEN = [
    (0, 0, 10, 8),
    (1, 0, 1000, 566),
    (2, 0, 1000, 591),
    (-1, 0, 1000, 893),
    (42, 1234567, 1000003, 654170),
    (9223372036854775807, -1, 97, 27),
    (-9223372036854775808, 5, 97, 32),
    (123456789, 987654321, 2147483647, 1501854858),
    (7, -7, 4294967295, 4078976655),
    (7, -7, 4294967296, 243083784),
    (7, -7, 1000000000000, 834909944328),
    (1099511627779, 4611686018427387904, 2305843009213693952, 250991873351591431),
]


@pytest.mark.parametrize(("x", "seed", "size", "address"), GOLDEN)
def test_golden_addresses(x: int, seed: int, size: int, address: int) -> None:
    assert int(hash_ids(tensor(x), tensor(seed), tensor(size))) == address


def test_golden_seeds() -> None:
    # blake2b of the parts, eight bytes, little-endian.
    assert seed_for(0, "user", "row", 0) == -4545260101753308198
    assert seed_for(1, "user", "row", 0) == -7628866105708296555
    assert seed_for(0, "user", "row", 1) == 2207070942998410755


@given(st.lists(int64s, min_size=1, max_size=20), int64s, st.integers(1, 2**61))
@settings(max_examples=500)
def test_addresses_equal_those_of_exact_integers(ids: list[int], seed: int, size: int) -> None:
    found = hash_ids(tensor(ids), tensor(seed), tensor(size))
    assert found.tolist() == [bucket(mix64((x ^ seed) & MASK), size) for x in ids]
    assert hash_signs(tensor(ids), tensor(seed)).tolist() == [sign_of(x, seed) for x in ids]


@pytest.mark.parametrize("size", [1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**61])
def test_extreme_hashes_and_ids_stay_in_range(size: int) -> None:
    extremes = tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62), 2**33 - 1, 2**33])
    for hashed in (extremes, mix(extremes)):
        address = to_range(hashed, tensor(size))
        assert int(address.min()) >= 0 and int(address.max()) < size
    if size > 2**20:
        ids = torch.arange(20_000)
        spread = hash_ids(ids, tensor(7), tensor(size)).double() / size
        assert abs(float(spread.mean()) - 0.5) < 0.01 and abs(float(spread.std()) - 12**-0.5) < 0.01


IDS = {
    "sequential": np.arange(200_000),
    "negative": -np.arange(200_000),
    "strided": np.arange(200_000) * 1024,
    "large stride": np.arange(200_000) * 2**40,
    # 18 bits spread over 64: half of them vary low, half high.
    "low entropy": (np.arange(200_000) & 511) | ((np.arange(200_000) >> 9) << 50),
    "one bit set apart": np.concatenate([np.arange(100_000), np.arange(100_000) | 2**62]),
}


@pytest.mark.parametrize("size", [64, 1000, 4097])
@pytest.mark.parametrize("name", IDS)
def test_bucket_loads_are_uniform(name: str, size: int) -> None:
    ids = torch.from_numpy(np.unique(IDS[name]))
    for lookup in range(3):
        address = hash_ids(ids, tensor(seed_for(0, "t", "row", lookup)), tensor(size))
        load = torch.bincount(address, minlength=size).double()
        expected = ids.numel() / size
        chi2 = float(((load - expected) ** 2 / expected).sum())
        # χ² with size − 1 degrees of freedom: mean size − 1, variance 2(size − 1). Five deviations either way, as
        # loads that are too even would be no hash either.
        assert abs(chi2 - (size - 1)) < 5 * (2 * (size - 1)) ** 0.5


def test_lookups_features_and_purposes_collide_independently() -> None:
    ids, size = torch.arange(300_000), 1000
    keys = [("a", "row", 0), ("a", "row", 1), ("b", "row", 0), ("a", "sign", 0), ("a", "out_of_range")]
    addresses = [hash_ids(ids, tensor(seed_for(0, *key)), tensor(size)) for key in keys]
    for i, one in enumerate(addresses):
        for other in addresses[:i]:
            share = float((one == other).double().mean())
            assert abs(share - 1 / size) < 5 * (1 / size / ids.numel()) ** 0.5
        # Neighbours meet as often as any pair.
        assert abs(float((one[1:] == one[:-1]).double().mean()) - 1 / size) < 5 * (1 / size / ids.numel()) ** 0.5
    # Of ids that collide under one hash only 1/size collide under another.
    first, second = addresses[0][:3000], addresses[1][:3000]
    pairs = (first[:, None] == first) & ~torch.eye(3000, dtype=torch.bool)
    both = pairs & (second[:, None] == second)
    assert int(both.sum()) / int(pairs.sum()) < 5 / size


def test_signs_are_balanced_and_independent_of_rows() -> None:
    ids = torch.arange(200_000)
    seed = tensor(seed_for(0, "t", "sign", 0))
    signs = hash_signs(ids, seed)
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 5 / 200_000**0.5
    rows = hash_ids(ids, tensor(seed_for(0, "t", "row", 0)), tensor(10))
    for row in range(10):
        assert abs(float(signs[rows == row].mean())) < 5 / 20_000**0.5


# ---- balanced addresses ----------------------------------------------------------------------------------------------

# id, start, turn, size, scalars → row, computed once with Python's integers (tests/scalar.py).
GOLDEN_BALANCED = [
    (0, 0, 0, 10, 1, 0),
    (0, 12345, -7, 10, 1, 0),
    (10, 0, 4611686018427387904, 10, 1, 2),
    (123456789, 987654321, -6148914691236517206, 1000003, 1, 456420),
    (4294967295, 7, 1, 2147483647, 1, 1),
    (1099511627781, -1, 1234567891011, 4294967296, 1, 2126647492),
    (2305843009213693951, 5, -9223372036854775808, 97, 1, 43),
    (41, -9223372036854775808, 2305843009213693953, 100, 8, 27),
    (77, 6148914691236517205, 99, 1021, 3, 571),
    (1000000000000, 9223372036854775807, 4052555153018976267, 1000000000, 64, 625123265),
]


@pytest.mark.parametrize(("x", "start", "turn", "size", "scalars", "row"), GOLDEN_BALANCED)
def test_golden_balanced_addresses(x: int, start: int, turn: int, size: int, scalars: int, row: int) -> None:
    found = balanced_ids(tensor(x), tensor(start), tensor(turn), tensor(size), tensor(size // scalars), scalars)
    assert int(found) == row


def test_golden_turns() -> None:
    # A seed of blake2b, and 0x9E3779B97F4A7C15 more for each lookup, as a signed number of 64 bits.
    assert turn_for(0, "user", lookup=0) == seed_for(0, "user", "turn") == -5243658494244285333
    assert turn_for(0, "user", lookup=1) == 6157056325078913152
    assert turn_for(0, "user", lookup=3) == -7935002183693793110


def balanced(n: int, size: int, hash_seed: int = 0, lookup: int = 0, scalars: int = 1) -> torch.Tensor:
    """The first rows of the ids 0 … n − 1 of a table 't'."""
    start, turn = seed_for(hash_seed, "t", "row", lookup), turn_for(hash_seed, "t", lookup=lookup)
    return balanced_ids(torch.arange(n), *map(tensor, (start, turn, size, size // scalars)), scalars)


@given(
    st.lists(st.integers(0, 2**61), min_size=1, max_size=20),
    int64s,
    int64s,
    st.integers(1, 2**61) | st.integers(1, 1000),
    st.integers(1, 40),
)
@settings(max_examples=500)
def test_balanced_addresses_equal_those_of_exact_integers(
    ids: list[int], start: int, turn: int, size: int, scalars: int
) -> None:
    scalars = min(scalars, size)
    found = balanced_ids(tensor(ids), *map(tensor, (start, turn, size, size // scalars)), scalars)
    assert found.tolist() == [balanced_row(x, start, turn, size, scalars) for x in ids]


@pytest.mark.parametrize("n", [1, 7, 64, 211])
def test_every_row_has_as_many_ids_as_any_other_or_one_fewer(n: int) -> None:
    for size in range(1, n + 1):
        for lookup in range(3):
            rows = balanced(n, size, lookup=lookup)
            loads = torch.bincount(rows, minlength=size)
            assert loads.numel() == size and int(loads.max() - loads.min()) <= 1
            for turn in rows.split(size):  # the first of them are the most frequent ids
                assert turn.unique().numel() == turn.numel()


@pytest.mark.parametrize("size", [8, 9, 100, 1021, 1024])
@pytest.mark.parametrize("scalars", [1, 3, 8])
def test_blocks_of_one_turn_lie_side_by_side(size: int, scalars: int) -> None:
    n, in_turn = 5 * (size // scalars), size // scalars
    first = balanced(n, size, scalars=scalars)
    for turn in first.split(in_turn):
        places = ((turn.unsqueeze(1) + torch.arange(scalars)) % size).flatten()
        assert places.unique().numel() == in_turn * scalars > size - scalars
        assert ((places - places[0]) % size == torch.arange(in_turn * scalars)).all()
    loads = torch.bincount(((first.unsqueeze(1) + torch.arange(scalars)) % size).flatten(), minlength=size)
    # Five turns leave out fewer than `scalars` scalars each.
    assert int(loads.max()) == 5 and int(loads.sum()) == 5 * in_turn * scalars


@pytest.mark.parametrize("size", [12, 50, 211])
def test_ids_that_meet_in_one_lookup_do_not_in_the_next(size: int) -> None:
    n = size * size // 6
    for hash_seed in range(30):
        first, second, third = (balanced(n, size, hash_seed, lookup) for lookup in range(3))
        assert (first * size + second).unique().numel() == n
        assert (second * size + third).unique().numel() == n


def test_ids_of_two_turns_meet_at_random() -> None:
    size, seeds = 40, 1500
    met = torch.zeros(size)
    for hash_seed in range(seeds):
        rows = balanced(2 * size, size, hash_seed)
        met[int((rows[size:] == rows[0]).nonzero())] += 1
    # χ² with size − 1 degrees of freedom, five deviations either way, as for loads above.
    chi2 = float(((met - seeds / size) ** 2 / (seeds / size)).sum())
    assert abs(chi2 - (size - 1)) < 5 * (2 * (size - 1)) ** 0.5


# ---- addresses of tables ---------------------------------------------------------------------------------------------

TABLES = [TableConfig("user", 5000, 8), TableConfig("item", 3000, 8), TableConfig("city", 40, 8)]


def addresses(tables: EmbeddingTables, name: str) -> torch.Tensor:
    """What decides which weights an id has, counted from the table's own first row."""
    lookups, number = block_of(tables.lookups.blocks, name)
    feature = lookups.lookup[number]
    n = lookups.tables[number].rows
    return lookups.block.signature(torch.arange(n), feature.expand(n))


def planned(method: Method, tables: list[TableConfig], budget: object, hash_seed: int = 0) -> EmbeddingTables:
    counts = {t.name: falling_counts(t.num_embeddings or 0) for t in tables}
    return EmbeddingTables(plan(tables, method, budget, counts, "adagrad", hash_seed=hash_seed))  # type: ignore[arg-type]


HASHING = ("hash", "multi_hash", "unified", "robe")


@pytest.mark.parametrize("method", [m for m in all_methods() if m.kind in HASHING], ids=method_id)
def test_another_table_moves_nobody(method: Method) -> None:
    own = {"user": 4000, "item": 2000}
    alone = planned(method, TABLES[:2], sum(own.values()))
    # The new tables stand before the old ones; bytes are found so that the old ones keep their sizes.
    added = EmbeddingTables(
        plan(
            [TableConfig("new", 77, 8), *TABLES[:2]],
            {"new": "full", "*": method},
            6000 + 77 * 32,
            {t.name: falling_counts(t.num_embeddings or 0) for t in TABLES[:2]},
            "adagrad",
        )
    )
    for name in own:
        one, other = addresses(alone, name), addresses(added, name)
        signs_apart = method.kind == "robe" and getattr(method, "signs", False)
        shift = (other - one).reshape(-1, one.shape[-1])
        columns = one.shape[-1] // 2 if signs_apart else one.shape[-1]
        assert (shift[:, :columns] == shift[0, 0]).all()
    moved = planned(method, TABLES[:2], 6000, hash_seed=1)
    assert not torch.equal(addresses(moved, "user"), addresses(alone, "user"))


SCRIPT = """
import torch, sys
sys.path.insert(0, {tests!r})
from core_cases import *
from embtables import *
tables = [TableConfig("user", 5000, 8), TableConfig("item", 3000, 8)]
counts = {{t.name: falling_counts(t.num_embeddings) for t in tables}}
total = 0
for method in all_methods():
    solved = plan(tables, method, None if method.kind == "full" else "30%", counts, "adagrad")
    built = EmbeddingTables(solved, seed=3)
    ids = torch.arange(0, 3000, 7)
    vectors = built(torch.stack([ids, ids], 1))
    print(method_id(method), solved.fingerprint.hex(), float(vectors.double().abs().sum()), vectors[-1].tolist())
"""


@pytest.mark.slow
def test_a_fresh_process_with_another_hash_seed_of_python_agrees() -> None:
    script = SCRIPT.format(tests=os.path.dirname(__file__))
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            cwd=os.path.dirname(os.path.dirname(__file__)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "4242")
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == len(all_methods())


def test_hash_looks_up_the_rows_that_exact_integers_say() -> None:
    raw = EmbeddingTables(plan([TableConfig("raw", None, 4)], "hash", 4 * 4 * 1009))
    ids = tensor([[0], [1], [-1], [2**63 - 1], [-(2**63)], [123456789012345]])
    rows = [hash_address(x, 0, "raw", 0, 1009) for x in ids.flatten().tolist()]
    assert torch.equal(raw(ids), raw.store.slab("raw")[rows])
    assert seed_of(0, "raw", "row", 0) == seed_for(0, "raw", "row", 0)
    assert turn_of(0, "raw", 2) == turn_for(0, "raw", lookup=2) % 2**64


@pytest.mark.parametrize("kind", HASHING)
def test_what_has_no_vocabulary_is_hashed_and_random_addresses_are_by_choice(kind: str) -> None:
    def addressing(method: Method, table: TableConfig) -> object:
        return plan([table], method, 4096, optimizer=None).groups[0].layout.entries["t"].values.get("addressing")

    with_ids, without = TableConfig("t", 5000, 8), TableConfig("t", None, 8)
    balanced, random = from_config(kind), from_config({"kind": kind, "addressing": "random"})
    assert addressing(balanced, with_ids) == "balanced"
    assert addressing(balanced, without) is addressing(random, with_ids) is addressing(random, without) is None
    assert "addressing" not in balanced.to_dict() and random.to_dict()["addressing"] == "random"


def test_addresses_of_plans_that_say_nothing_of_them_stay_what_they_were() -> None:
    table = TableConfig("t", 5000, 4)
    data = plan([table], "hash", 4 * 4 * 1009, optimizer=None).to_dict()
    new = EmbeddingTables(Plan.from_dict(deepcopy(data)))
    assert data["groups"][0]["layout"]["entries"]["t"]["values"].pop("addressing") == "balanced"
    old = EmbeddingTables(Plan.from_dict(deepcopy(data)))
    assert old.plan.fingerprint != new.plan.fingerprint
    ids = [0, 1, 1009, 4999]
    for tables, address in ((old, hash_address), (new, balanced_address)):
        rows = [address(x, 0, "t", 0, 1009) for x in ids]
        assert torch.equal(tables(tensor(ids).unsqueeze(1)), tables.store.slab("t")[rows])
    data["groups"][0]["layout"]["entries"]["t"]["values"]["addressing"] = "dealt"
    with pytest.raises(ValueError, match="table 't' has the addressing 'dealt'"):
        EmbeddingTables(Plan.from_dict(data))
