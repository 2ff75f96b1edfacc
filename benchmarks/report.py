"""From the CSV of a run to Markdown: targets, tables, where a rival is faster, and what not to trust.

    python -m benchmarks.report runs/bench            # one run
    python -m benchmarks.report docs/results/speed    # a folder of the runs of several machines

writes ``report.md`` anew beside ``results.csv``; of several runs that of each, and one that has them side by side. Its
parts stand between comments, from which other pages take them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks import bags, machine, ours, rivals, scaling, small
from benchmarks.results import (
    DAGGER,
    FULL,
    RESULTS,
    Measured,
    Results,
    default_ops,
    memory_rows,
    ratio,
    rendered,
    row_of,
)
from benchmarks.targets import side_by_side, targets
from benchmarks.timing import OTHERS
from benchmarks.workload import BAGS, ONE_ID, UNEVEN

REPORT = "report.md"
NOT_MEASURED = "Not measured."
#: Suites in which others do the same as full tables, and what that is called where it is not lookups or steps alone.
WORK = {
    **{"tables": "", "pooled": "", "small": "", "scaling": ""},
    **{"sequence": "whole sequence model's", "dlrm": "whole DLRM"},
}
COLUMNS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "dense adam")


# ---- tables ----------------------------------------------------------------------------------------------------------


def _milliseconds(row: pd.Series) -> str:
    value = row["median_ms"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2f}"


def _mark(row: pd.Series) -> str:
    return f" {DAGGER}" if row["distrust"] else ""


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    row = rows.sort_values("sitting").iloc[0]
    return _milliseconds(row) + _mark(row)


def headline(results: Results) -> str:
    """Milliseconds of forward and step by contestant and optimizer."""
    forward, step = results.configuration(phase="forward"), results.configuration()
    names = list(dict.fromkeys([*step["contestant"], *forward["contestant"]]))
    lines = [["ms", "forward", *(f"step, {c.replace('_', '-')}" for c in COLUMNS)], ["---", *["---:"] * 6]]
    for name in names:
        cells = [_cell(row_of(step, (name, optimizer))) for optimizer in COLUMNS]
        lines.append([name, _cell(forward[forward["contestant"] == name]), *cells])
    return rendered(lines)


def details(results: Results) -> str:
    """Median, minimum and CPU time of everything in the main configuration."""
    lines = [["ms", "optimizer", "phase", "median", "min", "CPU", "calls"], ["---", "---", "---", *["---:"] * 4]]
    for phase in ("forward", "step"):
        for _, row in results.configuration(phase=phase).iterrows():
            times = [f"{row[name]:.2f}" for name in ("median_ms", "min_ms", "cpu_ms")]
            times[0] += _mark(row)
            optimizer = row["optimizer"].replace("_", "-") if phase == "step" else ""
            lines.append([row["contestant"], optimizer, phase, *times, f"{row['calls']:.0f}"])
    return rendered(lines)


def axes(results: Results) -> str:
    """Milliseconds of a step in every configuration, with row-wise Adagrad, else Adagrad, else SGD."""
    rows = results.select("tables", phase="step")
    keys = ["scale", "dim", "batch", "threads", "ops"]
    configurations = list(rows.groupby(keys, sort=False).groups)
    lines = [["step, ms", *(_configuration(key, results) for key in configurations)]]
    lines.append(["---", *["---:"] * len(configurations)])
    for name in rows["contestant"].unique():
        chosen = next((o for o in ("rowwise_adagrad", "adagrad", "sgd") if len(row_of(rows, (name, o)))), None)
        if chosen is None:
            continue
        mine = row_of(rows, (name, chosen))
        cells = [_cell(mine[(mine[keys] == list(key)).all(axis=1)]) for key in configurations]
        lines.append([f"{name}, {chosen.replace('_', '-')}", *cells])
    return rendered(lines)


def _configuration(key: tuple[str, float, float, float, str], results: Results) -> str:
    scale, dim, batch, threads, ops = key
    text = f"{scale}, D = {dim:.0f}, B = {batch:.0f}, {threads:.0f} thr."
    return text if ops == "native" or results.ok["ops"].nunique() < 2 else f"{text}, {ops} ops"


def whole_steps(results: Results) -> str:
    """Examples a second of a DLRM step, and the share of the tables."""
    kinds = [("1/10", "fp32"), ("1/10", "bf16"), ("1/1", "fp32")]
    header = ["DLRM step", "optimizer of the tables"]
    for scale, precision in kinds:
        header += [f"{scale}, {precision}: examples/s", "tables"]
    lines = [header, ["---", "---", *["---:"] * 6]]
    rows = results.select("dlrm", threads=results.threads)
    for name, optimizer in dict.fromkeys(zip(rows["contestant"], rows["optimizer"])):
        cells = []
        for scale, precision in kinds:
            found = row_of(rows[(rows["scale"] == scale) & (rows["precision"] == precision)], (name, optimizer))
            if found.empty:
                cells += ["", ""]
                continue
            row = found.sort_values("sitting").iloc[0]
            cells += [f"{row['examples_per_second']:,.0f}{_mark(row)}", f"{row['table_share']:.0%}"]
        lines.append([name, optimizer.replace("_", "-"), *cells])
    return rendered(lines)


def parts_of_a_step(results: Results) -> str:
    """Where the milliseconds of a step over full tables go, in both precisions, as it is and compiled."""
    rows = results.select("step", phase="step")
    names = [name for name in rows if name.endswith(" ms")]
    lines = [["DLRM step, ms", "whole", "tables", *(name.removesuffix(" ms") for name in names)]]
    lines.append(["---", *["---:"] * (2 + len(names))])
    for _, row in rows.iterrows():
        name = f"{row['contestant']}, {row['precision']}, {row['mode']}"
        parts = [f"{row[part]:.2f}" for part in names]
        lines.append([name, f"{row['median_ms']:.2f}{_mark(row)}", f"{row['table_share']:.0%}", *parts])
    return rendered(lines)


def pooled_bags(results: Results) -> str:
    """Microseconds of inference over one table, by the length of the bags, and the time of ``PLAIN`` over each."""
    rows = results.select("bags")
    lengths = [f"bags of {length}" for length in bags.LENGTHS]
    lines = [["inference, µs", "table", *(f"{name}{extra}" for name in lengths for extra in ("", ": ×"))]]
    lines.append(["---", "---", *["---:"] * (2 * len(lengths))])
    for (scale, dim), table in rows.groupby(["scale", "dim"], sort=False):
        for name in table["contestant"].unique():
            cells = []
            for phase in lengths:
                same = table[table["phase"] == phase]
                against = ratio(same, (bags.PLAIN, ""), (name, ""))
                row = row_of(same, (name, "")).iloc[0]
                cells += [
                    f"{1e3 * row['median_ms']:,.0f}{_mark(row)}",
                    "" if against is None else f"{against.value:.2f}",
                ]
            lines.append([name, f"{scale}, D = {dim:.0f}", *cells])
    return rendered(lines)


def _quickest(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Of the arrangements of a rival, under its name, the quickest at each of ``keys``."""
    rows = rows.assign(contestant=rows["contestant"].map(rivals.rival_of))
    best = rows.sort_values("median_ms").drop_duplicates([*keys, "contestant", "optimizer"])
    return best.sort_index()


def _grid(
    rows: pd.DataFrame,
    head: str,
    labels: Sequence[str],
    columns: Mapping[str, tuple[str, Any]],
    cell: Callable[[pd.Series], str],
) -> str:
    """A row for each combination of ``labels``; ``columns``: heading -> column of ``rows`` and value there."""
    lines = [[head, *columns], ["---", *["---:"] * len(columns)]]
    for values, group in rows.groupby(list(labels), sort=False):
        name = ", ".join(str(value).replace("_", "-") for value in values if value)
        found = [group[group[column] == value] for column, value in columns.values()]
        lines.append([name, *("" if each.empty else cell(each.iloc[0]) for each in found)])
    return rendered(lines)


def _microseconds(row: pd.Series) -> str:
    value = 1e3 * row["median_ms"]
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + _mark(row)


def pooled(results: Results) -> str:
    """Microseconds in training tables with bags: of one table by batch, of the 26 by bags."""
    rows = results.select("pooled")
    if rows.empty:
        return NOT_MEASURED
    rows = _quickest(rows, ["scale", "bags", "batch", "threads", "phase"]).assign(
        threads_label=lambda r: r["threads"].map(_threads)
    )
    one = rows["scale"].str.endswith(" rows")
    batches = {f"batch {batch:,.0f}": ("batch", batch) for batch in sorted(rows[one]["batch"].unique())}
    texts = []
    for phase in ("forward", "step"):
        for length in BAGS:
            found = rows[one & (rows["phase"] == phase) & (rows["bags"] == length)]
            if len(found):
                labels = ["threads_label", "contestant", *(["optimizer"] if phase == "step" else [])]
                head = f"{phase}, {found.iloc[0]['scale']}, {_bags(length)}, µs"
                texts.append(_grid(found.sort_values("threads", kind="stable"), head, labels, batches, _microseconds))
    for phase in ("forward", "step"):
        found = rows[~one & (rows["phase"] == phase)]
        if len(found):
            labels = ["contestant", *(["optimizer"] if phase == "step" else [])]
            columns = {_bags(length): ("bags", length) for length in found["bags"].unique()}
            head = f"{phase}, 26 tables, five of them with bags, batch {found.iloc[0]['batch']:,.0f}, µs"
            texts.append(_grid(found, head, labels, columns, _microseconds))
    return "\n\n".join(texts)


def _bags(length: str) -> str:
    if length == ONE_ID:
        return length
    return "uneven bags" if length == UNEVEN else f"bags of {length}"


def _threads(number: float) -> str:
    return f"{number:.0f} {'threads' if number > 1 else 'thread'}"


def small_calls(results: Results) -> str:
    """Microseconds of small calls: their median, and that within which 99 of 100 are."""
    rows = results.select("small")
    if rows.empty:
        return NOT_MEASURED
    keys = ["scale", "batch", "threads", "phase", "precision"]
    rows = _quickest(rows, keys).assign(threads_label=lambda r: r["threads"].map(_threads))

    def cell(row: pd.Series) -> str:
        return f"{_microseconds(row)} / {1e3 * row['p99_ms']:,.0f}"

    threads = {_threads(number): ("threads", number) for number in sorted(rows["threads"].unique())}
    texts = []
    for phase, what in (("step", "a step"), ("forward", "a lookup")):
        found = rows[rows["phase"] == phase]
        head = f"{what}, {found.iloc[0]['scale']}, batch {found.iloc[0]['batch']:.0f}, µs: p50 / p99"
        texts.append(_grid(found, head, ["contestant"], threads, cell))
    served = rows[rows["phase"] == "served"].sort_values("threads", kind="stable")
    batches = {f"batch {batch:,.0f}": ("batch", batch) for batch in sorted(served["batch"].unique())}
    head = f"served, {served.iloc[0]['scale']}, µs: p50 / p99"
    texts.append(_grid(served, head, ["threads_label", "contestant", "precision"], batches, cell))
    return "\n\n".join(texts)


def sequences(results: Results) -> str:
    """Milliseconds of a step of a small model of histories."""
    rows = results.select("sequence")
    if rows.empty:
        return NOT_MEASURED
    pairs = sorted(set(zip(rows["threads"], rows["batch"])))
    rows = rows.assign(where=list(zip(rows["threads"], rows["batch"])))
    columns = {f"batch {batch:,.0f}, {_threads(number)}": ("where", (number, batch)) for number, batch in pairs}
    return _grid(rows, "step, ms", ["contestant", "optimizer"], columns, lambda row: _milliseconds(row) + _mark(row))


def growth(results: Results) -> str:
    """Milliseconds of a step along each axis, and the figure of them."""
    found = scaling.points(results)
    if not found:
        return NOT_MEASURED
    names = list(dict.fromkeys(name for point in found for name in point.milliseconds))
    lines = [["step, ms", "", *names], ["---", "---:", *["---:"] * len(names)]]
    for axis, value, times in found:
        cells = [f"{times[name]:,.3g}" if name in times else "" for name in names]
        lines.append([f"{axis}; {scaling.AXES[axis]}", f"{value:,}", *cells])
    return f"{rendered(lines)}\n\n![milliseconds of a step]({scaling.FIGURE})"


def optimizers(results: Results) -> str:
    """What ``optimizer=None`` costs against the fused optimizers."""
    rows = results.select("step", phase="optimizer")
    lines = [["step of full tables", "ms", "against the first"], ["---", "---:", "---:"]]
    for _, row in rows.iterrows():
        ratio = f"{row['median_ms'] / rows.iloc[0]['median_ms']:.1f}×"
        lines.append([f"`{row['contestant']}`", f"{_milliseconds(row)}{_mark(row)}", ratio])
    return rendered(lines)


def end_to_end(results: Results) -> str:
    rows = results.select("frameworks")
    lines = [["end to end", "examples/s", "of each run", "peak memory"], ["---", "---:", "---:", "---:"]]
    for name in rows["contestant"].unique():
        mine = rows[rows["contestant"] == name]
        each = ", ".join(f"{value:,.0f}" for value in mine["examples_per_second"])
        peak = f"{mine['peak_bytes'].max() / 1e9:.2f} GB"
        lines.append([name, f"{mine['examples_per_second'].median():,.0f}", each, peak])
    return rendered(lines)


def data(results: Results) -> str:
    """Rows a second of wall clock, and of the CPU time of all threads."""
    lines = [["text and prepared data", "rows/s", "rows per second of CPU"], ["---", "---:", "---:"]]
    for _, row in results.select("data").iterrows():
        wall, cpu = (1e3 * row["rows"] / row[name] for name in ("median_ms", "cpu_ms"))
        lines.append([row["contestant"], f"{wall:,.0f}{_mark(row)}", f"{cpu:,.0f}"])
    return rendered(lines)


def memory(results: Results) -> str:
    lines = [["training", "tables", "plan's training bytes", "peak above the dense part's", "ratio"]]
    lines.append(["---", "---", *["---:"] * 3])
    for name, optimizer, row, value in memory_rows(results):
        planned = f"{row['training_bytes'] / 1e6:,.0f} MB"
        above = f"{value * row['training_bytes'] / 1e6:,.0f} MB"
        lines.append([f"{name}, {optimizer.replace('_', '-')}", row["scale"], planned, above, f"{value:.2f}"])
    return rendered(lines)


def description(results: Results) -> str:
    """The machine, its ceilings, and what was left out."""
    info = results.run.get("machine", {})
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in info.items()]
    for _, row in results.select("machine").iterrows():
        threads = _threads(row["threads"])
        if row["contestant"] == "copy":
            lines.append(f"- copy, {threads}: {row['bytes_per_second'] / 1e9:.1f} GB/s read and written")
        else:
            lines.append(
                f"- {row['contestant']}, 64 bytes each, {threads}: {row['rows_per_second'] / 1e6:.0f} M rows/s"
            )
    return "\n".join(lines)


def skipped(results: Results) -> str:
    rows = results.rows[results.rows["status"].isin(["skipped", "failed"])]
    lines = [f"- {_where(row)}: {row['reason']}" for _, row in rows.iterrows()]
    return "\n".join(dict.fromkeys(lines)) or "Nothing was left out."


# ---- honesty ---------------------------------------------------------------------------------------------------------


class Lead(NamedTuple):
    """A comparison of equal work in which a rival's quickest arrangement, ``how``, took less time than we did."""

    rival: str
    how: str
    work: str
    where: str
    batch: int
    measured: Measured


def _leads(results: Results) -> tuple[list[Lead], int]:
    """All of them, and how many comparisons there are."""
    rows = default_ops(pd.concat([results.select(suite) for suite in WORK]))
    rows = rows[(rows["kind"] != "ceiling") & ~rows["contestant"].isin([rivals.QR, small.DENSE, small.SPARSE])]
    found, compared = [], 0
    keys = ["suite", "scale", "dim", "bags", "batch", "threads", "precision", "phase"]
    for (suite, scale, dim, length, batch, threads, precision, phase), group in rows.groupby(keys, sort=False):
        others = group[~group["contestant"].str.startswith("embtables")]
        others = others.assign(rival=others["contestant"].map(rivals.rival_of))
        for (rival, optimizer), arrangements in others.groupby(["rival", "optimizer"], sort=False):
            # A forward has no optimizer; the tables that it was measured on have one all the same.
            mine = FULL if phase == "forward" else (ours.FULL, optimizer)
            measured = {name: ratio(group, (name, optimizer), mine) for name in arrangements["contestant"]}
            there = {name: each for name, each in measured.items() if each is not None}
            if not there:
                continue
            compared += 1
            name = min(there, key=lambda name: there[name].value)
            if there[name].value < 1:
                work = f"step with {optimizer.replace('_', '-')}" if phase == "step" else phase
                what = " ".join(filter(None, (WORK[suite], work))) + (f" ({precision})" if suite == "dlrm" else "")
                where = [scale, f"D = {dim:.0f}", *([] if length == ONE_ID else [_bags(length)]), _threads(threads)]
                how = name.removeprefix(rival).removeprefix(", ")
                found.append(Lead(rival, how, what, ", ".join(where), int(batch), there[name]))
    return found, compared


def _said_of_leads(leads: list[Lead], compared: int, lines: list[str]) -> str:
    if not compared:
        return "Nothing was compared."
    if not leads:
        return f"In none of {compared} comparisons of equal work was a rival faster."
    return f"In {len(leads)} of {compared} comparisons of equal work a rival is faster:\n\n" + "\n".join(lines)


def faster_rivals(results: Results) -> str:
    """Every lead of a rival, a line for each rival, work and configuration."""
    leads, compared = _leads(results)
    found: dict[str, list[str]] = {}
    for lead in leads:
        said = f"{lead.measured.value:.2f}× our time at batch {lead.batch}" + (f" ({lead.how})" if lead.how else "")
        mark = f" {DAGGER}" if lead.measured.doubts else ""
        found.setdefault(f"- {lead.rival}, {lead.work}, {lead.where}", []).append(said + mark)
    return _said_of_leads(leads, compared, [f"{head}: {', '.join(each)}" for head, each in found.items()])


def faster_in_short(results: Results) -> str:
    """The same, a line for each rival and work: how often, by how much, and at which batches."""
    leads, compared = _leads(results)
    lines = []
    for rival, work in dict.fromkeys((lead.rival, lead.work) for lead in leads):
        own = [lead for lead in leads if (lead.rival, lead.work) == (rival, work)]
        times, batches = sorted(lead.measured.value for lead in own), sorted(lead.batch for lead in own)
        spread = f"{times[0]:.2f}×" + (f" to {times[-1]:.2f}×" if len(own) > 1 else "")
        at = f"batches of {batches[0]} to {batches[-1]}" if batches[0] < batches[-1] else f"batch {batches[0]}"
        often = "once" if len(own) == 1 else f"{len(own)} times"
        lines.append(f"- {rival}, {work}: {often}, {spread} our time, at {at}")
    return _said_of_leads(leads, compared, lines)


def noise(results: Results) -> str:
    """Whether the run can be believed, and the rows that cannot."""
    timed = results.ok[results.ok["median_ms"].notna()]
    if timed.empty:
        return "Nothing was timed."
    lines = []
    busy = timed[timed["others"] > OTHERS]
    if len(busy):
        lines.append(
            f"The machine was too noisy: other processes took up to {busy['others'].max():.0%} of it while "
            f"{len(busy)} of {len(timed)} rows were measured. Run again when it is idle."
        )
    doubtful = timed[timed["distrust"] != ""]
    if len(doubtful):
        lines.append(f"Do not trust these {len(doubtful)} of {len(timed)} rows (marked {DAGGER}):\n")
        lines += [f"- {_where(row)}: {row['distrust']}" for _, row in doubtful.iterrows()]
    if not lines:
        others = timed["others"].max()
        said = f"; other processes took at most {others:.1%} of it" if others == others else ""
        lines.append(f"The machine was quiet enough for all {len(timed)} rows{said}.")
    return "\n".join(lines)


def _where(row: pd.Series) -> str:
    bags_of = "" if row["bags"] == ONE_ID else row["bags"]
    parts = [row["suite"], row["contestant"], row["optimizer"], row["phase"], row["precision"], bags_of]
    for name, label in (("scale", ""), ("dim", "D = "), ("batch", "batch "), ("threads", "threads ")):
        if name in row and row[name] == row[name]:
            value = row[name] if isinstance(row[name], str) else f"{int(row[name])}"
            parts.append(f"{label}{value}")
    return ", ".join(part for part in parts if part)


# ---- the page --------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "faster": ("Where a rival is faster", faster_rivals),
    "targets": ("Targets", targets),
    "headline": ("Tables: 1/10, D = 16, batch 2048", headline),
    "axes": ("Tables: other configurations", axes),
    "pooled": ("Bags: forward and step, every rival at its quickest", pooled),
    "bags": ("Bags of one table, one thread, against `nn.EmbeddingBag`", pooled_bags),
    "small": ("Small calls", small_calls),
    "sequence": ("A step of a small model of histories", sequences),
    "scaling": ("How the time of a step grows", growth),
    "dlrm": ("A whole DLRM step", whole_steps),
    "step": ("Parts of a step", parts_of_a_step),
    "optimizers": ("What optimizer=None costs", optimizers),
    "frameworks": ("End to end", end_to_end),
    "data": ("Data", data),
    "memory": ("Peak memory", memory),
    "details": ("Tables: 1/10, D = 16, batch 2048, with minimum and CPU time", details),
    "machine": ("The machine", description),
    "noise": ("What to trust", noise),
    "skipped": ("Left out", skipped),
}


def part(text: str, name: str) -> str:
    """A part of ``report.md``; ValueError where it has none of that name."""
    found = re.search(f"<!-- part:{re.escape(name)} -->\n(.*?)\n<!-- /part -->", text, re.S)
    if found is None:
        raise ValueError(f"the report has no part '{name}'; it has {', '.join(PARTS)}")
    return found[1]


def _section(name: str, title: str, text: str) -> str:
    """A part between the comments by which ``part`` finds it."""
    return f"## {title}\n\n<!-- part:{name} -->\n{text}\n<!-- /part -->"


def page(results: Results) -> str:
    parts = [_section(name, title, make(results)) for name, (title, make) in PARTS.items()]
    return "# Speed\n\n" + "\n\n".join(parts) + "\n"


def of_machines(folder: Path) -> dict[str, Results]:
    """The runs of the folders in this one, by what their machines are, in the order of their names.

    Raises:
        ValueError: where two are of machines that look alike.
    """
    runs: dict[str, Results] = {}
    for csv in sorted(folder.glob(f"*/{RESULTS}")):
        results = Results.read(csv.parent)
        name = machine.label(results.run.get("machine", {}))
        if name in runs:
            raise ValueError(f"{folder} holds two runs of {name}: keep one of them")
        runs[name] = results
    return runs


def common_page(runs: Mapping[str, Results]) -> str:
    """What several runs have to say together."""
    by_machine = {
        "faster": ("Where a rival is faster", faster_in_short),
        "machine": ("The machines", description),
    }
    parts = []
    for name, (title, make) in by_machine.items():
        each = "\n\n".join(f"**{label}**\n\n{make(results)}" for label, results in runs.items())
        parts.append(_section(name, title, each))
    parts.insert(1, _section("targets", "Targets", side_by_side(runs)))
    return "# Speed, on several machines\n\n" + "\n\n".join(parts) + "\n"


def write(folder: Path) -> str:
    """Writes the report of a run, or of the runs of a folder's folders, and returns it.

    Raises:
        ValueError: where there are no results.
    """
    several = not (folder / RESULTS).is_file() and of_machines(folder)
    if several:
        for csv in folder.glob(f"*/{RESULTS}"):
            write(csv.parent)
        text = common_page(several)
    else:
        results = Results.read(folder)
        text = page(results)
        if found := scaling.points(results):
            scaling.draw(found, folder / scaling.FIGURE)
    (folder / REPORT).write_text(text, encoding="utf-8")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"holds the {RESULTS} of a run, or folders that do")
    try:
        print(write(parser.parse_args().folder))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
