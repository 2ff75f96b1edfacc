"""From a name such as ``dlrm`` or ``package.module:Class`` to a model."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from embtables._util.names import did_you_mean
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

__all__ = ["build_model", "check_hyperparameters", "find_model", "hyperparameters_of", "is_built_in"]

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


def is_built_in(name: str) -> bool:
    """Whether ``name`` means one of our models, which nothing has to be imported for."""
    return name in _OURS


def find_model(name: str, beside: Path | None = None) -> type[nn.Module]:
    """The class that ``name`` means: one of ours, as ``dlrm``, ``mlp`` or ``din``, or ``package.module:Class``.

    Args:
        beside: a folder that is searched too, the last of all; names that come from files are looked for without one.

    Raises:
        ValueError: no such name, module or class, the module fails, or the class is not an ``nn.Module``.
    """
    if name in _OURS:
        return _OURS[name]
    module_name, colon, class_name = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise ValueError(f"model {name!r} is unknown: give {', '.join(_OURS)} or package.module:Class")
    with _searching(beside):
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            hint = "" if beside else "; the working directory is searched for what --model names, not for other names"
            raise ValueError(f"model {name!r}: cannot import {module_name!r} ({error}{hint})") from error
        except Exception as error:
            raise ValueError(f"model {name!r}: {module_name!r} fails: {type(error).__name__} {error}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"model {name!r}: module {module_name!r} has no {class_name!r}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"model {name!r}: {class_name!r} is not a subclass of torch.nn.Module")
    return found


@contextmanager
def _searching(folder: Path | None) -> Iterator[None]:
    """Imports inside the block look into ``folder`` too."""
    place = None if folder is None or str(folder) in sys.path else str(folder)
    if place is not None:
        sys.path.append(place)
    try:
        yield
    finally:
        if place is not None and place in sys.path:
            sys.path.remove(place)


def hyperparameters_of(model_class: type[nn.Module]) -> tuple[list[str], bool]:
    """Names of the keyword arguments beyond the two fixed ones, and whether any name is taken."""
    parameters = list(inspect.signature(model_class).parameters.values())
    names = [p.name for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_hyperparameters(name: str, hyperparameters: Iterable[str]) -> None:
    """``ValueError`` unless there is a model ``name`` that takes all of these."""
    _check_hyperparameters(name, find_model(name), hyperparameters)


def _check_hyperparameters(name: str, model_class: type[nn.Module], hyperparameters: Iterable[str]) -> None:
    known, takes_any = hyperparameters_of(model_class)
    unknown = [key for key in hyperparameters if key not in known]
    if unknown and not takes_any:
        raise ValueError(
            f"model {name!r} has no hyperparameter {unknown[0]!r}{did_you_mean(unknown[0], known)}; it has "
            f"{', '.join(known) if known else 'none'}"
        )


def build_model(
    name: str | type[nn.Module],
    embeddings: EmbeddingTables,
    num_dense_features: int,
    hyperparameters: Mapping[str, Any],
) -> nn.Module:
    """Construct the model ``name``, or a class itself, over ``embeddings``; draws from torch's global generator.

    Raises:
        ValueError: an unknown model or hyperparameter, or the constructor refuses its arguments.
    """
    model_class = find_model(name) if isinstance(name, str) else name
    name = name if isinstance(name, str) else f"{name.__module__}:{name.__qualname__}"
    _check_hyperparameters(name, model_class, hyperparameters)
    try:
        built = model_class(embeddings, num_dense_features, **hyperparameters)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"model {name!r} cannot be constructed as "
            f"{model_class.__name__}(embeddings, num_dense_features, **{dict(hyperparameters)}): {error}"
        ) from error
    if getattr(built, "embeddings", None) is not embeddings:
        raise ValueError(f"model {name!r} must keep the tables it is given as its attribute 'embeddings'")
    return built
