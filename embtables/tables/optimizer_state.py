"""What exact resume needs beside the weights, as a part of the tables' state dict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from embtables.lookup.store import Store
from embtables.methods.base import Stage

_RULE, _LEARNING_RATE, _HYPER, _STAGE = "rule", "learning_rate", "hyper", "stage_"


class OptimizerState(nn.Module):
    """Puts the state of the fused optimizer and of the stages into state dicts, and takes it from them.

    It holds no tensors of its own. Its entries are ``rule``, the optimizer's kind as bytes, empty without one;
    ``learning_rate``; and the tensors of ``EmbeddingTables.optimizer_state_dict`` under the same names, without the
    hyper-parameters, which are the plan's. Tables that have neither a fused optimizer nor a stage have no entries.

    A state dict without ``rule`` is one of weights alone, as embtables 0.1.0 wrote them: it leaves the state as it is.
    So does the state of another optimizer, with a warning where these tables are trained by one, and that of a fused
    optimizer where they are trained by none or are served.

    Args:
        store: where the optimizer's state lies.
        stages: those of the tables.
    """

    def __init__(self, store: Store, stages: Sequence[Stage]) -> None:
        super().__init__()
        self._held = store, list(stages)  # a tuple, so that they are not registered as parts of this one

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves by name, the hyper-parameters among them."""
        store, stages = self._held
        of_stages = {f"{_STAGE}{i}_{k}": v for i, stage in enumerate(stages) for k, v in stage.state().items()}
        return store.optimizer_state() | of_stages

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Fills the tensors in place; of hyper-parameters only the learning rate changes, the others are the plan's.

        Raises:
            ValueError: where names or shapes are others; nothing is changed then.
        """
        tensors = self.tensors()
        if set(tensors) != set(state):
            raise ValueError(
                "the optimizer state is of another plan or optimizer: it holds "
                f"{', '.join(sorted(state)) or 'nothing'}, these tables have {', '.join(sorted(tensors)) or 'none'}"
            )
        for name, tensor in tensors.items():
            if name != _HYPER and tensor.shape != state[name].shape:
                raise ValueError(
                    f"the optimizer state '{name}' has shape {tuple(state[name].shape)}, "
                    f"these tables need {tuple(tensor.shape)}"
                )
        for name, tensor in tensors.items():
            if name == _HYPER:
                tensor[0] = state[name][0]
            else:
                tensor.copy_(state[name])

    def _entries(self) -> dict[str, Tensor]:
        store, stages = self._held
        if store.optimizer is None and not stages:
            return {}
        kind = "" if store.optimizer is None else store.optimizer.kind
        entries = {_RULE: torch.tensor(list(kind.encode()), dtype=torch.uint8)}
        tensors = self.tensors()
        if _HYPER in tensors:
            # A copy: what fills a state dict in place must not reach the other hyper-parameters, nor those this one.
            entries[_LEARNING_RATE] = tensors.pop(_HYPER)[0].clone()
        return entries | tensors

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint takes the names in state dicts for attributes.
        entries = self._entries() if "_held" in self.__dict__ else {}
        return entries[name] if name in entries else super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination |= {f"{prefix}{name}": tensor for name, tensor in self._entries().items()}

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        given = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        own = self._entries()
        if _RULE not in given:
            unexpected += [f"{prefix}{name}" for name in given]
            return
        if not own:
            return
        rule, wanted = (bytes(entries[_RULE].tolist()).decode(errors="replace") for entries in (given, own))
        if rule != wanted:
            if rule and wanted:
                warnings.warn(
                    f"the state dict holds the state of the fused optimizer '{rule}', but '{wanted}' trains these "
                    f"tables: they take the weights, and the state of '{wanted}' stays as it is",
                    stacklevel=2,
                )
            given, own = ({n: t for n, t in each.items() if n.startswith(_STAGE)} for each in (given, own))
        missing += [f"{prefix}{name}" for name in own if name not in given]
        unexpected += [f"{prefix}{name}" for name in given if name not in own]
        tensors = self.tensors()
        for name in (name for name in own if name in given and name != _RULE):
            if given[name].shape != own[name].shape:
                errors.append(
                    f"size mismatch for {prefix}{name}: it has shape {tuple(given[name].shape)}, "
                    f"these tables need {tuple(own[name].shape)}"
                )
            elif name == _LEARNING_RATE and not given[name].is_meta and not 0 <= float(given[name]) < inf:
                errors.append(f"{prefix}{name} is {float(given[name])}, which is no learning rate")
            elif name == _LEARNING_RATE:
                tensors[_HYPER][0] = given[name]
            else:
                tensors[name].copy_(given[name])
