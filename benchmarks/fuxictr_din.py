"""Accuracy inside a peer: FuxiCTR's own DIN and its `fit` on S3-Rec data, the item table swapped by `compress_`.

    embtables prepare s3rec Sports_and_Outdoors.txt data/sports
    python -m benchmarks.fuxictr_din data/sports docs/results/fuxictr-din --seeds 3

Every run is FuxiCTR's: its model, Adam, early stop on the validation AUC, whose best weights it loads. The test rows
are scored once, with the tables as they will be served. Beside our methods stands the naive way to fewer rows, an
`nn.Embedding` of the same bytes that is looked up by id modulo its rows. Runs that results.csv holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fuxictr.features import FeatureMap
from model_zoo.LongCTR.DIN import DIN
from torch import Tensor, nn

from benchmarks import machine
from embtables import EmbeddingTables, compress_
from embtables._util.files import write_text
from embtables.datasets import PreparedDataset
from embtables.sweeps.cells import MethodSpec, kind_of, parse_methods
from embtables.training import metrics

ITEM, HISTORY, LONGEST = "item_id", "history", 10
FULL, NAIVE = "full", "naive: id modulo rows"
METHODS = (
    "hash,multi_hash,compositional,unified,robe,mixed_dimension,frequency_cutoff,pruned,low_rank,fewer_dimensions,"
    "{kind: hot_cold, hot: 0.5},{kind: full, precision: int4},{kind: frequency_cutoff, precision: int8},"
    "{kind: hash, precision: int8},{kind: banded, widths: [], precision: int8}"
)
#: Chosen on the validation AUC of full tables: see docs/results/README.md.
MODEL = {
    "embedding_dim": 16,
    "dnn_hidden_units": [200, 80],
    "attention_hidden_units": [64],
    "din_use_softmax": True,
    "learning_rate": 5e-3,
    "embedding_regularizer": 1e-3,
}


class Batches:
    """What FuxiCTR's loaders yield: the history of each row, and behind it the target; shuffled anew each time."""

    def __init__(self, data: PreparedDataset, split: str, size: int, seed: int | None = None) -> None:
        column = list(data.feature_names).index(ITEM)
        items, labels = [], []
        for batch in data.batches(split, 2**16):
            lists = batch.lists[HISTORY]
            lengths = lists.offsets.diff()
            rows = torch.arange(len(lengths)).repeat_interleave(lengths)
            places = LONGEST - lists.offsets[1:][rows] + torch.arange(len(lists.values))  # the latest item stands last
            padded = torch.zeros(len(lengths), LONGEST + 1, dtype=torch.int64)
            padded[rows[places >= 0], places[places >= 0]] = lists.values[places >= 0]
            padded[:, LONGEST] = batch.ids[:, column]
            items.append(padded)
            labels.append(batch.labels)
        self.items, self.labels, self.size = torch.cat(items), torch.cat(labels), size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.arange(len(self.labels))
        if self.generator is not None:
            order = torch.randperm(len(order), generator=self.generator)
        for rows in order.split(self.size):
            items = self.items[rows]
            yield {"label": self.labels[rows]}, {ITEM: items.flatten()}, (items[:, :-1] != 0).float()


class Modulo(nn.Module):
    """Rows that ids share by their remainder."""

    def __init__(self, rows: int, like: nn.Embedding) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, like.embedding_dim)
        nn.init.normal_(self.table.weight, std=float(like.weight.detach().std()))

    def forward(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self.table(ids % self.table.num_embeddings)
        return vectors


def build(folder: Path, num_items: int, seed: int, options: dict[str, Any]) -> DIN:
    """FuxiCTR's DIN over items alone."""
    features = FeatureMap("s3rec", str(folder))
    features.labels = ["label"]
    features.features = OrderedDict(
        {ITEM: {"type": "categorical", "source": "item", "vocab_size": num_items, "padding_idx": 0}}
    )
    features.num_fields = features.get_num_fields()
    features.default_emb_dim = options["embedding_dim"]
    (folder / "s3rec").mkdir(exist_ok=True)
    torch.manual_seed(seed)
    common = {"model_root": str(folder), "metrics": ["AUC"], "monitor": "AUC", "verbose": 0, "gpu": -1}
    return DIN(features, optimizer="adam", loss="binary_crossentropy", **common, **options)


def swap(model: DIN, spec: MethodSpec, budget: float, counts: np.ndarray, options: dict[str, Any]) -> int:
    """Puts tables of `spec` in the place of the item table; the bytes that they will be served in."""
    tables = model.embedding_layer.embedding_layer.embedding_layers
    if spec == NAIVE:
        rows = int(budget * tables[ITEM].num_embeddings)
        tables[ITEM] = Modulo(rows, tables[ITEM])
        model.compile("adam", "binary_crossentropy", options["learning_rate"])
        return 4 * rows * int(options["embedding_dim"])
    name = next(name for name, module in model.named_modules() if module is tables[ITEM])
    limit = None if kind_of(spec) == FULL else budget
    return compress_(model, spec, limit, frequencies={name: counts}).bytes_after


def train(data: PreparedDataset, spec: MethodSpec, budget: float, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One run: validation and test AUC of what is served."""
    batches = {
        split: Batches(data, split, 1024, seed if split == "train" else None) for split in ("train", "valid", "test")
    }
    with tempfile.TemporaryDirectory() as folder:
        num_items = int(data.num_embeddings[ITEM])
        model = build(Path(folder), num_items, seed, options)
        num_bytes = swap(model, spec, budget, data.frequencies[ITEM], options) if spec != FULL else 4 * num_items * 16
        start = time.perf_counter()
        model.fit(batches["train"], epochs=20, validation_data=batches["valid"])
        seconds = time.perf_counter() - start
    ours = next((module for module in model.modules() if isinstance(module, EmbeddingTables)), None)
    with nullcontext() if ours is None else ours.as_served():
        aucs = {
            f"{split}_auc": metrics.auc(batches[split].labels.numpy(), model.predict(batches[split]))
            for split in ("valid", "test")
        }
    return {"inference_bytes": num_bytes, **aucs, "epochs": model._epoch_index + 1, "train_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="S3-Rec data as `embtables prepare s3rec` leaves them")
    parser.add_argument("out", type=Path, help="the folder of results.csv and environment.json")
    parser.add_argument(
        "--methods", default=METHODS, help="as `embtables sweep` takes them, beside full and the naive way"
    )
    parser.add_argument("--budget", type=float, default=0.25, help="share of the full table's bytes")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="of FuxiCTR's DIN, as JSON")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    options = MODEL | {name: json.loads(value) for name, value in (text.split("=", 1) for text in arguments.set)}
    data = PreparedDataset(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "environment.json").write_text(
        json.dumps(machine.describe() | {"threads": torch.get_num_threads(), "model": options}, indent=1) + "\n"
    )
    path = arguments.out / "results.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    methods: dict[str, MethodSpec] = {FULL: FULL, NAIVE: NAIVE, **parse_methods(arguments.methods)}
    for seed in range(arguments.seeds):
        for label, spec in methods.items():
            if (label, seed) not in done:
                row = {"data": data.path.name, "method": label, "budget": arguments.budget, "seed": seed}
                rows.append(row | train(data, spec, arguments.budget, seed, options))
                write_text(path, pd.DataFrame(rows).to_csv(index=False))
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
