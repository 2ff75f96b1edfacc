"""The pooled torchrec face against torchrec's own collection, comparator and models."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embtables

try:
    import torchrec
    from torchrec.models.deepfm import SimpleDeepFMNN
    from torchrec.models.dlrm import DLRM, DLRM_DCN
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
    from torchrec.schema.utils import is_signature_compatible
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
    from torchrec_cases import jagged

    from embtables import ops
    from embtables.torchrec import EmbeddingBagCollection
except (ImportError, OSError) as error:
    # Not pytest.importorskip: a broken fbgemm raises OSError.
    pytest.skip(f"torchrec cannot be imported: {error}", allow_module_level=True)

Stock = torchrec.EmbeddingBagCollection
COMPRESSED = [("hash", 0.3), ("full", None), ({"a": "full", "*": "hash"}, 0.8)]


def config(
    name: str, rows: int, dim: int, *features: str, pooling: PoolingType = PoolingType.SUM
) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=list(features), pooling=pooling
    )


def equal_pair(configs: list[EmbeddingBagConfig], is_weighted: bool = False) -> tuple[EmbeddingBagCollection, Stock]:
    stock = Stock(configs, is_weighted)
    ours = EmbeddingBagCollection(configs, is_weighted)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


# ---- interface -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__init__", "forward", "embedding_bag_configs", "is_weighted", "reset_parameters"])
def test_signatures(name: str) -> None:
    ours = inspect.signature(getattr(EmbeddingBagCollection, name))
    assert is_signature_compatible(inspect.signature(getattr(Stock, name)), ours)
    if hasattr(EmbeddingBagCollectionInterface, name) and name != "__init__":
        assert is_signature_compatible(inspect.signature(getattr(EmbeddingBagCollectionInterface, name)), ours)


def test_is_the_interface() -> None:
    assert issubclass(EmbeddingBagCollection, EmbeddingBagCollectionInterface)
    assert isinstance(EmbeddingBagCollection.device, property)


# ---- equal to the stock collection -----------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[EmbeddingBagConfig], KeyedJaggedTensor, bool]:
    features = [f"f{i}" for i in range(draw(st.integers(1, 5)))]
    weighted = draw(st.booleans())
    # The stock collection cannot weight a mean.
    poolings = [PoolingType.SUM] if weighted else [PoolingType.SUM, PoolingType.MEAN]
    configs = [
        config(
            f"t{i}",
            draw(st.integers(1, 40)),
            draw(st.integers(1, 9)),
            *draw(st.lists(st.sampled_from(features), min_size=1, unique=True)),
            pooling=draw(st.sampled_from(poolings)),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    used = {feature for c in configs for feature in c.feature_names}
    # A feature that no table looks up may hold any id.
    rows = {f: min([c.num_embeddings for c in configs if f in c.feature_names], default=10**9) for f in features}
    keys = draw(st.permutations(sorted(used | set(draw(st.lists(st.sampled_from(features)))))))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    seed = draw(st.integers(0, 2**31))
    features_in = jagged(
        {key: rows[key] for key in keys}, draw(st.integers(1, 6)), seed, dtype=dtype, weighted=weighted
    )
    return configs, features_in, weighted


@settings(max_examples=150)
@given(case=cases())
def test_full_equals_stock(case: tuple[list[EmbeddingBagConfig], KeyedJaggedTensor, bool]) -> None:
    """Bit for bit forward by the reference operators, to 1e-6 by native ones; gradients to 1e-6."""
    configs, features, weighted = case
    ours, stock = equal_pair(configs, weighted)
    result, expected = ours(features), stock(features)
    assert result.keys() == expected.keys()
    assert result.length_per_key() == expected.length_per_key()
    torch.testing.assert_close(result.values(), expected.values(), rtol=1e-6, atol=1e-6)
    with ops.using("reference"):
        assert torch.equal(ours(features).values(), expected.values())

    # Small multiples of 1/16, so that the order of a sum hardly matters.
    direction = torch.randint(-4, 5, expected.values().shape) / 16
    (result.values() * direction).sum().backward()
    (expected.values() * direction).sum().backward()
    for (name, own), (stock_name, parameter) in zip(ours.named_parameters(), stock.named_parameters()):
        assert name == stock_name
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(own.grad, grad, rtol=1e-6, atol=1e-6)


def test_empty_batch() -> None:
    """The stock collection fails on it; a last, empty shard of a split is no reason to."""
    ours = EmbeddingBagCollection([config("a", 5, 3, "x"), config("b", 5, 2, "y", "x", pooling=PoolingType.MEAN)])
    result = ours(jagged({"x": 5, "y": 5}, 0, seed=0))
    assert result.keys() == ["x@a", "y", "x@b"]
    assert result.values().shape == (0, 7)


def test_input_weights_get_the_stock_gradient() -> None:
    ours, stock = equal_pair([config("a", 20, 4, "x"), config("b", 20, 3, "y")], is_weighted=True)
    gradients = []
    for collection in (ours, stock):
        plain = jagged({"y": 20, "x": 20}, 7, seed=1, weighted=True)
        weights = plain.weights().clone().requires_grad_()
        features = KeyedJaggedTensor(plain.keys(), plain.values(), weights, lengths=plain.lengths())
        collection(features).values().square().sum().backward()
        gradients.append(weights.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_distinct_bags_with_inverse_indices() -> None:
    """Another batch size for each feature, expanded by ``inverse_indices``, as in the stock collection."""
    ours, stock = equal_pair([config("a", 9, 4, "x", "y"), config("b", 9, 2, "x")])
    features = KeyedJaggedTensor(
        keys=["y", "x"],
        values=torch.tensor([1, 2, 3, 4, 5, 6, 7]),
        lengths=torch.tensor([2, 1, 0, 1, 3]),
        stride_per_key_per_rank=[[3], [2]],
        inverse_indices=(["y", "x"], torch.tensor([[0, 2, 1, 1], [1, 0, 1, 1]])),
    )
    assert torch.equal(ours(features).values(), stock(features).values())
    assert ours(features).keys() == ["x@a", "y", "x@b"]


def test_different_batch_sizes_without_inverse_indices_are_refused() -> None:
    ours = EmbeddingBagCollection([config("a", 9, 4, "x", "y")])
    features = KeyedJaggedTensor(
        ["x", "y"], torch.tensor([1, 2]), lengths=torch.tensor([1, 1, 0]), stride_per_key_per_rank=[[1], [2]]
    )
    with pytest.raises(ValueError, match="1, 2.*inverse_indices"):
        ours(features)


# ---- what compressed collections report and give ---------------------------------------------------------------------


@pytest.mark.parametrize("method, budget", COMPRESSED)
def test_logical_configs_and_vectors(method: object, budget: float | None) -> None:
    configs = [config("a", 500, 4, "x", pooling=PoolingType.MEAN), config("b", 300, 6, "y", "x")]
    ours = EmbeddingBagCollection(configs, method=method, budget=budget)
    assert ours.embedding_bag_configs() == configs
    assert ours.tables.plan.inference_bytes <= (budget or 1) * 4 * (500 * 4 + 300 * 6)

    features = jagged({"unused": 10, "y": 300, "x": 300}, 8, seed=3)
    result = ours(features)
    assert result.keys() == ["x@a", "y", "x@b"]
    dense = {name: ours.tables.to_dense(name) for name in ("a", "b")}
    for key, table in (("x@a", "a"), ("y", "b"), ("x@b", "b")):
        bags = features[key.split("@")[0]]
        for i, bag in enumerate(torch.split(bags.values(), bags.lengths().tolist())):
            rows = dense[table][bag]
            expected = rows.sum(0) / (max(len(bag), 1) if table == "a" else 1)
            torch.testing.assert_close(result[key][i], expected)


def test_view_of_existing_tables() -> None:
    tables = embtables.EmbeddingTables(
        embtables.plan(
            [embtables.TableConfig("a", 50, 4, ["x", "z"], pooling="mean"), embtables.TableConfig("b", None, 3)],
            "hash",
            budget=600,
            optimizer=None,
        )
    )
    first, second = EmbeddingBagCollection.of(tables), EmbeddingBagCollection.of(tables, is_weighted=True)
    assert first.tables is second.tables
    assert [c.feature_names for c in first.embedding_bag_configs()] == [["x", "z"], ["b"]]
    assert first.embedding_bag_configs()[0].pooling == PoolingType.MEAN
    features = jagged({"b": 2**62, "z": 50, "x": 50}, 5, seed=4, weighted=True)
    ordered = features.permute([2, 1, 0])
    for view, weights in ((first, None), (second, ordered.weights())):
        assert torch.equal(view(features).values(), tables(ordered.values(), ordered.offsets(), weights))


def test_view_of_some_features() -> None:
    a = embtables.TableConfig("a", 50, 4, ["x", "z", "w"], pooling="mean")
    tables = embtables.EmbeddingTables(
        embtables.plan([a, embtables.TableConfig("b", 40, 3, ["y", "z"])], "full", optimizer=None)
    )
    view = EmbeddingBagCollection.of(tables, features=["z", "x"])
    assert [(c.name, c.feature_names) for c in view.embedding_bag_configs()] == [("a", ["x", "z"]), ("b", ["z"])]
    features = jagged({"z": 40, "unused": 9, "x": 50, "w": 50, "y": 40}, 5, seed=9)
    whole = EmbeddingBagCollection.of(tables)(features)
    result = view(features.permute([0, 1, 2]))
    assert result.keys() == ["x", "z@a", "z@b"]
    for key in result.keys():
        assert torch.equal(result[key], whole[key])
    with pytest.raises(ValueError, match="no feature 'q'; their features: x, z, w, y"):
        EmbeddingBagCollection.of(tables, features=["q"])


def test_configs_are_not_modified() -> None:
    """The stock collection fills in empty ``feature_names``; so does ours, in its own copy."""
    given_config = EmbeddingBagConfig(name="a", num_embeddings=9, embedding_dim=4)
    ours = EmbeddingBagCollection([given_config])
    assert given_config.feature_names == []
    assert ours.embedding_bag_configs()[0].feature_names == ["a"]


# ---- state dict and initialization -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, "rowwise_adagrad"])
def test_stock_state_dict_both_ways(optimizer: str | None) -> None:
    configs = [config("a", 7, 4, "x"), config("b", 5, 3, "y"), config("c", 6, 4, "z")]
    ours, stock = EmbeddingBagCollection(configs, optimizer=optimizer), Stock(configs)
    whole = ours.state_dict()
    state = {key: tensor for key, tensor in whole.items() if not key.startswith("tables.optimizer_state.")}
    assert (len(state) < len(whole)) == (optimizer is not None)
    assert list(state) == sorted(stock.state_dict(), key=list(state).index)
    stock.load_state_dict(state)
    features = jagged({"x": 7, "y": 5, "z": 6}, 5, seed=5)
    ours.eval()
    assert torch.equal(ours(features).values(), stock(features).values())
    fresh = EmbeddingBagCollection(configs, seed=1)
    model = torch.nn.Sequential(fresh)
    model.load_state_dict({f"0.{key}": value for key, value in stock.state_dict().items()})
    assert torch.equal(fresh(features).values(), stock(features).values())
    again = EmbeddingBagCollection(configs, seed=2, optimizer=optimizer)
    again.load_state_dict(stock.state_dict())
    assert torch.equal(again(features).values(), stock(features).values())
    again.load_state_dict(whole)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in again.state_dict().items())


def test_state_dict_that_does_not_fit() -> None:
    ours = EmbeddingBagCollection([config("a", 7, 4, "x"), config("b", 5, 4, "y")])
    state = ours.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    weight = torch.zeros(7, 4)
    with pytest.raises(RuntimeError, match="[Mm]issing.*embedding_bags.b.weight"):
        ours.load_state_dict({"embedding_bags.a.weight": weight})
    with pytest.raises(RuntimeError, match="[Uu]nexpected.*embedding_bags.c.weight"):
        ours.load_state_dict({**before, "embedding_bags.c.weight": weight})
    with pytest.raises(RuntimeError, match=r"embedding_bags.b.weight.*\[4, 4\].*\[5, 4\]"):
        ours.load_state_dict({**before, "embedding_bags.b.weight": torch.zeros(4, 4)})
    fused = EmbeddingBagCollection(ours.embedding_bag_configs(), optimizer="sgd")
    with pytest.raises(RuntimeError, match=r"embedding_bags.b.weight.*\(4, 4\).*\(5, 4\)"):
        fused.load_state_dict({**before, "embedding_bags.b.weight": torch.zeros(4, 4)})
    result = ours.load_state_dict({"embedding_bags.a.weight": weight}, strict=False)
    assert result.missing_keys == ["embedding_bags.b.weight"]
    assert torch.equal(ours.state_dict()["embedding_bags.a.weight"], weight)
    assert torch.equal(ours.state_dict()["embedding_bags.b.weight"], before["embedding_bags.b.weight"])


def test_compressed_state_dict_round_trip() -> None:
    configs = [config("a", 700, 4, "x")]
    first = EmbeddingBagCollection(configs, method="hash", budget=0.1)
    second = EmbeddingBagCollection(configs, method="hash", budget=0.1, seed=1)
    second.load_state_dict(first.state_dict())
    features = jagged({"x": 700}, 5, seed=6)
    assert torch.equal(first(features).values(), second(features).values())
    # The rows of another plan mean other ids.
    with pytest.raises((ValueError, RuntimeError), match="another plan|size mismatch"):
        second.load_state_dict(EmbeddingBagCollection(configs, method="hash", budget=0.1, hash_seed=1).state_dict())


def test_initialization_is_the_configs() -> None:
    bounded = EmbeddingBagConfig(
        name="a", num_embeddings=5000, embedding_dim=4, feature_names=["x"], weight_init_min=-0.5, weight_init_max=0.5
    )
    constant = EmbeddingBagConfig(
        name="b", num_embeddings=10, embedding_dim=4, feature_names=["y"], init_fn=lambda w: w.fill_(3.0)
    )
    ours = EmbeddingBagCollection([bounded, constant])
    state = ours.state_dict()
    assert torch.equal(state["embedding_bags.b.weight"], torch.full((10, 4), 3.0))
    weight = state["embedding_bags.a.weight"]
    assert 0.49 < weight.abs().max() <= 0.5
    compressed = EmbeddingBagCollection([bounded], method="hash", budget=0.2)
    # Uniform in ±0.5.
    assert compressed.tables.to_dense("a").std() == pytest.approx(1 / 12**0.5, rel=0.05)


@pytest.mark.parametrize("method, budget", COMPRESSED)
def test_meta_device(method: object, budget: float | None) -> None:
    configs = [config("a", 500, 4, "x"), config("b", 300, 6, "y", "x")]
    ours = EmbeddingBagCollection(configs, device=torch.device("meta"), method=method, budget=budget)
    assert ours.device.type == "meta"
    ours.reset_parameters()
    ours.to_empty(device="cpu")
    torch.manual_seed(0)
    ours.reset_parameters()
    assert ours.device.type == "cpu"
    torch.manual_seed(0)
    direct = EmbeddingBagCollection(configs, method=method, budget=budget)
    features = jagged({"x": 300, "y": 300}, 5, seed=7)
    direct.load_state_dict(ours.state_dict())
    assert torch.equal(ours(features).values(), direct(features).values())
    assert ours(features).values().abs().sum() > 0


# ---- inside torchrec's models ----------------------------------------------------------------------------------------

DIM = 8


def model_of(name: str, collection: EmbeddingBagCollection) -> torch.nn.Module:
    if name == "SimpleDeepFMNN":
        return SimpleDeepFMNN(3, collection, hidden_layer_size=16, deep_fm_dimension=5)
    if name == "DLRM_DCN":
        return DLRM_DCN(collection, 3, [16, DIM], [16, 1], dcn_num_layers=2, dcn_low_rank_dim=4)
    return DLRM(collection, 3, [16, DIM], [16, 1])


@pytest.mark.parametrize("name", ["DLRM", "DLRM_DCN", "SimpleDeepFMNN"])
@pytest.mark.parametrize("optimizer", [None, "adagrad"])
@pytest.mark.parametrize("method, budget", COMPRESSED)
def test_trains_inside_torchrec_models(name: str, optimizer: str | None, method: object, budget: float | None) -> None:
    rows = {"y": 300, "x": 500}
    configs = [config("a", 500, DIM, "x"), config("b", 300, DIM, "y", pooling=PoolingType.MEAN)]
    if optimizer is not None:
        optimizer = embtables.Adagrad(lr=0.1)
    collection = EmbeddingBagCollection(configs, method=method, budget=budget, optimizer=optimizer)
    torch.manual_seed(0)
    model = model_of(name, collection)
    features, dense = jagged(rows, 64, seed=8), torch.randn(64, 3)
    labels = (torch.arange(64) % 2).float()
    before = {table: collection.tables.to_dense(table) for table in ("a", "b")}
    dense_part = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        scores = model(dense, features).squeeze(-1)
        if name == "SimpleDeepFMNN":
            loss = torch.nn.functional.binary_cross_entropy(scores, labels)
        else:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        dense_part.zero_grad()
        loss.backward()
        dense_part.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for table, weight in before.items():
        assert not torch.equal(weight, collection.tables.to_dense(table))


def test_full_trains_like_stock_inside_dlrm() -> None:
    """Ten steps of SGD give the stock model's loss at every step."""
    configs = [config("a", 50, DIM, "x"), config("b", 30, DIM, "y")]
    ours, stock = equal_pair(configs)
    losses: list[list[float]] = []
    for collection in (ours, stock):
        torch.manual_seed(1)
        model = DLRM(collection, 3, [16, DIM], [16, 1])
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        dense, labels = torch.randn(32, 3), (torch.arange(32) % 2).float()
        losses.append([])
        for step in range(10):
            logits = model(dense, jagged({"x": 50, "y": 30}, 32, seed=step)).squeeze(-1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals_name_the_culprit() -> None:
    ok = config("a", 9, 4, "x")
    with pytest.raises(ValueError, match="table 'h'.*FP16"):
        EmbeddingBagCollection(
            [ok, EmbeddingBagConfig(name="h", num_embeddings=9, embedding_dim=4, data_type=DataType.FP16)]
        )
    with pytest.raises(ValueError, match="table 'n'.*NONE"):
        EmbeddingBagCollection([config("n", 9, 4, "x", pooling=PoolingType.NONE)])
    with pytest.raises(ValueError, match="named 'a'"):
        EmbeddingBagCollection([ok, config("a", 5, 4, "y")])
    with pytest.raises(embtables.InfeasibleBudget):
        EmbeddingBagCollection([ok], method="hash", budget=1)
    with pytest.raises(KeyError, match="lacks the feature 'x'.*q"):
        EmbeddingBagCollection([ok])(jagged({"q": 3}, 2, seed=0))
    with pytest.raises(IndexError, match="x.*9"):
        EmbeddingBagCollection([ok])(KeyedJaggedTensor(["x"], torch.tensor([9]), lengths=torch.tensor([1])))
    with pytest.raises(ValueError, match="weighted.*no weights"):
        EmbeddingBagCollection([ok], is_weighted=True)(jagged({"x": 3}, 2, seed=0))


@pytest.mark.parametrize("error", ["ImportError('gone')", "OSError('libnvidia-ml.so.1: no such file')"])
def test_broken_torchrec_says_what_to_do(tmp_path: Path, error: str) -> None:
    (tmp_path / "torchrec").mkdir()
    (tmp_path / "torchrec" / "__init__.py").write_text(f"raise {error}\n")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    code = "import embtables.torchrec"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: embtables.torchrec needs torchrec")
    assert "pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0" in last
    assert error.split("'")[1] in last
