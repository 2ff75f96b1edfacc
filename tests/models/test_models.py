"""Models against their formulas written out in numpy, and their parameters counted by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from embtables.datasets import Batch
from embtables.models import DLRM, MLP, build_model, find_model
from embtables.models.dlrm import _PairwiseDots


class FakeTables(nn.Module):
    """Tables of the face that models use, one weight matrix a feature."""

    def __init__(self, rows, dims):
        super().__init__()
        self.feature_names = self.output_names = [f"f{i}" for i in range(len(dims))]
        self.embedding_dims = dims
        self.weights = [torch.randn(n, d, generator=torch.Generator().manual_seed(d + n)) for n, d in zip(rows, dims)]

    def forward(self, ids, offsets=None):
        assert offsets is None
        return torch.cat([weight[ids[:, i]] for i, weight in enumerate(self.weights)], dim=1)


def batch_of(rows, num_dense, size=6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(n, (size,), generator=generator) for n in rows], dim=1)
    return Batch(torch.zeros(size), torch.randn(size, num_dense, generator=generator), ids, None)


def layers_of(module):
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in module.modules() if isinstance(m, nn.Linear)]


def relu_layers(x, layers):
    for weight, bias in layers:
        x = np.maximum(weight @ x + bias, 0)
    return x


@pytest.mark.parametrize("num_dense", [0, 3])
def test_dlrm_is_its_formula(num_dense):
    rows = [5, 7, 4]
    tables = FakeTables(rows, [4, 4, 4])
    model = DLRM(tables, num_dense, bottom_units=(6,), top_units=(8, 5))
    batch = batch_of(rows, num_dense)
    logits = model(batch)
    assert logits.shape == (6,)
    for b in range(6):
        vectors = [tables.weights[f][batch.ids[b, f]].numpy() for f in range(3)]
        features = []
        if num_dense:
            x = relu_layers(batch.dense[b].numpy(), layers_of(model.bottom))
            vectors.insert(0, x)
            features += list(x)
        for i in range(len(vectors)):
            for j in range(i):
                features.append(float(np.dot(vectors[i], vectors[j])))
        hidden = relu_layers(np.array(features, dtype=np.float32), layers_of(model.top))
        ((weight, bias),) = layers_of(model.output)
        assert logits[b].item() == pytest.approx((weight @ hidden + bias).item(), rel=1e-4, abs=1e-5)


def test_mlp_is_its_formula_with_unequal_dims():
    rows = [5, 7]
    tables = FakeTables(rows, [4, 2])
    for num_dense in (0, 3):
        model = MLP(tables, num_dense, units=(8, 5))
        batch = batch_of(rows, num_dense)
        logits = model(batch)
        for b in range(6):
            vectors = [tables.weights[f][batch.ids[b, f]].numpy() for f in range(2)]
            hidden = relu_layers(np.concatenate([*vectors, batch.dense[b].numpy()]), layers_of(model.hidden))
            ((weight, bias),) = layers_of(model.output)
            assert logits[b].item() == pytest.approx((weight @ hidden + bias).item(), rel=1e-4, abs=1e-5)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    tables = FakeTables([9] * 3, [16] * 3)
    # No dense features: 3 pairs -> 128 -> 64 -> 1.
    assert count(DLRM(tables, 0)) == (3 * 128 + 128) + (128 * 64 + 64) + (64 + 1)
    # 13 dense -> 64 -> 32 -> 16; 6 pairs and 16 -> 128 -> 64 -> 1.
    bottom = (13 * 64 + 64) + (64 * 32 + 32) + (32 * 16 + 16)
    assert count(DLRM(tables, 13)) == bottom + (22 * 128 + 128) + (128 * 64 + 64) + (64 + 1)
    # 48 and 13 inputs -> 128 -> 64 -> 1.
    assert count(MLP(tables, 13)) == (61 * 128 + 128) + (128 * 64 + 64) + (64 + 1)


def test_dropout_acts_in_training_only():
    model = MLP(FakeTables([5], [4]), 0, dropout=0.5)
    batch = batch_of([5], 0)
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize("num_dense", [0, 3])
def test_dlrm_that_concatenates_is_its_formula(num_dense):
    rows = [5, 7, 4]
    tables = FakeTables(rows, [4, 4, 4])
    model = DLRM(tables, num_dense, bottom_units=(6,), top_units=(8, 5), interaction="cat")
    batch = batch_of(rows, num_dense)
    logits = model(batch)
    for b in range(6):
        vectors = [tables.weights[f][batch.ids[b, f]].numpy() for f in range(3)]
        if num_dense:
            vectors.insert(0, relu_layers(batch.dense[b].numpy(), layers_of(model.bottom)))
        hidden = relu_layers(np.concatenate(vectors), layers_of(model.top))
        ((weight, bias),) = layers_of(model.output)
        assert float(logits[b]) == pytest.approx((weight @ hidden + bias).item(), abs=1e-5)
    normalized = DLRM(tables, num_dense, top_units=(8, 5), interaction="cat", batch_norm=True)
    assert sum(isinstance(module, nn.BatchNorm1d) for module in normalized.top.modules()) == 2


def test_dlrm_refuses():
    with pytest.raises(ValueError, match="interaction"):
        DLRM(FakeTables([5, 5], [4, 4]), 0, interaction="sum")
    with pytest.raises(ValueError, match="f0=4, f1=2"):
        DLRM(FakeTables([5, 5], [4, 2]), 0)
    with pytest.raises(ValueError, match="two vectors"):
        DLRM(FakeTables([5], [4]), 0)
    with pytest.raises(ValueError, match="top_units must hold positive integers, not 0"):
        DLRM(FakeTables([5, 5], [4, 4]), 0, top_units=[0])
    with pytest.raises(ValueError, match="dropout"):
        DLRM(FakeTables([5, 5], [4, 4]), 0, dropout=1.0)
    DLRM(FakeTables([5], [4]), 1)


def test_find_model(tmp_path, monkeypatch):
    (tmp_path / "my_own_model.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, embeddings, num_dense_features, *, width=3):\n"
        "        super().__init__()\n"
        "        self.embeddings, self.width = embeddings, width\n"
        "class Forgets(nn.Module):\n"
        "    def __init__(self, embeddings, num_dense_features):\n"
        "        super().__init__()\n"
        "number = 3\n"
    )
    (tmp_path / "fails_itself.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    assert find_model("dlrm") is DLRM and find_model("mlp") is MLP
    with pytest.raises(ValueError, match="cannot import 'my_own_model' .*the working directory is searched for what"):
        find_model("my_own_model:Mine")
    assert find_model("my_own_model:Mine", beside=tmp_path).__name__ == "Mine"
    assert str(tmp_path) not in sys.path
    tables = FakeTables([5, 5], [4, 4])
    assert build_model("my_own_model:Mine", tables, 0, {"width": 7}).width == 7
    for name, message in [
        (
            "dlmr",
            "model 'dlmr' is unknown: give dlrm, mlp, din, dcnv2, deepfm, wide_deep, neumf, fm, lr or package.mod",
        ),
        ("nowhere:Model", "cannot import 'nowhere'"),
        ("..:x", r"model '\.\.:x' is unknown"),
        ("my_own_model:", "model 'my_own_model:' is unknown"),
        ("fails_itself:Model", "'fails_itself' fails: ZeroDivisionError"),
        ("my_own_model:Yours", "has no 'Yours'"),
        ("my_own_model:number", "not a subclass"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_model(name, beside=tmp_path)
    with pytest.raises(ValueError, match=r"no hyperparameter 'widht' \(did you mean 'width'\?\); it has width"):
        build_model("my_own_model:Mine", tables, 0, {"widht": 7})
    with pytest.raises(ValueError, match=r"has no hyperparameter 'units' \(.*\); it has bottom_units, top_units"):
        build_model("dlrm", tables, 0, {"units": [3]})
    with pytest.raises(ValueError, match="must keep the tables"):
        build_model("my_own_model:Forgets", tables, 0, {})


def test_gradients_of_dot_products() -> None:
    """Against finite differences, and in float32 vectors under bfloat16 autocast."""
    vectors = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.tril_indices(4, 4, offset=-1)
    pairs = rows * 4 + columns
    torch.autograd.gradcheck(lambda v: _PairwiseDots.apply(v, pairs), (vectors,))
    torch.autograd.gradcheck(lambda v: _PairwiseDots.apply(v, pairs[[3, 0]]), (vectors,))
    wanted = torch.stack([vectors[:, i] @ vectors[:, j].T for i, j in zip(rows, columns)]).diagonal(dim1=1, dim2=2).T
    torch.testing.assert_close(_PairwiseDots.apply(vectors, pairs), wanted)
    half = vectors.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        _PairwiseDots.apply(half, pairs).float().square().sum().backward()
    wanted.square().sum().backward()
    assert half.grad is not None and vectors.grad is not None
    torch.testing.assert_close(half.grad, vectors.grad.float(), rtol=0.05, atol=0.3)
