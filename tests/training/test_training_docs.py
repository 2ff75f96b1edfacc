"""docs/training.md lists the fields that exist, with their defaults."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from embtables.training.config import RunConfig

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_table_of_fields_is_complete_and_right() -> None:
    listed = re.findall(r"^\| `(\w+\.\w+)` \| `(.+?)` \| (.+) \|$", PAGE, re.MULTILINE)
    wanted = {
        f"{section}.{name}": field.get_default(call_default_factory=True)
        for section, fields in RunConfig.model_fields.items()
        for name, field in fields.annotation.model_fields.items()
    }
    assert [name for name, _, _ in listed] == list(wanted)
    assert {name: yaml.safe_load(default) for name, default, _ in listed} == wanted
