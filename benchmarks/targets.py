"""What must be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks import bags, frameworks, ours, rivals
from benchmarks.results import DAGGER, FULL, Measured, Pair, Results, doubts_of, memory_rows, ratio, rendered, row_of

THREADS = 2  # of the targets
Measure = Callable[[Results], "Measured | None"]


class Target(NamedTuple):
    """``bound``: what the value must reach (``at_least``) or stay within; ``None``: shown without a bound."""

    what: str
    against: str
    bound: float | None
    at_least: bool
    measure: Measure
    unit: str = "×"  # or "%"

    def shown(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}×"

    def required(self) -> str:
        if self.bound is None:
            return "–"
        bound = f"{self.bound:.0%}" if self.unit == "%" else f"{self.bound:g}×"
        return f"{'≥' if self.at_least else '≤'} {bound}"

    def verdict(self, measured: Measured | None) -> str:
        if measured is None:
            return "not measured"
        if self.bound is None:
            return ""
        met = measured.value >= self.bound if self.at_least else measured.value <= self.bound
        return ("met" if met else "**not met**") + (f" {DAGGER}" if measured.doubts else "")

    def worst(self, measured: Iterable[Measured | None]) -> Measured | None:
        """What holds wherever it was measured."""
        there = [each for each in measured if each is not None]
        return (min if self.at_least else max)(there, key=lambda each: each.value, default=None)


def _faster(slow: Pair, fast: Pair, phase: str = "step", scale: str = "1/10") -> Measure:
    return lambda results: ratio(results.configuration(scale, phase=phase), slow, fast)


def _quickest(names: Sequence[str], optimizer: str = "", phase: str = "step") -> Measure:
    """Of arrangements of one rival the one that is quickest here."""

    def measure(results: Results) -> Measured | None:
        rows = results.configuration(phase=phase)
        found = [ratio(rows, (name, optimizer), FULL) for name in names]
        return min((r for r in found if r is not None), key=lambda r: r.value, default=None)

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
        found = [ratio(rows, (name, optimizer), FULL) for name in (rivals.LOOP, rivals.FLAT)]
        return min((r for r in found if r is not None), key=lambda r: r.value, default=None)

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


_STEP, _ADAM = "step, full, row-wise Adagrad", "step, full, Adam on touched rows"
_BIG, _PLANNED = "DLRM step, 33.8 M rows", "plan's training bytes, beside the dense part"
_SHARE = "tables and their optimizer"
TARGETS = [
    _at_least(_STEP, "FBGEMM TBE, best setting", 1.8, _quickest([rivals.TBE_BEST, rivals.TBE], FULL[1])),
    _at_least(_STEP, "FBGEMM TBE, default", 4.5, _faster((rivals.TBE, FULL[1]), FULL)),
    _at_least(_STEP, "`nn.EmbeddingBag` loop, sparse Adagrad", 5.5, _faster((rivals.LOOP, "adagrad"), FULL)),
    _at_least(_ADAM, "`nn.EmbeddingBag` loop, SparseAdam", 5, _faster((rivals.LOOP, "adam"), (ours.FULL, "adam"))),
    _at_least(
        "forward, full, ids checked",
        "FBGEMM TBE with its check, at its quickest",
        2,
        _quickest([rivals.TBE, rivals.TBE_ONE], phase="forward"),
    ),
    _at_least("forward, full, 33.8 M rows", "rows at random, at their quickest", 0.5, _gather_rate)._replace(unit="%"),
    _at_least("bags of 50, int8, 1 M × 16", "`embedding_bag_byte`", 1.5, _packed_bags(bags.BYTES, "int8")),
    _at_least("bags of 50, int4, 1 M × 16", "`embedding_bag_4bit`", 1.5, _packed_bags(bags.NIBBLES, "int4")),
    _at_least("bags of 50, int8, 1 M × 16", "full, fp32", 1, _packed_bags(bags.name_of("fp32"), "int8")),
    _at_most("step, hash", "full", 1, _within("hash")),
    _at_most("step, unified, two lookups", "full", 1, _within("unified")),
    _at_most("step, unified, one lookup", "full", 1, _within("unified_one")),
    _at_most("step, multi_hash, k = 2", "full", 1.5, _within("multi_hash")),
    _at_most("step, compositional, mult", "full", 1.5, _within("compositional")),
    _at_most("step, robe, block 8, Adagrad", "full, Adagrad", 1.5, _within("robe", "adagrad")),
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
    _at_least(_BIG, "the same model, `torch.optim.Adam`", 20, _dense_adam("dense adam")),
    Target(_BIG, "the same model, `torch.optim.Adam(fused=True)`", None, True, _dense_adam("fused dense adam")),
    _at_least("DLRM end to end, 3.4 M rows", "FuxiCTR's DLRM", 8, _end_to_end("dlrm")),
    _at_least("DeepFM end to end, 3.4 M rows", "DeepCTR-Torch's DeepFM", 8, _end_to_end("deepfm")),
    _at_most("peak memory of training, full", _PLANNED, 1.15, _memory(True)),
    _at_most("peak memory of training, compressed to 10 %", _PLANNED, 1.15, _memory(False)),
]


def targets(results: Results) -> str:
    """What had to be reached, what was measured, and whether it was."""
    lines = [["what", "against", "required", "measured", "of minima", ""], ["---", "---", *["---:"] * 3, "---"]]
    doubts = []
    for target in TARGETS:
        measured = target.measure(results)
        value = "" if measured is None else target.shown(measured.value)
        least = "" if measured is None or measured.of_minima is None else target.shown(measured.of_minima)
        lines.append([target.what, target.against, target.required(), value, least, target.verdict(measured)])
        if measured is not None and measured.doubts:
            doubts.append(f"- {target.what}, against {target.against}: {measured.doubts}")
    text = rendered(lines)
    if results.threads != THREADS:
        text += f"\n\nThe targets are for {THREADS} threads; this run had {results.threads}."
    return text + (f"\n\n{DAGGER} The machine was not quiet:\n\n" + "\n".join(doubts) if doubts else "")


def side_by_side(runs: Mapping[str, Results]) -> str:
    """What had to be reached, what each run measured, by its machine, and whether the worst of them reaches it."""
    lines = [["what", "against", "required", *runs, "the worst"], ["---", "---", "---:", *["---:"] * len(runs), "---"]]
    for target in TARGETS:
        measured = [target.measure(results) for results in runs.values()]
        cells = ["" if m is None else target.shown(m.value) + (f" {DAGGER}" if m.doubts else "") for m in measured]
        lines.append([target.what, target.against, target.required(), *cells, target.verdict(target.worst(measured))])
    text = rendered(lines)
    return f"{text}\n\n{DAGGER} The machine was not quiet." if DAGGER in text else text
