"""DCN-V2, DeepFM, Wide & Deep, NeuMF and the MLP's options against their formulas in numpy, and counted by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from model_cases import COLUMNS, array, count, layers, make_batch, make_tables, relu_mlp, sigmoid, weights

from embtables.models import FM, LR, MLP, DCNv2, DeepFM, NeuMF, WideDeep, build_model
from embtables.models.blocks import bag, bags, first_and_rest, pooled
from embtables.models.dcn import CrossLayer, MixtureCrossLayer

NAMES = [name for name, _ in COLUMNS]
PAIR = COLUMNS[:2]


def rows_of(tables, batch):
    """For every example the vectors of its ids, by feature, and its dense features."""
    vectors = weights(tables)
    names = [table.name for table in tables.plan.tables]
    for ids, dense in zip(batch.ids.tolist(), array(batch.dense)):
        yield {name: vectors[name][i] for name, i in zip(names, ids)}, dense


def check(model, batch, formula):
    """``formula(vectors, dense) -> logit`` of every example."""
    expected = [formula(vectors, dense) for vectors, dense in rows_of(model.embeddings, batch)]
    np.testing.assert_allclose(array(model(batch)), np.array(expected), rtol=1e-4, atol=1e-5)


def last(model, x):
    ((weight, bias),) = layers(model.output)
    return (weight @ x + bias).item()


# ---- DCN-V2 ----------------------------------------------------------------------------------------------------------


def crosses(model, x0):
    """Eq. 1–4, an expert at a time."""
    x = x0
    for layer in model.crosses:
        b = array(layer.up.bias)
        if isinstance(layer, CrossLayer):
            up = array(layer.up.weight)
            x = x0 * (up @ x + b) + x if layer.down is None else x0 * (up @ (array(layer.down.weight) @ x) + b) + x
            continue
        num_experts, rank, _ = layer.middle.shape
        gate = array(layer.gate.weight) @ x
        gate = np.exp(gate) / np.exp(gate).sum()
        mixed = np.zeros_like(x)
        for e in range(num_experts):
            part = slice(e * rank, (e + 1) * rank)
            low = np.tanh(array(layer.middle)[e] @ np.tanh(array(layer.down.weight)[part] @ x))
            mixed += gate[e] * x0 * (array(layer.up.weight)[:, part] @ low + b)
        x = mixed + x
    return x


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize(("rank", "num_experts"), [(None, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("num_dense", [0, 2])
def test_dcnv2_is_its_formula(structure, rank, num_experts, num_dense):
    tables = make_tables(COLUMNS, dim={"user": 6, "item": 8, "category": 3})
    model = DCNv2(
        tables, num_dense, num_layers=2, rank=rank, num_experts=num_experts, structure=structure, units=(7, 5)
    )

    def formula(vectors, dense):
        x0 = np.concatenate([*vectors.values(), dense])
        crossed = crosses(model, x0)
        if structure == "stacked":
            return last(model, relu_mlp(crossed, model.hidden))
        return last(model, np.concatenate([crossed, relu_mlp(x0, model.hidden)]))

    check(model, make_batch(COLUMNS, num_dense=num_dense), formula)


def test_the_cross_layers_are_those_of_torchrec():
    crossnet = pytest.importorskip("torchrec.modules.crossnet", exc_type=(ImportError, OSError))
    torch.manual_seed(0)
    x0 = torch.randn(5, 12)
    full, low, mixed = CrossLayer(12), CrossLayer(12, rank=3), MixtureCrossLayer(12, rank=3, num_experts=4)
    theirs = crossnet.CrossNet(12, 1)
    theirs.kernels[0].data, theirs.bias[0].data = full.up.weight.data, full.up.bias.data.unsqueeze(1)
    torch.testing.assert_close(full(x0, x0), theirs(x0))
    theirs = crossnet.LowRankCrossNet(12, 1, low_rank=3)
    theirs.W_kernels[0].data, theirs.V_kernels[0].data = low.up.weight.data, low.down.weight.data
    theirs.bias[0].data = low.up.bias.data
    torch.testing.assert_close(low(x0, x0), theirs(x0))
    theirs = crossnet.LowRankMixtureCrossNet(12, 1, num_experts=4, low_rank=3, activation=torch.tanh)
    theirs.U_kernels[0].data = mixed.up.weight.data.view(12, 4, 3).transpose(0, 1).contiguous()
    theirs.V_kernels[0].data = mixed.down.weight.data.view(4, 3, 12)
    theirs.C_kernels[0].data, theirs.bias[0].data = mixed.middle.data, mixed.up.bias.data.unsqueeze(1)
    for gate, weight in zip(theirs.gates, mixed.gate.weight.data):
        gate.weight.data = weight.unsqueeze(0)
    torch.testing.assert_close(mixed(x0, x0), theirs(x0))


def test_dcnv2_parameter_counts():
    """Three tables of dimension 8 and two dense features: n = 26."""
    tables = make_tables(COLUMNS)
    mlp = (26 * 128 + 128) + (128 * 64 + 64)
    assert count(DCNv2(tables, 2)) == 3 * (26 * 26 + 26) + mlp + (26 + 64) + 1
    assert count(DCNv2(tables, 2, structure="stacked")) == 3 * (26 * 26 + 26) + mlp + 64 + 1
    assert count(DCNv2(tables, 2, rank=4, num_layers=2)) == 2 * (26 * 4 * 2 + 26) + mlp + (26 + 64) + 1
    mixture = 3 * (2 * 26 * 4 + 4 * 4) + 26 + 3 * 26
    assert count(DCNv2(tables, 2, rank=4, num_experts=3, num_layers=2)) == 2 * mixture + mlp + (26 + 64) + 1
    assert count(DCNv2(tables, 2, structure="stacked", units=())) == 3 * (26 * 26 + 26) + 26 + 1


# ---- DeepFM and Wide & Deep ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_dense", [0, 3])
def test_deepfm_is_its_formula(num_dense):
    model = DeepFM(make_tables(COLUMNS, dim=5), num_dense, units=(7, 5))

    def formula(vectors, dense):
        fields = [(1.0, v[0], v[1:]) for v in vectors.values()]
        if num_dense:
            model.dense_latent.data.normal_(generator=torch.Generator().manual_seed(0))
            ((weight,),) = [array(model.dense_weight.weight)]
            fields += list(zip(dense, weight, array(model.dense_latent)))
        first = sum(x * w for x, w, _ in fields)
        second = sum(x * y * np.dot(v, u) for (x, _, v), (y, _, u) in combinations(fields, 2))
        deep = relu_mlp(np.concatenate([*(v[1:] for v in vectors.values()), dense]), model.hidden)
        return first + second + last(model, deep)

    check(model, make_batch(COLUMNS, num_dense=num_dense), formula)


@pytest.mark.parametrize("num_dense", [0, 3])
def test_fm_and_lr_are_their_formulas(num_dense):
    model = FM(make_tables(COLUMNS, dim=5), num_dense)
    linear = LR(make_tables(COLUMNS, dim=1), num_dense)
    for each in (model, linear):
        torch.nn.init.constant_(each.bias, 0.3)
    if num_dense:
        model.dense_latent.data.normal_(generator=torch.Generator().manual_seed(0))

    def factorized(vectors, dense):
        fields = [(1.0, v[0], v[1:]) for v in vectors.values()]
        if num_dense:
            fields += list(zip(dense, array(model.dense_weight.weight)[0], array(model.dense_latent)))
        first = sum(x * w for x, w, _ in fields)
        return 0.3 + first + sum(x * y * np.dot(v, u) for (x, _, v), (y, _, u) in combinations(fields, 2))

    def regression(vectors, dense):
        weights = array(linear.dense_weight.weight)[0] if num_dense else np.zeros(0)
        return 0.3 + sum(v[0] for v in vectors.values()) + np.dot(weights, dense)

    batch = make_batch(COLUMNS, num_dense=num_dense)
    check(model, batch, factorized)
    check(linear, batch, regression)
    assert count(model) == 1 + num_dense * 5 and count(linear) == 1 + num_dense


@pytest.mark.parametrize("num_dense", [0, 3])
def test_wide_deep_is_its_formula(num_dense):
    """The category is in the wide part alone."""
    model = WideDeep(make_tables(COLUMNS, dim={"user": 6, "item": 4, "category": 1}), num_dense, units=(7, 5))

    def formula(vectors, dense):
        wide = sum(v[0] for v in vectors.values())
        if num_dense:
            wide += (array(model.dense_weight.weight) @ dense).item()
        return wide + last(
            model, relu_mlp(np.concatenate([vectors["user"][1:], vectors["item"][1:], dense]), model.hidden)
        )

    check(model, make_batch(COLUMNS, num_dense=num_dense), formula)


def test_deepfm_and_wide_deep_parameter_counts():
    """Three tables of dimension 8: 21 components for the MLP."""
    tables = make_tables(COLUMNS)
    without = (21 * 128 + 128) + (128 * 64 + 64) + (64 + 1)
    assert count(DeepFM(tables, 0)) == count(WideDeep(tables, 0)) == without
    with_dense = (24 * 128 + 128) + (128 * 64 + 64) + (64 + 1)
    assert count(DeepFM(tables, 3)) == with_dense + 3 + 3 * 7
    assert count(WideDeep(tables, 3)) == with_dense + 3
    # Batch normalization: a scale and a shift; PReLU: a slope.
    assert count(WideDeep(tables, 0, batch_norm=True, activation="prelu")) == without + 3 * (128 + 64)


def test_first_and_rest():
    vectors = torch.arange(12.0).view(2, 6)
    first, rest = first_and_rest(vectors, [3, 1, 2])
    assert first.tolist() == [[0, 3, 4], [6, 9, 10]]
    assert rest.tolist() == [[1, 2, 5], [7, 8, 11]]


# ---- NeuMF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("structure", "gmf_dim"), [("neumf", None), ("neumf", 3), ("gmf", None), ("mlp", None)])
def test_neumf_is_its_formula(structure, gmf_dim):
    model = NeuMF(make_tables(PAIR), 0, structure=structure, gmf_dim=gmf_dim, units=(7, 5))
    m = {"neumf": gmf_dim or 4, "gmf": 8, "mlp": 0}[structure]

    def formula(vectors, dense):
        p, q = vectors["user"], vectors["item"]
        parts = [p[:m] * q[:m]]
        if structure != "gmf":
            parts.append(relu_mlp(np.concatenate([p[m:], q[m:]]), model.hidden))
        return last(model, np.concatenate(parts))

    check(model, make_batch(PAIR), formula)


def test_neumf_takes_other_features_and_unequal_dims():
    tables = make_tables((COLUMNS[2], *PAIR), dim={"category": 3, "user": 6, "item": 5})
    model = NeuMF(tables, 2, user="user", item="item", gmf_dim=2, units=(7,))

    def formula(vectors, dense):
        p, q = vectors["user"], vectors["item"]
        deep = relu_mlp(np.concatenate([p[2:], q[2:], vectors["category"], dense]), model.hidden)
        return last(model, np.concatenate([p[:2] * q[:2], deep]))

    check(model, make_batch((COLUMNS[2], *PAIR), num_dense=2), formula)
    assert count(model) == ((4 + 3 + 3 + 2) * 7 + 7) + (2 + 7 + 1)


def test_neumf_parameter_counts():
    """User and item of dimension 8."""
    tables = make_tables(PAIR)
    tower = (32 * 16 + 16) + (16 * 8 + 8)
    assert count(NeuMF(tables, 0)) == (8 * 32 + 32) + tower + (4 + 8 + 1)
    assert count(NeuMF(tables, 0, structure="mlp")) == (16 * 32 + 32) + tower + (8 + 1)
    assert count(NeuMF(tables, 0, structure="gmf")) == 8 + 1


# ---- MLP and shared blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "prelu", "dice"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_with_its_options(activation, batch_norm):
    """Linear, batch normalization, activation; in training over the batch's own statistics."""
    model = MLP(make_tables(COLUMNS), 2, units=(7, 5), activation=activation, batch_norm=batch_norm)
    batch = make_batch(COLUMNS, num_dense=2)
    x = np.array([np.concatenate([*vectors.values(), dense]) for vectors, dense in rows_of(model.embeddings, batch)])
    for weight, bias in layers(model.hidden):
        x = x @ weight.T + bias
        if batch_norm:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        if activation == "dice":
            x = x * sigmoid((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-8))
        else:
            x = {"relu": np.maximum(x, 0), "sigmoid": sigmoid(x), "prelu": np.where(x > 0, x, x / 4)}[activation]
    ((weight, bias),) = layers(model.output)
    np.testing.assert_allclose(array(model(batch)), (x @ weight.T + bias)[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "dlrm", "din", "dcnv2", "deepfm", "wide_deep", "neumf", "fm"])
def test_dropout_of_vectors_and_of_what_the_mlp_sees(name):
    """Which tensors are dropped is seen from outside; without training nothing is."""
    tables, batch = make_tables(COLUMNS), make_batch(COLUMNS, num_dense=2)
    rates = {"embedding_dropout": 0.75} if name == "fm" else {"embedding_dropout": 0.75, "input_dropout": 0.5}
    torch.manual_seed(0)
    plain = build_model(name, tables, 2, {}).eval()
    torch.manual_seed(0)
    model = build_model(name, tables, 2, rates).eval()
    assert torch.equal(model(batch), plain(batch))
    seen: dict[str, list[torch.Tensor]] = {}
    for of, module in model.named_modules():
        if of.endswith("_dropout"):
            module.register_forward_hook(lambda _, given, out, of=of: seen.setdefault(of, []).extend([*given, out]))
    first_layer = next((m for n, m in model.named_modules() if n in ("hidden.layers.0", "top.layers.0")), None)
    if first_layer is not None:
        first_layer.register_forward_hook(lambda _, given, out: seen.setdefault("first_layer", []).extend(given))
    model(batch)
    drops = {of for of in seen if of.endswith("_dropout")}
    assert {of.rpartition(".")[2] for of in drops} >= set(rates)
    # All vectors as they leave the tables pass the one, each of them once.
    whole = torch.cat(seen["embedding_dropout"][::2], dim=1)
    assert torch.equal(whole, pooled(tables, batch).detach())
    model.train()
    seen.clear()
    model(batch)
    given, out = (torch.cat(seen["embedding_dropout"][k::2], dim=1) for k in (0, 1))
    assert set((out / given).unique().tolist()) == {0, 4}
    if first_layer is not None:
        (of,) = (of for of in seen if of in ("hidden.input_dropout", "top.input_dropout"))
        given, out = seen[of]
        assert torch.equal(out, seen["first_layer"][0]) and (out == 2 * given).logical_or(out == 0).all()
        assert (out[given != 0] == 0).any()


def test_state_dict_keys_of_served_models_stay():
    keys = ["hidden.layers.0", "hidden.layers.2", "output"]
    found = [key for key in MLP(make_tables(COLUMNS), 0).state_dict() if not key.startswith("embeddings.")]
    assert found == [f"{key}.{part}" for key in keys for part in ("weight", "bias")]
    dropped = MLP(make_tables(COLUMNS), 0, dropout=0.5)
    assert "hidden.layers.3.weight" in dropped.state_dict()


def test_bags():
    """Feature by feature, each by hand."""
    batch = make_batch(lengths=[2, 0, 1])
    ids, offsets = bags(batch, ["item", "history", "user", "tags", "category"])
    # The columns of batch.ids are the features that are no lists, in the order asked for.
    a, b, c = batch.ids.t().tolist()
    h, t = batch.lists["history"].values.tolist(), batch.lists["tags"].values.tolist()
    assert ids.tolist() == [*a, *h, *b, *t, *c]
    assert offsets.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 10, 10, 12, 13, 14, 15]
    values, offsets = bag(batch, "history", ["item", "history"])
    assert values.tolist() == h and offsets.tolist() == [0, 2, 2, 3]
    values, offsets = bag(batch, "user", ["item", "history", "user"])
    assert values.tolist() == b and offsets.tolist() == [0, 1, 2, 3]
    # Without lists, nothing is copied.
    assert bags(batch, ["user", "item", "category"])[0] is batch.ids
    with pytest.raises(ValueError, match="batch.ids has 3 columns, but the tables take 2 features from it: item, user"):
        bags(batch, ["item", "history", "user"])
    with pytest.raises(ValueError, match="take 4 features from it: a, b, c, d; .* which has history, category_history"):
        bags(batch, ["a", "b", "c", "d", "tags"])
    short = batch._replace(ids=batch.ids[:2])
    with pytest.raises(ValueError, match=r"batch.lists\['history'\] has 3 rows, but batch.ids 2"):
        bags(short, ["a", "history", "b", "c"])


def test_pooled_is_the_mean_of_each_list():
    tables, batch = make_tables(), make_batch()
    vectors = weights(tables)
    tables_of = {"history": "item", "category_history": "category", "tags": "tags"}
    expected = []
    for row in range(6):
        parts = []
        for name in tables.feature_names:
            if name in tables_of:
                values, offsets = batch.lists[name]
                mine = [vectors[tables_of[name]][i] for i in values[offsets[row] : offsets[row + 1]].tolist()]
                parts.append(np.mean(mine, axis=0) if mine else np.zeros(8))
            else:
                parts.append(vectors[name][batch.ids[row, NAMES.index(name)]])
        expected.append(np.concatenate(parts))
    np.testing.assert_allclose(array(pooled(tables, batch)), np.array(expected), rtol=1e-5, atol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dims", "num_dense", "hyperparameters", "message"),
    [
        ("dcnv2", 8, 0, {"num_layers": 0}, "num_layers must hold positive integers, not 0"),
        ("dcnv2", 8, 0, {"rank": 0}, "rank must hold positive integers, not 0"),
        ("dcnv2", 8, 0, {"rank": 4, "num_experts": 1.5}, "num_experts must hold positive integers"),
        ("dcnv2", 8, 0, {"num_experts": 4}, "num_experts is for layers of low rank: give rank too"),
        ("dcnv2", 8, 0, {"structure": "crossnet_only"}, "structure must be one of parallel, stacked, not 'cross"),
        ("dcnv2", 8, 0, {"units": []}, "units is empty: crosses without an MLP are structure: stacked"),
        ("dcnv2", 8, 0, {"dropout": -0.1}, "dropout must lie in"),
        ("mlp", 8, 0, {"dropout": "1e-1"}, "dropout must lie in"),
        ("dlrm", 8, 0, {"input_dropout": 1.0}, "input_dropout must lie in"),
        ("din", 8, 0, {"input_dropout": float("nan")}, "input_dropout must lie in"),
        ("fm", 8, 0, {"embedding_dropout": True}, "embedding_dropout must lie in"),
        ("mlp", 8, 0, {"batch_norm": "off "}, "batch_norm must be true or false, not 'off '"),
        ("fm", 1, 0, {}, "FM takes a first-order weight and a latent vector from each embedding"),
        ("lr", 8, 0, {}, "LR has one weight for each id, so embedding_dim must be 1, not user=8, item=8"),
        ("deepfm", 1, 0, {}, "a latent vector from each embedding, so embedding_dim must be 2"),
        ("deepfm", (8, 4), 0, {}, "must be equal, not user=8, item=4; give .* or use --model wide_deep"),
        ("deepfm", 8, 0, {"activation": "gelu"}, "activation must be one of"),
        ("wide_deep", 1, 0, {}, "nothing is left for the deep one"),
        ("wide_deep", 8, 0, {"units": [True]}, "units must hold positive integers"),
        ("neumf", 7, 0, {}, "an embedding_dim of 7 has no half .* give gmf_dim or an even one"),
        ("neumf", (8, 4), 0, {}, "must be equal, not user=8, item=4; .* or neumf a gmf_dim below both"),
        ("neumf", (8, 4), 0, {"structure": "gmf"}, "must be equal, not user=8, item=4"),
        ("neumf", (8, 4), 0, {"gmf_dim": 4}, "gmf_dim is 4, which leaves the MLP nothing of user=8, item=4"),
        ("neumf", 8, 0, {"gmf_dim": 0}, "gmf_dim must hold positive integers"),
        ("neumf", 8, 0, {"structure": "ncf"}, "structure must be one of neumf, gmf, mlp"),
        ("neumf", 8, 2, {"structure": "gmf"}, "sees 'user' and 'item' alone, but there are dense features too"),
        ("neumf", 8, 0, {"structure": "gmf", "activation": "gelu"}, "activation must be one of"),
        ("neumf", 8, 0, {"structure": "gmf", "dropout": 2}, "dropout must lie in"),
        ("neumf", 8, 0, {"user": "customer"}, "user names 'customer', which is no output .*; they have user, item"),
        ("neumf", 8, 0, {"item": "user"}, "user and item both name 'user'"),
        ("mlp", 8, 0, {"activation": "swish"}, "activation must be one of relu, sigmoid, prelu, dice, not 'swish'"),
    ],
)  # fmt: skip
def test_models_refuse(name, dims, num_dense, hyperparameters, message):
    dims = dict(zip(NAMES, (dims, dims) if isinstance(dims, int) else dims))
    with pytest.raises(ValueError, match=message):
        build_model(name, make_tables(PAIR, dim=dims), num_dense, hyperparameters)


def test_neumf_needs_two_tables_and_gmf_no_more():
    with pytest.raises(ValueError, match="a table of users and one of items; there is only user"):
        NeuMF(make_tables(COLUMNS[:1]), 0)
    with pytest.raises(ValueError, match="sees 'user' and 'item' alone, but there are category too: leave them out"):
        NeuMF(make_tables(COLUMNS), 0, structure="gmf")


def test_a_table_of_one_dimension_is_wide_only_with_dense_features():
    assert count(WideDeep(make_tables(PAIR, dim=1), 3, units=(4,))) == 3 + (3 * 4 + 4) + (4 + 1)
