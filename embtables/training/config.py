"""The configuration of one run: YAML, overridden field by field, checked with errors that name the field."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from embtables._util.files import check_seal
from embtables._util.names import did_you_mean
from embtables._util.reading import NotYaml, inside, parse_yaml, read_yaml
from embtables.formats import row_format
from embtables.models import find_model
from embtables.models.registry import hyperparameters_of
from embtables.optimizers import kinds, optimizer_from_config
from embtables.training.initialization import INITIALIZATIONS
from embtables.training.loggers import logger_kinds
from embtables.training.presets import preset_named

__all__ = [
    "DataConfig",
    "DenseConfig",
    "ModelConfig",
    "RunConfig",
    "TablesConfig",
    "TrainingConfig",
    "load_config",
    "parse_value",
    "with_fields",
]


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a flag")
    return value


def _several(value: Any) -> Any:
    """One word where several may stand."""
    return [value] if isinstance(value, str) else value


Bytes = StrictInt | StrictFloat | StrictStr


def _whole(value: Any) -> Any:
    """A whole number is written without a point; ``ValueError`` for one that no number with a point could be."""
    if isinstance(value, int) and value > 2**53:
        raise ValueError("that is more than 2**53")
    return int(value) if isinstance(value, float) and value.is_integer() else value


Rate = Annotated[float, BeforeValidator(_no_flag), Field(ge=0, allow_inf_nan=False)]

TORCH_OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
"""The optimizers of ordinary parameters."""


class _Section(BaseModel):
    # Errors of a section as a whole, or of the configuration, name the fields in full.
    model_config = ConfigDict(extra="forbid", validate_default=True)


class DataConfig(_Section):
    """What of the prepared data is read."""

    leave_out: list[StrictStr] = Field(default_factory=list, description="features and histories that are not read")
    max_history: int | None = Field(default=None, ge=1, description="latest items kept of a history; null: all")


class ModelConfig(_Section):
    """What is trained over the tables."""

    name: str = Field(
        default="dlrm", description="dlrm, mlp, din, dcnv2, deepfm, wide_deep, neumf, fm, lr or package.module:Class"
    )
    hyperparameters: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of its constructor")
    initialization: str | None = Field(
        default=None,
        description=f"of all linear layers, with biases of 0: {', '.join(INITIALIZATIONS)}; null: the model's own",
    )

    @field_validator("initialization")
    @classmethod
    def _known_initialization(cls, name: str | None) -> str | None:
        if name is not None and name not in INITIALIZATIONS:
            raise ValueError(f"choose one of {', '.join(INITIALIZATIONS)}")
        return name


class TablesConfig(_Section):
    """How the tables are stored and trained."""

    method: StrictStr | dict[str, Any] = Field(
        default="full", description="a kind, {kind: …, options}, or {table-name pattern: either of these}"
    )
    budget: Bytes | None = Field(default=None, description='inference bytes: 67108864, "64MB", 0.1, "10%"')
    training_budget: Bytes | None = Field(default=None, description="bound on the training bytes as well")
    precision: StrictStr = Field(
        default="fp32",
        description="of the served rows, where the method does not say it: fp32, fp16, bf16, int8, int4, int2, binary, "
        "binary2, binary4; int4/64 or int4/slab: rows that have a scale in common",
    )
    training_precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="what rows are stored in while they are trained; bf16: half of their bytes, rounded stochastically",
    )
    embedding_dim: int = Field(default=16, ge=1)
    optimizer: StrictStr | dict[str, Any] = Field(
        default="adam", description="a kind, or with fields of its own {kind: adam, beta2: 0.99}"
    )
    learning_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="null: the optimizer's own"
    )
    l2: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight decay: fused, of the touched rows; with fused: false, of whole tables",
    )
    regularization: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="mini-batch-aware L2: a row that a batch reads gets regularization / frequency of its ids × row",
    )
    fused: bool = Field(
        default=True, description="update inside backward; false: ordinary parameters under torch.optim"
    )
    sparse_gradients: bool = Field(default=False, description="with fused: false, sparse instead of dense gradients")
    init_std: float | None = Field(default=None, gt=0, le=1e6, description="null: the tables' own default")
    hash_seed: int | None = Field(default=None, description="null: the seed of the run")

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, precision: str) -> str:
        return row_format(precision).name

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, optimizer: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(optimizer, str):
            if optimizer not in kinds():
                raise ValueError(f"choose one of {', '.join(kinds())}")
            return optimizer
        for name, field in (("lr", "learning_rate"), ("l2", "l2")):
            if name in optimizer:
                raise ValueError(f"set {name} as tables.{field}")
        optimizer_from_config(optimizer)
        return optimizer

    @model_validator(mode="after")
    def _rounds_what_is_fused(self) -> TablesConfig:
        if self.training_precision != "fp32" and not self.fused:
            raise ValueError(
                "tables.training_precision=bf16 needs tables.fused=true: fused updates round stochastically"
            )
        return self

    @property
    def optimizer_kind(self) -> str:
        return self.optimizer if isinstance(self.optimizer, str) else str(self.optimizer["kind"])

    @model_validator(mode="after")
    def _resolve(self) -> TablesConfig:
        kind = self.optimizer_kind
        if not self.fused and kind not in TORCH_OPTIMIZERS:
            raise ValueError(f"tables.optimizer={kind} exists fused only: choose another, or tables.fused=true")
        if not self.fused and isinstance(self.optimizer, dict):
            raise ValueError(
                "tables.optimizer with fields of its own needs tables.fused=true; without, give its kind alone"
            )
        if self.fused and self.sparse_gradients:
            raise ValueError(
                "tables.sparse_gradients needs tables.fused=false: a fused optimizer makes no gradient at all"
            )
        if self.sparse_gradients and kind == "adam" and self.l2:
            raise ValueError("tables.l2 is not for adam with tables.sparse_gradients, which has no weight decay: set 0")
        if self.learning_rate is None:
            rule = optimizer_from_config(self.optimizer)
            assert rule is not None  # as the field was checked
            self.learning_rate = rule.lr
        return self


class DenseConfig(_Section):
    """How everything but the tables is trained."""

    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: float = Field(default=0.001, gt=0, allow_inf_nan=False)
    weight_decay: Rate | dict[StrictStr, Rate] = Field(
        default=0.0,
        description='added to the gradient; or by name, {"crosses.*": 1e-4}',
    )


#: Fields of the training by which it depends on the form that is served.
AS_SERVED = ("quantize_from", "plateau_factor")


class TrainingConfig(_Section):
    """How long and on what the model is trained, what chooses the best state of it, and when the training stops."""

    batch_size: int = Field(default=2048, ge=1)
    evaluation_batch_size: int = Field(default=16384, ge=1)
    epochs: Annotated[int | float, BeforeValidator(_whole)] = Field(
        default=10, gt=0, allow_inf_nan=False, description="at most; 0.5 is half of the training rows, once"
    )
    evaluations_per_epoch: float = Field(
        default=1, gt=0, allow_inf_nan=False, description="may be a fraction: 0.5 is every other epoch"
    )
    monitor: Literal["auc", "gauc_weighted", "gauc_mean", "logloss"] = Field(
        default="auc", description="validation metric that chooses the best model, stops, and lowers the learning rate"
    )
    patience: int | None = Field(
        default=2,
        ge=1,
        description="evaluations without a better monitor before the stop; null: never stop early",
    )
    plateau_factor: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="both learning rates × this at each evaluation without a better monitor; null: they stay",
    )
    min_learning_rate: float = Field(
        default=1e-6, ge=0, allow_inf_nan=False, description="plateau_factor lowers no learning rate below this"
    )
    average: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="horizon, in epochs, of a running mean of all weights, which is evaluated, kept and served; "
        "null: the weights themselves",
    )
    quantize_from: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="epoch from which on training computes with rows rounded as they are served; what was best before "
        "does not count then; null: rows are rounded when they are served",
    )
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="bound on the global norm of the gradients of ordinary parameters; fused tables have none",
    )
    autocast: Literal["bf16"] | None = Field(
        default=None, description="bf16: the dense part trains in bfloat16; tables, loss and evaluation stay fp32"
    )
    compile: bool = Field(
        default=False, description="torch.compile of all but the tables; needs a C++ compiler, pays in long runs"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of initialization, hashing and the order of examples")
    threads: int | None = Field(default=None, ge=1, description="null: torch's own choice")
    device: str = "cpu"
    log_every: int = Field(default=50, ge=1, description="steps between TensorBoard entries")
    log_to: Annotated[list[StrictStr], BeforeValidator(_several)] = Field(
        default_factory=list, description="loggers beside TensorBoard: mlflow, wandb or one of another package"
    )
    checkpoint_seconds: float = Field(
        default=60.0, ge=0, description="a checkpoint is written at every evaluation and after as many seconds"
    )
    keep_checkpoint: bool = Field(default=True, description="false: delete the checkpoint when the run is finished")

    @model_validator(mode="after")
    def _quantizes_before_the_end(self) -> TrainingConfig:
        if self.quantize_from is not None and self.quantize_from >= self.epochs:
            raise ValueError(
                f"training.quantize_from is {self.quantize_from:g}, but training.epochs is {self.epochs:g}: give less, "
                "by an epoch or more"
            )
        return self

    @field_validator("threads")
    @classmethod
    def _threads_that_can_be_had(cls, threads: int | None) -> int | None:
        return threads if threads is None else check_threads(threads)

    @field_validator("log_to")
    @classmethod
    def _known_loggers(cls, kinds: list[str]) -> list[str]:
        known = logger_kinds() if kinds else {}
        if not known.keys() >= set(kinds):
            raise ValueError(f"choose of {', '.join(known)}")
        return list(dict.fromkeys(kinds))

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        try:
            kind = torch.device(device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise ValueError("give cpu, cuda or cuda:<number>")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device on this machine")
        return device


def check_threads(number: int) -> int:
    """The number, where so many threads can be had.

    Raises:
        ValueError: where the system would end the process for it.
    """
    most = max(256, 4 * (os.cpu_count() or 1))
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
        raise ValueError(f"give a number from 1 to {most}")
    return number


class RunConfig(_Section):
    """All fields of one run. The path of the data is not among them: a configuration runs on any prepared data."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    tables: TablesConfig = Field(default_factory=TablesConfig)
    dense: DenseConfig = Field(default_factory=DenseConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @model_validator(mode="after")
    def _averages_what_is_fused(self) -> RunConfig:
        if self.training.average is not None and not self.tables.fused:
            raise ValueError("training.average needs tables.fused=true: a fused optimizer keeps the mean of its rows")
        return self

    def to_yaml(self) -> str:
        """All fields, resolved, as ``load_config`` reads them from a file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """``{"training.batch_size": 2048, …}``; ``method``, ``optimizer`` and ``hyperparameters`` stay whole."""
        return {
            f"{s}.{name}": value for s, fields in self.model_dump(mode="json").items() for name, value in fields.items()
        }


def config_of(run: Path) -> tuple[RunConfig, str]:
    """The configuration of a run's folder, and the checksum of the manifest of its data.

    Raises:
        ValueError: the folder has no configuration of a run, or it is damaged.
        OSError: it cannot be read.
    """
    path = run / "config.yaml"
    try:
        content = read_yaml(inside(run, path.name))
        check_seal(content, path)
        config = RunConfig.model_validate({name: content[name] for name in RunConfig.model_fields})
        return config, str(content["data_sha256"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not the configuration of a run") from None


def load_config(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Defaults, overridden by the preset, by the file, by ``flags``, ``overrides`` and ``fields``, in this order.

    Args:
        preset: a name of ``embtables.training.presets``; of its hyperparameters those count that the model has.
        path: a YAML file with any of the sections ``data``, ``model``, ``tables``, ``dense``, ``training``.
        flags: ``{"training.batch_size": 4096}``; entries that are ``None`` were not given.
        overrides: ``"training.batch_size=4096"``; the value is read as YAML. A field may stand without its section, and
            is set in every section that has it: ``"learning_rate=0.001"`` is that of the tables and of the rest. What
            is in no section is a hyperparameter of the model: ``"units=[64, 32]"``. As elsewhere, the last one counts.
        fields: ``{"training.batch_size": 4096}``; ``None`` is a value here.

    A model of one's own that ``flags``, ``overrides`` or ``fields`` name is imported, from the working directory too.

    Raises:
        ValueError: one sentence that names the file or the field.
        OSError: the file cannot be read.
    """
    chosen = None if preset is None else preset_named(preset)
    where = "" if path is None else f"{path}: "
    values: dict[str, Any] = {}
    for name, value in chosen.fields.items() if chosen is not None else []:
        _put(values, name, value)
    if path is not None:
        _merge(values, _read(Path(path)))
    for name, value in (flags or {}).items():
        if value is not None:
            _put(values, name, value, where)
    asked = [name for name, value in (flags or {}).items() if value is not None]
    without_section: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"override {override!r} is not of the form field=value, such as training.batch_size=4096")
        value = parse_value(text, name)
        places = [name]
        if "." not in name and name not in RunConfig.model_fields:
            without_section.append(name)
            places = homes(name) or [f"model.hyperparameters.{name}"]
        for place in places:
            _put(values, place, value, where)
        asked += places
    asked += list(fields or {})
    for name, value in (fields or {}).items():
        _put(values, name, value, where)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(where + _sentence(error, without_section)) from None
    if "model.name" in asked:
        # Whoever writes a name into this call may have the module in the working directory; a file may not.
        find_model(config.model.name, beside=Path.cwd())
    if chosen is not None:
        model = config.model
        model.hyperparameters = {**chosen.hyperparameters_for(model.name), **model.hyperparameters}
    _check_names(without_section, config.model.name)
    return config


def with_fields(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values in some of its fields: ``{"tables.precision": "int8"}``.

    Raises:
        ValueError: one sentence that names the field.
    """
    values = config.model_dump()
    for name, value in fields.items():
        _put(values, name, value)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None


def homes(name: str) -> list[str]:
    """The fields ``section.name`` of all sections that have a field of this name."""
    return [
        f"{section}.{name}" for section, field in RunConfig.model_fields.items() if name in _fields(field.annotation)
    ]


def _check_names(names: Sequence[str], model: str) -> None:
    """``ValueError`` for a name without a section that may stand for something else than it was taken for."""
    if not names:
        return
    hyperparameters, _ = hyperparameters_of(find_model(model))
    fields = [field for section in RunConfig.model_fields.values() for field in _fields(section.annotation)]
    for name in names:
        places = homes(name)
        if places and name in hyperparameters:
            both = " or ".join([*places, f"model.hyperparameters.{name}"])
            raise ValueError(f"{name!r} is a field and a hyperparameter of model {model!r} as well: write {both}")
        slip = "" if places or name in hyperparameters else did_you_mean(name, fields)
        if slip:
            raise ValueError(
                f"there is no field {name!r}{slip}; as a hyperparameter of the model it is model.hyperparameters.{name}"
            )


def parse_value(text: str, name: str) -> Any:
    """A value of the command line as YAML reads it: numbers, words, ``null``, ``[64, 32]``, ``{kind: hash}``."""
    if not text.strip():
        raise ValueError(f"{name}: the value is empty; for none write null")
    try:
        return parse_yaml(text)
    except NotYaml:
        raise ValueError(
            f"{name}: the value {text!r} is not valid YAML; quote it, or check brackets and braces"
        ) from None


def parse_named(texts: Sequence[str], option: str, what: str, example: str) -> dict[str, dict[str, Any]]:
    """Texts ``NAME: {FIELD: VALUE}`` of an option as {name: {field: value}}, in the order given.

    Raises:
        ValueError: a text of another form, which is told as ``what: {FIELD: VALUE}``, or a name that is given twice.
    """
    named: dict[str, dict[str, Any]] = {}
    for text in texts:
        try:
            found = parse_yaml(text)
        except NotYaml:
            found = None
        if not isinstance(found, dict) or not all(isinstance(fields, dict) for fields in found.values()) or not found:
            raise ValueError(f"{option} {text!r} is not of the form {what}: {{FIELD: VALUE}}, such as {example!r}")
        for name, fields in found.items():
            if name in named:
                raise ValueError(f"{option} {name!r} is given twice")
            named[name] = fields
    return named


def _read(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold the sections {', '.join(RunConfig.model_fields)}, not {type(values).__name__}"
        )
    for section, fields in values.items():
        if fields is None:
            values[section] = {}
    return values


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    """The sections of ``over``, field by field, over those of ``values``."""
    for section, fields in over.items():
        below = values.get(section)
        values[section] = {**below, **fields} if isinstance(below, dict) and isinstance(fields, dict) else fields


def _put(values: dict[str, Any], name: str, value: Any, where: str = "") -> None:
    *parents, last = name.split(".")
    for depth, parent in enumerate(parents):
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            holder = ".".join(parents[: depth + 1])
            raise ValueError(f"{where}{holder} holds a single value, so there is no field {name}")
        values = below
    values[last] = value


def _sentence(error: ValidationError, without_section: Sequence[str] = ()) -> str:
    """What is wrong with a field; ``without_section`` names those that were set in all sections that have them."""
    problem = error.errors()[0]
    # Members of a union appear in the location by their type; a field's own path is section and name.
    path = [str(part) for part in problem["loc"][:2]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        if len(path) == 1:
            known = list(RunConfig.model_fields)
            # ``batch_size: 10`` without its section is the likeliest slip.
            places = homes(path[0])
            hint = f"; did you mean {places[0]}?" if places else ""
            return f"{name} is not a section of the configuration: it has {', '.join(known)}{hint}"
        known = _fields(RunConfig.model_fields[path[0]].annotation)
        close = difflib.get_close_matches(path[1], known, n=1)
        hint = f"; did you mean {path[0]}.{close[0]}?" if close else f": {path[0]} has {', '.join(known)}"
        return f"{name} is not a field of the configuration{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if len(path) < 2 and problem["type"] == "value_error":
        return message
    if len([p for p in error.errors() if p["loc"][:2] == problem["loc"][:2]]) > 1:
        message = {
            "tables.budget": 'must be bytes such as 67108864 or "64MB", or a share such as 0.1 or "10%"',
            "tables.training_budget": 'must be bytes such as 67108864 or "64MB", or a share such as 0.1 or "10%"',
            "tables.method": "must be a method's kind, {kind: …, options}, or {table-name pattern: either of these}",
            "tables.optimizer": "must be an optimizer's kind, or {kind: …, fields}",
            "dense.weight_decay": "must be a number of at least 0, or {parameter-name pattern: such a number}",
        }.get(name, message)
    got = "" if isinstance(problem["input"], (dict, BaseModel)) else f", not {problem['input']!r}"
    places = homes(path[-1]) if path[-1] in without_section else []
    choice = f" ({path[-1]} alone is {' and '.join(places)}: name one of them)" if len(places) > 1 else ""
    return f"{name}: {message}{got}{choice}"


def _fields(section: Any) -> list[str]:
    return list(section.model_fields)
