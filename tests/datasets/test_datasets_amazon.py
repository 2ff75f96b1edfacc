"""Amazon reviews: DIN's protocol against a loop over the log, every release's fields, every way to be wrong."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from decoded import all_decoded, decoded, train_din, vocabulary

from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.negatives import Negatives
from embtables.datasets.readers.amazon import Amazon, prepare_amazon

DAY = 86_400
PATHS = {
    "B0": [["Electronics", "Audio"], ["Electronics", "Cables & Interconnects"]],
    "B1": [["Electronics"]],
    "B2": [["Sports"], ["Electronics", "eBook \\Readers"]],
    "B3": [[]],
}


def category(item: str) -> str | None:
    path = PATHS.get(item, [["Electronics", f"group {int(item[1:]) % 5}"]])[-1]
    return path[-1] if path else None


def log(users: int = 40, seed: int = 0) -> list[tuple[str, str, int]]:
    """Reviews (user, product, day) in no order; half of a user's reviews share a day with another one."""
    generator = random.Random(seed)
    rows = []
    for user in range(users):
        for item in generator.sample(range(60), generator.randint(1, 12)):
            rows.append((f"A{user}", f"B{item}", 15_000 + generator.randint(0, 4)))
    generator.shuffle(rows)
    return rows


def write_reviews(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    lines = []
    for user, item, day in rows:
        review = {"reviewerID": user, "asin": item, "reviewerName": 'A "B"', "helpful": [0, 1], "reviewText": "o\nk"}
        lines.append(json.dumps(review | {"overall": 5.0, "summary": "", "unixReviewTime": day * DAY}) + "\n")
    text = "".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_metadata(path: Path, items: list[str]) -> Path:
    """Python literals, as in 2014."""
    lines = []
    for item in items:
        categories = PATHS.get(item, [["Electronics", category(item)]])
        product = {"asin": item, "title": "It's a \"8'' x\\d\"", "price": 9.99, "categories": categories}
        lines.append(repr(product).replace("\\\\d", "\\d") + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write_reviews(tmp_path / "reviews_Electronics_5.json.gz", log()),
        write_metadata(tmp_path / "meta_Electronics.json", [f"B{item}" for item in range(70)]),
    )


def test_the_protocol_against_a_loop(tmp_path: Path, files: tuple[Path, Path]) -> None:
    config = Amazon(log=LogOptions("leave-last-out", history=5, min_history=1))
    data = prepare_amazon(files[0], tmp_path / "out", files[1], config)
    assert data.feature_names == ["user_id", "item_id", "category"]
    assert data.histories == {"history": "item_id", "category_history": "category"}
    reviewed: dict[str, list[str]] = {}
    for user, item, _ in sorted(log(), key=lambda row: row[2]):  # a stable sort: within a day the file's order
        reviewed.setdefault(user, []).append(item)
    items = {item for of in reviewed.values() for item in of}

    expected: dict[str, Counter] = {"train": Counter(), "valid": Counter(), "test": Counter()}
    for user, sequence in reviewed.items():
        for place in range(1, len(sequence)):
            left = len(sequence) - place if len(sequence) >= 3 else 3
            split = {1: "test", 2: "valid"}.get(left, "train")
            expected[split][user, sequence[place], tuple(sequence[max(0, place - 5) : place])] += 1
    names = list(dict.fromkeys(user for user, _, _ in log()))  # groups are numbered as users first occur
    seen = set(vocabulary(data, "item_id"))
    drawn = Counter()
    for split, positives in expected.items():
        rows = decoded(data, split)
        found = Counter()
        for positive, negative in zip(rows[::2], rows[1::2], strict=True):
            user = names[positive["_group"]]
            assert (positive["label"], negative["label"]) == (1, 0)
            assert {positive["user_id"], negative["user_id"]} <= {user, "unseen"}
            assert (negative["_group"], negative["history"]) == (positive["_group"], positive["history"])
            assert negative["item_id"] in (items | {"unseen"}) - set(reviewed[user])
            drawn[negative["item_id"]] += 1
            for row in (positive, negative):
                assert row["item_id"] == "unseen" or row["category"] == category(row["item_id"])
                pairs = zip(row["history"], row["category_history"], strict=True)
                assert all(of == category(item) for item, of in pairs if item != "unseen")
            found[user, positive["item_id"], tuple(positive["history"])] += 1
        known = Counter()
        for (user, item, history), count in positives.items():
            shown = tuple(i if i in seen else "unseen" for i in (item, *history))
            known[user, shown[0], shown[1:]] += count
        assert found == known
    assert len(drawn) > 0.9 * len(items) and max(drawn.values()) < 20  # uniform over products


def test_counts_are_those_of_din(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """din/build_dataset.py: two examples a review but the first; a test pair a user. Our validation takes one more."""
    data = prepare_amazon(files[0], tmp_path / "out", files[1])
    lengths = Counter(user for user, _, _ in log())
    assert sum(data.num_rows(split) for split in ("train", "valid", "test")) == 2 * (len(log()) - len(lengths))
    long = sum(length >= 3 for length in lengths.values())
    assert data.num_rows("test") == data.num_rows("valid") == 2 * long
    assert data.manifest["rows_without_history"] == len(lengths)
    assert data.manifest["items_without_category"] == sum(category(item) is None for item in {i for _, i, _ in log()})


def test_every_release_gives_the_same(tmp_path: Path, files: tuple[Path, Path]) -> None:
    reference = prepare_amazon(files[0], tmp_path / "2014", files[1])
    items = [f"B{item}" for item in range(70)]
    reviews = write_reviews(tmp_path / "Electronics_5.json", log())
    lines = [{"category": PATHS.get(i, [["Electronics", category(i)]])[-1], "asin": i} for i in items]
    metadata = tmp_path / "meta_2018.json.gz"
    metadata.write_bytes(gzip.compress("".join(json.dumps(line) + "\r\n" for line in lines).encode()))
    data_2018 = prepare_amazon(reviews, tmp_path / "2018", metadata)

    rows = [
        {"rating": 5.0, "asin": "variant", "parent_asin": item, "user_id": user, "timestamp": day * DAY * 1000}
        for user, item, day in log()
    ]
    reviews = tmp_path / "Electronics.jsonl"
    reviews.write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    lines = [{"categories": PATHS.get(i, [["El", category(i)]])[-1], "parent_asin": i} for i in items]
    metadata = tmp_path / "meta_2023.jsonl"
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data_2023 = prepare_amazon(reviews, tmp_path / "2023", metadata)
    for split in ("train", "valid", "test"):
        assert decoded(data_2018, split) == decoded(data_2023, split) == decoded(reference, split)


def test_without_metadata_and_with_more_negatives(tmp_path: Path, files: tuple[Path, Path]) -> None:
    config = Amazon(negatives=Negatives(3, "uniform", None))
    data = prepare_amazon(files[0], tmp_path / "out", None, config)
    assert data.feature_names == ["user_id", "item_id"] and list(data.histories) == ["history"]
    labels = Counter(row["label"] for row in all_decoded(data))
    assert labels[0] == 3 * labels[1]
    batch = next(data.batches("train", 32))
    assert batch.ids.shape == (32, 2) and len(batch.lists["history"].offsets) == 33
    assert (np.diff(batch.lists["history"].offsets.numpy()) >= 1).all()


def test_malformed_lines_are_counted(tmp_path: Path, files: tuple[Path, Path]) -> None:
    good = write_reviews(tmp_path / "good.json", log()).read_text().splitlines(keepends=True)
    bad = [
        '{"reviewerID": "A1", "asin": "B1"}\n',
        '{"reviewerID": "A1", "asin": "B1", "unixReviewTime": "yesterday"}\n',
        '{"reviewerID": "", "asin": "B1", "unixReviewTime": 1}\n',
        '{"reviewerID": "A\\ud800", "asin": "B1", "unixReviewTime": 1}\n',
        '{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 1\n',
        "[1, 2]\n",
        "__import__('os').abort()\n",
        "{'a': __import__('os').abort()}\n",
        "(" * 5000 + "\n",
        "\n",
    ]
    source = tmp_path / "reviews.json"
    source.write_text("".join(good[:1] + bad + good[1:]))
    with pytest.raises(ValueError, match=r"reviews.json:6: no JSON object; 9 of 2\d\d rows read are malformed"):
        prepare_amazon(source, tmp_path / "out", files[1])
    assert not (tmp_path / "out").exists()
    data = prepare_amazon(source, tmp_path / "out", files[1], Amazon(max_rejected=0.05))
    assert data.manifest["rows_rejected"] == {"no user, product and time": 4, "no JSON object": 5}
    assert data.manifest["rows_read"] == len(good) + 9
    reference = prepare_amazon(tmp_path / "good.json", tmp_path / "reference", files[1])
    assert all_decoded(data) == all_decoded(reference)


def test_bad_files(tmp_path: Path, files: tuple[Path, Path]) -> None:
    def refused(sentence: str, reviews: Path = files[0], metadata: Path | None = files[1]) -> None:
        with pytest.raises(ValueError, match=sentence):
            prepare_amazon(reviews, tmp_path / "out", metadata)
        assert not (tmp_path / "out").exists()

    refused("absent.json: no such file", metadata=tmp_path / "absent.json")
    truncated = tmp_path / "truncated.json.gz"
    truncated.write_bytes(files[0].read_bytes()[:-20])
    refused("truncated.json.gz: the gzip file is truncated or damaged", reviews=truncated)
    empty = tmp_path / "empty.json"
    empty.write_text("\n")
    refused("empty.json: the file holds no reviews", reviews=empty)
    refused("empty.json: it knows none of the 60 reviewed products", metadata=empty)
    refused("it gives none of the 60 reviewed products a category", metadata=files[0])
    refused("it knows none", metadata=write_metadata(tmp_path / "other.json", ["C1", "C2"]))
    nameless = tmp_path / "nameless.json"
    nameless.write_text("{'title': 'x', 'categories': [['a']]}\n")
    refused("nameless.json:1: no product", metadata=nameless)
    single = write_reviews(tmp_path / "single.json", [(f"A{user}", f"B{user}", 1) for user in range(9)])
    refused("no user has more than 1 rows", reviews=single, metadata=None)
    (tmp_path / "binary.json").write_bytes(b"\x00\x01")
    refused("binary.json:1: a NUL byte", reviews=tmp_path / "binary.json")


def test_din_learns_tastes_for_categories(tmp_path: Path) -> None:
    """Everybody reviews one group of products only: what fits the history is a review, what does not a negative."""
    generator = random.Random(3)
    rows = []
    for user in range(300):
        group = generator.randrange(5)
        for item in generator.sample(range(group, 400, 5), 7):
            rows.append((f"A{user}", f"B{item}", 15_000 + generator.randrange(1000)))
    reviews = write_reviews(tmp_path / "reviews.json", rows)
    metadata = write_metadata(tmp_path / "meta.json", [f"B{item}" for item in range(4, 400)])
    data = prepare_amazon(reviews, tmp_path / "out", metadata)
    assert train_din(data, tmp_path / "run", 5, ["user_id", "item_id"]) > 0.8
    assert train_din(data, tmp_path / "without", 2, ["user_id", "history", "category_history"]) < 0.6
