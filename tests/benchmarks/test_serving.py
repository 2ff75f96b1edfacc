"""The benchmark of served files, with small ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import serving


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/self/smaps_rollup")
def test_readers_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "tables.safetensors"
    serving.make(path, 0.02)
    serving._warm(path)
    found = serving.measure("embtables", path, 1, 100, 3)
    assert set(found) == {"open_ms", "first_ms", "steady_ms", "mb"} and all(value > 0 for value in found.values())
    assert 10 < found["mb"] < 25  # nearly all pages of the file
    for name, (_, open_file) in serving.CONTESTANTS.items():
        vectors = open_file(path)(serving.torch.zeros(2, serving.TABLES, dtype=serving.torch.int64))
        assert len(vectors) in (2, serving.TABLES), name


def test_the_table_says_what_was_left_out(tmp_path: Path) -> None:
    names = ["gigabytes", "reader", *serving.COLUMNS]
    values = ["8.0", "torch.load", "2540.4", "0.378", *[""] * 5, "does not fit"]
    (tmp_path / "results.csv").write_text(",".join(names) + "\n" + ",".join(values) + "\n")
    assert serving.table(tmp_path).splitlines()[-1] == (
        "| 8 | torch.load | 2,540 | 0.38 | – | – | – | – | – | does not fit |"
    )
