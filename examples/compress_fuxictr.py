"""Compressed tables in FuxiCTR's DIN and DeepFM: one line between the model's constructor and its `fit`.

    python examples/compress_fuxictr.py --model DeepFM --method compositional --budget 20%

Data are generated. How FuxiCTR is installed stands in docs/compress.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from model_zoo.LongCTR.DIN import DIN
from torch import Tensor

from embtables import compress_

VOCABULARY = {"user": 2_000, "item": 5_000, "category": 100}
HISTORY = 10


class DeepFM(BaseModel):  # type: ignore[misc]
    """DeepFM from FuxiCTR's layers, since its package holds the long-sequence models alone."""

    def __init__(self, feature_map: FeatureMap, embedding_dim: int, learning_rate: float, **options: Any) -> None:
        super().__init__(feature_map, model_id="DeepFM", **options)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(feature_map.sum_emb_out_dim(), hidden_units=[32], output_dim=1)
        self.compile(options["optimizer"], options["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.get_inputs(inputs)
        vectors = self.embedding_layer(features)
        logits = self.fm(features, vectors) + self.mlp(vectors.flatten(1))
        return {"y_pred": self.output_activation(logits)}


def feature_map(folder: str) -> FeatureMap:
    features = FeatureMap("generated", folder)
    features.labels = ["click"]
    for name, size in VOCABULARY.items():
        source = "user" if name == "user" else "item"
        features.features[name] = {"type": "categorical", "source": source, "vocab_size": size, "padding_idx": 0}
    features.features = OrderedDict(features.features)
    features.num_fields = features.get_num_fields()
    features.default_emb_dim = 8
    return features


def build(name: str, folder: str) -> BaseModel:
    """The model with its optimizer inside, as FuxiCTR makes them."""
    options = {"model_root": folder, "metrics": ["AUC"], "monitor": "AUC", "verbose": 0, "gpu": -1}
    options |= {"optimizer": "adam", "loss": "binary_crossentropy", "embedding_regularizer": 1e-6}
    os.makedirs(Path(folder) / "generated", exist_ok=True)
    torch.manual_seed(0)
    if name == "DeepFM":
        return DeepFM(feature_map(folder), embedding_dim=8, learning_rate=1e-2, **options)
    return DIN(feature_map(folder), dnn_hidden_units=[32], embedding_dim=8, learning_rate=1e-2, **options)


def batches(name: str, number: int, seed: int = 0, size: int = 256) -> list[Any]:
    """What FuxiCTR's data loaders yield. Clicks depend on whether user and category are odd."""
    generator = torch.Generator().manual_seed(seed)
    result: list[Any] = []
    for _ in range(number):
        # The last of each row's items is the target, those before it are the history.
        items = torch.randint(1, VOCABULARY["item"], (size, HISTORY + 1), generator=generator)
        category = items % (VOCABULARY["category"] - 1) + 1
        user = torch.randint(1, VOCABULARY["user"], (size,), generator=generator)
        chance = 0.1 + 0.4 * (user % 2) + 0.4 * (category[:, -1] % 2)
        batch = {"user": user, "click": torch.bernoulli(chance, generator=generator)}
        if name == "DeepFM":
            result.append(batch | {"item": items[:, -1], "category": category[:, -1]})
        else:
            mask = (torch.rand(size, HISTORY, generator=generator) < 0.8).float()
            result.append((batch, {"item": items.flatten(), "category": category.flatten()}, mask))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["DIN", "DeepFM"], default="DIN")
    parser.add_argument("--method", default="hash", help="kind of method, such as hash, compositional, pruned")
    parser.add_argument("--budget", default="20%", help="inference bytes of all tables together: 20%%, 0.2, 64kB")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = build(args.model, folder)
        print(compress_(model, args.method, args.budget))  # the one line
        model.fit(batches(args.model, 40), epochs=args.epochs, validation_data=batches(args.model, 10, seed=1))
        print("validation:", model.evaluate(batches(args.model, 10, seed=1)))


if __name__ == "__main__":
    main()
