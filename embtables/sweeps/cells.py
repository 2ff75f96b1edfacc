"""The cells of a sweep: variant × method × budget × seed, and their names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from embtables._util.reading import NotYaml, parse_yaml
from embtables.formats import FP32, row_format
from embtables.methods import kinds
from embtables.plan.probe import MethodSpec as MethodSpec
from embtables.sizes.budget import parse_budget
from embtables.training.config import parse_named, parse_value
from embtables.training.planning import method_label

#: (variant, method, budget); the variant is empty in a sweep without variants, the budget where the method takes none.
Place = tuple[str, str, str]

#: Full tables, and those served in low precision, which are one training with them: they cost its scores.
FULL: tuple[MethodSpec, ...] = ("full", {"kind": "full", "precision": "int8"}, {"kind": "full", "precision": "int4"})
#: Rows without which a sweep cannot be read: the upper mark, and what costs nothing to try.
BASELINES: tuple[MethodSpec, ...] = (
    *FULL,
    "drop_feature",
    "frequency_cutoff",
    "fewer_dimensions",
    {"kind": "fewer_dimensions", "projection": True},
)


# Between the fields of an entry of a grid.
_BEFORE_FIELD = re.compile(r" (?=[\w.]+\.\w+=)")
# Names get endings such as .failed.json, and most file systems end at 255 bytes.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    `budget` is the text the user gave, and empty where the method takes none; `tuned` is an entry of :func:`grid`, and
    empty where the training configuration applies as it is; `variant` names that, where there are several.
    """

    method: str
    budget: str
    seed: int
    tuned: str = ""
    variant: str = ""

    @property
    def place(self) -> Place:
        return self.variant, self.method, self.budget

    @property
    def name(self) -> str:
        """Unique in its sweep and fit for a file name: ``hash-10pct-s0``."""
        values = [re.sub(r"^[\w.]*\.", "", assignment) for assignment in assignments(self.tuned)]
        return file_name(self.variant, self.method, self.budget.replace("%", "pct"), f"s{self.seed}", *values)

    def tuned_value(self, field: str) -> Any:
        """What was chosen for a field of the grid; None where it is not of it."""
        found = dict(assignment.split("=", 1) for assignment in assignments(self.tuned))
        return parse_yaml(found[field]) if field in found else None


def file_name(*parts: str) -> str:
    """The parts that are not empty, with dashes between them, of characters and a length that file systems take."""
    name = "-".join(re.sub(r"[^\w.=+]+", "_", part).strip("_") for part in parts if part)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME // 4]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def parse_variants(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["DIN: {model.name: din, data.max_history: 20}", …]`` as {name: {field: value}}, in the order given.

    Raises:
        ValueError: a text is no such mapping, or a name is given twice.
    """
    variants = parse_named(texts, "--variant", "NAME", "DIN: {model.name: din, data.max_history: 20}")
    for name in variants:
        if not file_name(name):
            raise ValueError(f"--variant {name!r} needs a name with letters or digits in it")
    return variants


def parse_tune(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["tables.regularization=0.03,0.1", …]`` as {field: values}, in the order given.

    Raises:
        ValueError: a text is of another form or has no values, or a field is given twice.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        field, _, listed = text.partition("=")
        field = field.strip()
        try:
            values = parse_yaml(f"[{listed}]")
        except NotYaml:
            values = None
        if not field or not isinstance(values, list) or not values:
            raise ValueError(
                f"--tune {text!r} is not of the form FIELD=VALUE,VALUE, such as tables.regularization=0.03,0.1,0.3"
            )
        if field in found:
            raise ValueError(f"--tune {field} is given twice: give all its values at once, separated by commas")
        found[field] = values
    return found


def grid(tune: Mapping[str, Sequence[Any]]) -> list[str]:
    """Every combination of the values as a text, ``"tables.regularization=0.1 tables.learning_rate=0.05"``."""
    named = [[f"{field}={value_text(value)}" for value in values] for field, values in tune.items()]
    return [" ".join(combination) for combination in product(*named)] if named else []


def value_text(value: Any) -> str:
    """A text on one line from which YAML reads the same value.

    Raises:
        ValueError: there is none that :func:`assignments` would leave whole.
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.strip().removesuffix("...").strip()
    if not text.isprintable() or _BEFORE_FIELD.search(text):
        raise ValueError(f"the value {value!r} holds a line end, a control character or another FIELD=VALUE")
    return text


def assignments(tuned: str) -> list[str]:
    """The parts of an entry of :func:`grid`, one a field."""
    return _BEFORE_FIELD.split(tuned) if tuned else []


def parse_methods(text: str) -> dict[str, MethodSpec]:
    """``"full,hash,{kind: compositional, operation: add}"`` as {label: specification}, in the order given.

    ``all`` stands for every method that is there, those of other packages too.

    Raises:
        ValueError: the text is empty, is no such list, or an entry is neither a kind nor a mapping with a kind.
    """
    try:
        entries = parse_yaml(f"[{text}]")
    except NotYaml:
        raise ValueError(
            f"methods {text!r} cannot be read: give kinds separated by commas, such as full,hash, "
            "or mappings such as {kind: compositional, operation: add}"
        ) from None
    if not entries:
        raise ValueError("no methods given: name at least one, such as --methods hash")
    entries = [each for entry in entries for each in (kinds() if entry == "all" else [entry])]
    for entry in entries:
        if not isinstance(entry, (str, dict)):
            raise ValueError(f"method {entry!r} is neither a kind, such as hash, nor a mapping such as {{kind: hash}}")
    found: dict[str, MethodSpec] = {}
    for entry in entries:
        if found.setdefault(method_label(entry), entry) != entry:
            raise ValueError(
                f"two methods are called {method_label(entry)}, as they differ in what they say of each table alone: "
                "compare them in sweeps of their own"
            )
    return found


def in_precisions(methods: Mapping[str, MethodSpec], text: str | None) -> dict[str, MethodSpec]:
    """Every method in every precision of ``"fp32,int8"``, those that say their own precision in that alone.

    Raises:
        ValueError: a precision that there is not.
    """
    if text is None:
        return dict(methods)
    precisions = list(dict.fromkeys(row_format(part.strip()).name for part in text.split(",")))
    found = (_in_precision(spec, precision) for spec in methods.values() for precision in precisions)
    return {method_label(spec): spec for spec in found}


def _in_precision(spec: MethodSpec, precision: str) -> MethodSpec:
    if isinstance(spec, dict) and "kind" not in spec:
        return {pattern: _in_precision(part, precision) for pattern, part in spec.items()}
    fields = {"kind": spec} if isinstance(spec, str) else spec
    return {"precision": precision, **fields}


def takes_budget(spec: MethodSpec) -> bool:
    """Full tables are what they are; every other method is solved for a budget."""
    if isinstance(spec, dict) and "kind" not in spec:
        return any(takes_budget(part) for part in spec.values())
    return (spec if isinstance(spec, str) else spec["kind"]) != "full"


def kind_of(spec: MethodSpec) -> str | None:
    """The kind of a method; ``None`` where it is several by pattern."""
    return spec if isinstance(spec, str) else spec.get("kind")


def with_baselines(methods: Mapping[str, MethodSpec]) -> dict[str, MethodSpec]:
    """`methods` and the baselines that it lacks: full first, the others last."""
    missing: dict[str, MethodSpec] = {}
    for spec in BASELINES:
        if not any(label in methods for label in labels_of(spec)):
            missing[method_label(spec)] = spec
    first: dict[str, MethodSpec] = {"full": "full"} if "full" in missing else {}
    return {**first, **methods, **missing}


def is_baseline(method: str) -> bool:
    """Whether a label is that of a baseline, with or without the precision fp32 written out."""
    return any(method in labels_of(spec) for spec in BASELINES)


def labels_of(spec: MethodSpec) -> tuple[str, str]:
    """What a method is called as it is given, and with the precision fp32 written out."""
    return method_label(spec), method_label(_in_precision(spec, FP32.name))


def parse_budgets(text: str) -> list[str]:
    """``"50%,10%"`` as its parts, once each: of several spellings of one budget the first counts.

    What a part means for the tables, if anything, is for the planner to say.
    """
    budgets = [part.strip() for part in text.split(",")]
    if not all(budgets):
        raise ValueError(f"budgets {text!r} has an empty entry: give for example --budgets 50%,10%,1%")
    found: dict[tuple[str, object], str] = {}
    for budget in budgets:
        found.setdefault(_meaning(budget), budget)
    return list(found.values())


def same_budget(text: str, budgets: Sequence[str]) -> str | None:
    """The one of `budgets` that means what `text` does; None where there is none."""
    return next((budget for budget in budgets if _meaning(budget) == _meaning(text.strip())), None)


def _meaning(budget: str) -> tuple[str, object]:
    """What spellings of one budget have in common: its bytes, or its share of some tables."""
    try:
        value = parse_value(budget, "budget")
        shares = [parse_budget(value, full_bytes) for full_bytes in (10**15, 10**18)]
    except (ValueError, TypeError):
        return "text", budget
    return ("bytes", shares[0]) if shares[0] == shares[1] else ("share", shares[1])


def points(methods: Mapping[str, MethodSpec], budgets: Sequence[str]) -> list[tuple[str, str]]:
    """Every (method, budget), in the order of the results. Full has one, with an empty budget."""
    return [(label, budget) for label, spec in methods.items() for budget in (budgets if takes_budget(spec) else [""])]
