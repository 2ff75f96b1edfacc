"""The torchrec faces' weights by table: names, moves, copies and optimizers; what can be traced and compiled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

try:
    import torchrec
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.fx import symbolic_trace
    from torchrec.models.dlrm import DLRM
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
    from torchrec_cases import jagged

    from embtables import Embedding, EmbeddingTables, TableConfig, methods, plan
    from embtables.torchrec import EmbeddingBagCollection, EmbeddingCollection
except (ImportError, OSError) as error:
    pytest.skip(f"torchrec cannot be imported: {error}", allow_module_level=True)

ROWS = {"x": 50, "y": 30, "z": 40}
META = torch.device("meta")
# The two faces: ours, torchrec's, its config, and the name of its tables.
BAGS = (EmbeddingBagCollection, torchrec.EmbeddingBagCollection, EmbeddingBagConfig, "embedding_bags")
SEQUENCES = (EmbeddingCollection, torchrec.EmbeddingCollection, EmbeddingConfig, "embeddings")
faces = pytest.mark.parametrize("face", [BAGS, SEQUENCES], ids=["bags", "sequences"])


def configs(config: Any, dims: tuple[int, ...] = (4, 4, 4)) -> list[Any]:
    tables = zip("abc", ROWS.items(), dims)
    return [
        config(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[feature])
        for name, (feature, rows), dim in tables
    ]


def features(seed: int = 0, batch: int = 8) -> KeyedJaggedTensor:
    return jagged(ROWS, batch, seed)


def values(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        return torch.cat([output[name].values() for name in output])
    result: torch.Tensor = output.values()
    return result


def weights_of(collection: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in collection.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(stock)
    for name, weight in stock.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)


# ---- names -----------------------------------------------------------------------------------------------------------


@faces
def test_parameters_have_the_names_of_the_state_dict(face: Any) -> None:
    """Those of the stock collection, with the same shapes, in a model too."""
    make, stock, config, _ = face
    # Tables of one dimension lie together, and yet come in the order of the configs.
    dims = (4, 2, 4) if face is BAGS else (4, 4, 4)
    ours, theirs = make(configs(config, dims)), stock(configs(config, dims))
    shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert [(name, parameter.shape) for name, parameter in ours.named_parameters()] == [*shapes.items()]
    assert [*ours.state_dict()] == [*theirs.state_dict()] == [*shapes]
    assert [name for name, _ in ours.named_buffers() if "weight" in name] == []
    model = torch.nn.Sequential(ours)
    assert [name for name, _ in model.named_parameters()] == [f"0.{name}" for name in shapes] == [*model.state_dict()]


@faces
def test_compressed_parameters_have_the_names_of_the_state_dict(face: Any) -> None:
    make, _, config, _ = face
    ours = make(configs(config), method="hash", budget=0.3)
    names = [name for name, _ in ours.named_parameters()]
    assert names and set(names) <= set(ours.state_dict())


@faces
def test_one_compressed_table_leaves_all_with_the_names_of_the_storage(face: Any) -> None:
    make, _, config, _ = face
    ours = make(configs(config), method={"a": "full", "*": "hash"}, budget=0.7)
    assert [name for name, _ in ours.named_parameters()] == ["tables.store.weight_4"]
    assert {*ours.state_dict()} == {"tables.store.weight_4", "tables._extra_state"}


# ---- the weight of a table -------------------------------------------------------------------------------------------


@faces
def test_the_weight_of_a_table(face: Any) -> None:
    """It is a parameter, and what lookups read."""
    make, _, config, name = face
    ours = make(configs(config))
    tables = getattr(ours, name)
    assert [*tables] == tables.keys() == ["a", "b", "c"]
    assert len(tables) == 3 and "b" in tables and "d" not in tables
    assert [key for key, _ in tables.items()] == ["a", "b", "c"] and len(tables.values()) == 3
    weight = tables["b"].weight
    assert isinstance(weight, torch.nn.Parameter) and weight.shape == (30, 4)
    with torch.no_grad():
        weight.fill_(7.0)
    assert torch.equal(ours.tables.to_dense("b"), torch.full((30, 4), 7.0))
    assert not bool((ours.tables.to_dense("a") == 7).any())
    with pytest.raises(KeyError, match="no table 'q'; the tables: a, b, c"):
        tables["q"]


def test_where_there_is_no_weight() -> None:
    mixed = EmbeddingBagCollection(configs(EmbeddingBagConfig), method={"a": "full", "*": "hash"}, budget=0.7)
    # The rows of "a" are a part of a parameter.
    weight = mixed.embedding_bags["a"].weight
    assert weight.requires_grad and torch.equal(weight, mixed.tables.to_dense("a"))
    with pytest.raises(AttributeError, match="table 'b' is not stored in full.*to_dense"):
        _ = mixed.embedding_bags["b"].weight
    fused = EmbeddingBagCollection(configs(EmbeddingBagConfig), optimizer="sgd")
    with pytest.raises(AttributeError, match="table 'a' has no weight to train, since its fused optimizer"):
        _ = fused.embedding_bags["a"].weight


def test_a_view_leaves_the_parameters_of_existing_tables() -> None:
    """Somebody else's optimizer may hold them."""
    tables = EmbeddingTables(plan([TableConfig("a", 50, 4), TableConfig("b", 30, 4)], "full", optimizer=None))
    (before,) = tables.parameters()
    view = EmbeddingBagCollection.of(tables)
    assert [*view.parameters()] == [before]
    assert torch.equal(view.embedding_bags["b"].weight, tables.to_dense("b"))
    assert [*view.state_dict()] == ["embedding_bags.a.weight", "embedding_bags.b.weight"]


def test_a_view_of_a_collections_tables_has_its_parameters() -> None:
    """Both load and move as one, whichever is told to."""
    bags = EmbeddingBagCollection(configs(EmbeddingBagConfig))
    view = EmbeddingCollection.of(bags.tables, features=["y"])
    names = [f"embeddings.{name}.weight" for name in "abc"]
    assert [name for name, _ in view.named_parameters()] == [*view.state_dict()] == names
    assert [*view.parameters()] == [*bags.parameters()]
    view.load_state_dict({name: torch.full_like(w, 2.0) for name, w in view.state_dict().items()}, assign=True)
    view.double()
    assert [*view.parameters()] == [*bags.parameters()]
    assert torch.equal(bags.tables.to_dense("b"), torch.full((30, 4), 2.0, dtype=torch.float64))


def test_a_module_of_one_table_shares_the_weight() -> None:
    ours = EmbeddingBagCollection(configs(EmbeddingBagConfig))
    item = Embedding.of(ours.tables, "b")
    assert item.weight is ours.embedding_bags["b"].weight
    ids = torch.tensor([3, 3, 4])
    (item(ids).sum() + item(ids).sum()).backward()
    expected = torch.zeros(30, 4)
    expected[3], expected[4] = 4, 2
    assert torch.equal(item.weight.grad, expected)


# ---- training by table -----------------------------------------------------------------------------------------------


@faces
def test_parameter_groups_by_table_train_like_the_stock_collection(face: Any) -> None:
    make, stock, config, _ = face
    theirs = stock(configs(config))
    ours = make(configs(config))
    ours.load_state_dict(theirs.state_dict())
    rates = {"a": 0.5, "b": 0.0, "c": 0.1}
    for collection in (ours, theirs):
        groups = [
            {"params": [parameter], "lr": rates[name.split(".")[1]]}
            for name, parameter in collection.named_parameters()
        ]
        optimizer = torch.optim.Adagrad(groups)
        for step in range(5):
            optimizer.zero_grad()
            values(collection(features(step))).square().sum().backward()
            optimizer.step()
    assert_same(weights_of(ours), weights_of(theirs))


def test_optimizer_in_backward_by_table() -> None:
    theirs = torchrec.EmbeddingBagCollection(configs(EmbeddingBagConfig))
    ours = EmbeddingBagCollection(configs(EmbeddingBagConfig))
    ours.load_state_dict(theirs.state_dict())
    before = weights_of(ours)
    for collection in (ours, theirs):
        _apply_optimizer_in_backward(torch.optim.SGD, collection.embedding_bags["b"].parameters(), {"lr": 0.5})
        for step in range(3):
            collection(features(step)).values().square().sum().backward()
    assert_same(weights_of(ours), weights_of(theirs))
    changed = [name for name, weight in weights_of(ours).items() if not torch.equal(weight, before[name])]
    assert changed == ["embedding_bags.b.weight"]


def test_freezing_and_thawing_a_table() -> None:
    ours = EmbeddingBagCollection(configs(EmbeddingBagConfig))

    def trained() -> list[bool]:
        ours.zero_grad()
        pooled = ours(features()).values()
        if pooled.requires_grad:
            pooled.sum().backward()
        return [parameter.grad is not None for parameter in ours.parameters()]

    assert trained() == [True, True, True]
    ours.embedding_bags["b"].weight.requires_grad_(False)
    assert trained() == [True, False, True]
    ours.requires_grad_(False)
    assert trained() == [False, False, False]
    ours.embedding_bags["b"].weight.requires_grad_(True)
    assert trained() == [False, True, False]


# ---- what becomes of the weights -------------------------------------------------------------------------------------


def _torch_saved(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: torch.nn.Module = torch.load(file, weights_only=False)
    return loaded


def _cast_there_and_back(module: torch.nn.Module) -> torch.nn.Module:
    return module.double().float()


def _assigned(module: torch.nn.Module) -> torch.nn.Module:
    module.load_state_dict({name: w.clone() for name, w in module.state_dict().items()}, assign=True)
    return module


def _replaced(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def _pickled(module: torch.nn.Module) -> torch.nn.Module:
    loaded: torch.nn.Module = pickle.loads(pickle.dumps(module))
    return loaded


def _same(module: torch.nn.Module) -> torch.nn.Module:
    return module


@faces
@pytest.mark.parametrize(
    "change", [_same, copy.deepcopy, _pickled, _torch_saved, _cast_there_and_back, _assigned, _replaced]
)
@pytest.mark.parametrize("looked_up", [False, True])
def test_weights_stay_what_lookups_read_and_train(
    face: Any, change: Callable[[torch.nn.Module], torch.nn.Module], looked_up: bool
) -> None:
    """One step of SGD equals the stock collection's after copies, moves and assignments."""
    make, stock, config, _ = face
    theirs, ours = stock(configs(config)), make(configs(config))
    ours.load_state_dict(theirs.state_dict())
    if looked_up:
        ours(features())
    original, changed = ours, change(ours)
    for collection in (changed, theirs):
        sgd = torch.optim.SGD(collection.parameters(), lr=0.5)
        for step in range(2):
            sgd.zero_grad()
            values(collection(features(step))).square().sum().backward()
            sgd.step()
    assert_same(weights_of(changed), weights_of(theirs))
    for name, weight in weights_of(theirs).items():
        torch.testing.assert_close(changed.tables.to_dense(name.split(".")[1]), weight, rtol=1e-6, atol=1e-6)
    if changed is not original:
        assert not torch.equal(original.tables.to_dense("a"), changed.tables.to_dense("a"))


@faces
@pytest.mark.parametrize("options", [{}, {"optimizer": "adagrad"}], ids=["torch.optim", "fused"])
def test_from_the_meta_device_by_a_state_dict(face: Any, options: dict[str, Any]) -> None:
    """``to_empty`` and ``load_state_dict``, without ``reset_parameters``, and back into the stock collection."""
    make, stock, config, _ = face
    theirs = stock(configs(config))
    ours = make(configs(config), device=META, **options)
    model = torch.nn.Sequential(ours)
    # A fused optimizer's state goes along under names of its own; the counters of stages are on the CPU.
    names = theirs.state_dict().keys()
    assert {ours.state_dict()[name].device for name in names} == {META}
    model.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(values(ours(features())), values(theirs(features())), rtol=1e-6, atol=1e-6)
    values(ours(features())).sum().backward()
    back = stock(configs(config), device=META).to_empty(device="cpu")
    back.load_state_dict({name: ours.state_dict()[name] for name in names})
    assert torch.equal(values(back(features())), values(ours.eval()(features())))


# ---- weights that somebody has put elsewhere -------------------------------------------------------------------------


class Other(torch.nn.Parameter):
    """A parameter of a type of its own."""


class Values(torch.nn.Module):
    """A model that gives a tensor: FSDP does not find those inside of torchrec's outputs."""

    def __init__(self, collection: torch.nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, given: KeyedJaggedTensor) -> torch.Tensor:
        return values(self.collection(given))


def _of_another_type(model: Values, name: str) -> None:
    table = getattr(model.collection, name)["b"]
    table.weight = Other(table.weight.detach().clone())


def _sharded(model: Values, name: str) -> None:
    fully_shard(model)
    assert isinstance(getattr(model.collection, name)["b"].weight, DTensor)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@faces
@pytest.mark.parametrize("change", [_of_another_type, _sharded])
@pytest.mark.parametrize("looked_up", [False, True])
def test_weights_put_elsewhere_train(face: Any, change: Callable[..., Any], looked_up: bool, one_process: None) -> None:
    """They train as the stock collection's, and the tables read them, save them and load them."""
    make, stock, config, name = face
    theirs, ours = stock(configs(config)), make(configs(config))
    ours.load_state_dict(theirs.state_dict())
    if looked_up:
        values(ours(features())).sum().backward()
        ours.zero_grad()
    models = Values(ours), Values(theirs)
    change(models[0], name)
    for model in models:
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(3):
            sgd.zero_grad()
            model(features(step)).square().sum().backward()
            sgd.step()
    for key, weight in weights_of(theirs).items():
        torch.testing.assert_close(ours.tables.to_dense(key.split(".")[1]), weight, rtol=1e-6, atol=1e-6)
    saved = ours.state_dict()
    assert [*saved] == [*theirs.state_dict()]
    ours.load_state_dict({key: torch.zeros_like(weight) for key, weight in saved.items()})
    assert not bool(ours.tables.to_dense("b").any())


def test_a_shard_is_not_looked_up_with_gradients(one_process: None) -> None:
    ours = EmbeddingBagCollection(configs(EmbeddingBagConfig))
    fully_shard(ours)
    with pytest.raises(RuntimeError, match="this process holds a shard of table 'a' \\(DTensor\\)"):
        ours.tables(torch.zeros(2, 3, dtype=torch.int64))


@faces
def test_a_call_with_other_parameters(face: Any) -> None:
    make, stock, config, _ = face
    theirs, ours = stock(configs(config)), make(configs(config))
    given = {key: torch.randn(p.shape, requires_grad=True) for key, p in ours.named_parameters()}
    gradients = []
    for collection in (ours, theirs):
        called = torch.func.functional_call(collection, given, (features(),))
        gradients.append(torch.autograd.grad(values(called).square().sum(), [*given.values()]))
    for own, other in zip(*gradients):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


# ---- the meta device, no tables --------------------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("options", [{}, {"method": "hash", "budget": 0.3}], ids=["full", "hash"])
def test_forward_on_the_meta_device(face: Any, options: dict[str, Any]) -> None:
    make, stock, config, _ = face
    on_meta = KeyedJaggedTensor(
        ["z", "y", "x"],
        torch.empty(7, dtype=torch.int64, device=META),
        lengths=torch.empty(6, dtype=torch.int64, device=META),
    )
    result = make(configs(config), device=META, **options)(on_meta)
    expected = stock(configs(config), device=META)(on_meta)
    assert list(result.keys()) == list(expected.keys())
    assert values(result).shape == values(expected).shape
    assert values(result).device == META and values(result).dtype == values(expected).dtype


def test_no_tables() -> None:
    bags, sequences = EmbeddingBagCollection([]), EmbeddingCollection([])
    assert bags.embedding_bag_configs() == [] and bags.state_dict() == {} and [*bags.parameters()] == []
    assert bags(features(batch=5)).values().shape == (5, 0)
    assert sequences(features()) == torchrec.EmbeddingCollection([])(features()) == {}
    assert sequences.embedding_dim() == torchrec.EmbeddingCollection([]).embedding_dim()
    assert EmbeddingBagCollection([], device=META).device == META


# ---- traced and compiled ---------------------------------------------------------------------------------------------


def dlrm(options: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = DLRM(EmbeddingBagCollection(configs(EmbeddingBagConfig), **options), 3, [8, 4], [8, 1])
    return model


@pytest.mark.parametrize("options", [{}, {"method": "hash", "budget": 0.3}, {"optimizer": "sgd"}])
@pytest.mark.parametrize("leaves", [None, ["EmbeddingBagCollection"]], ids=["traced", "leaf"])
def test_a_symbolic_trace_is_the_model(options: dict[str, Any], leaves: list[str] | None) -> None:
    """The same outputs, parameters, and mode; a fused optimizer updates the tables through it."""
    model = dlrm(options)
    traced = symbolic_trace(model, leaf_modules=leaves)
    dense, given = torch.randn(8, 3), features()
    assert torch.equal(traced(dense, given), model(dense, given))
    assert {id(p) for p in traced.parameters()} == {id(p) for p in model.parameters()}
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in model.named_parameters()}
    tables = model.sparse_arch.embedding_bag_collection.tables
    before = tables.to_dense("a")
    traced.eval()
    if "optimizer" in options:
        traced(dense, given).sum().backward()
        assert torch.equal(tables.to_dense("a"), before)
        traced.train()
        traced(dense, given).sum().backward()
        assert not torch.equal(tables.to_dense("a"), before)


@faces
def test_a_symbolic_trace_of_the_collection_itself(face: Any) -> None:
    make, _, config, name = face
    ours = make(configs(config))
    traced = torch.fx.symbolic_trace(ours) if name == "embeddings" else symbolic_trace(ours)
    assert torch.equal(values(traced(features())), values(ours(features())))
    assert [key for key, _ in traced.named_parameters()] == [key for key, _ in ours.named_parameters()]


def test_dlrm_compiles_as_one_graph_and_trains() -> None:
    """With gradients for ``torch.optim``: the losses of the model that is not compiled."""
    losses: list[list[float]] = []
    labels = (torch.arange(16) % 2).float()
    for compiled in (False, True):
        model = dlrm({})
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        losses.append([])
        for step in range(3):
            torch.manual_seed(step)
            logits = run(torch.randn(16, 3), features(step, 16)).squeeze(-1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(RuntimeError, match="offsets must rise"):
        bad = KeyedJaggedTensor([*ROWS], torch.zeros(40, dtype=torch.int64), lengths=torch.ones(48, dtype=torch.int64))
        run(torch.randn(16, 3), bad)


@pytest.mark.parametrize("method", methods.kinds())
def test_dlrm_compiles_as_one_graph_with_any_method(method: str) -> None:
    """Outputs and gradients for ``torch.optim`` are those of the model that is not compiled."""
    counts = {name: range(rows) for name, rows in zip("abc", ROWS.values())}
    model = dlrm({"method": method, "budget": None if method == "full" else 0.6, "frequencies": counts})
    model.train(method != "matryoshka")  # whose training lookups draw what they show
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    dense, given = torch.randn(16, 3), features(0, 16)
    outputs = [run(dense, given) for run in (model, compiled)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(output.square().sum(), [*model.parameters()]) for output in outputs]
    for own, other in zip(*gradients):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@faces
def test_packed_tables_have_the_keys_of_their_storage(face: Any) -> None:
    ours, _, config, _ = face
    collections = [ours(configs(config), method={"kind": "full", "precision": "int8"}) for _ in range(2)]
    for collection in collections:
        collection.tables.finalize()
    state = collections[0].state_dict()
    assert {"tables.store.weight_int8_4", "tables.store.scales_int8_4"} <= set(state)
    collections[1].load_state_dict(state)
    vectors = [collection.tables.to_dense("a") for collection in collections]
    assert torch.equal(*vectors) and vectors[0].any()
