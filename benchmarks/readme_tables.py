"""Fills the tables of README.md and of pages in docs: none is typed by hand.

They come from docs/results/*/results.csv; those of speed from the parts of the report.md that
`python -m benchmarks.report docs/results/speed` writes there and in its folders, one for each machine.

    python -m benchmarks.readme_tables            # rewrite the pages
    python -m benchmarks.readme_tables --check    # exit 1 where a page is not what the results say
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks import regret, serving
from benchmarks.report import part
from benchmarks.results import rendered
from benchmarks.scaling import FIGURE
from embtables.plan.probe import Probe
from embtables.sweeps.recommending import recommendation
from embtables.sweeps.summary import summarize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
README, PAGE, PERFORMANCE = ROOT / "README.md", RESULTS / "README.md", ROOT / "docs" / "performance.md"
GPU, CHOOSING = ROOT / "docs" / "gpu.md", ROOT / "docs" / "choosing.md"
EXPORT = ROOT / "docs" / "export.md"
#: Page, marker -> the folder of a sweep over methods and budgets.
SWEEPS = {
    (PAGE, "globo-tuned"): "globo-tuned",
    (PAGE, "globo-tuned-fp32"): "globo-tuned-fp32",
    (PAGE, "globo"): "globo",
    (PAGE, "ml-100k-tuned"): "ml-100k-tuned",
    (PAGE, "ml-100k-tuned-fp32"): "ml-100k-tuned-fp32",
    (PAGE, "ml-100k"): "ml-100k",
    (PAGE, "sports-tuned"): "sports-tuned",
    (PAGE, "yelp-tuned"): "yelp-tuned",
    (PAGE, "globo-din"): "globo-din",
    (PAGE, "yelp-din"): "yelp-din",
    (PAGE, "sports-din"): "sports-din",
}
#: Marker in the README -> the folders of the sweeps by the tuned protocol, and that of the first protocol beside them.
BY_KIND = {
    "globo": (("globo-tuned", "globo-tuned-fp32"), "globo"),
    "ml-100k": (("ml-100k-tuned", "ml-100k-tuned-fp32"), "ml-100k"),
}
#: Page, marker -> data set -> the folder of a sweep over variants with full tables.
VARIANTS = {
    (page, "histories"): {
        "Globo": "globo-histories",
        "S3-Rec Yelp": "yelp-histories",
        "S3-Rec Sports": "sports-histories",
    }
    for page in (README, PAGE)
}

#: Page, marker -> the folder of a sweep over variants, whose history_lengths.csv benchmarks/history_lengths.py wrote.
LENGTHS = {
    (PAGE, "globo-lengths"): "globo-histories",
    (PAGE, "yelp-lengths"): "yelp-histories",
    (PAGE, "sports-lengths"): "sports-histories",
}
#: Page, marker -> the folders of sweeps over variants of one data set, which make one table.
ABLATIONS = {(PAGE, "sports-ablations"): ("sports-histories", "sports-ablations")}
#: What the page of each method says that it attained: data set and protocol -> the folders of its sweeps.
ATTAINED = {
    ("Globo", "first"): ("globo",),
    ("Globo", "tuned"): ("globo-tuned", "globo-tuned-fp32"),
    ("MovieLens-100K", "first"): ("ml-100k",),
    ("MovieLens-100K", "tuned"): ("ml-100k-tuned", "ml-100k-tuned-fp32"),
    ("S3-Rec Sports", "tuned"): ("sports-tuned",),
    ("S3-Rec Yelp", "tuned"): ("yelp-tuned",),
}
#: Test AUC within which methods are called level.
LEVEL = 0.002
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("[a-z]*.md"))
#: Their parts go where a page has the marker speed-<part>: what all machines say together, else what this one says.
SPEED_REPORTS = (RESULTS / "speed" / "report.md", RESULTS / "speed" / "amd-epyc-l3-32m" / "report.md")
#: Of docs/gpu.md: marker -> folder of `python -m benchmarks.gpu`, and the phase that a table shows.
GPU_TABLES = {
    **{f"gpu-{phase}": ("gpu", phase) for phase in ("forward", "update", "step")},
    "gpu-step-full": ("gpu-full", "step"),
}


def read(folder: str) -> pd.DataFrame:
    # Budgets stay text: "10%" is no number, and an empty one is full's.
    return pd.read_csv(RESULTS / folder / "results.csv", dtype={"budget": str})


def together(folders: Sequence[str]) -> pd.DataFrame:
    """Several sweeps as one: what more than one of them has, such as full tables, is the first one's."""
    return pd.concat([read(folder) for folder in folders]).drop_duplicates(
        ["method", "budget", "seed"], ignore_index=True
    )


def variants(folders: dict[str, str]) -> str:
    """Mean test AUC ± standard deviation over seeds, a row a variant and a column a data set."""
    results = {name: read(folder) for name, folder in folders.items()}
    rows = list(dict.fromkeys(v for r in results.values() for v in r["variant"]))
    lines = [["test AUC", *results], ["---", *["---:"] * len(results)]]
    lines += [[row, *(_mean(r[r["variant"] == row]) for r in results.values())] for row in rows]
    return rendered(lines)


def lengths(folder: str) -> str:
    """Mean test AUC over seeds by length of the history, a row a bin and a column a variant."""
    results = pd.read_csv(RESULTS / folder / "history_lengths.csv")
    names = list(results["variant"].unique())
    lines = [["history", "rows", *names], ["---:"] * (2 + len(names))]
    for length, rows in results.groupby("history", sort=False):
        means = rows.groupby("variant")["test_auc"].mean()
        lines.append([str(length), f"{rows['rows'].iloc[0]:,}", *(f"{means[name]:.4f}" for name in names)])
    return rendered(lines)


def ablations(folders: Sequence[str]) -> str:
    """Test and validation AUC of every variant of several sweeps, and the epoch that was kept."""
    results = pd.concat([read(folder) for folder in folders])
    lines = [["variant", "seeds", "test AUC", "validation AUC", "best epoch"], ["---", *["---:"] * 4]]
    for name, cells in results.groupby("variant", sort=False):
        valid = f"{cells['valid_auc'].mean():.4f}"
        lines.append([str(name), str(len(cells)), _mean(cells), valid, f"{cells['best_epoch'].mean():.1f}"])
    return rendered(lines)


def table(results: pd.DataFrame) -> str:
    """Mean test AUC ± standard deviation over seeds, a row a method and a column a budget."""
    budgets = _budgets(results)
    header = ["method", *(f"{budget} of the bytes" for budget in budgets)]
    lines = [header, ["---", *["---:"] * len(budgets)]]
    # Full tables take no budget, in no precision.
    whole = results["budget"].isna()
    for name, cells in results[whole].groupby("method", sort=False):
        lines.append([_whole(str(name), cells), *[""] * len(budgets)])
    others = results[~whole]
    for method in sorted(others["method"].unique(), key=lambda m: (-_at(others, m, "1%"), m)):
        lines.append([_linked(method), *_cells(others[others["method"] == method], budgets)])
    return rendered(lines)


def by_kind(folders: Sequence[str], first: str) -> str:
    """Mean test AUC of each kind's best form at each budget, by validation; beside it what the first protocol gave."""
    results, before = together(folders), read(first)
    budgets, budgets_before = _budgets(results), [b for b in _budgets(before) if b in _budgets(results)]
    heads = [f"{budget} of the bytes" for budget in budgets]
    lines = [
        ["method", *heads, *(f"{budget}, first protocol" for budget in budgets_before)],
        ["---", *["---:"] * (len(budgets) + len(budgets_before))],
    ]
    for name, cells in results[results["budget"].isna()].groupby("method", sort=False):
        then = before[before["method"] == name]
        beside = [_mean(then) if len(then) else "", *[""] * (len(budgets_before) - 1)]
        lines.append([_whole(str(name), cells), *[""] * len(budgets), *beside])
    kinds = {kind: cells for kind, cells in results.groupby(_kinds(results)) if kind != "full"}
    for kind in sorted(kinds, key=lambda kind: -_best_form(kinds[kind], "1%")["test_auc"].fillna(0).mean()):
        shown = [_cell(_best_form(kinds[kind], budget)) for budget in budgets]
        lines.append([_linked(kind), *shown, *_cells(before[before["method"] == kind], budgets_before)])
    return rendered(lines)


def leaders() -> str:
    """Of each data set and budget what is best, what is level with it, and plain hashing, as losses to full tables."""
    lines = [
        ["data", "budget", "best", "to full tables", "level with it", "hash"],
        ["---", "---:", "---", "---:", "---", "---:"],
    ]
    for (data, protocol), folders in ATTAINED.items():
        if protocol != "tuned":
            continue
        results = together(folders)
        full = results[results["method"] == "full"]["test_auc"].mean()
        for budget in _budgets(results):
            kinds = {kind: cells for kind, cells in results.groupby(_kinds(results)) if kind != "full"}
            aucs = {
                kind: _best_form(cells, budget)["test_auc"].mean()
                for kind, cells in kinds.items()
                if budget in set(cells["budget"])
            }
            first, *others = sorted((k for k in aucs if not pd.isna(aucs[k])), key=lambda kind: -aucs[kind])
            level = ", ".join(kind for kind in others if aucs[first] - aucs[kind] <= LEVEL)
            lines.append(
                [data, budget, _linked(first), f"{aucs[first] - full:+.4f}", level, f"{aucs['hash'] - full:+.4f}"]
            )
    return rendered(lines)


def worth(folder: str) -> str:
    """AUC of `banded` that knows what tables are worth beside that of one that goes by counts alone."""
    results = read(folder)
    lines = [
        ["data", "budget", "validation AUC by counts", "with worth", "test AUC by counts", "with worth"],
        ["---", *["---:"] * 5],
    ]
    for (data, budget), cells in results.groupby(["dataset", "budget"], sort=False):
        knows = cells["method"].str.contains("worth")
        pairs = [cells[~knows].iloc[0], cells[knows].iloc[0]]
        shown = [f"{each[name]:.4f}" for name in ("valid_auc", "test_auc") for each in pairs]
        lines.append([str(data), str(budget), *shown])
    return rendered(lines)


def demo(folder: Path) -> str:
    """What `make demo` ends with, and its figure."""
    summary = summarize(folder, resamples=20)
    races = Probe.load(folder).races
    found = [recommendation(summary, b, race.budget_bytes) for b, race in zip(summary.config.budgets, races)]
    words = "\n".join(line for each in found for line in each.words())
    return f"```text\n{words}\n```\n\n![test AUC against bytes](docs/results/{folder.name}/accuracy_memory.svg)"


def _best_form(cells: pd.DataFrame, budget: str) -> pd.DataFrame:
    """The form that is best on validation with the first seed; where none fits, the one with the smallest floor."""
    cells = cells[cells["budget"] == budget]
    first = cells[cells["seed"] == 0]
    ok = first[first["status"] == "ok"]
    best = first["floor_bytes"].idxmin() if ok.empty else ok["valid_auc"].idxmax()
    return cells[cells["method"] == cells.loc[best, "method"]]


def _budgets(results: pd.DataFrame) -> list[str]:
    """The largest first."""
    return sorted(results["budget"].dropna().unique(), key=lambda budget: -float(budget.rstrip("%")))


def attained(kind: str) -> str:
    """Test AUC of each form of a method, a column a budget; last what full tables have by the same protocol."""
    budgets = ["10%", "5%", "1%", "0.1%"]
    lines = [["data", "protocol", "method", *budgets, "full"], ["---", "---", "---", *["---:"] * (len(budgets) + 1)]]
    for (data, protocol), folders in ATTAINED.items():
        results = together(folders)
        full = results[results["method"] == "full"]
        of_kind = results[_kinds(results) == kind]
        for method, cells in of_kind.groupby("method", sort=False):
            head = [data, protocol, str(method)]
            if cells["budget"].isna().all():
                lines.append([*head, *[""] * len(budgets), _mean(cells)])
                continue
            lines.append([*head, *_cells(cells, budgets), _mean(full)])
    return rendered(lines)


def with_trained_projections(folder: str, sweeps: Sequence[str]) -> str:
    """Test AUC with seed 0 where projections were trained, then that of the sweeps, where they stay as they began."""
    before, after = read(folder), pd.concat([read(sweep) for sweep in sweeps])
    budgets = ["10%", "5%", "1%"]
    lines = [["data", "method", *(f"{budget} of the bytes" for budget in budgets)], ["---", "---", *["---:"] * 3]]
    after = after[after["seed"] == 0]
    for (data, method), cells in before.groupby(["dataset", "method"], sort=False):
        of_both = cells, after[after["dataset"] == data]
        pairs = [[_at(each, str(method), budget) for each in of_both] for budget in budgets]
        shown = [" → ".join(f"{auc:.4f}" for auc in pair) if all(pair) else "" for pair in pairs]
        lines.append([str(data), _linked(str(method)), *shown])
    return rendered(lines)


def compressed(folder: str, starts: Sequence[str]) -> str:
    """Of tables that were compressed after training how much is held, and test AUC at once and an epoch later.

    Beside it stands that of the sweeps `starts`, whose tables were compressed from the start.
    """
    results, trained = read(folder), together(starts)
    lines = [
        ["method", "budget", "of full", "users held", "articles held", "at once", "after an epoch", "from the start"],
        ["---", *["---:"] * 7],
    ]
    for row in results.itertuples():
        budget = "" if pd.isna(row.budget) else str(row.budget)
        if row.status != "ok":
            lines.append([_linked(str(row.method)), budget, f"needs {int(row.floor_bytes):,} bytes", *[""] * 5])
            continue
        held = ["" if pd.isna(share) else f"{share:.2f}" for share in (row.held_user_id, row.held_item_id)]
        aucs = row.test_auc_at_once, row.test_auc_after_an_epoch, _at(trained, str(row.method), budget)
        shown = (f"{auc:.4f}" if auc else "" for auc in aucs)
        lines.append([_linked(str(row.method)), budget, f"{row.ratio:.1%}", *held, *shown])
    return rendered(lines)


def in_fuxictr(folder: str) -> str:
    """Validation and test AUC of a peer's model over each method, the best on validation first."""
    results = read(folder)
    full = results[results["method"] == "full"].set_index("seed")
    lines = [
        ["method", "of full", "seeds", "validation AUC", "test AUC", "test AUC to full"],
        ["---", *["---:"] * 5],
    ]
    means = results.groupby("method")["valid_auc"].mean().sort_values(ascending=False)
    for method in means.index:
        cells = results[results["method"] == method].set_index("seed")
        share = cells["inference_bytes"].iloc[0] / full["inference_bytes"].iloc[0]
        to_full = (cells["test_auc"] - full["test_auc"]).dropna().mean()
        name = method if method.startswith("naive") else _linked(method)
        lines.append([name, f"{share:.1%}", str(len(cells)), f"{means[method]:.4f}", _mean(cells), f"{to_full:+.4f}"])
    return rendered(lines)


def _linked(method: str) -> str:
    """``hash(precision=int4)`` with the page of its kind behind the name."""
    kind, options, rest = method.partition("(")
    return f"[{kind}](docs/methods/{kind}.md)" + (f" ({rest}" if options else "")


def speed(name: str, page: Path) -> str:
    """A part of the first report that has it, with its figure as the page reaches it."""
    for path in SPEED_REPORTS:
        text = path.read_text(encoding="utf-8")
        if f"<!-- part:{name} -->" in text:
            figure = (path.parent / FIGURE).relative_to(page.parent)
            return part(text, name).replace(f"]({FIGURE})", f"]({figure})")
    raise ValueError(f"no report in {SPEED_REPORTS[0].parent.relative_to(ROOT)} has a part '{name}'")


def on_a_gpu(folder: str, phase: str) -> str:
    """Median milliseconds of a call by configuration and contestant; empty where one did not take part."""
    results = pd.read_csv(RESULTS / folder / "results.csv", keep_default_na=False)
    results = results[results["phase"] == phase]
    if phase == "forward":  # of many contestants, none of which has an optimizer
        by_configuration = list(results.groupby(["dim", "batch"], sort=False))
        heads = [f"D = {dim}, batch {batch:,}" for (dim, batch), _ in by_configuration]
        lines = [["", *heads], ["---", *["---:"] * len(heads)]]
        for name, cells in results.groupby("contestant", sort=False):
            lines.append([str(name), *(f"{ms:.3f}" for ms in cells["median_ms"].astype(float))])
        return rendered(lines)
    names = list(dict.fromkeys(results["contestant"]))
    lines = [["D", "batch", "optimizer", *names], ["---:", "---:", "---", *["---:"] * len(names)]]
    for (dim, batch, optimizer), cells in results.groupby(["dim", "batch", "optimizer"], sort=False):
        found = dict(zip(cells["contestant"], cells["median_ms"].astype(float)))
        lines.append(
            [str(dim), f"{batch:,}", optimizer, *(f"{found[name]:.3f}" if name in found else "" for name in names)]
        )
    return rendered(lines)


def gpu_machine(folder: str) -> str:
    about = json.loads((RESULTS / folder / "environment.json").read_text(encoding="utf-8"))
    return "\n".join(f"- {name}: {value}" for name, value in about.items())


def _kinds(results: pd.DataFrame) -> pd.Series[str]:
    return results["method"].str.partition("(")[0]


def _whole(name: str, cells: pd.DataFrame) -> str:
    """Full tables in some precision: what they are, have and take."""
    return f"{name}: {_mean(cells)}, {int(cells['inference_bytes'].iloc[0]):,} bytes"


def _at(results: pd.DataFrame, method: str, budget: str) -> float:
    cells = results[(results["method"] == method) & (results["budget"] == budget) & (results["status"] == "ok")]
    return float(cells["test_auc"].mean()) if len(cells) else 0.0


def _mean(cells: pd.DataFrame) -> str:
    spread = f" ± {cells['test_auc'].std():.4f}" if len(cells) > 1 else ""
    return f"{cells['test_auc'].mean():.4f}{spread}"


def _cells(cells: pd.DataFrame, budgets: Sequence[str]) -> list[str]:
    """One for each budget, empty where nothing was asked for."""
    return [_cell(cells[cells["budget"] == budget]) for budget in budgets]


def _cell(cells: pd.DataFrame) -> str:
    if cells.empty:
        return ""
    if (cells["status"] == "infeasible").all():
        return f"needs {int(cells['floor_bytes'].iloc[0]):,} bytes"
    return _mean(cells[cells["status"] == "ok"])


def _with_figure(table: str, folder: str, page: Path) -> str:
    figure = (RESULTS / folder / "accuracy_memory.svg").relative_to(page.parent)
    return f"{table}\n\n![test AUC against bytes]({figure})"


def filled(page: Path, text: str) -> str:
    """The page's text with all its tables as the results say."""
    methods = Path(os.path.relpath(ROOT / "docs" / "methods", page.parent)).as_posix() + "/"
    contents = {marker: variants(folders) for (of, marker), folders in VARIANTS.items() if of == page}
    contents |= {marker: lengths(folder) for (of, marker), folder in LENGTHS.items() if of == page}
    contents |= {marker: ablations(folders) for (of, marker), folders in ABLATIONS.items() if of == page}
    for (of, marker), folder in SWEEPS.items():
        if of == page:
            contents[marker] = _with_figure(table(read(folder)), folder, page)
    if page == README:
        contents["demo"] = demo(RESULTS / "demo")
        for marker, (folders, first) in BY_KIND.items():
            contents[marker] = _with_figure(by_kind(folders, first), folders[0], page)
    contents |= {f"speed-{name}": speed(name, page) for name in re.findall("<!-- results:speed-(.*?) -->", text)}
    if page == PAGE:
        contents["post-training"] = compressed("post-training", ("globo-tuned", "globo-from-start"))
        sweeps = ("globo-tuned", "ml-100k-tuned")
        contents["trained-projections"] = with_trained_projections("trained-projections", sweeps)
        contents["fuxictr-din"] = in_fuxictr("fuxictr-din")
    if page in METHOD_PAGES and "results:attained" in text:
        contents["attained"] = attained(page.stem)
    if page == CHOOSING:
        found = regret.read(RESULTS / "probes")
        contents |= {
            "leaders": leaders(),
            "probes": f"{regret.choices(found)}\n\n{regret.in_short(found)}",
            "families": regret.by_family(found),
        }
        contents["races"], contents["worth"] = regret.orders(found), worth("worth")
    if page == GPU:
        contents |= {marker: on_a_gpu(folder, phase) for marker, (folder, phase) in GPU_TABLES.items()}
        contents["gpu-machine"] = gpu_machine("gpu")
    if page == EXPORT:
        contents["serving"] = serving.table(RESULTS / "serving").rstrip()
    for marker, content in contents.items():
        start, end = f"<!-- results:{marker} -->", f"<!-- /results:{marker} -->"
        linked = content.replace("](docs/methods/", f"]({methods}")
        whole = f"{start}\n{linked}\n{end}"
        text, found = re.subn(f"{start}.*?{end}", lambda _: whole, text, flags=re.S)  # noqa: B023
        if not found:
            raise ValueError(f"{page.relative_to(ROOT)} has no {start}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is out of date")
    check = parser.parse_args().check
    changed = False
    for page in (README, PAGE, PERFORMANCE, GPU, CHOOSING, EXPORT, *METHOD_PAGES):
        old = page.read_text(encoding="utf-8")
        new = filled(page, old)
        changed |= new != old
        if not check:
            page.write_text(new, encoding="utf-8")
    return int(check and changed)


if __name__ == "__main__":
    sys.exit(main())
