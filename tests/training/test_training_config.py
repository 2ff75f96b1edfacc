"""The configuration of a run: where values come from, and what wrong ones are told."""

from __future__ import annotations

import json

import pytest
import yaml

from embtables import SGD, Adam
from embtables.training import load_config
from embtables.training.config import RunConfig, with_fields
from embtables.training.planning import fused_optimizer


def test_order_of_sources(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {batch_size: 64, epochs: 3, seed: 5}\ntables: {method: hash, budget: 10%}\nmodel:\n")
    config = load_config(
        path,
        flags={"training.epochs": 4, "training.seed": 6, "tables.optimizer": None},
        overrides=["training.seed=7", "model.hyperparameters.top_units=[8, 4]", "dense.learning_rate=1e-2"],
    )
    assert (config.training.batch_size, config.training.epochs, config.training.seed) == (64, 4, 7)
    assert (config.tables.method, config.tables.budget) == ("hash", "10%")
    assert config.model.hyperparameters == {"top_units": [8, 4]}
    assert config.dense.learning_rate == 0.01
    assert config.training.patience == RunConfig().training.patience


def test_fields_without_their_section(tmp_path, monkeypatch):
    """A published learning rate is one number; the model's hyperparameters are known by their names."""
    config = load_config(overrides=["learning_rate=0.002", "units=[7]", "name=mlp", "epochs=3", "tables.l2=0.1"])
    assert (config.tables.learning_rate, config.dense.learning_rate) == (0.002, 0.002)
    assert (config.model.name, config.model.hyperparameters) == ("mlp", {"units": [7]})
    assert config.training.epochs == 3
    # as elsewhere, the last one counts
    config = load_config(overrides=["learning_rate=0.002", "dense.learning_rate=0.01"])
    assert (config.tables.learning_rate, config.dense.learning_rate) == (0.002, 0.01)
    for overrides, units in (
        (["units=[2]", "model.hyperparameters.units=[1]"], [1]),
        (["units=[2]", "model.hyperparameters={units: [3]}"], [3]),
    ):
        assert load_config(overrides=["name=mlp", *overrides]).model.hyperparameters == {"units": units}
    # What a variant of a sweep says goes before what all of its cells share.
    config = load_config(overrides=["name=mlp", "units=[2]"], fields={"model.hyperparameters.units": [9]})
    assert config.model.hyperparameters == {"units": [9]}
    config = load_config(overrides=["units=[2]"], fields={"model.name": "mlp"})
    assert config.model.hyperparameters == {"units": [2]}
    config = load_config(preset="bars", flags={"model.name": "deepfm"}, overrides=["dropout=0.3"])
    assert config.model.hyperparameters["dropout"] == 0.3 and len(config.model.hyperparameters) > 1
    module = "import torch\nclass Own(torch.nn.Module):\n    def __init__(self, tables, num_dense, patience=1): ...\n"
    (tmp_path / "own_model_here.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    own = "name=own_model_here:Own"
    with pytest.raises(
        ValueError, match=r"'patience' is a field and a hyperparameter of model .*: write training\.patience"
    ):
        load_config(overrides=[own, "patience=7"])
    assert load_config(overrides=[own, "model.hyperparameters.patience=7"]).training.patience != 7
    path = tmp_path / "run.yaml"  # of files the form stays one
    path.write_text("batch_size: 10")
    with pytest.raises(ValueError, match=r"batch_size is not a section .*did you mean training\.batch_size\?$"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("10%", "10%"), ("64MB", "64MB"), ("67108864", 67108864), ("null", None)],
)
def test_budget_keeps_its_type(text, value):
    budget = load_config(overrides=[f"tables.budget={text}"]).tables.budget
    assert budget == value and type(budget) is type(value)


def test_methods_may_be_words_mappings_and_patterns():
    for text in ("hash", "{kind: multi_hash, num_hashes: 2}", "{'user*': hash, '*': {kind: full}}"):
        assert load_config(overrides=[f"tables.method={text}"]).tables.method == yaml.safe_load(text)


def test_resolved_configuration_reads_back_the_same(tmp_path):
    config = load_config(overrides=["tables.optimizer=adam", "tables.budget=10%", "model.hyperparameters.dropout=0.1"])
    assert config.tables.learning_rate is not None
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=0", r"^training\.batch_size: input should be greater than or equal to 1, not 0$"),
        ("training.batch_size=many", r"^training\.batch_size: .*integer.*, not 'many'$"),
        ("training.batchsize=10", r"^training\.batchsize is not a field .*did you mean training\.batch_size\?$"),
        ("training.colour=red", r"^training\.colour is not a field of the configuration: training has batch_size, "),
        (
            "batchsize=10",
            r"^there is no field 'batchsize' \(did you mean 'batch_size'\?\); as a hyperparameter of the mo",
        ),
        (
            "optimizer=rowwise_adagrad",
            r"^dense\.optimizer: .* \(optimizer alone is tables\.optimizer and dense\.optimizer",
        ),
        ("epochs=many", r"^training\.epochs: .*integer.*, not 'many'$"),
        ("tables=3", r"^tables: "),
        (
            "tables.optimizer=lamb",
            r"^tables\.optimizer: choose one of sgd, rowwise_adagrad, adagrad, adam, not 'lamb'$",
        ),
        (
            "tables.optimizer={kind: adam, beta3: 1}",
            r"^tables\.optimizer: optimizer adam has no field 'beta3'; it has ",
        ),
        ("tables.optimizer={kind: adam, beta2: 1}", r"^tables\.optimizer: adam\.beta2 must be below 1, not 1$"),
        ("tables.optimizer={beta2: 0.9}", r"^tables\.optimizer: unknown optimizer .*: choose one of sgd, "),
        ("tables.optimizer={kind: sgd, lr: 1}", r"^tables\.optimizer: set lr as tables\.learning_rate$"),
        ("tables.optimizer={kind: sgd, l2: 1}", r"^tables\.optimizer: set l2 as tables\.l2$"),
        ("tables.optimizer=3", r"^tables\.optimizer: must be an optimizer's kind, or {kind: .*, not 3$"),
        ("tables.learning_rate=-1", r"^tables\.learning_rate: .*greater than 0, not -1$"),
        ("tables.learning_rate=.inf", r"^tables\.learning_rate: .*finite number"),
        ("tables.budget=true", r"^tables\.budget: must be bytes .* or a share .*, not True$"),
        ("tables.budget=[1]", r"^tables\.budget: must be bytes .* or a share"),
        ("tables.method=3", r"^tables\.method: must be a method's kind.*, not 3$"),
        ("tables.embedding_dim=0", r"^tables\.embedding_dim: "),
        ("tables.sparse_gradients=true", r"^tables\.sparse_gradients needs tables\.fused=false"),
        ("tables.training_precision=int8", r"^tables\.training_precision: .*'fp32' or 'bf16', not 'int8'$"),
        ("training.device=tpu0", r"^training\.device: give cpu, cuda or cuda:<number>, not 'tpu0'$"),
        ("training.device=meta", r"^training\.device: give cpu, cuda or cuda:<number>, not 'meta'$"),
        ("tables.init_std=1e39", r"^tables\.init_std: "),
        ("tables.method=", r"^tables\.method: the value is empty; for none write null$"),
        ("training.patience=0", r"^training\.patience: "),
        ("training.batch_size.x=1", r"^training\.batch_size"),
        ("training.batch_size", r"^override 'training\.batch_size' is not of the form field=value"),
        ("model.hyperparameters.top_units=[1", r"^model\.hyperparameters\.top_units: the value .* not valid YAML"),
    ],
)
def test_errors_name_the_field(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config(overrides=[override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"average": 0.4}, "tables": {"fused": False}},
            r"^training\.average needs tables\.fused=true: a fused optimizer keeps the mean of its rows$",
        ),
        (
            {"training": {"quantize_from": 1, "epochs": 1}},
            r"^training\.quantize_from is 1, but training\.epochs is 1: give less, by an epoch or more$",
        ),
        (
            {"tables": {"fused": False, "sparse_gradients": True, "l2": 0.1}},
            r"^tables\.l2 is not for adam with tables\.sparse_gradients, which has no weight decay: set 0$",
        ),
    ],
)
def test_errors_of_several_fields_name_them_once(sections, message, tmp_path):
    """Whichever of a section, or of the configuration as a whole, finds them."""
    fields = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        load_config(overrides=[f"{name}={json.dumps(value)}" for name, value in fields.items()])
    with pytest.raises(ValueError, match=message):
        with_fields(load_config(), fields)
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{section}: {json.dumps(values)}\n" for section, values in sections.items()))
    with pytest.raises(ValueError, match=f"^{path}: {message[1:]}"):
        load_config(path)


def test_rowwise_adagrad_is_fused_only():
    with pytest.raises(ValueError, match="rowwise_adagrad exists fused only"):
        load_config(overrides=["tables.fused=false", "tables.optimizer=rowwise_adagrad"])


def test_rows_in_16_bits_are_fused_only():
    with pytest.raises(ValueError, match=r"^tables\.training_precision=bf16 needs tables\.fused=true"):
        load_config(overrides=["tables.fused=false", "tables.training_precision=bf16"])


def test_fields_of_the_optimizer_reach_it() -> None:
    config = load_config(overrides=["tables.optimizer={kind: adam, beta2: 0.9, clip_row_norm: 2}", "tables.l2=0.1"])
    assert fused_optimizer(config.tables) == Adam(lr=0.01, l2=0.1, beta2=0.9, clip_row_norm=2)
    assert fused_optimizer(load_config(overrides=["tables.optimizer=sgd"]).tables) == SGD(lr=1.0)
    with pytest.raises(ValueError, match=r"^tables\.optimizer with fields of its own needs tables\.fused=true"):
        load_config(overrides=["tables.fused=false", "tables.optimizer={kind: adam, beta2: 0.9}"])


def test_a_value_where_a_field_is_meant(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {batch_size: 3}")
    with pytest.raises(ValueError, match="training.batch_size holds a single value, so there is no field"):
        load_config(path, overrides=["training.batch_size.x=1"])
    path.write_text("training: [1]")
    for source in ({"flags": {"training.epochs": 3}}, {"overrides": ["epochs=3"]}, {"fields": {"training.epochs": 3}}):
        with pytest.raises(ValueError, match=f"^{path}: training holds a single value, so there is no field training"):
            load_config(path, **source)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {epochs: 0}")
    with pytest.raises(ValueError, match=r"run\.yaml: training\.epochs: "):
        load_config(path)
    path.write_text("training:\n  epochs: 1\n  seed: [1\n")
    with pytest.raises(ValueError, match=r"run\.yaml: line \d is not valid YAML"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold the sections data, model, tables, dense, training, not list"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="run.yaml is not"):
        load_config(path)
    with pytest.raises(OSError):
        load_config(tmp_path / "absent.yaml")
