"""Small runs, and what they leave."""

import csv

import torch

from embtables.training.config import load_config


def config_of(*overrides, **named):
    small = ["training.batch_size=400", "training.epochs=2", "tables.embedding_dim=4", "training.patience=null"]
    return load_config(overrides=[*small, *overrides], **named)


def curve_of(out):
    with (out / "validation.csv").open() as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def weights_of(out):
    return torch.load(out / "checkpoint" / "last.pt", weights_only=True)["state"]["model"]


def assert_weights(found, wanted, **tolerance):
    for name in wanted:
        if not name.endswith("extra_state"):
            torch.testing.assert_close(found[name], wanted[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
