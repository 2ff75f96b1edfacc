"""The one lookup: ids in, vectors out, in native code where recipes allow it and in PyTorch for the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from embtables import ops
from embtables.lookup.constants import WithConstants
from embtables.lookup.features import Bags, BlockLookup, FeatureIds
from embtables.lookup.graphs import beside
from embtables.lookup.inputs import Input, check_offsets
from embtables.lookup.native import NativeLookup
from embtables.lookup.program import InputSpec, is_native
from embtables.lookup.recipe import BLOCKS, Recipe
from embtables.lookup.recipe_block import RecipeBlock
from embtables.lookup.shown import Shown
from embtables.lookup.step import Step
from embtables.lookup.store import Store
from embtables.ops import Refused
from embtables.ops.program import ProgramTensors

if TYPE_CHECKING:
    from embtables.methods.base import Stage

T = TypeVar("T")


class BlockVectors(NamedTuple):
    """A block, its ids, what was looked up for them, and the numbers of its outputs.

    ``vectors``: of every id, ``[L, B, D]`` or flat ``[N, D]``; where ``summed``, the sum of every bag instead,
    ``[L·B, D]``.
    """

    block: BlockLookup
    ids: FeatureIds
    vectors: Tensor
    summed: bool
    outputs: list[int]

    def pooled(self, modes: Sequence[str | None]) -> Tensor:
        """Pooled vectors ``[L, B, D]``; ``modes``: of all outputs there are."""
        pool = self.block.pool_sums if self.summed else self.block.pool
        return pool(self.vectors, self.ids, [modes[output] for output in self.outputs])


class Touched:
    """What a training step is about to look up, worked out for who asks.

    Args:
        blocks: all blocks of the lookup.
        given: the input.
        only: as in ``Lookup``.
    """

    def __init__(self, blocks: Sequence[BlockLookup], given: Input, only: int | None) -> None:
        self._blocks, self._given, self._only = blocks, given, only

    def ids(self, table: str) -> Tensor:
        """The ids of a table ``[N]`` in all of its features, as its rows are numbered; an id may occur many times."""
        found = [torch.empty(0, dtype=torch.int64, device=self._given.ids.device)]
        for block in self._blocks:
            if any(config.name == table for config in block.tables):
                picked = block.pick(self._given, self._only)
                own = [i for i, config in enumerate(block.tables) if config.name == table]
                feature = picked.feature.expand_as(picked.ids)
                found += [picked.ids[feature == i] for i in own]
        return torch.cat(found)

    def rows(self, slab: str) -> Tensor:
        """The rows ``[N]`` of a slab that are read, counted from its first one; a row may occur many times."""
        found = [torch.empty(0, dtype=torch.int64, device=self._given.ids.device)]
        for block in self._blocks:
            store = block.block.store
            if not store.has_slab(slab):
                continue
            picked, start = block.pick(self._given, self._only), store.start(slab)
            for part in block.without_padding(block.block.address(picked.ids, picked.feature), picked):
                if part.weight == store.weight_of(slab):
                    rows = part.rows.reshape(-1) - start
                    found.append(rows[(rows >= 0) & (rows < store.rows(slab))])
        return torch.cat(found)


class Arrangement(WithConstants):
    """Puts the vectors of several parts side by side, in the order of the outputs.

    Args:
        parts: for each part the numbers of its outputs.
        dims: the dimension of each output.
    """

    columns: Tensor
    vectors: Tensor

    def __init__(self, parts: Sequence[Sequence[int]], dims: Sequence[int]) -> None:
        super().__init__()
        order = [output for part in parts for output in part]
        first, start = {}, 0
        for output in order:
            first[output] = start
            start += dims[output]
        columns = [c for output in range(len(dims)) for c in range(first[output], first[output] + dims[output])]
        self.one_dim = len(set(dims)) == 1
        self.in_order = columns == list(range(len(columns)))
        vectors = [order.index(output) for output in range(len(dims))]
        self.constant("vectors", vectors)
        self.constant("columns", columns)

    def ordered(self, parts: Sequence[Tensor]) -> Tensor:
        """The vectors ``[L, B, D]`` of all outputs, from those of each part, all of one D."""
        stacked = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return stacked if self.in_order else stacked.index_select(0, self.vectors)

    def side_by_side(self, parts: Sequence[Tensor]) -> Tensor:
        """``[B, ΣD]`` from ``[L, B, D]`` of each part."""
        if self.one_dim:
            # Whole vectors are put in order, which is many times faster than single columns.
            return beside(self.ordered(parts))
        return self.flat([beside(part) for part in parts])

    def flat(self, parts: Sequence[Tensor]) -> Tensor:
        """``[B, ΣD]`` from that of each part."""
        joined = torch.cat(list(parts), dim=1)
        return joined if self.in_order else joined.index_select(1, self.columns)


class Lookup(nn.Module):
    """Looks up the features of a module, or the one feature of a view.

    Args:
        store: where the values lie.
        blocks: the module's blocks, or the view's one.
        order: for each output its place among the lookups of the blocks, one block after another.
        only: for a view the number of its lookup in its block; the whole input belongs to that lookup.
        stages: some of which may show the first columns of vectors alone.
    """

    def __init__(
        self,
        store: Store,
        blocks: Sequence[BlockLookup],
        order: Sequence[int],
        only: int | None = None,
        stages: Sequence[Stage] = (),
    ) -> None:
        super().__init__()
        self._held = store, list(blocks)  # a tuple, so that they are not registered as parts of this one
        self.only = only
        number = {place: output for output, place in enumerate(order)}
        self._outputs: list[list[int]] = []  # the numbers of each block's outputs
        for block in blocks:
            count = len(block.tables) if only is None else 1
            place = sum(map(len, self._outputs))
            self._outputs.append([number[place + i] for i in range(count)])
        dims = {o: block.block.embedding_dim for block, each in zip(blocks, self._outputs) for o in each}
        self.dims = [dims[output] for output in range(len(dims))]
        looked_up = [config for block in blocks for config in (block.tables if only is None else [block.tables[only]])]
        tables = [looked_up[place].name for place in order]
        showing = [stage for stage in stages if stage.shows.keys() & set(tables)]
        self.shown = Shown(tables, self.dims, showing) if showing else None
        self.native = self._compile()
        natives = self._natives if self.native is not None else []
        self._in_pytorch = [i for i in range(len(blocks)) if i not in natives]
        self._rows_of = _rows_of(blocks)
        self._native_outputs = sorted(o for i in natives for o in self._outputs[i])
        self.of_all_blocks = Arrangement(self._outputs, self.dims)
        both = [self._native_outputs, *(self._outputs[i] for i in self._in_pytorch)]
        self.in_both = Arrangement(both, self.dims) if natives and self._in_pytorch else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any module."""
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*arguments)

    def forget(self) -> None:
        """Called where the store's tensors may be replaced, which are not to be kept until the next lookup then."""
        if self.native is not None:
            self.native.forget()

    @property
    def store(self) -> Store:
        """Where the values lie."""
        return self._held[0]

    @property
    def blocks(self) -> list[BlockLookup]:
        """The blocks, in the order in which PyTorch looks them up."""
        return self._held[1]

    @property
    def _natives(self) -> list[int]:
        """The blocks that native code can look up where the tables are on the CPU, where they may move at any time."""
        if ops.instructions() is None:
            return []
        return [i for i, block in enumerate(self.blocks) if block.may_be_native and _is_native(block, self.store)]

    def _compile(self) -> NativeLookup | None:
        pairs: dict[int, tuple[InputSpec, Recipe]] = {}
        of_view: list[Recipe] = []
        for i in self._natives:
            block = self.blocks[i]
            assert isinstance(block.block, RecipeBlock)
            lookups = list(zip(block.specs(), block.block.recipes))
            if self.only is not None:
                of_view = block.block.recipes
                spec, recipe = lookups[self.only]
                lookups = [(spec._replace(column=0), recipe)]
            pairs |= dict(zip(self._outputs[i], lookups))
        if not any(recipe.addresses or recipe.sparse for _, recipe in pairs.values()):
            return None  # all tables are dropped, so that there is nothing to look up
        num_features = 1 if self.only is not None else self.blocks[0].num_features
        return NativeLookup(self.store, [pairs[output] for output in sorted(pairs)], num_features, of_view)

    @property
    def ops(self) -> str:
        """What ids go through where they train: ``"native"`` code, ``"reference"`` (PyTorch), or ``"mixed"``: both."""
        if self.native is None or ops.backend() != "native" or self.native.tensors() is None:
            return "reference"
        return "mixed" if self._in_pytorch else "native"

    # ---- three forms of outputs ------------------------------------------------------------------------------------

    def side_by_side(self, given: Input, modes: tuple[str | None, ...], step: Step) -> Tensor:
        """Pooled vectors ``[B, ΣD]``; ``modes`` is the pooling of each output."""
        vectors = self._side_by_side(given, modes, step)
        return vectors if self.shown is None else self.shown.side_by_side(vectors, step.trains)

    def one_by_one(self, given: Input, modes: Sequence[str | None], step: Step) -> list[Tensor]:
        """A tensor for each output: ``[B, D]``, or ``[N_f, D]`` where its mode is ``None`` and it has bags."""
        vectors = self._one_by_one(given, modes, step)
        return vectors if self.shown is None else self.shown.one_by_one(vectors, step.trains)

    def in_input_order(self, given: Input, step: Step) -> Tensor:
        """The vectors of all ids, ``[B, F, D]`` or ``[N, D]``: of one D, with no feature in two tables."""
        vectors = self._in_input_order(given, step)
        return vectors if self.shown is None else self.shown.in_input_order(vectors, given, step.trains)

    def _side_by_side(self, given: Input, modes: tuple[str | None, ...], step: Step) -> Tensor:
        own = tuple(modes[output] for output in self._native_outputs) if self._in_pytorch else modes
        native, found = self._look_up(given, step, lambda n, tensors: n.side_by_side(tensors, given, own, step), modes)
        if native is not None and not found:
            return native
        pooled = [f.pooled(modes) for f in found]
        if native is None:
            return self.of_all_blocks.side_by_side(pooled)
        assert self.in_both is not None
        return self.in_both.flat([native, *(beside(vectors) for vectors in pooled)])

    def _one_by_one(self, given: Input, modes: Sequence[str | None], step: Step) -> list[Tensor]:
        own = [modes[output] for output in self._native_outputs]
        native, found = self._look_up(given, step, lambda n, tensors: n.one_by_one(tensors, given, own, step), modes)
        if native is not None and not found:
            return native
        outputs = dict(zip(self._native_outputs, native or []))
        bags = None if given.offsets is None or all(f.summed for f in found) else self._bags(given, modes)
        for f in found:
            if f.summed:
                each = list(f.pooled(modes).unbind())
            else:
                each = f.block.outputs(f.vectors, f.ids, [modes[o] for o in f.outputs], bags)
            outputs |= dict(zip(f.outputs, each))
        return [outputs[output] for output in sorted(outputs)]

    def _in_input_order(self, given: Input, step: Step) -> Tensor:
        modes: list[str | None] = [None] * len(self.dims)
        in_graph = given.offsets is not None and torch.compiler.is_compiling()
        if self.in_both is not None and not in_graph:
            # Without features in two tables, outputs stand in the order of the input's columns.
            each = self._one_by_one(given, modes, step)
            return torch.stack(each, dim=1) if given.offsets is None else torch.cat(each)
        native, found = self._look_up(given, step, lambda n, tensors: n.in_input_order(tensors, given, step), modes)
        if native is not None:
            return native
        weighted = [f.block.weighted(f.vectors, f.ids) for f in found]
        if given.offsets is None:
            return self.of_all_blocks.ordered(weighted).transpose(0, 1)
        if in_graph:
            return reduce(torch.add, weighted)  # each of all ids, with zeros for those of other blocks
        positions = [f.ids.position for f in found if f.ids.position is not None]
        return weighted[0] if not positions else torch.cat(weighted)[torch.cat(positions).argsort()]

    def _bags(self, given: Input, modes: Sequence[str | None]) -> Bags:
        num_features = self.blocks[0].num_features
        if torch.compiler.is_compiling():
            return Bags.in_graph(given, num_features, modes)
        assert given.offsets is not None
        return Bags.of(given.offsets, num_features)

    # ---- the way there ---------------------------------------------------------------------------------------------

    def _look_up(
        self,
        given: Input,
        step: Step,
        natively: Callable[[NativeLookup, ProgramTensors], T],
        modes: Sequence[str | None] = (),
    ) -> tuple[T | None, list[BlockVectors]]:
        """What native code gives as outputs, ``None`` where it gives none, and the vectors of all other blocks.

        Those are what PyTorch looks up, or sums of bags by a kernel of a GPU. ``modes``: the pooling of each output.

        This is the one place that chooses between them. Nothing is read or changed before all ids are known to be good.
        """
        native = self.native
        # Where the vectors of a bag lie among those of others, which native code has to be told, no graph knows.
        unknown = given.offsets is not None and torch.compiler.is_compiling() and None in modes
        # Stages may listen to the gradients of single rows, which native code does not show; nor does it round rows
        # before it combines them.
        in_pytorch = unknown or step.listeners or step.rounding is not None
        tensors = None if native is None or in_pytorch else native.takes(given, step)
        if tensors is None and self.store.device.type == "meta":
            raise RuntimeError(
                "these tables are on the meta device, where there are no values to look up: call to_empty(device=…) "
                "and reset_parameters(), or load_state_dict(…, assign=True), first"
            )
        rest = range(len(self.blocks)) if tensors is None else self._in_pytorch
        result = None
        try:
            if rest:
                check_offsets(given.ids, given.offsets, rest=given.rest)
                given = given.copied()
                ids = {i: self.blocks[i].pick(given, self.only) for i in rest}
            # In graphs its operator checks by itself, and nothing is changed before it.
            first = (rest or step.stages) and not torch.compiler.is_compiling()
            if native is not None and tensors is not None and first:
                native.check(tensors, given)
            if step.stages:
                step.begin(Touched(self.blocks, given, self.only))
            if native is not None and tensors is not None:
                result = natively(native, tensors)
        except Refused as refused:
            self._explain(refused, given)
        if not rest:
            return result, []
        sums = self._sums(ids, modes, step)
        vectors = self._in_plain_pytorch({i: ids[i] for i in rest if i not in sums}, step) | sums
        return result, [
            BlockVectors(self.blocks[i], ids[i], vectors[i], i in sums, self._outputs[i]) for i in sorted(vectors)
        ]

    def check_range(self, ids: Tensor) -> None:
        """Raises ``IndexError`` for ids ``[N]`` out of range, as a lookup of this view, and does nothing else."""
        self.blocks[0].pick(Input(ids.unsqueeze(1)), self.only)

    def _explain(self, refused: Refused, given: Input) -> NoReturn:
        """Raises the error of a refusal, from what native code knows of it."""
        assert self.native is not None
        if refused.lookup is not None and refused.id is not None:
            ops.raise_for_id(refused.id, refused.lookup, self.native.ranges)
        check_offsets(given.ids, given.offsets)
        raise AssertionError("native code refused offsets that are good") from refused

    def _sums(self, ids: Mapping[int, FeatureIds], modes: Sequence[str | None], step: Step) -> dict[int, Tensor]:
        """The sum of every bag, for each of these blocks of which a kernel looks up rows and sums them in one pass.

        A step updates each row once, so that no other block may read these rows, nor this one by itself.
        """
        sums = {}
        for i, weight in self._rows_of.items():
            found = ids.get(i)
            pools = modes and None not in [modes[output] for output in self._outputs[i]]
            if not pools or found is None or found.bags is None:
                continue
            if step.sums_bags(weight, found.ids, found.weights):
                block = self.blocks[i]
                (part,) = block.without_padding(block.block.address(found.ids, found.feature), found)
                sums[i] = step.bag_sums(weight, part.rows.reshape(-1), found.bags, found.weights)
        return sums

    def _in_plain_pytorch(self, ids: Mapping[int, FeatureIds], step: Step) -> dict[int, Tensor]:
        """The vector of every id, for each of these blocks by its number; one gather in all."""
        blocks = [self.blocks[i] for i in ids]
        with without_autocast(self.store.device):
            parts = [
                block.without_padding(block.block.address(found.ids, found.feature), found)
                for block, found in zip(blocks, ids.values())
            ]
            may_skip = any(block.may_skip(found) for block, found in zip(blocks, ids.values()))
            gathered = iter(step.gather([part for each in parts for part in each], may_skip=may_skip))
            vectors = []
            for block, found, each in zip(blocks, ids.values(), parts):
                values = [next(gathered) for _ in each]
                vectors.append(block.mask(block.block.combine(values, found.ids, found.feature, step.extra), found))
        return dict(zip(ids, vectors))


def _is_native(block: BlockLookup, store: Store) -> bool:
    if not isinstance(block.block, RecipeBlock):
        return False
    recipes = block.block.recipes
    # Native steps update rows and blocks of scalars one after the other: what is read as both would be updated twice.
    read = {(address.slab, isinstance(address, BLOCKS)) for recipe in recipes for address in recipe.all_addresses()}
    return len(read) == len({slab for slab, _ in read}) and all(is_native(recipe, store) for recipe in recipes)


def _rows_of(blocks: Sequence[BlockLookup]) -> dict[int, str]:
    """The weight, by its attribute, of each block whose vectors are rows that no other block reads, by its number."""
    recipes = {i: lookup.block for i, lookup in enumerate(blocks) if isinstance(lookup.block, RecipeBlock)}
    slabs = {i: {a.slab for recipe in b.recipes for a in recipe.all_addresses()} for i, b in recipes.items()}
    readers = Counter(slab for read in slabs.values() for slab in read)
    return {
        i: block.weight_of_rows
        for i, block in recipes.items()
        if block.weight_of_rows is not None and blocks[i].may_be_native and all(readers[slab] == 1 for slab in slabs[i])
    }


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Tables compute in their own precision, whatever the layers around them do."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
