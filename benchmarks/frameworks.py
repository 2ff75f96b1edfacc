"""Training end to end against what people train with: FuxiCTR's DLRM and DeepCTR-Torch's DeepFM.

All train one epoch on the same rows: 26 features with tables of 3.4 million rows and D = 16, 13 dense features, batches
of 2048, shuffled. The clock runs from opening the data to the end of the last step, so reading counts; making the data,
the model and its first weights do not. Each runs in a process of its own, at its own defaults:

- FuxiCTR: its ``fit`` without the evaluation and the checkpoint that end an epoch, its npz loader, dense Adam. DLRM is
  not in its package; it is put together from its layers as its model zoo does.
- DeepCTR-Torch: its ``fit``, its DeepFM with its default L2 regularization, dense Adam.
- embtables: a prepared folder, its reader, its model of the same layers with full tables, Adam on touched rows for the
  tables and fused Adam for the rest, in a plain loop.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import machine
from benchmarks.contestants import one_line
from benchmarks.dlrm import BOTTOM, NUM_DENSE, TOP, forget_peak, peak_bytes
from benchmarks.tables import Row
from benchmarks.timing import Others, Progress
from benchmarks.workload import Workload, sizes

DIM, DEEPFM_UNITS = 16, (256, 128)
OURS = {"dlrm": "embtables DLRM", "deepfm": "embtables DeepFM"}
RIVALS = {"dlrm": "FuxiCTR DLRM", "deepfm": "DeepCTR-Torch DeepFM"}


@dataclass(frozen=True)
class Settings:
    """``model``: ``dlrm`` or ``deepfm``; ``ours``: embtables' or the rival's; ``repeat`` tells repetitions apart."""

    model: str
    ours: bool
    steps: int = 40
    batch: int = 2048
    divisor: int = 10
    threads: int = 2
    repeat: int = 0


@dataclass(frozen=True)
class Data:
    """Rows in memory, before a framework's own format is written."""

    sizes: list[int]
    labels: np.ndarray  # float32 [N]
    dense: np.ndarray  # float32 [N, 13]
    ids: np.ndarray  # int64 [N, 26]

    @property
    def names(self) -> list[str]:
        return [f"C{i + 1}" for i in range(len(self.sizes))]

    @property
    def dense_names(self) -> list[str]:
        return [f"I{i + 1}" for i in range(NUM_DENSE)]


def make_data(table_sizes: list[int], batch: int, steps: int) -> Data:
    ids = torch.cat(Workload(table_sizes, 1, batch, steps).ids).numpy()
    generator = np.random.default_rng(1)
    labels = (generator.random(len(ids)) < 0.25).astype(np.float32)
    return Data(table_sizes, labels, generator.standard_normal((len(ids), NUM_DENSE)).astype(np.float32), ids)


def run(settings: Settings, progress: Progress) -> list[Row]:
    """One row: examples a second and peak memory."""
    torch.set_num_threads(settings.threads)
    name = (OURS if settings.ours else RIVALS)[settings.model]
    row: Row = {"suite": "frameworks", "scale": f"1/{settings.divisor}", "dim": DIM, "batch": settings.batch}
    row |= {"threads": settings.threads, "ops": machine.backend(), "contestant": name, "ours": settings.ours}
    row |= {"repeat": settings.repeat, "optimizer": "adam" if settings.ours else "dense adam"}
    trainers = {
        ("dlrm", True): embtables_dlrm,
        ("deepfm", True): embtables_deepfm,
        ("dlrm", False): fuxictr_dlrm,
        ("deepfm", False): deepctr_deepfm,
    }
    data = make_data(sizes(settings.divisor), settings.batch, settings.steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            train = trainers[settings.model, settings.ours](data, Path(folder), settings.batch)
        except (ImportError, OSError) as error:
            reason = f"cannot be imported here ({one_line(error)})"
            return [row | {"status": "skipped", "reason": reason}]
        progress(0.3)
        forget_peak()
        others = Others()
        cpu, wall = time.process_time(), time.perf_counter()
        train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    noise = others.share()
    row |= {"status": "ok", "calls": settings.steps, "median_ms": 1e3 * wall / settings.steps}
    row |= {"cpu_ms": 1e3 * cpu / settings.steps, "peak_bytes": peak_bytes(), "others": noise}
    return [row | {"examples_per_second": len(data.labels) / wall}]


# ---- embtables -------------------------------------------------------------------------------------------------------


def embtables_dlrm(data: Data, folder: Path, batch: int) -> Callable[[], None]:
    from embtables.models import DLRM

    return _embtables(data, folder, batch, DIM, lambda t: DLRM(t, NUM_DENSE, bottom_units=BOTTOM, top_units=TOP))


def embtables_deepfm(data: Data, folder: Path, batch: int) -> Callable[[], None]:
    """Vectors of D + 1: the first component is the first-order weight, which others keep in a table of its own."""
    from embtables.models import DeepFM

    return _embtables(data, folder, batch, DIM + 1, lambda t: DeepFM(t, NUM_DENSE, units=DEEPFM_UNITS))


def _embtables(data: Data, folder: Path, batch: int, dim: int, make: Any) -> Callable[[], None]:
    from embtables import EmbeddingTables, plan
    from embtables.datasets import PreparedDataset

    _write_prepared(data, folder / "prepared")
    configs = PreparedDataset(folder / "prepared").table_configs(dim)
    torch.manual_seed(0)
    model = make(EmbeddingTables(plan(configs, "full", optimizer="adam")))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def train() -> None:
        for rows in PreparedDataset(folder / "prepared").batches("train", batch, seed=0):
            loss = F.binary_cross_entropy_with_logits(model(rows), rows.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return train


def _write_prepared(data: Data, out: Path) -> None:
    import polars as pl

    from embtables.datasets.vocabulary import Vocabulary
    from embtables.datasets.writing import Contents, Writer, prepare

    def fill(writer: Writer) -> None:
        # The ids are ranks already, and tables hold all of them, whether or not they occur in these rows.
        vocabularies = {
            name: Vocabulary(np.arange(size - 2), np.bincount(column, minlength=size)[2:].clip(1))
            for name, size, column in zip(data.names, data.sizes, data.ids.T)
        }
        writer.declare(Contents(vocabularies, data.dense_names))
        columns: dict[str, np.ndarray] = {"label": data.labels}
        columns |= dict(zip(data.dense_names, data.dense.T))
        columns |= dict(zip(data.names, data.ids.T))
        rows = pl.DataFrame(columns)
        writer.write("train", rows)
        for split in ("valid", "test"):  # no split may be empty
            writer.write(split, rows.head(1))
        writer.rows_read = len(rows)

    prepare(out, "benchmark", {"rows": len(data.labels)}, [], fill)


# ---- FuxiCTR ---------------------------------------------------------------------------------------------------------


def fuxictr_dlrm(data: Data, folder: Path, batch: int) -> Callable[[], None]:
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.layers import FeatureEmbedding, InnerProductInteraction, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    class DLRM(BaseModel):
        def __init__(self, feature_map: Any, **options: Any) -> None:
            super().__init__(feature_map, model_id="DLRM", **options)
            self.embedding_layer = FeatureEmbedding(feature_map, DIM, not_required_feature_columns=data.dense_names)
            self.bottom = MLP_Block(NUM_DENSE, hidden_units=list(BOTTOM), output_dim=DIM)
            vectors = len(data.sizes) + 1
            self.interact = InnerProductInteraction(vectors, output="inner_product")
            self.top = MLP_Block(vectors * (vectors - 1) // 2 + DIM, hidden_units=list(TOP), output_dim=1)
            self.compile("adam", "binary_crossentropy", 1e-3)
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: Any) -> dict[str, torch.Tensor]:
            features = self.get_inputs(inputs)
            vectors = self.embedding_layer(features)
            dense = self.bottom(torch.stack([features[name] for name in data.dense_names], dim=1).float())
            products = self.interact(torch.cat([vectors, dense.unsqueeze(1)], dim=1))
            return {"y_pred": self.output_activation(self.top(torch.cat([products, dense], dim=1)))}

    features = FeatureMap("rows", str(folder))
    features.labels = ["label"]
    specs: list[tuple[str, dict[str, Any]]] = [(name, {"type": "numeric", "source": ""}) for name in data.dense_names]
    specs += [(name, {"type": "categorical", "source": "", "vocab_size": n}) for name, n in zip(data.names, data.sizes)]
    features.features = OrderedDict(specs)
    features.num_fields = features.get_num_fields()
    features.default_emb_dim = DIM
    features.set_column_index()
    os.makedirs(folder / "rows", exist_ok=True)
    columns = dict(zip(data.dense_names, data.dense.T)) | dict(zip(data.names, data.ids.T))
    np.savez(folder / "train.npz", label=data.labels, **columns)
    torch.manual_seed(0)
    options = {"metrics": ["AUC"], "monitor": "AUC", "verbose": 0, "gpu": -1, "eval_steps": 10**9}
    model = DLRM(features, model_root=str(folder), **options)
    model.load_weights = lambda path: None  # of the checkpoint that no evaluation has written

    def train() -> None:
        loader, _ = RankDataLoader(
            features, stage="train", train_data=str(folder / "train.npz"), batch_size=batch, shuffle=True
        )
        model.fit(loader, epochs=1)

    return train


# ---- DeepCTR-Torch ---------------------------------------------------------------------------------------------------


def deepctr_deepfm(data: Data, folder: Path, batch: int) -> Callable[[], None]:
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    features = [SparseFeat(name, size, embedding_dim=DIM) for name, size in zip(data.names, data.sizes)]
    features += [DenseFeat(name, 1) for name in data.dense_names]
    model = DeepFM(features, features, dnn_hidden_units=DEEPFM_UNITS)
    model.compile("adam", "binary_crossentropy")
    columns = dict(zip(data.names, data.ids.T)) | dict(zip(data.dense_names, data.dense.T))

    def train() -> None:
        model.fit(columns, data.labels, batch_size=batch, epochs=1, verbose=0)

    return train
