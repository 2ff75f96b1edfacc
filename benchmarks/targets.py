"""What must be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import pandas as pd

from benchmarks import bags, frameworks, ours, rivals, small
from benchmarks.jobs import ROWS
from benchmarks.results import DAGGER, FULL, Measured, Pair, Results, doubts_of, memory_rows, ratio, rendered, row_of
from benchmarks.workload import UNEVEN

THREADS = 2  # of the targets
Measure = Callable[[Results], "Measured | None"]


class Target(NamedTuple):
    """``bound``: what the value must reach (``at_least``) or stay within; ``None``: shown without a bound."""

    what: str
    against: str
    bound: float | None
    at_least: bool
    measure: Measure
    unit: str = "×"  # or "%", or " µs"

    @property
    def name(self) -> str:
        return f"{self.what}, against {self.against}" if self.against else self.what

    def shown(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{self.unit}"

    def required(self) -> str:
        if self.bound is None:
            return "–"
        bound = f"{self.bound:.0%}" if self.unit == "%" else f"{self.bound:g}{self.unit}"
        return f"{'≥' if self.at_least else '≤'} {bound}"

    def verdict(self, measured: Measured | None) -> str:
        if measured is None:
            return "not measured"
        if self.bound is None:
            return ""
        return ("met" if self.met(measured) else "**not met**") + (f" {DAGGER}" if measured.doubts else "")

    def met(self, measured: Measured) -> bool:
        """Whether it reaches the bound, if there is one."""
        if self.bound is None:
            return True
        return measured.value >= self.bound if self.at_least else measured.value <= self.bound

    def worst(self, measured: Iterable[Measured | None]) -> Measured | None:
        """What holds wherever it was measured."""
        there = [each for each in measured if each is not None]
        return (min if self.at_least else max)(there, key=lambda each: each.value, default=None)


def _faster(slow: Pair, fast: Pair, phase: str = "step", scale: str = "1/10") -> Measure:
    return lambda results: ratio(results.configuration(scale, phase=phase), slow, fast)


def _quickest(names: Iterable[str], optimizer: str = "", phase: str = "step") -> Measure:
    return lambda results: _least(results.configuration(phase=phase), names, optimizer)


def _least(rows: pd.DataFrame, names: Iterable[str], optimizer: str) -> Measured | None:
    """Of arrangements of one rival, against full tables, the one that is quickest here."""
    found = [ratio(rows, (name, optimizer), FULL) for name in names]
    return min((r for r in found if r is not None), key=lambda r: r.value, default=None)


def _each(rows: pd.DataFrame, measure: Callable[[pd.DataFrame], Measured | None]) -> Iterator[Measured]:
    """What is measured in every configuration, with what tells it from the others."""
    labels = {"scale": "{}", "precision": "{}", "bags": "{}", "phase": "{}", "batch": "batch {:.0f}"}
    labels |= {"threads": "{:.0f} thr."}
    keys = [key for key in labels if rows[key].nunique() > 1]
    for key, group in rows.groupby(keys, sort=False) if keys else [((), rows)] * (not rows.empty):
        measured = measure(group)
        if measured is not None:
            yield measured._replace(where=", ".join(labels[name].format(value) for name, value in zip(keys, key)))


def _least_everywhere(rows: pd.DataFrame, names: Iterable[str], optimizer: str) -> Measured | None:
    """Against whichever arrangement is quickest, where full tables have the least lead."""
    return min(_each(rows, lambda group: _least(group, names, optimizer)), key=lambda m: m.value, default=None)


def _one_table(names: Iterable[str], optimizer: str, phase: str) -> Measure:
    """Even bags of one table, in all batches but the largest."""

    def measure(results: Results) -> Measured | None:
        rows = results.select("pooled", scale=f"{ROWS:,} rows", phase=phase)
        rows = rows[(rows["bags"] != UNEVEN) & (rows["batch"] <= 10_000)]
        return _least_everywhere(rows, names, optimizer)

    return measure


def _whole_step(results: Results) -> Measured | None:
    """Of DLRM, in every size and precision that was measured."""
    rows = results.select("dlrm", threads=results.threads)
    return _least_everywhere(rows, rivals.TBES, FULL[1])


def _small_step(results: Results) -> Measured | None:
    """Against the quicker of dense and sparse gradients."""

    def measure(rows: pd.DataFrame) -> Measured | None:
        found = [ratio(rows, FULL, (name, "")) for name in (small.DENSE, small.SPARSE)]
        return max((r for r in found if r is not None), key=lambda r: r.value, default=None)

    return max(_each(results.select("small", phase="step"), measure), key=lambda m: m.value, default=None)


def _one_example(results: Results) -> Measured | None:
    """Microseconds of a lookup in full tables, trained ones and served ones."""
    rows = results.select("small", contestant=ours.FULL, batch=1, precision="fp32")

    def measure(group: pd.DataFrame) -> Measured:
        row = group.iloc[0]
        return Measured(1e3 * row["median_ms"], doubts_of([row]), 1e3 * row["min_ms"])

    return max(_each(rows, measure), key=lambda m: m.value, default=None)


def _served(kind: str) -> Measure:
    """Against served full tables of the same precision."""

    def measure(results: Results) -> Measured | None:
        rows = results.select("small", phase="served")
        each = _each(rows, lambda group: ratio(group, (ours.name_of(kind), ""), (ours.FULL, "")))
        return max(each, key=lambda m: m.value, default=None)

    return measure


def _gather_rate(results: Results) -> Measured | None:
    """Our rows a second as a share of the best rate of random rows, fetched in the same turns."""
    rows = results.configuration("1/1", phase="forward")
    names = [name for name in rows["contestant"].unique() if name.startswith("random rows")]
    found = [r for r in (ratio(rows, (name, ""), FULL) for name in names) if r is not None]
    return min(found, key=lambda r: r.value, default=None)


def _share(precision: str) -> Measure:
    def measure(results: Results) -> Measured | None:
        rows = row_of(results.select("dlrm", scale="1/10", precision=precision, threads=results.threads), FULL)
        return None if rows.empty else Measured(rows.iloc[0]["table_share"], doubts_of([rows.iloc[0]]))

    return measure


def _dense_adam(optimizer: str) -> Measure:
    """The quicker of the two arrangements of plain tables."""

    def measure(results: Results) -> Measured | None:
        rows = results.select("dlrm", scale="1/1", precision="fp32", threads=results.threads)
        return _least(rows, (rivals.LOOP, rivals.FLAT), optimizer)

    return measure


def _end_to_end(model: str) -> Measure:
    def measure(results: Results) -> Measured | None:
        names = frameworks.OURS[model], frameworks.RIVALS[model]
        rows = [results.select("frameworks", contestant=name) for name in names]
        if any(r.empty for r in rows):
            return None
        quick, slow = (r["examples_per_second"].median() for r in rows)
        return Measured(quick / slow, doubts_of([r.iloc[i] for r in rows for i in range(len(r))]))

    return measure


def _memory(full: bool) -> Measure:
    """The worst of the ratios: peak above that of the dense part alone, against the plan's training bytes."""

    def measure(results: Results) -> Measured | None:
        values = [value for name, _, _, value in memory_rows(results) if (name == ours.FULL) == full]
        return Measured(max(values)) if values else None

    return measure


def _packed_bags(slow: str, precision: str) -> Measure:
    """Bags of many ids over a table beyond the caches."""

    def measure(results: Results) -> Measured | None:
        rows = results.select("bags", scale=f"{1_000_000:,} rows", dim=16, phase=f"bags of {bags.LENGTHS[-1]}")
        return ratio(rows, (slow, ""), (bags.name_of(precision), ""))

    return measure


def _within(kind: str, optimizer: str = "rowwise_adagrad") -> Measure:
    return _faster((ours.name_of(kind), optimizer), (ours.FULL, optimizer))


def _at_least(what: str, against: str, bound: float, measure: Measure) -> Target:
    return Target(what, against, bound, True, measure)


def _at_most(what: str, against: str, bound: float, measure: Measure) -> Target:
    return Target(what, against, bound, False, measure)


_TBE = "FBGEMM TBE, best setting"
_STEP, _ADAM = "step, full, row-wise Adagrad", "step, full, Adam on touched rows"
_ONE = "one table, bags of 1, 10 and 50"
_BIG, _PLANNED = "DLRM step, 33.8 M rows", "plan's training bytes, beside the dense part"
_SHARE = "tables and their optimizer"
TARGETS = [
    _at_least(f"forward, {_ONE}, ids checked", "`nn.EmbeddingBag`", 1, _one_table(rivals.LOOPS, "", "forward")),
    _at_least(f"forward, {_ONE}, ids checked", _TBE, 1.3, _one_table(rivals.TBES, "", "forward")),
    _at_least(f"step, {_ONE}, row-wise Adagrad", _TBE, 1.5, _one_table(rivals.TBES, FULL[1], "step")),
    _at_least(
        f"step, {_ONE}, row-wise Adagrad",
        "`nn.EmbeddingBag`, sparse Adagrad",
        6,
        _one_table(rivals.LOOPS, "adagrad", "step"),
    ),
    _at_least(_STEP, _TBE, 2, _quickest(rivals.TBES, FULL[1])),
    _at_least(_STEP, "FBGEMM TBE, default", 4.5, _faster((rivals.TBE, FULL[1]), FULL)),
    _at_least(_STEP, "`nn.EmbeddingBag` loop, sparse Adagrad", 9, _quickest(rivals.LOOPS, "adagrad")),
    _at_least(_ADAM, "`nn.EmbeddingBag` loop, SparseAdam", 5, _faster((rivals.LOOP, "adam"), (ours.FULL, "adam"))),
    _at_least(
        "forward, full, ids checked",
        "FBGEMM TBE with its check, at its quickest",
        2,
        _quickest([name for name in rivals.TBES if "no check" not in name], phase="forward"),
    ),
    _at_least("forward, full, 33.8 M rows", "rows at random, at their quickest", 0.5, _gather_rate)._replace(unit="%"),
    _at_least("bags of 50, int8, 1 M × 16", "`embedding_bag_byte`", 1.5, _packed_bags(bags.BYTES, "int8")),
    _at_least("bags of 50, int4, 1 M × 16", "`embedding_bag_4bit`", 1.5, _packed_bags(bags.NIBBLES, "int4")),
    _at_least("bags of 50, int8, 1 M × 16", "full, fp32", 1, _packed_bags(bags.name_of("fp32"), "int8")),
    _at_most("step, hash", "full", 1, _within("hash")),
    _at_most("step, unified, two lookups", "full", 1.05, _within("unified")),
    _at_most("step, unified, one lookup", "full", 1, _within("unified_one")),
    _at_most("step, multi_hash, k = 2", "full", 1.5, _within("multi_hash")),
    _at_most("step, compositional, mult", "full", 1.5, _within("compositional")),
    _at_most("step, robe, block 8, Adagrad", "full, Adagrad", 1.25, _within("robe", "adagrad")),
    _at_most("step, mixed_dimension", "full", 1.5, _within("mixed_dimension")),
    _at_most("step, hot_cold", "full", 1.15, _within("hot_cold")),
    _at_most("step, banded", "full", 1.15, _within("banded")),
    _at_most("step, banded, whole rows", "full", 1.15, _within("banded_whole")),
    _at_least(
        "step, compositional, mult, Adagrad",
        "quotient–remainder bags, a loop, Adagrad",
        6,
        _faster((rivals.QR, "adagrad"), (ours.name_of("compositional"), "adagrad")),
    ),
    _at_most(f"DLRM step, fp32: {_SHARE}", "the whole step", 0.10, _share("fp32"))._replace(unit="%"),
    _at_most(f"DLRM step, bf16: {_SHARE}", "the whole step", 0.15, _share("bf16"))._replace(unit="%"),
    _at_least("DLRM step, whole", f"the same model, {_TBE}", 1.15, _whole_step),
    _at_least(_BIG, "the same model, `torch.optim.Adam`", 20, _dense_adam("dense adam")),
    Target(_BIG, "the same model, `torch.optim.Adam(fused=True)`", None, True, _dense_adam("fused dense adam")),
    _at_least("DLRM end to end, 3.4 M rows", "FuxiCTR's DLRM", 8, _end_to_end("dlrm")),
    _at_least("DeepFM end to end, 3.4 M rows", "DeepCTR-Torch's DeepFM", 8, _end_to_end("deepfm")),
    _at_most("26 tables served, pruned", "full, served", 3, _served("pruned")),
    _at_most(
        f"step, 10,000 × 16, batch {small.BATCH}", "`nn.EmbeddingBag`, forward and backward alone", 1.5, _small_step
    ),
    _at_most("lookup, 26 tables, batch 1, median", "", 12, _one_example)._replace(unit=" µs"),
    _at_most("peak memory of training, full", _PLANNED, 1.15, _memory(True)),
    _at_most("peak memory of training, compressed to 10 %", _PLANNED, 1.15, _memory(False)),
]


def _missed(target: Target, measured: Measured | None, machine: str = "") -> list[str]:
    """Of a target over several configurations that is not met, the one that fails by the most."""
    if measured is None or not measured.where or target.met(measured):
        return []
    return [f"- {target.name}: {machine}{measured.where}: {target.shown(measured.value)}"]


def _listed(head: str, lines: list[str]) -> str:
    return f"\n\n{head}:\n\n" + "\n".join(lines) if lines else ""


def targets(results: Results) -> str:
    """What had to be reached, what was measured, and whether it was."""
    lines = [["what", "against", "required", "measured", "of minima", ""], ["---", "---", *["---:"] * 3, "---"]]
    doubts, missed = [], []
    for target in TARGETS:
        measured = target.measure(results)
        value = "" if measured is None else target.shown(measured.value)
        least = "" if measured is None or measured.of_minima is None else target.shown(measured.of_minima)
        lines.append([target.what, target.against, target.required(), value, least, target.verdict(measured)])
        if measured is not None and measured.doubts:
            doubts.append(f"- {target.name}: {measured.doubts}")
        missed += _missed(target, measured)
    text = rendered(lines) + _listed("Not met, at the worst", missed)
    if results.threads != THREADS:
        text += f"\n\nThe targets are for {THREADS} threads; this run had {results.threads}."
    return text + _listed(f"{DAGGER} The machine was not quiet", doubts)


def side_by_side(runs: Mapping[str, Results]) -> str:
    """What had to be reached, what each run measured, by its machine, and whether the worst of them reaches it."""
    lines = [["what", "against", "required", *runs, "the worst"], ["---", "---", "---:", *["---:"] * len(runs), "---"]]
    missed = []
    for target in TARGETS:
        measured = [target.measure(results) for results in runs.values()]
        cells = ["" if m is None else target.shown(m.value) + (f" {DAGGER}" if m.doubts else "") for m in measured]
        lines.append([target.what, target.against, target.required(), *cells, target.verdict(target.worst(measured))])
        for name, each in zip(runs, measured):
            missed += _missed(target, each, f"{name}, ")
    text = rendered(lines) + _listed("Not met, at the worst", missed)
    return f"{text}\n\n{DAGGER} The machine was not quiet." if DAGGER in text else text
