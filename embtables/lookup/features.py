"""From a model's ids to those of a block, and from the block's vectors to outputs, for all its features at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embtables import ops
from embtables.config import TableConfig
from embtables.hashing import hash_ids, seed_for
from embtables.lookup.block import Block, Part
from embtables.lookup.constants import WithConstants
from embtables.lookup.graphs import bag_sums, intervals, is_exporting
from embtables.lookup.inputs import Input
from embtables.lookup.program import InputSpec
from embtables.ops.program import POLICIES, UNBOUNDED


class FeatureIds(NamedTuple):
    """The ids of a block's L lookups.

    ``ids``: ``[L, B]``, or flat ``[N]``; ``feature``: the lookup of each, ``[L, 1]`` or ``[N]``; ``bags``: offsets
    ``[L·B + 1]`` of flat ids, else ``None``; ``weights``: of the shape of ``ids``, or ``None``; ``position``: where
    flat ids stood in the input, or ``None`` for all of them in order.

    In graphs, where no shape may depend on data, a block looks at the flat ids of other blocks too: ``absent`` says
    which ids those are, and ``slots`` which of the rows of bags ``[·, B]`` are those of the lookups, ``[L]``.
    """

    ids: Tensor
    feature: Tensor
    bags: Tensor | None
    weights: Tensor | None
    position: Tensor | None
    absent: Tensor | None = None
    slots: Tensor | None = None

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

    @classmethod
    def in_graph(cls, given: Input, num_features: int, modes: Sequence[str | None]) -> Bags:
        """What a graph knows: nothing where all outputs are pooled, and sizes that no bag of one cuts short."""
        if num_features == 1 or None not in modes:
            return cls([given.ids.numel()] * num_features, [False] * num_features)
        bounds = [0, *given.bounds(num_features)[1:-1], given.ids.numel()]
        sizes = [end - start for start, end in zip(bounds, bounds[1:])]
        for size in sizes:
            torch._check(size >= 0)
        return cls(sizes, [False] * num_features)


class BlockLookup(WithConstants):
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
    layers: Tensor
    slots: Tensor

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
        self.features = list(features)
        self.tables = list(tables)
        columns = [feature_names.index(feature) for feature in features]
        self.places = columns
        self.seeds = [seed_for(hash_seed, table.name, "out_of_range") for table in self.tables]
        self.num_features = len(feature_names)
        self.takes_all = columns == list(range(self.num_features))
        for name, values in (
            ("columns", columns),
            ("size", [UNBOUNDED if t.num_embeddings is None else t.num_embeddings for t in self.tables]),
            ("policy", [-1 if t.num_embeddings is None else POLICIES[t.on_out_of_range] for t in self.tables]),
            ("seed", self.seeds),
            ("padding", [-1 if t.padding_idx is None else t.padding_idx for t in self.tables]),
            ("lookup", list(range(len(self.tables)))),
        ):
            self.constant(name, values)
        self.constant("has_padding", [t.padding_idx is not None for t in self.tables], torch.bool)
        # In graphs all ids are looked up as often as a feature occurs here: the lookup of each column, −1 for none.
        layer = [columns[:i].count(column) for i, column in enumerate(columns)]
        layers = [[-1] * (self.num_features + 1) for _ in range(max(layer) + 1)]
        for lookup, (number, column) in enumerate(zip(layer, columns)):
            layers[number][column] = lookup
        self.constant("layers", layers)
        self.constant("slots", [number * self.num_features + column for number, column in zip(layer, columns)])
        self._ranges = ops.ranges((f, t.name, t.num_embeddings) for f, t in zip(features, self.tables))
        self.policies = {t.on_out_of_range for t in self.tables if t.num_embeddings is not None}
        self.pads = any(t.padding_idx is not None for t in self.tables)

    def specs(self) -> list[InputSpec]:
        """How ids come to each of the lookups, for native code."""
        return [
            InputSpec(f, t.name, column, t.embedding_dim, t.num_embeddings, t.on_out_of_range, seed, t.padding_idx)
            for f, column, t, seed in zip(self.features, self.places, self.tables, self.seeds)
        ]

    # ---- before the block ----------------------------------------------------------------------------------------

    def pick(self, given: Input, only: int | None = None) -> FeatureIds:
        """This block's ids, those out of range treated as their tables say.

        ``only``: the one lookup that the whole input belongs to, where it is that of a view.

        Raises:
            IndexError: for an id out of range, naming feature and id.
        """
        ids, offsets, weights = given[:3]
        takes_all = self.takes_all or only is not None
        lookup = self.lookup if only is None else self.lookup[only : only + 1]
        if offsets is None:
            feature = lookup.unsqueeze(1)
            by_feature = ids.t() if takes_all else ids.t().index_select(0, self.columns)
            if torch.compiler.is_compiling():
                # Whether reshaping a transposed tensor copies depends on whether B is 1, which would bind the graph.
                by_feature = by_feature.clone(memory_format=torch.contiguous_format)
            if weights is not None:
                weights = weights.t() if takes_all else weights.t().index_select(0, self.columns)
            return FeatureIds(self._in_range(by_feature.long(), feature), feature, None, weights, None)
        if given.rest or (only is None and torch.compiler.is_compiling()):
            return self._pick_in_graph(given, only)
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

    def _pick_in_graph(self, given: Input, only: int | None) -> FeatureIds:
        """``pick`` of flat ids in shapes that do not depend on data: of all ids, or several times all ids."""
        ids, offsets, weights = given[:3]
        assert offsets is not None
        num_features = 1 if only is not None else self.num_features
        size, batch = ids.numel(), given.batch(num_features)
        column = intervals(offsets[torch.arange(1, num_features + 1, device=ids.device) * batch], size)
        layers = self.layers if only is None else torch.tensor([[only, -1]], device=ids.device)
        feature = layers[:, column].flatten()
        if only is None and self.takes_all:
            return FeatureIds(self._in_range(ids.long(), feature), feature, offsets, weights, None)
        count, absent = layers.shape[0], feature < 0
        if only is None:
            feature, ids = feature.clamp(min=0), torch.where(absent, 0, ids.long().repeat(count))
        else:  # those behind the last bag are checked like all others
            feature, ids = torch.full_like(feature, only), ids.long()
        weights = None if weights is None else weights.repeat(count)
        bags = torch.cat([*(offsets[:-1] + layer * size for layer in range(count)), offsets[-1:] + (count - 1) * size])
        slots = self.slots if only is None else None
        return FeatureIds(self._in_range(ids, feature), feature, bags, weights, None, absent, slots)

    def _in_range(self, ids: Tensor, feature: Tensor) -> Tensor:
        if not self.policies:
            return ids
        size, policy = self.size[feature], self.policy[feature]
        bad = (ids < 0) | (ids >= size)
        if "error" in self.policies:
            wrong = bad & (policy == 0)
            if is_exporting():
                torch._assert_async(~wrong.any(), self._refusal)
            elif torch.compiler.is_compiling():
                ids = ops.refuse_ids(ids, feature, wrong, self._ranges)
            elif torch.jit.is_tracing():
                # A trace keeps neither what Python decides nor assertions, whose results nobody uses: where an id is
                # wrong, PyTorch itself refuses to read the second of one element.
                ids = ids + ids.new_zeros(1)[wrong.long()]
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

    @property
    def _refusal(self) -> str:
        """What an exported graph says of an id out of range, without what would end a string of C++."""
        bounded = (t for t in zip(self.features, self.tables) if t[1].num_embeddings is not None)
        sizes = [f"'{f}' 0 … {(t.num_embeddings or 0) - 1}" for f, t in bounded if t.on_out_of_range == "error"]
        return re.sub(r'[\\"\n\r]', "?", f"an id is out of range; the ids of the features: {', '.join(sizes)}")

    def may_skip(self, ids: FeatureIds) -> bool:
        """Whether some of these ids may have no rows."""
        return self.pads or ids.absent is not None or self.block.may_skip

    def _padded(self, ids: FeatureIds) -> Tensor | None:
        """Which ids yield zeros, ``None`` for none: padding, and in graphs those of other blocks.

        Without a vocabulary −1 is an id like others, so no value can stand for "none".
        """
        if not self.pads:
            return ids.absent
        padded = (ids.ids == self.padding[ids.feature]) & self.has_padding[ids.feature]
        return padded if ids.absent is None else padded | ids.absent

    def without_padding(self, parts: Sequence[Part], ids: FeatureIds) -> list[Part]:
        """The requests, with −1 (nothing there) for padding ids."""
        padded = self._padded(ids)
        if padded is None:
            return list(parts)
        skipped = [padded if p.subset is None else padded.reshape(-1)[p.subset] for p in parts]
        return [
            p._replace(rows=p.rows.masked_fill(s.view(*s.shape, *[1] * (p.rows.ndim - s.ndim)), -1))
            for p, s in zip(parts, skipped)
        ]

    # ---- after the block -----------------------------------------------------------------------------------------

    def mask(self, vectors: Tensor, ids: FeatureIds) -> Tensor:
        """The vectors, with zeros for padding ids."""
        padded = self._padded(ids)
        return vectors if padded is None else vectors.masked_fill(padded.unsqueeze(-1), 0)

    def weighted(self, vectors: Tensor, ids: FeatureIds) -> Tensor:
        """The vectors, each times its weight where there are weights."""
        return vectors if ids.weights is None else vectors * ids.weights.to(vectors.dtype).unsqueeze(-1)

    def outputs(self, vectors: Tensor, ids: FeatureIds, modes: Sequence[str | None], bags: Bags | None) -> list[Tensor]:
        """A tensor for each lookup: ``[B, D]`` where it is pooled, ``[N_l, D]`` where it is not."""
        if bags is None:
            return list(self.weighted(vectors, ids).unbind())
        if torch.compiler.is_compiling():
            return self._outputs_in_graph(vectors, ids, modes, bags)
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

    def _outputs_in_graph(
        self, vectors: Tensor, ids: FeatureIds, modes: Sequence[str | None], bags: Bags
    ) -> list[Tensor]:
        """``outputs`` where the vectors are those of all ids, as often as there are layers."""
        outputs = list(self.pool(vectors, ids, modes).unbind())
        if None in modes:
            count = self.layers.shape[0]
            each = self.weighted(vectors, ids).view(count, vectors.shape[0] // count, vectors.shape[1])
            for i, (mode, place) in enumerate(zip(modes, self.places)):
                if mode is None:
                    layer = self.places[:i].count(place)
                    outputs[i] = each[layer].split(bags.sizes)[place]
        return outputs

    def pool(self, vectors: Tensor, ids: FeatureIds, modes: Sequence[str | None]) -> Tensor:
        """Pooled vectors ``[L, B, D]``, each lookup by its mode."""
        if ids.bags is None:
            return self.weighted(vectors, ids)
        weights = None if ids.weights is None else ids.weights.to(vectors.dtype)
        return self.pool_sums(bag_sums(vectors, ids.bags, weights), ids, modes)

    def pool_sums(self, sums: Tensor, ids: FeatureIds, modes: Sequence[str | None]) -> Tensor:
        """``pool``, from the sums of all bags: those of which the mean is asked for are divided."""
        summed = self._by_lookup(sums, ids, len(modes))
        means = [mode == "mean" for mode in modes]
        if not any(means):
            return summed
        counts = self._by_lookup(self._counts(ids).unsqueeze(-1), ids, len(modes)).to(sums.dtype)
        if not all(means):
            counts = torch.where(torch.tensor(means, device=sums.device).view(-1, 1, 1), counts, 1.0)
        return summed / counts

    def _by_lookup(self, of_bags: Tensor, ids: FeatureIds, lookups: int) -> Tensor:
        """``[L, B, ·]`` for L lookups, from a row for each bag."""
        if ids.slots is None:
            return of_bags.view(lookups, -1, of_bags.shape[-1])
        return of_bags.view(self.layers.shape[0] * self.num_features, -1, of_bags.shape[-1]).index_select(0, ids.slots)

    def _counts(self, ids: FeatureIds) -> Tensor:
        """How many ids that are no padding each bag holds, at least 1."""
        assert ids.bags is not None
        bags, padded = ids.bags, self._padded(ids)
        if padded is not None:
            bags = F.pad((~padded).long().cumsum(0), (1, 0))[bags]
        return bags.diff().clamp(min=1)
