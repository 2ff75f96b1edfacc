"""How the time of a step grows: with a table's rows and width, the batch, the ids of a bag and the number of tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks import ours, rivals
from benchmarks.jobs import BATCH, DIM, ROWS
from benchmarks.results import Results
from benchmarks.workload import BAGS, ONE_ID
from embtables._util.files import replacing
from embtables.sweeps.figure import COLORS, MARKERS, STYLE

FIGURE = "scaling.svg"
_LENGTH = "10 ids"
#: Axis of the figure -> what else all its points have in common.
AXES = {
    "rows of one table": f"bags of {_LENGTH}, batch {BATCH:,}",
    "embedding_dim": f"one table of {ROWS:,} rows, bags of {_LENGTH}, batch {BATCH:,}",
    "batch": f"one table of {ROWS:,} rows, bags of {_LENGTH}",
    "ids of a bag": f"one table of {ROWS:,} rows, batch {BATCH:,}",
    "tables": "10,000 rows each, one id each, batch 256",
}


class Point(NamedTuple):
    """Milliseconds that the quickest arrangement of each contestant takes at ``value`` of an axis."""

    axis: str
    value: int
    milliseconds: dict[str, float]


def points(results: Results) -> list[Point]:
    """Those that were measured, axis by axis."""
    return [
        Point(axis, value, times)
        for axis in AXES
        for value, rows in sorted(_groups(results, axis), key=lambda group: group[0])
        if (times := _quickest(rows))
    ]


def _groups(results: Results, axis: str) -> Iterator[tuple[int, pd.DataFrame]]:
    rows = pd.concat([results.select(s, phase="step", threads=results.threads) for s in ("pooled", "scaling")])
    # "1,000 rows", or "10 × 1,000 rows"
    parts = rows["scale"].str.extract(r"^(?:([\d,]+) × )?([\d,]+) rows$")
    tables, of_one = (parts[i].fillna("1").str.replace(",", "").astype(int) for i in (0, 1))
    single = (tables == 1) & parts[1].notna()
    common = (rows["bags"] == _LENGTH) & (rows["batch"] == BATCH)
    usual = rows["dim"] == DIM
    base = single & (of_one == ROWS) & usual
    chosen, values = {
        "rows of one table": (single & common & usual, of_one),
        "embedding_dim": (single & common & (of_one == ROWS), rows["dim"]),
        "batch": (base & (rows["bags"] == _LENGTH), rows["batch"]),
        "ids of a bag": (
            base & rows["bags"].isin([ONE_ID, "10 ids", "50 ids"]) & (rows["batch"] == BATCH),
            rows["bags"].map(BAGS),
        ),
        "tables": ((of_one == 10_000) & (rows["bags"] == ONE_ID) & (rows["batch"] == 256), tables),
    }[axis]
    for value, group in rows[chosen].groupby(values[chosen]):
        yield int(value), group


def _quickest(rows: pd.DataFrame) -> dict[str, float]:
    """Row-wise Adagrad, or Adagrad where there is no such thing."""
    wanted = {
        rivals.LOOP: "adagrad",
        rivals.FLAT: "adagrad",
        ours.FULL: "rowwise_adagrad",
        rivals.TBE: "rowwise_adagrad",
    }
    names = rows["contestant"].map(rivals.rival_of)
    same = rows[rows["optimizer"] == names.map(wanted)]
    return same.groupby(names[same.index], sort=False)["median_ms"].min().to_dict()


def draw(found: list[Point], path: Path) -> None:
    """The points as lines, an axis of them in each panel."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for point in found for name in point.milliseconds))
    with plt.rc_context(STYLE):
        figure = Figure(figsize=(13, 7.2), layout="constrained")
        FigureCanvasSVG(figure)
        panels = list(figure.subplots(2, 3).flat)
        for axes in panels:
            axes.set_axis_off()
        for axes, (axis, common) in zip(panels, AXES.items()):
            if all(point.axis != axis for point in found):
                continue
            axes.set_axis_on()
            for name, color, marker in zip(names, COLORS, MARKERS):
                there = [(p.value, p.milliseconds[name]) for p in found if p.axis == axis and name in p.milliseconds]
                axes.plot(*zip(*there or [(math.nan, math.nan)]), color=color, marker=marker, markersize=5, label=name)
            axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms a step")
            axes.set_title(common, fontsize=9)
            handles = axes.get_lines()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
