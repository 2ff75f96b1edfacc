"""compress_ and what else holds a table: objects, dicts, copies, views, and optimizers of every kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import TRAINED_PROJECTIONS
from torch import Tensor, nn

from embtables import compress_
from embtables.lookup.block import Part
from embtables.lookup.step import Aliases, Step
from embtables.lookup.store import Store
from embtables.sizes.layout import Form, Slab


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(2000, 16)
        self.item = nn.Embedding(1000, 16)
        self.top = nn.Linear(32, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(torch.cat([self.user(ids), self.item(ids)], dim=-1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(50)).square().mean().backward()
    optimizer.step()


def refused(model: nn.Module, words: str, method: Any = "hash", **options: Any) -> None:
    """Checks that it is refused with these words, and that nothing was changed."""
    before = {name: id(p) for name, p in model.named_parameters()}, {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        compress_(model, method, 0.5 if method == "mixed_dimension" else 0.1, **options)
    after = {name: id(p) for name, p in model.named_parameters()}, {n: id(m) for n, m in model.named_modules()}
    assert before == after


# ---- objects, dicts and tuples ---------------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("__dict__", "w")

    def __init__(self, w: object, **attributes: object) -> None:
        self.w = w
        vars(self).update(attributes)


def test_what_an_object_holds_outside_of_its_attributes_is_refused() -> None:
    for hold in (
        lambda m: functools.partial(m.user),
        lambda m: functools.partial(max, m.user),
        lambda m: Slotted(m.user.weight),
        lambda m: Slotted(m.user, other=m.item),
    ):
        model = Model()
        model.look = hold(model)
        refused(model, "the old table 'user' is also held by a .*: delete it, or build it after")
        del model.look
        compress_(model, "hash", 0.1)


def test_attributes_of_objects_are_rewritten_and_named() -> None:
    model = Model()
    model.look = Slotted(None, table=model.user, weight=model.item.weight)
    report = compress_(model, "hash", 0.1)
    assert model.look.table is model.user and model.look.weight is model.item.tables.store.weight_16
    assert "model.look.table: now the new module" in report.moved
    assert "model.look.weight: now the new parameter, 100 × 16 in place of 1,000 × 16" in report.moved


def test_every_rewriting_is_named() -> None:
    model = Model()
    model.refs = {"out": model.user.weight}
    model.both = [model.user.weight, model.item.weight]
    report = compress_(model, "hash", 0.1)
    assert model.refs["out"] is model.user.tables.store.weight_16
    assert [text.partition(":")[0] for text in report.moved] == ["model.refs.out", "model.both"]
    assert report.moved[0].endswith("200 × 16 in place of 2,000 × 16") and report.moved[1].endswith(
        "old weights and modules, 2"
    )


def test_a_layer_outside_the_modules_takes_no_weight_of_another_shape() -> None:
    model = Model()
    layer = nn.Linear(16, 2000, bias=False)
    layer.weight = model.user.weight
    model.outs = [layer]
    refused(model, r"'user' is held by 'model.outs\[0\].weight', a parameter of shape 2,000 × 16.*does not fit there")
    compress_(model, "full")
    assert layer.weight is model.user.weight


def test_tuples_on_the_model_are_rewritten() -> None:
    model = Model()
    model.pair = (model.user.weight, 0.1)
    model.reg = list(model.named_parameters())
    model.nested = {"a": ((model.item.weight,), [(model.user, "user")])}
    report = compress_(model, "hash", 0.1)
    user, item = (m.tables.store.weight_16 for m in (model.user, model.item))
    assert model.pair[0] is user and model.pair[1] == 0.1
    assert model.reg[0][0] == "user.weight" and model.reg[0][1] is user and model.reg[1][1] is item
    assert model.reg[2][1] is model.top.weight
    assert model.nested["a"][0][0] is item and model.nested["a"][1][0][0] is model.user
    assert {t.partition(":")[0] for t in report.moved} == {
        "model.pair", "model.reg", "model.nested.a", "model.nested.a[1]"
    }  # fmt: skip


# ---- copies and views ------------------------------------------------------------------------------------------------


def test_an_average_inside_the_model_is_refused() -> None:
    model = Model()
    model.ema = torch.optim.swa_utils.AveragedModel(Model())
    refused(model, "'ema' is a AveragedModel, .*: make it after compress_")


def test_copies_are_told() -> None:
    model = Model()
    model.target = copy.deepcopy(model.item)
    model.a, model.b = nn.Embedding(50, 1), nn.Embedding(50, 1)
    nn.init.zeros_(model.a.weight), nn.init.zeros_(model.b.weight)
    kept = copy.deepcopy(model)
    report = compress_(model, "hash", 0.1)
    assert report.copies == {"target": "item"} and "so copy after compress_: target of item" in str(report)
    assert compress_(kept, "full").copies == {}
    assert compress_(Model(), "hash", 0.1).copies == {}


@pytest.mark.parametrize("view", [lambda w: w.detach(), lambda w: w.data[3:5], lambda w: w.detach().numpy()])
def test_views_that_keep_an_old_table_in_memory_are_told(view: Callable[[Tensor], object]) -> None:
    model = Model()
    model.snap = [view(model.user.weight)]
    with pytest.warns(UserWarning, match="1 of the old tables are still in memory.*a view of them \\('user'\\)"):
        report = compress_(model, "hash", 0.1)
    assert report.not_freed == ["user"] and "the old tables are freed" not in str(report)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_what_rebind_cannot_use_is_refused() -> None:
    model, other = Model(), Model()
    adam = torch.optim.Adam(other.parameters())
    refused(model, r"rebind\[0\] \(Adam\) holds no parameter of this model: give the optimizer", rebind=adam)
    refused(model, "not a NoneType: leave it out", rebind=None)
    refused(model, "not a StepLR: give its .optimizer", rebind=torch.optim.lr_scheduler.StepLR(adam, 1))
    refused(model, "not a str: leave it out", rebind="adam")


def test_an_optimizer_without_tables_is_named() -> None:
    model = Model()
    report = compress_(model, "hash", 0.1, rebind=torch.optim.SGD(model.top.parameters(), lr=0.1))
    assert report.moved == ["rebind[0] (SGD): holds none of the tables, so it stays as it is"]


@pytest.mark.parametrize("held", ["outside", "attribute", "rebind"])
def test_an_optimizer_whose_constructor_failed(held: str) -> None:
    model = Model()
    broken = torch.optim.Adam.__new__(torch.optim.Adam)
    with pytest.raises(ValueError, match="learning rate"):
        broken.__init__(model.parameters(), lr=-1)  # type: ignore[misc]
    if held == "attribute":
        model.broken = broken
    if held == "rebind":
        refused(model, "rebind.0. \\(Adam\\) holds no parameter of this model", rebind=broken)
    assert len(compress_(model, "hash", 0.1).tables) == 2


def test_tables_of_a_collection_in_full_keep_their_state() -> None:
    """Training goes on as that of the untouched model, though one parameter takes the place of two."""
    modules = pytest.importorskip("torchrec.modules.embedding_modules", exc_type=ImportError)
    torchrec = pytest.importorskip("torchrec", exc_type=ImportError)
    torch.manual_seed(0)
    tables = [
        torchrec.EmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=dim, feature_names=[name])
        for name, n, dim in (("user", 20, 8), ("item", 30, 8), ("city", 10, 4))
    ]
    model = nn.Sequential(modules.EmbeddingBagCollection(tables=tables))
    ids = torchrec.KeyedJaggedTensor(["user", "item", "city"], torch.arange(1, 7), lengths=torch.ones(6).int())
    model.optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def train(model: nn.Module) -> None:
        model.optimizer.zero_grad()
        model(ids).values().square().sum().backward()
        model.optimizer.step()

    train(model)
    twin = copy.deepcopy(model)
    report = compress_(model, "full")
    assert len(model.optimizer.state) == 2 and "state" not in "".join(report.moved)
    for _ in range(3):
        train(model), train(twin)
    torch.testing.assert_close(model(ids).values(), twin(ids).values())


@pytest.mark.parametrize(
    ("kind", "method", "sparse", "words"),
    [
        (torch.optim.SparseAdam, "hash", False, r"'user': rebind\[0\] \(SparseAdam\) takes sparse .*sparse=True"),
        (torch.optim.SparseAdam, TRAINED_PROJECTIONS, True, "would be dense: choose a method without trained proj"),
        (torch.optim.Adam, "hash", True, r"'user': rebind\[0\] \(Adam\) takes dense .* sparse=False"),
        (torch.optim.RMSprop, "mixed_dimension", True, "sparse=False"),
    ],
)
def test_optimizers_that_do_not_take_the_kind_of_gradient(kind: Any, method: Any, sparse: bool, words: str) -> None:
    model = Model()
    optimizer = kind([*model.user.parameters(), *model.item.parameters()], lr=0.1)
    refused(model, words, method, rebind=optimizer, sparse=sparse)
    compress_(model, "hash", 0.1, rebind=optimizer, sparse=kind is torch.optim.SparseAdam)
    step(model, optimizer)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_shared_storage_goes_by_the_name_of_its_group() -> None:
    report = compress_(Model(), "unified", 0.1)
    (line,) = [line for line in report.plan.lines() if line["shared_by"] is not None]
    assert report.shared_bytes == {line["shared_by"]: line["inference_bytes"]}
    assert line["table"] == f"(shared by {line['shared_by']})"


def test_widths_without_addresses_are_told_apart() -> None:
    store = Store([Form((Slab("a", 10, 4), Slab("b", 10, 8)))], None, device="meta")
    rows = torch.zeros(3, dtype=torch.int64, device="meta")
    assert [Step(store, aliases=Aliases()).gather([Part(width, rows)])[0].shape for width in (4, 8)] == [(3, 4), (3, 8)]
