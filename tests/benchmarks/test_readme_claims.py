"""What README.md says in words about accuracy, beside the results that it speaks of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.readme_tables import BY_KIND, read, together

ROOT = Path(__file__).resolve().parents[2]
GLOBO, MOVIELENS = (BY_KIND[name][0] for name in ("globo", "ml-100k"))
SPORTS, YELP = ("sports-tuned",), ("yelp-tuned",)
#: Differences to full tables below which two are called level.
LEVEL = 0.001


@pytest.fixture(scope="module")
def words() -> str:
    """The README without tables, code and line breaks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub("<!-- results:.*?<!-- /results:.*?-->|```.*?```", "", text, flags=re.S)
    return " ".join(text.split())


def full(folders: Sequence[str]) -> float:
    results = together(folders)
    return float(results[results["method"] == "full"]["test_auc"].mean())


def forms(folders: Sequence[str], budget: str) -> pd.DataFrame:
    """Of each kind the form that is best on validation: its test AUC, loss against full tables, and bytes."""
    results = together(folders)
    ok = results[(results["budget"] == budget) & (results["status"] == "ok")]
    ok = ok.assign(kind=ok["method"].str.partition("(")[0])
    first = ok[ok["seed"] == 0]
    best = first.loc[first.groupby("kind")["valid_auc"].idxmax(), "method"]
    found = ok[ok["method"].isin(best)].groupby("kind").agg(auc=("test_auc", "mean"), bytes=("inference_bytes", "max"))
    return found.assign(lost=full(folders) - found["auc"])


def lost(folders: Sequence[str], kind: str, budget: str) -> float:
    return float(forms(folders, budget).loc[kind, "lost"])


def three(value: float) -> str:
    return f"{value:.3f}"


def test_globo(words: str) -> None:
    of = {budget: lost(GLOBO, "banded", budget) for budget in ("10%", "5%", "1%", "0.1%")}
    assert max(abs(of["10%"]), abs(of["5%"])) < LEVEL
    size = {budget: forms(GLOBO, budget).loc["banded", "bytes"] / 1000 for budget in ("1%", "0.1%")}
    assert (
        f"is level with the full tables at 10 and 5 % of the bytes, {three(of['1%'])} behind them at 1 %, "
        f"{size['1%']:.0f} kB, and {three(of['0.1%'])} at 0.1 %, {size['0.1%']:.0f} kB."
    ) in words
    hashing = [three(lost(GLOBO, "hash", budget)) for budget in of]
    assert f"Plain hashing loses {hashing[0]} at 10 %, then {hashing[1]}, {hashing[2]} and {hashing[3]}." in words
    before = read("globo")
    gain = full(GLOBO) - before[before["method"] == "full"]["test_auc"].mean()
    assert f"Regularization and the mean are worth {three(gain)} to the full tables" in words
    assert 2.5 < gain / of["1%"] < 3.5 and "three times what `banded` loses by doing with 1 % of the bytes" in words


def test_movielens(words: str) -> None:
    ahead = [
        -lost(MOVIELENS, kind, budget)
        for kind, budgets in (
            ("banded", ["10%", "5%"]),
            ("matryoshka", ["10%", "5%"]),
            ("low_rank", ["10%", "5%"]),
            ("compositional", ["10%"]),
        )
        for budget in budgets
    ]
    assert (
        "at 10 and 5 % `banded`, matryoshka and low rank, at 10 % `compositional` too, are "
        f"{three(min(ahead))} to {three(max(ahead))} ahead of the full tables"
    ) in words
    at = forms(MOVIELENS, "1%")
    assert at.loc[["mixed_dimension", "fewer_dimensions"], "lost"].abs().max() < LEVEL
    assert list(at.sort_values("auc").index[-2:]) == ["fewer_dimensions", "mixed_dimension"]
    size = at.loc["mixed_dimension", "bytes"] / 1000
    assert f"at 1 %, {size:.1f} kB, mixed and fewer dimensions are level with them." in words
    least = forms(MOVIELENS, "0.1%").sort_values("auc").iloc[-1]
    assert least.name == "robe"
    assert f"At 0.1 %, {least['bytes']:.0f} bytes, ROBE loses {least['lost']:.2f}." in words


def test_histories(words: str) -> None:
    found = {}
    for name in ("globo", "yelp", "sports"):
        results = read(f"{name}-histories")
        means = results.groupby("variant")["test_auc"].mean()
        found[name] = {variant: means[variant] - means["mean"] for variant in ("DIN", "DIN softmax")}
    noise = 0.002
    assert found["globo"]["DIN softmax"] > noise and found["yelp"]["DIN softmax"] > noise
    assert abs(found["sports"]["DIN softmax"]) < noise
    assert "Normalized attention is ahead of the mean on Globo and Yelp and level with it on Sports." in words
    assert max(abs(found["globo"]["DIN"]), abs(found["sports"]["DIN"])) < noise < -found["yelp"]["DIN"]
    assert "Attention as published is level with the mean on Globo and Sports and behind it on Yelp." in words


def test_din_in_fewer_bytes(words: str) -> None:
    best = {
        (name, budget): forms(folders, budget).sort_values("auc").iloc[-1]
        for name, folders in (("sports", SPORTS), ("yelp", YELP))
        for budget in ("10%", "1%")
    }
    assert [each.name for each in best.values()] == ["compositional", "banded", "unified", "robe"]
    sports, yelp = ([best[name, budget]["lost"] for budget in ("10%", "1%")] for name in ("sports", "yelp"))
    assert abs(yelp[0]) < LEVEL
    assert (
        f"on Sports `compositional` is {three(-sports[0])} ahead of the full tables at 10 % of the bytes, and "
        f"`banded`, the best there, {three(sports[1])} behind at 1 %; on Yelp `unified` is level with them at 10 %, "
        f"and ROBE, the best there, {three(yelp[1])} behind at 1 %."
    ) in words
