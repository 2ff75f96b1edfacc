"""Which methods ``auto`` stands for: by a probe of the data, or by the counts of ids alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from embtables.methods import method_label
from embtables.methods.auto import Auto
from embtables.methods.full import Full
from embtables.plan.probe import Entrant, MethodSpec, Probe, Race
from embtables.sizes.layout import Group
from embtables.sizes.memory import format_bytes

#: What says whether a method, or pattern → method, can store some tables in so many bytes.
Fits = Callable[[Any, int], bool]
# A budget that differs from that of a race by less is the same.
_SAME = math.log(1.02)


class Chosen(NamedTuple):
    """What stands in the place of ``auto``, and why.

    ``spec``: as ``plan`` takes it. ``expected``: loss, and the bounds within which it lies as likely as not; ``None``
    where nothing was measured. ``runner_up``: what would have been next.
    """

    spec: MethodSpec
    why: str
    expected: dict[str, float] | None = None
    runner_up: dict[str, Any] | None = None


def choose(auto: Auto, group: Group, limit: int, probe: Probe | None, fits: Fits, *, is_all: bool) -> Chosen:
    """What is best for the tables of a group within ``limit`` bytes; ``is_all``: there are no other tables."""
    worth = None if probe is None else probe.worth_of([table.name for table in group.tables])
    rule = auto.without_probe(group, limit, worth)
    if rule == Full.kind:
        return Chosen(rule, "the budget holds all tables as they are", _loss(0.0, 0.0))
    race = None if probe is None else probe.nearest(limit)
    entrants = [] if race is None else [entrant for entrant in race.entrants if fits(entrant.method, limit)]
    if probe is not None and race is not None and entrants:
        best, *others = entrants
        if not is_all:  # what was measured is what all tables cost together
            return Chosen(best.method, f"{_won(race, best, limit)}, in which all tables took part")
        return Chosen(best.method, _won(race, best, limit), _expected(probe, race, best, limit), _next(others))
    if worth is not None:
        lacking = "no race was run" if race is None else "nothing that raced fits"
        return Chosen(rule, f"by the counts of ids and what the probe found each table to be worth; {lacking}")
    return Chosen(
        rule,
        "by the counts of ids alone, as there is no probe of this data; nothing is known of what it costs "
        "(`embtables probe` measures it)",
    )


def _won(race: Race, best: Entrant, limit: int) -> str:
    text = f"first of {len(race.entrants)} in the probe's race within {format_bytes(race.budget_bytes)}"
    if race.entrants[0] is not best:
        text = (
            f"the best that fits of {len(race.entrants)} in the probe's race within {format_bytes(race.budget_bytes)}"
        )
    if abs(math.log(race.budget_bytes) - math.log(limit)) > _SAME:
        text += ", the nearest budget that was raced"
    return text


def _expected(probe: Probe, race: Race, best: Entrant, limit: int) -> dict[str, float]:
    """What was expected of a method in its race, or between two in which it ran, on a line over the logarithm of bytes.

    Elsewhere it is its loss in the nearest race, and as far off as the losses of that race are apart.
    """
    if abs(math.log(race.budget_bytes) - math.log(limit)) <= _SAME:
        return _loss(best.loss, best.error)
    ran = [(r.budget_bytes, e) for r in probe.races for e in r.entrants if e.method == best.method]
    below = max((each for each in ran if each[0] <= limit), key=lambda each: each[0], default=None)
    above = min((each for each in ran if each[0] >= limit), key=lambda each: each[0], default=None)
    if below is None or above is None:
        spread = max(e.loss for e in race.entrants) - min(e.loss for e in race.entrants)
        return _loss(best.loss, max(best.error, spread))
    (low, first), (high, last) = below, above
    share = (math.log(limit) - math.log(low)) / (math.log(high) - math.log(low))
    return _loss(first.loss + share * (last.loss - first.loss), max(first.error, last.error))


def _loss(loss: float, error: float) -> dict[str, float]:
    return {"loss": loss, "low": loss - error, "high": loss + error}


def _next(others: list[Entrant]) -> dict[str, Any] | None:
    return {"method": others[0].method, **_loss(others[0].loss, others[0].error)} if others else None


def explanation(
    chosen: Mapping[str, Chosen], kept: Mapping[str, float], probe: Probe | None, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """What ``Plan.explain`` returns.

    Args:
        chosen: by the tables that ``auto`` was to decide on, as a text.
        kept: which share of what it is worth each table keeps, of those for which that is said.
        probe: what was measured, if anything was.
        lines: those of the plan.
    """
    worth = {} if probe is None else probe.tables
    how = {} if probe is None else probe.how
    return {
        "choices": [
            {
                "tables": tables,
                "method": c.spec,
                "why": c.why,
                "expected": c.expected,
                "runner_up": c.runner_up,
            }
            for tables, c in chosen.items()
        ],
        "monitor": None if probe is None else probe.monitor,
        "reference": None if probe is None else probe.reference,
        "tables": [
            {
                "table": line["table"],
                "worth": worth.get(line["table"]),
                "how": how.get(line["table"]),
                "kept": kept.get(line["table"]),
                "method": line["method"],
                "inference_bytes": line["inference_bytes"],
            }
            for line in lines
            if line["num_embeddings"] is not None or line["embedding_dim"] is not None
        ],
    }


def told(explanation: Mapping[str, Any]) -> list[str]:
    """The choice in words, a line for each part of it."""
    lines = []
    for choice in explanation["choices"]:
        of = "" if choice["tables"] == "*" else f" for {choice['tables']}"
        lines.append(f"auto{of}: {method_label(choice['method'])}, {choice['why']}")
        monitor = explanation["monitor"] or "auc"
        if choice["expected"] is not None and explanation["reference"] is not None:
            lines.append(f"  expected: {_words(choice['expected'], monitor)}")
        if choice["runner_up"] is not None:
            next_best = choice["runner_up"]
            lines.append(f"  runner-up: {method_label(next_best['method'])}, {_words(next_best, monitor)}")
    worth = [table for table in explanation["tables"] if table["worth"] is not None]
    if worth:
        first = sorted(worth, key=lambda table: -table["worth"])
        shown = ", ".join(f"{table['table']} {table['worth']:.4f}" for table in first[:8])
        more = f", and {len(first) - 8} more" if len(first) > 8 else ""
        lines.append(f"  what tables are worth ({explanation['monitor']} lost without them): {shown}{more}")
    return lines


def _words(expected: Mapping[str, float], monitor: str) -> str:
    change = -expected["loss"]
    return f"{change:+.4f} {monitor} against full tables (from {-expected['high']:+.4f} to {-expected['low']:+.4f})"
