"""What native code takes for granted is checked before: recipes, ranks in files, operators' shapes, the library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import shuffled_counts
from native_cases import run_each
from third_party.metadata import Metadata
from third_party.product_quantization import ProductQuantization

from embtables import SGD, EmbeddingTables, TableConfig, ops, plan
from embtables.lookup.program import InputSpec, Program, check_recipe, compile_program, is_native
from embtables.lookup.recipe import (
    Balanced,
    BalancedBlock,
    Capped,
    CircularBlock,
    Coded,
    Digit,
    Hashed,
    Listed,
    Range,
    Ranks,
    Recipe,
    Row,
    SparseRow,
    concat,
)
from embtables.lookup.store import Store
from embtables.methods import Method
from embtables.ops import native, reference
from embtables.ops.program import CODE_WORDS, HEADER_WORDS, LOOKUP_WORDS, PIECE_WORDS, PROJECTION_WORDS, WEIGHT_WORDS
from embtables.sizes.layout import Code, Extra, Form, Slab

NATIVE = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")
ROOT = Path(__file__).resolve().parents[2]


# ---- recipes ---------------------------------------------------------------------------------------------------------

TABLE = InputSpec("item", "item", 0, 8, 100, "error", 0, None)
OOV = TABLE._replace(on_out_of_range="oov")
SMALL = TABLE._replace(num_embeddings=75)
FIFTY = TABLE._replace(num_embeddings=50)
WITHOUT_VOCABULARY = TABLE._replace(num_embeddings=None)
FORM = Form(
    slabs=(
        Slab("wide", 200, 8),
        Slab("small", 50, 8),
        Slab("narrow", 50, 4),
        Slab("narrow too", 25, 4),
        Slab("scalars", 64, 1),
        Slab("none", 0, 8),
    ),
    extras=(
        Extra("p", (4, 8)),
        Extra("q", (4, 8)),
        Extra("square", (8, 8)),
        Extra("down", (8, 4)),
        Extra("bias", (8,)),
    ),
    codes=(
        Code("rank", (120,), "int32", "index"),
        Code("short", (99,), "int32", "index"),
        Code("wide rank", (120,), "int64", "index"),
        Code("codes", (120, 3), "uint8", "codes"),
        Code("offsets", (101,), "int16", "codes"),
        Code("values", (500,), "int64", "codes"),
        Code("real", (200,), "float32", "weights"),
        # Matrices of 8 columns: of 128 rows, of 120, and of any number.
        *(Code(f"{matrix}/values", (30,), "float32", "weights") for matrix in ("bits", "rows", "pairs")),
        Code("bits/bitmap", (16,), "int64", "index"),
        Code("bits/directory", (2,), "int32", "index"),
        Code("rows/columns", (30,), "uint8", "index"),
        Code("rows/pointers", (121,), "int32", "index"),
        Code("pairs/columns", (30,), "uint8", "index"),
        Code("pairs/ids", (30,), "int32", "index"),
    ),
)


def sparse(form: str, first: int = 0, matrix: str = "", **others: Any) -> Recipe:
    named = {"bitmap": "bits", "compressed rows": "rows", "entries": "pairs"}
    return Recipe(
        "sparse",
        sparse=SparseRow(matrix or named[form], form, **{"entries": 30, "format": "fp32", **others}, first=first),
    )


def compiled(recipe: Recipe, spec: InputSpec = TABLE) -> Program | None:
    """The program of a recipe that passes its checks; ``None`` where native code leaves it to PyTorch."""
    store = Store([FORM], None)
    check_recipe(spec, recipe, store)
    return compile_program([(spec, recipe)], 1, store) if is_native(recipe, store) else None


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([("wide", None), ("small", None), ("none", None)], 1),
        ([("small", None), ("wide", None)], 2),  # which lie the other way round
        ([("narrow", "p"), ("narrow too", "p")], 1),
        ([("narrow", "p"), ("narrow too", "q")], 2),
        ([("wide", None), ("narrow", "p"), ("narrow too", "p"), ("small", None)], 3),
    ],
)
def test_ranges_that_lie_one_behind_the_other_are_one_piece(
    ranges: list[tuple[str, str | None]], expected: int
) -> None:
    recipe = Recipe("alternatives", tuple(Range(*each) for each in ranges))
    for form, pieces in (
        (FORM, expected),
        # Where units of other formats begin depends on the slab.
        (replace(FORM, slabs=tuple(replace(slab, format="bf16") for slab in FORM.slabs)), len(ranges)),
    ):
        assert compile_program([(TABLE, recipe)], 1, Store([form], SGD(0.1))).words[2] == pieces


def with_rest(rest: Recipe) -> Recipe:
    """Alternatives for the first 50 ids, and this rest."""
    return Recipe("alternatives", (Range("small"),), rest=rest)


NATIVE_ONES: list[tuple[Recipe, InputSpec]] = [
    (concat(Row("wide", 100)), TABLE),
    (concat(Row("wide", 99), ranks=Ranks("rank", 19)), OOV),
    (concat(Hashed("small", 5)), WITHOUT_VOCABULARY),
    (concat(Balanced("small", -5, 2**62)), OOV),
    (concat(BalancedBlock("scalars", 3, 7, 6), BalancedBlock("scalars", 4, -7, 2, sign_seed=1)), TABLE),
    (Recipe("mean", (Balanced("small", 0, 1, sign_seed=0), Hashed("wide", 1))), TABLE),
    (concat(Digit("narrow", 1), Digit("narrow too", 25)), WITHOUT_VOCABULARY),
    (concat(Capped("small"), ranks=Ranks("rank", 20)), TABLE),
    (concat(CircularBlock("scalars", 3, 6), CircularBlock("scalars", 4, 2, sign_seed=1)), TABLE),
    (Recipe("sum", ()), TABLE),
    (Recipe("mean", (Hashed("small", 0, sign_seed=0), Hashed("wide", 1))), TABLE),
    (Recipe("alternatives", (Range("small"), Range("narrow", "p"))), TABLE),
    (concat(Row("narrow"), projection="p"), TABLE._replace(num_embeddings=50)),
    (concat(Hashed("narrow", 1), zeros=4), TABLE),
    (Recipe("concat", (Row("wide"),), projection="p", inner="down"), TABLE),
    (Recipe("sum", (Hashed("small", 1), Hashed("wide", 2)), projection="p", inner="down"), TABLE),
    (concat(CircularBlock("scalars", 3, 5), Capped("scalars"), zeros=2), TABLE),
    (concat(Row("wide"), ranks=Ranks("wide rank")), TABLE),
    (concat(Coded("small", "codes", 2, first=20)), TABLE),
    (concat(Coded("narrow", "codes"), Coded("narrow", "codes", 1), ranks=Ranks("rank")), TABLE),
    (Recipe("mean", (Listed("small", "offsets", "values", 4),)), TABLE),
    (Recipe("sum", (Listed("small", "offsets", "values", 4),), projection="square"), TABLE),
    (Recipe("sum", (Hashed("small", 1), Hashed("wide", 2, sign_seed=3)), projection="square"), TABLE),
    (Recipe("product", (Hashed("narrow", 1), Coded("narrow", "codes")), projection="p"), TABLE),
    (sparse("bitmap", 28), TABLE),
    (sparse("compressed rows", 19), OOV),
    (sparse("entries", 2**20), TABLE),
    (with_rest(concat(Hashed("wide", 1))), TABLE),
    (with_rest(concat(Row("wide", 150))), TABLE),
    (with_rest(concat(Row("narrow"), projection="q")), TABLE),
    (with_rest(Recipe("sum", ())), OOV),
    (with_rest(concat(CircularBlock("scalars", 3, 8))), TABLE),
    (with_rest(concat(Coded("wide", "codes", first=70))), TABLE),
    (with_rest(Recipe("sum", (Hashed("wide", 1), Hashed("wide", 2, sign_seed=3)), projection="square")), TABLE),
]
LEFT_TO_PYTORCH: list[tuple[Recipe, InputSpec]] = [
    (concat(CircularBlock("scalars", 3, 4), projection="p"), TABLE),
    (with_rest(concat(CircularBlock("scalars", 3, 4), projection="p")), TABLE),
    (concat(BalancedBlock("scalars", 3, 5, 4), projection="p"), TABLE),
]
BAD: list[tuple[str, Recipe, InputSpec]] = [
    ("which is not one of concat, sum", Recipe("max", (Row("wide"),)), TABLE),  # type: ignore[arg-type]
    ("which is not an address", Recipe("concat", ("wide",)), TABLE),  # type: ignore[arg-type]
    ("reads the slab 'other', which its layout does not have", concat(Row("other")), TABLE),
    ("from row 101 on for 100 ids, but the slab has 200 rows", concat(Row("wide", 101)), TABLE),
    ("from row 100 on for 101 ids", concat(Row("wide", 100)), OOV),
    ("from row -1 on", concat(Row("wide", -1)), TABLE),
    ("which has no rows", concat(Hashed("none", 5)), TABLE),
    ("divisor 0, which is below 1", concat(Digit("wide", 0)), TABLE),
    ("no num_embeddings", concat(Row("wide")), WITHOUT_VOCABULARY),
    ("no num_embeddings", concat(Capped("wide")), WITHOUT_VOCABULARY),
    ("no num_embeddings", concat(Balanced("wide", 1, 2)), WITHOUT_VOCABULARY),
    ("no num_embeddings", concat(BalancedBlock("scalars", 1, 2, 8)), WITHOUT_VOCABULARY),
    ("at most all of it", concat(CircularBlock("scalars", 1, 65)), TABLE),
    ("at most all of it", concat(BalancedBlock("scalars", 1, 2, 65)), TABLE),
    ("of a slab of width 1", concat(BalancedBlock("wide", 1, 2, 8)), TABLE),
    ("with a sign", Recipe("product", (Balanced("wide", 1, 2, sign_seed=1), Row("wide"))), TABLE),
    ("of a slab of width 1", concat(CircularBlock("wide", 1, 8)), TABLE),
    ("blocks are joined", Recipe("sum", (CircularBlock("scalars", 1, 8),)), TABLE),
    ("has 4 scalars in all", concat(Hashed("narrow", 1)), TABLE),
    ("has 12 scalars in all", concat(Row("wide"), Hashed("narrow", 1)), TABLE),
    ("has 4 scalars in all and 3 zeros", concat(Hashed("narrow", 1), zeros=3), TABLE),
    ("has 8 scalars in all and 1 zeros", concat(Row("wide"), zeros=1), TABLE),
    ("has 12 scalars in all and -4 zeros", concat(Row("wide"), Hashed("narrow", 1), zeros=-4), TABLE),
    ("values that are joined, and no projection", concat(Hashed("narrow", 1), projection="p", zeros=4), TABLE),
    ("values that are joined", Recipe("sum", (Hashed("narrow", 1),), zeros=4), TABLE),
    ("'bias', which is not an extra", Recipe("sum", (Row("wide"),), projection="p", inner="bias"), TABLE),
    ("8 scalars and an inner projection [4, 8]", Recipe("sum", (Row("wide"),), projection="p", inner="q"), TABLE),
    ("has 4 scalars and a projection [8, 8]", Recipe("sum", (Row("wide"),), projection="square", inner="down"), TABLE),
    ("go on to another one", Recipe("sum", (Row("wide"),), inner="down"), TABLE),
    ("go on to another one", Recipe("alternatives", (Range("wide"),), inner="down"), TABLE),
    ("has zeros behind its alternatives", Recipe("alternatives", (Range("wide"),), zeros=1), TABLE),
    ("has 4 scalars in all", Recipe("sum", (Hashed("narrow", 1),)), TABLE),
    ("different widths: 8, 4", Recipe("sum", (Hashed("wide", 1), Hashed("narrow", 1))), TABLE),
    ("needs at least 2", Recipe("product", (Row("wide"),)), TABLE),
    ("needs at least 1", concat(), TABLE),
    ("with a sign", Recipe("product", (Hashed("wide", 1, sign_seed=1), Row("wide"))), TABLE),
    ("'r', which is not an extra [width, D]", concat(Row("wide"), projection="r"), TABLE),
    ("'bias', which is not an extra [width, D]", concat(Row("wide"), projection="bias"), TABLE),
    ("8 scalars and a projection [4, 8]", concat(Row("wide"), projection="p"), TABLE),
    ("reads the code 'ranks', which its layout does not have", concat(Row("wide"), ranks=Ranks("ranks")), TABLE),
    ("'real', which is not a buffer of integers", concat(Row("wide"), ranks=Ranks("real")), TABLE),
    ("from 0 on for 100 ids, but it has 99", concat(Row("wide"), ranks=Ranks("short")), TABLE),
    ("from 21 on for 100 ids, but it has 120", concat(Row("wide"), ranks=Ranks("rank", 21)), TABLE),
    ("for None ids", concat(Hashed("wide", 1), ranks=Ranks("rank")), WITHOUT_VOCABULARY),
    ("reads the code 'codes' as one integer per entry, but it has 3", concat(Row("wide"), ranks=Ranks("codes")), TABLE),
    ("'codes' as one integer per entry", Recipe("sum", (Listed("wide", "codes", "values", 3),)), TABLE),
    ("'codes' as one integer per entry", Recipe("sum", (Listed("wide", "offsets", "codes", 3),)), TABLE),
    ("reads column 3 of the code 'codes', which has 3", concat(Coded("wide", "codes", 3)), TABLE),
    ("from 21 on for 100 ids, but it has 120", concat(Coded("wide", "codes", first=21)), TABLE),
    ("from 1 on for 100 ids, but it has 101", Recipe("sum", (Listed("wide", "offsets", "values", 3, 1),)), TABLE),
    ("a list stands alone", concat(Listed("wide", "offsets", "values", 3)), TABLE),
    ("of at most 0 rows", Recipe("sum", (Listed("wide", "offsets", "values", 0),)), TABLE),
    ("'bits' from row 29 on for 100 ids, but it has 128 rows", sparse("bitmap", 29), TABLE),
    ("'rows' from row 20 on for 101 ids, but it has 120 rows", sparse("compressed rows", 20), OOV),
    ("'pairs' from row -1 on", sparse("entries", -1), TABLE),
    ("from row 0 on for None ids", sparse("entries"), WITHOUT_VOCABULARY),
    ("a sparse matrix beside something else", replace(sparse("entries"), addresses=(Row("wide"),)), TABLE),
    ("a sparse matrix beside something else", replace(sparse("entries"), ranks=Ranks("rank")), TABLE),
    ("a sparse matrix beside something else", replace(sparse("entries"), combine="concat"), TABLE),
    ("a sparse matrix beside something else", Recipe("sparse", (Row("wide"),)), TABLE),
    ("a rest that is a row of a sparse matrix", with_rest(sparse("entries")), TABLE),
    ("needs at least 1", Recipe("alternatives", ()), TABLE),
    ("alternatives for the ids below 50 only", Recipe("alternatives", (Range("small"),)), TABLE),
    ("belong together", Recipe("alternatives", (Row("wide"),)), TABLE),
    ("belong together", concat(Range("wide")), TABLE),
    ("width 4, but its vectors have 8", Recipe("alternatives", (Range("wide"), Range("narrow"))), TABLE),
    ("width 8 and a projection [4, 8]", Recipe("alternatives", (Range("wide", "p"),)), TABLE),
    ("different projections", Recipe("alternatives", (Range("narrow", "p"), Range("narrow too", "q"))), SMALL),
    ("beside those of its alternatives", Recipe("alternatives", (Range("wide"),), projection="square"), TABLE),
    ("two alternatives of the slab 'small'", Recipe("alternatives", (Range("small"), Range("small"))), TABLE),
    ('(concat) has a rest, which only "alternatives" have', replace(concat(Row("wide")), rest=concat()), TABLE),
    ("has a rest, but its alternatives hold all ids", with_rest(concat(Hashed("wide", 1))), FIFTY),
    ("has a rest that has alternatives itself", with_rest(Recipe("alternatives", (Range("wide"),))), TABLE),
    ("has a rest with ranks of its own", with_rest(concat(Row("wide"), ranks=Ranks("rank"))), TABLE),
    ("a rest of lists", with_rest(Recipe("sum", (Listed("wide", "offsets", "values", 3),))), TABLE),
    ("an alternative and a rest that both read the slab 'small'", with_rest(concat(Hashed("small", 1))), TABLE),
    ("a rest, and that one has 4 scalars in all", with_rest(concat(Hashed("narrow", 1))), TABLE),
    (
        "that one has the address Row of slab 'wide' from row 151 on for 50 ids",
        with_rest(concat(Row("wide", 151))),
        TABLE,
    ),
    ("that one reads the code 'codes' from 70 on for 51", with_rest(concat(Coded("wide", "codes", first=70))), OOV),
    ("that one reads the slab 'other'", with_rest(concat(Hashed("other", 1))), TABLE),
]


@pytest.mark.parametrize("recipe, spec", NATIVE_ONES)
def test_recipes_that_stay_within_their_slabs_are_compiled(recipe: Recipe, spec: InputSpec) -> None:
    program = compiled(recipe, spec)
    assert program is not None
    weights, projections = len(program.weights), len(program.projections)
    pieces = len(recipe.all_addresses()) + (recipe.sparse is not None)
    expected = HEADER_WORDS + LOOKUP_WORDS * (1 + (recipe.rest is not None)) + pieces * PIECE_WORDS
    expected += WEIGHT_WORDS * (weights + 1) + PROJECTION_WORDS * projections + len(program.codes) * CODE_WORDS
    assert program.words.numel() == expected


@pytest.mark.parametrize("recipe, spec", LEFT_TO_PYTORCH)
def test_what_native_code_does_not_have_is_left_to_pytorch(recipe: Recipe, spec: InputSpec) -> None:
    assert compiled(recipe, spec) is None


def test_codes_of_a_type_that_native_code_does_not_read_are_left_to_pytorch() -> None:
    store = Store([FORM], None)
    assert is_native(concat(Coded("small", "codes")), store)
    store.code_3 = store.code_3.to(torch.int8)
    assert store.code("codes").dtype == torch.int8
    assert not is_native(concat(Coded("small", "codes")), store)


@pytest.mark.parametrize("reason, recipe, spec", BAD)
def test_other_recipes_are_refused_when_tables_are_built(reason: str, recipe: Recipe, spec: InputSpec) -> None:
    with pytest.raises(
        ValueError, match=r"^table 'item': its recipe .*; fix what recipe\(\) of its method returns$"
    ) as e:
        compiled(recipe, spec)
    assert reason in str(e.value)


@pytest.mark.parametrize(
    ("reason", "recipe"),
    [
        (
            "'rows' has 31 entries in fp32, but 'rows/values' is of another shape or type",
            sparse("compressed rows", entries=31),
        ),
        (
            "'rows' has 30 entries in int8, but 'rows/values' is of another shape or type",
            sparse("compressed rows", format="int8"),
        ),
        (
            "'bits' has 30 entries in fp32, but 'bits/columns' is of another shape or type",
            sparse("compressed rows", matrix="bits"),
        ),
        (
            "'rows' has 30 entries in fp32, but 'rows/directory' is of another shape or type",
            sparse("bitmap", matrix="rows"),
        ),
        ("'rows' has 30 entries in fp32, but 'rows/ids' is of another shape or type", sparse("entries", matrix="rows")),
        (
            "'other' has 30 entries in fp32, but 'other/values' is of another shape or type",
            sparse("entries", matrix="other"),
        ),
        ("'pairs' is stored as 'heap', which there is not", sparse("heap", matrix="pairs")),
    ],
)
def test_sparse_rows_without_their_codes_are_refused(reason: str, recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=f"^{reason}: the plan is damaged$"):
        compiled(recipe)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bitmap", torch.zeros(17, dtype=torch.int64)),
        ("bitmap", torch.zeros(16, dtype=torch.int32)),
        ("bitmap", torch.zeros(2, 8, dtype=torch.int64)),
        ("directory", torch.zeros(3, dtype=torch.int32)),
        ("directory", torch.zeros(2)),
    ],
)
def test_a_bitmap_is_as_long_as_its_directory_says(name: str, tensor: torch.Tensor) -> None:
    store = Store([FORM], None)
    setattr(store, store.key(f"bits/{name}"), tensor)
    with pytest.raises(
        ValueError, match="'bits' has 30 entries in fp32, but 'bits/(bitmap|directory)' is of another shape"
    ):
        check_recipe(TABLE, sparse("bitmap"), store)


# ---- ranks -----------------------------------------------------------------------------------------------------------

RANKED = [TableConfig("item", 300, 8, on_out_of_range="oov"), TableConfig("city", 40, 8)]


def ranked(kind: str) -> EmbeddingTables:
    counts = {c.name: shuffled_counts(c.num_embeddings) for c in RANKED}
    return EmbeddingTables(plan(RANKED, kind, "40%", counts, "adagrad"), std=0.5)


@pytest.mark.parametrize("kind", ["mixed_dimension", "frequency_cutoff", "banded"])
@pytest.mark.parametrize("rank", [40, 2**15 - 1, -1])
def test_ranks_that_are_none_are_refused_before_anything_is_taken(kind: str, rank: int, tmp_path: Path) -> None:
    tables = ranked(kind)
    damaged = {k: v.clone() for k, v in ranked(kind).state_dict().items()}
    damaged["store.code_0"][-1] = rank
    before = {k: v.clone() for k, v in tables.state_dict().items()}
    with pytest.raises(ValueError, match="table 'city': '.*/rank' holds ranks .* 0 … 39: the file or state"):
        torch.nn.Sequential(tables).load_state_dict({f"0.{k}": v for k, v in damaged.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in tables.state_dict().items())

    tables.store.code_0[-1] = rank  # type: ignore[operator]
    tables.save(tmp_path / "tables")
    with pytest.raises(ValueError, match="holds no embedding tables that can be read: table 'city'.* is damaged"):
        EmbeddingTables.load(tmp_path / "tables", verify=True)


@pytest.mark.parametrize(
    "method, name, place, code, found",
    [
        (ProductQuantization(code_dtype="int64"), "city/codes", (39, 3), 200, "codes \\d … 200, .* 0 … 199"),
        (ProductQuantization(code_dtype="int16"), "item/codes", (0, 1), -1, "codes -1 … .* 0 … 199"),
        (ProductQuantization(remap="int32"), "city/remap", 5, 40, "ranks 0 … 40, .* 0 … 39"),
        (Metadata(), "item/values", 7, 100, "rows 0 … 100, .* 0 … 99"),
        (Metadata(offset_dtype="int64"), "city/offsets", 40, 61, "offsets 0 … 61, .* 0 … 60"),
    ],
)
def test_codes_that_lead_out_of_their_slab_are_refused(
    method: Method, name: str, place: Any, code: int, found: str
) -> None:
    tables = EmbeddingTables(plan(RANKED, method))
    tables.store.code(name)[place] = code
    sound = EmbeddingTables(tables.plan)
    before = {k: v.clone() for k, v in sound.state_dict().items()}
    with pytest.raises(ValueError, match=f"table '{name[:4]}': '{name}' holds {found}: the file or state dict"):
        sound.load_state_dict(tables.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in sound.state_dict().items())
    sound.load_state_dict(before)


@pytest.mark.parametrize("kind", ["mixed_dimension", "frequency_cutoff", "banded"])
def test_codes_of_another_type_go_through_pytorch(kind: str) -> None:
    tables = ranked(kind)
    ids = torch.tensor([[299, 39], [300, 0], [5, 5]])
    expected = tables(ids).detach()
    state = tables.state_dict()
    tables.load_state_dict({k: v.long() if "code" in k else v for k, v in state.items()}, assign=True)
    assert tables.store.code_0.dtype == torch.int64 and tables.memory().ops == "reference"
    torch.testing.assert_close(tables(ids).detach(), expected)


# ---- the single operators --------------------------------------------------------------------------------------------

HYPER = torch.tensor([0.1, 0, 1e-8], dtype=torch.float64)
STEP = torch.tensor(1)
WRONG: dict[str, tuple[type[Exception], str, Mapping[str, Any]]] = {
    "beyond": (
        IndexError,
        "row 1000000000 is out of range: the weight has 9 rows",
        {"index": torch.tensor([0, 10**9])},
    ),
    "negative": (IndexError, "row -1 is out of range", {"index": torch.tensor([-1, 0])}),
    "short gradient": (ValueError, r"index \[2\] and grad \[1, 4\]", {"grad": torch.ones(1, 4)}),
    "narrow gradient": (ValueError, r"grad \[2, 3\] must be \[N\] and \[N, 4\]", {"grad": torch.ones(2, 3)}),
    "no state": (ValueError, r"the state of adagrad .* is \[9, 4\], not nothing", {"state": []}),
    "small state": (ValueError, r"is \[9, 4\], not \[8, 4\]", {"state": [torch.zeros(8, 4)]}),
    "state of another rule": (ValueError, r"is \[9, 4\], not \[9, 1\]", {"state": [torch.zeros(9, 1)]}),
    "no moments": (ValueError, r"adam .* is \[9, 4\], \[9, 4\], not nothing", {"state": [STEP], "rule": "adam"}),
    "short hyper": (
        ValueError,
        "hyper holds 2 numbers, but those of adagrad are lr, l2, eps and, where rows are clipped, clip_row_norm",
        {"hyper": HYPER[:2]},
    ),
    "long hyper": (ValueError, "hyper holds 6 numbers", {"hyper": torch.cat([HYPER, HYPER])}),
}


@NATIVE
@pytest.mark.parametrize("case", WRONG)
def test_updates_of_what_is_not_there_change_nothing(case: str) -> None:
    error, message, changes = WRONG[case]
    arguments: dict[str, Any] = {"state": [torch.zeros(9, 4)], "index": torch.tensor([0, 3]), "grad": torch.ones(2, 4)}
    arguments |= {"hyper": HYPER, "rule": "adagrad", **changes}
    weight = torch.ones(9, 4)
    with pytest.raises(error, match=message):
        ops.update(weight, *arguments.values())
    assert torch.equal(weight, torch.ones(9, 4)) and not any(t.any() for t in arguments["state"] if t.ndim)


@NATIVE
def test_hyper_parameters_in_float32_mean_the_same() -> None:
    weight, expected, index, grad = torch.ones(9, 4), torch.ones(9, 4), torch.tensor([3, 3, 1]), torch.randn(3, 4)
    ops.update(weight, [], index, grad, HYPER[:2].float(), "sgd")
    reference.update._init_fn(expected, [], index, grad, HYPER[:2], "sgd")
    torch.testing.assert_close(weight, expected)
    assert not torch.equal(weight, torch.ones(9, 4))


@NATIVE
def test_a_state_of_another_half_type_is_left_to_pytorch() -> None:
    """Which says that it has no such sum; native code has kernels for float32 state, and state of the weight's type."""
    weight, index, grad = torch.ones(9, 4), torch.tensor([3]), torch.ones(1, 4)
    with pytest.raises(RuntimeError):
        ops.update(weight, [torch.zeros(9, 4, dtype=torch.bfloat16)], index, grad, HYPER, "adagrad")


# ---- the library -----------------------------------------------------------------------------------------------------


def test_memory_says_what_these_very_tables_go_through() -> None:
    tables = EmbeddingTables(plan([TableConfig("t", 90, 8)], "hash", "50%"))
    assert tables.memory().ops == ops.backend()
    with ops.using("reference"):
        assert tables.memory().ops == "reference"
    assert "ops reference" in str(tables.double().memory())
    assert EmbeddingTables(plan([TableConfig("t", 90, 8)], "hash", "50%"), device="meta").memory().ops == "reference"


BITS = """
import hashlib, torch
from core_cases import all_methods, in_turn, random_ids, shares_scalars
from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.optimizers import SGD, Adam, Adagrad, RowWiseAdagrad
torch.set_num_threads(1)
print(ops.instructions())
configs = [TableConfig("a", 700, 16, padding_idx=3), TableConfig("b", 90, 6, pooling="mean")]
rules = [SGD(lr=0.1, clip_row_norm=0.5), RowWiseAdagrad(lr=0.1), Adagrad(lr=0.1), Adam(lr=0.1), None]
for method, rule in in_turn(all_methods(), rules, 2):
    if shares_scalars(method) and rule is not None and rule.kind == "rowwise_adagrad":
        continue
    counts = {c.name: torch.arange(1, c.num_embeddings + 1).roll(5).numpy() for c in configs}
    budget = None if method.kind == "full" else "40%"
    trained = ["fp32", "bf16"] if rule is not None and rule.kind == "adagrad" else ["fp32"]
    for dtype, rows in (*((torch.float32, name) for name in trained), (torch.bfloat16, "fp32")):
        solved = plan(configs, method.to_dict(), budget, counts, rule, training_precision=rows)
        tables = EmbeddingTables(solved, std=0.5).to(dtype)
        digest = hashlib.sha256()
        for seed in range(2):
            ids = random_ids(tables, 100, seed)
            lengths = torch.arange(200) % 2 * 2
            flat = ids.t().reshape(-1)
            out = tables(flat, torch.cat([lengths[:0].new_zeros(1), lengths.cumsum(0)]))
            if out.requires_grad:
                grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
                out.backward(grad.to(dtype))
            digest.update(out.detach().float().numpy().tobytes())
        gradients = [p.grad for p in tables.parameters() if p.grad is not None]
        for tensor in (*tables.state_dict().values(), *tables.optimizer_state_dict().values(), *gradients):
            digest.update(tensor.double().numpy().tobytes())
        print(method.to_dict(), rule and rule.kind, dtype, rows, digest.hexdigest())
"""


@NATIVE
def test_all_instruction_sets_leave_the_same_bits(tmp_path: Path) -> None:
    sets = ["baseline", "avx2", "avx512"]
    sets = sets[: sets.index(str(ops.instructions())) + 1]
    environments = [{"EMBTABLES_INSTRUCTIONS": name, "EMBTABLES_OPS": "native"} for name in sets]
    expected: list[str] = []
    for name, result in zip(sets, run_each(BITS, environments, tmp_path), strict=True):
        assert not result.returncode, result.stderr
        used, *lines = result.stdout.splitlines()
        assert used == name and len(lines) > 50
        expected = expected or lines
        assert lines == expected, name


@NATIVE
def test_an_instruction_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    wrong = {"EMBTABLES_INSTRUCTIONS": "avx1024"}
    environments = [wrong, {**wrong, "EMBTABLES_OPS": "reference"}, {"EMBTABLES_INSTRUCTIONS": ""}]
    code = "from embtables import ops; print(ops.instructions())"
    refused, aside, best = run_each(code, environments, tmp_path)
    assert refused.returncode
    last = refused.stderr.strip().splitlines()[-1]
    assert last == (
        "ValueError: EMBTABLES_INSTRUCTIONS must be baseline, avx2 or avx512, and one that this processor has, "
        "not 'avx1024'; leave it out for the best one"
    )
    assert aside.returncode == 0
    assert best.stdout.strip() in ("baseline", "avx2", "avx512")


@NATIVE
def test_a_library_with_other_structs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_CALL", [*native._CALL, "another"])
    with pytest.raises(native.LibraryMissing, match="is of another version of embtables"):
        native.load()


def test_the_notice_points_at_the_import_and_says_how_to_see_why(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib; real = pathlib.Path.is_file\n"
        "pathlib.Path.is_file = lambda self: self.name != '_native.so' and real(self)\n"
        "import torch\nimport embtables.hashing\nprint(embtables.ops.backend())\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "reference", result.stderr
    assert f"{script}:4: UserWarning: embtables looks tables up in plain PyTorch" in result.stderr
    assert "pip install -v shows what the compiler says" in result.stderr


DECOY = "#include <stdlib.h>\nvoid GOMP_parallel(void) { abort(); }\n"
THREADS = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
import torch
from embtables import EmbeddingTables, TableConfig, ops, plan
torch.set_num_threads(2)
tables = EmbeddingTables(plan([TableConfig("t", 90, 8)], "full"))
tables(torch.zeros(100_000, 1, dtype=torch.int64)).sum().backward()
print(ops.backend())
"""


@NATIVE
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no OpenMP runtime to look for")
def test_threads_are_those_of_the_runtime_that_pytorch_uses(tmp_path: Path) -> None:
    """Whatever else has that function, here another library that was loaded first."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, decoy = tmp_path / "decoy.c", tmp_path / "libgomp_decoy.so"
    source.write_text(DECOY)
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(decoy)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMBTABLES_OPS": "native"}
    result = subprocess.run(
        [sys.executable, "-c", THREADS, str(decoy)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.strip() == "native", (result.returncode, result.stderr)


def test_a_wheel_built_without_a_compiler_suits_any_machine_and_says_so(tmp_path: Path) -> None:
    """One with the library has another name, so that a cache or an index keeps the two apart."""
    for name in ("embtables", "models", "datasets"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "CC": "/nonexistent", "CXX": "/nonexistent"}
    build = "import setuptools.build_meta as b; b.build_wheel('out')"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "embtables/ops/native.py" in archive.namelist() and "embtables/ops/_native.so" not in archive.namelist()
