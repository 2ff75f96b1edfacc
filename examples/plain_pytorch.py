"""Compressed tables in a plain PyTorch training loop: plan, build, train, serve, save, load.

    python examples/plain_pytorch.py --method compositional --budget 5%

Only `EmbeddingTables` is the library's; the model, the dense optimizer and the loop are anybody's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from embtables import Adagrad, EmbeddingTables, plan
from embtables.datasets import PreparedDataset
from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic
from embtables.methods import from_config
from embtables.training.metrics import auc


class Model(nn.Module):
    """An MLP over the concatenated vectors of all features."""

    def __init__(self, tables: EmbeddingTables) -> None:
        super().__init__()
        self.tables = tables
        self.mlp = nn.Sequential(nn.Linear(sum(tables.embedding_dims), 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.tables(ids)).squeeze(1)


def test_auc(model: Model, data: PreparedDataset) -> float:
    model.eval()
    with torch.no_grad():
        batches = [(batch.labels, model(batch.ids)) for batch in data.batches("test", 8192)]
    labels, scores = (torch.cat(parts).numpy() for parts in zip(*batches))
    return auc(labels, scores)


def train(data: PreparedDataset, method: str, budget: str, epochs: int) -> Model:
    # What the tables cost is known, to the byte, before anything is allocated.
    epoch_steps = -(-data.num_rows("train") // 1024)
    solved = plan(
        data.table_configs(embedding_dim=16),
        # Methods with a schedule, such as pruned, size it by the length of the training.
        from_config(method).for_training(epochs * epoch_steps),
        budget,
        frequencies=data.frequencies,
        optimizer=Adagrad(lr=0.05),
    )
    print(solved)

    # The tables' optimizer is fused: it updates the touched rows inside backward() and needs no step of its own.
    tables = EmbeddingTables(solved, seed=0)
    model = Model(tables)
    optimizer = torch.optim.Adam(model.mlp.parameters(), lr=1e-3)
    loss_of = nn.BCEWithLogitsLoss()
    for epoch in range(epochs):
        total = 0.0
        for batch in data.batches("train", 1024, seed=0, epoch=epoch):
            loss = loss_of(model(batch.ids), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / epoch_steps:.4f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="compositional", help="kind of method, such as hash, robe, unified")
    parser.add_argument("--budget", default="5%", help="inference bytes: 5%%, 0.05, 64kB")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_synthetic(
            Path(folder) / "data", Synthetic(rows=args.rows, cardinalities=(20_000, 2_000, 200), seed=1)
        )
        model = train(data, args.method, args.budget, args.epochs)

        # What is served, and saved, is within the budget; it is loaded without the training code.
        file = Path(folder) / "tables.safetensors"
        model.tables.save(file)
        model.tables = EmbeddingTables.load(file)
        served = model.tables.memory().inference_bytes
        print(f"served from its file: {served:,} bytes, test AUC {test_auc(model, data):.4f}")


if __name__ == "__main__":
    main()
