"""From a model's ids to those of a block, and from the block's vectors to outputs, for all its features at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables import ops
from embtables.config import TableConfig
from embtables.hashing import hash_ids, seed_for
from embtables.lookup.block import Block, Part
from embtables.lookup.inputs import CONFIG, Input, PoolingLike
from embtables.lookup.program import InputSpec
from embtables.lookup.regularization import Regularizer
from embtables.ops.program import POLICIES, UNBOUNDED


class FeatureIds(NamedTuple):
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

    def only(self, which: Sequence[int], sizes: Sequence[int]) -> FeatureIds:
        """Flat ids of some lookups, without weights; ``sizes`` says how many ids each lookup has."""
        assert self.bags is not None
        ids, feature = self.ids.split(list(sizes)), self.feature.split(list(sizes))
        lengths = self.bags.diff().view(len(sizes), -1)[list(which)]
        bags = F.pad(lengths.flatten().cumsum(0), (1, 0))
        return FeatureIds(torch.cat([ids[i] for i in which]), torch.cat([feature[i] for i in which]), bags, None, None)


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


class BlockLookup(nn.Module):
    """A block and its L lookups, which are pairs of a table and a feature in the order of the outputs.

    Args:
        block: what turns ids into vectors.
        tables: the table of each lookup.
        features: the feature of each lookup.
        feature_names: all features of the model, which are the columns of its input.
        hash_seed: the plan's.
        may_be_native: whether native code may look up these tables beside others that PyTorch looks up. Where others
            read the same rows it may not, since a step has to update each row once.
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
        tables: Sequence[TableConfig],
        features: Sequence[str],
        feature_names: Sequence[str],
        hash_seed: int,
        *,
        may_be_native: bool = True,
    ) -> None:
        super().__init__()
        self.block, self.may_be_native = block, may_be_native
        self.regularizer: Regularizer | None = None
        self.features = list(features)
        self.tables = list(tables)
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
            ("lookup", list(range(len(self.tables)))),
        ):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self._ranges = ops.ranges((f, t.name, t.num_embeddings) for f, t in zip(features, self.tables))
        self.policies = {t.on_out_of_range for t in self.tables if t.num_embeddings is not None}
        self.pads = any(t.padding_idx is not None for t in self.tables)

    def specs(self) -> list[InputSpec]:
        """How ids come to each of the lookups, for native code."""
        return [
            InputSpec(f, t.name, column, t.embedding_dim, t.num_embeddings, t.on_out_of_range, seed, t.padding_idx)
            for f, column, t, seed in zip(self.features, self.places, self.tables, self.seed.tolist())
        ]

    # ---- before the block ----------------------------------------------------------------------------------------

    def pick(self, given: Input, only: int | None = None) -> FeatureIds:
        """This block's ids, those out of range treated as their tables say.

        ``only``: the one lookup that the whole input belongs to, where it is that of a view.

        Raises:
            IndexError: for an id out of range, naming feature and id.
        """
        ids, offsets, weights = given
        takes_all = self.takes_all or only is not None
        lookup = self.lookup if only is None else self.lookup[only : only + 1]
        if offsets is None:
            feature = lookup.unsqueeze(1)
            by_feature = ids.t() if takes_all else ids.t().index_select(0, self.columns)
            if weights is not None:
                weights = weights.t() if takes_all else weights.t().index_select(0, self.columns)
            return FeatureIds(self._in_range(by_feature.long(), feature), feature, None, weights, None)
        if only is not None:
            feature = lookup.expand(ids.numel())
            return FeatureIds(self._in_range(ids.long(), feature), feature, offsets, weights, None)
        batch = given.batch(self.num_features)
        starts = offsets[self.columns * batch]
        lengths = offsets[(self.columns + 1) * batch] - starts
        # Its size is known where all ids are taken, and need not be asked of the device.
        feature = lookup.repeat_interleave(lengths, output_size=ids.numel() if takes_all else None)
        if takes_all:
            return FeatureIds(self._in_range(ids.long(), feature), feature, offsets, weights, None)
        before = lengths.cumsum(0) - lengths
        position = torch.arange(feature.numel(), device=ids.device) + (starts - before)[feature]
        bag_lengths = offsets.diff().view(self.num_features, batch)[self.columns].reshape(-1)
        bags = F.pad(bag_lengths.cumsum(0), (1, 0))
        found = self._in_range(ids[position].long(), feature)
        return FeatureIds(found, feature, bags, None if weights is None else weights[position], position)

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

    def _padded(self, ids: FeatureIds) -> Tensor:
        """Which ids are padding. Without a vocabulary −1 is an id like others, so no value can stand for "none"."""
        return (ids.ids == self.padding[ids.feature]) & self.has_padding[ids.feature]

    def without_padding(self, parts: Sequence[Part], ids: FeatureIds) -> list[Part]:
        """The requests, with −1 (nothing there) for padding ids."""
        if not self.pads:
            return list(parts)
        padded = self._padded(ids)
        skipped = [padded if p.subset is None else padded.reshape(-1)[p.subset] for p in parts]
        return [
            Part(p.width, p.rows.masked_fill(s.view(*s.shape, *[1] * (p.rows.ndim - s.ndim)), -1), p.subset)
            for p, s in zip(parts, skipped)
        ]

    # ---- after the block -----------------------------------------------------------------------------------------

    def mask(self, vectors: Tensor, ids: FeatureIds) -> Tensor:
        """The vectors, with zeros for padding ids."""
        if not self.pads:
            return vectors
        return vectors * ~self._padded(ids).unsqueeze(-1)

    def regularized(self, vectors: Tensor, ids: FeatureIds) -> Tensor:
        """The vectors, whose gradients are regularized where the tables are."""
        return vectors if self.regularizer is None else self.regularizer(vectors, ids.ids, ids.feature)

    def weighted(self, vectors: Tensor, ids: FeatureIds) -> Tensor:
        """The vectors, each times its weight where there are weights."""
        return vectors if ids.weights is None else vectors * ids.weights.to(vectors.dtype).unsqueeze(-1)

    def outputs(self, vectors: Tensor, ids: FeatureIds, modes: Sequence[str | None], bags: Bags | None) -> list[Tensor]:
        """A tensor for each lookup: ``[B, D]`` where it is pooled, ``[N_l, D]`` where it is not."""
        if bags is None:
            return list(self.weighted(vectors, ids).unbind())
        sizes = [bags.sizes[place] for place in self.places]
        # A bag of one is its vector: nothing is left to pool.
        modes = [None if bags.single[place] else mode for place, mode in zip(self.places, modes)]
        which = [i for i, mode in enumerate(modes) if mode is not None]
        if len(which) == len(modes):
            return list(self.pool(vectors, ids, modes).unbind())
        outputs = list(self.weighted(vectors, ids).split(sizes))
        if which:
            some = self.pool(torch.cat([outputs[i] for i in which]), ids.only(which, sizes), [modes[i] for i in which])
            for i, output in zip(which, some.unbind()):
                outputs[i] = output
        return outputs

    def pool(self, vectors: Tensor, ids: FeatureIds, modes: Sequence[str | None]) -> Tensor:
        """Pooled vectors ``[L, B, D]``, each lookup by its mode."""
        if ids.bags is None:
            return self.weighted(vectors, ids)
        weights = None if ids.weights is None else ids.weights.to(vectors.dtype)
        index = torch.arange(vectors.shape[0], device=vectors.device)
        summed = F.embedding_bag(
            index, vectors, ids.bags, mode="sum", per_sample_weights=weights, include_last_offset=True
        ).view(len(modes), -1, vectors.shape[-1])
        means = [mode == "mean" for mode in modes]
        if not any(means):
            return summed
        counts = self._counts(ids).view(len(modes), -1, 1).to(vectors.dtype)
        if not all(means):
            counts = torch.where(torch.tensor(means, device=vectors.device).view(-1, 1, 1), counts, 1.0)
        return summed / counts

    def _counts(self, ids: FeatureIds) -> Tensor:
        """How many ids that are no padding each bag ``[L·B]`` holds, at least 1."""
        assert ids.bags is not None
        bags = ids.bags
        if self.pads:
            bags = F.pad((~self._padded(ids)).long().cumsum(0), (1, 0))[bags]
        return bags.diff().clamp(min=1)

    def modes(self, pooling: PoolingLike) -> list[str | None]:
        """The pooling of each lookup: as the call says, else its table's own."""
        own = [table.pooling for table in self.tables]
        if isinstance(pooling, Mapping):
            return [pooling.get(feature, mode) for feature, mode in zip(self.features, own)]
        return [mode if pooling == CONFIG else pooling for mode in own]
