"""From a name such as ``dlrm`` or ``package.module:Class`` to a model."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from embtables.models.dcn import DCNv2
from embtables.models.deepfm import DeepFM
from embtables.models.din import DIN
from embtables.models.dlrm import DLRM
from embtables.models.fm import FM
from embtables.models.lr import LR
from embtables.models.mlp import MLP
from embtables.models.neumf import NeuMF
from embtables.models.wide_deep import WideDeep

if TYPE_CHECKING:
    from embtables.tables import EmbeddingTables

__all__ = ["build_model", "check_hyperparameters", "find_model", "hyperparameters_of"]

_OURS: dict[str, type[nn.Module]] = {
    "dlrm": DLRM,
    "mlp": MLP,
    "din": DIN,
    "dcnv2": DCNv2,
    "deepfm": DeepFM,
    "wide_deep": WideDeep,
    "neumf": NeuMF,
    "fm": FM,
    "lr": LR,
}


def find_model(name: str) -> type[nn.Module]:
    """The class that ``name`` means: one of ours, as ``dlrm``, ``mlp`` or ``din``, or ``package.module:Class``.

    The working directory is searched too, so that a ``my_model.py`` beside the data is ``my_model:MyModel``.

    Raises:
        ValueError: no such name, module or class, or the class is not an ``nn.Module``.
    """
    if name in _OURS:
        return _OURS[name]
    module_name, colon, class_name = name.partition(":")
    if not colon or not module_name or not class_name:
        raise ValueError(f"model {name!r} is unknown: give {', '.join(_OURS)} or package.module:Class")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"model {name!r}: cannot import {module_name!r} ({error})") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"model {name!r}: module {module_name!r} has no {class_name!r}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"model {name!r}: {class_name!r} is not a subclass of torch.nn.Module")
    return found


def hyperparameters_of(model_class: type[nn.Module]) -> tuple[list[str], bool]:
    """Names of the keyword arguments beyond the two fixed ones, and whether any name is taken."""
    parameters = list(inspect.signature(model_class).parameters.values())
    names = [p.name for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_hyperparameters(name: str, hyperparameters: Iterable[str]) -> None:
    """``ValueError`` unless there is a model ``name`` that takes all of these."""
    known, takes_any = hyperparameters_of(find_model(name))
    unknown = [key for key in hyperparameters if key not in known]
    if unknown and not takes_any:
        raise ValueError(
            f"model {name!r} has no hyperparameter {unknown[0]!r}; it has {', '.join(known) if known else 'none'}"
        )


def build_model(
    name: str, embeddings: EmbeddingTables, num_dense_features: int, hyperparameters: Mapping[str, Any]
) -> nn.Module:
    """Construct the model ``name`` over ``embeddings``; draws its weights from torch's global generator.

    Raises:
        ValueError: an unknown model or hyperparameter, or the constructor refuses its arguments.
    """
    model_class = find_model(name)
    check_hyperparameters(name, hyperparameters)
    try:
        model = model_class(embeddings, num_dense_features, **hyperparameters)
    except TypeError as error:
        raise ValueError(
            f"model {name!r} cannot be constructed as "
            f"{model_class.__name__}(embeddings, num_dense_features, **{dict(hyperparameters)}): {error}"
        ) from error
    if getattr(model, "embeddings", None) is not embeddings:
        raise ValueError(f"model {name!r} must keep the tables it is given as its attribute 'embeddings'")
    return model
