"""The public interface changes only where somebody meant it to."""

from __future__ import annotations

import difflib

import pytest
from api import COMMAND_LINE, FILE, PACKAGES, read, section

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", [*PACKAGES, COMMAND_LINE])
def test_the_public_interface_is_as_written_down(name: str) -> None:
    if name == "embtables.torchrec":
        pytest.importorskip("torchrec.sparse.tensor_dict", reason="torchrec is not installed", exc_type=ImportError)
    written, found = read()[name].splitlines(), section(name).splitlines()
    changes = [
        line
        for line in difflib.unified_diff(written, found, lineterm="", n=1)
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert not changes, (
        f"the public interface of {name} is not as tests/data/{FILE.name} has it (-: written down, +: found):\n"
        + "\n".join(changes)
        + "\nIf the change is meant, run `python -m tests.api`, commit the file with it, and add a line to "
        "CHANGELOG.md; docs/compatibility.md says what may change when."
    )


def test_every_section_of_the_file_is_compared() -> None:
    assert list(read()) == [*PACKAGES, COMMAND_LINE]
