"""The CPU library of ``csrc/``: loaded with ctypes, told where tensors lie, and nothing else.

It gives ``embtables::lookup`` and ``embtables::update_`` native kernels, and looks up whole programs (``program.py``):
ids to addresses to pooled vectors in one pass, and in backward all occurrences of a row summed in input order and
updated once, with the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embtables.allocator import keep_freed_memory
from embtables.ops.program import Request

VERSION = 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 2, "adam": 3, "dense": 4, "sparse": 5}
# Below this many rows a second thread costs more than it saves.
_ROWS_A_THREAD = 4096
# Tables from this size on ask for huge pages, outputs from this size on for memory that stays mapped.
_HUGE, _LARGE = 2**22, 2**24

# ``Outcome`` of ``csrc/program.h``.
_DONE, _BAD_OFFSETS, _NO_SUCH_ROW, _OUT_OF_MEMORY = 0, 2, 3, 4
_pointer, _int = ctypes.c_void_p, ctypes.c_int64


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Call = _struct(
    "_Call",
    program=_pointer,
    ids=_pointer,
    id_bytes=_int,
    offsets=_pointer,
    num_ids=_int,
    id_weights=_pointer,
    batch=_int,
    weights=_pointer,
    projections=_pointer,
    codes=_pointer,
    outputs=_pointer,
    values=_pointer,
    rows=_pointer,
    dtype=_int,
    state_dtype=_int,
    num_threads=_int,
    rule=_int,
    hyper=_pointer,
    num_hyper=_int,
    step=_int,
    states=_pointer,
    projection_states=_pointer,
    gradient_rows=_pointer,
    num_gradient_rows=_pointer,
)
_Gather = _struct(
    "_Gather",
    weight=_pointer,
    rows=_pointer,
    values=_pointer,
    row_bytes=_int,
    num_rows=_int,
    num_ids=_int,
    num_threads=_int,
)
_RowUpdate = _struct(
    "_RowUpdate",
    weight=_pointer,
    state0=_pointer,
    state1=_pointer,
    rows=_pointer,
    gradient=_pointer,
    hyper=_pointer,
    num_hyper=_int,
    step=_int,
    rule=_int,
    dtype=_int,
    state_dtype=_int,
    width=_int,
    num_rows=_int,
    num_ids=_int,
    num_threads=_int,
)


class Refused(Exception):
    """A lookup was given an id out of range, or offsets that do not fit. Who asked knows how to say which."""


class LibraryMissing(Exception):
    """There is no library, or none that fits; the message says why and what to do."""


def load() -> ctypes.CDLL:
    """The library that ``setup.py`` built.

    Raises:
        LibraryMissing: where it was not built, cannot be loaded, or is of another version of this package.
    """
    path = Path(__file__).parent / "_native.so"
    rebuild = "install embtables again where a C++ compiler (g++ or clang++) is at hand"
    if not path.is_file():
        raise LibraryMissing(f"the native library was not built; to have it, {rebuild}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.embtables_version
    except (OSError, AttributeError) as error:
        raise LibraryMissing(f"the native library {path.name} cannot be loaded ({error}); {rebuild}") from None
    version.restype = _int
    if version() != VERSION:
        raise LibraryMissing(f"the native library {path.name} is of another version of embtables; {rebuild}")
    library.embtables_instructions.restype = ctypes.c_char_p
    for name, arguments in (
        ("forward", [_pointer]),
        ("backward", [_pointer, _pointer]),
        ("gather", [_pointer]),
        ("update", [_pointer]),
        ("huge_pages", [_pointer, _int]),
    ):
        getattr(library, f"embtables_{name}").argtypes = arguments
    # PyTorch's OpenMP runtime is in the process from its import on.
    library.embtables_find_openmp()
    return library


class Given(NamedTuple):
    """The arguments of one lookup; as in ``Request``."""

    ids: Tensor
    offsets: Tensor | None
    id_weights: Tensor | None
    outputs: Tensor
    num_values: int
    num_rows: int


class Looked(NamedTuple):
    """A lookup that was done: its call, what the call points to, and the addresses it found."""

    call: Any
    given: Given
    rows: Tensor


class Library:
    """The functions of the library, for tensors on the CPU that are contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._keeps_blocks = False
        self.instructions: str = library.embtables_instructions().decode()

    def run(self, function: str, *calls: ctypes.Structure) -> int:
        """What the function returns.

        Raises:
            MemoryError: where there was not enough for what it needs beside its arguments.
        """
        outcome: int = getattr(self._library, f"embtables_{function}")(*map(ctypes.byref, calls))
        if outcome == _OUT_OF_MEMORY:
            raise MemoryError(f"not enough memory for the native {function} of this batch: take a smaller one")
        return outcome

    def huge_pages(self, fresh: Tensor) -> Tensor:
        """The tensor, whose memory nothing has been written to yet, on huge pages where it is large."""
        if fresh.device.type == "cpu" and fresh.nbytes >= _HUGE:
            self._library.embtables_huge_pages(fresh.data_ptr(), fresh.nbytes)
        return fresh

    def keep_large_blocks(self, num_bytes: int) -> None:
        """Large outputs come and go with each step; from the first one on the C library keeps their memory mapped."""
        if num_bytes >= _LARGE and not self._keeps_blocks:
            self._keeps_blocks = True
            keep_freed_memory()

    # ---- single weights ------------------------------------------------------------------------------------------

    def gather(self, weight: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` [N] of ``weight`` [R, W] → [N, W]; the rows are within the weight."""
        values = weight.new_empty(index.shape[0], weight.shape[1])
        index, weight = index.long().contiguous(), weight.contiguous()
        self.keep_large_blocks(values.nbytes)
        row_bytes = weight.shape[1] * weight.element_size()
        call = _Gather(
            weight=weight.data_ptr(),
            rows=index.data_ptr(),
            values=values.data_ptr(),
            row_bytes=row_bytes,
            num_rows=weight.shape[0],
            num_ids=index.numel(),
            num_threads=threads(index.numel()),
        )
        if self.run("gather", call) == _NO_SUCH_ROW:
            wrong = index[(index < 0) | (index >= weight.shape[0])]
            raise IndexError(f"row {int(wrong[0])} is out of range: the weight has {weight.shape[0]} rows")
        return values

    def update(
        self, weight: Tensor, rows: Sequence[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str, step: int
    ) -> None:
        """``embtables::update_``, its state told apart into tensors of rows and the step."""
        index, grad = index.long().contiguous(), grad.to(weight.dtype).contiguous()
        call = _RowUpdate(
            weight=weight.data_ptr(),
            state0=rows[0].data_ptr() if rows else None,
            state1=rows[1].data_ptr() if len(rows) > 1 else None,
            rows=index.data_ptr(),
            gradient=grad.data_ptr(),
            hyper=hyper.data_ptr(),
            num_hyper=hyper.numel(),
            step=step,
            rule=RULES[rule],
            dtype=DTYPES[weight.dtype],
            state_dtype=DTYPES[rows[0].dtype] if rows else 0,
            width=weight.shape[1],
            num_rows=weight.shape[0],
            num_ids=index.numel(),
            num_threads=threads(index.numel()),
        )
        self.run("update", call)


class Bound:
    """A program bound to the weights and state of a module, as they lie now.

    It holds addresses, not tensors: who keeps it sees to it that ``request`` is still what the module has.
    """

    def __init__(self, library: Library, request: Request) -> None:
        self._library = library
        self._dtype = request.weights[0].dtype
        self._shapes = [w.shape for w in request.weights], [p.shape for p in request.projections]
        state = next((s for s in request.states if s.numel()), None)
        lists = (request.weights, request.projections, request.codes, request.states, request.projection_states)
        pointers = [_pointers(tensors) for tensors in lists]
        weights, projections, codes, states, projection_states = map(ctypes.addressof, pointers)
        self._call = _Call(
            program=request.words.data_ptr(),
            weights=weights,
            projections=projections,
            codes=codes,
            dtype=DTYPES[self._dtype],
            state_dtype=0 if state is None else DTYPES[state.dtype],
            rule=RULES[request.rule],
            hyper=request.hyper.data_ptr(),
            num_hyper=request.hyper.numel(),
            states=states,
            projection_states=projection_states,
        )
        # Pointers live as long as what they point to is held; the weights are the module's.
        self._held = (pointers, request.words)
        self._num_features = int(request.words[0])

    def look_up(self, given: Given) -> tuple[Tensor, Looked]:
        """The values, flat, and what backward needs.

        Raises:
            Refused: for an id out of range, or offsets that do not fit.
            MemoryError: see ``Library.run``.
        """
        values = torch.empty(given.num_values, dtype=self._dtype)
        self._library.keep_large_blocks(values.nbytes)
        looked = self.looked(given, torch.empty(given.num_rows, dtype=torch.int64))
        looked.call.values = values.data_ptr()
        outcome = self._library.run("forward", looked.call)
        if outcome != _DONE:
            raise Refused("offsets do not fit" if outcome == _BAD_OFFSETS else "an id is out of range")
        return values, looked

    def looked(self, given: Given, rows: Tensor) -> Looked:
        """A lookup with these arguments, whose addresses are ``rows``, or will be."""
        ids, offsets, id_weights = given.ids, given.offsets, given.id_weights
        call = _Call.from_buffer_copy(self._call)
        call.ids, call.id_bytes, call.num_ids = ids.data_ptr(), ids.element_size(), ids.numel()
        if offsets is None:
            call.batch = ids.shape[0]
        else:
            call.batch, call.offsets = (offsets.numel() - 1) // self._num_features, offsets.data_ptr()
        if id_weights is not None:
            call.id_weights = id_weights.data_ptr()
        call.outputs, call.rows = given.outputs.data_ptr(), rows.data_ptr()
        call.num_threads = threads(given.num_rows)
        return Looked(call, given, rows)

    def update_rows(self, looked: Looked, grad: Tensor, step: int) -> None:
        """One step of the optimiser on all rows of a lookup, given the gradient of its values."""
        grad, call = grad.contiguous(), looked.call
        call.values, call.step = grad.data_ptr(), step
        self._library.run("backward", call, call)

    def gradients(self, looked: Looked, grad: Tensor, sparse: bool) -> list[Tensor]:
        """The gradients of the weights, dense or sparse with distinct rows, and of the projections (dense)."""
        grad, call = grad.contiguous(), looked.call
        shapes, projection_shapes = self._shapes
        call.values, call.rule = grad.data_ptr(), RULES["sparse" if sparse else "dense"]
        target = _Call.from_buffer_copy(call)
        into_projections = [torch.zeros(shape, dtype=self._dtype) for shape in projection_shapes]
        if sparse:
            # No weight has more distinct rows than there are addresses, which stand for blocks where the width is 1.
            widest = int(looked.given.outputs[:, 1].max())
            most = [min(rows, looked.rows.numel() * (widest if width == 1 else 1)) for rows, width in shapes]
            into = [torch.empty(n, width, dtype=self._dtype) for n, (_, width) in zip(most, shapes)]
            index = [torch.empty(n, dtype=torch.int64) for n in most]
            counts = torch.zeros(len(shapes), dtype=torch.int64)
        else:
            into = [torch.zeros(shape, dtype=self._dtype) for shape in shapes]
            index, counts = [], torch.zeros(0, dtype=torch.int64)
        pointers = [_pointers(tensors) for tensors in (into, into_projections, index)]
        target.weights, target.projections, target.gradient_rows = map(ctypes.addressof, pointers)
        target.num_gradient_rows = counts.data_ptr()
        self._library.run("backward", call, target)
        if sparse:
            into = [
                torch.sparse_coo_tensor(i[:n].unsqueeze(0), v[:n], shape, check_invariants=False)
                for shape, i, v, n in zip(shapes, index, into, counts.tolist())
            ]
        return [*into, *into_projections]


def threads(num_rows: int) -> int:
    """As many as PyTorch uses, but one for a few rows."""
    return max(1, min(torch.get_num_threads(), num_rows // _ROWS_A_THREAD))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    """Addresses of tensors, null for empty ones."""
    return (_pointer * max(1, len(tensors)))(*[t.data_ptr() or None for t in tensors])


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether the library takes these weights: on the CPU, contiguous, and of one of its types, the same for all."""
    return all(t.device.type == "cpu" and t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors) and (
        not tensors or tensors[0].dtype in DTYPES
    )


def register(library: Library, in_use: Callable[[], bool], lookup: Any, update: Any) -> None:
    """Gives the operators of ``reference`` kernels for the CPU, which leave to it what the library does not take."""
    plain_lookup, plain_update = lookup._init_fn, update._init_fn

    @lookup.register_kernel("cpu")
    def _(weight: Tensor, state: list[Tensor], index: Tensor, hook: Tensor, hyper: Tensor, rule: str) -> Tensor:
        if in_use() and fits([weight]):
            return library.gather(weight, index)
        return plain_lookup(weight, state, index, hook, hyper, rule)

    @update.register_kernel("cpu")
    def _(weight: Tensor, state: list[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str) -> None:
        rows = [s for s in state if s.is_floating_point()]
        if in_use() and fits([weight]) and fits(rows):
            return library.update(weight, rows, index, grad, hyper, rule, int(state[-1]) if rule == "adam" else 0)
        return plain_update(weight, state, index, grad, hyper, rule)
