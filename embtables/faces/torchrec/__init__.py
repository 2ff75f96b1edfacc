"""The tables as torchrec sees them: they take a ``KeyedJaggedTensor`` and give a ``KeyedTensor`` or ``JaggedTensor``s.

torchrec's annotations are repeated as they stand (``List``, ``Optional``), since its signature comparison is exact.
"""

from importlib import import_module

try:
    import_module("torchrec.sparse.tensor_dict")
except (ImportError, OSError) as error:
    # OSError: fbgemm's CUDA build on a host without a driver.
    raise ImportError(
        f"embtables.torchrec needs torchrec with a working fbgemm-gpu, which cannot be imported here ({error}). "
        "On a host without a GPU, with torch 2.13: pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0 "
        "torchrec==1.8.0 && pip install 'embtables[torchrec]'"
    ) from error

from embtables.faces.torchrec.bags import EmbeddingBagCollection
from embtables.faces.torchrec.sequences import EmbeddingCollection

__all__ = ["EmbeddingBagCollection", "EmbeddingCollection"]
