"""``embtables train`` and ``embtables export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embtables._util.files import check_seal, followed, really, remove_leftovers
from embtables._util.reading import inside, read_json
from embtables.datasets import PreparedDataset
from embtables.training.config import load_config, parse_named, parse_value, with_fields
from embtables.training.export import MODEL, TABLES, WEIGHTS, copy_served, served_of
from embtables.training.planning import told_of_choice
from embtables.training.presets import PRESETS
from embtables.training.trainer import Trainer

__all__ = ["check_finished", "export", "names_of", "outside_runs", "train", "value_of"]

_PRESETS = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())


def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder made by `embtables prepare`.")],
    out: Annotated[Path, typer.Option(help="The run's folder. An interrupted run in it is resumed.")],
    config: Annotated[Path | None, typer.Option(help="YAML: data, model, tables, dense, training.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Named defaults: {_PRESETS}.")] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(help="Features and histories to leave out, separated by commas; with a feature go its histories."),
    ] = None,
    max_history: Annotated[int | None, typer.Option(help="Latest items kept of each history.")] = None,
    model: Annotated[str | None, typer.Option(help="Such as dlrm, din, deepfm, or package.module:Class.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How the tables are stored: a kind such as hash, or '{kind: compositional, operation: add}'."
        ),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Bytes of the served tables: 10%, 0.1, 64MB, 67108864.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the served rows: fp32, fp16, bf16, int8, int4, int2, binary, binary2, binary4; behind a slash how "
            "many rows have a scale in common, as in int4/64 or int4/slab."
        ),
    ] = None,
    embedding_dim: Annotated[int | None, typer.Option(help="Length of every vector.")] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="Of the tables: sgd, rowwise_adagrad, adagrad, adam, one of another package, or with fields "
            "'{kind: adam, beta2: 0.99}'."
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the tables.")] = None,
    dense_optimizer: Annotated[str | None, typer.Option(help="Of everything else: adam, adagrad, sgd.")] = None,
    dense_learning_rate: Annotated[float | None, typer.Option(help="Of everything else.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="At most; early stop may end sooner. 0.5: half of the training rows.")
    ] = None,
    evaluations_per_epoch: Annotated[
        float | None, typer.Option(help="How often validation is looked at; 0.5: every other epoch.")
    ] = None,
    monitor: Annotated[
        str | None, typer.Option(help="What chooses the best model: auc, gauc_weighted, gauc_mean, logloss.")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="Evaluations without a better monitor before the stop.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialization, hashing and the order of examples.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
    log_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Log to mlflow or wandb too, where their own variables such as MLFLOW_TRACKING_URI and WANDB_PROJECT "
            "say; repeatable."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field, such as dense.weight_decay=1e-6; repeatable."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER: {FIELD: VALUE}",
            help="A further run of the same training, served in another precision, or at another budget with a method "
            "that trains the same for all: 'runs/int8: {precision: int8}'; repeatable.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train one model with one method at one budget.

    Defaults are overridden by --preset, then by --config, by the flags and by --set. The best model on validation is
    kept in its served form; metrics.json is written last. Started again after an interruption it goes on and ends with
    the same result, and a finished run is not run again.

    Fields that have no flag are set with --set. Without its section a field is set wherever it is:
    --set learning_rate=0.001 is that of the tables and of the rest; and a hyperparameter of the model needs no section:
    --set units=[64,32]. training.clip_norm bounds the global norm of the gradients of ordinary parameters, to which
    fused tables do not belong; training.plateau_factor lowers both learning rates; training.autocast=bf16 trains the
    dense part in bfloat16, and training.compile=true compiles it; tables.regularization is the L2 of the ids that a
    batch holds; training.average=0.4 evaluates, keeps and serves a running mean of all weights over 0.4 epochs;
    training.quantize_from=4 computes with rows rounded as they are served from epoch 4 on; and
    tables.training_precision=bf16 stores rows in 16 bits while they are trained.

    --log-to mlflow and --log-to wandb log the run there too. What goes wrong there is a warning, and the training goes
    on.

    --also serves the same training in other precisions too, and that of matryoshka at other budgets. Each has a folder
    of its own, and the numbers that it would have in a training of its own: its best model is chosen, and it is out of
    patience, by validation of its own form.

    Examples:

    \b
      embtables train data/demo --method hash --budget 10% --out runs/hash
      embtables train data/demo --method frequency_cutoff --budget 1% --precision int4 --out runs/int4
      embtables train data/demo --method full --out runs/fp32 --also 'runs/int4: {precision: int4}'
      embtables train data/demo --config run.yaml --set top_units=[256,128] --out runs/wide
      embtables train data/demo --model my_package.my_model:MyModel --method full --out runs/mine
      embtables train data/demo --log-to mlflow --out runs/logged
      embtables train data/frappe --preset bars --model deepfm --set tables.l2=0.05 --out runs/frappe
    """
    flags: dict[str, Any] = {
        "data.leave_out": names_of(leave_out),
        "data.max_history": max_history,
        "model.name": model,
        "tables.method": value_of(method, "--method"),
        "tables.budget": value_of(budget, "--budget"),
        "tables.precision": precision,
        "tables.embedding_dim": embedding_dim,
        "tables.optimizer": value_of(optimizer, "--optimizer"),
        "tables.learning_rate": learning_rate,
        "dense.optimizer": dense_optimizer,
        "dense.learning_rate": dense_learning_rate,
        "training.batch_size": batch_size,
        "training.epochs": epochs,
        "training.evaluations_per_epoch": evaluations_per_epoch,
        "training.monitor": monitor,
        "training.patience": patience,
        "training.seed": seed,
        "training.threads": threads,
        "training.device": device,
        "training.log_to": log_to or None,
    }
    resolved = load_config(config, preset=preset, flags=flags, overrides=overrides or [])
    beside = {
        Path(folder): with_fields(resolved, {f"tables.{name}": value for name, value in fields.items()})
        for folder, fields in parse_named(also or [], "--also", "FOLDER", "runs/int8: {precision: int8}").items()
    }
    opened = PreparedDataset(data)
    for line in told_of_choice(resolved, opened):
        typer.echo(line, err=True)
    result = Trainer(resolved, opened, out, also=beside, show_progress=not quiet).run()
    if result["status"] != "ok":
        raise ValueError(str(result["message"]))
    ratio = f" ({result['ratio']:.2%} of full)" if result["ratio"] is not None else ""
    typer.echo(
        f"test AUC {_number(result['test_auc'])}  log loss {_number(result['test_logloss'])}  "
        f"validation AUC {_number(result['valid_auc'])} (epoch {result['best_epoch']})\n"
        f"tables {result['inference_bytes']:,} bytes{ratio}  {_speed(result)}\n"
        f"{out}"
    )
    for remark in (result.get("overfitting"), *result.get("remarks", ())):
        if remark:
            typer.echo(f"Note: {remark}")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished `embtables train`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another export at OUT.")] = False,
) -> None:
    """Write the served tables and the model of a run, which is checked, not built: no code of the run is executed.

    OUT holds tables.safetensors, model.safetensors and model.json; embtables.training.load_served(OUT) reads them.

    Example:

    \b
      embtables export runs/hash models/hash
    """
    check_finished(run)
    source, out = served_of(run), outside_runs(out)
    if out.exists():
        if out.is_dir() and all(_same(source / name, out / name) for name in (TABLES, WEIGHTS, MODEL)):
            typer.echo(f"{out} holds this export already")
            return
        if not overwrite:
            raise ValueError(f"{out} exists and is not an export of {run}: give another OUT, or --overwrite")
        if not out.is_dir() or {entry.name for entry in out.iterdir()} - {TABLES, WEIGHTS, MODEL}:
            raise ValueError(f"{out} holds more than an export, so it is not overwritten: give another OUT")
    copy_served(source, out)
    size = sum((out / name).stat().st_size for name in (TABLES, WEIGHTS, MODEL))
    typer.echo(f"{out}: {size:,} bytes in {TABLES}, {WEIGHTS} and {MODEL}")


def check_finished(run: Path) -> None:
    """Raises ValueError where a run has no model to export."""
    status = _status(run)
    if status != "ok":
        raise ValueError(f"{run} has no model to export: its status is {status!r}")


def outside_runs(out: Path) -> Path:
    """The folder that OUT stands for, beside which nothing is left of killed processes.

    Raises:
        ValueError: it lies in the folder of a run.
    """
    out = followed(out)
    place = really(out)
    for folder in (place, *place.parents):
        if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file():
            raise ValueError(f"{out} is in the run {folder}, whose parts are its own: give an OUT elsewhere")
    remove_leftovers(out.parent)
    return out


def value_of(text: str | None, flag: str) -> Any:
    """What a flag says, as YAML; ``None`` where it was not given.

    Raises:
        ValueError: for null, which would be the same as no flag at all.
    """
    value = None if text is None else parse_value(text, flag)
    if text is not None and value is None:
        raise ValueError(f"{flag} {text}: a value is needed; for the default leave {flag} out")
    return value


def names_of(text: str | None) -> list[str] | None:
    """``"user,history"`` as its names."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"--leave-out {text!r} has an empty name: give for example --leave-out user,history")
    return names


def _status(run: Path) -> str:
    path = run / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{run} is not a finished run: it has no metrics.json")
    content = read_json(inside(run, "metrics.json"))
    if not isinstance(content, dict) or not isinstance(content.get("status"), str):
        raise ValueError(f"{path} is damaged: it has no status")
    check_seal(content, path)
    return str(content["status"])


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _speed(result: dict[str, Any]) -> str:
    speed, seconds = result["examples_per_second"], result.get("compile_seconds")
    compiled = "" if seconds is None else f", not counting {seconds:.0f} s of the step that compiled"
    return f"{'–' if speed is None else f'{speed:,.0f}'} examples/s{compiled}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
