"""From tables, method and budget to exact sizes and exact bytes: ``plan`` and ``Plan``."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import html
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from embtables._util.numbers import as_int
from embtables.config import TableConfig
from embtables.formats import BF16, FP32, TRAINING_FORMATS, row_format
from embtables.methods import Method, from_config
from embtables.methods.auto import Auto
from embtables.methods.banded import Banded
from embtables.methods.base import Floor
from embtables.optimizers import Adagrad, FusedOptimizer, RowWiseAdagrad, optimizer_from_config
from embtables.plan.auto import Chosen, choose, explanation, told
from embtables.plan.probe import Probe
from embtables.serving.numpy_reader import CHECKSUM, LOOKUPS
from embtables.sizes.budget import Budget, infeasible, parse_budget, split
from embtables.sizes.layout import FULL, Counts, Form, Group, Layout
from embtables.sizes.memory import format_bytes

if TYPE_CHECKING:
    import pandas as pd

MethodLike = Method | str | dict[str, Any]
DEFAULT_OPTIMIZER = "default"
FORMAT_VERSION = 1
# What a file says beside the plan in it.
_BESIDE = (CHECKSUM, LOOKUPS)


@dataclass(frozen=True)
class GroupPlan:
    """The tables that one method entry covers, solved."""

    group: Group
    method: Method
    layout: Layout


@dataclass(frozen=True, repr=False)
class Plan:
    """Tables × method × budget, solved into exact sizes: data, printable, serializable.

    ``tables`` in the order given; ``groups`` the solved parts; ``budget_bytes`` the inference budget in bytes or
    ``None``; ``optimizer`` the fused optimizer or ``None``; ``hash_seed`` what all addresses derive from.
    """

    tables: tuple[TableConfig, ...]
    groups: tuple[GroupPlan, ...]
    budget_bytes: int | None
    optimizer: FusedOptimizer | None
    hash_seed: int
    codes: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict, compare=False)
    explanation: Mapping[str, Any] | None = field(default=None, compare=False)

    def explain(self) -> dict[str, Any]:
        """Why ``auto`` chose what it chose, as plain data.

        ``choices``: of what ``auto`` stood for, the ``tables`` (``"*"`` for all), the ``method`` as ``plan`` takes it,
        ``why`` in words, the ``expected`` loss of ``monitor`` against full tables with the bounds ``low`` and ``high``
        within which it lies as likely as not, and the ``runner_up`` with the same. They are ``None`` where nothing was
        measured, and where ``auto`` stood for some of the tables alone.
        ``monitor`` and ``reference``: the metric of the probe, and that of full tables. ``tables``: of each its
        ``worth``, ``how`` that was found, the share of it that is ``kept``, its ``method`` and ``inference_bytes``.

        Raises:
            ValueError: where ``auto`` chose nothing, or the plan was read from a file, in which this does not stand.
        """
        if self.explanation is None:
            raise ValueError('there is nothing to explain: method "auto" had no part in this plan')
        return copy.deepcopy(dict(self.explanation))

    @property
    def inference_bytes(self) -> int:
        """Bytes of the served form, with codes, index maps, scales and padding."""
        return sum(g.layout.serving.num_bytes for g in self.groups)

    def bytes_by_kind(self) -> dict[str, int]:
        """The inference bytes by kind: ``weights``, ``index``, ``codes``, ``scales``, ``padding``, those that occur."""
        kinds: dict[str, int] = {}
        for g in self.groups:
            for kind, num_bytes in g.layout.serving.bytes_by_kind().items():
                kinds[kind] = kinds.get(kind, 0) + num_bytes
        return kinds

    @property
    def training_bytes(self) -> int:
        """Bytes of the trained form and its fused optimizer's state; without one, of weights and gradient."""
        counts = self.optimizer is not None and (
            self.optimizer.counts_steps or any(g.layout.training.rounds_stochastically() for g in self.groups)
        )
        return 8 * counts + sum(training_bytes(g.layout.training, self.optimizer) for g in self.groups)

    @property
    def full_bytes(self) -> int | None:
        """Bytes of the full fp32 tables; ``None`` where a table has no vocabulary."""
        return _full_bytes(self.tables)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Neither the tables' ``init_fn`` nor the rankings of unranked ids go in."""
        return {
            "format_version": FORMAT_VERSION,
            "tables": [table.to_dict() for table in self.tables],
            "groups": [
                {
                    "name": g.group.name,
                    "method": g.method.to_dict(),
                    "tables": [table.name for table in g.group.tables],
                    "layout": g.layout.to_dict(),
                }
                for g in self.groups
            ],
            "budget_bytes": self.budget_bytes,
            "optimizer": self.optimizer and self.optimizer.to_dict(),
            "hash_seed": self.hash_seed,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` described; nothing is solved again.

        Raises:
            ValueError: where the data is no plan, or one of another format version.
        """
        if not isinstance(data, Mapping) or data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"this is not a plan of format version {FORMAT_VERSION} (found {found!r})")
        try:
            tables = tuple(TableConfig(**t) for t in data["tables"])
            _check_tables(tables)
            by_name = {table.name: table for table in tables}
            hash_seed, budget = _checked_hash_seed(data["hash_seed"]), data["budget_bytes"]
            if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
                raise ValueError(f"budget_bytes must be a number of bytes or null, not {budget!r}")
            groups = []
            for g in data["groups"]:
                members, chosen = tuple(by_name[name] for name in g["tables"]), from_config(g["method"])
                rows_in = row_format(chosen.precision or FP32.name)
                group = Group(g["name"], members, (None,) * len(members), hash_seed, rows_in)
                layout = Layout.from_dict(g["layout"])
                if list(layout.entries) != g["tables"] and set(layout.entries) != set(g["tables"]):
                    raise ValueError(f"the group {g['name']!r} has entries for other tables than its own")
                groups.append(GroupPlan(group, chosen, layout))
            if Counter(table.name for g in groups for table in g.group.tables) != Counter(list(by_name)):
                raise ValueError("its groups do not hold each table once")
            solved = Plan(tables, tuple(groups), budget, optimizer_from_config(data["optimizer"]), hash_seed)
            _check_names(solved)
            lost = _lost({k: v for k, v in data.items() if k not in _BESIDE}, solved.to_dict())
            if lost is not None:
                raise ValueError(f"a plan has no {lost}")
            return solved
        except ValueError as error:
            raise ValueError(f"the plan's data is damaged: {error}") from error
        except RecursionError:
            raise ValueError("the plan's data is damaged: it is nested too deeply") from None
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"the plan's data is damaged: {type(error).__name__} {error}") from error

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that differ wherever addresses or shapes do; budget and optimizer do not count."""
        data = {key: value for key, value in self.to_dict().items() if key not in ("budget_bytes", "optimizer")}
        return _digest(data)

    @property
    def training_fingerprint(self) -> bytes:
        """32 bytes that plans have in common whose tables train alike, and are served in different forms.

        These differ in precision, and in what a method does with a table after training: ``Method.served_values``.
        """
        data = {**self.to_dict(), "budget_bytes": None}
        for g, solved in zip(data["groups"], self.groups):
            g["method"] = {name: value for name, value in g["method"].items() if name not in _SAID_BY_LAYOUTS}
            g["layout"] = {name: value for name, value in g["layout"].items() if name != "serving"}
            for entry in g["layout"]["entries"].values():
                served = solved.method.served_values
                entry["values"] = {name: value for name, value in entry["values"].items() if name not in served}
        return _digest(data)

    def to_pandas(self) -> pd.DataFrame:
        """A row per table (``inference_bytes`` of its own storage) and one for what a group shares."""
        import pandas as pd

        return pd.DataFrame(self.lines())

    def lines(self) -> list[dict[str, Any]]:
        """What ``to_pandas`` shows, as plain data."""
        lines: list[dict[str, Any]] = []
        for g in self.groups:
            own, shared = g.layout.serving.bytes_by_table([table.name for table in g.group.tables])
            for table in g.group.tables:
                entry = g.layout.entries[table.name]
                values = ", ".join(f"{k} {_short(v)}" for k, v in entry.values.items())
                stored = "full" if entry.variant == FULL else f"{entry.variant}: {values}" if values else entry.variant
                lines.append(_line(table.name, table, g.method.kind, stored, table.full_bytes, own[table.name]))
            if shared:
                line = _line(f"(shared by {g.group.name})", None, g.method.kind, "shared storage", None, shared)
                lines.append(line | {"shared_by": g.group.name})
        return lines

    def __repr__(self) -> str:
        methods = ", ".join(dict.fromkeys(g.method.kind for g in self.groups))
        return f"<Plan of {len(self.tables)} tables, {methods}: {self.inference_bytes:,} bytes>"

    def _repr_html_(self) -> str:
        """What notebooks show: the table of ``to_pandas``, and the sums."""
        table: str = self.to_pandas().to_html(index=False, na_rep="", max_rows=60)
        return f"{table}<p>{'<br>'.join(map(html.escape, self._sums()))}</p>"

    def __str__(self) -> str:
        lines = self.lines()
        header = ("table", "ids", "dim", "method", "stored as", "full", "inference")
        shown = lines if len(lines) <= 60 else [*lines[:50], *lines[-5:]]
        cells = [
            (
                line["table"],
                f"{line['num_embeddings']:,}" if line["num_embeddings"] else "any" if line["embedding_dim"] else "",
                str(line["embedding_dim"] or ""),
                line["method"],
                line["stored_as"],
                format_bytes(line["full_bytes"]) if line["full_bytes"] else "",
                format_bytes(line["inference_bytes"]),
            )
            for line in shown
        ]
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        numeric = {1, 2, 5, 6}
        text = [
            "  ".join(c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in [header, *cells]
        ]
        if len(shown) < len(lines):
            text.insert(51, f"… {len(lines) - len(shown)} more tables")
        return "\n".join([*text, *self._sums(), *(told(self.explanation) if self.explanation is not None else [])])

    def _sums(self) -> list[str]:
        """The lines below the tables: bytes of serving and of training."""
        full = self.full_bytes
        ratio = f", {self.inference_bytes / full:.2%} of the full {format_bytes(full)}" if full else ""
        budget = f" (budget {self.budget_bytes:,} B)" if self.budget_bytes is not None else ""
        rows = "rows in bf16, " if any(g.layout.training.rounds_stochastically() for g in self.groups) else ""
        training = (
            f"{rows}with {self.optimizer.kind} state"
            if self.optimizer is not None
            else "weights and gradient; the optimizer's state comes on top"
        )
        kinds = self.bytes_by_kind()
        split = ": " + ", ".join(f"{kind} {n:,} B" for kind, n in kinds.items()) if set(kinds) - {"weights"} else ""
        return [
            f"inference {self.inference_bytes:,} B{budget}{ratio}{split}",
            f"training  {self.training_bytes:,} B ({training})",
        ]


# Fields of methods that say nothing of training that the layout does not say.
_SAID_BY_LAYOUTS = ("precision", "train_projection")


def _digest(data: Any) -> bytes:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).digest()


def _lost(given: Any, understood: Any, where: str = "") -> str | None:
    """The first place in which plain data say something that was not understood; what they leave out is a default."""
    if isinstance(given, Mapping) and isinstance(understood, Mapping):
        inner = ((f"{where}.{name}" if where else str(name), name) for name in given)
        found = (_lost(given[name], understood.get(name, _NOTHING), path) for path, name in inner)
        return next((path for path in found if path is not None), None)
    if isinstance(given, (list, tuple)) and isinstance(understood, (list, tuple)) and len(given) == len(understood):
        found = (_lost(one, other, f"{where}[{i}]") for i, (one, other) in enumerate(zip(given, understood)))
        return next((path for path in found if path is not None), None)
    return None if given == understood else f"{where} {_short(given)!r}"


_NOTHING = object()


def _line(name: str, table: TableConfig | None, method: str, stored: str, full: int | None, own: int) -> dict[str, Any]:
    return {
        "table": name,
        "feature_names": " ".join(table.feature_names) if table else "",
        "num_embeddings": table.num_embeddings if table else None,
        "embedding_dim": table.embedding_dim if table else None,
        "method": method,
        "stored_as": stored,
        "full_bytes": full,
        "inference_bytes": own,
        "shared_by": None,
    }


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_short(v) for v in value[:4])
        return f"[{shown}, …]" if len(value) > 4 else f"[{shown}]"
    return f"{value:,}" if isinstance(value, int) else str(value)


def training_bytes(form: Form, optimizer: FusedOptimizer | None) -> int:
    """Bytes of a trained form: weights, codes and optimizer state, or gradient where no optimizer is fused."""
    trained = [extra for extra in form.extras if extra.trained]
    if optimizer is None:
        # A gradient is as large as what it is the gradient of.
        return form.num_bytes + sum(s.num_bytes for s in form.slabs) + sum(extra.num_bytes for extra in trained)
    parameters = [(s.rows, s.width) for s in form.slabs]
    for extra in trained:
        rows = extra.shape[0] if len(extra.shape) > 1 else 1
        parameters.append((rows, prod(extra.shape) // rows))
    state = sum(FP32.slab_bytes(rows, sum(optimizer.state_widths(width))) for rows, width in parameters)
    return form.num_bytes + state


def plan(
    tables: Sequence[TableConfig],
    method: MethodLike | Mapping[str, MethodLike],
    budget: Budget | None = None,
    frequencies: Mapping[str, Any] | None = None,
    optimizer: str | dict[str, Any] | FusedOptimizer | None = DEFAULT_OPTIMIZER,
    training_budget: Budget | None = None,
    *,
    hash_seed: int = 0,
    precision: str | None = None,
    training_precision: str = FP32.name,
    probe: Probe | str | Path | None = None,
) -> Plan:
    """Solves tables, method and budget into exact sizes.

    Args:
        tables: the logical tables; names are unique.
        method: a method, its name, its mapping (``{"kind": …}``), or a mapping from patterns of table names
            (``"user_*"``, the first that matches counts) to these, all under the one budget. ``"auto"`` chooses one.
        budget: inference bytes for all tables together: ``67_108_864``, ``"64MB"``, ``"64MiB"``, or a share of the full
            fp32 tables: ``0.1``, ``"10%"``. ``None`` for methods that need none, such as ``full``.
        frequencies: ``{table name: counts}``, one count an id. They steer the split of the budget towards the tables
            where it avoids most collisions, if all tables of a method have them, and are what frequency-based methods
            rank ids by.
        optimizer: the fused optimizer, by default row-wise Adagrad, or Adagrad where a method shares single scalars,
            which have no rows: ``"sgd"``, ``"rowwise_adagrad"``, ``"adagrad"``, ``"adam"``, one of another
            package, ``{"kind": "adam", "lr": 0.01}``, or a config of ``embtables.optimizers``; ``None`` for ordinary
            parameters under any ``torch.optim`` optimizer.
        training_budget: a bound on the training bytes as well.
        hash_seed: seed of all hashes.
        precision: what rows are served in, for all methods that do not say so themselves (``{"kind": "hash",
            "precision": "int8"}``): ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"int4"``, ``"int2"``,
            ``"binary"``, or ``"binary2"`` and ``"binary4"``, sums of two and four signs. Behind a slash may stand how
            many rows have a scale in common: ``"int4/64"``, or ``"int4/slab"`` for one scale.
        training_precision: what rows are stored in while they are trained: ``"fp32"``, or ``"bf16"``, which halves
            their bytes, and whose fused updates are computed in fp32 and rounded stochastically. Optimizer state and
            dense parameters stay fp32.
        probe: what was measured on the data, which ``"auto"`` chooses by, and by which a budget is split between
            patterns: a ``Probe``, or the path of its file or of prepared data that has one.

    Returns:
        A plan whose inference bytes are at most the budget and equal those of the built tables.

    Raises:
        InfeasibleBudget: with the floor in bytes, where no tables of this method fit.
        ValueError: naming the argument, table or field that is wrong.
        OSError: the file of a probe cannot be read.

    Example::

        plan([TableConfig("user", 1_000_000, 16)], "hash", budget="10%")
    """
    if isinstance(tables, TableConfig):
        raise ValueError(f"tables must be a list of TableConfig, not the one table '{tables.name}'")
    return plan_apart(
        [tables],
        method,
        budget,
        frequencies,
        optimizer,
        training_budget,
        hash_seed=hash_seed,
        precision=precision,
        training_precision=training_precision,
        probe=probe,
    )


def _default_optimizer(pairs: Sequence[tuple[Group, Method]]) -> FusedOptimizer:
    try:
        for group, chosen in pairs:
            chosen.check(group, RowWiseAdagrad())
    except ValueError:
        return Adagrad()
    return RowWiseAdagrad()


def plan_apart(
    units: Sequence[Sequence[TableConfig]],
    method: MethodLike | Mapping[str, MethodLike],
    budget: Budget | None = None,
    frequencies: Mapping[str, Any] | None = None,
    optimizer: str | dict[str, Any] | FusedOptimizer | None = DEFAULT_OPTIMIZER,
    training_budget: Budget | None = None,
    *,
    hash_seed: int = 0,
    precision: str | None = None,
    training_precision: str = FP32.name,
    probe: Probe | str | Path | None = None,
) -> Plan:
    """``plan`` for tables of several modules under one budget: tables of different units never share storage."""
    tables = tuple(table for unit in units for table in unit)
    _check_tables(tables)
    hash_seed = _checked_hash_seed(hash_seed)
    counts = checked_counts(tables, frequencies)
    pairs = _groups(_assigned(units, method, precision), counts, hash_seed)
    known = _probe(probe)
    full = _full_bytes(tables)
    limit = None if budget is None else parse_budget(budget, full)
    chosen_by_auto: dict[str, Chosen] = {}
    if any(isinstance(chosen, Auto) for _, chosen in pairs):
        if limit is None:
            raise ValueError('method auto needs a budget, such as budget="10%" or budget="64MB"')
        pairs, chosen_by_auto = _settled(pairs, counts, limit, precision, known)
    fused = _default_optimizer(pairs) if optimizer == DEFAULT_OPTIMIZER else optimizer_from_config(optimizer)
    _check_training_precision(training_precision, fused)
    for group, chosen in pairs:
        chosen.check(group, fused)
    floors = _floors(pairs, limit)
    floor = max(1, sum(f.num_bytes for f in floors))

    def solve(bytes_: int) -> Plan:
        solved = tuple(
            GroupPlan(group, chosen, chosen.fit(group, share).trained_in(training_precision))
            for (group, chosen), share in zip(pairs, _shares(pairs, floors, bytes_, known))
        )
        return Plan(tables, solved, limit, fused, hash_seed)

    if limit is None:
        for _, chosen in pairs:
            if chosen.needs_budget:
                raise ValueError(f'method {chosen.kind} needs a budget, such as budget="10%" or budget="64MB"')
    # Without a budget only what the method needs anyway is allocated: the floor, and for Full that is everything.
    most = floor if limit is None else limit
    result = solve(most)
    if training_budget is not None:
        bound = parse_budget(training_budget, full)
        if result.training_bytes > bound:
            result = _under_training_budget(solve, floor, most, result.training_bytes, bound)
    _check_names(result)
    codes = {k: v for g in result.groups for k, v in g.method.make_fixed_codes(g.layout, g.group).items()}
    why = _explained(result, chosen_by_auto, known) if chosen_by_auto else None
    # What the counts decided is in the layouts and codes; a plan does not hold on to them.
    settled = tuple(replace(g, group=replace(g.group, counts=(None,) * len(g.group.counts))) for g in result.groups)
    return replace(result, groups=settled, codes=codes, explanation=why)


def _probe(probe: object) -> Probe | None:
    if isinstance(probe, (str, Path)):
        return Probe.load(probe)
    if probe is not None and not isinstance(probe, Probe):
        raise ValueError(f"probe must be a Probe, or the path of one, not a {type(probe).__name__}")
    return probe


def _floors(pairs: list[tuple[Group, Method]], limit: int | None) -> list[Floor]:
    """The floors of all groups, which fit into the limit; else ``InfeasibleBudget``."""
    floors = [chosen.floor(group) for group, chosen in pairs]
    floor = max(1, sum(f.num_bytes for f in floors))
    if limit is not None and limit < floor:
        raise infeasible(limit, floor, _why(pairs, [(f.num_bytes, f.why) for f in floors]))
    return floors


def _settled(
    pairs: list[tuple[Group, Method]],
    counts: Mapping[str, Counts],
    limit: int,
    precision: str | None,
    probe: Probe | None,
) -> tuple[list[tuple[Group, Method]], dict[str, Chosen]]:
    """The groups with other methods in the place of ``auto``, and the choices by the tables that they are for."""
    for group, chosen in pairs:
        chosen.check(group, None)
    assigned: list[tuple[tuple[TableConfig, ...], Method]] = []
    choices: dict[str, Chosen] = {}
    for (group, chosen), share in zip(pairs, _shares(pairs, _floors(pairs, limit), limit, probe)):
        if not isinstance(chosen, Auto):
            assigned.append((group.tables, chosen))
            continue
        own = chosen.precision or precision
        fits, is_all = partial(_fits, group, counts, own), len(pairs) == 1
        found = choose(chosen, group, share, probe, fits, is_all=is_all)
        names = [table.name for table in group.tables]
        choices["*" if is_all else ", ".join(names[:3]) + (", …" if len(names) > 3 else "")] = found
        assigned += _for_these(group.tables, found.spec, own)
    return _groups(assigned, counts, pairs[0][0].hash_seed), choices


def _for_these(
    tables: tuple[TableConfig, ...], spec: MethodLike | Mapping[str, MethodLike], precision: str | None
) -> list[tuple[tuple[TableConfig, ...], Method]]:
    """Tables and their methods, by patterns of which some may be for other tables."""
    patterns = by_pattern(spec)
    used = {method_of(table.name, patterns) for table in tables}
    return _assigned([tables], {p: m for p, m in patterns.items() if p in used}, precision)


def _fits(group: Group, counts: Mapping[str, Counts], precision: str | None, spec: Any, num_bytes: int) -> bool:
    """Whether methods can store the tables of a group in so many bytes."""
    try:
        pairs = _groups(_for_these(group.tables, spec, precision), counts, group.hash_seed)
        for each, chosen in pairs:
            chosen.check(each, None)
        return sum(chosen.floor(each).num_bytes for each, chosen in pairs) <= num_bytes
    except ValueError:  # as where no pattern is for a table, or a method is not for such tables
        return False


def _explained(solved: Plan, choices: Mapping[str, Chosen], probe: Probe | None) -> dict[str, Any]:
    kept: dict[str, float] = {}
    for g in solved.groups:
        if isinstance(g.method, Banded):
            kept |= g.method.kept(g.layout, g.group)
        else:
            kept |= {name: 1.0 for name, entry in g.layout.entries.items() if entry.variant == FULL}
    return explanation(choices, kept, probe, solved.lines())


def _under_training_budget(solve: Callable[[int], Plan], floor: int, limit: int, largest: int, bound: int) -> Plan:
    """The largest plan between floor and limit whose training bytes fit; those of the one at the limit are ``largest``.

    They grow with the inference budget, but where tables of narrow rows become full, which then have less state or no
    projection: there a larger plan may be missed, never the bound.
    """
    best = solve(floor)
    if best.training_bytes > bound:
        least = min(best.training_bytes, largest)
        raise infeasible(bound, least, "the smallest tables these methods can train", phase="training")
    low, high = floor, limit
    while high - low > 1:
        middle = (low + high) // 2
        candidate = solve(middle)
        if candidate.training_bytes <= bound:
            low, best = middle, candidate
        else:
            high = middle
    return best


def _full_bytes(tables: Sequence[TableConfig]) -> int | None:
    sizes = [table.full_bytes for table in tables]
    return None if None in sizes else sum(n for n in sizes if n is not None)


def _check_tables(tables: tuple[TableConfig, ...]) -> None:
    if not tables:
        raise ValueError("there are no tables to plan")
    seen: set[str] = set()
    for table in tables:
        if not isinstance(table, TableConfig):
            raise ValueError(f"tables must be TableConfig, not {type(table).__name__}")
        if table.name in seen:
            raise ValueError(f"two tables are named '{table.name}'")
        seen.add(table.name)


def _checked_hash_seed(hash_seed: object) -> int:
    if (seed := as_int(hash_seed)) is None:
        raise ValueError(f"hash_seed must be an integer, not {hash_seed!r}")
    return seed


def _check_training_precision(name: object, optimizer: FusedOptimizer | None) -> None:
    if name not in TRAINING_FORMATS:
        raise ValueError(f"training_precision must be {' or '.join(TRAINING_FORMATS)}, not {name!r}")
    if name == BF16.name and optimizer is None:
        raise ValueError(
            'training_precision="bf16" needs a fused optimizer, such as optimizer="rowwise_adagrad": stochastic '
            "rounding happens in fused updates, and torch.optim would lose what is smaller than half a step of bf16"
        )


def _check_names(solved: Plan) -> None:
    """Methods name their storage after tables (``a/0``) and groups (``unified``); a table may be called the same."""
    for form in ("training", "serving"):
        names = [item.name for g in solved.groups for item in getattr(g.layout, form).items()]
        twice = next((name for name, times in Counter(names).items() if times > 1), None)
        if twice is not None:
            raise ValueError(f"a part of the storage is named '{twice}' as well as a table: rename table '{twice}'")


def checked_counts(tables: tuple[TableConfig, ...], frequencies: Mapping[str, Any] | None) -> dict[str, Counts]:
    """A count for each row of the tables named, the oov row included; ``ValueError`` for any that do not fit."""
    by_name = {table.name: table for table in tables}
    result: dict[str, Counts] = {}
    if frequencies is not None and not isinstance(frequencies, Mapping):
        raise ValueError(f"frequencies must map table names to counts, not be a {type(frequencies).__name__}")
    for name, values in (frequencies or {}).items():
        if name not in by_name:
            raise ValueError(f"frequencies name '{name}', which is not a table; the tables: {', '.join(by_name)}")
        table = by_name[name]
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
        try:
            counts = np.asarray(values)
        except ValueError:  # rows of different lengths
            counts = np.empty((0, 0))
        if counts.ndim != 1 or not (
            np.issubdtype(counts.dtype, np.integer) or np.issubdtype(counts.dtype, np.floating)
        ):
            raise ValueError(f"frequencies of table '{name}' must be a 1-D array of counts")
        if table.num_embeddings is None:
            raise ValueError(f"frequencies of table '{name}' have no meaning, since it has no num_embeddings")
        if len(counts) != table.num_embeddings:
            raise ValueError(
                f"frequencies of table '{name}' hold {len(counts):,} counts, but it has {table.num_embeddings:,} ids"
            )
        # There may be a billion of them: no pass more than is needed.
        is_float = np.issubdtype(counts.dtype, np.floating)
        if counts.size and ((is_float and not np.isfinite(counts).all()) or counts.min() < 0):
            raise ValueError(f"frequencies of table '{name}' hold a negative or non-finite count")
        if is_float and (counts != np.floor(counts)).any():
            raise ValueError(f"frequencies of table '{name}' hold fractions: give counts, not shares")
        if int(counts.max(initial=0)) * len(counts) >= 2**62 and counts.sum(dtype=np.float64) >= 2**62:
            raise ValueError(f"frequencies of table '{name}' add up to more than 2**62")
        counts = counts.astype(np.int64, copy=False)
        # The oov row is an id like the others, never counted.
        result[name] = np.append(counts, 0) if table.rows != table.num_embeddings else counts
    return result


def method_of(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that a table's name matches."""
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def by_pattern(method: MethodLike | Mapping[str, MethodLike]) -> Mapping[str, MethodLike]:
    """A method for each pattern of table names; one method alone is for all of them.

    Raises:
        ValueError: a pattern that is no text.
    """
    if not isinstance(method, Mapping) or "kind" in method:
        return {"*": method}  # type: ignore[dict-item]
    for pattern in method:
        if not isinstance(pattern, str):
            raise ValueError(f"method maps patterns of table names to methods, and {pattern!r} is no text")
    return method


def _assigned(
    units: Sequence[Sequence[TableConfig]], method: MethodLike | Mapping[str, MethodLike], precision: str | None
) -> list[tuple[tuple[TableConfig, ...], Method]]:
    """The tables of each unit that each pattern covers, and their method."""
    methods = {pattern: from_config(m).with_precision(precision) for pattern, m in by_pattern(method).items()}
    if not methods:
        raise ValueError("method is an empty mapping: give a pattern of table names and a method")
    members: dict[str, list[list[TableConfig]]] = {pattern: [[] for _ in units] for pattern in methods}
    for i, unit in enumerate(units):
        for table in unit:
            pattern = method_of(table.name, methods)
            if pattern is None:
                raise ValueError(f"no pattern of method matches table '{table.name}': add one, or '*' for all others")
            members[pattern][i].append(table)
    assigned: list[tuple[tuple[TableConfig, ...], Method]] = []
    for pattern, found in members.items():
        if not any(found):
            raise ValueError(f"the pattern '{pattern}' of method matches no table that an earlier one has not taken")
        assigned += [(tuple(tables), methods[pattern]) for tables in found if tables]
    return assigned


def _groups(
    assigned: Sequence[tuple[tuple[TableConfig, ...], Method]], counts: Mapping[str, Counts], hash_seed: int
) -> list[tuple[Group, Method]]:
    """Groups, each of a name of its own."""
    pairs: list[tuple[Group, Method]] = []
    for tables, chosen in assigned:
        kind = chosen.kind
        name = kind if kind not in [group.name for group, _ in pairs] else f"{kind}#{len(pairs)}"
        rows_in = row_format(chosen.precision or FP32.name)
        known = tuple(counts.get(t.name) for t in tables)
        pairs.append((Group(name, tables, known, hash_seed, rows_in), chosen))
    return pairs


def _shares(pairs: list[tuple[Group, Method]], floors: Sequence[Floor], limit: int, probe: Probe | None) -> list[int]:
    """The bytes of each group: in proportion to what their tables are worth, if that is known, else to full bytes."""
    # Sums of shares have to stay within 64 bits.
    limit = min(limit, 2**60)
    if len(pairs) == 1:
        return [limit]
    most = [chosen.ceiling(group) for group, chosen in pairs]
    worth = None if probe is None else probe.worth_of([table.name for group, _ in pairs for table in group.tables])
    weights = None if worth is None else [sum(worth[table.name] for table in group.tables) for group, _ in pairs]
    return split(limit, [f.num_bytes for f in floors], [limit if n is None else n for n in most], weights)


def _why(pairs: list[tuple[Group, Method]], floors: list[tuple[int, str]]) -> str:
    if len(pairs) == 1:
        return f"method {pairs[0][1].kind}: {floors[0][1]}"
    (num_bytes, why), (group, method) = max(zip(floors, pairs), key=lambda item: item[0][0])
    return f"method {method.kind} on {len(group.tables)} tables, {num_bytes:,} bytes: {why}"
