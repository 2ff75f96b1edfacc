"""Named defaults: what another library trains with when nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embtables.models import find_model
from embtables.models.registry import hyperparameters_of

__all__ = ["PRESETS", "Preset", "preset_named"]


@dataclass(frozen=True)
class Preset:
    """Fields of the configuration by dotted name, and hyperparameters for models that have them."""

    about: str
    fields: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]

    def hyperparameters_for(self, model: str) -> dict[str, Any]:
        """Those that the model has.

        Raises:
            ValueError: an unknown model.
        """
        known, takes_any = hyperparameters_of(find_model(model))
        return {name: value for name, value in self.hyperparameters.items() if takes_any or name in known}


PRESETS: dict[str, Preset] = {
    "bars": Preset(
        about="the defaults of FuxiCTR, with which the BARS benchmark's x1 results were made",
        fields={
            "tables.embedding_dim": 10,
            "tables.fused": False,
            "tables.optimizer": "adam",
            "tables.learning_rate": 1e-3,
            "tables.l2": 0.0,  # their embedding_regularizer: set by data set, 1e-5 on Criteo to 0.1 on Frappe
            "tables.init_std": 1e-4,
            "dense.optimizer": "adam",
            "dense.learning_rate": 1e-3,
            "dense.weight_decay": 0.0,  # their net_regularizer
            "training.batch_size": 4096,
            "training.epochs": 100,
            "training.evaluations_per_epoch": 1,
            "training.monitor": "auc",
            "training.patience": 2,
            "training.plateau_factor": 0.1,
            "training.min_learning_rate": 1e-6,
            "training.clip_norm": 10.0,
            "training.seed": 2021,
        },
        hyperparameters={
            "units": [400, 400, 400],
            "top_units": [400, 400, 400],
            "batch_norm": True,
            "interaction": "cat",  # of DLRM: with dot products nothing is learned from vectors of 1e-4
        },
    ),
}


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; the sentence lists those that exist.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: there is {', '.join(PRESETS)}")
    return PRESETS[name]
