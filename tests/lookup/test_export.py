"""Exported tables: graphs of PyTorch's own operators, which run without this package, for every batch size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from core_cases import all_methods, method_id, shuffled_counts
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from embtables import EmbeddingTables, TableConfig, plan
from embtables.faces.embedding import EmbeddingBag
from embtables.methods import Method, from_config, kinds

# Two tables with a feature in common, every treatment of ids out of range, padding, both poolings.
TABLES = [
    TableConfig("user", 500, 8, padding_idx=3),
    TableConfig("item", 300, 8, ["item", "history"], pooling="mean", on_out_of_range="oov"),
    TableConfig("seen", 200, 8, ["history"], on_out_of_range="hash", padding_idx=7),
    TableConfig("tag", 40, 4, on_out_of_range="hash"),
]
# As many features in two tables of one shape, which is what methods see of all these.
PAIR = [TABLES[0], replace(TABLES[1], feature_names=["item", "history", "seen"])]
FEATURES = 4
BATCHES = [0, 1, 2, 7]
# Each of them makes pruned serve another form; compressed rows are those of wide tables.
FORMS = {"bitmap": ("60%", 8), "compressed rows": ("7%", 64), "entries": ("4%", 8)}
PACKED = [
    ("hash", "bf16"),
    ("unified", "int8"),
    ("hash", "int4/slab"),
    ("robe", "int2"),
    ("robe", "binary2"),
    ("pruned", "int4"),
    ("full", "int8"),  # scales within the rows
    ("full", "binary4/1"),
]


def pruned(form: str) -> EmbeddingTables:
    budget, dim = FORMS[form]
    tables = EmbeddingTables(
        plan([replace(t, embedding_dim=dim) for t in PAIR], "pruned", budget, optimizer=None)
    ).eval()
    assert {e.variant for g in tables.plan.groups for e in g.layout.entries.values()} == {form}
    return tables


def make(method: str, configs: Sequence[TableConfig] = TABLES) -> EmbeddingTables:
    counts = {table.name: shuffled_counts(table.num_embeddings or 0) for table in configs}
    budget = None if method == "full" else "50%"
    return EmbeddingTables(plan(configs, method, budget, frequencies=counts, optimizer=None)).eval()


def bags(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, (FEATURES * batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(40, (int(offsets[-1]),), generator=generator)
    return ids, offsets, torch.randn(ids.shape, generator=generator)


def columns(batch: int) -> tuple[Tensor]:
    return (torch.randint(40, (batch, FEATURES), generator=torch.Generator().manual_seed(batch)),)


def exported(module: nn.Module, inputs: Any) -> ExportedProgram:
    """The module for every batch size, and in the case of bags every number of ids."""
    batch, ids = Dim("batch"), Dim("ids")
    shapes: Any = ({0: batch},) if len(inputs) == 1 else ({0: ids}, {0: FEATURES * batch + 1}, {0: ids})
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def foreign(program: ExportedProgram) -> list[str]:
    """The operators that are not PyTorch's own."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = [target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)]
    return sorted({name for name in names if name not in ("aten", "prim", "prims")})


class ATableEach(nn.Module):
    """A table for each method, and where asked the forms of what pruned serves and some precisions; a column each."""

    def __init__(self, methods: Sequence[Method], others: bool) -> None:
        super().__init__()
        counts = {"item": shuffled_counts(300)}
        item = TableConfig("item", 300, 8, on_out_of_range="oov")
        self.tables = nn.ModuleDict()
        for method in methods:
            budget = None if method.kind == "full" else "50%"
            solved = plan([item], method, budget, frequencies=counts, optimizer=None)
            self.tables[method_id(method).replace(".", ",")] = EmbeddingTables(solved)
        for form, (budget, dim) in FORMS.items() if others else ():
            served = EmbeddingTables(plan([replace(item, embedding_dim=dim)], "pruned", budget, optimizer=None))
            served.finalize()
            assert [entry.variant for g in served.plan.groups for entry in g.layout.entries.values()] == [form]
            self.tables[form] = served
        for method, precision in PACKED if others else ():
            budget = None if method == "full" else "10%"
            solved = plan([item], method, budget, optimizer=None, precision=precision)
            self.tables[f"{method} {precision}"] = EmbeddingTables(solved).finalize()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: tables(ids[:, i : i + 1]) for i, (name, tables) in enumerate(self.tables.items())}

    def ids(self, batch: int) -> Tensor:
        """Some of them out of range."""
        return torch.randint(350, (batch, len(self.tables)), generator=torch.Generator().manual_seed(batch))


Exported: TypeAlias = tuple[ATableEach, ExportedProgram]


@pytest.fixture(scope="module")
def defaults() -> Exported:
    """The default of every kind, and what is stored in other ways."""
    module = ATableEach([from_config(kind) for kind in kinds()], others=True).eval()
    return module, exported(module, (module.ids(5),))


@pytest.fixture(scope="module")
def variants() -> Exported:
    module = ATableEach(all_methods()[len(kinds()) :], others=False).eval()
    return module, exported(module, (module.ids(5),))


@pytest.mark.parametrize("which", ["defaults", "variants"])
def test_every_method_exports_for_every_batch_size(which: str, request: pytest.FixtureRequest) -> None:
    module, program = request.getfixturevalue(which)
    assert foreign(program) == []
    graph = program.module()
    for batch in BATCHES:
        torch.testing.assert_close(graph(module.ids(batch)), module(module.ids(batch)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [*kinds(), *FORMS])
def test_bags_export_for_every_number_of_examples(method: str) -> None:
    tables = pruned(method) if method in FORMS else make(method, PAIR)
    tables.finalize()
    program = exported(tables, bags(5))
    assert foreign(program) == []
    module = program.module()
    for batch in BATCHES:
        torch.testing.assert_close(module(*bags(batch)), tables(*bags(batch)), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def hashed() -> tuple[EmbeddingTables, nn.Module]:
    """All of the tables, and their graph for bags."""
    tables = make("hash")
    return tables, exported(tables, bags(5)).module()


def test_bags_of_every_kind_of_table_export(hashed: tuple[EmbeddingTables, nn.Module]) -> None:
    tables, graph = hashed
    for batch in BATCHES:
        torch.testing.assert_close(graph(*bags(batch)), tables(*bags(batch)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("given", [columns, bags])
def test_an_exported_graph_refuses_ids_out_of_range(given: Any, hashed: tuple[EmbeddingTables, nn.Module]) -> None:
    tables, graph = hashed
    module = graph if given is bags else exported(tables, given(5)).module()
    inputs = given(5)
    inputs[0].view(-1)[0] = 500
    with pytest.raises(RuntimeError, match="an id is out of range; the ids of the features: 'user' 0 … 499$"):
        module(*inputs)


def test_an_exported_graph_refuses_offsets_that_fall(hashed: tuple[EmbeddingTables, nn.Module]) -> None:
    ids, offsets, weights = bags(5)
    offsets[3] = offsets[4] + 1
    with pytest.raises(RuntimeError, match="offsets must rise from 0 to the number of ids"):
        hashed[1](ids, offsets, weights)


class Unpooled(nn.Module):
    """One tensor of all vectors, or of each feature by itself, of which a history is left unpooled."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        pair = [TableConfig("item", 90, 8, ["item", "history"]), TableConfig("user", 50, 8)]
        chosen = {"item": "hash", "user": "mixed_dimension"}
        self.tables = EmbeddingTables(plan(pair, chosen, "50%", optimizer=None)).eval()
        self.together = together

    def forward(self, ids: Tensor, offsets: Tensor) -> Any:
        if self.together:
            return self.tables(ids, offsets, pooling=None)
        return self.tables.lookup(ids, offsets, pooling={"history": None})


@pytest.mark.parametrize("together", [True, False])
def test_unpooled_histories_export(together: bool) -> None:
    model = Unpooled(together)
    offsets = torch.tensor([0, 1, 2, 5, 5, 6, 7])
    shapes = ({0: Dim("ids")}, {0: 3 * Dim("batch") + 1})
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (torch.arange(7), offsets), dynamic_shapes=shapes)
    assert foreign(program) == []
    for given in (offsets, torch.tensor([0, 1, 9, 10]), torch.tensor([0])):
        ids = torch.randint(50, (int(given[-1]),))
        torch.testing.assert_close(program.module()(ids, given), model(ids, given))


def test_a_view_exports_with_ids_behind_its_last_bag() -> None:
    view = EmbeddingBag.of(make("hash"), "item", include_last_offset=True).eval()
    shapes = ({0: Dim("ids")}, {0: Dim("ends")})
    inputs = torch.arange(12), torch.tensor([0, 3, 3, 9])
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(view, inputs, dynamic_shapes=shapes)
    for ids, offsets in (inputs, (torch.arange(5), torch.tensor([0, 2])), (torch.arange(4), torch.tensor([0]))):
        assert torch.equal(program.module()(ids, offsets), view(ids, offsets))
    assert torch.equal(view(torch.arange(5), torch.tensor([0, 5])), program.module()(*inputs[:1], torch.tensor([0, 5])))


class Model(nn.Module):
    """A small model over bags and ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = make("mixed_dimension")
        single = plan([TableConfig("country", 60, 4)], "compositional", "50%", optimizer=None)
        self.countries = EmbeddingTables(single).eval()
        self.top = nn.Linear(4 * 8 + 4 + 4, 1)

    def forward(self, countries: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        logits: Tensor = self.top(torch.cat([self.tables(ids, offsets), self.countries(countries)], 1))
        return logits


def inputs_of(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(60, (batch, 1)), *bags(batch, seed=batch)[:2])


@pytest.fixture(scope="module")
def model() -> Model:
    return Model().eval()


@pytest.fixture(scope="module")
def program(model: Model) -> ExportedProgram:
    batch = Dim("batch")
    shapes = ({0: batch}, {0: Dim("ids")}, {0: FEATURES * batch + 1})
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(model, inputs_of(5), dynamic_shapes=shapes)


_ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "embtables":
            raise ImportError("embtables is not here")

sys.meta_path.insert(0, Nothing())
import torch

file, cases = sys.argv[1:]
if file.endswith(".pt2.aoti"):
    module = torch._inductor.aoti_load_package(file)
else:
    module = torch.export.load(file).module()
for inputs, expected in torch.load(cases):
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-6, atol=1e-6)
assert not any(name.split(".")[0] == "embtables" for name in sys.modules)
print("equal")
"""


def run_without_this_package(model: nn.Module, file: Path, given: list[tuple[Tensor, ...]]) -> None:
    cases = []
    for inputs in given:
        cases.append((inputs, model(*inputs).detach()))
    torch.save(cases, file.parent / "cases.pt")
    command = [sys.executable, "-c", _ALONE, str(file), str(file.parent / "cases.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def test_a_saved_program_runs_where_this_package_is_not(model: Model, program: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(program, tmp_path / "model.pt2")
    run_without_this_package(model, tmp_path / "model.pt2", [inputs_of(batch) for batch in BATCHES])


@pytest.mark.slow
def test_a_compiled_package_runs_where_this_package_is_not(tmp_path: Path) -> None:
    """One table of bags: compiling takes half a minute even so."""
    bag = TableConfig("item", 300, 8, [f"history{i}" for i in range(FEATURES)], pooling="mean", on_out_of_range="oov")
    tables = EmbeddingTables(plan([bag], "hash", "50%", optimizer=None)).eval()
    file = tmp_path / "model.pt2"
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    program = exported(tables, bags(5))
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=quickly)
    file = file.rename(tmp_path / "model.pt2.aoti")
    run_without_this_package(tables, file, [bags(batch) for batch in BATCHES])


def in_onnx(program: ExportedProgram, file: Path, optimize: bool = True) -> Any:
    """A session of ONNX Runtime over the program, whose graph PyTorch's exporter has simplified before, or not."""
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnx = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=optimize)
    assert onnx is not None
    onnx.save(file)
    return runtime.InferenceSession(file)


def in_session(session: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    given = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), inputs)}
    return torch.from_numpy(session.run(None, given)[0])


def test_onnx_runtime_agrees(model: Model, program: ExportedProgram, tmp_path: Path) -> None:
    session = in_onnx(program, tmp_path / "model.onnx")
    for batch in BATCHES:
        inputs = inputs_of(batch)
        torch.testing.assert_close(in_session(session, inputs), model(*inputs).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_onnx_runtime_agrees_on_every_method(defaults: Exported, tmp_path: Path) -> None:
    """The default of every kind alone, not simplified: the exporter takes a second a table even so."""
    module, program = defaults
    session = in_onnx(program, tmp_path / "tables.onnx", optimize=False)
    for batch in BATCHES:
        expected = module(module.ids(batch))
        found = session.run(None, {session.get_inputs()[0].name: module.ids(batch).numpy()})
        assert len(found) == len(expected)
        for (name, vectors), values in zip(expected.items(), found):
            torch.testing.assert_close(torch.from_numpy(values), vectors.detach(), rtol=1e-6, atol=1e-6, msg=name)
