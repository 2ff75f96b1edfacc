"""The unpooled torchrec face against torchrec's own collection and comparator."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embtables import Adagrad, EmbeddingTables, TableConfig, plan

try:
    import torchrec
    from tensordict import TensorDict
    from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
    from torchrec.schema.utils import is_signature_compatible
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
    from torchrec_cases import jagged

    from embtables.torchrec import EmbeddingBagCollection, EmbeddingCollection
except (ImportError, OSError) as error:
    # Not pytest.importorskip: a broken fbgemm raises OSError.
    pytest.skip(f"torchrec cannot be imported: {error}", allow_module_level=True)

Stock = torchrec.EmbeddingCollection
COMPRESSED = [("hash", 0.3), ("full", None), ({"a": "full", "*": "compositional"}, 0.8)]


def config(name: str, rows: int, dim: int, *features: str) -> EmbeddingConfig:
    return EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=list(features))


def equal_pair(configs: list[EmbeddingConfig], need_indices: bool = False) -> tuple[EmbeddingCollection, Stock]:
    stock = Stock(configs, need_indices=need_indices)
    ours = EmbeddingCollection(configs, need_indices=need_indices)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def assert_equal(result: dict[str, JaggedTensor], expected: dict[str, JaggedTensor]) -> None:
    """Bit for bit, and in all that a JaggedTensor holds."""
    assert list(result) == list(expected)
    for key, tensor in expected.items():
        ours = result[key]
        assert isinstance(ours, JaggedTensor)
        assert torch.equal(ours.values(), tensor.values()) and ours.values().dtype == torch.float32
        assert torch.equal(ours.lengths(), tensor.lengths()) and torch.equal(ours.offsets(), tensor.offsets())
        weights = tensor.weights_or_none()
        if weights is None:
            assert ours.weights_or_none() is None
        else:
            assert torch.equal(ours.weights(), weights) and ours.weights().dtype == weights.dtype


# ---- interface -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["__init__", "forward", "embedding_configs", "need_indices", "embedding_dim", "embedding_names_by_table"]
    + ["reset_parameters", "use_gather_select", "use_gather_select_per_sharding"],
)
def test_signatures(name: str) -> None:
    if not hasattr(Stock, name):
        pytest.skip(f"this torchrec has no {name}")
    ours = inspect.signature(getattr(EmbeddingCollection, name))
    assert is_signature_compatible(inspect.signature(getattr(Stock, name)), ours)
    if hasattr(EmbeddingCollectionInterface, name) and name != "__init__":
        assert is_signature_compatible(inspect.signature(getattr(EmbeddingCollectionInterface, name)), ours)


def test_is_the_interface_and_answers_as_the_stock_collection() -> None:
    ours, stock = equal_pair([config("a", 9, 4, "x", "y"), config("b", 8, 4, "x")], need_indices=True)
    assert isinstance(ours, EmbeddingCollectionInterface) and isinstance(EmbeddingCollection.device, property)
    for name in ("embedding_configs", "need_indices", "embedding_dim", "embedding_names_by_table"):
        assert getattr(ours, name)() == getattr(stock, name)()
    assert ours.embedding_names_by_table() == [["x@a", "y"], ["x@b"]]


# ---- equal to the stock collection -----------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[EmbeddingConfig], KeyedJaggedTensor, bool]:
    features = [f"f{i}" for i in range(draw(st.integers(1, 5)))]
    dim = draw(st.integers(1, 9))
    configs = [
        config(
            f"t{i}",
            draw(st.integers(1, 40)),
            dim,
            *draw(st.lists(st.sampled_from(features), min_size=1, unique=True)),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    used = {feature for c in configs for feature in c.feature_names}
    # A feature that no table looks up may hold any id.
    rows = {f: min([c.num_embeddings for c in configs if f in c.feature_names], default=10**9) for f in features}
    keys = draw(st.permutations(sorted(used | set(draw(st.lists(st.sampled_from(features)))))))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    # The stock collection does not use the weights of its input.
    features_in = jagged(
        {key: rows[key] for key in keys},
        draw(st.integers(1, 6)),
        draw(st.integers(0, 2**31)),
        dtype=dtype,
        weighted=draw(st.booleans()),
    )
    return configs, features_in, draw(st.booleans())


@settings(max_examples=100)
@given(case=cases())
def test_full_equals_stock(case: tuple[list[EmbeddingConfig], KeyedJaggedTensor, bool]) -> None:
    """Bit for bit forward; gradients to 1e-6."""
    configs, features, need_indices = case
    ours, stock = equal_pair(configs, need_indices)
    result, expected = ours(features), stock(features)
    assert_equal(result, expected)
    # Small multiples of 1/16, so that the order of a sum hardly matters.
    directions = {key: torch.randint(-4, 5, v.values().shape) / 16 for key, v in expected.items()}
    for outputs in (result, expected):
        torch.cat([(v.values() * directions[key]).flatten() for key, v in outputs.items()]).sum().backward()
    for (name, own), (stock_name, parameter) in zip(ours.named_parameters(), stock.named_parameters()):
        assert name == stock_name
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(own.grad, grad, rtol=1e-6, atol=1e-6)


def test_empty_features_and_an_empty_batch() -> None:
    ours, stock = equal_pair([config("a", 5, 3, "x", "z"), config("b", 5, 3, "y")], need_indices=True)
    lengths = torch.tensor([0, 0, 0, 2, 0, 1, 0, 0, 0])
    features = KeyedJaggedTensor(["x", "y", "z"], torch.tensor([1, 2, 3]), lengths=lengths)
    assert_equal(ours(features), stock(features))
    result = ours(jagged({"x": 5, "y": 5, "z": 5}, 0, seed=0))
    assert {key: tuple(v.values().shape) for key, v in result.items()} == {"x": (0, 3), "z": (0, 3), "y": (0, 3)}


def test_a_dict_of_jagged_tensors() -> None:
    ours, stock = equal_pair([config("a", 9, 4, "x"), config("b", 9, 4, "y")])
    given_dict = TensorDict(
        {
            "y": JaggedTensor(torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 1])),
            "x": JaggedTensor(torch.tensor([4]), lengths=torch.tensor([0, 1])),
        },
        batch_size=[],
    )
    assert_equal(ours(given_dict), stock(given_dict))


def test_another_batch_size_for_each_feature() -> None:
    """As from the stock collection: each feature's own bags, inverse indices or not."""
    ours, stock = equal_pair([config("a", 9, 4, "x", "y"), config("b", 9, 4, "x")])
    for inverse in (None, (["y", "x"], torch.tensor([[0, 2, 1, 1], [1, 0, 1, 1]]))):
        features = KeyedJaggedTensor(
            keys=["y", "x"],
            values=torch.tensor([1, 2, 3, 4, 5, 6, 7]),
            lengths=torch.tensor([2, 1, 0, 1, 3]),
            stride_per_key_per_rank=[[3], [2]],
            inverse_indices=inverse,
        )
        assert_equal(ours(features), stock(features))


# ---- what compressed collections report and give ---------------------------------------------------------------------


@pytest.mark.parametrize("method, budget", COMPRESSED)
def test_logical_configs_and_vectors(method: object, budget: float | None) -> None:
    configs = [config("a", 500, 4, "x"), config("b", 300, 4, "y", "x")]
    ours = EmbeddingCollection(configs, method=method, budget=budget)
    assert ours.embedding_configs() == configs and ours.embedding_dim() == 4
    assert ours.tables.plan.inference_bytes <= (budget or 1) * 4 * 4 * 800
    features = jagged({"unused": 10, "y": 300, "x": 300}, 8, seed=3)
    result = ours(features)
    assert list(result) == ["x@a", "y", "x@b"]
    for key, table in (("x@a", "a"), ("y", "b"), ("x@b", "b")):
        given_ids = features[key.split("@")[0]]
        assert torch.equal(result[key].values(), ours.tables.to_dense(table)[given_ids.values()])
        assert torch.equal(result[key].lengths(), given_ids.lengths())


@pytest.mark.parametrize("method, budget", COMPRESSED)
def test_meta_device(method: object, budget: float | None) -> None:
    configs = [config("a", 500, 4, "x"), config("b", 300, 4, "y", "x")]
    ours = EmbeddingCollection(configs, torch.device("meta"), method=method, budget=budget)
    assert ours.device.type == "meta"
    ours.reset_parameters()
    ours.to_empty(device="cpu")
    ours.reset_parameters()
    features = jagged({"x": 300, "y": 300}, 5, seed=7)
    direct = EmbeddingCollection(configs, method=method, budget=budget)
    direct.load_state_dict(ours.state_dict())
    assert_equal(ours(features), direct(features))
    assert ours.device.type == "cpu" and ours(features)["y"].values().abs().sum() > 0


# ---- state dict ------------------------------------------------------------------------------------------------------


def test_stock_state_dict_both_ways() -> None:
    configs = [config("a", 7, 4, "x"), config("b", 5, 4, "y")]
    ours, stock = EmbeddingCollection(configs), Stock(configs)
    assert sorted(ours.state_dict()) == sorted(stock.state_dict()) == ["embeddings.a.weight", "embeddings.b.weight"]
    stock.load_state_dict(ours.state_dict())
    features = jagged({"x": 7, "y": 5}, 5, seed=5)
    assert_equal(ours(features), stock(features))
    with pytest.raises(RuntimeError, match="[Mm]issing.*embeddings.b.weight"):
        ours.load_state_dict({"embeddings.a.weight": torch.zeros(7, 4)})
    with pytest.raises(RuntimeError, match=r"embeddings.b.weight.*\[4, 4\].*\[5, 4\]"):
        ours.load_state_dict({"embeddings.a.weight": torch.zeros(7, 4), "embeddings.b.weight": torch.zeros(4, 4)})


# ---- a target and its history in one table ---------------------------------------------------------------------------


class TwoViews(torch.nn.Module):
    """The target pooled, its history not; the score is their mean dot product."""

    def __init__(self, tables: EmbeddingTables) -> None:
        super().__init__()
        self.targets = EmbeddingBagCollection.of(tables, features=["target"])
        self.histories = EmbeddingCollection.of(tables, features=["history"])

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        target = self.targets(features)["target"]
        history = self.histories(features)["history"]
        example = torch.arange(len(target)).repeat_interleave(history.lengths())
        dots = (target[example] * history.values()).sum(1)
        total = torch.zeros(len(target)).index_add(0, example, dots)
        return total / history.lengths().clamp(min=1)


@pytest.mark.parametrize("method, budget", [("full", None), ("hash", "50%"), ("compositional", "50%")])
@pytest.mark.parametrize("optimizer", [None, Adagrad(lr=0.1)])
def test_two_views_train_one_table(method: str, budget: str | None, optimizer: Adagrad | None) -> None:
    """Labels say whether the target has the parity of its history's first item, which two tables could not share."""
    items = TableConfig("item", 60, 8, ["target", "history"])
    tables = EmbeddingTables(plan([items], method, budget, optimizer=optimizer), std=0.5)
    model = TwoViews(tables)
    assert model.targets.tables is model.histories.tables
    assert len(list(model.parameters())) == (optimizer is None)
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(60, (256 * 3,), generator=generator), torch.tensor([1] * 256 + [2] * 256)
    ids[257::2] = ids[256::2]
    features = KeyedJaggedTensor(["target", "history"], ids, lengths=lengths)
    labels = (ids[:256] % 2 == ids[256::2] % 2).float()
    adam = None if optimizer else torch.optim.Adam(model.parameters(), lr=0.05)
    before = tables.to_dense("item")
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(features), labels)
        losses.append(loss.item())
        if adam is not None:
            adam.zero_grad()
        loss.backward()
        if adam is not None:
            adam.step()
    assert losses[-1] < 0.4 * losses[0]
    assert bool((tables.to_dense("item") != before).any(1).all())


@pytest.mark.parametrize("features", [["target"], None])
def test_the_mode_of_a_view_is_that_of_its_lookups(features: list[str] | None) -> None:
    tables = EmbeddingTables(plan([TableConfig("item", 60, 8, ["target", "history"])], "full", optimizer=Adagrad()))
    tables.regularize(0.1)
    views = torch.nn.ModuleList(
        view.of(tables, features=features) for view in (EmbeddingBagCollection, EmbeddingCollection)
    )
    ids = KeyedJaggedTensor(["target", "history"], torch.tensor([1, 2]), lengths=torch.tensor([1, 1]))

    def trained() -> list[bool]:
        found = [views[0](ids)["target"], views[1](ids)["target"].values()]
        return [vectors.requires_grad for vectors in found]

    views[1].eval()
    assert trained() == [True, False]
    views[0].eval()
    views[1].train()
    assert trained() == [False, True]
    views.eval()
    assert trained() == [False, False]
    views.train()
    assert trained() == [True, True]


def test_the_gradient_through_two_views_is_that_of_one_table() -> None:
    items = TableConfig("item", 20, 3, ["target", "history"])
    tables = EmbeddingTables(plan([items], "full", optimizer=None), std=0.5)
    weight = tables.to_dense("item").requires_grad_()
    features = KeyedJaggedTensor(
        ["history", "target"], torch.tensor([4, 7, 4, 7, 4]), lengths=torch.tensor([2, 1, 1, 1])
    )
    model = TwoViews(tables)
    result = model(features)
    expected = torch.stack([(weight[7] * (weight[4] + weight[7])).sum() / 2, (weight[4] * weight[4]).sum()])
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    expected.sum().backward()
    (parameter,) = model.parameters()
    torch.testing.assert_close(parameter.grad, weight.grad)
    state = model.state_dict()
    assert sorted(state) == ["histories.embeddings.item.weight", "targets.embedding_bags.item.weight"]
    with torch.no_grad():
        parameter.zero_()
    model.load_state_dict({key: torch.ones_like(value) for key, value in state.items()})
    assert torch.equal(tables.to_dense("item"), torch.ones(20, 3))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals_name_the_culprit() -> None:
    ok = config("a", 9, 4, "x")
    with pytest.raises(ValueError, match="table 'a' has 4 and table 'b' 3"):
        EmbeddingCollection([ok, config("b", 9, 3, "y")])
    with pytest.raises(ValueError, match="table 'h'.*FP16"):
        EmbeddingCollection([EmbeddingConfig(name="h", num_embeddings=9, embedding_dim=4, data_type=DataType.FP16)])
    with pytest.raises(ValueError, match="named 'a'"):
        EmbeddingCollection([ok, config("a", 5, 4, "y")])
    with pytest.raises(KeyError, match="lacks the feature 'x'.*q"):
        EmbeddingCollection([ok])(jagged({"q": 3}, 2, seed=0))
    with pytest.raises(IndexError, match="feature 'x' holds id 9"):
        EmbeddingCollection([ok])(KeyedJaggedTensor(["x"], torch.tensor([9]), lengths=torch.tensor([1])))
    tables = EmbeddingTables(plan([TableConfig("a", 9, 4), TableConfig("b", 9, 3)], "full"))
    with pytest.raises(ValueError, match="one embedding_dim"):
        EmbeddingCollection.of(tables)
    assert EmbeddingCollection.of(tables, features=["b"]).embedding_dim() == 3
