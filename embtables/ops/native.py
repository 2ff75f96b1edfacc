"""The CPU library of ``csrc/``: loaded with ctypes, told where tensors lie, and nothing else.

It gives ``embtables::lookup`` and ``embtables::update_`` native kernels, and looks up whole programs (``program.py``):
ids to addresses to pooled vectors in one pass, and in backward all occurrences of a row summed in input order and
updated once, with the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embtables.allocator import keep_freed_memory
from embtables.ops.program import LOOKUP_WORDS, PIECE_WORDS, Request

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 2, "adam": 3, "dense": 4, "sparse": 5}
# Columns of the state that a rule keeps for rows of W columns.
_STATE: dict[str, Callable[[int], list[int]]] = {
    "sgd": lambda width: [],
    "rowwise_adagrad": lambda width: [1],
    "adagrad": lambda width: [width],
    "adam": lambda width: [width, width],
}
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
    saved=_pointer,
    refused=_pointer,
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


def _version() -> int:
    """As ``embtables_version`` in ``csrc/library.cpp``."""
    version = 2
    for size in (*map(ctypes.sizeof, (_Call, _Gather, _RowUpdate)), 8 * LOOKUP_WORDS, 8 * PIECE_WORDS):
        version = version * 1000 + size
    return version


class Refused(Exception):
    """A lookup was given offsets that do not fit, or an id out of range: of which lookup, and which one."""

    def __init__(self, lookup: int | None, id: int | None) -> None:
        super().__init__("offsets do not fit" if lookup is None else f"lookup {lookup} was given id {id}")
        self.lookup, self.id = lookup, id


class LibraryMissing(Exception):
    """There is no library, or none that fits; the message says why and what to do."""


def load() -> ctypes.CDLL:
    """The library that ``setup.py`` built.

    Raises:
        LibraryMissing: where it was not built, cannot be loaded, or is of another version of this package.
        ValueError: for a value of ``EMBTABLES_INSTRUCTIONS`` that does not suit this processor.
    """
    path = Path(__file__).parent / "_native.so"
    rebuild = (
        "install embtables again where a C++ compiler (g++ or clang++) is at hand; "
        "pip install -v shows what the compiler says"
    )
    if not path.is_file():
        raise LibraryMissing(f"the native library was not built; to have it, {rebuild}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.embtables_version
    except (OSError, AttributeError) as error:
        raise LibraryMissing(f"the native library {path.name} cannot be loaded ({error}); {rebuild}") from None
    version.restype = _int
    if version() != _version():
        raise LibraryMissing(f"the native library {path.name} is of another version of embtables; {rebuild}")
    library.embtables_instructions.restype = ctypes.c_char_p
    if library.embtables_instructions() is None:
        raise ValueError(
            "EMBTABLES_INSTRUCTIONS must be baseline, avx2 or avx512, and one that this processor has, not "
            f"{os.environ.get('EMBTABLES_INSTRUCTIONS')!r}; leave it out for the best one"
        )
    for name, arguments in (
        ("forward", [_pointer]),
        ("backward", [_pointer, _pointer]),
        ("keep_rows", [_pointer]),
        ("gather", [_pointer]),
        ("update", [_pointer]),
        ("huge_pages", [_pointer, _int]),
    ):
        getattr(library, f"embtables_{name}").argtypes = arguments
    library.embtables_keep_rows.restype = _int
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


class Looked:
    """A lookup that was done: its call, what the call points to, the addresses it found, and the rows it read.

    The rows are noted only where its gradient depends on them and somebody else is about to change them.
    """

    def __init__(self, bound: Bound, call: Any, given: Given, rows: Tensor) -> None:
        self.bound, self.call, self.given, self.rows = bound, call, given, rows
        self.versions: list[int] = []
        self.saved: tuple[Tensor, list[Tensor], Any] | None = None


# Lookups whose gradient depends on rows that a fused update may change before it is taken.
_waiting: weakref.WeakSet[Looked] = weakref.WeakSet()


def settle(changing: Sequence[Tensor]) -> None:
    """Has the lookups that wait for their gradients note the rows they read in weights about to change."""
    if _waiting:
        places = {tensor.data_ptr() for tensor in changing}
        for looked in list(_waiting):
            if not places.isdisjoint(looked.bound.addresses):
                looked.bound.keep_rows(looked)


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

    def count(self, function: str, call: ctypes.Structure) -> int:
        """What a function that counts returns."""
        number: int = getattr(self._library, f"embtables_{function}")(ctypes.byref(call))
        return number

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
            raise _no_such_row(weight, index)
        return values

    def update(
        self, weight: Tensor, rows: Sequence[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str, step: int
    ) -> None:
        """``embtables::update_``, its state told apart into tensors of rows and the step.

        Raises:
            IndexError: for a row that the weight does not have; nothing has been changed then.
            ValueError: for shapes that do not fit.
        """
        (num_rows, width), num_ids = weight.shape, index.numel()
        if index.shape != (num_ids,) or grad.shape != (num_ids, width):
            raise ValueError(
                f"index {list(index.shape)} and grad {list(grad.shape)} must be [N] and [N, {width}], as the weight"
            )
        expected = [(num_rows, columns) for columns in _STATE[rule](width)]
        if [tuple(state.shape) for state in rows] != expected:
            found = ", ".join(str(list(state.shape)) for state in rows) or "nothing"
            needs = ", ".join(str(list(shape)) for shape in expected) or "nothing"
            raise ValueError(f"the state of {rule} for a weight of {list(weight.shape)} is {needs}, not {found}")
        if hyper.numel() not in (5, 6):
            raise ValueError(f"hyper holds {hyper.numel()} numbers, not lr, l2, eps, beta1, beta2 and where to clip")
        index, grad = index.long().contiguous(), grad.to(weight.dtype).contiguous()
        hyper = hyper.to("cpu", torch.float64).contiguous()
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
            width=width,
            num_rows=num_rows,
            num_ids=num_ids,
            num_threads=threads(num_ids),
        )
        if self.run("update", call) == _NO_SUCH_ROW:
            raise _no_such_row(weight, index)


class Bound:
    """A program bound to the weights and state of a module, which it holds.

    Args:
        request: the program, weights and state.
        reads_weights: whether gradients depend on weights, as those of products do.
        reads_ids: whether they depend on the ids themselves, as those of signs do.
    """

    def __init__(self, library: Library, request: Request, reads_weights: bool, reads_ids: bool) -> None:
        self.reads_weights, self.reads_ids = reads_weights, reads_ids
        self.weights = [*request.weights, *request.projections]
        self._library, self._request = library, request
        self._dtype = request.weights[0].dtype
        self._shapes = [w.shape for w in request.weights], [p.shape for p in request.projections]
        self._num_features, num_lookups = request.words[:2].tolist()
        self._widest = int(request.words[6 : 6 + LOOKUP_WORDS * num_lookups].view(-1, LOOKUP_WORDS)[:, 6].max())
        state = next((s for s in request.states if s.numel()), None)
        self._call = _Call(
            program=request.words.data_ptr(),
            dtype=DTYPES[self._dtype],
            state_dtype=0 if state is None else DTYPES[state.dtype],
            rule=RULES[request.rule],
            num_hyper=request.hyper.numel(),
        )
        self.addresses: list[int] = []
        self._find()

    def _find(self) -> None:
        """Notes where all tensors lie; they may have moved since (FSDP, ``share_memory_``, ``.data = …``)."""
        request = self._request
        lists = (request.weights, request.projections, request.codes, request.states, request.projection_states)
        addresses = [tensor.data_ptr() for tensors in lists for tensor in tensors]
        if addresses == self.addresses:
            return
        if any(weight.dtype != self._dtype for weight in self.weights):
            raise RuntimeError("the tables were cast to another type between their lookup and its backward")
        self._pointers = [_pointers(tensors) for tensors in lists]
        call = self._call
        call.weights, call.projections, call.codes, call.states, call.projection_states = map(
            ctypes.addressof, self._pointers
        )
        call.hyper = request.hyper.data_ptr()
        self.addresses = addresses

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
        self._run_forward(looked)
        return values, looked

    def check(self, given: Given) -> None:
        """Raises ``Refused`` for what ``look_up`` would refuse, and does nothing else."""
        self._run_forward(self.looked(given, torch.empty(0, dtype=torch.int64)))

    def _run_forward(self, looked: Looked) -> None:
        refused = (_int * 2)()
        looked.call.refused = ctypes.addressof(refused)
        outcome = self._library.run("forward", looked.call)
        looked.call.refused = None
        if outcome != _DONE:
            raise Refused(*((None, None) if outcome == _BAD_OFFSETS else refused))

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
        return Looked(self, call, given, rows)

    def await_gradient(self, looked: Looked) -> None:
        """From now on until ``update_rows`` the rows that were read are noted before somebody changes them."""
        if self.reads_weights:
            looked.versions = [weight._version for weight in self.weights]
            _waiting.add(looked)

    def keep_rows(self, looked: Looked) -> None:
        """Notes the rows that the gradient of a lookup depends on, and the projections."""
        _waiting.discard(looked)
        if looked.versions != [weight._version for weight in self.weights]:
            return  # somebody has changed them already, and backward will say so
        call = looked.call
        call.saved = None
        saved = torch.empty(self._library.count("keep_rows", call), dtype=self._dtype)
        call.saved = saved.data_ptr()
        self._library.count("keep_rows", call)
        projections = [projection.clone() for projection in self._request.projections]
        looked.saved = saved, projections, _pointers(projections)

    def update_rows(self, looked: Looked, grad: Tensor, step: int) -> None:
        """One step of the optimiser on all rows of a lookup, given the gradient of its values.

        Raises:
            RuntimeError: where the gradient depends on weights that have been changed since, other than by updates.
        """
        _waiting.discard(looked)
        settle(self.weights)
        self._find()
        grad, target = grad.contiguous(), self._placed(looked.call)
        target.values, target.step = grad.data_ptr(), step
        call = target
        if looked.saved is not None:
            call = _Call.from_buffer_copy(target)
            call.projections = ctypes.addressof(looked.saved[2])
        elif looked.versions != [weight._version for weight in self.weights] and self.reads_weights:
            raise RuntimeError(
                "the tables were changed between a lookup and its backward, and the gradient of this method depends on "
                "what they were; of a graph that is kept, backward can be called once: add up the losses instead"
            )
        self._library.run("backward", call, target)

    def _placed(self, call: Any) -> Any:
        """A call, with the places where all tensors are now."""
        for field in ("weights", "projections", "codes", "states", "projection_states", "hyper"):
            setattr(call, field, getattr(self._call, field))
        return call

    def gradients(self, looked: Looked, grad: Tensor, sparse: bool) -> list[Tensor]:
        """The gradients of the weights, dense or sparse with distinct rows, and of the projections (dense)."""
        self._find()
        grad, call = grad.contiguous(), self._placed(looked.call)
        shapes, projection_shapes = self._shapes
        call.values, call.rule = grad.data_ptr(), RULES["sparse" if sparse else "dense"]
        target = _Call.from_buffer_copy(call)
        into_projections = [torch.zeros(shape, dtype=self._dtype) for shape in projection_shapes]
        if sparse:
            # No weight has more distinct rows than there are addresses, which stand for blocks where the width is 1.
            each = [self._widest if width == 1 else 1 for _, width in shapes]
            most = [min(shape[0], looked.rows.numel() * n) for shape, n in zip(shapes, each)]
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


def _no_such_row(weight: Tensor, index: Tensor) -> IndexError:
    wrong = index[(index < 0) | (index >= weight.shape[0])]
    return IndexError(f"row {int(wrong[0])} is out of range: the weight has {weight.shape[0]} rows")


def threads(num_rows: int) -> int:
    """As many as PyTorch uses, but one for a few rows."""
    return max(1, min(torch.get_num_threads(), num_rows // _ROWS_A_THREAD))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    """Addresses of tensors, null for empty ones."""
    return (_pointer * max(1, len(tensors)))(*[t.data_ptr() or None for t in tensors])


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether the library takes these weights: on the CPU, contiguous, and of one of its types, the same for all."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.is_contiguous()
        and t.dtype == tensors[0].dtype
        and t.dtype in DTYPES
        for t in tensors
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
        *rows, step = state if rule == "adam" and state else [*state, torch.zeros(())]
        if in_use() and fits([weight]) and fits(rows) and all(s.dtype in (torch.float32, weight.dtype) for s in rows):
            return library.update(weight, rows, index, grad, hyper, rule, int(step))
        return plain_update(weight, state, index, grad, hyper, rule)
