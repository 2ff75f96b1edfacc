"""From raw rows to scores: bundles, and what predicts by them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from embtables._util.files import sealed, unsealed
from embtables.cli.app import run
from embtables.datasets import Batch, Jagged, PreparedDataset, prepare_synthetic
from embtables.datasets.encoder import encoder_of
from embtables.datasets.encoding import HashedVocabulary, hashes_of, probe
from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.readers.interactions import Interactions, prepare_interactions
from embtables.datasets.readers.synthetic import Synthetic, Truth
from embtables.training import Predictor, Trainer, load_config, load_served, save_bundle

START = 1_600_000_000
DAYS = 3
ROWS = 4000
HEADER = "uid,sku,country,price,tags,history\n"
TRAIN = [
    *("--set", "training.epochs=1", "--set", "training.batch_size=256", "--set", "tables.embedding_dim=4"),
    *("--set", "training.evaluation_batch_size=128", "--quiet"),
]


def day_of_rows(day: int, rows: int, generator: random.Random) -> list[dict[str, Any]]:
    """A day of a shop's log. Each day brings new users and items; a fifth of the prices and countries is missing."""
    made = []
    for row in range(rows):
        user, item = generator.randrange(150) + 40 * day, int(generator.paretovariate(0.8)) % 60 + 10 * day
        liked = generator.random() < (0.6 if item % 2 else 0.2) + 0.2 * (user % 3 == 0)
        made.append(
            {
                "uid": f"u{user}",
                "sku": item,
                "ts": START + 86_400 * day + 86_400 * row // rows,
                "bought": int(liked),
                "country": generator.choice(["de", "fr", "jp", "NA", None]),
                "price": generator.choice([None, "3,5", *(f"{generator.gauss(10, 3):.2f}" for _ in range(3))]),
                "tags": generator.choice(["new|red", "red", "", "sale|unknown"]),
            }
        )
    return made


def with_histories(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The rows with the items that their user bought at earlier times, oldest first."""
    bought: dict[str, list[tuple[int, int]]] = {}
    filled = []
    for row in rows:
        earlier = [item for time, item in bought.get(row["uid"], []) if time < row["ts"]]
        filled.append({**row, "history": earlier[-most:]})
        if row["bought"]:
            bought.setdefault(row["uid"], []).append((row["ts"], row["sku"]))
    return filled


def write_csv(rows: list[dict[str, Any]], path: Path, separator: str = ",") -> Path:
    texts = [{**row, "history": "|".join(map(str, row["history"]))} if "history" in row else row for row in rows]
    pl.DataFrame(texts, infer_schema_length=None).write_csv(path, separator=separator)
    return path


class Shop:
    """Three days of a log, prepared, trained and bundled on the command line, and the day after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = random.Random(0)
        self.rows = [row for day in range(DAYS) for row in day_of_rows(day, ROWS, generator)]
        log = write_csv(self.rows, folder / "log.csv")
        self.data, self.run, self.bundle = folder / "data", folder / "run", folder / "bundle"
        options = "--user uid --item sku --time ts --label bought --context country --dense price --lists tags"
        more = "--missing unknown --history 5 --split time --shares 0.6,0.2,0.2"
        assert run(["prepare", "interactions", str(log), str(self.data), *options.split(), *more.split()]) == 0
        train = ["--model", "mlp", "--method", "hash", "--budget", "60%", "--out", str(self.run), *TRAIN]
        assert run(["train", str(self.data), *train]) == 0
        assert run(["bundle", str(self.run), str(self.data), str(self.bundle)]) == 0
        self.next = with_histories([*self.rows, *day_of_rows(DAYS, 500, generator)], 5)[-500:]
        self.test = with_histories(self.rows, 5)[-PreparedDataset(self.data).num_rows("test") :]
        self.scores = np.load(self.run / "test_scores.npy")
        self.predictor = Predictor.load(self.bundle)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


# ---- scores ---------------------------------------------------------------------------------------------------------


def by_hand(shop: Shop, rows: list[dict[str, Any]]) -> np.ndarray:
    """Logits of rows, with ids looked up one by one in the vocabularies of the prepared data."""
    manifest = json.loads((shop.data / "manifest.json").read_text())
    ids: dict[str, dict[str, int]] = {}
    for feature in manifest["features"]:
        values = pl.read_parquet(shop.data / feature["vocabulary"]["file"])["value"]
        ids[feature["name"]] = {str(value): number for number, value in enumerate(values, 2)}

    def id_of(feature: str, value: Any) -> int:
        return 0 if value in (None, "", "NA") else ids[feature].get(str(value), 1)

    columns = {"user_id": "uid", "item_id": "sku", "country": "country"}
    scale = manifest["dense"]["price"]
    prices = [None if row["price"] is None else float(row["price"].replace(",", ".")) for row in rows]
    dense = [0.0 if price is None else (price - scale["mean"]) / scale["deviation"] for price in prices]
    tags = [[tag for tag in row["tags"].split("|") if tag not in ("", "unknown")] for row in rows]
    lists = {}
    for name, feature, values in (
        ("tags", "tags", tags),
        ("history", "item_id", [row["history"] for row in rows]),
    ):
        flat = [id_of(feature, value) for of in values for value in of]
        lists[name] = Jagged(torch.tensor(flat), torch.tensor([0, *np.cumsum([len(of) for of in values])]))
    flat_ids = [[id_of(feature, row[column]) for feature, column in columns.items()] for row in rows]
    batch = Batch(
        torch.zeros(len(rows)), torch.tensor(dense, dtype=torch.float32)[:, None], torch.tensor(flat_ids), None, lists
    )
    with torch.no_grad():
        logits: np.ndarray = load_served(shop.run / "served")(batch).numpy()
    return logits


def test_from_a_log_to_the_scores_of_the_next_day(shop: Shop, tmp_path: Path) -> None:
    """The next day has users and items that the training never saw, by the tenth of its rows."""
    monday, out = write_csv(shop.next, tmp_path / "monday.csv"), tmp_path / "scores.parquet"
    assert run(["predict", str(shop.bundle), str(monday), "--out", str(out), "--quiet"]) == 0
    found = pl.read_parquet(out)
    assert found.schema == {"score": pl.Float32} and len(found) == 500
    expected = 1 / (1 + np.exp(-by_hand(shop, shop.next).astype(np.float64)))
    np.testing.assert_allclose(found["score"].to_numpy(), expected, rtol=1e-6)
    known = set(pl.read_parquet(shop.data / "vocabulary" / "00000.parquet")["value"])
    assert 50 < sum(row["uid"] not in known for row in shop.next) < 450


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_files_have_the_scores_of_the_evaluation(shop: Shop, kind: str, tmp_path: Path) -> None:
    """To the bit, in batches that several blocks make up; a text of digits and an integer are the same."""
    path = tmp_path / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        write_csv(shop.test, path, "," if kind == "csv" else "\t")
    elif kind == "parquet":
        pl.DataFrame(shop.test).write_parquet(path)
    else:
        present = [{name: value for name, value in row.items() if value is not None} for row in shop.test]
        path.write_text("\n".join(map(json.dumps, present)))
    assert shop.predictor.predict_file(path, tmp_path / "out.parquet", logits=True) == len(shop.test)
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert found.columns == ["logit"]
    np.testing.assert_array_equal(found["logit"].to_numpy(), shop.scores)


@pytest.mark.parametrize(
    "made",
    [list, pl.DataFrame, pd.DataFrame, lambda rows: pl.DataFrame(rows).to_arrow()],
    ids=["dicts", "polars", "pandas", "arrow"],
)
def test_rows_in_memory_have_the_scores_of_the_evaluation(shop: Shop, made: Any) -> None:
    found = shop.predictor.predict(made(shop.test), logits=True)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, shop.scores)
    chances = shop.predictor.predict(made(shop.test))
    assert chances.dtype == np.float32
    np.testing.assert_array_equal(chances, (1 / (1 + np.exp(-shop.scores.astype(np.float64)))).astype(np.float32))


def test_blocks_of_a_file_are_cut_into_batches_of_the_evaluation(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And memory holds a few of them: the next is read when those before are scored."""
    monkeypatch.setattr("embtables.datasets.raw_rows.BLOCK_BYTES", 20_000)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, shop.test)) + "\n")
    sizes = []
    original = type(shop.predictor._encoder).rows
    monkeypatch.setattr(type(shop.predictor._encoder), "rows", lambda *of: sizes.append(len(of[1])) or original(*of))
    shop.predictor.predict_file(path, tmp_path / "out.parquet", logits=True)
    assert len(sizes) > 5 and max(sizes) < 200 and sum(sizes) == len(shop.test)
    np.testing.assert_array_equal(pl.read_parquet(tmp_path / "out.parquet")["logit"].to_numpy(), shop.scores)


def test_one_row(shop: Shop) -> None:
    row = shop.next[0]
    (found,) = shop.predictor.predict(row, logits=True)
    assert found == pytest.approx(by_hand(shop, [row])[0], abs=1e-6)


def test_generated_data_and_a_selection_of_its_features(tmp_path: Path) -> None:
    """Its keys are the raw rows; what a run leaves out no row needs."""
    config = Synthetic(rows=4000, cardinalities=(300, 40, 5), num_dense=2, unseen=0.1)
    data = prepare_synthetic(tmp_path / "data", config)
    settings = {"training.epochs": 1, "data.leave_out": ["feature_1", "dense_0"], "training.evaluation_batch_size": 100}
    Trainer(load_config(flags=settings), data, tmp_path / "run").run()
    bundle = save_bundle(tmp_path / "run", data, tmp_path / "bundle")
    assert set(bundle.vocabularies) == {"feature_0", "feature_2"}
    (split, keys, dense, _, _) = next(Truth(config).chunks())
    rows = pl.DataFrame({"feature_0": keys[0], "feature_2": keys[2], "dense_1": dense[:, 1]}).filter(split == 2)
    predictor = Predictor.load(tmp_path / "bundle")
    assert predictor.columns == ["feature_0", "feature_2", "dense_1"]
    found = predictor.predict(rows, logits=True)
    np.testing.assert_array_equal(found, np.load(tmp_path / "run" / "test_scores.npy"))


# ---- what a value means ---------------------------------------------------------------------------------------------


def test_what_missing_and_unseen_values_are(shop: Shop) -> None:
    row = {"uid": "u3", "sku": 7, "country": "de", "price": 9.5, "tags": ["red"], "history": [5, 4]}

    def score(**changed: Any) -> float:
        return float(shop.predictor.predict({**row, **changed})[0])

    assert score(country=None) == score(country="") == score(country="NA") == score(country=float("nan"))
    assert score(country="atlantis") == score(country="mu") != score(country=None)
    assert score(price=None) == score(price="") == score(price=float("nan")) != score()
    assert score(price="9,5") == score(price=9.5) == score(price="9.5")
    assert score(sku="7") == score() != score(sku="07")
    assert score(tags=None) == score(tags=[]) == score(tags="") == score(tags=["unknown", None]) != score()
    assert score(tags="new|red") == score(tags=["new", "red"])
    assert score(history=None) == score(history=[]) != score() == score(history="5|4") == score(history=["5", "4"])
    assert score(history=[9, 9, 9, 1, 2, 3, 4, 5]) == score(history=[1, 2, 3, 4, 5])  # the latest five
    assert score(more=object(), bought="?") == score()
    without = [{name: value for name, value in row.items() if name != "price"}, row]
    assert shop.predictor.predict(without)[0] == pytest.approx(score(price=None))


def test_floats_where_the_training_had_them(tmp_path: Path) -> None:
    """Their text is what counts, in categories and in lists."""
    rows = {
        "user": [1, 2, 3] * 200,
        "item": [5, 6] * 300,
        "size": [1.5, 2.0, None] * 200,
        "heights": [[0.5], [1.0, 2.0]] * 300,
    }
    frame = pl.DataFrame(rows).with_columns(label=pl.Series([0, 1, 1, 0, 1, 0] * 100))
    frame.write_parquet(tmp_path / "log.parquet")
    options = Interactions(context=("size",), lists=("heights",), log=LogOptions(history=0))
    encoder = encoder_of(prepare_interactions(tmp_path / "log.parquet", tmp_path / "data", options))
    found = encoder.rows(pl.DataFrame({name: values[:6] for name, values in rows.items()}), "rows", str)
    ids = found.ids[:, 2].tolist()
    assert sorted(ids[:2]) == [2, 3] and ids == [*ids[:2], 0, *ids[:2], 0]
    assert found.lists["heights"].offsets.tolist() == [0, 1, 3, 4, 6, 7, 9]
    assert sorted(found.lists["heights"].values[:3]) == [2, 3, 4]


def test_no_rows_have_no_scores(shop: Shop) -> None:
    for rows in ([], pl.DataFrame(shop.test[:1]).clear(), pd.DataFrame(shop.test[:1]).iloc[:0]):
        found = shop.predictor.predict(rows)
        assert found.shape == (0,) and found.dtype == np.float32


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"price": "cheap"}, r"^row 1: column 'price' holds 'cheap', where a number is needed"),
        ({"price": [1.0]}, r"^the rows: the values of column 'price' are not of one type"),
        ({"country": ["de"]}, r"^the rows: the values of column 'country' are not of one type"),
        ({"sku": "many"}, r"^the rows: the values of column 'sku' are not of one type"),
        ({"sku": 1.5}, r"^the rows: column 'sku' is of type Float64, where the training had none: make integers"),
        ({"history": [1.5]}, r"^the rows: column 'history' is of type Float64, where the training had none"),
        ({"price": 1e300}, r"^row 1: column 'price' holds 1e\+300"),
    ],
)
def test_values_that_are_none(shop: Shop, changed: dict[str, Any], sentence: str) -> None:
    rows = [
        {**row, "price": 1.0 if "price" in changed and changed["price"] == 1e300 else row["price"]}
        for row in shop.test[:2]
    ]
    rows[1] |= changed
    with pytest.raises(ValueError, match=sentence):
        shop.predictor.predict(rows)


@pytest.mark.parametrize("made", [list, pl.DataFrame, pd.DataFrame, lambda rows: pl.DataFrame(rows).to_arrow()])
def test_a_missing_column(shop: Shop, made: Any) -> None:
    rows = [{name: value for name, value in row.items() if name not in ("country", "history")} for row in shop.test]
    with pytest.raises(
        ValueError, match=r"^the rows: no column 'country', 'history', which the model needs; there are uid"
    ):
        shop.predictor.predict(made(rows))


def test_columns_of_wrong_types(shop: Shop) -> None:
    frame = pl.DataFrame(shop.test)
    with pytest.raises(
        ValueError, match="^the rows: column 'uid' is of type List.*, where each row needs one number or text$"
    ):
        shop.predictor.predict(frame.with_columns(uid=pl.concat_list("uid")))
    with pytest.raises(ValueError, match="^the rows: column 'price' is of type Date, where numbers are needed$"):
        shop.predictor.predict(frame.with_columns(price=pl.date(2020, 1, 1)))
    with pytest.raises(
        ValueError, match="^the rows: column 'history' is of type Float64, where lists or text are needed$"
    ):
        shop.predictor.predict(frame.with_columns(history=1.5))
    with pytest.raises(TypeError, match="^rows are a dict, a list of dicts, a DataFrame or an Arrow table, not str$"):
        shop.predictor.predict("rows.csv")
    with pytest.raises(TypeError, match="not a list of others$"):
        shop.predictor.predict([("u1", 2)])
    mixed = pd.DataFrame(shop.test).assign(uid=["u1", 2] * (len(shop.test) // 2))
    with pytest.raises(ValueError, match="^the rows: the values of column 'uid' are not of one type: "):
        shop.predictor.predict(mixed)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.csv", "", "rows.csv: the file is empty"),
        ("rows.csv", HEADER, "rows.csv: the file holds no rows"),
        ("rows.csv", "uid,sku,country,price,tags\nu1,1,de,1,red\n", "rows.csv: no column 'history', which"),
        ("rows.csv", HEADER + "u1,1,de,1,red,2\nu1,1\n", "rows.csv:3 .2 columns.: not 6 columns; every row is"),
        ("rows.csv", HEADER + "u1,1,de,1,red,2\nu1,1,de,much,red,2\n", "rows.csv:3: column 'price' holds 'much'"),
        ("rows.parquet", "PAR1PAR1", "rows.parquet: the Parquet file is truncated or damaged"),
        ("rows.jsonl", "\n\n", "rows.jsonl: the file holds no rows"),
        ("rows.jsonl", '{"uid": "u1"\n', "rows.jsonl:1 … 1: not lines of JSON objects"),
        ("rows.jsonl", '{"uid": "u1"}\n', "rows.jsonl: no column 'sku', 'country', .*, which the model needs"),
        ("rows.jsonl", "7\n8\n", "rows.jsonl:1 … 2: "),
        ("gone.csv", None, "gone.csv: No such file or directory"),
    ],
)  # fmt: skip
def test_a_file_that_has_no_scores_leaves_none(
    shop: Shop, name: str, content: str | None, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "out.parquet").write_text("before")
    out = str(tmp_path / "out.parquet")
    assert run(["predict", str(shop.bundle), str(tmp_path / name), "--out", out, "--quiet"]) == 2
    said = capfd.readouterr().err
    assert pd.Series([said]).str.contains(sentence)[0], said
    assert said.count("\n") == 1
    assert (tmp_path / "out.parquet").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} <= {name, "out.parquet"}


# ---- vocabularies ---------------------------------------------------------------------------------------------------


def test_hashes_are_what_they_were() -> None:
    """Bundles hold them: another hash needs another version of the format."""
    assert probe() == [
        *("186da64456263a46", "69dc8e600dc8460d", "5cd6c8d05a2193cb", "12ae30237b17df14", "b4d055fcf2cbbd7b"),
    ]


def test_a_text_of_digits_is_its_integer() -> None:
    numbers = [0, 7, -3, 2**62, -(2**63), 12345678901234567]
    of_numbers = hashes_of(pl.Series(numbers))
    np.testing.assert_array_equal(of_numbers, hashes_of(pl.Series([str(number) for number in numbers])))
    np.testing.assert_array_equal(of_numbers[:3], hashes_of(pl.Series([0, 7, -3], dtype=pl.Int16)))
    others = hashes_of(pl.Series(["07", "+7", "7.0", " 7", "-0", str(2**63)]))
    assert len({*others.tolist(), *of_numbers.tolist()}) == len(others) + len(of_numbers)
    large = pl.Series([2**63 + 5], dtype=pl.UInt64)
    assert hashes_of(large) == hashes_of(pl.Series([str(2**63 + 5)]))


@pytest.mark.parametrize(("size", "bytes_each"), [(1, 3), (16, 3), (17, 4), (4000, 4), (200_000, 5)])
def test_vocabularies_are_as_short_as_they_can_be(size: int, bytes_each: int) -> None:
    values = pl.Series([f"v{number}" for number in range(size)])
    vocabulary = HashedVocabulary.of(values)
    assert vocabulary.hashes.shape == (size, bytes_each) and vocabulary.false_matches == 0
    assert vocabulary.false_share <= 1e-6
    np.testing.assert_array_equal(vocabulary.ids(values), np.arange(2, size + 2))
    unseen = pl.Series([f"w{number}" for number in range(10_000)])
    assert (vocabulary.ids(unseen) == 1).all()
    assert HashedVocabulary(vocabulary.hashes).ids(pl.Series([None, "v0"], dtype=pl.String)).tolist() == [0, 2]


def test_false_matches_are_counted() -> None:
    values = pl.Series([f"v{number}" for number in range(300)])
    short = HashedVocabulary(HashedVocabulary.of(values).hashes[:, :1].copy())
    assert short.false_matches == 300 - len(np.unique(short.hashes)) > 44
    assert short.false_share == 300 / 256


# ---- bundles --------------------------------------------------------------------------------------------------------


def test_every_byte_is_accounted_for(shop: Shop, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["bundle", str(shop.run), str(shop.data), str(tmp_path / "bundle")]) == 0
    said = capfd.readouterr().out
    record = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    files = {path.relative_to(tmp_path / "bundle").as_posix(): path for path in (tmp_path / "bundle").rglob("*.*")}
    assert record["bytes"] == {name: path.stat().st_size for name, path in files.items() if name != "bundle.json"}
    data = PreparedDataset(shop.data)
    values = {name: number - 2 for name, number in data.num_embeddings.items()}
    assert {name: of["values"] for name, of in record["vocabularies"].items()} == values
    kept = sum(of["bytes"] for of in record["vocabularies"].values())
    assert f"vocabularies: {sum(values.values()):,} values in {kept:,} bytes, 0 of them taken for another" in said
    tables = record["bytes"]["served/tables.safetensors"]
    assert ("NOTE the vocabularies are" in said) == (kept > tables)


def test_vocabularies_larger_than_the_tables_are_told(shop: Shop) -> None:
    record = unsealed(json.loads((shop.bundle / "bundle.json").read_text()))
    from embtables.training.bundle import Bundle

    bundle = Bundle.model_validate_json(json.dumps(record))
    assert not any("NOTE" in line for line in bundle.words()) or bundle.bytes["served/tables.safetensors"] < 2000
    bundle.bytes["served/tables.safetensors"] = 10
    assert "num_embeddings=None, need none" in " ".join(bundle.words())


def test_the_same_bundle_again_and_others_in_its_place(
    shop: Shop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(shop.bundle, out)
    assert run(["bundle", str(shop.run), str(shop.data), str(out)]) == 0
    assert (out / "bundle.json").read_bytes() == (shop.bundle / "bundle.json").read_bytes()
    other = tmp_path / "run"
    train = ["--method", "hash", "--budget", "30%", "--out", str(other), *TRAIN]
    assert run(["train", str(shop.data), *train]) == 0
    capfd.readouterr()
    assert run(["bundle", str(other), str(shop.data), str(out)]) == 2
    assert "holds the bundle of another run: give another OUT, or --overwrite" in capfd.readouterr().err
    assert run(["bundle", str(other), str(shop.data), str(out), "--overwrite"]) == 0
    assert run(["bundle", str(other), str(shop.data), str(tmp_path)]) == 2
    assert "exists and is not a bundle" in capfd.readouterr().err
    assert run(["bundle", str(other), str(shop.data), str(other / "bundle")]) == 2
    assert "whose parts are its own" in capfd.readouterr().err


def test_data_that_no_bundle_can_be_made_of(shop: Shop, tmp_path: Path) -> None:
    """Other data than the run's, data of an earlier release, and data of kinds that do not say where ids are from."""
    other = prepare_synthetic(tmp_path / "other", Synthetic(rows=1000, cardinalities=(50,)))
    with pytest.raises(
        ValueError, match=r"run was trained on other data than .*other: give the folder it was trained on$"
    ):
        save_bundle(shop.run, other, tmp_path / "bundle")
    manifest = tmp_path / "other" / "manifest.json"
    record = unsealed(json.loads(manifest.read_text()))
    del record["encoding"]
    manifest.write_text(json.dumps(sealed(record)))
    old = PreparedDataset(tmp_path / "other")
    flags = {"training.epochs": 1, "model.name": "mlp"}
    Trainer(load_config(flags=flags), old, tmp_path / "run").run()
    with pytest.raises(
        ValueError, match=r"^.*other \(kind 'synthetic'\) does not tell how raw rows become ids: of the kinds"
    ):
        save_bundle(tmp_path / "run", old, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "name",
    [
        "bundle.json",
        "vocabularies.safetensors",
        "served/model.json",
        "served/tables.safetensors",
        "served/model.safetensors",
    ],
)
def test_damaged_and_missing_files_are_named(shop: Shop, name: str, tmp_path: Path) -> None:
    whole = (shop.bundle / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:], b"", None):
        shutil.copytree(shop.bundle, tmp_path / "bundle")
        (tmp_path / "bundle" / name).unlink() if damaged is None else (tmp_path / "bundle" / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name.rpartition("/")[2]):
            Predictor.load(tmp_path / "bundle")
        shutil.rmtree(tmp_path / "bundle")


def test_foreign_folders_and_versions(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is no bundle: bundle.json is missing; `embtables bundle` makes one of a run$"
    ):
        Predictor.load(shop.run / "served")
    shutil.copytree(shop.bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "bundle.json"
    record = unsealed(json.loads(path.read_text()))

    def refused(sentence: str, **changed: Any) -> None:
        path.write_text(json.dumps(sealed({**record, **changed})))
        with pytest.raises(ValueError, match=sentence):
            Predictor.load(tmp_path / "bundle")

    refused("bundle.json does not describe a bundle$", format="other")
    refused("bundle.json has version 2; this release reads version 1$", version=2)
    refused("bundle.json: field 'batch_size' is damaged", batch_size=0)
    refused("hashes of values are others than those of the installed pandas", probe=["0"] * 5)
    encoding = record["encoding"]
    refused(
        "bundle.json does not say which column 'tags' is from",
        encoding={**encoding, "columns": {"user_id": "uid", "item_id": "sku", "country": "country", "price": "price"}},
    )
    refused("bundle.json has no scale of 'price'", encoding={**encoding, "scales": {}})
    shutil.copytree(shop.bundle, tmp_path / "linked")
    (tmp_path / "linked" / "vocabularies.safetensors").unlink()
    (tmp_path / "linked" / "vocabularies.safetensors").symlink_to(shop.bundle / "vocabularies.safetensors")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        Predictor.load(tmp_path / "linked")


def test_vocabularies_that_do_not_fit_the_tables(shop: Shop, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from embtables._util.files import sha256

    shutil.copytree(shop.bundle, tmp_path / "bundle")
    path, record = tmp_path / "bundle" / "bundle.json", json.loads((shop.bundle / "bundle.json").read_text())
    vocabularies = load_file(shop.bundle / "vocabularies.safetensors")
    for changed in (
        {"country": vocabularies["country"][:-1]},
        {"country": vocabularies["country"].astype(np.float32)},
        {"country": vocabularies["country"].repeat(3, axis=1)},
    ):
        file = tmp_path / "bundle" / "vocabularies.safetensors"
        save_file({name: np.ascontiguousarray(of) for name, of in {**vocabularies, **changed}.items()}, file)
        sums = {**record["sha256"], "vocabularies.safetensors": sha256(file)}
        path.write_text(json.dumps(sealed({**unsealed(record), "sha256": sums})))
        with pytest.raises(ValueError, match="vocabularies.safetensors does not hold the vocabulary of 'country'"):
            Predictor.load(tmp_path / "bundle")


def test_a_model_of_ones_own_is_imported_where_it_is_named(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_bundled.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nfrom embtables.models import MLP\nclass Own(MLP):\n    pass\n"
    )
    train = ["--model", "own_bundled:Own", "--method", "hash", "--budget", "60%", "--out", "run", *TRAIN]
    assert run(["train", str(shop.data), *train]) == 0
    (tmp_path / "ran").unlink()
    assert run(["bundle", "run", str(shop.data), "bundle"]) == 0 and not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="names the model 'own_bundled:Own', which is not of this package"):
        Predictor.load("bundle")
    rows = write_csv(shop.test, tmp_path / "rows.csv")
    command = ["predict", "bundle", str(rows), "--out", "out.parquet", "--quiet", "--logits"]
    assert run(command) == 2 and run([*command, "--model", "own_bundled:Own"]) == 0
    np.testing.assert_array_equal(pl.read_parquet("out.parquet")["logit"].to_numpy(), np.load("run/test_scores.npy"))


# ---- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_graphs_of_a_bundle(shop: Shop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ids are the encoder's, and a graph takes them from there."""
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    out = tmp_path / "bundle"
    assert run(["bundle", str(shop.run), str(shop.data), str(out), "--graphs"]) == 0
    said = capfd.readouterr()
    assert "graph.pt2: held against the model, logits differ by at most" in said.out and said.err == ""
    assert "graph.onnx: held against the model, logits differ by at most" in said.out
    record = json.loads((out / "bundle.json").read_text())
    assert {"graph.pt2", "graph.onnx"} < record["sha256"].keys() & record["bytes"].keys()
    np.testing.assert_array_equal(Predictor.load(out).predict(shop.test, logits=True), shop.scores)
    session = runtime.InferenceSession(out / "graph.onnx")
    program = torch.export.load(out / "graph.pt2").module()
    for rows in (7, 1):
        frame = pl.DataFrame(shop.test[:rows])
        batch = shop.predictor._encoder.rows(frame, "rows", str).batch()
        lists = [(of.values, of.offsets) for of in batch.lists.values()]
        found = program(batch.dense, batch.ids, lists).detach().numpy()
        np.testing.assert_allclose(found, shop.scores[:rows], atol=1e-6)
        given = {"dense": batch.dense, "ids": batch.ids}
        for name, (values, offsets) in zip(batch.lists, lists):
            given |= {f"{name}_values": values, f"{name}_offsets": offsets}
        assert {place.name for place in session.get_inputs()} == given.keys()
        logits = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})[0]
        np.testing.assert_allclose(logits, shop.scores[:rows], atol=1e-6)


class Unexportable(torch.nn.Module):
    """Its logits depend on data in a way that no graph has."""

    def __init__(self, embeddings: Any, num_dense_features: int) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, batch: Batch) -> torch.Tensor:
        return batch.dense.sum(1) * (1.0 if bool(batch.ids.sum() > 3) else 2.0)


def test_a_model_that_cannot_be_a_graph_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from embtables.training.graphs import export_graphs

    batch = Batch(torch.zeros(2), torch.randn(2, 3), torch.ones(2, 2, dtype=torch.int64), None, {})
    said = export_graphs(Unexportable(None, 3), batch, tmp_path)
    assert list(said) == ["graph.pt2", "graph.onnx"] and list(tmp_path.iterdir()) == []
    assert said["graph.pt2"].startswith("no graph.pt2: the model cannot be exported so (")
    assert said["graph.onnx"] == "no graph.onnx: it is made of graph.pt2"
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""
