"""Training, evaluation and serving of one model over planned tables."""

from __future__ import annotations

from embtables.training.bundle import save_bundle
from embtables.training.config import RunConfig, load_config
from embtables.training.export import load_served
from embtables.training.loggers import RunDescription, RunLogger
from embtables.training.predictor import Predictor
from embtables.training.trainer import Trainer

__all__ = [
    "Predictor",
    "RunConfig",
    "RunDescription",
    "RunLogger",
    "Trainer",
    "load_config",
    "load_served",
    "save_bundle",
]
