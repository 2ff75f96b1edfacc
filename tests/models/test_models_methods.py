"""Every model over every way to store its tables, on batches of every kind: it trains, and it is served."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from core_cases import in_turn
from model_cases import COLUMNS, LISTS, make_batch, make_tables
from torch import nn

from embtables.models import build_model
from embtables.models.blocks import bags

MODELS = ["dlrm", "mlp", "din", "dcnv2", "deepfm", "wide_deep", "neumf", "fm"]
METHODS = ["full", "hash", "compositional", "unified", "mixed_dimension", "pruned", "robe"]
KINDS = {"columns": COLUMNS, "lists": LISTS}
OPTIMIZERS = {"robe": "sgd"}


def tables_for(method, features, optimizer="fused"):
    fused = OPTIMIZERS.get(method, "adagrad") if optimizer == "fused" else None
    return make_tables(features, 8, method, None if method == "full" else "60%", fused, std=0.1)


@pytest.mark.parametrize(("combination", "kind"), in_turn([*product(MODELS, METHODS)], list(KINDS), 1))
def test_every_model_trains_over_every_method(combination, kind):
    """Seven methods, so that each model and each method meet both kinds of batches."""
    name, method = combination
    torch.manual_seed(0)
    features = KINDS[kind]
    for num_dense in (0, 2):
        tables = tables_for(method, features)
        model = build_model(name, tables, num_dense, {})
        batch = make_batch(features, num_dense=num_dense)
        before = {table.name: tables.to_dense(table.name).clone() for table in tables.plan.tables}
        steps = torch.optim.SGD(model.parameters(), 0.05)
        losses = []
        for _ in range(4):
            steps.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(batch), batch.labels)
            loss.backward()
            steps.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for table in tables.plan.tables:
            assert not torch.equal(tables.to_dense(table.name), before[table.name]), table.name
        model.eval()
        model.embeddings = tables.serve()
        with torch.no_grad():
            served = model(batch)
        assert served.shape == (6,) and served.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name, kind):
    torch.manual_seed(0)
    tables = tables_for("full", KINDS[kind], optimizer=None)
    variants = {
        "din": [{"pooling": "softmax"}, {"pooling": "mean"}, {"activation": "prelu", "batch_norm": True}],
        "dcnv2": [{"rank": 4}, {"rank": 4, "num_experts": 3}, {"structure": "stacked"}],
        "neumf": [{"structure": "mlp"}],
    }
    for hyperparameters in [{}, *variants.get(name, [])]:
        model = build_model(name, tables, 2, hyperparameters)
        batch = make_batch(KINDS[kind], lengths=(3, 0, 5, 1, 2, 4, 3, 2) * 8, num_dense=2)
        model.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
        for parameter, value in model.named_parameters():
            assert value.grad is not None and value.grad.abs().sum() > 0, f"{parameter} with {hyperparameters}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_step_is_the_ordinary_one(name, kind):
    """Equal weights, one step of SGD, inside backward or after it: a model looks everything up once."""
    updated = []
    for optimizer in (None, "sgd"):
        torch.manual_seed(0)
        tables = make_tables(KINDS[kind], optimizer=optimizer)
        model = build_model(name, tables, 0, {})
        if optimizer:
            tables.set_learning_rate(0.1)
        steps = torch.optim.SGD(model.parameters(), 0.1)
        batch = make_batch(KINDS[kind])
        F.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
        steps.step()
        updated.append({table.name: tables.to_dense(table.name) for table in tables.plan.tables})
    for table, dense in updated[0].items():
        torch.testing.assert_close(updated[1][table], dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast(name):
    """The dense part in bfloat16 stays near float32, with histories too."""
    tables = tables_for("full", LISTS)
    batch = make_batch(num_dense=2)
    variants = [{"pooling": p} for p in ("attention", "softmax", "mean")] if name == "din" else [{}]
    for hyperparameters in variants:
        torch.manual_seed(0)
        model = build_model(name, tables, 2, hyperparameters).eval()
        with torch.no_grad():
            exact = model(batch)
            with torch.autocast("cpu", torch.bfloat16):
                rough = model(batch)
        torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)


class LookedUp(nn.Module):
    """What tables gave for one batch, in their place."""

    def __init__(self, tables, batch, unpooled):
        super().__init__()
        self.feature_names, self.output_names = tables.feature_names, tables.output_names
        self.embedding_dims = tables.embedding_dims
        inputs = bags(batch, tables.feature_names)
        self.pooled, self.found = tables(*inputs), tables.lookup(*inputs, pooling=unpooled)

    def forward(self, ids, offsets):
        return self.pooled

    def lookup(self, ids, offsets, pooling):
        return self.found


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_part_is_one_graph(name):
    tables = tables_for("full", LISTS)
    # Whether histories are aligned depends on the data, so a mapping of several breaks the graph.
    apart = {"pairs": [{"history": "item"}, {"category_history": "category"}]} if name == "din" else {}
    model = build_model(name, tables, 2, apart).eval()
    batch = make_batch(num_dense=2)
    with torch.no_grad():
        expected = model(batch)
        model.embeddings = LookedUp(tables, batch, getattr(model, "unpooled", {}))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(batch), expected)
