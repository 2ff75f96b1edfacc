"""Methods in several precisions in the report: what they are compared with, and how they are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sweep_cases import read, run

from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic
from embtables.sizes.memory import format_bytes
from embtables.sweeps import figure
from embtables.sweeps.cells import in_precisions, parse_methods
from embtables.sweeps.config import describe
from embtables.sweeps.report import note, remarks
from embtables.sweeps.summary import Summary, summarize
from embtables.training.config import load_config


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of fabricated cells in int4 and, after it, fp32."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "fake").mkdir()
    prepare_synthetic(folder / "data", Synthetic(rows=4000, cardinalities=(500, 50), seed=3))
    methods = in_precisions(parse_methods("full,hash,drop_feature,fewer_dimensions"), "int4,fp32")
    config = describe(folder / "data", methods, ["50%", "8"], 1, load_config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE", str(folder / "fake"))
        run(config, folder / "out", jobs=2)
    return folder / "out"


@pytest.fixture(scope="module")
def summary(out: Path) -> Summary:
    return summarize(out, resamples=20)


@pytest.fixture(scope="module")
def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["method"], row["budget"]): row for row in read(out)}


def test_the_reference_is_full_as_it_was_trained(summary: Summary, rows: dict[tuple[str, str], dict[str, str]]) -> None:
    full = float(rows["full(precision=fp32)", ""]["test_auc"])
    for method, budget in (
        ("full(precision=int4)", ""),
        ("hash(precision=int4)", "50%"),
        ("hash(precision=fp32)", "50%"),
    ):
        point = summary.point(method, budget)
        assert point is not None
        wanted = float(rows[method, budget]["test_auc"]) - full
        assert [each.difference for each in point.differences] == [pytest.approx(wanted, abs=1e-12)]
    point = summary.point("full(precision=fp32)", "")
    assert point is not None and summary.full is point and point.differences == []
    assert not [text for text in remarks(summary) if "full" in text and "fewer" not in text]
    # Without it the differences are to what there is, and the report says to what.
    others = replace(summary, points=[each for each in summary.points if each is not point])
    assert others.full is others.point("full(precision=int4)", "")
    assert "There is no full: differences are to full(precision=int4)." in remarks(others)
    # The label of the training's own precision comes first, wherever it stands.
    plain = replace(point, spec="full", method="full")
    assert replace(summary, points=[*summary.points, plain]).full is plain


def test_rivals_are_the_best_form_of_their_kind(summary: Summary, rows: dict[tuple[str, str], dict[str, str]]) -> None:
    # By the noise of the fabricated cells: hash in fp32 < dropping in int4 < hash in int4 < dropping in fp32.
    found = {(point.method, point.budget): point for point in summary.points}
    own, dropped, plain = (
        float(rows[method, "50%"]["test_auc"])
        for method in ("hash(precision=int4)", "drop_feature(precision=int4)", "drop_feature(precision=fp32)")
    )
    assert dropped > own > plain
    worse = found["hash(precision=int4)", "50%"]
    assert note(worse, summary).startswith(f"WORSE than drop_feature(precision=int4) ({own - dropped:+.4f})")
    assert not found["hash(precision=fp32)", "50%"].below_drop
    fewer = {f"fewer_dimensions(precision={precision})" for precision in ("int4", "fp32")}
    assert {point.method for point in summary.points if point.below_drop} == {worse.method, *fewer}
    assert all(point.drop is None for point in summary.points if point.method.startswith(("drop_feature", "full")))
    # Fewer dimensions, of which both forms are as noisy, do worse.
    assert worse.fewer is not None and worse.fewer.method in fewer and worse.beats_fewer


def test_the_figure_draws_every_form(summary: Summary, out: Path, rows: dict[tuple[str, str], dict[str, str]]) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    figure._draw_full(axes, summary)
    figure._draw_methods(axes, summary)
    figure._mark_dropped(axes, summary)
    curves = {each.get_label(): each.lines[0] for each in axes.containers}
    row = rows["full(precision=int4)", ""]
    assert curves["full(precision=int4)"].get_xydata().tolist() == [
        [float(row["inference_bytes"]), float(row["test_auc"])]
    ]
    labels = {f"{name}, {form}" for name in ("features dropped", "fewer dimensions") for form in ("int4", "fp32")}
    assert curves.keys() == labels | {"hash(precision=int4)", "hash(precision=fp32)", "full(precision=int4)"}
    # Forms of one baseline share marker and dashes, and differ in their gray.
    alike = [curves[f"features dropped, {form}"] for form in ("int4", "fp32")]
    assert len({line.get_marker() for line in alike}) == 1 and len({line.get_color() for line in alike}) == 2
    texts = [text.get_text() for text in axes.texts]
    assert f"full: {format_bytes(int(rows['full(precision=fp32)', '']['inference_bytes']))}" in texts
    # At 8 bytes no table is left, in whatever precision.
    marks = [*texts, *(line.get_label() for line in axes.lines)]
    assert [text for text in marks if str(text).startswith(("no table left", "↓ without any table"))]
