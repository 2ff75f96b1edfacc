"""The report of a sweep: a table for the terminal, report.md, the page report.html, and the accuracy-memory figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from embtables._util.files import write_text
from embtables._util.names import number_of
from embtables.sizes.memory import format_bytes
from embtables.sweeps.cells import file_name, labels_of, value_text
from embtables.sweeps.figure import draw
from embtables.sweeps.page.build import write_page
from embtables.sweeps.summary import LEAST_SEEDS_FOR_P, Difference, Point, Summary, summarize

HEADER = (
    "method",
    "budget",
    "bytes",
    "of full",
    "test AUC",
    "difference to full",
    "95 % ≠ 0",
    "log loss",
    "seeds",
    "note",
)
_RATES = {"tables.learning_rate", "dense.learning_rate"}
_RIGHT = {"bytes", "of full", "test AUC", "difference to full", "95 % ≠ 0", "log loss", "seeds"}

DETAIL = {
    "valid_auc": "valid AUC",
    "test_normalized_entropy": "norm. entropy",
    "test_calibration": "calibration",
    "test_auc_head": "AUC head",
    "test_auc_torso": "torso",
    "test_auc_tail": "tail",
    "test_auc_unseen": "unseen",
    "test_gauc_weighted": "gauc_weighted",
    "test_gauc_mean": "gauc_mean",
    "collision_share": "ids that collide",
    "lookup_latency_us": "lookup µs",
    "examples_per_second": "examples/s",
    "train_seconds": "train s",
    "training_bytes": "training bytes",
    "peak_rss_bytes": "peak memory",
    "best_epoch": "best epoch",
}


@dataclass(frozen=True)
class Report:
    """What :func:`write_report` found and wrote."""

    summary: Summary
    files: list[Path]

    def renderable(self) -> RenderableType:
        """The table and the sentences to read it with, for a rich console."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in header(self.summary):
            table.add_column(name, justify="right" if name in _RIGHT else "left", no_wrap=name != "note")
        for section in sections(self.summary):
            for point in section:
                style = "yellow" if point.below_drop else "dim" if not point.num_ok else None
                table.add_row(*map(Text, line(point, self.summary)), style=style)
            table.add_section()
        heading, *sentences = [*head(self.summary), *remarks(self.summary)]
        return Group(Text(heading, style="bold"), table, *map(Text, sentences))


def write_report(folder: Path, *, resamples: int = 200, progress: bool = False) -> Report:
    """Summarize the sweep in `folder`, finished or not, and write report.html, report.md and its figure there.

    The figure is accuracy_memory.png and .svg; with variants there is one for each that has methods with a budget.
    """
    summary = summarize(folder, resamples=resamples, progress=progress)
    figures: list[Path] = []
    for variant in summary.config.trains:
        own = summary.of(variant)
        if any(point.num_ok and (point.takes_budget or not variant) for point in own.points):
            figures += draw(own, folder / file_name("accuracy_memory", variant))
    report = folder / "report.md"
    write_text(report, markdown(summary, resamples, figures))
    page = folder / "report.html"
    lines = [(point, line(point, summary)) for section in sections(summary) for point in section]
    write_page(summary, page, head(summary), remarks(summary), header(summary), lines)
    return Report(summary, [page, report, *figures])


def show(report: Report) -> None:
    """Print the table, the sentences and the paths. Without a terminal lines are long, not broken."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(report.renderable())
    for path in report.files:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def sections(summary: Summary) -> list[list[Point]]:
    """Full first, then a section a budget with the best method on top and what has no result at the bottom."""
    full = [point for point in summary.points if not point.takes_budget]
    found = [full] if full else []
    for budget in summary.config.budgets:
        section = [point for point in summary.points if point.budget == budget]
        found.append(sorted(section, key=lambda point: (not point.num_ok, -_or_zero(point.mean("test_auc")))))
    return [section for section in found if section]


def header(summary: Summary) -> tuple[str, ...]:
    return ("variant", *HEADER) if summary.config.variants else HEADER


def line(point: Point, summary: Summary) -> tuple[str, ...]:
    """The cells of a point's row, one a column of the header."""
    size = point.inference_bytes
    return (
        *([point.variant] if summary.config.variants else []),
        point.method,
        point.budget,
        f"{size:,}" if size is not None else "–",
        _percent(point.mean("ratio")),
        _spread(point.mean("test_auc"), point.std("test_auc")),
        _difference(point),
        _excluding_zero(point),
        _number(point.mean("test_logloss")),
        f"{point.num_ok}/{point.num_seeds}",
        note(point, summary),
    )


def note(point: Point, summary: Summary) -> str:
    notes = []
    if point.floor_bytes is not None:
        notes.append(f"infeasible: floor {number_of(point.floor_bytes, 'byte')}")
    if point.drop is not None and point.below_drop:
        notes.append(f"WORSE than {point.drop.method} ({point.drop.difference:+.4f})")
    if point.fewer is not None and not point.beats_fewer:
        notes.append(f"no better than {point.fewer.method} ({point.fewer.difference:+.4f})")
    entropy = point.mean("test_normalized_entropy")
    if entropy >= 1:
        notes.append(f"NO BETTER than the base rate (normalized entropy {entropy:.2f})")
    if point.num_failed:
        notes.append(f"{point.num_failed} failed: {point.message}")
    if point.tuned:
        notes.append(point.tuned + _elsewhere(point, summary))
    if point.p_value is not None:
        notes.append(f"p = {point.p_value:.3g}")
    if not point.num_ok and not notes:
        notes.append("not run yet")
    return "; ".join(notes)


def _elsewhere(point: Point, summary: Summary) -> str:
    """Where the values of `point` were chosen, where that is not where the remarks say."""
    home, at = summary.tuned_at(point), summary.config.tune_at
    if home is None or not home.budget or home.budget == (at or point.budget) and home.num_ok:
        return ""
    if home.num_ok:
        return f" (chosen at {home.budget})"
    return f" (the first of the grid: all of it failed at {home.budget})" if home.num_failed else ""


def head(summary: Summary) -> list[str]:
    lines = [f"{summary.title} · {_seeds(summary)}"]
    if summary.is_partial:
        have = "has" if summary.num_finished == 1 else "have"
        lines.append(
            f"Unfinished: {summary.num_finished} of {number_of(summary.num_expected, 'cell')} {have} a result; "
            "the same `embtables sweep` command goes on."
        )
    return lines


def _seeds(summary: Summary) -> str:
    config = summary.config
    seeds = number_of(config.seeds, "seed")
    if config.best is None:
        return seeds
    each = "each variant and budget" if config.variants else "each budget"
    best = "best" if config.best == 1 else f"{config.best} best"
    return f"{seeds} for baselines and the {best} of {each} on validation, 1 for the rest"


def remarks(summary: Summary) -> list[str]:
    """What must be known to read the table."""
    found = [remark for remark in (tuned(summary), learning_rates(summary)) if remark]
    if summary.config.variants:
        first, *others = summary.config.variants
        found.append(
            f"Differences are to full of the same variant; those of full itself are to full of {first}."
            if others
            else f"There is one variant, {first}."
        )
    below_drop = ", ".join(point.name for point in summary.points if point.below_drop)
    if below_drop:
        found.append(f"Worse than dropping features at the same budget: {below_drop}. Find out why before using it.")
    not_better = ", ".join(point.name for point in summary.points if not point.beats_fewer)
    if not_better:
        found.append(f"No better than full tables of fewer dimensions at the same budget: {not_better}.")
    full = summary.full
    if full is None or not full.num_ok:
        found.append("There is no full table to compare to yet.")
    elif full.method not in labels_of("full"):
        found.append(f"There is no full: differences are to {full.method}.")
    if summary.config.seeds < LEAST_SEEDS_FOR_P:
        found.append(f"No p-values: they need at least {LEAST_SEEDS_FOR_P} seeds.")
    elif any(point.num_seeds < LEAST_SEEDS_FOR_P for point in summary.points):
        found.append(f"No p-values for methods with 1 seed: they need at least {LEAST_SEEDS_FOR_P}.")
    return found


def tuned(summary: Summary) -> str:
    """What was tuned, from which values and on what, in one sentence; nothing where nothing was."""
    config = summary.config
    if not config.tune:
        return ""
    if config.tune_at is None:
        where = "variant, method and budget" if config.variants else "method and budget"
    else:
        where = "variant and method" if config.variants else "method"
        where += f", at {config.tune_at} or else the first budget that is feasible, and used at all"
    fields = (f"{field} from {', '.join(map(value_text, values))}" for field, values in config.tune.items())
    return f"Chosen on validation with seed 0 for each {where}: {'; '.join(fields)} (tuning.csv)."


def learning_rates(summary: Summary) -> str:
    """How those learning rates came about that were not tuned; nothing where all were."""
    tuned_rates = _RATES & summary.config.tune.keys()
    rates = {name: values for name, values in summary.learning_rates.items() if name not in tuned_rates}
    if not rates:
        everyone = "The learning rates were shared by all methods; none was tuned for a method."
        return "" if tuned_rates else everyone
    parts = []
    for name, values in rates.items():
        if len(values) == 1:
            parts.append(f"{name} {next(iter(values))}")
        else:
            differing = "; ".join(f"{value} for {', '.join(methods)}" for value, methods in values.items())
            parts.append(f"{name} NOT shared ({differing})")
    if tuned_rates:
        return f"Of the learning rates these were shared by all methods: {', '.join(parts)}."
    return f"Learning rates were shared by all methods, none was tuned for a method: {', '.join(parts)}."


def markdown(summary: Summary, resamples: int, figures: Sequence[Path]) -> str:
    """The whole report as Markdown."""
    title, *status = head(summary)
    points = [point for section in sections(summary) for point in section]
    parts = [f"# {title}", *status]
    parts.append(_table(header(summary), [line(point, summary) for point in points]))
    parts.append("\n".join(f"- {remark}" for remark in remarks(summary)))
    for png in (path for path in figures if path.suffix == ".png"):
        parts.append(f"![Test AUC against the bytes of the served tables]({png.name})")
    parts += ["## How to read it", HOW_TO_READ.format(resamples=resamples)]
    detail = _detail(points, summary)
    if detail:
        parts += ["## Where it is lost, and what it costs", "Means over seeds.", detail]
    differences = [
        (*_names(d, summary), str(d.seed), f"{d.difference:+.4f}", f"{d.low:+.4f} … {d.high:+.4f}")
        for point in points
        for d in point.differences
    ]
    if differences:
        columns = (*_names_header(summary), "seed", "difference to full", "95 % over test rows")
        parts += ["## Differences to full, seed by seed", _table(columns, differences)]
    return "\n\n".join(parts) + "\n"


HOW_TO_READ = """\
Bytes are those of the served tables, with every code and index counted; AUC and log loss are those of the served form,
loaded from its file. Training stopped and models were chosen on validation alone; the test rows were read once, at the
end.

- **test AUC**: mean ± sample standard deviation over seeds. A seed sets initialization, hashing and the order of the
  examples, so that luck with collisions is part of the spread.
- **difference to full**: of the same seed, on the same test rows; mean over seeds and [lowest, highest].
- **95 % ≠ 0**: in how many seeds the 95 % interval of the difference (paired bootstrap, {resamples} resamples of the
  test rows) lies below (↓) or above (↑) zero.
- **infeasible**: the method cannot be that small; the floor is the least budget that works."""


def _names(item: Point | Difference, summary: Summary) -> tuple[str, ...]:
    return (item.variant, item.method, item.budget) if summary.config.variants else (item.method, item.budget)


def _names_header(summary: Summary) -> tuple[str, ...]:
    return ("variant", "method", "budget") if summary.config.variants else ("method", "budget")


def _detail(points: Sequence[Point], summary: Summary) -> str:
    done = [point for point in points if point.num_ok]
    columns = [name for name in DETAIL if any(math.isfinite(point.mean(name)) for point in done)]
    if not done or not columns:
        return ""
    rows = [(*_names(point, summary), *(_measured(name, point.mean(name)) for name in columns)) for point in done]
    return _table((*_names_header(summary), *(DETAIL[name] for name in columns)), rows)


def _measured(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if name.endswith("_bytes"):
        return format_bytes(int(value))
    if name == "collision_share":
        return _percent(value)
    if "auc" in name or name.endswith(("entropy", "calibration")):
        return f"{value:.4f}"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *escaped]) for i in range(len(header))]
    right = [name not in ("variant", "method", "note") for name in header]
    rule = ["-" * (width - 1) + (":" if is_right else "-") for width, is_right in zip(widths, right)]
    lines = [list(header), rule, *escaped]
    return "\n".join(
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) + " |"
        for row in lines
    )


def _difference(point: Point) -> str:
    values = [item.difference for item in point.differences]
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:+.4f} [{min(values):+.4f}, {max(values):+.4f}]" if len(values) > 1 else f"{mean:+.4f}"


def _excluding_zero(point: Point) -> str:
    if not point.differences:
        return ""
    below = sum(item.high < 0 for item in point.differences)
    above = sum(item.low > 0 for item in point.differences)
    arrows = "".join(f"{number}{arrow} " for number, arrow in ((below, "↓"), (above, "↑")) if number)
    return f"{arrows or '0 '}of {len(point.differences)}"


def _spread(mean: float, std: float) -> str:
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.4f} ± {std:.4f}" if math.isfinite(std) else f"{mean:.4f}"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
