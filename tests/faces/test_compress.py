"""compress_ on plain PyTorch models: what is swapped, what is left alone, what is moved, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embtables import Embedding, EmbeddingBag, EmbeddingTables, InfeasibleBudget, TableConfig, compress_, plan
from embtables.methods import Hash, Unified

X = torch.randint(0, 400, (64,), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Two towers with a tied history, a bag and a small table; every table is in use."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(1000, 8, padding_idx=0, sparse=sparse)
        self.towers = nn.ModuleDict({"user": nn.Embedding(500, 8, sparse=sparse)})
        self.bag = nn.EmbeddingBag(400, 8, mode="mean", sparse=sparse)
        self.city = nn.Embedding(20, 8, sparse=sparse)
        self.history = self.item
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            self.item(x) + self.history(x // 2),
            self.towers["user"](x),
            self.bag(x.view(-1, 1)),
            self.city(x % 20),
        )
        return self.head(torch.cat(parts, 1)).squeeze(1)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    (model(X) - 1).pow(2).mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def dense(model: nn.Module) -> dict[str, Tensor]:
    """Every table, compressed or not."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (Embedding, EmbeddingBag)):
            found[name] = module.to_dense().clone()
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found[name] = module.weight.detach().clone()
    return found


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> object:
    """What has to be the same after a refusal: modules and parameters by identity, and the optimizers' groups."""
    modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(p), p._version) for name, p in model.named_parameters()]
    groups = [[id(p) for g in o.param_groups for p in g["params"]] + [id(k) for k in o.state] for o in optimizers]
    return modules, parameters, groups


# ---- what is swapped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "budget"),
    [("hash", 0.1), ("compositional", "20%"), (Unified(), 6000), ("robe", 0.1), ("pruned", 0.3),
     ("mixed_dimension", 0.5), ("multi_hash", 0.2), ({"*item*": "hash", "towers.*": Hash(), "*": "full"}, "60%")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("fused", [None, "adagrad"])
def test_every_method_fits_trains_and_frees(method: Any, budget: Any, fused: str | None) -> None:
    model = Model()
    model.optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    step(model, model.optimizer)
    old = [weakref.ref(m.weight) for m in (model.item, model.towers["user"], model.bag, model.city)]
    report = compress_(model, method, budget, optimizer=fused)
    assert [ref() for ref in old] == [None] * 4 and report.not_freed == []
    tables = {id(m): m for m in model.modules() if isinstance(m, EmbeddingTables)}.values()
    assert sum(t.memory().inference_bytes for t in tables) == report.bytes_after == report.plan.inference_bytes
    assert report.plan.budget_bytes is not None and report.bytes_after <= report.plan.budget_bytes
    assert report.bytes_before == 4 * 8 * (1000 + 500 + 400 + 20)
    assert [t.name for t in report.tables] == ["item", "towers.user", "bag", "city"]
    assert report.tables[0].other_names == ("history",) and model.item is model.history
    before = dense(model)
    for _ in range(3):
        step(model, model.optimizer)
    for name, after in dense(model).items():
        assert not torch.equal(before[name], after), name
        assert after.isfinite().all()
    groups = [p for g in model.optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()} and len(groups) == len(set(groups))
    in_full = [table.name for table in report.tables if table.stored_as == "full"]
    assert report.kept == (
        ["item", "towers.user", "bag", "city"] if method in ("pruned", "mixed_dimension") else in_full
    )


@pytest.mark.parametrize("trained", [0, 3])
def test_full_loses_nothing(trained: int) -> None:
    """Same predictions, and training goes on as that of the untouched model, with the optimizer's state."""
    model = Model()
    model.optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(trained):
        step(model, model.optimizer)
    twin = copy.deepcopy(model)
    report = compress_(model, "full")
    assert report.anew == [] and "state" not in "".join(report.moved)
    assert torch.equal(model(X), twin(X))
    for _ in range(5):
        step(model, model.optimizer)
        step(twin, twin.optimizer)
    torch.testing.assert_close(model(X), twin(X))
    for name, table in dense(twin).items():
        torch.testing.assert_close(dense(model)[name], table)


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X) - 1).pow(2).mean())


@pytest.mark.parametrize("method", ["full", "hash", "pruned", {"item": "full"}])
@pytest.mark.parametrize("precision", [None, "binary"])
def test_the_report_says_what_it_cost(method: Any, precision: str | None) -> None:
    """Of the served form, as ``finalize`` shows afterwards; training goes on in fp32, as without being evaluated."""
    model = Model()
    dense_part = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(5):
        step(model, dense_part)
    del dense_part
    twin, before = copy.deepcopy(model), loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what starts anew
        options = {"precision": precision, "optimizer": "adam" if method == "pruned" else None}
        budget = None if method in ("full", {"item": "full"}) else "20%"
        report = compress_(model, method, budget, evaluate=loss, **options)
        quiet = compress_(twin, method, budget, **options)
    assert report.measured_before == before and quiet.measured_before is quiet.measured_after is None
    assert f"evaluate: {before:.6g} before, " in str(report) and "evaluate" not in str(quiet)
    after = report.measured_after
    assert after is not None and (after == before) == (precision is None and budget is None)
    for each in (model, twin):
        head = torch.optim.SGD(each.parameters(), lr=0.1)
        assert not any(module.served for module in each.modules() if isinstance(module, EmbeddingTables))
        changed = copy.deepcopy(each)
        for module in changed.modules():
            if isinstance(module, EmbeddingTables):
                module.finalize()
        assert loss(changed) == after
        step(each, head)
    for (name, one), other in zip(model.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(one, other), name


def test_what_measures_nothing_is_refused_before_anything_is_changed() -> None:
    model = Model()
    with pytest.raises(ValueError, match="evaluate must return a number, such as a loss, not a NoneType"):
        compress_(model, "full", evaluate=lambda model: None)  # type: ignore[arg-type, return-value]
    assert isinstance(model.item, nn.Embedding)


@pytest.mark.parametrize("mode", [True, False])
def test_measuring_leaves_each_module_in_its_mode(mode: bool) -> None:
    """A fused optimizer updates nothing in a model that was left in evaluation mode, and says nothing of it."""

    def in_the_other_mode(model: nn.Module) -> float:
        return loss(model.train(not mode))

    model, quiet = Model().train(mode), Model().train(mode)
    for each in (model, quiet):
        each.head.train(not mode)  # such as a part that is frozen
    compress_(model, "hash", "20%", optimizer="adam", evaluate=in_the_other_mode)
    compress_(quiet, "hash", "20%", optimizer="adam")
    modes = [{name: module.training for name, module in each.named_modules()} for each in (model, quiet)]
    assert modes[0] == modes[1] and modes[0]["head"] == (not mode) and modes[0]["item"] == mode
    assert {module.training for each in (model.item, quiet.item) for module in each.modules()} == {mode}
    before = dense(model)
    model(X).sum().backward()
    assert any(not torch.equal(after, before[name]) for name, after in dense(model).items()) == mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hsh"}, "unknown method 'hsh'"),
        ({"method": "hash", "budget": "1"}, "1"),
        ({"method": "hash", "budget": "20%", "optimizer": "adan"}, "unknown optimizer 'adan'"),
        ({"method": "hash", "budget": "20%", "precision": "int5"}, "unknown precision 'int5'"),
        ({"method": "hash", "budget": "20%", "std": -1}, "std"),
        ({"method": {"nothing*": "hash"}, "budget": "20%"}, "no pattern of method matches its name"),
        ({"method": "hash", "budget": "20%", "rebind": [torch.optim.SGD([nn.Parameter(X.float())])]}, "rebind"),
    ],
)
def test_what_is_wrong_costs_no_measurement(arguments: dict[str, Any], message: str) -> None:
    measured: list[nn.Module] = []
    with pytest.raises(ValueError, match=message):
        compress_(Model(), **arguments, evaluate=lambda model: measured.append(model) or 0.0)
    model = Model()
    held = {"weight": model.item.weight}
    with pytest.raises(ValueError, match="the old table 'item' is also held by"):
        compress_(model, "hash", "20%", evaluate=lambda model: measured.append(model) or 0.0)
    assert measured == [] and held["weight"] is model.item.weight


def test_a_measurement_that_fails_at_the_end_leaves_the_report() -> None:
    def only_plain(model: nn.Module) -> float:
        return loss(model) + 0 * model.item.weight.numel()  # type: ignore[operator, union-attr]

    model = Model()
    with pytest.warns(
        UserWarning, match=r"evaluate failed with the new tables \(AttributeError: table 'item' is not .*\), so"
    ):
        report = compress_(model, "hash", "20%", optimizer="adam", evaluate=only_plain)
    assert report.measured_before is not None and report.measured_after is None
    assert f"evaluate: {report.measured_before:.6g} before, failed\n" in str(report)
    assert isinstance(model.item, Embedding) and not any(
        module.served for module in model.modules() if isinstance(module, EmbeddingTables)
    )


def test_stages_go_on_after_tables_were_shown_as_served() -> None:
    tables = EmbeddingTables(plan([TableConfig("item", 100, 8)], "pruned", "20%", optimizer="adam"))
    ids = torch.arange(50).unsqueeze(1)
    for _ in range(3):
        tables(ids).sum().backward()
    state = {name: tensor.clone() for name, tensor in tables.state_dict().items()}
    with torch.no_grad():
        expected = tables.serve()(ids)
        with tables.as_served():
            assert torch.equal(tables(ids), expected) and tables.served
            with tables.as_served():
                assert torch.equal(tables(ids), expected)
            assert tables.served
    assert not tables.served and all(torch.equal(tables.state_dict()[name], tensor) for name, tensor in state.items())
    tables(ids).sum().backward()
    assert int(tables.optimizer_state_dict()["stage_0_steps"]) == 4


def test_pruned_keeps_trained_weights() -> None:
    model = Model()
    before = model(X).detach()
    report = compress_(model, "pruned", 0.3)
    assert report.kept == ["item", "towers.user", "bag", "city"]
    assert torch.equal(model(X), before)
    (tables,) = {m for m in model.modules() if isinstance(m, EmbeddingTables)}
    tables.finalize()
    assert tables.memory().inference_bytes == report.bytes_after
    assert not torch.equal(model.eval()(X), before)


def test_own_storage_but_for_methods_that_share() -> None:
    model = Model()
    compress_(model, "hash", 0.1)
    assert len({id(m.tables) for m in (model.item, model.towers["user"], model.bag, model.city)}) == 4
    for parameter, table in ((p, t) for t in (model.item, model.city) for p in t.parameters()):
        assert parameter.numel() * 4 == table.tables.plan.inference_bytes
    other = Model()
    compress_(other, "unified", 0.1)
    assert len({id(m.tables) for m in (other.item, other.towers["user"], other.bag, other.city)}) == 1


def test_names_seed_the_hashes_of_a_joint_plan() -> None:
    """A table stored alone has the addresses that the joint plan gives it."""
    model = Model()
    report = compress_(model, "hash", 0.1, hash_seed=5)
    joint = EmbeddingTables(report.plan)
    for name, module in (("item", model.item), ("towers.user", model.towers["user"])):
        assert joint.collision_share(name) == module.tables.collision_share(name)
        # Equal vectors belong to equal ids in both.
        ours, theirs = (
            torch.unique(t, dim=0, return_inverse=True)[1] for t in (module.to_dense()[1:], joint.to_dense(name)[1:])
        )
        assert torch.equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_initial_scale_is_that_of_the_replaced_weight() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(20_000, 8, padding_idx=0), "b": nn.Embedding(20_000, 8)})
    nn.init.normal_(model["a"].weight[1:], std=1e-4)
    nn.init.uniform_(model["b"].weight, -0.5, 0.5)
    with torch.no_grad():
        model["a"].weight[0] = 0
    compress_(model, "compositional", 0.2)
    assert float(model["a"].to_dense()[1:].std()) == pytest.approx(1e-4, rel=0.05)
    assert float(model["b"].to_dense().std()) == pytest.approx(0.5 / 3**0.5, rel=0.05)
    assert not model["a"].to_dense()[0].any() and model["a"].padding_idx == 0
    zeros = nn.ModuleDict({"a": nn.Embedding(200, 8)})
    nn.init.zeros_(zeros["a"].weight)
    compress_(zeros, "hash", 0.2)
    assert 0 < zeros["a"].to_dense().abs().max() < 1e-5


@pytest.mark.parametrize("method", ["hash", "full", "pruned"])
def test_training_that_is_lost_is_told(method: str) -> None:
    for steps in (0, 1):
        model = nn.ModuleDict({"a": nn.Embedding(50, 8), "b": nn.Embedding(60, 8)})
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(steps):
            sum(table(torch.arange(9)).sum() for table in model.values()).backward()
            optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compress_(model, method, None if method == "full" else "50%", rebind=optimizer)
        told = [str(warning.message) for warning in caught]
        lost = [
            "what a, b learned so far is lost, since these tables start anew: with trained=True those with rows are "
            "fitted to it"
        ]
        assert told == (lost if steps and method == "hash" else [])


def test_training_that_is_said_is_kept() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(50, 8), "b": nn.Embedding(60, 8)})
    optimizer = torch.optim.Adam(model.parameters())
    sum(table(torch.arange(9)).sum() for table in model.values()).backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compress_(model, "hash", "50%", rebind=optimizer, trained=True).kept == ["a", "b"]


@pytest.mark.parametrize("method", ["unified", "robe", "hash", "full", "pruned"])
def test_the_report_says_whose_first_vectors_are_larger_or_smaller(method: str) -> None:
    def fresh() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Embedding(20_000, 8), "b": nn.Embedding(20_000, 8)})
        with torch.no_grad():
            for name, scale in (("a", 1e-2), ("b", 1.0)):
                model[name].weight.copy_(scale * model[name].weight.sign())
        return model

    def spread(model: nn.Module, name: str) -> float:
        return float(model[name].to_dense().square().mean().sqrt())

    model = fresh()
    report = compress_(model, method, None if method == "full" else "20%")
    for table in report.tables:
        assert table.std_before == pytest.approx({"a": 1e-2, "b": 1.0}[table.name])
        if method != "pruned":  # of which the small weights are gone
            assert table.std_after == pytest.approx(spread(model, table.name), rel=0.05)
    shares = method in ("unified", "robe")
    assert [table.name for table in report.rescaled] == (["a", "b"] if shares else [])
    told = "first vectors of another standard deviation than the old weights had: a 0.01 → 0.707; b 1 → 0.707"
    assert (told in str(report)) == shares
    # What the docstring names as the cure.
    apart = fresh()
    assert not compress_(apart, {"a": method, "b": method}, None if method == "full" else "20%").rescaled
    assert spread(apart, "b") > 50 * spread(apart, "a")


@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_carries_over(sparse: bool) -> None:
    model = Model(sparse=sparse)
    compress_(model, {"towers.*": "unified", "*": "hash"}, 0.2)
    step(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.is_sparse == (sparse and "head" not in name), name
    other = Model(sparse=sparse)
    compress_(other, "hash", 0.2, sparse=not sparse)
    assert other.item.sparse is not sparse
    fused = Model(sparse=sparse)
    compress_(fused, "hash", 0.2, optimizer="sgd")
    step(fused)


def test_bags_and_modes() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "sum": nn.EmbeddingBag(50, 4, mode="sum", include_last_offset=True),
        "mean": nn.EmbeddingBag(50, 4, mode="mean", padding_idx=0),
    })  # fmt: skip
    twin = copy.deepcopy(model)
    compress_(model, "full")
    ids, offsets, weights = torch.tensor([1, 2, 0, 4]), torch.tensor([0, 1, 1, 4]), torch.rand(4)
    assert isinstance(model["sum"], EmbeddingBag)
    torch.testing.assert_close(model["sum"](ids, offsets, weights), twin["sum"](ids, offsets, weights))
    torch.testing.assert_close(model["mean"](ids, offsets[:3]), twin["mean"](ids, offsets[:3]))
    torch.testing.assert_close(model["mean"](ids.view(2, 2)), twin["mean"](ids.view(2, 2)))


def test_tied_modules_become_one_table() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(100, 4), "b": nn.Embedding(100, 4), "c": nn.EmbeddingBag(100, 4)})
    model["b"].weight = model["c"].weight = model["a"].weight
    report = compress_(model, "hash", 0.2)
    assert [t.other_names for t in report.tables] == [("b", "c")]
    assert len(list(model.parameters())) == 1 and report.bytes_before == 1600
    ids = torch.arange(100)
    assert torch.equal(model["a"](ids), model["b"](ids)) and torch.equal(model["a"](ids), model["c"](ids.view(-1, 1)))


def test_notes_on_the_module_and_its_mode_stay() -> None:
    model = Model()
    model.item.field = "item_id"
    model.item.eval()
    compress_(model, "hash", 0.2)
    assert model.item.field == "item_id" and not model.item.training and model.city.training


def test_harmless_subclass_is_swapped() -> None:
    class Initialized(nn.Embedding):
        def __init__(self, n: int, d: int) -> None:
            super().__init__(n, d)
            nn.init.xavier_normal_(self.weight)

    model = nn.Sequential(Initialized(100, 4))
    assert len(compress_(model, "hash", 0.2).tables) == 1


# ---- what is left alone ----------------------------------------------------------------------------------------------


def _parametrised() -> nn.Module:
    module = nn.Embedding(50, 4)
    torch.nn.utils.parametrizations.weight_norm(module)
    return module


def _hooked() -> nn.Module:
    module = nn.Embedding(50, 4)
    module.register_forward_hook(lambda m, i, o: o * 2)
    return module


def _gradient_hooked() -> nn.Module:
    module = nn.Embedding(50, 4)
    module.weight.register_hook(lambda g: g * 2)
    return module


def _patched() -> nn.Module:
    module = nn.Embedding(50, 4)
    module.forward = lambda ids: torch.zeros(4)  # type: ignore[method-assign]
    return module


def _nan() -> nn.Module:
    module = nn.Embedding(50, 4)
    module.weight.data[3, 1] = float("nan")
    return module


class _Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


class _WithMethod(nn.Embedding):
    def neighbors(self, ids: Tensor) -> Tensor:
        return ids


class _WithConstant(nn.Embedding):
    scale = 2.0


class _WithCache(nn.Embedding):
    @cached_property
    def norm(self) -> float:
        return float(self.weight.detach().norm())


def _noted(name: str) -> nn.Module:
    module = nn.Embedding(50, 4)
    setattr(module, name, "x")
    return module


def _quantized() -> nn.Module:
    return torch.ao.nn.quantized.Embedding(50, 4)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(50, 4, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(50, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.EmbeddingBag(50, 4, mode="max"), "mode='max'"),
        (lambda: nn.EmbeddingBag(50, 4, max_norm=2.0), "max_norm"),
        (lambda: _Scaled(50, 4), "class _Scaled has a 'forward' of its own"),
        (lambda: _WithMethod(50, 4), "class _WithMethod has a 'neighbors' of its own"),
        (lambda: _WithConstant(50, 4), "class _WithConstant has a 'scale' of its own"),
        (lambda: _WithCache(50, 4), "class _WithCache has a 'norm' of its own"),
        (lambda: _noted("tables"), "'tables' would hide"),
        (lambda: _noted("name"), "'name' would hide"),
        (lambda: _noted("to_dense"), "'to_dense' would hide"),
        (lambda: nn.Embedding(50, 4).half(), "float16"),
        (lambda: nn.Embedding(50, 4).bfloat16(), "bfloat16"),
        (lambda: nn.Embedding(50, 4).requires_grad_(False), "frozen"),
        (lambda: nn.Embedding.from_pretrained(torch.rand(50, 4), False, padding_idx=3), "padding_idx=3 is not zero"),
        (_parametrised, "parametris"),
        (_hooked, "hooks"),
        (_gradient_hooked, "gradient hooks"),
        (_patched, "forward was replaced"),
        (_nan, "NaN"),
        (_quantized, "quantized"),
        (lambda: nn.Embedding(0, 4), "empty"),
    ],
)  # fmt: skip
def test_left_alone_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"odd": make(), "plain": nn.Embedding(50, 4)})
    odd = model["odd"]
    report = compress_(model, "hash", 0.5)
    assert model["odd"] is odd and isinstance(model["plain"], Embedding)
    assert list(report.left_alone) == ["odd"] and reason in report.left_alone["odd"]
    assert f"odd: {report.left_alone['odd']}" in str(report)
    with pytest.raises(ValueError, match="no table to compress.*'odd'"):
        compress_(nn.ModuleDict({"odd": make()}), "hash", 0.5)
    with pytest.raises(ValueError, match="pattern 'odd' matches only what has to be left alone"):
        compress_(nn.ModuleDict({"odd": make(), "plain": nn.Embedding(50, 4)}), {"odd": "hash", "*": "full"})


def test_ties_that_cannot_be_kept() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.scores = nn.Embedding(50, 4), nn.Linear(4, 50, bias=False)
            self.scores.weight = self.words.weight
            self.padded, self.unpadded = nn.Embedding(50, 4, padding_idx=0), nn.Embedding(50, 4)
            self.unpadded.weight = self.padded.weight
            self.normed, self.free = nn.Embedding(50, 4, max_norm=1.0), nn.Embedding(50, 4)
            self.free.weight = self.normed.weight
            self.viewed = nn.Embedding(50, 4)
            self.view = nn.Parameter(self.viewed.weight.data[:10])
            self.plain = nn.Embedding(50, 4)

    report = compress_(Language(), "hash", 0.5)
    assert [t.name for t in report.tables] == ["plain"]
    left = report.left_alone
    assert "also that of 'scores' (Linear)" in left["words"]
    assert "differ in padding_idx" in left["padded"] and "differ in padding_idx" in left["unpadded"]
    assert "max_norm" in left["normed"] and left["free"].startswith("its weight is also that of 'normed'")
    assert "shares memory with 'view'" in left["viewed"]
    assert report.left_alone_bytes == 4 * 200 * 4


def test_patterns_choose() -> None:
    model = Model()
    report = compress_(model, {"*user*": "hash"}, 0.5)
    assert [t.name for t in report.tables] == ["towers.user"]
    assert set(report.left_alone.values()) == {"no pattern of method matches its name"}
    assert isinstance(model.item, nn.Embedding)
    tied = Model()
    report = compress_(tied, {"history": "hash"}, 0.5)
    assert [(t.name, t.other_names) for t in report.tables] == [("history", ("item",))]
    assert tied.item is tied.history


def test_second_call() -> None:
    model = Model()
    compress_(model, {"item": "hash"}, 0.1)
    item = model.item
    report = compress_(model, "hash", 0.1)
    assert report.left_alone == {"item": "it is compressed already"} and len(report.tables) == 3
    assert model.item is item
    with pytest.raises(ValueError, match="no table to compress.*'item': it is compressed already"):
        compress_(model, "hash", 0.1)


# ---- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "fused": lambda ps: torch.optim.Adam(ps, lr=0.1, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, lr=10.0),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("fused", [None, "sgd"])
@pytest.mark.parametrize("method", ["hash", "unified"])
def test_optimizer_given_before(kind: str, fused: str | None, method: str) -> None:
    model = Model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    step(model, optimizer)
    heads = {id(p): optimizer.state.get(p) for p in model.head.parameters()}
    report = compress_(model, method, 0.2, optimizer=fused, rebind=optimizer)
    assert report.moved[0].startswith(f"rebind[0] ({type(optimizer).__name__})")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= held
    assert {id(p): optimizer.state.get(p) for p in model.head.parameters()} == heads
    before = dense(model)
    step(model, optimizer)
    step(model, optimizer)
    assert not any(torch.equal(before[name], after) for name, after in dense(model).items())


def test_groups_keep_their_options_and_schedulers() -> None:
    model = Model()
    groups = [
        {"params": [model.item.weight, model.city.weight], "lr": 0.5, "weight_decay": 0.1},
        {"params": [*model.towers.parameters(), *model.bag.parameters()], "lr": 0.25},
        {"params": list(model.head.parameters())},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    del groups
    compress_(model, "hash", 0.2, rebind=[optimizer])
    for group, modules in zip(
        optimizer.param_groups, ([model.item, model.city], [model.towers, model.bag], [model.head])
    ):
        assert {id(p) for p in group["params"]} == {id(p) for m in modules for p in m.parameters()}
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.25, 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0, 0]
    step(model, optimizer)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.025, 0.001])
    optimizer.load_state_dict(optimizer.state_dict())


def test_named_parameters_in_groups() -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1)
    compress_(model, "mixed_dimension", 0.6, rebind=optimizer)
    (group,) = optimizer.param_groups
    assert len(group["param_names"]) == len(group["params"]) == len(set(group["param_names"]))
    step(model, optimizer)


def test_shared_storage_cannot_be_in_two_groups() -> None:
    model = Model()
    optimizer = torch.optim.SGD([{"params": [model.item.weight]}, {"params": [model.city.weight], "lr": 1.0}], lr=0.1)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="'item' and '.*' would share storage, but rebind\\[0\\].*group 0 and .*group"):
        compress_(model, "unified", 0.2, rebind=optimizer)
    assert snapshot(model, optimizer) == before
    # Of their own they can.
    compress_(model, {"item": "unified", "city": "hash", "*": "full"}, 0.9, rebind=optimizer)


def test_an_optimizer_nobody_told_of_is_refused() -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer \(Adam\) that is no attribute .* holds 4 .*rebind="):
        compress_(model, "hash", 0.1)
    assert snapshot(model, optimizer) == before


def test_fused_leaves_an_empty_optimizer() -> None:
    model = Model()
    tables = torch.optim.Adagrad([p for n, p in model.named_parameters() if "head" not in n], lr=0.1)
    heads = torch.optim.Adam(model.head.parameters())
    report = compress_(model, "hash", 0.1, optimizer="adagrad", rebind=(tables, heads))
    assert "nothing is left for it to update" in report.moved[0]
    assert report.moved[1:] == ["rebind[1] (Adam): holds none of the tables, so it stays as it is"]
    before = dense(model)
    step(model, tables, heads)
    assert not any(torch.equal(before[name], after) for name, after in dense(model).items())


def test_optimizers_in_attributes_of_attributes() -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.optimizers = {"all": [torch.optim.SGD(model.parameters(), lr=0.1)]}

    model = Model()
    model.trainer = Trainer(model)
    report = compress_(model, "hash", 0.1)
    assert report.moved[0].startswith("model.trainer.optimizers['all'][0] (SGD)".replace("['all']", ".all"))
    before = dense(model)
    step(model, model.trainer.optimizers["all"][0])
    assert not any(torch.equal(before[name], after) for name, after in dense(model).items())


def test_optimizers_that_cannot_be_moved() -> None:
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        compress_(model, "hash", 0.1, rebind=optimizer)

    class Averaging(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    other = Model()
    averaging = Averaging(other.parameters())
    before = snapshot(other, averaging)
    with pytest.raises(ValueError, match="attribute 'slow' of a Averaging.*build it after compress_"):
        compress_(other, "hash", 0.1, rebind=averaging)
    assert snapshot(other, averaging) == before
    with pytest.raises(ValueError, match="rebind must hold torch.optim optimizers, not a StepLR"):
        compress_(Model(), "hash", 0.1, rebind=[torch.optim.lr_scheduler.StepLR(optimizer, 1)])  # type: ignore[list-item]


# ---- other holders ---------------------------------------------------------------------------------------------------


def test_lists_of_weights_act_on_the_new_tables() -> None:
    model = Model()
    model.regularization = [([model.item.weight, model.city.weight], 0.0, 1e-2), ([model.head.weight], 0.1, 0.0)]
    model.by_name = {"user": model.towers["user"].weight, "module": model.towers["user"]}
    model.pairs = [("item", model.item.weight)]
    model.modules_in_order = (model.item, [model.city])
    compress_(model, "hash", 0.1)
    (weights, *rest), head = model.regularization
    assert weights == [model.item.tables.store.weight_8, model.city.tables.store.weight_8] and rest == [0.0, 1e-2]
    assert head[0][0] is model.head.weight
    assert model.by_name["user"] is model.towers["user"].tables.store.weight_8
    assert model.by_name["module"] is model.towers["user"]
    assert model.pairs == [("item", model.item.tables.store.weight_8)]
    assert model.modules_in_order[0] is model.item and model.modules_in_order[1][0] is model.city


def test_shared_storage_stands_once_in_a_list() -> None:
    model = Model()
    model.weights = [model.item.weight, model.head.weight, model.city.weight]
    compress_(model, "unified", 0.1)
    assert [id(w) for w in model.weights] == [id(model.item.tables.store.weight_4), id(model.head.weight)]


def test_fused_tables_leave_lists_aloud() -> None:
    model = Model()
    model.weights = [model.item.weight, model.city.weight]
    report = compress_(model, "hash", 0.1, optimizer="sgd")
    assert model.weights == [] and any("model.weights" in text and "2 weights left" in text for text in report.moved)
    other = Model()
    other.favourite = {"weight": other.item.weight}
    before = snapshot(other)
    with pytest.raises(ValueError, match="'item' is held by 'model.favourite.weight'.*compress_ before"):
        compress_(other, "hash", 0.1, optimizer="sgd")
    assert snapshot(other) == before


@pytest.mark.parametrize(
    ("hold", "words"),
    [
        (lambda m: [m.item.weight], "a list of 1"),
        (lambda m: {"w": m.item.weight}, "a dict of 1"),
        (lambda m: (m.item, 1), "a tuple of 2"),
        (lambda m: m.item.forward, "a method"),
        (lambda m: nn.Sequential(m.item), "a dict of 1|a Sequential"),
        (lambda m: (lambda w: lambda: w)(m.item.weight), "a cell"),
        (lambda m: iter([m.item.weight, 1]), "a list of 2"),
    ],
)
def test_holders_outside_are_refused(hold: Callable[[nn.Module], object], words: str) -> None:
    model = Model()
    holder = hold(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'item' is also held by ({words}).*delete it, or build it after"):
        compress_(model, "hash", 0.1)
    assert snapshot(model) == before
    del holder
    compress_(model, "hash", 0.1)


def test_an_own_variable_is_said_not_refused() -> None:
    model = Model()
    weight = model.item.weight
    with pytest.warns(UserWarning, match="1 of the old tables are still in memory.*'item'"):
        report = compress_(model, "hash", 0.1)
    assert report.not_freed == ["item"] and weight.shape == (1000, 8)
    assert "still in memory" in str(report) and "item" in str(report).splitlines()[-1]
    loss = (other := Model())(X).sum()
    with pytest.warns(UserWarning, match="4 of the old tables"):
        compress_(other, "hash", 0.1)
    del loss


# ---- refusals before anything is changed -----------------------------------------------------------------------------


def _compiled_in_place() -> nn.Module:
    model = Model()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Embedding(50, 4), "itself a Embedding.*embtables.Embedding"),
        (lambda: nn.EmbeddingBag(50, 4), "itself a EmbeddingBag"),
        (lambda: nn.Linear(3, 4), "no table to compress"),
        (lambda: torch.compile(Model(), backend="eager"), "OptimizedModule.*before torch.compile"),
        (_compiled_in_place, "compiled in place"),
        (lambda: nn.DataParallel(Model()), "DataParallel.*on its .module"),
        (lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Embedding(5, 4)))), "TorchScript"),
        (lambda: "model", "must be an nn.Module, not a str"),
    ],
)
def test_models_that_are_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compress_(make(), "hash", 0.1)


def test_infeasible_and_wrong_arguments_change_nothing() -> None:
    model = Model()
    model.optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, model.optimizer)
    for arguments, error, words in (
        (("hash", 100), InfeasibleBudget, "floor|least"),
        (("hash",), ValueError, "needs a budget"),
        (("unheard", 0.1), ValueError, "unknown method"),
        (({"x*": "hash", "*": "full"}, 0.1), ValueError, "pattern 'x\\*' of method matches no table"),
        (({"x*": "hash"}, 0.1), ValueError, "no table to compress"),
        (({}, 0.1), ValueError, "no table|empty mapping"),
        (({1: "hash"}, 0.1), ValueError, "patterns of table names to methods, and 1 is no text"),
        (("frequency_cutoff", 0.1), ValueError, "frequencies"),
    ):
        with pytest.raises(error, match=words):
            compress_(model, *arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frequencies name 'user'.*the tables: item, towers.user"):
        compress_(model, "hash", 0.1, frequencies={"user": torch.ones(500)})
    assert snapshot(model, model.optimizer) == before


def test_frequencies_by_qualified_names() -> None:
    model = Model()
    sizes = {"item": 1000, "towers.user": 500, "bag": 400, "city": 20}
    generator = torch.Generator().manual_seed(0)
    counts = {name: torch.randint(1, 100, (n,), generator=generator).numpy() for name, n in sizes.items()}
    report = compress_(model, "frequency_cutoff", 0.3, frequencies=counts)
    assert report.bytes_after <= 0.3 * report.bytes_before
    step(model)
    state = model.state_dict()
    again = Model()
    compress_(again, "frequency_cutoff", 0.3, frequencies=counts)
    again.load_state_dict(state)
    assert torch.equal(again(X), model(X))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="'item' is on the meta device.*give std="):
        compress_(model, "hash", 0.1)
    compress_(model, "hash", 0.1, std=0.01)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert float(model.item.to_dense()[1:].std()) == pytest.approx(0.01, rel=0.1)
    step(model)


def test_data_parallel_replicas_say_so() -> None:
    model = Model()
    compress_(model, "hash", 0.1)
    replica = model.item._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel.*DistributedDataParallel"):
        replica(X)


# ---- the model afterwards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hash", "unified", "pruned"])
def test_checkpoints_and_copies(method: str) -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    compress_(model, method, 0.3, rebind=optimizer)
    step(model, optimizer)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Model()
    compress_(fresh, method, 0.3, seed=7)
    assert not torch.equal(fresh(X), model(X))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    model.eval(), fresh.eval()
    assert torch.equal(fresh(X), model(X))
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    average = torch.optim.swa_utils.AveragedModel(model)
    for twin in (
        copy.deepcopy(model),
        torch.load(whole, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        average,
    ):
        assert torch.equal(twin(X), model(X))
        assert len(list(twin.parameters())) == len(list(model.parameters()))
    average.update_parameters(model)
    wrong = Model()
    compress_(wrong, method, 0.3, hash_seed=1)
    with pytest.raises(ValueError, match="another plan"):
        wrong.load_state_dict(model.state_dict())


def test_deep_copy_of_a_model_with_its_optimizer() -> None:
    model = Model()
    model.optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    compress_(model, "unified", 0.2)
    step(model, model.optimizer)
    twin = copy.deepcopy(model)
    assert {id(p) for g in twin.optimizer.param_groups for p in g["params"]} == {id(p) for p in twin.parameters()}
    before = model(X).detach()
    step(twin, twin.optimizer)
    assert torch.equal(model(X), before) and not torch.equal(twin(X), before)


def test_dtype_afterwards() -> None:
    model = Model()
    compress_(model, {"item": "unified", "*": "hash"}, 0.3)
    expected = model(X)
    torch.testing.assert_close(model.double()(X).float(), expected)
    torch.testing.assert_close(model.bfloat16()(X).float(), expected, atol=0.1, rtol=0.1)


def test_the_report_reads_well() -> None:
    model = Model()
    model.norm = nn.Embedding(10, 8, max_norm=1.0)
    model.optimizer = torch.optim.Adam(model.parameters())
    text = str(compress_(model, {"item": "unified", "towers.user": "unified", "city": "full", "*": "hash"}, 12_000))
    lines = text.splitlines()
    assert lines[0].split() == ["table", "shape", "method", "stored", "as", "before", "after", "weights"]
    assert lines[1].startswith("item = history") and "1,000 × 8" in lines[1] and lines[1].endswith("new")
    assert any(line.startswith("city") and "full" in line and line.endswith("kept") for line in lines)
    assert "4 tables: 61,440 B before, " in text and "(budget 12,000 B)" in text
    assert "starting anew, so train them: " in text
    assert "left alone, 320 B:\n  norm: max_norm=1.0" in text
    assert "moved:\n  model.optimizer (Adam): 4 new parameters took the place of 4 in its group" in text
    assert lines[-1] == "the old tables are freed"
    assert max(map(len, lines)) < 140


def test_torchrec_is_not_imported_for_it() -> None:
    code = (
        "import sys, torch, embtables\n"
        "m = torch.nn.Sequential(torch.nn.Embedding(100, 4)); print(embtables.compress_(m, 'hash', 0.1))\n"
        "assert 'torchrec' not in sys.modules and 'embtables.torchrec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_nothing_of_the_call_stays_behind() -> None:
    model = Model()
    compress_(model, "hash", 0.1)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ in ("Holders", "Swap", "Unit", "Site")]


@pytest.mark.parametrize("method", ["full", "pruned"])
def test_ids_out_of_range_do_what_the_call_says(method: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    old = model[0].weight.detach().clone()
    compress_(model, method, None if method == "full" else "90%", on_out_of_range="oov")
    assert torch.equal(model(torch.arange(9)), old)
    assert torch.equal(model(torch.tensor([9, 100])), model[0].to_dense()[[9, 9]])
    with pytest.raises(ValueError, match="on_out_of_range must be one of"):
        compress_(nn.Sequential(nn.Embedding(9, 4)), "full", on_out_of_range="clip")  # type: ignore[arg-type]
