"""An optimizer of another package, found by its entry point: planned, trained, resumed and configured as ours are."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from core_cases import counted_bytes, random_ids
from third_party_cases import FOLDER, install
from torch import Tensor

from embtables import EmbeddingTables, Plan, TableConfig, ops, optimizers, plan
from embtables.cli.app import run as main
from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic
from embtables.optimizers import GROUP, SGD, Adam, FusedOptimizer, optimizer_from_config
from embtables.training import load_config

BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param("native", marks=pytest.mark.skipif(ops.instructions() is None, reason="no native code")),
    ],
)
TABLES = [TableConfig("user", 60, 8), TableConfig("item", 40, 8, ["item", "history"], pooling="mean")]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An environment in which another package has registered its optimizer."""
    folder = tmp_path / "site-packages"
    install(folder, "outsider", {"amsgrad": "amsgrad:AMSGrad"}, GROUP)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(optimizers, "_rules", dict(optimizers._rules))
    optimizers._third_party.cache_clear()
    yield folder
    optimizers._third_party.cache_clear()
    sys.modules.pop("amsgrad", None)


def make(method: Any = "full", **fields: float) -> EmbeddingTables:
    optimizer = {"kind": "amsgrad", "lr": 0.05, **fields}
    return EmbeddingTables(plan(TABLES, method, None if method == "full" else "50%", optimizer=optimizer), std=0.5)


def test_entry_points_are_listed_and_configured_by_their_kind() -> None:
    assert optimizers.kinds() == ["sgd", "rowwise_adagrad", "adagrad", "adam", "amsgrad"]
    config = optimizer_from_config({"kind": "amsgrad", "beta2": 0.9})
    assert config is not None and config.to_dict() == {
        **{"kind": "amsgrad", "lr": 0.01, "l2": 0.0, "clip_row_norm": 0.0},
        **{"beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "decay": 0.0},
    }
    with pytest.raises(ValueError, match="optimizer amsgrad has no field 'beta3'; it has beta1, beta2, clip_row_norm,"):
        optimizer_from_config({"kind": "amsgrad", "beta3": 0.9})
    with pytest.raises(ValueError, match="unknown optimizer 'lamb': choose one of sgd, .*, adam, amsgrad, or None"):
        optimizer_from_config("lamb")


def test_operators_know_it_before_anybody_has_named_it() -> None:
    weight, state = torch.ones(3, 2), [torch.zeros(3, 2) for _ in range(3)]
    hyper = torch.tensor([0.1, 0, 0.9, 0.999, 1e-8, 0.5], dtype=torch.float64)
    ops.update(weight, [*state, torch.tensor(1)], torch.tensor([2]), torch.ones(1, 2), hyper, "amsgrad")
    # The first step of Adam is one of lr against the sign, and half of lr · w decays.
    torch.testing.assert_close(weight, torch.tensor([[1.0, 1], [1, 1], [0.85, 0.85]]))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_optim_where_every_row_is_touched(backend: str, dtype: torch.dtype) -> None:
    tables = make(beta1=0.8, beta2=0.95, decay=0.1).to(dtype)
    weights = [tables.to_dense(t.name).requires_grad_() for t in TABLES]
    other = torch.optim.AdamW(weights, 0.05, (0.8, 0.95), 1e-8, weight_decay=0.1, amsgrad=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.arange(60), torch.arange(60) % 40, torch.arange(60) % 7], 1)
    with ops.using(backend):
        for step in range(12):
            # From large gradients to small ones, so that the greatest second moment is an old one.
            grad = torch.randn(60, 24, generator=generator, dtype=dtype) / (1 + step)
            tables(ids).backward(grad)
            other.zero_grad()
            user, item = weights
            torch.cat([user[ids[:, 0]], item[ids[:, 1]], item[ids[:, 2]]], 1).backward(grad)
            other.step()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for table, weight in zip(TABLES, weights):
        torch.testing.assert_close(tables.to_dense(table.name), weight.detach(), rtol=tolerance, atol=tolerance)


@BACKENDS
@pytest.mark.parametrize("method", ["full", "compositional", "mixed_dimension", "robe"])
def test_trained_resumed_and_counted(method: str, backend: str) -> None:
    with ops.using(backend):
        through = make(method, clip_row_norm=0.5)
        solved = through.plan
        state = [t for name, t in through.store.optimizer_state().items() if name != "hyper"]
        assert counted_bytes(through) + sum(t.numel() * t.element_size() for t in state) == solved.training_bytes
        trained = sum(t.numel() * 4 for _, t, is_code in through.store.tensors() if not is_code)
        plain = plan(TABLES, method, None if method == "full" else "50%", optimizer=SGD())
        assert solved.training_bytes == plain.training_bytes + 3 * trained + 8
        assert Plan.from_dict(solved.to_dict()) == solved

        ids = random_ids(through, 40, seed=1)
        target = torch.randn(40, 24, generator=torch.Generator().manual_seed(2)) * 0.1
        losses = []

        def train(tables: EmbeddingTables, steps: int) -> None:
            for _ in range(steps):
                loss = (tables(ids) - target).square().mean()
                losses.append(float(loss.detach()))
                loss.backward()

        train(through, 30)
        through.set_learning_rate(0.01)
        weights = {name: tensor.clone() for name, tensor in through.state_dict().items()}
        kept = through.optimizer_state_dict()
        train(through, 5)
        assert losses[-1] < 0.5 * losses[0]
        resumed = EmbeddingTables(solved, seed=9)
        resumed.load_state_dict(weights)
        resumed.load_optimizer_state_dict(kept)
        train(resumed, 5)
    for name, tensor in through.optimizer_state_dict().items():
        assert torch.equal(tensor, resumed.optimizer_state_dict()[name]), name
    for (name, one, _), (_, other, _) in zip(through.store.tensors(), resumed.store.tensors()):
        assert torch.equal(one, other), name


@pytest.mark.skipif(ops.instructions() is None, reason="no native code")
def test_native_tables_train_it_as_the_reference_does() -> None:
    tables, other = make("compositional"), make("compositional")
    for seed in range(3):
        ids = random_ids(tables, 30, seed)
        tables(ids).square().sum().backward()
        with ops.using("reference"):
            other(ids).square().sum().backward()
    for (name, one, _), (_, two, _) in zip(tables.store.tensors(), other.store.tensors()):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepare_synthetic(
        tmp_path / "toy", Synthetic(rows=2000, cardinalities=(300, 40), num_dense=1, shares=(0.6, 0.2, 0.2))
    )
    for optimizer in ("amsgrad", "{kind: amsgrad, beta2: 0.99, clip_row_norm: 1.5}"):
        assert main(["plan", str(data.path), "--method", "full", "--optimizer", optimizer, "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)["optimizer"]
        # The learning rate is the optimizer's own default.
        assert planned["kind"] == "amsgrad" and planned["lr"] == 0.01
        assert (planned["beta2"] == 0.99) == (planned["clip_row_norm"] == 1.5) == (optimizer != "amsgrad")
    out = tmp_path / "run"
    flags = ["--optimizer", optimizer, "--learning-rate", "0.02", "--epochs", "1", "--quiet", "--out", str(out)]
    assert main(["train", str(data.path), "--set", "tables.l2=1e-4", *flags]) == 0
    assert json.loads((out / "metrics.json").read_text())["status"] == "ok"
    tables = yaml.safe_load((out / "config.yaml").read_text())["tables"]
    assert tables["optimizer"] == {"kind": "amsgrad", "beta2": 0.99, "clip_row_norm": 1.5}
    assert (tables["learning_rate"], tables["l2"]) == (0.02, 1e-4)
    for override, message in (
        ("tables.optimizer=amsgrat", r"^tables\.optimizer: choose one of sgd, .*, adam, amsgrad, not 'amsgrat'$"),
        ("tables.optimizer={kind: amsgrad, lr: 1}", r"^tables\.optimizer: set lr as tables\.learning_rate$"),
        ("tables.optimizer={kind: amsgrad, x: 1}", r"^tables\.optimizer: optimizer amsgrad has no field 'x'; it has "),
        ("tables.fused=false", r"^tables\.optimizer=amsgrad exists fused only"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(overrides=["tables.optimizer=amsgrad", override])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("amsgrad:torch", "entry point 'bad' of embtables.optimizers is amsgrad:torch, which is not a FusedOptimizer"),
        ("embtables.optimizers:FusedOptimizer", "FusedOptimizer, which is not a FusedOptimizer class with a kind"),
        (
            "embtables.optimizers:Adam",
            "entry point 'bad' of embtables.optimizers names its optimizer 'adam', which exi",
        ),
    ],
)
def test_a_bad_entry_point_is_named(site: Path, value: str, message: str) -> None:
    install(site, "broken", {"bad": value}, GROUP)
    with pytest.raises(ValueError, match=message):
        optimizers.kinds()


def test_a_kind_that_is_taken_is_refused_where_the_class_is_defined() -> None:
    with pytest.raises(
        ValueError, match=r"Mine has the kind 'adam', which is that of embtables\.optimizers\.Adam: give"
    ):

        class Mine(Adam):
            pass

    for _ in range(2):  # a cell of a notebook, twice

        @dataclasses.dataclass(frozen=True, slots=True)
        class Again(SGD):
            kind: ClassVar[str] = "again"

        assert optimizers.rule_of("again") is Again
    with pytest.raises(ValueError, match="unknown optimizer 'nobody': those that are known are sgd, "):
        optimizers.rule_of("nobody")


def returning(name: str, result: Any) -> type[FusedOptimizer]:
    """A rule of this kind whose update returns the result, whatever it is given."""

    @dataclasses.dataclass(frozen=True)
    class Wrong(FusedOptimizer):
        kind: ClassVar[str] = name

        @staticmethod
        def update(
            grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
        ) -> tuple[Tensor, Sequence[Tensor]]:
            return result  # type: ignore[no-any-return]

    return Wrong


@pytest.mark.parametrize(
    ("change", "states", "message"),
    [
        ((4,), [(2, 4)], r"the update of the optimizer wrong gives .* \[\[4\], \[2, 4\]\], not \[\[2, 4\], \[2, 4\]\]"),
        ((2, 4), [(2, 1)], r"\[\[2, 4\], \[2, 1\]\], not"),
        ((2, 4), [], r"\[\[2, 4\]\], not"),
    ],
)
def test_an_update_of_other_shapes_changes_nothing(
    change: tuple[int, ...], states: list[tuple[int, ...]], message: str
) -> None:
    wrong = returning("wrong", (torch.ones(change), [torch.ones(shape) for shape in states]))
    weight, state = torch.zeros(3, 4), torch.zeros(3, 4)
    hyper = torch.tensor(wrong().hyper_values(), dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        ops.update(weight, [state], torch.tensor([0, 2]), torch.ones(2, 4), hyper, "wrong")
    assert not weight.any() and not state.any()


@pytest.mark.parametrize(
    "returned", [None, torch.ones(2, 4), (torch.ones(2, 4),), (torch.ones(2, 4), torch.ones(2, 4))]
)
def test_an_update_that_returns_something_else_is_named_and_changes_nothing(returned: Any) -> None:
    odd = returning("odd", returned)
    weight, hyper = torch.zeros(3, 4), torch.tensor(odd().hyper_values(), dtype=torch.float64)
    with pytest.raises(
        TypeError, match="the update of the optimizer odd must return what is subtracted and a sequence"
    ):
        ops.update(weight, [], torch.tensor([0, 2]), torch.ones(2, 4), hyper, "odd")
    assert not weight.any()
