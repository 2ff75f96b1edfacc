"""The tables as torchrec sees them: ``EmbeddingBagCollection`` and ``EmbeddingCollection``."""

from embtables.faces.torchrec import EmbeddingBagCollection, EmbeddingCollection

__all__ = ["EmbeddingBagCollection", "EmbeddingCollection"]
