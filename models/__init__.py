"""Models over :class:`embtables.EmbeddingTables`, and how a name on the command line becomes one.

Any class with the constructor ``(embeddings, num_dense_features, *, <hyperparameters with defaults>)``, a
``forward(batch) -> logits [B]`` and the attribute ``embeddings`` works as ``--model package.module:Class``.
"""

from __future__ import annotations

from embtables.models.dcn import DCNv2
from embtables.models.deepfm import DeepFM
from embtables.models.din import DIN
from embtables.models.dlrm import DLRM
from embtables.models.fm import FM
from embtables.models.lr import LR
from embtables.models.mlp import MLP
from embtables.models.neumf import NeuMF
from embtables.models.registry import build_model, find_model
from embtables.models.wide_deep import WideDeep

__all__ = ["DIN", "DLRM", "FM", "LR", "MLP", "DCNv2", "DeepFM", "NeuMF", "WideDeep", "build_model", "find_model"]
