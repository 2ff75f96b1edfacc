"""What native code takes for granted is checked before: recipes, ranks in files, operators' shapes, the library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import shuffled_counts

from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.ops import native, reference
from embtables.ops.program import (
    LOOKUP_WORDS,
    PIECE_WORDS,
    Entrance,
    Piece,
    Program,
    Recipe,
    compile_program,
)

NATIVE = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")
ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment},
        capture_output=True,
        text=True,
    )


# ---- recipes ---------------------------------------------------------------------------------------------------------

TABLE = Entrance("item", 0, 8, 100, "error", 0, None)
WITHOUT_VOCABULARY = TABLE._replace(num_embeddings=None)
CODES = {
    "rank": torch.zeros(120, dtype=torch.int32),
    "short": torch.zeros(99, dtype=torch.int32),
    "wide": torch.zeros(200),
}


def compiled(recipe: Recipe, entrance: Entrance = TABLE) -> Program:
    """Weights: 200 rows of width 8, 50 of width 4, 64 scalars."""
    return compile_program([(entrance, recipe)], 1, {8: 200, 4: 50, 1: 64}, {"p": (4, 8), "q": (4, 8)}, CODES)


GOOD: list[tuple[Recipe, Entrance]] = [
    (Recipe("concat", [Piece(8, 100)]), TABLE),
    (Recipe("concat", [Piece(8, 99)], ("rank", 19)), TABLE._replace(on_out_of_range="oov")),
    (Recipe("concat", [Piece(8, 190, "hash", 5, 10)]), WITHOUT_VOCABULARY),
    (Recipe("concat", [Piece(4, 0, "digit", 1, 25), Piece(4, 25, "digit", 25, 25, column=4)]), WITHOUT_VOCABULARY),
    (Recipe("concat", [Piece(8, 149, "cut", 50)], ("rank", 20)), TABLE),
    (Recipe("concat", [Piece(1, 0, "block", 3, 64, 6, 0), Piece(1, 0, "block", 4, 64, 2, 6, sign_seed=1)]), TABLE),
    (Recipe("sum", []), TABLE),
    (Recipe("mean", [Piece(8, 0, "hash", 0, 7, sign_seed=0), Piece(8, 7, "hash", 1, 193)]), TABLE),
    (Recipe("alternatives", [Piece(8, 0, "below", 50), Piece(4, -50, "below", 2**62, projection="p")]), TABLE),
]
BAD: list[tuple[str, Recipe, Entrance]] = [
    ("which is none of concat, sum", Recipe("max", [Piece(8, 0)]), TABLE),  # type: ignore[arg-type]
    ("whose address is none of row", Recipe("concat", [Piece(8, 0, "column")]), TABLE),  # type: ignore[arg-type]
    ("slabs have the widths 8, 4, 1", Recipe("concat", [Piece(16, 0)]), TABLE),
    ("rows 101 … 200, but there are 200", Recipe("concat", [Piece(8, 101)]), TABLE),
    ("rows 100 … 200, but", Recipe("concat", [Piece(8, 100)]), TABLE._replace(on_out_of_range="oov")),
    ("rows -1 … 98", Recipe("concat", [Piece(8, -1)]), TABLE),
    ("rows 191 … 200", Recipe("concat", [Piece(8, 191, "hash", 5, 10)]), TABLE),
    ("rows 150 … 200", Recipe("concat", [Piece(8, 150, "cut", 50)]), TABLE),
    ("b is below 1", Recipe("concat", [Piece(8, 0, "digit", 1, 0)]), TABLE),
    ("b is below 1", Recipe("concat", [Piece(8, 0, "digit", 0, 5)]), TABLE),
    ("b is below 1", Recipe("concat", [Piece(8, 0, "hash", 1, 0)]), TABLE),
    ("no num_embeddings", Recipe("concat", [Piece(8, 0)]), WITHOUT_VOCABULARY),
    ("at most b scalars", Recipe("concat", [Piece(1, 0, "block", 1, 7, 8)]), TABLE),
    ("are concatenated", Recipe("sum", [Piece(1, 0, "block", 1, 64, 8)]), TABLE),
    ("only blocks", Recipe("concat", [Piece(8, 0, scalars=9)]), TABLE),
    ("before it end at column 0", Recipe("concat", [Piece(8, 0, column=1)]), TABLE),
    ("of 4 scalars in all", Recipe("concat", [Piece(4, 0, "hash", 1, 9)]), TABLE),
    ("of 12 scalars in all", Recipe("concat", [Piece(8, 0), Piece(4, 0, "hash", 1, 9, column=8)]), TABLE),
    ("vectors have 8 dimensions", Recipe("sum", [Piece(4, 0, "hash", 1, 9)]), TABLE),
    ("needs at least 2", Recipe("mult", [Piece(8, 0)]), TABLE),
    ("needs at least 1", Recipe("concat", []), TABLE),
    ("with a sign", Recipe("mult", [Piece(8, 0, sign_seed=1), Piece(8, 0)]), TABLE),
    ("with a projection", Recipe("sum", [Piece(4, 0, "hash", 1, 9, projection="p")]), TABLE),
    ("no code of int32", Recipe("concat", [Piece(8, 0)], ("ranks", 0)), TABLE),
    ("no code of int32", Recipe("concat", [Piece(8, 0)], ("wide", 0)), TABLE),
    ("has 99 from 0 on, for 100 ids", Recipe("concat", [Piece(8, 0)], ("short", 0)), TABLE),
    ("has 120 from 21 on", Recipe("concat", [Piece(8, 0)], ("rank", 21)), TABLE),
    ("for None ids", Recipe("concat", [Piece(8, 0, "hash", 1, 9)], ("rank", 0)), WITHOUT_VOCABULARY),
    ("needs at least 1", Recipe("alternatives", []), TABLE),
    ("ids below 99 alone", Recipe("alternatives", [Piece(8, 0, "below", 99)]), TABLE),
    ("have taken", Recipe("alternatives", [Piece(8, 0, "below", 50), Piece(8, 0, "below", 40)]), TABLE),
    ("belong together", Recipe("alternatives", [Piece(8, 0)]), TABLE),
    ("belong together", Recipe("concat", [Piece(8, 0, "below", 2**62)]), TABLE),
    (
        "rows 0 … 50, but there are 50",
        Recipe("alternatives", [Piece(8, 0, "below", 49), Piece(4, -49, "below", 2**62, projection="p")]),
        TABLE,
    ),
    (
        "no extra of",
        Recipe("alternatives", [Piece(4, 0, "below", 2**62, projection="r")]),
        TABLE._replace(num_embeddings=9),
    ),
    (
        "another projection",
        Recipe("alternatives", [Piece(4, 0, "below", 9, projection="p"), Piece(4, 0, "below", 20, projection="q")]),
        TABLE._replace(num_embeddings=20),
    ),
]


@pytest.mark.parametrize("recipe, entrance", GOOD)
def test_recipes_that_stay_within_their_slabs_are_taken(recipe: Recipe, entrance: Entrance) -> None:
    words = compiled(recipe, entrance).words
    assert words.numel() == 6 + LOOKUP_WORDS + len(recipe.pieces) * PIECE_WORDS + 4 * 2 + 2 * 2


@pytest.mark.parametrize("reason, recipe, entrance", BAD)
def test_other_recipes_are_refused_when_tables_are_built(reason: str, recipe: Recipe, entrance: Entrance) -> None:
    with pytest.raises(
        ValueError, match=r"^table 'item': its recipe .*; mend what the block's recipes\(\) returns$"
    ) as e:
        compiled(recipe, entrance)
    assert reason in str(e.value)


# ---- ranks -----------------------------------------------------------------------------------------------------------

RANKED = [TableConfig("item", 300, 8, on_out_of_range="oov"), TableConfig("city", 40, 8)]


def ranked(kind: str) -> EmbeddingTables:
    counts = {c.name: shuffled_counts(c.num_embeddings) for c in RANKED}
    return EmbeddingTables(plan(RANKED, kind, "40%", counts, "adagrad"), std=0.5)


@pytest.mark.parametrize("kind", ["mixed_dimension", "frequency_cutoff"])
@pytest.mark.parametrize("rank", [40, 2**31 - 1, -1])
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
        EmbeddingTables.load(tmp_path / "tables")


@pytest.mark.parametrize("kind", ["mixed_dimension", "frequency_cutoff"])
def test_codes_of_another_type_go_through_pytorch(kind: str) -> None:
    tables = ranked(kind)
    ids = torch.tensor([[299, 39], [300, 0], [5, 5]])
    expected = tables(ids).detach()
    state = tables.state_dict()
    tables.load_state_dict({k: v.long() if "code" in k else v for k, v in state.items()}, assign=True)
    assert tables.store.code_0.dtype == torch.int64 and tables.memory().ops == "reference"
    torch.testing.assert_close(tables(ids).detach(), expected)


# ---- the single operators --------------------------------------------------------------------------------------------

HYPER = torch.tensor([0.1, 0, 1e-8, 0.9, 0.999], dtype=torch.float64)
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
    "short hyper": (ValueError, "hyper holds 2 numbers", {"hyper": HYPER[:2]}),
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
    ops.update(weight, [], index, grad, HYPER.float(), "sgd")
    reference.update._init_fn(expected, [], index, grad, HYPER, "sgd")
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
from core_cases import all_methods, random_ids
from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.optimizers import SGD, Adam, Adagrad, RowWiseAdagrad
torch.set_num_threads(1)
print(ops.instructions())
configs = [TableConfig("a", 700, 16, padding_idx=3), TableConfig("b", 90, 6, pooling="mean")]
for method in all_methods():
    for rule in (SGD(lr=0.1, clip_row_norm=0.5), RowWiseAdagrad(lr=0.1), Adagrad(lr=0.1), Adam(lr=0.1), None):
        if method.kind == "robe" and rule is not None and rule.kind == "rowwise_adagrad":
            continue
        counts = {c.name: torch.arange(1, c.num_embeddings + 1).roll(5).numpy() for c in configs}
        budget = None if method.kind == "full" else "40%"
        for dtype in (torch.float32, torch.bfloat16):
            tables = EmbeddingTables(plan(configs, method.to_dict(), budget, counts, rule), std=0.5).to(dtype)
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
            print(method.to_dict(), rule and rule.kind, dtype, digest.hexdigest())
"""


@NATIVE
def test_all_instruction_sets_leave_the_same_bits() -> None:
    sets = ["baseline", "avx2", "avx512"]
    best = str(ops.instructions())
    expected: list[str] = []
    for name in sets[: sets.index(best) + 1]:
        result = run(BITS, EMBTABLES_INSTRUCTIONS=name, EMBTABLES_OPS="native")
        assert not result.returncode, result.stderr
        used, *lines = result.stdout.splitlines()
        assert used == name and len(lines) > 50
        expected = expected or lines
        assert lines == expected, name


@NATIVE
def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    result = run("import embtables", EMBTABLES_INSTRUCTIONS="avx1024")
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "ValueError: EMBTABLES_INSTRUCTIONS must be baseline, avx2 or avx512, and one that this processor has, "
        "not 'avx1024'; leave it out for the best one"
    )
    assert run("import embtables", EMBTABLES_INSTRUCTIONS="avx1024", EMBTABLES_OPS="reference").returncode == 0
    best = run("from embtables import ops; print(ops.instructions())", EMBTABLES_INSTRUCTIONS="")
    assert best.stdout.strip() in ("baseline", "avx2", "avx512")


@NATIVE
def test_a_library_with_other_structs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    longer = type("_Call", (native._Call,), {"_fields_": [("another", native._int)]})
    monkeypatch.setattr(native, "_Call", longer)
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
