"""The page of a sweep: what it holds, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sweep_cases import config_of, run

import embtables
from embtables._util.files import sealed
from embtables.cli.app import run as command_line
from embtables.sweeps.cells import Cell, file_name, parse_methods
from embtables.sweeps.config import SweepConfig, describe
from embtables.sweeps.page.build import parts
from embtables.sweeps.planning import cell_config
from embtables.sweeps.report import write_report
from embtables.sweeps.results import row, write_results
from embtables.sweeps.sweep import shell_command, train_command
from embtables.training.config import load_config
from embtables.training.learning_curve import COLUMNS, write_curve

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> %{x} &amp; 'a\" {{data}} <b>"
FULL_BYTES = 100_000
FIGURES = ("curve", "bytes", "slices", "seeds", "latency", "learning")


def held(folder: Path) -> dict[str, Any]:
    """The data in a page."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def visible(folder: Path) -> str:
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", (folder / "report.html").read_text(encoding="utf-8"), flags=re.DOTALL)


def fabricated(out: Path, config: SweepConfig, *, cells: bool = True, message: str = "") -> Path:
    """A finished sweep that nobody ran: results.csv, and for each cell metrics, curve and plan.

    The second budget of ``drop_feature`` is infeasible, that of ``robe`` says less than the click rate, full tables
    over-fit, and one seed of ``hash`` failed.
    """
    (out / "cells").mkdir(parents=True)
    (out / "sweep.yaml").write_text(yaml.safe_dump(sealed(config.model_dump(mode="json")), sort_keys=False))
    tables = [embtables.TableConfig("user", 500, 4), embtables.TableConfig("<i>item</i>", 700, 4)]
    plan = embtables.plan(tables, {"kind": "hash", "precision": "int8"}, "50%").to_dict()
    rows = []
    for number, cell in enumerate(config.cells(range(config.seeds))):
        share = 1.0 if not cell.budget else float(cell.budget.removesuffix("%")) / 100
        values: dict[str, Any] = {"inference_bytes": int(share * FULL_BYTES), "full_bytes": FULL_BYTES, "ratio": share}
        order = list(config.methods).index(cell.method)
        auc = 0.8 - 0.02 * np.log10(1 / share) - 0.004 * order + 0.001 * cell.seed
        status = "ok"
        if cell.method == "drop_feature" and cell.budget == config.budgets[-1]:
            status, values = "infeasible", {"floor_bytes": 777, "message": "too small"}
        elif cell.method == "hash" and cell.seed == config.seeds - 1 and cell.budget == config.budgets[0]:
            status, values = "failed", {"message": message or "no room left"}
        else:
            values |= {f"{split}_auc": auc + 0.01 * (split == "valid") for split in ("valid", "test")}
            values |= {f"test_auc_{name}": auc - 0.01 * i for i, name in enumerate(("head", "torso", "tail"))}
            values |= {"test_logloss": 0.4, "test_normalized_entropy": 1.3 if cell.method == "robe" else 0.7}
            values |= {"test_calibration": 1.01, "lookup_latency_us": 20.0 + number % 7, "best_epoch": 1, "epochs": 4}
        rows.append(row(cell, status, "made", "dlrm", values))
        if cells and status == "ok":
            folder = out / "cells" / cell.name
            folder.mkdir()
            said = {"overfitting": "validation fell after epoch 1" if cell.method == "full" else None, "remarks": []}
            metrics = {"status": "ok", "seed": cell.seed, **values, **said}
            (folder / "metrics.json").write_text(json.dumps(metrics))
            (folder / "plan.json").write_text(json.dumps(plan))
            curve = [
                dict.fromkeys(COLUMNS, 0.5) | {"step": 10 * epoch, "epoch": epoch, "valid_auc": 0.8 - 0.01 * epoch}
                for epoch in range(1, 5)
            ]
            write_curve(curve, folder / "validation.csv")
    write_results(rows, out / "results.csv")
    return out


def config_with(data: Path, methods: str, budgets: list[str], seeds: int = 2, **more: Any) -> SweepConfig:
    return describe(data, parse_methods(methods), budgets, seeds, load_config(), **more)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    methods = "full,hash,{kind: hash, precision: int4},{kind: compositional, operation: add},robe,drop_feature"
    out = fabricated(tmp_path_factory.mktemp("page") / "sweep", config_with(data, methods, ["10%", "1%"]))
    write_report(out, resamples=20)
    return out


def point_of(found: dict[str, Any], method: str, budget: str) -> dict[str, Any]:
    return next(p for p in found["points"] if (found["methods"][p["method"]]["name"], p["budget"]) == (method, budget))


# ---- what it holds ------------------------------------------------------------------------------------------------


def test_the_recommendation_comes_first_and_is_that_of_recommend(made: Path) -> None:
    text = visible(made)
    assert text.index("What to choose") < text.index("Accuracy for bytes") < text.index("What to beware of")
    assert (
        "Within 10% take hash: 10 kB in place of 100 kB (10.00%), test AUC 0.7760 against 0.8005 of full tables" in text
    )
    assert point_of(held(made), "hash", "10%")["taken"] == "10%"


def test_numbers_of_a_point(made: Path) -> None:
    found = held(made)
    point = point_of(found, "hash", "1%")
    assert (point["bytes"], point["share"], point["seeds"]) == (1000, 0.01, "2/2")
    # 0.8 - 0.02 × 2 - 0.004 for the first seed, 0.001 more for the second.
    assert point["values"]["test_auc"] == pytest.approx([0.7565, 0.756, 0.757])
    assert point["values"]["test_calibration"] == [1.01] * 3 and found["metrics"]["test_auc_tail"] == "AUC of tail ids"
    assert "test_auc_unseen" not in found["metrics"]
    # Full tables have 0.8 and 0.801; there are no scores, so there is no interval.
    assert point["differences"] == [[0, -0.044, None, None], [1, -0.044, None, None]]
    infeasible = point_of(found, "drop_feature", "1%")
    assert infeasible["bytes"] is None and infeasible["command"] == "" and "floor 777" in infeasible["line"][-1]
    kinds = {(method["name"], method["kind"], method["precision"]) for method in found["methods"]}
    assert {("hash", "hash", "fp32"), ("hash(precision=int4)", "hash", "int4")} <= kinds
    curve = found["runs"]["hash-1pct-s0"]["curve"]
    assert curve["epoch"] == [1, 2, 3, 4] and curve["valid_auc"] == pytest.approx([0.79, 0.78, 0.77, 0.76])


def test_flags_are_said_in_words(made: Path) -> None:
    text = visible(made)
    assert "(normalized entropy of 1 or more, whatever the AUC): robe at 10%, robe at 1%." in text
    assert "full over-fits in 2 of 2 seeds: validation fell after epoch 1" in text
    assert "Failed: hash at 10% (no room left)." in text


def test_a_plan_is_split_to_the_byte() -> None:
    tables = [embtables.TableConfig("user", 500, 16), embtables.TableConfig("item", 700, 16)]
    for method in ("full", {"kind": "low_rank", "precision": "int8"}, "robe", "pruned", "mixed_dimension", "hot_cold"):
        solved = embtables.plan(
            tables,
            method,
            None if method == "full" else "30%",
            frequencies={"user": range(500, 0, -1), "item": range(700, 0, -1)},
        )
        found = parts(solved.to_dict())
        by_table: dict[str, int] = {}
        for table, _, size in found:
            by_table[table] = by_table.get(table, 0) + size
        own = {line["table"].strip("()"): line["inference_bytes"] for line in solved.lines() if line["inference_bytes"]}
        assert by_table == own, method
        kinds = solved.bytes_by_kind()
        assert sum(size for _, kind, size in found if kind == "scales") == kinds.get("scales", 0)
        assert sum(size for _, kind, size in found if kind in ("rows", "dense")) <= kinds["weights"]
    with pytest.raises(ValueError, match="damaged"):
        parts({"groups": [{}]})


def test_many_tables_are_summed_up() -> None:
    solved = embtables.plan([embtables.TableConfig(f"t{i}", 10 + i, 4) for i in range(100)], "full")
    found = parts(solved.to_dict())
    assert len(found) == 41 and found[0] == ("t99", "rows", 109 * 16) and found[-1][0] == "60 smaller tables"
    assert sum(size for _, _, size in found) == solved.inference_bytes


def test_the_command_trains_what_the_cell_was(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the configuration that ``embtables train`` would resolve from it, whatever stands in the sweep's."""
    train = load_config(
        fields={
            "tables.optimizer": "rowwise_adagrad",
            "tables.learning_rate": 0.003,  # another optimizer's default
            "training.epochs": 3,
            "training.patience": None,
            "data.leave_out": ["feature_1"],
            "model.name": "mlp",
            "model.hyperparameters": {"units": [8, 4]},
        }
    )
    spec = {"kind": "compositional", "operation": "add"}
    config = describe(data, {"odd": spec}, ["10%"], 1, train, tune={"tables.regularization": [0.1, 0.3]})
    cell = Cell("odd", "10%", 4, "tables.regularization=0.1")
    words = shlex.split(shell_command(config, cell))
    assert words[:5] == ["embtables", "train", str(data.resolve()), "--out", f"runs/{cell.name}"]
    # What follows the configuration is what the sweep itself gives.
    tail = train_command(config, cell, Path("/s/cells/x"))
    tail = tail[tail.index("--method") :]
    assert words[-len(tail) :] == tail

    resolved = []

    class Stop(Exception):
        pass

    def stop(config: Any, *args: Any, **kwargs: Any) -> None:
        resolved.append(config)
        raise Stop

    monkeypatch.setattr("embtables.cli.train.Trainer", stop)
    with pytest.raises(Stop):
        command_line(words[1:])
    expected = cell_config(train, spec, "10%", 4).flat() | {"tables.regularization": 0.1}
    assert resolved[0].flat() == expected


def test_a_command_of_the_page_runs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = "{kind: hash, precision: int8}"
    config = describe(
        data, parse_methods(methods), ["10%"], 1, load_config(fields={"training.epochs": 1, "model.name": "fm"})
    )
    monkeypatch.chdir(tmp_path)
    words = shlex.split(shell_command(config, Cell(*config.points[0][1:], 0)))
    assert command_line([*words[1:], "--quiet"] if "--quiet" in words else words[1:]) == 0
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    assert json.loads(metrics.read_text())["test_calibration"] > 0


def test_published_sweeps_have_a_page(tmp_path: Path) -> None:
    """They have results and a configuration, and no cells."""
    published = Path(__file__).resolve().parents[2] / "docs" / "results"
    for name in ("globo-tuned", "sports-ablations"):
        shutil.copytree(published / name, tmp_path / name)
        write_report(tmp_path / name, resamples=20)
        found = held(tmp_path / name)
        assert found["runs"] == {} and all(point["parts"] is None for point in found["points"])
        assert any(point["differences"] for point in found["points"])
    assert "Within 1% take banded(precision=int8): 121 kB" in visible(tmp_path / "globo-tuned")
    assert "The sweep has no budgets within which to recommend something" in visible(tmp_path / "sports-ablations")
    assert held(tmp_path / "sports-ablations")["variants"][0] == "mean, no regularization"


def test_unfinished_sweeps_have_a_page(data: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    run(config_of(data, budgets="50%,1%"), out)
    lines = (out / "results.csv").read_text().splitlines(keepends=True)
    (out / "results.csv").write_text("".join(line for line in lines if ",full," not in line))
    write_report(out, resamples=20)
    assert "full tables, with which what fits into 50% is compared, have no result yet." in visible(out)
    assert "Unfinished: 12 of 14 cells have a result" in visible(out)
    (out / "results.csv").write_text("".join(line for line in lines if ",1%," not in line))
    write_report(out, resamples=20)
    assert "Nothing to recommend within 1%: nothing that fits into 1% has been trained" in visible(out)
    (out / "results.csv").write_text(lines[0])
    write_report(out, resamples=20)
    assert "Nothing has been trained yet, so there is nothing to recommend." in visible(out)
    assert all(point["line"][-1] == "not run yet" for point in held(out)["points"])


def test_what_cannot_be_read_of_a_cell_is_said(data: Path, tmp_path: Path) -> None:
    out = fabricated(tmp_path / "sweep", config_with(data, "full,hash", ["10%"]))
    (out / "cells" / "hash-10pct-s0" / "validation.csv").write_text("step\n1")
    (out / "cells" / "full-s0" / "plan.json").write_text("{}")
    write_report(out, resamples=20)
    assert "Plan or curve of 2 cells cannot be read" in visible(out)


def test_the_page_is_printed_first_and_said_by_help(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line(["report", str(made), "--resamples", "20"]) == 0
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith(str(made))]
    assert printed[:2] == [str(made / "report.html"), str(made / "report.md")]
    assert command_line(["report", "--help"]) == 0
    assert "report.html" in capfd.readouterr().out
    before = (made / "report.html").read_bytes()
    write_report(made, resamples=20)
    assert (made / "report.html").read_bytes() == before


def hostile(data: Path, out: Path) -> Path:
    config = config_with(data, "full,hash", ["10%"])
    methods = {"full": "full", HOSTILE: "hash"}
    config = config.model_copy(update={"methods": methods, "dataset": HOSTILE, "data": f"{HOSTILE}; rm -rf"})
    fabricated(out, config, message=HOSTILE)
    write_report(out, resamples=20)
    return out


def test_hostile_names_are_text(data: Path, tmp_path: Path) -> None:
    out = hostile(data, tmp_path / "sweep")
    text = (out / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in text and "<img" not in text
    # The page's own scripts and nothing else: data, plotly, the code that draws.
    assert text.count("<script") == text.count("</script>") == 3
    found = held(out)
    assert found["methods"][1]["name"] == HOSTILE
    words = shlex.split(found["points"][1]["command"])
    assert words[2] == f"{HOSTILE}; rm -rf" and words[4] == f"runs/{file_name(HOSTILE, '10pct', 's0')}"


@pytest.fixture(scope="module")
def large(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_with(data, "full", [f"{share}%" for share in (50, 20, 10, 5, 2, 1, 0.5, 0.2)], seeds=2)
    many: dict[str, Any] = {"full": "full"} | {f"hash(number={i})": "hash" for i in range(62)}
    out = fabricated(tmp_path_factory.mktemp("large") / "sweep", config.model_copy(update={"methods": many}))
    start = time.process_time()
    write_report(out, resamples=20)
    assert time.process_time() - start < 30  # it takes about five
    return out


def test_a_thousand_cells_make_a_small_page_quickly(large: Path) -> None:
    assert len(held(large)["runs"]) == 2 * (1 + 62 * 8)
    assert (large / "report.html").stat().st_size < 5_000_000


# ---- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"there is no browser on the path: none of {', '.join(names)}")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield found
        found.close()


class Opened:
    """A page in a browser without a network, and what it said and asked for."""

    def __init__(self, browser: Any, folder: Path, *, width: int = 1280, scheme: str = "light") -> None:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = (folder / "report.html").as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector("[data-ready]")
        self.near("curve")

    def near(self, name: str) -> None:
        """Comes near a figure, which is drawn then."""
        self.page.locator(f"#{name}").scroll_into_view_if_needed()
        self.page.wait_for_function("name => near.has(name) && !stale.has(name)", arg=name)

    def settle(self) -> None:
        """Waits until what was chosen is drawn."""
        self.page.wait_for_function("() => [...near].every((name) => !stale.has(name))")

    def text(self, selector: str) -> str:
        self.settle()
        return str(self.page.locator(selector).first.text_content())

    def traces(self) -> int:
        self.settle()
        return int(self.page.locator("#curve-plot .scatterlayer .trace").count())

    def tab_to(self, selector: str) -> None:
        """By the Tab key alone; whatever has the focus on the way shows it."""
        for _ in range(200):
            self.page.keyboard.press("Tab")
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            if self.page.evaluate(f"document.activeElement !== document.body && {outline} === 'none'"):
                raise AssertionError("an element with the focus does not show it")
            if self.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached by the keyboard")

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture(scope="module")
def loaded(browser: Any, made: Path) -> Iterator[Opened]:
    found = Opened(browser, made)
    yield found
    found.close()


@pytest.fixture
def opened(loaded: Opened) -> Opened:
    """One page for several tests, as it was when it was loaded."""
    loaded.complaints.clear()
    loaded.page.evaluate("""() => {
      for (const select of document.querySelectorAll('select')) select.selectedIndex = 0;
      for (const box of document.querySelectorAll('#precisions input')) { box.checked = true; }
      for (const name of precisions) shownPrecisions.add(name);
      document.querySelector('[data-show=all]').click();
      document.getElementById('filter').value = '';
      document.getElementById('filter').dispatchEvent(new Event('input'));
      document.activeElement.blur();
      scrollTo(0, 0);
    }""")
    return loaded


def test_it_draws_without_a_complaint_and_without_a_request(opened: Opened) -> None:
    page = opened.page
    assert opened.complaints == [] and opened.requests == [opened.address]
    for name in FIGURES:
        opened.near(name)
        assert page.locator(f"#{name}-plot svg.main-svg").count(), name
    # Even a script that wanted to could not ask for anything.
    assert page.evaluate("fetch('https://example.com').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in text for text in opened.complaints)


def test_pointing_at_a_mark_tells_its_numbers(opened: Opened) -> None:
    page = opened.page
    place = page.locator("#curve-plot .scatterlayer .trace").nth(1).locator(".points path").first.bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    page.wait_for_selector("#curve-plot .hoverlayer text")
    expected = ("hash at 1%", "1 kB, 1 % of full, seeds 2/2", "test AUC 0.7565 (seeds 0.7560 to 0.7570)")
    for text in (opened.text("#curve-plot .hoverlayer"), opened.text("#curve .readout")):
        for part in (*expected, "test log loss 0.4000", "(mean prediction / click rate) 1.0100", "lookup "):
            assert part in text


def test_choices_change_the_figures(opened: Opened) -> None:
    page = opened.page
    marks = "#curve-plot .scatterlayer .points path"
    title = "#curve-plot .ytitle"
    before = page.locator(marks).count()
    assert opened.text(title) == "test AUC" and opened.traces() == 7  # six methods, and rings
    page.select_option("#metric", "test_logloss")
    assert opened.text(title) == "test log loss"
    page.select_option("#axis", "share")
    assert opened.text("#curve-plot .xtitle") == "% of the full tables"
    page.locator("#precisions input").nth(1).uncheck()
    assert opened.traces() == 6
    page.locator(".choices label", has_text="robe").locator("input").uncheck()
    assert opened.traces() == 5 and page.locator(marks).count() < before
    page.click("[data-show=none]")
    assert "No method that is chosen above" in opened.text("#curve") and not page.locator("#curve-plot").is_visible()
    page.click("[data-show=all]")
    assert opened.traces() == 6
    # A table behind each figure, a filter over the rows, and the parts of a plan.
    opened.near("slices")
    page.locator("#slices summary").click()
    assert page.locator("#slices table tbody tr").count() == 5
    page.fill("#filter", "ROBE 1%")
    assert page.locator("#rows tbody tr:visible").count() == 1
    opened.near("bytes")
    page.select_option("#cell", label="hash at 1%, 1 kB (recommended)")
    assert "<i>item</i>" in opened.text("#bytes-plot") and "scales" in opened.text("#bytes .note")
    assert opened.complaints == []


def test_the_keyboard_alone_works_it(opened: Opened) -> None:
    page = opened.page
    opened.tab_to("#metric")
    page.keyboard.press("ArrowDown")
    assert opened.text("#curve-plot .ytitle") == "test log loss"
    opened.tab_to("#curve-plot")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#curve .readout').textContent.startsWith('full; ')")
    first = opened.text("#curve .readout")
    page.keyboard.press("ArrowRight")
    other = "first => !['', first].includes(document.querySelector('#curve .readout').textContent)"
    page.wait_for_function(other, arg=first)
    opened.tab_to(".choices input")
    page.keyboard.press("Space")
    assert opened.traces() == 6
    opened.tab_to("#filter")
    opened.tab_to("#rows button")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('copied').textContent !== ''")
    opened.tab_to("#rows tr:nth-child(2) summary")
    page.keyboard.press("Enter")
    code = page.locator("#rows code").nth(1)
    assert code.is_visible() and (code.text_content() or "").startswith("embtables train ")


# The contrast of each visible text with what is behind it, by WCAG 2.2; SVG's text has the color `fill`.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (node) => {
    const slice = node.closest && node.closest('g.slice');
    if (slice) {
      const path = slice.querySelector('path.surface');
      const fill = getComputedStyle(path).fill;
      return fill.startsWith('url') ? null : parse(fill);
    }
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length && (color.length < 4 || color[3] > 0)) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !node.getClientRects().length || node.closest('script, style, option, noscript')) continue;
    const style = getComputedStyle(node);
    const back = behind(node);
    if (back) found.push([ratio(parse(node.closest('svg') ? style.fill : style.color), back), text.slice(0, 40)]);
  }
  for (const mark of document.querySelectorAll('.choices svg path')) {
    // Marks need 3 to 1, and text 4.5 to 1.
    const color = mark.getAttribute('fill') || mark.getAttribute('stroke');
    const probe = Object.assign(document.createElement('i'), { style: `color: ${color}` });
    document.body.append(probe);
    found.push([1.5 * ratio(parse(getComputedStyle(probe).color), behind(document.body)), 'a mark']);
    probe.remove();
  }
  return found.sort(([one], [other]) => one - other);
}"""


def test_both_themes_have_contrast(browser: Any, made: Path) -> None:
    opened = Opened(browser, made, scheme="dark")
    backgrounds = []
    for theme, background in (("", "rgb(18, 22, 27)"), ("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 22, 27)")):
        opened.page.select_option("#theme", theme)
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        for name in FIGURES:
            opened.near(name)
        backgrounds.append(opened.page.evaluate("document.querySelector('#curve-plot .main-svg').style.background"))
        found = opened.page.evaluate(CONTRAST)
        assert len(found) > 200 and found[0][0] >= 4.5, found[:5]
    assert backgrounds[0] == backgrounds[2] != backgrounds[1]  # the figures follow
    opened.page.select_option("#theme", "")
    opened.page.emulate_media(color_scheme="light")
    opened.page.wait_for_function("() => getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    opened.close()


def test_hostile_names_are_inert_on_a_phone(browser: Any, data: Path, tmp_path: Path) -> None:
    out = hostile(data, tmp_path / "sweep")
    opened = Opened(browser, out, width=360)
    page = opened.page
    for name in FIGURES:
        opened.near(name)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.locator("#curve-plot").press("ArrowRight")
    page.locator("#curve-plot").press("ArrowRight")
    assert HOSTILE in opened.text("#curve .readout") and HOSTILE in opened.text("#rows tbody tr:nth-child(2) th")
    assert HOSTILE.replace(" ", "") in opened.text("#curve-plot .hoverlayer").replace(" ", "")
    assert page.evaluate("window.hacked") is None and page.locator("body img").count() == 0
    assert page.title().startswith(HOSTILE) and opened.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    opened.close()


def test_a_thousand_cells_are_drawn(browser: Any, large: Path) -> None:
    opened = Opened(browser, large)
    page = opened.page
    page.click("[data-show=all]")
    assert opened.traces() == 64
    # All figures that are near: about one second on an idle machine.
    took = page.evaluate("() => { const start = performance.now(); render(); return performance.now() - start; }")
    assert took < 6000
    assert opened.complaints == [] and page.locator("#rows tbody tr").count() == 1 + 62 * 8
    opened.close()


def test_a_sweep_without_cells_says_what_is_missing(browser: Any, data: Path, tmp_path: Path) -> None:
    out = fabricated(tmp_path / "sweep", config_with(data, "full,hash", ["10%"]), cells=False)
    write_report(out, resamples=20)
    opened = Opened(browser, out)
    for name in ("bytes", "seeds", "learning"):
        opened.near(name)
    assert "it is not known here where the bytes go" in opened.text("#bytes")
    assert "No run of this sweep has its evaluations" in opened.text("#learning")
    assert "need the scores of the cells, which are not beside" in opened.text("#seeds-text")
    assert opened.page.locator("#seeds-plot .scatterlayer .trace").count() == 1 and opened.complaints == []
    opened.close()
