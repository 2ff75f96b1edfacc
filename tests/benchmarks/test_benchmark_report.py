from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from sweep_cases import config_of, read, run

from embtables._util.files import sealed, unsealed
from embtables.cli.app import run as command_line
from embtables.sweeps.cells import parse_methods, with_baselines
from embtables.sweeps.config import describe
from embtables.sweeps.report import head, line, markdown, sections, write_report
from embtables.sweeps.summary import Summary, sign_flip_p, summarize
from embtables.training.config import load_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of fabricated cells: full and hash ok, frequency_cutoff below drop_feature, 8 bytes infeasible."""
    folder = tmp_path_factory.mktemp("sweep")
    monkeypatch = pytest.MonkeyPatch()
    (folder / "fake").mkdir()
    monkeypatch.setenv("FAKE", str(folder / "fake"))
    from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic

    prepare_synthetic(folder / "data", Synthetic(rows=4000, cardinalities=(500, 50), seed=3))
    run(config_of(folder / "data", seeds=2), folder / "out", jobs=2)
    monkeypatch.undo()
    return folder / "out"


@pytest.fixture
def sweep(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def summary_of(folder: Path) -> Summary:
    return summarize(folder, resamples=50)


def cells(folder: Path, method: str, budget: str) -> list[dict[str, str]]:
    return [row for row in read(folder) if (row["method"], row["budget"]) == (method, budget)]


def drop_rows(folder: Path, keep: object) -> None:
    """Rewrite results.csv with the rows for which `keep` is true."""
    lines = (folder / "results.csv").read_text().splitlines(keepends=True)
    rows = read(folder)
    assert callable(keep)
    kept = [text for text, row in zip(lines[1:], rows, strict=True) if keep(row)]
    (folder / "results.csv").write_text("".join([lines[0], *kept]))


def test_means_spreads_and_differences(finished: Path) -> None:
    summary = summary_of(finished)
    point = summary.point("hash", "50%")
    assert point is not None
    aucs = [float(row["test_auc"]) for row in cells(finished, "hash", "50%")]
    full = [float(row["test_auc"]) for row in cells(finished, "full", "")]
    assert point.mean("test_auc") == pytest.approx(sum(aucs) / 2)
    assert point.std("test_auc") == pytest.approx(abs(aucs[0] - aucs[1]) / math.sqrt(2))
    # Seed by seed, against the full table of the same seed.
    assert [d.difference for d in point.differences] == pytest.approx([a - f for a, f in zip(aucs, full)])
    assert all(d.low < d.difference < d.high for d in point.differences)
    row = dict(zip(("method", "budget", "bytes", "ratio", "auc", "difference", "zero"), line(point, summary)))
    assert row["bytes"] == f"{int(cells(finished, 'hash', '50%')[0]['inference_bytes']):,}"
    assert row["auc"] == f"{np.mean(aucs):.4f} ± {np.std(aucs, ddof=1):.4f}"
    low, high = sorted(a - f for a, f in zip(aucs, full))
    assert row["difference"] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]"
    below = sum(d.high < 0 for d in point.differences)
    assert row["zero"] == (f"{below}↓ of 2" if below else "0 of 2")


def test_full_first_then_the_best_of_each_budget(finished: Path) -> None:
    found = [[(p.method, p.budget) for p in section] for section in sections(summary_of(finished))]
    assert found[0] == [("full", "")]
    # By the noise of the fabricated cells: hash < drop_feature < frequency_cutoff.
    assert found[1] == [("hash", "50%"), ("drop_feature", "50%"), ("frequency_cutoff", "50%")]


def test_worse_than_dropping_is_flagged(finished: Path) -> None:
    summary = summary_of(finished)
    flagged = {(p.method, p.budget) for p in summary.points if p.below_drop}
    assert flagged == {("frequency_cutoff", "50%"), ("frequency_cutoff", "1%")}
    text = markdown(summary, 50, [])
    assert "Worse than dropping features at the same budget: frequency_cutoff at 50%, frequency_cutoff at 1%." in text
    (row,) = [row for row in text.splitlines() if row.startswith("| frequency_cutoff |    50%") and "log" not in row][
        :1
    ]
    assert "WORSE than drop_feature (-" in row


def test_what_does_not_beat_fewer_dimensions_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake").mkdir()
    monkeypatch.setenv("FAKE", str(tmp_path / "fake"))
    from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic

    prepare_synthetic(tmp_path / "data", Synthetic(rows=4000, cardinalities=(500, 50), seed=3))
    methods = with_baselines(parse_methods("hash,compositional"))
    config = describe(tmp_path / "data", methods, ["50%"], 2, load_config())
    run(config, tmp_path / "out", jobs=2)
    summary = summary_of(tmp_path / "out")
    # By the noise: hash < projected < compositional < without a projection, which is not the one to beat.
    assert {point.method for point in summary.points if not point.beats_fewer} == {"compositional"}
    aucs = [
        [float(row["test_auc"]) for row in cells(tmp_path / "out", method, "50%")]
        for method in ("compositional", "fewer_dimensions(projection=True)", "fewer_dimensions")
    ]
    assert all(projected > own > plain for own, projected, plain in zip(*aucs))
    text = markdown(summary, 50, [])
    assert "No better than full tables of fewer dimensions at the same budget: compositional at 50%." in text
    row = next(row for row in text.splitlines() if row.startswith("| compositional "))
    difference = np.subtract(*aucs[:2]).mean()
    assert f"no better than fewer_dimensions(projection=True) ({difference:+.4f})" in row


def test_infeasible_cells_show_their_floors(finished: Path) -> None:
    text = markdown(summary_of(finished), 50, [])
    (row,) = [row for row in text.splitlines() if re.match(r"\| hash +\| +8 ", row)]
    assert "infeasible: floor 128 bytes" in row and "– |" in row


def test_files_are_written_and_printed(sweep: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line(["report", str(sweep), "--resamples", "20"]) == 0
    printed = capfd.readouterr().out
    for name in ("report.md", "accuracy_memory.png", "accuracy_memory.svg"):
        assert str(sweep / name) in printed.splitlines()
    assert (sweep / "accuracy_memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = ElementTree.parse(sweep / "accuracy_memory.svg")
    texts = {"".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"hash", "full tables", "test AUC", "bytes of the served tables", "features dropped"} <= texts
    assert any(text.startswith("Infeasible: hash at 8 (floor 128 B)") for text in texts)
    assert "![Test AUC" in (sweep / "report.md").read_text()
    assert "hash" in printed and "Learning rates were shared by all methods" in printed
    assert "tables.learning_rate 0.05, dense.learning_rate 0.001" in " ".join(printed.split())
    assert not [path for path in sweep.iterdir() if path.name.endswith(("tmp", ".png.svg"))]


def test_a_second_report_is_the_same_and_bootstraps_nothing(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(sweep, resamples=20)
    names = ("report.md", "accuracy_memory.png", "accuracy_memory.svg")
    before = [(sweep / name).read_bytes() for name in names]

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("bootstrapped again")

    monkeypatch.setattr("embtables.sweeps.summary.bootstrap_auc_difference", never)
    write_report(sweep, resamples=20)
    assert [(sweep / name).read_bytes() for name in names] == before
    # Other scores are another difference.
    cell = cells(sweep, "hash", "50%")[0]["cell"]
    scores = np.load(sweep / "cells" / cell / "test_scores.npy")
    np.save(sweep / "cells" / cell / "test_scores.npy", scores[::-1])
    with pytest.raises(AssertionError, match="again"):
        write_report(sweep, resamples=20)


def test_an_unfinished_sweep_says_so(sweep: Path) -> None:
    drop_rows(sweep, lambda row: row["method"] == "hash" and row["seed"] == "0")
    report = write_report(sweep, resamples=20)
    text = (sweep / "report.md").read_text()
    assert report.summary.is_partial
    assert "Unfinished: 3 of 20 cells have a result" in text
    assert "There is no full table to compare to yet." in text and "not run yet" in text
    drop_rows(sweep, lambda row: False)
    assert [path.name for path in write_report(sweep, resamples=20).files] == ["report.html", "report.md"]
    assert head(replace(report.summary, num_finished=1))[1].startswith("Unfinished: 1 of 20 cells has a result;")


def test_failed_cells_are_shown_with_their_message(sweep: Path) -> None:
    text = (sweep / "results.csv").read_text()
    name = cells(sweep, "hash", "50%")[1]["cell"]
    lines = [
        row if f",{name}," not in row else row.replace(",ok,", ",failed,").replace(f",{name},", f",{name},no room left")
        for row in text.splitlines()
    ]
    (sweep / "results.csv").write_text("\n".join(lines) + "\n")
    (sweep / "cells" / name / "metrics.json").unlink()  # which a run that failed has not
    summary = summary_of(sweep)
    point = summary.point("hash", "50%")
    assert point is not None and point.num_ok == 1 and summary.is_partial
    assert line(point, summary)[-1] == "1 failed: no room left" and line(point, summary)[-2] == "1/2"


def test_learning_rates_that_differ_are_not_called_shared(sweep: Path) -> None:
    name = cells(sweep, "hash", "50%")[1]["cell"]
    (sweep / "cells" / name / "config.yaml").write_text("tables: {learning_rate: 0.2}\ndense: {learning_rate: 0.001}\n")
    text = markdown(summary_of(sweep), 50, [])
    assert "tables.learning_rate NOT shared (0.05 for full, hash" in text and "0.2 for hash)" in text


def test_scores_of_other_test_rows_are_refused(sweep: Path) -> None:
    name = cells(sweep, "hash", "50%")[0]["cell"]
    np.save(sweep / "cells" / name / "test_scores.npy", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=f"{name}.*3.*scores"):
        summary_of(sweep)


def test_a_folder_that_is_no_sweep(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match="it has no sweep.yaml"):
        write_report(tmp_path)
    shutil.copy(finished / "sweep.yaml", tmp_path)
    with pytest.raises(ValueError, match="results.csv is missing"):
        write_report(tmp_path)
    (tmp_path / "sweep.yaml").write_text("seeds: [")
    with pytest.raises(ValueError, match="sweep.yaml is damaged"):
        write_report(tmp_path)


def test_no_p_value_below_five_seeds() -> None:
    assert sign_flip_p([-1.0] * 4) is None
    assert sign_flip_p([-1.0, -1.0, -1.0, -1.0, math.nan]) is None
    assert sign_flip_p([-1.0] * 5) == pytest.approx(2 / 32)
    values = [0.3, -0.1, 0.2, 0.25, 0.05, -0.02]
    sums = [abs(sum(s * v for s, v in zip(signs, values))) for signs in product((1, -1), repeat=6)]
    expected = sum(total >= abs(sum(values)) - 1e-12 for total in sums) / 64
    assert sign_flip_p(values) == pytest.approx(expected)
    assert 0 < (sign_flip_p([0.01] * 20) or 0) < 0.01 or sign_flip_p([0.01] * 20) == 0


def test_the_report_needs_no_prepared_data(sweep: Path) -> None:
    config = unsealed(yaml.safe_load((sweep / "sweep.yaml").read_text())) | {"data": "/gone"}
    (sweep / "sweep.yaml").write_text(yaml.safe_dump(sealed(config)))
    assert write_report(sweep, resamples=20).summary.point("hash", "50%").differences  # type: ignore[union-attr]
    assert json.loads((sweep / "differences.json").read_text())
