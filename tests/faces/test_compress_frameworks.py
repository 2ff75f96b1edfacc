"""compress_ inside other frameworks' models, which train with the framework's own ``fit``: the examples' models."""

from __future__ import annotations

import importlib
import importlib.util
import os
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtables import Compression, Embedding, EmbeddingTables, compress_

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str, *packages: str) -> ModuleType:
    """An example as a module; skips where a package that it needs is missing or broken."""
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, OSError) as error:
            pytest.skip(f"{package} cannot be imported here ({error}); docs/compress.md says how it is installed")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Framework:
    """A framework's model: how it is made, trained by its own loop, and asked."""

    optimizer: tuple[torch.optim.Optimizer, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.model = self.build(str(folder))

    def build(self, folder: str) -> nn.Module:
        raise NotImplementedError

    def fit(self) -> None:
        raise NotImplementedError

    def predict(self) -> np.ndarray[Any, Any]:
        raise NotImplementedError


class FuxiCTR(Framework):
    name: str

    def build(self, folder: str) -> Any:
        self.example = example("compress_fuxictr", "fuxictr.pytorch.models", "model_zoo.LongCTR.DIN")
        self.folder = folder
        return self.example.build(self.name, folder)

    def fit(self) -> None:
        batches = self.example.batches
        # Two epochs, of which FuxiCTR keeps the better one by saving and loading a checkpoint.
        self.model.fit(batches(self.name, 8), epochs=2, validation_data=batches(self.name, 2, seed=1))
        assert os.path.exists(self.model.checkpoint)

    def predict(self) -> Any:
        return self.model.predict(self.example.batches(self.name, 2, seed=2))


class FuxiDIN(FuxiCTR):
    name = "DIN"


class FuxiDeepFM(FuxiCTR):
    name = "DeepFM"


class DeepCTR(Framework):
    def build(self, folder: str) -> Any:
        self.example = example("compress_deepctr", "deepctr_torch.models")
        return self.example.build()

    def fit(self) -> None:
        torch.manual_seed(0)  # the loader's shuffling
        self.model.fit(*self.example.data(2_000), batch_size=250, epochs=2, verbose=0)

    def predict(self) -> Any:
        return self.model.predict(self.example.data(500, seed=2)[0])


class TorchrecDLRM(Framework):
    def build(self, folder: str) -> Any:
        self.example = example("compress_torchrec", "torchrec.models.dlrm")
        model = self.example.build()
        self.optimizer = (torch.optim.Adam(model.parameters(), lr=0.01),)
        return model

    def fit(self) -> None:
        for _ in range(2):
            self.example.train(self.model, self.optimizer[0], self.example.batches(8))

    def predict(self) -> Any:
        with torch.no_grad():
            return torch.cat([self.model(dense, ids) for dense, ids, _ in self.example.batches(2, seed=2)]).numpy()


FRAMEWORKS = pytest.mark.parametrize("framework", [FuxiDIN, FuxiDeepFM, DeepCTR, TorchrecDLRM])


def old_tables(model: nn.Module) -> list[weakref.ref[Tensor]]:
    found = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    assert len(found) >= 3
    return found  # type: ignore[return-value]


def new_tables(model: nn.Module) -> dict[str, Tensor]:
    """Every logical table, by its name in the model."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            found[name] = module.to_dense().clone()
        elif isinstance(module, EmbeddingTables) and len(module.plan.tables) > 1 and not name.endswith("embedding"):
            found |= {f"{name}.{t.name}": module.to_dense(t.name).clone() for t in module.plan.tables}
    return found


@FRAMEWORKS
@pytest.mark.parametrize(
    ("method", "budget", "optimizer"),
    [("hash", "20%", None), ("compositional", "25%", None), ({"*user*": "full", "*": "hash"}, "60%", "adagrad")],
    ids=str,
)
def test_every_table_trains_under_one_budget(
    framework: type[Framework], method: Any, budget: str, optimizer: str | None, tmp_path: Path
) -> None:
    work = framework(tmp_path)
    old = old_tables(work.model)
    report: Compression = compress_(work.model, method, budget, optimizer=optimizer, rebind=work.optimizer)
    assert [ref() for ref in old] == [None] * len(old) and report.not_freed == []
    assert len(report.tables) == len(old) and report.left_alone == {}
    assert report.bytes_after <= float(budget[:-1]) / 100 * report.bytes_before
    before = new_tables(work.model)
    assert len(before) == len(old)
    work.fit()
    after = new_tables(work.model)
    for name, table in before.items():
        assert not torch.equal(table, after[name]), f"{name} did not train"
    assert np.isfinite(work.predict()).all()


@FRAMEWORKS
def test_group_methods_share_storage_and_train(framework: type[Framework], tmp_path: Path) -> None:
    work = framework(tmp_path)
    # First-order tables have one column, and cannot share rows with the others.
    wide = {"*lr_layer*": "full", "*linear_model*": "full"}
    present = {p: m for p, m in wide.items() if any(p.strip("*") in name for name, _ in work.model.named_modules())}
    report = compress_(work.model, present | {"*": "unified"}, "40%", rebind=work.optimizer)
    assert report.shared_bytes and report.not_freed == []
    before = new_tables(work.model)
    work.fit()
    for name, table in new_tables(work.model).items():
        assert not torch.equal(table, before[name]), name


@FRAMEWORKS
def test_full_loses_nothing(framework: type[Framework], tmp_path: Path) -> None:
    """The same predictions after the swap, and after training the same as the untouched model's."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    untouched, swapped = framework(tmp_path / "a"), framework(tmp_path / "b")
    expected = swapped.predict()
    np.testing.assert_array_equal(expected, untouched.predict())
    report = compress_(swapped.model, "full", rebind=swapped.optimizer)
    assert report.anew == [] and report.not_freed == []
    np.testing.assert_allclose(swapped.predict(), expected, rtol=1e-6)
    untouched.fit()
    swapped.fit()
    assert np.abs(untouched.predict() - expected).max() > 1e-3
    np.testing.assert_allclose(swapped.predict(), untouched.predict(), rtol=1e-4, atol=1e-5)


def test_deepctr_regularization_acts_on_the_new_tables(tmp_path: Path) -> None:
    work = DeepCTR(tmp_path)
    report = compress_(work.model, "hash", "20%")
    regularized = [w for weights, _, _ in work.model.regularization_weight for w in weights]
    new = {id(p) for m in work.model.modules() if isinstance(m, Embedding) for p in m.parameters()}
    assert new <= {id(w[1] if isinstance(w, tuple) else w) for w in regularized}
    assert len(new) == len(report.tables) == 6
    work.model.get_regularization_loss().backward()
    for module in work.model.modules():
        if isinstance(module, Embedding):
            (parameter,) = module.parameters()
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, 2e-4 * parameter.detach())


def test_torchrec_collections() -> None:
    """Names, keys, pooling and state-dict keys stay those of the stock collections."""
    example("compress_torchrec", "torchrec.modules.embedding_modules")
    from torchrec import (
        EmbeddingBagCollection,
        EmbeddingBagConfig,
        EmbeddingCollection,
        EmbeddingConfig,
        KeyedJaggedTensor,
        PoolingType,
    )

    import embtables.torchrec as ours

    bags = [
        EmbeddingBagConfig(name="a", num_embeddings=100, embedding_dim=4, feature_names=["f", "g"]),
        EmbeddingBagConfig(name="b", num_embeddings=50, embedding_dim=8, feature_names=["f"], pooling=PoolingType.MEAN),
    ]
    sequences = [EmbeddingConfig(name="a", num_embeddings=80, embedding_dim=4, feature_names=["h"])]
    model = nn.ModuleDict({
        "wide": EmbeddingBagCollection(tables=bags),
        "deep": EmbeddingCollection(tables=sequences, need_indices=True),
        "plain": nn.Embedding(60, 4),
    })  # fmt: skip
    features = KeyedJaggedTensor.from_lengths_sync(
        ["f", "g", "h"], torch.tensor([1, 2, 3, 4, 5]), torch.tensor([2, 0, 1, 1, 1, 0]), torch.rand(5)
    )
    expected = model["wide"](features), model["deep"](features)
    keys = set(model["wide"].state_dict())
    report = compress_(model, "full")
    assert [t.name for t in report.tables] == ["wide.a", "wide.b", "deep.a", "plain"] and len(report.kept) == 4
    assert isinstance(model["wide"], ours.EmbeddingBagCollection) and not model["wide"].is_weighted()
    assert isinstance(model["deep"], ours.EmbeddingCollection) and model["deep"].need_indices()
    found = model["wide"](features), model["deep"](features)
    assert found[0].keys() == expected[0].keys() == ["f@a", "g", "f@b"]
    torch.testing.assert_close(found[0].values(), expected[0].values())
    torch.testing.assert_close(found[1]["h"].values(), expected[1]["h"].values())
    assert set(model["wide"].state_dict()) == keys
    # Group methods share within a collection, and the budget is for all.
    shared = nn.ModuleDict({
        "wide": EmbeddingBagCollection(tables=bags),
        "deep": EmbeddingCollection(tables=sequences),
        "plain": nn.Embedding(60, 4),
    })  # fmt: skip
    report = compress_(shared, "robe", "50%")
    assert report.bytes_after <= 0.5 * report.bytes_before
    held = [m for m in shared.modules() if isinstance(m, EmbeddingTables)]
    assert sorted(len(t.plan.tables) for t in held) == [1, 1, 2]
    assert sum(t.memory().inference_bytes for t in held) == report.bytes_after
    with pytest.raises(ValueError, match=r"matches table 'wide.b'.*swapped as a whole: add a pattern"):
        compress_(nn.ModuleDict({"wide": EmbeddingBagCollection(tables=bags)}), {"wide.a": "hash"}, 0.5)
    with pytest.raises(ValueError, match="itself a EmbeddingBagCollection"):
        compress_(EmbeddingBagCollection(tables=bags), "hash", 0.5)
    frozen = nn.ModuleDict({"wide": EmbeddingBagCollection(tables=bags), "plain": nn.Embedding(60, 4)})
    frozen["wide"].requires_grad_(False)
    assert "table 'a': its weight is frozen" in compress_(frozen, "hash", 0.5).left_alone["wide"]
