"""Compressed tables in torchrec's DLRM: one line between the model and its optimizer, or after both.

    python examples/compress_torchrec.py --method unified --budget 10%

Data are generated.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from embtables import compress_

VOCABULARY = {"user": 2_000, "item": 5_000, "category": 100}


def build() -> DLRM:
    torch.manual_seed(0)
    configs = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=size, embedding_dim=8, feature_names=[name])
        for name, size in VOCABULARY.items()
    ]
    tables = EmbeddingBagCollection(tables=configs)
    return DLRM(tables, dense_in_features=2, dense_arch_layer_sizes=[8], over_arch_layer_sizes=[16, 1])


def batches(number: int, seed: int = 0, size: int = 256) -> list[tuple[Tensor, KeyedJaggedTensor, Tensor]]:
    """Dense features, ids, clicks, which depend on whether user and category are odd."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(number):
        item = torch.randint(1, VOCABULARY["item"], (size,), generator=generator)
        user = torch.randint(1, VOCABULARY["user"], (size,), generator=generator)
        category = item % VOCABULARY["category"]
        ids = KeyedJaggedTensor.from_lengths_sync(
            list(VOCABULARY), torch.cat([user, item, category]), torch.ones(3 * size, dtype=torch.int64)
        )
        chance = 0.1 + 0.4 * (user % 2) + 0.4 * (category % 2)
        dense = torch.rand(size, 2, generator=generator)
        result.append((dense, ids, torch.bernoulli(chance, generator=generator)))
    return result


def train(model: DLRM, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, KeyedJaggedTensor, Tensor]]) -> float:
    """The mean loss of one epoch."""
    total = 0.0
    for dense, ids, clicks in data:
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, ids).squeeze(1), clicks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="unified", help="kind of method, such as hash, compositional, pruned")
    parser.add_argument("--budget", default="20%", help="inference bytes of all tables together: 20%%, 0.2, 64kB")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    print(compress_(model, args.method, args.budget, rebind=optimizer))  # the one line
    data = batches(40)
    for epoch in range(args.epochs):
        print(f"epoch {epoch + 1}: loss {train(model, optimizer, data):.4f}")


if __name__ == "__main__":
    main()
