"""Compressed tables in DeepCTR-Torch's DeepFM: one line between `compile` and `fit`, or before both.

    python examples/compress_deepctr.py --method hash --budget 20%

Data are generated. How DeepCTR-Torch is installed stands in docs/compress.md.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import DeepFM

from embtables import compress_

VOCABULARY = {"user": 2_000, "item": 5_000, "category": 100}


def build() -> DeepFM:
    """The model with its optimizer inside, and its L2 regularization of all tables."""
    features = [SparseFeat(name, size, embedding_dim=8) for name, size in VOCABULARY.items()]
    model = DeepFM(features, features, dnn_hidden_units=(32,), l2_reg_embedding=1e-4, l2_reg_linear=1e-4)
    model.compile("adagrad", "binary_crossentropy", metrics=["auc"])
    return model


def data(rows: int, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """Clicks depend on whether user and category are odd. Ids pass through float32, so keep them below 2**24."""
    random = np.random.default_rng(seed)
    item = random.integers(1, VOCABULARY["item"], rows)
    x = {"user": random.integers(1, VOCABULARY["user"], rows), "item": item, "category": item % VOCABULARY["category"]}
    chance = 0.1 + 0.4 * (x["user"] % 2) + 0.4 * (x["category"] % 2)
    return x, (random.random(rows) < chance).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="hash", help="kind of method, such as hash, compositional, pruned")
    parser.add_argument("--budget", default="20%", help="inference bytes of all tables together: 20%%, 0.2, 64kB")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    model = build()
    print(compress_(model, args.method, args.budget))  # the one line
    model.fit(*data(10_000), batch_size=256, epochs=args.epochs, verbose=2)
    print("validation:", model.evaluate(*data(2_000, seed=1)))


if __name__ == "__main__":
    main()
