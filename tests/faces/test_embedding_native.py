"""Views of single tables through native code, against the same views in plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embtables import Embedding, EmbeddingBag, EmbeddingTables, TableConfig, ops, plan
from embtables.lookup.engine import Lookup
from embtables.methods import Pruned

pytestmark = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")

METHODS: dict[str, Any] = {
    "full": None,
    "hash": 0.2,
    "compositional": 0.4,
    "unified": 0.4,
    "robe": 0.3,
    "multi_hash": 0.3,
    "mixed_dimension": 0.6,
    "pruned": 0.5,
}
# Two of one width, which share storage in some methods, and one of another.
TABLES = [
    TableConfig("item", 100, 8, padding_idx=0),
    TableConfig("user", 50, 8, on_out_of_range="hash"),
    TableConfig("city", 7, 4, pooling="mean", padding_idx=2),
]


def tables(method: str, optimizer: Any = None, **more: Any) -> EmbeddingTables:
    schedule: Any = Pruned(warmup_steps=1, prune_steps=2, interval=1) if method == "pruned" else method
    return EmbeddingTables(plan(TABLES, schedule, METHODS[method], optimizer=optimizer), seed=3, std=0.5, **more)


def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tables that PyTorch looks up from now on."""
    names: list[str] = []
    look_up = Lookup._in_plain_pytorch

    def noted(self: Lookup, *arguments: Any) -> Any:
        assert self.only is not None
        names.append(self.blocks[0].tables[self.only].name)
        return look_up(self, *arguments)

    monkeypatch.setattr(Lookup, "_in_plain_pytorch", noted)
    return names


def either_way(run: Callable[[], Any]) -> tuple[Any, Any]:
    found = []
    for backend in ("native", "reference"):
        with ops.using(backend):
            found.append(run())
    return found[0], found[1]


def everything(module: EmbeddingTables) -> dict[str, Tensor]:
    """Weights, optimizer state, and the gradients that there are."""
    gradients = {f"{n} gradient": p.grad.to_dense() for n, p in module.named_parameters() if p.grad is not None}
    state = {name: tensor for name, tensor in module.state_dict().items() if "extra_state" not in name}
    return {**state, **module.optimizer_state_dict(), **gradients}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", [None, "sparse", "sgd", "adagrad", "adam"])
def test_steps_are_those_of_pytorch(method: str, optimizer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookups of several views in a step, one of them twice, and one table not at all."""
    in_pytorch = taken(monkeypatch)
    flat, offsets = torch.tensor([5, 2, 2, 6, 0, 1, 2]), torch.tensor([0, 3, 3, 5, 7])
    factors = torch.linspace(-1, 2, 7)

    def run() -> tuple[dict[str, Tensor], list[Tensor]]:
        sparse = optimizer == "sparse"
        module = tables(method, None if sparse else optimizer, sparse=sparse)
        if module.plan.optimizer is not None:
            module.set_learning_rate(0.01)
        item, user = Embedding.of(module, "item"), Embedding.of(module, "user")
        users = EmbeddingBag.of(module, "user", "sum", include_last_offset=True)
        cities = EmbeddingBag.of(module, "city")
        outputs: list[Tensor] = []
        for step in range(4):
            ids = torch.tensor([[1, 2, 0], [99, 2, 7 + step]])
            found = [item(ids), item(ids[:, :2].int()), user(torch.tensor(70 + step)), users(flat, offsets, factors)]
            if step % 2:
                found += [cities(flat[:6].view(3, 2)), cities(flat.int(), offsets[:-1].int())]
            sum(output.pow(2).sum() for output in found).backward()
            outputs += found
            if step == 0:  # the table of another width has had no part in it
                outputs += [torch.tensor(sorted(i for i, p in enumerate(module.parameters()) if p.grad is not None))]
        item.eval()
        with torch.no_grad():
            return everything(module), [*outputs, item(ids), user(ids)]

    (state, outputs), (state_there, outputs_there) = either_way(run)
    assert len(in_pytorch) == 22  # of the second run alone
    torch.testing.assert_close(state, state_there, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs, outputs_there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", None])
@pytest.mark.parametrize("method", ["unified", "pruned"])
def test_refused_ids_and_bags_are_no_step(method: str, optimizer: str | None) -> None:
    """The errors are PyTorch's, and nothing has been counted, nor a stage gone further."""
    module = tables(method, optimizer)
    item, bag = Embedding.of(module, "item"), EmbeddingBag.of(module, "item", include_last_offset=True)
    before = module.optimizer_state_dict()
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(IndexError, match="feature 'item' holds id 100, but table 'item' has the ids 0 … 99"):
        item(torch.tensor([3, 100]))
    for offsets in ([0, 2, 1, 3], [1, 3], [0, 4], [0, -1, 3], [3], []):
        with pytest.raises(ValueError, match="offsets must rise from 0 to at most the number of ids, 3"):
            bag(ids, torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(IndexError, match="id -1"):  # although no bag holds it
        bag(torch.tensor([1, 2, -1]), torch.tensor([0, 2]))
    torch.testing.assert_close(module.optimizer_state_dict(), before, rtol=0, atol=0)
    item(ids).sum().backward()
    if optimizer == "adam":
        assert int(module.store._step) == 1


def test_ids_behind_the_last_bag() -> None:
    bag = EmbeddingBag.of(tables("hash"), "item", include_last_offset=True)
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 3])
    torch.testing.assert_close(*either_way(lambda: bag(ids, offsets)))
    assert torch.equal(bag(ids, torch.tensor([0])), torch.empty(0, 8))
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(bag(none, torch.tensor([0, 0])), torch.zeros(1, 8))
    assert bag(none.view(0, 3)).shape == (0, 8) and torch.equal(bag(none.view(3, 0)), torch.zeros(3, 8))


def test_what_goes_through_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    in_pytorch = taken(monkeypatch)
    module = tables("full")
    item, bag = Embedding.of(module, "item"), EmbeddingBag.of(module, "item")
    ids = torch.tensor([[1, 2], [3, 0]])
    item(ids), bag(ids)
    assert in_pytorch == []
    factors = torch.ones(2, 2, requires_grad=True)
    bag(ids, None, factors).sum().backward()
    assert factors.grad is not None and len(in_pytorch) == 1
    module.regularize(0.1)
    item(ids), bag(ids)
    assert len(in_pytorch) == 1
    item.double()(ids)
    assert len(in_pytorch) == 2


@pytest.mark.parametrize("method", ["compositional", "pruned", "mixed_dimension"])
@pytest.mark.parametrize("optimizer", [None, "adagrad"])
def test_native_lookups_follow_their_tables(
    method: str, optimizer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Casts, files, copies, a new start and the served form: never what lay there before."""
    in_pytorch = taken(monkeypatch)
    module = tables(method, optimizer)
    model: Any = nn.ModuleDict({"item": Embedding.of(module, "item"), "again": Embedding.of(module, "item")})
    item, ids = model["item"], torch.tensor([1, 2, 0, 99])
    names = list(model.state_dict())
    item(ids).sum().backward()
    assert list(model.state_dict()) == names and len(list(model.modules())) == len(list(model.named_modules()))

    def dense(view: Embedding) -> Tensor:
        return view.to_dense()[ids]

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin["item"](ids).sum().backward()
        twin["item"].tables.store.slab(next(iter(module.store._slabs))).add_(1)
        torch.testing.assert_close(twin["again"](ids), dense(twin["item"]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(item(ids), dense(item), rtol=1e-4, atol=1e-5)
    module.reset_parameters()
    torch.testing.assert_close(item(ids), dense(item), rtol=1e-4, atol=1e-5)
    module.load_state_dict(tables(method, optimizer).state_dict())
    torch.testing.assert_close(item(ids), dense(item), rtol=1e-4, atol=1e-5)
    model.to(torch.bfloat16)
    assert item(ids).dtype == torch.bfloat16
    model.float()
    assert not in_pytorch
    module.finalize()
    torch.testing.assert_close(item(ids), dense(item), rtol=1e-4, atol=1e-5)
    assert not in_pytorch
