"""DIN: the formula written out in numpy, what histories may be, and that attention finds what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import LISTS, array, count, layers, make_batch, make_tables, offsets_of, sigmoid, take, weights
from torch import nn

from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.datasets import Batch, Jagged
from embtables.lookup.step import Step
from embtables.models import DIN, build_model
from embtables.models.activations import BatchNorm, Dice
from embtables.models.attention import ActivationUnit, TargetAttention, segment_softmax
from embtables.ops.native import Library
from embtables.training.metrics import auc

PAIR = [{"history": "item", "category_history": "category"}]


def with_slopes(model, seed=0):
    """Gives every slope and running statistic a value of its own, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Dice):
            module.alpha.data = torch.rand(module.alpha.shape, generator=generator) - 0.3
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 4)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def dice(s, module):
    """Eq. 3 over rows [n, C]."""
    norm = module.norm
    if norm.training:
        mean, variance = s.mean(axis=0), ((s - s.mean(axis=0)) ** 2).mean(axis=0)
    else:
        mean, variance = array(norm.running_mean), array(norm.running_var)
    p = sigmoid((s - mean) / np.sqrt(variance + 1e-8))
    return p * s + (1 - p) * array(module.alpha) * s


def activated(s, module):
    if isinstance(module, Dice):
        return dice(s, module)
    if isinstance(module, nn.PReLU):
        return np.where(s > 0, s, array(module.weight) * s)
    return {nn.ReLU: lambda x: np.maximum(x, 0), nn.Sigmoid: sigmoid}[type(module)](s)


def through(s, modules):
    """Rows [n, C] through linear layers and activations."""
    for module in modules:
        if isinstance(module, nn.Linear):
            bias = 0 if module.bias is None else array(module.bias)
            s = s @ array(module.weight).T + bias
        else:
            s = activated(s, module)
    return s


def interests(model, attention, vectors, batch, pair, pooling):
    """A vector a row, from loops over rows and entries."""
    tables = {"history": "item", "category_history": "category"}
    columns = {"item": 1, "category": 2}
    offsets = batch.lists[next(iter(pair))].offsets.tolist()
    entries, owners, keys = [], [], []
    for row in range(len(offsets) - 1):
        q = np.concatenate([vectors[tables[h]][batch.ids[row, columns[t]]] for h, t in pair.items()])
        for i in range(offsets[row], offsets[row + 1]):
            k = np.concatenate([vectors[tables[h]][batch.lists[h].values[i]] for h in pair])
            entries.append(np.concatenate([q, k, q - k, q * k]))
            owners.append(row)
            keys.append(k)
    scores = None
    if pooling != "mean":
        scores = through(np.array(entries), [attention.unit.first, *attention.unit.rest])[:, 0]
    out = np.zeros((len(offsets) - 1, keys[0].size))
    for row in range(len(offsets) - 1):
        mine = [i for i, owner in enumerate(owners) if owner == row]
        if pooling == "mean":
            shares = np.ones(len(mine)) / max(1, len(mine))
        else:
            shares = scores[mine] if pooling == "attention" else np.exp(scores[mine]) / np.exp(scores[mine]).sum()
        for i, share in zip(mine, shares):
            out[row] += share * keys[i]
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("pooling", "attention_activation", "activation"),
    [
        ("attention", "dice", "dice"),
        ("softmax", "dice", "prelu"),
        ("mean", "relu", "dice"),
        ("attention", "sigmoid", "relu"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_din_is_its_formula(training, pooling, attention_activation, activation, together):
    tables = make_tables()
    pairs = PAIR if together else [{"history": "item"}, {"category_history": "category"}]
    model = DIN(
        tables, 2, pairs=None if together else pairs, pooling=pooling, attention_units=(7, 5), units=(9, 6),
        attention_activation=attention_activation, activation=activation,
    )  # fmt: skip
    with_slopes(model).train(training)
    batch = make_batch(num_dense=2)
    vectors = weights(tables)
    inputs = []
    for row in range(6):
        tags = batch.lists["tags"]
        values = tags.values[tags.offsets[row] : tags.offsets[row + 1]].tolist()
        mean = vectors["tags"][values].mean(axis=0) if len(values) else np.zeros(8)
        inputs.append(np.concatenate([*(vectors[t][batch.ids[row, c]] for c, t in enumerate(SINGLE)), mean]))
    parts = [interests(model, a, vectors, batch, pair, pooling) for a, pair in zip(model.attention, pairs)]
    top = np.concatenate([np.array(inputs), *parts, array(batch.dense)], axis=1)
    expected = through(through(top, model.hidden.layers), [model.output])[:, 0]
    np.testing.assert_allclose(array(model(batch)), expected, rtol=2e-4, atol=2e-5)


SINGLE = ("user", "item", "category")


def test_the_split_first_layer_is_the_plain_formula():
    torch.manual_seed(0)
    unit = ActivationUnit(6, (5, 4), "prelu").double()
    queries, keys = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 9))
    rows = torch.tensor([0, 0, 1, 1, 1, 1, 3, 3, 3])
    q = queries[rows]
    plain = unit.rest(unit.first(torch.cat([q, keys, q - keys, q * keys], dim=1))).squeeze(1)
    ours = unit(queries, keys, rows)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    leaves = [queries, keys, *unit.parameters()]
    for got, expected in zip(
        torch.autograd.grad(ours.sin().sum(), leaves), torch.autograd.grad(plain.sin().sum(), leaves)
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_softmax_within_rows():
    scores = torch.tensor([1.0, 3.0, 900.0, 1000.0, -1e4, -1e4], dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 0, 2, 2, 4, 4])
    weights = segment_softmax(scores, rows, 6)
    expected = torch.cat([scores[part].softmax(0) for part in (slice(0, 2), slice(2, 4), slice(4, 6))])
    torch.testing.assert_close(weights, expected)
    (got,) = torch.autograd.grad((weights * torch.arange(6)).sum(), scores)
    torch.testing.assert_close(got, torch.autograd.grad((expected * torch.arange(6)).sum(), scores)[0])
    assert segment_softmax(torch.zeros(0), rows[:0], 3).shape == (0,)


def test_dice():
    """The formula, against torch's own batch normalization and the running statistics that it keeps."""
    torch.manual_seed(0)
    module, norm = Dice(3).double(), nn.BatchNorm1d(3, eps=1e-8, affine=False).double()
    module.alpha.data = torch.tensor([0.0, 0.25, -0.5], dtype=torch.float64)
    for _ in range(3):
        s = torch.randn(20, 3, dtype=torch.float64) * 1e-3 + 0.01
        p = norm(s).sigmoid()
        torch.testing.assert_close(module(s), p * s + (1 - p) * module.alpha * s, rtol=1e-12, atol=0)
    module.eval(), norm.eval()
    s = torch.randn(4, 3, dtype=torch.float64)
    p = norm(s).sigmoid()
    torch.testing.assert_close(module(s), p * s + (1 - p) * module.alpha * s)
    assert torch.equal(Dice(2).alpha, torch.zeros(2))
    # With α = 0 and a p of 0 or 1 it is a rectifier, and small inputs see the same shape as large ones.
    fresh = Dice(1)
    s = torch.randn(100, 1)
    torch.testing.assert_close(fresh(s * 1e-3), fresh(s) * 1e-3, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_of_too_few_rows_uses_what_it_knows(rows):
    norm = BatchNorm(3)
    norm(torch.randn(50, 3) * 2 + 1)
    known = norm.running_mean.clone(), norm.running_var.clone()
    inputs = torch.randn(rows, 3, requires_grad=True)
    out = norm(inputs)
    out.sum().backward()
    torch.testing.assert_close(out, (inputs - known[0]) / (known[1] + norm.eps).sqrt())
    assert torch.equal(norm.running_mean, known[0]) and torch.equal(norm.running_var, known[1])


def test_parameter_counts():
    """Dimension 8: tables user, item, category, tags."""
    tables = make_tables()
    # Item and category together: keys of 16, inputs of 64 to the unit.
    unit = (64 * 80 + 80) + 80 + (80 * 40 + 40) + 40 + (40 + 1)
    # user, item, category, tags, the pooled 16, 3 dense.
    top = (4 * 8 + 16 + 3) * 200 + 200 + 200 + (200 * 80 + 80) + 80 + (80 + 1)
    assert count(DIN(tables, 3)) == unit + top
    # A softmax does not see a bias of the scores.
    assert count(DIN(tables, 3, pooling="softmax")) == unit - 1 + top
    assert count(DIN(tables, 3, pooling="mean")) == top
    one = (32 * 80 + 80) + 80 + (80 * 40 + 40) + 40 + (40 + 1)
    assert count(DIN(tables, 3, pairs=[{"history": "item"}, {"category_history": "category"}])) == 2 * one + top
    # One linear layer as the unit, and batch normalization in the top: scale and shift.
    assert count(DIN(tables, 3, attention_units=(), batch_norm=True)) == 64 + 1 + top + 2 * (200 + 80)
    # Without pairs histories are pooled by their tables: user, item, history, category, its history, tags.
    assert count(DIN(tables, 3, pairs=[])) == top


# ---- histories -------------------------------------------------------------------------------------------------------


def test_the_mean_is_that_of_the_tables():
    tables = make_tables()
    batch = make_batch()
    torch.manual_seed(0)
    paired = DIN(tables, 0, pooling="mean", activation="relu")
    torch.manual_seed(0)
    plain = DIN(tables, 0, pairs=[], activation="relu")
    # Inputs: user, item, category, tags, history, category_history, against the tables' order.
    order = torch.arange(48).view(6, 8)[[0, 1, 3, 5, 2, 4]].reshape(-1)
    paired.hidden.layers[0].weight.data = plain.hidden.layers[0].weight.data[:, order].clone()
    torch.testing.assert_close(paired(batch), plain(batch))


@pytest.mark.parametrize("pooling", ["attention", "softmax", "mean"])
def test_an_empty_history_is_zeros(pooling):
    tables = make_tables((("item", "item history"),))
    model = with_slopes(DIN(tables, 0, pooling=pooling, activation="relu")).eval()
    batch = Batch(
        torch.zeros(2), torch.zeros(2, 0), torch.tensor([[3], [3]]), None,
        {"history": Jagged(torch.tensor([5, 6]), torch.tensor([0, 0, 2]))},
    )  # fmt: skip
    item = weights(tables)["item"][3]
    hidden = np.concatenate([item, np.zeros(8)])
    for weight, bias in layers(model.hidden):
        hidden = np.maximum(weight @ hidden + bias, 0)
    ((weight, bias),) = layers(model.output)
    logits = model(batch)
    assert logits[0].item() == pytest.approx((weight @ hidden + bias).item(), abs=1e-6)
    assert logits[0] != logits[1]


@pytest.mark.parametrize("lengths", [[0, 0, 0], [0], [1], [0, 1, 0]])
@pytest.mark.parametrize("pooling", ["attention", "softmax", "mean"])
@pytest.mark.parametrize("optimizer", [None, "adagrad"])
def test_histories_of_nothing_or_of_one_entry_train(lengths, pooling, optimizer):
    tables = make_tables(optimizer=optimizer)
    model = DIN(tables, 2, pooling=pooling, batch_norm=True)
    batch = make_batch(lengths=lengths, num_dense=2)
    steps = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        logits = model(batch)
        F.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        steps.step()
    for name, value in [*model.state_dict().items(), ("logits", logits)]:
        assert value.isfinite().all(), name
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert model(batch).isfinite().all()


@pytest.mark.parametrize("pooling", ["attention", "softmax", "mean"])
def test_a_row_does_not_depend_on_the_others(pooling):
    model = with_slopes(DIN(make_tables(), 2, pooling=pooling)).eval()
    batch = make_batch(num_dense=2)
    together = model(batch)
    for row in range(6):
        torch.testing.assert_close(model(take(batch, [row])), together[row : row + 1], rtol=1e-5, atol=1e-6)
    # In training rows share statistics, but their order says nothing.
    model.train()
    order = [4, 0, 5, 3, 1, 2]
    torch.testing.assert_close(model(take(batch, order)), model(batch)[order], rtol=1e-4, atol=1e-5)


def test_the_order_of_a_history_does_not_matter_but_alignment_does():
    model = with_slopes(DIN(make_tables(), 0)).eval()
    batch = take(make_batch(), [3])  # six entries
    order = torch.tensor([5, 2, 0, 1, 4, 3])

    def reordered(*names):
        changed = {name: Jagged(batch.lists[name].values[order], batch.lists[name].offsets) for name in names}
        return batch._replace(lists=batch.lists | changed)

    torch.testing.assert_close(model(reordered("history", "category_history")), model(batch))
    assert not torch.allclose(model(reordered("history")), model(batch), rtol=1e-4)


def test_only_real_entries_cost():
    """One history of 400 beside many short ones: the unit sees their sum, not rows times the longest."""
    model = DIN(make_tables(), 0)
    seen = []
    model.attention[0].unit.rest.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    lengths = [400, *[1, 0, 2] * 40]
    model(make_batch(lengths=lengths))
    assert seen == [400 + 120]


@pytest.mark.parametrize("pooling", ["attention", "softmax", "mean"])
def test_entries_of_padding_count_for_nothing(pooling):
    tables = make_tables(padding=0)
    model = with_slopes(DIN(tables, 0, pooling=pooling)).eval()
    batch = make_batch(lengths=[2, 0, 3])
    lists = dict(batch.lists)
    for name in ("history", "category_history"):
        a, b, c, d, e = batch.lists[name].values.tolist()
        lists[name] = Jagged(torch.tensor([0, a, 0, b, 0, 0, 0, c, d, 0, e]), torch.tensor([0, 4, 6, 11]))
    padded = batch._replace(lists=lists)
    torch.testing.assert_close(model(padded), model(batch))
    # In training the statistics of Dice do not see them either.
    torch.testing.assert_close(model.train()(padded), model(batch), rtol=1e-4, atol=1e-5)
    # An item of unknown category is an item.
    values = batch.lists["category_history"].values.clone()
    values[0] = 0
    unknown = batch._replace(
        lists=batch.lists | {"category_history": batch.lists["category_history"]._replace(values=values)}
    )
    unit_sees = []
    if pooling != "mean":
        model.attention[0].unit.rest.register_forward_hook(lambda m, inputs, out: unit_sees.append(inputs[0].shape[0]))
        model(unknown)
        assert unit_sees == [5]


def test_a_history_of_one_value_may_be_a_column():
    tables = make_tables((("user", "user"), ("item", "item last_item")))
    model = with_slopes(DIN(tables, 0)).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    columns = Batch(torch.zeros(2), torch.zeros(2, 0), ids, None)
    lists = {"last_item": Jagged(ids[:, 2], torch.arange(3))}
    torch.testing.assert_close(model(columns), model(columns._replace(ids=ids[:, :2], lists=lists)))


def test_a_feature_of_two_tables():
    configs = [
        TableConfig("fine", 60, 8, ["item", "history"], "mean"),
        TableConfig("coarse", 60, 4, ["item", "history"], "mean"),
    ]
    tables = EmbeddingTables(plan(configs, "full", optimizer=None))
    batch = make_batch((("item", "item history"),))
    model = DIN(tables, 0)
    assert model.pairs == [{"history@fine": "item@fine", "history@coarse": "item@coarse"}]
    assert model(batch).shape == (6,)
    with pytest.raises(ValueError, match="of some of its tables only: name 'history@coarse' too"):
        DIN(tables, 0, pairs=[{"history@fine": "item@fine"}])


@pytest.mark.parametrize("pooling", ["attention", "softmax", "mean"])
def test_attention_is_exported_for_any_number_of_rows_and_entries(pooling):
    attention = TargetAttention(8, pooling, (5,), "dice").eval()
    auto = {0: torch.export.Dim.AUTO}
    example = torch.randn(4, 8), torch.randn(10, 8), offsets_of([3, 0, 2, 5])
    exported = torch.export.export(attention, example, dynamic_shapes=(auto, auto, auto)).module()
    others = torch.randn(3, 8), torch.randn(7, 8), offsets_of([3, 4, 0])
    torch.testing.assert_close(exported(*others), attention(*others))


# ---- learning --------------------------------------------------------------------------------------------------------

ITEMS, CLUSTER, LONGEST = 40, 2, 20


def one_match(size, generator):
    """Clicks where one entry of the history is of the target's cluster; the others never are."""
    labels = torch.randint(2, (size,), generator=generator)
    target = torch.randint(ITEMS, (size,), generator=generator)
    lengths = torch.randint(1, LONGEST + 1, (size,), generator=generator)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    clusters = (target // CLUSTER)[torch.repeat_interleave(lengths)]
    clusters += torch.randint(1, ITEMS // CLUSTER, clusters.shape, generator=generator)
    match = offsets[:-1] + (torch.rand(size, generator=generator) * lengths).long()
    clusters[match[labels == 1]] = (target // CLUSTER)[labels == 1]
    history = clusters % (ITEMS // CLUSTER) * CLUSTER + torch.randint(CLUSTER, clusters.shape, generator=generator)
    lists = {"history": Jagged(history, offsets)}
    return Batch(labels.float(), torch.zeros(size, 0), target.unsqueeze(1), None, lists)


def test_attention_finds_the_one_entry_that_matters():
    """A mean of eight components over up to twenty entries cannot tell which clusters they are of."""
    test, reached = one_match(2000, torch.Generator().manual_seed(99)), {}
    for pooling in ("attention", "softmax", "mean"):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        tables = EmbeddingTables(
            plan([TableConfig("item", ITEMS, 8, ["item", "history"], "mean")], "full", optimizer=None)
        )
        model = DIN(tables, 0, pooling=pooling, attention_units=(32,), units=(32,))
        steps = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(200):
            batch = one_match(512, generator)
            steps.zero_grad()
            F.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
            steps.step()
        model.eval()
        with torch.no_grad():
            reached[pooling] = auc(test.labels.numpy(), model(test).numpy())
    assert reached["mean"] < 0.85
    assert reached["attention"] > reached["mean"] + 0.1
    assert reached["softmax"] > reached["mean"] + 0.1


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_without_histories_it_is_its_mlp():
    tables = make_tables((("user", "user"), ("item", "item")))
    model = DIN(tables, 0)
    assert model.pairs == [] and not list(model.attention)
    assert model(make_batch((("user", "user"), ("item", "item")))).shape == (6,)


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"pairs": [{"histroy": "item"}]}, "pairs names 'histroy', which is no output of the tables; they have user"),
        ({"pairs": [{"history": "itme"}]}, "pairs names 'itme'"),
        ({"pairs": [{"history": "category"}]}, "history 'history' has embedding_dim 8 and its target 'category' 4"),
        ({"pairs": [{"history": "item", "item": "history"}]}, "names 'item' both as a history and as the target"),
        ({"pairs": [{"history": "history"}]}, "names 'history' both"),
        ({"pairs": {"history": "item"}}, "pairs must be a list of mappings, history: target, not {'history'"),
        ({"pairs": "history"}, "pairs must be a list of mappings"),
        ({"pairs": [{}]}, "pairs must hold mappings"),
        ({"pairs": ["history"]}, "pairs must hold mappings, history: target, not 'history'"),
        ({"pairs": [{"history": 3}]}, "pairs must hold mappings"),
        ({"pooling": "max"}, "pooling must be one of attention, softmax, mean, not 'max'"),
        ({"attention_units": [0]}, "attention_units must hold positive integers, not 0"),
        ({"attention_activation": "tanh"}, "attention_activation must be one of relu, sigmoid, .*, not 'tanh'"),
        ({"units": [8.0]}, "units must hold positive integers, not 8.0"),
        ({"activation": "Dice"}, "activation must be one of .*, not 'Dice'"),
        ({"dropout": 1}, "dropout must lie in"),
        ({"softmax": True}, "has no hyperparameter 'softmax'; it has pairs, pooling"),
    ],
)  # fmt: skip
def test_din_refuses(hyperparameters, message):
    if "pairs" not in hyperparameters:
        with pytest.raises(ValueError, match=message):  # whether or not the data has histories
            build_model("din", make_tables((("user", "user"), ("item", "item"))), 0, hyperparameters)
    tables = make_tables(dim={"user": 8, "item": 8, "category": 4, "tags": 8})
    with pytest.raises(ValueError, match=message):
        build_model("din", tables, 0, hyperparameters)


def test_unaligned_histories():
    batch = make_batch()
    lists = batch.lists | {
        "category_history": Jagged(batch.lists["category_history"].values, offsets_of([3, 0, 1, 5, 3, 4]))
    }
    batch = batch._replace(lists=lists)
    tables = make_tables()
    message = "'history' and 'category_history' have 6 and 5 entries in row 3 .* give them a mapping each .* pairs"
    with pytest.raises(ValueError, match=message):
        DIN(tables, 0)(batch)
    apart = DIN(tables, 0, pairs=[{"history": "item"}, {"category_history": "category"}])
    assert apart(batch).isfinite().all()


def test_a_target_unseen_in_training_has_the_vector_of_its_row():
    """Id 1 is what prepared data gives an item that training has not: an id like others, with a history or without."""
    model = DIN(make_tables(), 0).eval()
    batch = make_batch()
    ids = batch.ids.clone()
    ids[:, 1] = 1
    assert model(batch._replace(ids=ids)).isfinite().all()
    assert not math.isclose(model(batch._replace(ids=ids))[0].item(), model(batch)[0].item(), rel_tol=1e-4)


def test_histories_are_looked_up_once_with_everything_else(monkeypatch):
    """One update a step: a fused optimizer sees target and history together."""
    tables = make_tables(LISTS, optimizer="sgd")
    model = DIN(tables, 0)
    gathers, gather = [], Step.gather
    monkeypatch.setattr(Step, "gather", lambda *a, **k: gathers.append(1) or gather(*a, **k))
    with ops.using("reference"):
        model(make_batch()).sum().backward()
    assert len(gathers) == 1
    if ops.instructions() is not None:
        lookups, forward = [], Library.forward
        monkeypatch.setattr(Library, "forward", lambda *a: lookups.append(1) or forward(*a))
        model(make_batch()).sum().backward()
        assert (len(lookups), len(gathers)) == (1, 1)
