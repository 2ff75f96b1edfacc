"""From a model's ids to a block's and from its vectors to pooled outputs, for all lookups of the block at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables import ops
from embtables.hashing import hash_ids, seed_for
from embtables.inputs import CONFIG, PoolingLike
from embtables.methods.base import Block, TableEntry
from embtables.ops.program import POLICIES, UNBOUNDED, Entrance
from embtables.store import Part


class Picked(NamedTuple):
    """The ids of a block's L lookups.

    ``ids``: ``[L, B]``, or flat ``[N]``; ``feature``: the lookup of each, ``[L, 1]`` or ``[N]``; ``bags``: offsets
    ``[L·B + 1]`` of flat ids, else ``None``; ``weights``: of the shape of ``ids``, or ``None``; ``position``: where
    flat ids stood in the input, or ``None`` for all of them in order.
    """

    ids: Tensor
    feature: Tensor
    bags: Tensor | None
    weights: Tensor | None
    position: Tensor | None

    def only(self, which: Sequence[int], sizes: Sequence[int]) -> Picked:
        """Flat ids of some lookups, without weights; ``sizes`` says how many ids each lookup has."""
        assert self.bags is not None
        ids, feature = self.ids.split(list(sizes)), self.feature.split(list(sizes))
        lengths = self.bags.diff().view(len(sizes), -1)[list(which)]
        bags = F.pad(lengths.flatten().cumsum(0), (1, 0))
        return Picked(torch.cat([ids[i] for i in which]), torch.cat([feature[i] for i in which]), bags, None, None)


class Bags(NamedTuple):
    """What the host has to know of the bags: how many ids each feature has, and whether all its bags hold one."""

    sizes: list[int]
    single: list[bool]

    @classmethod
    def of(cls, offsets: Tensor, num_features: int) -> Bags:
        lengths = offsets.diff().view(num_features, -1)
        known = torch.stack([lengths.sum(1), (lengths == 1).all(1)])
        sizes, single = known.tolist()
        return cls(sizes, [bool(flag) for flag in single])


class Lookups(nn.Module):
    """A block and its L lookups: (table, feature) pairs in the order of the outputs.

    Args:
        block: what turns ids into vectors.
        entries: the table of each lookup.
        features: the feature of each lookup.
        feature_names: all features of the model, the columns of its input.
        hash_seed: the plan's.
    """

    columns: Tensor
    size: Tensor
    policy: Tensor
    seed: Tensor
    padding: Tensor
    has_padding: Tensor
    lookup: Tensor

    def __init__(
        self,
        block: Block,
        entries: Sequence[TableEntry],
        features: Sequence[str],
        feature_names: Sequence[str],
        hash_seed: int,
    ) -> None:
        super().__init__()
        self.block = block
        self.features = list(features)
        self.tables = [e.table for e in entries]
        columns = [feature_names.index(feature) for feature in features]
        self.places = columns
        self.num_features = len(feature_names)
        self.takes_all = columns == list(range(self.num_features))
        for name, values in (
            ("columns", columns),
            ("size", [UNBOUNDED if t.num_embeddings is None else t.num_embeddings for t in self.tables]),
            ("policy", [-1 if t.num_embeddings is None else POLICIES[t.on_out_of_range] for t in self.tables]),
            ("seed", [seed_for(hash_seed, t.name, "out_of_range") for t in self.tables]),
            ("padding", [-1 if t.padding_idx is None else t.padding_idx for t in self.tables]),
            ("has_padding", [t.padding_idx is not None for t in self.tables]),
            ("lookup", list(range(len(entries)))),
        ):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self._ranges = json.dumps([(f, t.name, t.num_embeddings) for f, t in zip(features, self.tables)])
        self.policies = {t.on_out_of_range for t in self.tables if t.num_embeddings is not None}
        self.pads = any(t.padding_idx is not None for t in self.tables)

    def entrances(self) -> list[Entrance]:
        """How ids come to each of the lookups, for native code."""
        return [
            Entrance(t.name, column, t.embedding_dim, t.num_embeddings, t.on_out_of_range, seed, t.padding_idx)
            for column, t, seed in zip(self.places, self.tables, self.seed.tolist())
        ]

    # ---- before the block ----------------------------------------------------------------------------------------

    def pick(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, batch: int) -> Picked:
        """This block's ids, those out of range treated as their tables say."""
        if offsets is None:
            feature = self.lookup.unsqueeze(1)
            by_feature = ids.t() if self.takes_all else ids.t().index_select(0, self.columns)
            if weights is not None:
                weights = weights.t() if self.takes_all else weights.t().index_select(0, self.columns)
            return Picked(self._in_range(by_feature.long(), feature), feature, None, weights, None)
        starts = offsets[self.columns * batch]
        lengths = offsets[(self.columns + 1) * batch] - starts
        # Its size is known where all ids are taken, and need not be asked of the device.
        feature = self.lookup.repeat_interleave(lengths, output_size=ids.numel() if self.takes_all else None)
        if self.takes_all:
            return Picked(self._in_range(ids.long(), feature), feature, offsets, weights, None)
        before = lengths.cumsum(0) - lengths
        position = torch.arange(feature.numel(), device=ids.device) + (starts - before)[feature]
        bag_lengths = offsets.diff().view(self.num_features, batch)[self.columns].reshape(-1)
        bags = F.pad(bag_lengths.cumsum(0), (1, 0))
        picked = self._in_range(ids[position].long(), feature)
        return Picked(picked, feature, bags, None if weights is None else weights[position], position)

    def _in_range(self, ids: Tensor, feature: Tensor) -> Tensor:
        if not self.policies:
            return ids
        size, policy = self.size[feature], self.policy[feature]
        bad = (ids < 0) | (ids >= size)
        if "error" in self.policies:
            wrong = bad & (policy == 0)
            if torch.compiler.is_compiling():
                ids = ops.refuse_ids(ids, feature, wrong, self._ranges)
            elif wrong.any():
                ops.raise_for_ids(ids, feature, wrong, self._ranges)
        if "hash" in self.policies:
            folded = hash_ids(ids, self.seed[feature], size)
            if self.pads:  # an id that means something must not become one that means nothing
                folded = torch.where(folded == self.padding[feature], (folded + 1) % size, folded)
            ids = torch.where(bad & (policy == 1), folded, ids)
        if "oov" in self.policies:
            ids = torch.where(bad & (policy == 2), size, ids)
        return ids

    def _padded(self, picked: Picked) -> Tensor:
        """Which ids are padding. Without a vocabulary −1 is an id like others, so no value can stand for "none"."""
        return (picked.ids == self.padding[picked.feature]) & self.has_padding[picked.feature]

    def without_padding(self, parts: list[Part], picked: Picked) -> list[Part]:
        """The requests, with −1 (nothing there) for padding ids."""
        if not self.pads:
            return parts
        padded = self._padded(picked)
        skipped = [padded if p.subset is None else padded.reshape(-1)[p.subset] for p in parts]
        return [
            Part(p.width, p.rows.masked_fill(s.view(*s.shape, *[1] * (p.rows.ndim - s.ndim)), -1), p.subset)
            for p, s in zip(parts, skipped)
        ]

    # ---- after the block -----------------------------------------------------------------------------------------

    def mask(self, vectors: Tensor, picked: Picked) -> Tensor:
        """The vectors, with zeros for padding ids."""
        if not self.pads:
            return vectors
        return vectors * ~self._padded(picked).unsqueeze(-1)

    def weighted(self, vectors: Tensor, picked: Picked) -> Tensor:
        """The vectors, each times its weight where there are weights."""
        return vectors if picked.weights is None else vectors * picked.weights.to(vectors.dtype).unsqueeze(-1)

    def outputs(self, vectors: Tensor, picked: Picked, pooling: PoolingLike, bags: Bags | None) -> list[Tensor]:
        """A tensor for each lookup: ``[B, D]`` where it is pooled, ``[N_l, D]`` where it is not."""
        if bags is None:
            return list(self.weighted(vectors, picked).unbind())
        sizes = [bags.sizes[place] for place in self.places]
        # A bag of one is its vector: nothing is left to pool.
        modes = [None if bags.single[place] else mode for place, mode in zip(self.places, self.modes(pooling))]
        which = [i for i, mode in enumerate(modes) if mode is not None]
        if len(which) == len(modes):
            return list(self.pool(vectors, picked, modes).unbind())
        outputs = list(self.weighted(vectors, picked).split(sizes))
        if which:
            some = self.pool(
                torch.cat([outputs[i] for i in which]), picked.only(which, sizes), [modes[i] for i in which]
            )
            for i, output in zip(which, some.unbind()):
                outputs[i] = output
        return outputs

    def pool(self, vectors: Tensor, picked: Picked, modes: Sequence[str | None]) -> Tensor:
        """Pooled vectors ``[L, B, D]``, each lookup by its mode."""
        if picked.bags is None:
            return self.weighted(vectors, picked)
        weights = None if picked.weights is None else picked.weights.to(vectors.dtype)
        index = torch.arange(vectors.shape[0], device=vectors.device)
        summed = F.embedding_bag(
            index, vectors, picked.bags, mode="sum", per_sample_weights=weights, include_last_offset=True
        ).view(len(modes), -1, vectors.shape[-1])
        means = [mode == "mean" for mode in modes]
        if not any(means):
            return summed
        counts = self._counts(picked).view(len(modes), -1, 1).to(vectors.dtype)
        if not all(means):
            counts = torch.where(torch.tensor(means, device=vectors.device).view(-1, 1, 1), counts, 1.0)
        return summed / counts

    def _counts(self, picked: Picked) -> Tensor:
        """How many ids that are no padding each bag ``[L·B]`` holds, at least 1."""
        assert picked.bags is not None
        bags = picked.bags
        if self.pads:
            bags = F.pad((~self._padded(picked)).long().cumsum(0), (1, 0))[bags]
        return bags.diff().clamp(min=1)

    def modes(self, pooling: PoolingLike) -> list[str | None]:
        """The pooling of each lookup: as the call says, else its table's own."""
        own = [table.pooling for table in self.tables]
        if isinstance(pooling, Mapping):
            return [pooling.get(feature, mode) for feature, mode in zip(self.features, own)]
        return [mode if pooling == CONFIG else pooling for mode in own]
