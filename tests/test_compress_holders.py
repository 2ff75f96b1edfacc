"""compress_ and what else holds a table: objects, dicts, copies, views, and optimisers of every kind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embtables import compress_


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
