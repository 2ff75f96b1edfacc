"""The comparison of two versions, bit for bit: what it covers, that it repeats itself, and that it sees differences."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import core_cases
import pytest
import torch

from benchmarks import bits
from embtables import ops
from embtables.methods import from_config, kinds


def test_every_method_and_variant_is_a_case() -> None:
    covered = [from_config(config) for config in bits.methods().values() if "kind" in config]
    assert {method.kind for method in covered} == set(kinds())
    assert all(from_config(variant) in covered for variant in core_cases.VARIANTS)
    assert {case.method for case in bits.grid()} == set(bits.methods())


def test_every_pair_of_settings_is_a_case() -> None:
    """All that can be: each axis with each other, but for combinations that ``grid`` rules out by what they are."""
    cases = list(bits.grid())
    pairs: dict[tuple[str, str], set[tuple[Any, Any]]] = defaultdict(set)
    names = [field.name for field in fields(bits.Case) if field.name != "budget"]
    for case in cases:
        for a, b in combinations(names, 2):
            pairs[a, b].add((getattr(case, a), getattr(case, b)))
    values = {name: sorted({getattr(case, name) for case in cases}) for name in names}
    lacking = [((a, x), (b, y)) for a, b in pairs for x in values[a] for y in values[b] if (x, y) not in pairs[a, b]]

    def impossible(settings: dict[str, Any]) -> bool:
        match settings:
            case {"dtype": "float64", "backend": "native"}:
                return True
            case {"optimizer": "dense" | "sparse", "decay": "l2" | "clip" | "both"}:
                return True
            case {"pooling": pooling, "call": call}:
                return call not in bits.CALLS[pooling]
            case {"call": "views" | "collection", "weighted": True}:
                return settings["call"] == "collection"  # views have weights where they sum
            case {"method": method, "tables": "no vocabulary"}:
                return method.split()[0] not in bits.HASHING
            case {"method": method, "frequencies": "none"}:
                return any(kind in method for kind in bits.COUNTED)
        return False

    assert [pair for pair in lacking if not impossible(dict(pair))] == []
    full = {(c.method, c.optimizer, c.dtype, c.pooling, c.backend) for c in bits.grid(full=True)}
    assert len(full) == len(bits.methods()) * len(bits.OPTIMIZERS) * len(bits.POOLINGS) * 7


def test_every_case_has_a_name_of_its_own() -> None:
    names = [name for name, _ in bits.cases(full=True)]
    assert len(names) == len(set(names))


def test_writing_twice_is_the_same_and_a_difference_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    only = "hash | optimizer adam | dtype float32 | pooling sum"
    assert bits.main(["write", str(first), "--only", only]) == 0
    assert bits.main(["write", str(second), "--only", only]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert bits.main(["compare", str(first), str(second)]) == 0
    found = json.loads(first.read_text(encoding="utf-8"))["cases"]
    assert all("error" not in results for results in found.values())
    wanted = {"vectors of step 3", "gradients", "weights", "optimizer state", "dense", "served", "initial weights"}
    assert all(wanted <= results.keys() for results in found.values())
    backends = ["reference"] if ops.instructions() is None else ["reference", "native"]
    assert [name.split(" | ")[-1] for name in found if name.startswith("method hash")] == backends

    # A learning rate that is a little off shows in what follows the second step, and in nothing before.
    set_rate = bits.EmbeddingTables.set_learning_rate
    monkeypatch.setattr(bits.EmbeddingTables, "set_learning_rate", lambda self, lr: set_rate(self, lr * (1 + 1e-6)))
    assert bits.main(["write", str(second), "--only", only]) == 0
    capsys.readouterr()
    assert bits.main(["compare", str(first), str(second)]) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"0 of {len(found)} cases are equal")
    assert re.search(r"results that differ: .*optimizer state in", told)
    # Only tables that resume from the weights have other vectors.
    assert not re.search(r"(?<!resumed: )vectors of step|initial weights", told)


def test_cases_that_vanish_or_appear_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"machine": "m", "torch": "t", "instructions": None, "missing": []}
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps({"about": about, "cases": {"a": {"x": "1"}, "b": {"x": "1"}}}))
    after.write_text(json.dumps({"about": about | {"torch": "u"}, "cases": {"a": {"x": "1"}, "c": {"x": "1"}}}))
    assert bits.main(["compare", str(before), str(after)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "the files differ in their torch: t and u",
        "1 of 1 cases are equal",
        "1 vanished:",
        "  b",
        "1 appeared:",
        "  c",
    ]


def test_digests_see_types_shapes_bits_and_order_but_no_names() -> None:
    one, other = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    digests = [bits.digest([t]) for t in (one, other, one.double(), one.view(1, 2), one.to(torch.bfloat16))]
    assert len(set(digests)) == len(digests)
    assert bits.digest([one, other]) != bits.digest([other, one])
    assert bits.unordered([one, other]) == bits.unordered([other, one])
    assert bits.digest([torch.arange(6.0).view(2, 3).t()]) == bits.digest(
        [torch.arange(6.0).view(2, 3).t().contiguous()]
    )
