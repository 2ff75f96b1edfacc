"""The accuracy-memory figure of a sweep."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embtables._util.files import replacing
from embtables._util.names import number_of
from embtables.sizes.memory import format_bytes
from embtables.sweeps.cells import MethodSpec, labels_of
from embtables.sweeps.summary import DROP, FEWER, Point, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which the color-blind can tell apart, without the yellow that is too faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195", "#5C4033")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "*")
# By kind, and whether vectors are projected.
_BASELINES: dict[tuple[Any, bool], tuple[str, str, Any]] = {
    (DROP, False): ("features dropped", "x", (0, (1, 1.5))),
    ("frequency_cutoff", False): ("rare ids cut off", "+", (0, (5, 2))),
    (FEWER, False): ("fewer dimensions", "1", (0, (3, 1, 1, 1))),
    (FEWER, True): ("fewer dimensions, projected", "2", (0, (6, 1))),
}
_GRAY = "#666666"
# Of the forms of one baseline, such as its precisions.
_GRAYS = (_GRAY, "#a0a0a0", "#2e2e2e", "#c4c4c4")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.fonttype": "none",
    "svg.hashsalt": "embtables",
}


@dataclass(frozen=True)
class _Style:
    """How a method is drawn."""

    label: str
    color: str
    marker: str
    dashes: Any = "-"
    is_baseline: bool = False


def draw(summary: Summary, target: Path) -> list[Path]:
    """Draw test AUC against the bytes of the served tables to `target` with .png and .svg; returns the paths.

    A point is the mean over seeds, its bar the range of the seeds. The full tables are a horizontal band; those served
    in another precision are points. Methods stand in the legend by their AUC at the smallest budget, best on top.
    """
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plt.rc_context(STYLE):
        # The legend needs its height beside the axes, above the note on what is infeasible, and its width.
        curves = _curves(summary)
        longest = max(map(len, curves), default=0)
        size = max(9.2, 5.2 + 0.087 * longest), max(5.0, 1.5 + 0.27 * (1 + len(curves)))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw_full(axes, summary)
        _draw_methods(axes, summary)
        _mark_dropped(axes, summary)
        _label_axes(axes, summary)
        _footnote(figure, summary)
        paths = [Path(f"{target}{suffix}") for suffix in (".png", ".svg")]
        for path in paths:
            with replacing(path) as temporary:
                undated = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(temporary, format=path.suffix[1:], dpi=160, metadata=undated)
    return paths


def _draw_full(axes: Axes, summary: Summary) -> None:
    full = summary.full
    if full is None or not full.num_ok:
        return
    low, high = full.rows["test_auc"].min(), full.rows["test_auc"].max()
    size = full.inference_bytes or 0
    axes.axhspan(low, high, color="black", alpha=0.10, linewidth=0)
    label = "full tables" if full.method in labels_of("full") else full.method
    axes.axhline(full.mean("test_auc"), color="black", linewidth=1.2, label=label)
    axes.plot([size], [full.mean("test_auc")], marker="o", color="black", markersize=5)
    axes.annotate(
        f"full: {format_bytes(size)}",
        (1.0, full.mean("test_auc")),
        xycoords=("axes fraction", "data"),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
    )


def _draw_methods(axes: Axes, summary: Summary) -> None:
    curves = _curves(summary)
    styles = _styles({name: summary.config.methods[name] for name in curves})
    for name, curve in sorted(curves.items(), key=lambda item: -item[1][0].mean("test_auc")):
        style = styles[name]
        means = [point.mean("test_auc") for point in curve]
        below = [mean - point.rows["test_auc"].min() for mean, point in zip(means, curve)]
        above = [point.rows["test_auc"].max() - mean for mean, point in zip(means, curve)]
        is_thin = style.marker in "x+12"
        axes.errorbar(
            [point.inference_bytes or math.nan for point in curve],
            means,
            yerr=[below, above],
            color=style.color,
            marker=style.marker,
            markersize=6,
            markeredgecolor=style.color if is_thin else "white",
            markeredgewidth=1.6 if is_thin else 0.8,
            linewidth=1.2 if style.is_baseline else 1.6,
            linestyle=style.dashes,
            elinewidth=1.1,
            capsize=2.5,
            label=style.label,
            zorder=2 if style.is_baseline else 3,
        )


def _styles(methods: Mapping[str, MethodSpec]) -> dict[str, _Style]:
    """Gray for the baselines, each with its own dashes, black for full tables, and a color for every other method."""
    found: dict[str, _Style] = {}
    alike: Counter[object] = Counter()
    for name, spec in methods.items():
        fields = {"kind": spec} if isinstance(spec, str) else dict(spec)
        kind, is_projected = fields.pop("kind", None), bool(fields.pop("projection", False))
        baseline = _BASELINES.get((kind, is_projected))
        group = baseline or kind == "full"
        number = alike[group]
        alike[group] += 1
        if baseline is not None:
            label, marker, dashes = baseline
            options = (str(value) if key == "precision" else f"{key}={value}" for key, value in fields.items())
            gray = _GRAYS[number % len(_GRAYS)]
            found[name] = _Style(", ".join([label, *options]), gray, marker, dashes, is_baseline=True)
        elif kind == "full":
            found[name] = _Style(name, "black", MARKERS[(number + 1) % len(MARKERS)], "none")
        else:
            found[name] = _Style(name, COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)])
    return found


def _curves(summary: Summary) -> dict[str, list[Point]]:
    """Of each method the points that have results and bytes, from the smallest up; not what is drawn as the band."""
    drawn = [point for point in summary.points if point is not summary.full and point.inference_bytes]
    drawn.sort(key=lambda point: point.inference_bytes or 0)
    found = {name: [point for point in drawn if point.method == name] for name in summary.config.methods}
    return {name: curve for name, curve in found.items() if curve}


def _mark_dropped(axes: Axes, summary: Summary) -> None:
    """Dropped features that the axes cannot show.

    Where no table is left there are no bytes: a dotted line. Where they are far below all else they would squeeze the
    rest: they leave at the bottom edge.
    """
    others = [point for point in summary.points if point.kind != DROP and point.num_ok]
    dropped = [point for point in summary.points if point.kind == DROP and point.num_ok]
    if not others or not dropped:
        return
    low = min(point.rows["test_auc"].min() for point in others)
    high = max(point.rows["test_auc"].max() for point in [*others, *dropped])
    span = high - low
    # Budgets that leave nothing but the smallest tables come out at one size.
    by_size = {point.inference_bytes or 0: point.mean("test_auc") for point in dropped}
    far = {size: value for size, value in by_size.items() if span > 0 and value < low - 0.4 * span}
    if far:
        axes.set_ylim(low - 0.18 * span, high + 0.08 * span)
    for size, value in far.items():
        if size:
            axes.text(size, 0.012, f"↓ {value:.3f}", transform=axes.get_xaxis_transform(), color=_GRAY, fontsize=9)
        else:
            text = f"↓ without any table {value:.3f}"
            axes.text(0.06, 0.012, text, transform=axes.transAxes, color=_GRAY, fontsize=9)
    if 0 in by_size and 0 not in far:
        axes.axhline(by_size[0], color=_GRAY, linewidth=0.9, linestyle=(0, (1, 3)), label="no table left (0 B)")


def _label_axes(axes: Axes, summary: Summary) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0,), numticks=12))
    low, high = axes.get_xlim()
    if math.log10(high / low) < 3:
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
    axes.set_xlabel("bytes of the served tables")
    axes.set_ylabel("test AUC")
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    config = summary.config
    most = f"up to {config.seeds}" if config.best is not None else f"{config.seeds}"
    seeds = "1 seed" if config.seeds == 1 else f"mean and range of {most} seeds"
    unfinished = f" · unfinished: {summary.num_finished} of {number_of(summary.num_expected, 'cell')}"
    unfinished = unfinished if summary.is_partial else ""
    axes.set_title(f"{summary.title} · {seeds}{unfinished}", loc="left", fontsize=11, pad=26)
    full = summary.full
    size = full.rows["full_bytes"].max() if full is not None and full.num_ok else 0
    if size > 0:
        share = axes.secondary_xaxis("top", functions=(lambda x: np.asarray(x) / size, lambda x: np.asarray(x) * size))
        share.xaxis.set_minor_locator(NullLocator())
        share.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g} %"))
        share.spines["top"].set_visible(False)
        share.tick_params(length=0, labelsize=8.5, labelcolor=_GRAY, pad=0)
        axes.annotate(
            "of the full tables",
            (1.0, 1.0),
            xycoords="axes fraction",
            xytext=(8, 2),
            textcoords="offset points",
            fontsize=8.5,
            color=_GRAY,
        )
    handles, labels = axes.get_legend_handles_labels()
    # Full comes first; the others are in the order of their smallest budget's AUC.
    axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.01, 0.97),
        frameon=False,
        handlelength=2.6,
        labelspacing=0.75,
    )


def _footnote(figure: Figure, summary: Summary) -> None:
    floors: dict[tuple[str, int], list[str]] = {}
    for point in summary.points:
        if point.floor_bytes is not None:
            floors.setdefault((point.method, point.floor_bytes), []).append(point.budget)
    if floors:
        parts = [f"{name} at {', '.join(at)} (floor {format_bytes(size)})" for (name, size), at in floors.items()]
        text = textwrap.fill(f"Infeasible: {'; '.join(parts)}.", 125)
        figure.supxlabel(text, fontsize=8, color=_GRAY, ha="left", x=0.01)
