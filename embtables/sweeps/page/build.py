"""The page of a sweep, report.html: what to choose, figures and commands, in one file that needs no network.

Python gathers the numbers and says what is said in sentences; page.html and page.css lay them out, and page.js draws.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from embtables._util.files import write_text
from embtables._util.names import number_of
from embtables._util.reading import inside, read_json
from embtables.plan.solver import by_pattern
from embtables.sizes.budget import parse_budget
from embtables.sizes.layout import Extra, Layout, Slab, owner_of
from embtables.sweeps.cells import Cell, MethodSpec, is_baseline
from embtables.sweeps.recommending import recommendation
from embtables.sweeps.results import read_metrics
from embtables.sweeps.summary import Point, Summary
from embtables.sweeps.sweep import shell_command
from embtables.training.config import parse_value
from embtables.training.learning_curve import LEAST_LEARNED, Row, read_curve

#: What can be drawn against the bytes, by column of results.csv. What no row has is not offered.
METRICS = {
    "test_auc": "test AUC",
    "test_logloss": "test log loss",
    "test_normalized_entropy": "normalized entropy",
    "test_calibration": "calibration (mean prediction / click rate)",
    "test_gauc_weighted": "gauc_weighted",
    "test_gauc_mean": "gauc_mean",
    "test_auc_head": "AUC of head ids",
    "test_auc_torso": "AUC of torso ids",
    "test_auc_tail": "AUC of tail ids",
    "test_auc_unseen": "AUC of unseen ids",
    "valid_auc": "validation AUC",
}
_OTHERS = ("lookup_latency_us", "training_bytes", "best_epoch")
_CURVE = ("epoch", "train_loss", "valid_logloss", "valid_auc")
#: With more methods than this the page draws the best of each kind at first.
_MOST_METHODS = 10
#: Bounds on what the page holds, however large the sweep: evaluations of all curves, and tables of one plan.
_MOST_EVALUATIONS, _MOST_TABLES = 30_000, 40
#: Characters of a sentence that stands open.
_LONGEST = 500


def write_page(
    summary: Summary,
    path: Path,
    head: Sequence[str],
    remarks: Sequence[str],
    header: Sequence[str],
    rows: Sequence[tuple[Point, Sequence[str]]],
) -> None:
    """Write the page of a sweep, less than 5 MB, to `path`.

    Args:
        summary: of the sweep, finished or not, with cells or without.
        path: the file.
        head: the title, and what there is to say of the state of the sweep.
        remarks: what must be known to read the numbers.
        header: of the report's table.
        rows: the points in the order of the report, each with its line in that table.
    """
    taken, recommended = _recommendations(summary)
    runs, unreadable = _runs(summary)
    title, *status = head
    style, script, template = (_asset(f"page.{suffix}") for suffix in ("css", "js", "html"))
    plotly = _plotly()
    held = {"header": list(header), **data(summary, rows, taken, runs)}
    filled = {
        "title": html.escape(title),
        "head": _paragraphs(status),
        "recommendations": recommended,
        "flags": _list([*_flags(summary, runs), *remarks, *unreadable]),
        # Within a script no text but `</script` and `<!--` would end or change it; in JSON a `<` stands in texts alone.
        "data": json.dumps(held, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c"),
        "plotly": base64.b64encode(gzip.compress(plotly, mtime=0)).decode(),
        "style": style,
        "script": script,
        "policy": _policy(script.encode(), plotly),
    }
    # In one pass, so that what is put in is not looked through for marks.
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda mark: filled[mark[1]], template))


def data(
    summary: Summary,
    rows: Sequence[tuple[Point, Sequence[str]]],
    taken: Mapping[int, str],
    runs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What page.js draws, as plain data: numbers are finite or ``None``.

    Args:
        summary: of the sweep.
        rows: its points, each with its line in the table.
        taken: by ``id`` of a point the budget within which it is recommended.
        runs: what the cells hold, by name.
    """
    config = summary.config
    points = [point for point, _ in rows]
    metrics = {name: label for name, label in METRICS.items() if any(math.isfinite(p.mean(name)) for p in points)}
    numbers = {number: name for name, number in enumerate(config.methods)}
    full = {variant: summary.of(variant).full for variant in config.trains}
    return {
        "variants": list(config.variants),
        "budgets": config.budgets,
        "metrics": metrics,
        "methods": _methods(summary),
        "full": [i for i, point in enumerate(points) if point is full[point.variant]],
        "points": [
            {
                "variant": point.variant,
                "method": numbers[point.method],
                "budget": point.budget,
                "bytes": point.inference_bytes,
                "share": _number(point.mean("ratio")),
                "seeds": f"{point.num_ok}/{point.num_seeds}",
                "values": {name: _range(point, name) for name in (*metrics, *_OTHERS)},
                "differences": _differences(summary, point),
                "line": line,
                "taken": taken.get(id(point), ""),
                "cells": [str(name) for name in point.rows["cell"] if name in runs],
                "parts": next((runs[name]["parts"] for name in point.rows["cell"] if name in runs), None),
                "command": "" if point.floor_bytes is not None else shell_command(config, _first_cell(point)),
            }
            for point, line in rows
        ],
        "runs": {name: {k: v for k, v in run.items() if k != "parts"} for name, run in runs.items()},
    }


def _first_cell(point: Point) -> Cell:
    """The cell of the first seed that is finished; where none is, that of seed 0 before any value is chosen."""
    seed = int(point.rows["seed"].min()) if point.num_ok else 0
    return Cell(point.method, point.budget, seed, point.tuned, point.variant)


def _methods(summary: Summary) -> list[dict[str, Any]]:
    """The methods in the order of the sweep; `shown`: those that the page draws at first.

    Beyond a few they are full tables and, of each kind, what is best on validation at some budget.
    """
    few = len(summary.config.methods) <= _MOST_METHODS
    best: dict[tuple[str, str, str], Point] = {}
    for point in summary.points:
        key = (point.variant, _kind(point.spec), point.budget)
        if math.isfinite(point.mean("valid_auc")) and (
            key not in best or point.mean("valid_auc") > best[key].mean("valid_auc")
        ):
            best[key] = point
    shown = {point.method for point in best.values()}
    return [
        {
            "name": name,
            "kind": _kind(spec),
            "precision": _precision(spec, summary.config.train.tables.precision),
            "baseline": is_baseline(name),
            "best": name in shown,
            "shown": few or name in shown,
        }
        for name, spec in summary.config.methods.items()
    ]


def _kind(spec: MethodSpec) -> str:
    return " + ".join(dict.fromkeys(str(_fields(part)["kind"]) for part in by_pattern(spec).values()))


def _precision(spec: MethodSpec, default: str) -> str:
    return " + ".join(dict.fromkeys(str(_fields(part).get("precision", default)) for part in by_pattern(spec).values()))


def _fields(part: Any) -> Mapping[str, Any]:
    return {"kind": part} if isinstance(part, str) else part


def _number(value: float) -> float | None:
    """Six digits, which is more than two seeds have in common."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _range(point: Point, name: str) -> list[float | None] | None:
    """Mean, lowest and highest over seeds; ``None`` where there is no mean."""
    mean = point.mean(name)
    if not math.isfinite(mean):
        return None
    return [_number(value) for value in (mean, point.rows[name].min(), point.rows[name].max())]


def _differences(summary: Summary, point: Point) -> list[list[float | None]]:
    """Seed, difference of the test AUC to full tables with this seed, and its 95 % interval where it is known."""
    known = {item.seed: [_number(item.low), _number(item.high)] for item in point.differences}
    reference = summary.reference(point)
    if reference is None:
        return []
    differences = point.minus(reference).items()
    return [[seed, _number(value), *known.get(seed, [None, None])] for seed, value in differences]


# ---- what is said in sentences ------------------------------------------------------------------------------------


def _recommendations(summary: Summary) -> tuple[dict[int, str], str]:
    """The budget by ``id`` of the point that is recommended within it, and the recommendations as HTML."""
    config = summary.config
    if not config.budgets:
        return {}, _paragraphs(["The sweep has no budgets within which to recommend something; its rows stand below."])
    if not any(point.num_ok for point in summary.points):
        return {}, _paragraphs(["Nothing has been trained yet, so there is nothing to recommend."])
    taken: dict[int, str] = {}
    told = []
    for variant in config.trains:
        own = summary.of(variant)
        for budget in config.budgets:
            try:
                found = recommendation(own, budget, _limit(own, budget))
            except ValueError as error:
                lines = [f"Nothing to recommend within {budget}: {error}."]
            else:
                taken[id(found.point)] = " and ".join(filter(None, [taken.get(id(found.point)), budget]))
                lines = found.words()
            named = [f"{variant}: {lines[0]}", *lines[1:]] if variant else lines
            told.append(f'<div class="recommended">{_paragraphs(named)}</div>')
    return taken, "\n".join(told)


def _limit(summary: Summary, budget: str) -> int:
    """Bytes of a budget of the sweep."""
    sizes = [int(point.rows["full_bytes"].max()) for point in summary.points if point.rows["full_bytes"].notna().any()]
    return parse_budget(parse_value(budget, "budget"), sizes[0] if sizes else None)


def _flags(summary: Summary, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which rows not to trust, and why, in sentences."""
    found = []
    useless = [point for point in summary.points if point.mean("test_normalized_entropy") >= 1]
    if useless:
        found.append(
            "Probabilities that say no more than the click rate (normalized entropy of 1 or more, whatever the AUC): "
            f"{_named(useless)}."
        )
    # Without any table there is nothing to learn about ids, which is what is asked of it.
    collapsed = [p for p in summary.points if abs(p.mean("valid_auc") - 0.5) < LEAST_LEARNED and p.inference_bytes]
    if collapsed:
        found.append(f"Learned nothing, with a validation AUC of 0.5: {_named(collapsed)}.")
    for point in (point for point in summary.points if point.kind == "full" and point.num_ok):
        said = [runs[cell]["overfitting"] for cell in point.rows["cell"] if cell in runs]
        of_seeds = [text for text in said if text]
        best, epochs = point.mean("best_epoch"), point.mean("epochs")
        if of_seeds:
            found.append(f"{point.name} over-fits in {len(of_seeds)} of {len(said)} seeds: {of_seeds[0]}")
        elif not said and best <= epochs / 2:
            found.append(
                f"{point.name} was best after {best:.3g} of {epochs:.3g} epochs, which looks like over-fitting; "
                "its curve is not kept."
            )
    failed = [point for point in summary.points if point.num_failed]
    if failed:
        found.append(f"Failed: {'; '.join(f'{point.name} ({point.message})' for point in failed)}.")
    return found


def _named(points: Iterable[Point]) -> str:
    return ", ".join(point.name for point in points)


def _paragraphs(texts: Iterable[str]) -> str:
    return "\n".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_folded(text)}</li>' for text in texts)}</ul>" if texts else "<p>Nothing.</p>"


def _folded(text: str) -> str:
    """A sentence as HTML; where it ends in a long enumeration, that opens on demand."""
    start, colon, rest = text.partition(": ")
    if len(text) < _LONGEST or not colon:
        return html.escape(text)
    return f"<details><summary>{html.escape(start)}: …</summary>{html.escape(rest)}</details>"


# ---- what the cells hold ------------------------------------------------------------------------------------------


def _runs(summary: Summary) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By name of the cell its curve, what its run said, and of each point's first cell where the bytes go.

    The second part says of which cells files could not be read: a page without them is better than none.
    """
    folder = summary.folder / "cells"
    names = [str(name) for point in summary.points for name in point.rows["cell"]]
    firsts = {str(point.rows["cell"].iloc[0]) for point in summary.points if point.num_ok}
    most = max(8, _MOST_EVALUATIONS // max(1, len(names)))
    found: dict[str, dict[str, Any]] = {}
    unreadable: dict[str, str] = {}
    for name in names:
        run = inside(folder, name)
        metrics = read_metrics(run)
        if metrics is None:
            continue
        found[name] = {
            "seed": metrics.get("seed"),
            "best": metrics.get("best_epoch"),
            "overfitting": metrics.get("overfitting"),
            "remarks": metrics.get("remarks") or [],
            "curve": None,
            "parts": None,
        }
        try:
            if (run / "validation.csv").is_file():
                found[name]["curve"] = _curve(
                    read_curve(inside(run, "validation.csv")), metrics.get("best_epoch"), most
                )
            if name in firsts and (run / "plan.json").is_file():
                found[name]["parts"] = parts(read_json(inside(run, "plan.json")))
        except ValueError as error:
            unreadable[name] = str(error)
    if not unreadable:
        return found, []
    which = number_of(len(unreadable), "cell")
    return found, [f"Plan or curve of {which} cannot be read; the first, {next(iter(unreadable.values()))}."]


def _curve(rows: Sequence[Row], best: float | None, most: int) -> dict[str, list[float | None]]:
    """Columns of at most about `most` evaluations, the best and the last one among them."""
    step = math.ceil(len(rows) / most)
    kept = [row for i, row in enumerate(rows) if i % step == 0 or i == len(rows) - 1 or row["epoch"] == best]
    return {name: [_number(row[name]) if row[name] is not None else None for row in kept] for name in _CURVE}


def parts(plan: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Where the bytes of the served tables go by ``Plan.to_dict``: table, kind and bytes, the largest tables first.

    Kinds are ``rows``, their ``scales``, ``dense`` parameters, and the kinds of codes.
    What tables share stands under the name of their group; beyond forty, tables stand together. The methods themselves
    are not asked, so that plans count whose methods are of other packages, or have got other options since.

    Raises:
        ValueError: this is no plan.
    """
    found: dict[str, dict[str, int]] = {}
    try:
        groups = [(str(each["name"]), set(each["tables"]), Layout.from_dict(each["layout"])) for each in plan["groups"]]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the plan's data is damaged: {type(error).__name__} {error}") from error
    for group, names, layout in groups:
        for item in layout.serving.items():
            own = found.setdefault(owner_of(item.name, names) or f"shared by {group}", {})
            if isinstance(item, Slab):
                sizes = {"rows": item.num_bytes - item.scale_bytes, "scales": item.scale_bytes}
            else:
                sizes = {"dense" if isinstance(item, Extra) else item.kind: item.num_bytes}
            for kind, size in sizes.items():
                own[kind] = own.get(kind, 0) + size
    ordered = sorted(found.items(), key=lambda entry: -sum(entry[1].values()))
    rest: dict[str, int] = {}
    for _, own in ordered[_MOST_TABLES:]:
        for kind, size in own.items():
            rest[kind] = rest.get(kind, 0) + size
    kept = [*ordered[:_MOST_TABLES], (f"{len(ordered[_MOST_TABLES:])} smaller tables", rest)]
    return [(table, kind, size) for table, own in kept for kind, size in own.items() if size]


# ---- the file -----------------------------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return (files("embtables.sweeps.page") / name).read_text(encoding="utf-8")


def _plotly() -> bytes:
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    return source.encode()


def _policy(*scripts: bytes) -> str:
    """Runs these scripts and no others, and loads nothing from anywhere."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
