"""The CPU library of ``csrc/``: loaded with ctypes, told where tensors lie, and nothing else.

It gives ``embtables::lookup`` and ``embtables::update_`` native kernels, and looks up whole programs (``program.py``):
ids to addresses to pooled vectors in one pass, and in backward all occurrences of a row summed in input order and
updated once, with the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from embtables._util.allocator import keep_freed_memory
from embtables.ops.program import (
    BF16,
    CODE_WORDS,
    LOOKUP_WORDS,
    PIECE_WORDS,
    PLAIN,
    PROJECTION_WORDS,
    STATES,
    WEIGHT_WORDS,
    ProgramTensors,
)
from embtables.ops.reference import rounds_stochastically, split_step, training_lock
from embtables.optimizers import AVERAGED, FusedOptimizer, rule_of

T = TypeVar("T")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# ``RuleKind`` of ``csrc/program.h``: rules of ``embtables.optimizers`` that have a native form, and what backward does
# without a rule.
RULES = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 2, "adam": 3}
_GRADIENTS = {"dense": 4, "sparse": 5}
# The same beside a running mean of the weights: ``AVERAGED`` of ``csrc/program.h``.
RULES |= {AVERAGED + kind: number + 8 for kind, number in RULES.items()}
# Below this many rows a second thread costs more than it saves.
_ROWS_A_THREAD = 4096
# Tables from this size on ask for huge pages, outputs from this size on for memory that stays mapped.
_HUGE, _LARGE = 2**22, 2**24

# ``Outcome`` of ``csrc/program.h``.
_DONE, _BAD_OFFSETS, _NO_SUCH_ROW, _OUT_OF_MEMORY = 0, 2, 3, 4
_pointer, _int = ctypes.c_void_p, ctypes.c_int64
_address = Tensor.data_ptr
_CPU = torch.device("cpu")
_NO_ROWS = torch.empty(0, dtype=torch.int64, device="cpu")
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


# ``Call`` of ``csrc/program.h``, of 8 bytes each. It is written as a list of numbers, not as a structure, and what its
# pointers to lists of pointers point at follows in the same memory: a small lookup takes no longer than its arguments.
_CALL = (
    "program ids id_bytes offsets num_ids id_weights batch weights projections codes outputs values rows dtype "
    "state_dtype num_threads rule hyper num_hyper step states projection_states gradient_rows num_gradient_rows saved "
    "refused scales strengths"
).split()
_PLACE = {name: place for place, name in enumerate(_CALL)}
_IDS, _ID_BYTES, _NUM_IDS, _OFFSETS = (_PLACE[name] for name in ("ids", "id_bytes", "num_ids", "offsets"))
_ID_WEIGHTS, _BATCH, _OUTPUTS, _VALUES = (_PLACE[name] for name in ("id_weights", "batch", "outputs", "values"))
_ROWS, _NUM_THREADS, _REFUSED = (_PLACE[name] for name in ("rows", "num_threads", "refused"))
# What it has lists of pointers to, as ``ProgramTensors`` calls it too.
_POINTED_AT = "weights projections codes states projection_states scales strengths".split()
# Where the lists of pointers begin: behind the call, and the lookup and the id that are refused.
_LISTS = len(_CALL) + 2

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
    states=_pointer * STATES,
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
    format=_int,
)


def _version() -> int:
    """As ``embtables_version`` in ``csrc/library.cpp``."""
    version = 15
    structs = map(ctypes.sizeof, (_Gather, _RowUpdate))
    words = (LOOKUP_WORDS, PIECE_WORDS, WEIGHT_WORDS, PROJECTION_WORDS, CODE_WORDS)
    for size in (8 * len(_CALL), *structs, *(8 * count for count in words)):
        version = (version * 1000 + size) % 1_000_000_000_007
    return version


def has_native_form(kind: str) -> bool:
    """Whether native code makes the updates of this optimizer; PyTorch makes those of others."""
    return kind in RULES


def takes_state(rule: type[FusedOptimizer], dtype: torch.dtype, weights: torch.dtype) -> bool:
    """Whether native code has a rule's state in this type; a running mean counts steps, which 16 bits cannot."""
    return dtype is torch.float32 or (dtype is weights and not rule.keeps_mean)


def state_places(kept: Sequence[T], keeps_mean: bool, nothing: T) -> list[T]:
    """What a rule keeps of a weight, in the ``STATES`` places of native code: its own, then that of a running mean.

    Of a rule without a native form, whose updates are made elsewhere, there may be more than places.
    """
    own = len(kept) - 2 * keeps_mean
    return [*[*kept[:own], nothing, nothing][:2], *[*kept[own:], nothing, nothing][:2]]


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


class LookupArgs(NamedTuple):
    """The arguments of one lookup: the ids of ``batch`` examples, and where their vectors go.

    ``ids``: int32 or int64, ``[batch, F]``, or flat with ``offsets`` int64 ``[F·batch + 1]``; ``id_weights``: float32,
    of the shape of ``ids``; ``outputs``: int64 ``[L, 3]``, as ``Output`` of ``csrc/program.h``; ``shape``: of the
    values, which lie as ``outputs`` says; ``num_rows``: how many addresses the lookup has,
    with offsets at most.
    """

    ids: Tensor
    offsets: Tensor | None
    id_weights: Tensor | None
    outputs: Tensor
    batch: int
    shape: tuple[int, ...]
    num_rows: int


class Library:
    """The functions of the library, for tensors on the CPU that are contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        names = ("forward", "backward", "keep_rows", "gather", "update")
        self._functions = {name: getattr(library, f"embtables_{name}") for name in names}
        self._keeps_blocks = False
        self.instructions: str = library.embtables_instructions().decode()

    def run(self, function: str, *calls: int) -> int:
        """What the function returns, given the addresses of its arguments.

        Raises:
            MemoryError: where there was not enough for what it needs beside its arguments.
        """
        outcome: int = self._functions[function](*calls)
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
        if self.run("gather", ctypes.addressof(call)) == _NO_SUCH_ROW:
            raise _no_such_row(weight, index)
        return values

    def update(
        self, weight: Tensor, rows: Sequence[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str, step: int
    ) -> None:
        """``embtables::update_``, its state told apart into tensors of rows and the step.

        Raises:
            IndexError: for a row that the weight does not have; nothing has been changed then.
            ValueError: for shapes that do not fit, and hyper-parameters of another rule.
        """
        (num_rows, width), num_ids = weight.shape, index.numel()
        if index.shape != (num_ids,) or grad.shape != (num_ids, width):
            raise ValueError(
                f"index {list(index.shape)} and grad {list(grad.shape)} must be [N] and [N, {width}], as the weight"
            )
        described = rule_of(rule)
        expected = [(num_rows, columns) for columns in described.state_widths(width)]
        if [tuple(state.shape) for state in rows] != expected:
            found = ", ".join(str(list(state.shape)) for state in rows) or "nothing"
            needs = ", ".join(str(list(shape)) for shape in expected) or "nothing"
            raise ValueError(f"the state of {rule} for a weight of {list(weight.shape)} is {needs}, not {found}")
        described.clips_rows(hyper)
        rounds = rounds_stochastically(weight, grad)
        index, grad = index.long().contiguous(), grad.to(torch.float32 if rounds else weight.dtype).contiguous()
        hyper = hyper.to("cpu", torch.float64).contiguous()
        call = _RowUpdate(
            weight=weight.data_ptr(),
            states=(_pointer * STATES)(*map(_address, state_places(rows, described.keeps_mean, _NOTHING))),
            rows=index.data_ptr(),
            gradient=grad.data_ptr(),
            hyper=hyper.data_ptr(),
            num_hyper=hyper.numel(),
            step=step,
            rule=RULES[rule],
            dtype=DTYPES[grad.dtype],
            state_dtype=DTYPES[rows[0].dtype] if rows else 0,
            width=width,
            num_rows=num_rows,
            num_ids=num_ids,
            num_threads=threads(num_ids),
            format=(BF16 if rounds else PLAIN).format,
        )
        if self.run("update", ctypes.addressof(call)) == _NO_SUCH_ROW:
            raise _no_such_row(weight, index)

    # ---- whole programs --------------------------------------------------------------------------------------------
    #
    # Between a lookup and its backward tensors may have moved (FSDP, ``share_memory_``, ``.data = …``). A call takes
    # their addresses anew, or from ``told``, which is good while every tensor lies as it did: who keeps it sees to it.

    def forward(self, tensors: ProgramTensors, args: LookupArgs) -> tuple[Tensor, Tensor]:
        """The values, and the addresses that backward needs.

        Raises:
            Refused: for an id out of range, or offsets that do not fit.
            MemoryError: see ``run``.
        """
        rows = torch.empty(args.num_rows, dtype=torch.int64, device=_CPU)
        return self.values(tensors, args, rows), rows

    def values(self, tensors: ProgramTensors, args: LookupArgs, rows: Tensor = _NO_ROWS) -> Tensor:
        """The values; the addresses go to ``rows`` where there is room for them. It raises what ``forward`` does."""
        # Numbers are taken sooner than a tuple of them, and a device sooner than its name.
        values = torch.empty(*args.shape, dtype=tensors.dtype, device=_CPU)
        if not self._keeps_blocks:
            self.keep_large_blocks(values.nbytes)
        self._run_forward(self._call(tensors, args, rows, values))
        return values

    def check(self, tensors: ProgramTensors, args: LookupArgs) -> None:
        """Raises ``Refused`` for what ``forward`` would refuse, and does nothing else."""
        self._run_forward(self._call(tensors, args, _NO_ROWS, None))

    def _run_forward(self, call: array[int]) -> None:
        address = call.buffer_info()[0]
        call[_REFUSED] = address + 8 * len(_CALL)
        outcome = self.run("forward", address)
        if outcome != _DONE:
            raise Refused(*((None, None) if outcome == _BAD_OFFSETS else call[len(_CALL) : _LISTS]))

    def keep_rows(self, tensors: ProgramTensors, args: LookupArgs, rows: Tensor) -> Tensor:
        """A copy of the rows that the gradient of a lookup depends on, as they are now."""
        call = self._call(tensors, args, rows, None)
        count = self._functions["keep_rows"]  # returns how many scalars they are, and writes none where it is told to
        kept = torch.empty(count(call.buffer_info()[0]), dtype=tensors.dtype, device="cpu")
        call[_PLACE["saved"]] = kept.data_ptr()
        count(call.buffer_info()[0])
        return kept

    def update_rows(
        self,
        tensors: ProgramTensors,
        args: LookupArgs,
        rows: Tensor,
        grad: Tensor,
        step: int,
        as_read: tuple[Tensor, list[Tensor]] | None = None,
    ) -> None:
        """One step of the optimizer on all rows of a lookup, given the gradient of its values.

        Args:
            rows: the addresses, as ``forward`` gave them.
            step: the number of the step.
            as_read: the rows that the lookup read, from ``keep_rows``, and its projections, where they have changed.
        """
        target = self._call(tensors, args, rows, grad)
        call = target if as_read is None else self._call_as_read(tensors, args, rows, grad, as_read)
        call[_PLACE["step"]] = target[_PLACE["step"]] = step
        self.run("backward", call.buffer_info()[0], target.buffer_info()[0])

    def gradients(
        self,
        tensors: ProgramTensors,
        args: LookupArgs,
        rows: Tensor,
        grad: Tensor,
        sparse: bool,
        as_read: tuple[Tensor, list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """The gradients of the weights, dense or sparse with distinct rows, and of the projections (dense).

        Those of projections that are not trained are zeros. ``as_read``: as in ``update_rows``.
        """
        shapes = [weight.shape for weight in tensors.weights]
        dtype = tensors.dtype
        call = self._call_as_read(tensors, args, rows, grad, as_read)
        call[_PLACE["rule"]] = _GRADIENTS["sparse" if sparse else "dense"]
        into_projections = [torch.zeros_like(projection) for projection in tensors.projections]
        if sparse:
            # No weight has more distinct rows than there are addresses, which stand for blocks where the width is 1.
            each = [tensors.most_scalars() if width == 1 else 1 for _, width in shapes]
            most = [min(num_rows, rows.numel() * n) for (num_rows, _), n in zip(shapes, each)]
            into = [torch.empty(n, width, dtype=dtype, device="cpu") for n, (_, width) in zip(most, shapes)]
            index = [torch.empty(n, dtype=torch.int64, device="cpu") for n in most]
        else:
            into = [torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes]
            index = []
        counts = torch.zeros(len(shapes) if sparse else 0, dtype=torch.int64, device="cpu")
        target = self._call(tensors._replace(weights=into, projections=into_projections, told=None), args, rows, grad)
        target[_PLACE["rule"]] = call[_PLACE["rule"]]
        addresses = array("q", [rows_of_weight.data_ptr() for rows_of_weight in index])
        target[_PLACE["gradient_rows"]] = addresses.buffer_info()[0]
        target[_PLACE["num_gradient_rows"]] = counts.data_ptr()
        self.run("backward", call.buffer_info()[0], target.buffer_info()[0])
        if sparse:
            into = [
                torch.sparse_coo_tensor(i[:n].unsqueeze(0), v[:n], shape, check_invariants=False)
                for shape, i, v, n in zip(shapes, index, into, counts.tolist())
            ]
        return [*into, *into_projections]

    def _call_as_read(
        self,
        tensors: ProgramTensors,
        args: LookupArgs,
        rows: Tensor,
        grad: Tensor,
        as_read: tuple[Tensor, list[Tensor]] | None,
    ) -> array[int]:
        """The call of a backward, with what the lookup read where that has changed since."""
        if as_read is None:
            return self._call(tensors, args, rows, grad)
        saved, projections = as_read
        call = self._call(tensors._replace(projections=projections, told=None), args, rows, grad)
        call[_PLACE["saved"]] = saved.data_ptr()
        return call

    def _call(self, tensors: ProgramTensors, args: LookupArgs, rows: Tensor, values: Tensor | None) -> array[int]:
        """A ``Call`` of ``csrc/program.h``; neither it nor what it points at holds the tensors."""
        call = told(tensors) if tensors.told is None else tensors.told[:_LISTS]
        ids, offsets, id_weights, outputs, batch, _, num_rows = args
        call[_IDS], call[_ID_BYTES], call[_NUM_IDS] = ids.data_ptr(), ids.element_size(), ids.numel()
        if offsets is not None:
            call[_OFFSETS] = offsets.data_ptr()
        if id_weights is not None:
            call[_ID_WEIGHTS] = id_weights.data_ptr()
        call[_BATCH], call[_OUTPUTS], call[_ROWS] = batch, outputs.data_ptr(), rows.data_ptr()
        if values is not None:
            call[_VALUES] = values.data_ptr()
        call[_NUM_THREADS] = threads(num_rows)
        return call


def told(tensors: ProgramTensors) -> array[int]:
    """A ``Call`` of ``csrc/program.h`` that says where these tensors lie, and nothing of what is looked up.

    Behind it are the lists of pointers that it points at: copies of the call alone are good while this one is there.
    """
    lists = [getattr(tensors, name) for name in _POINTED_AT]
    # Empty tensors have the address 0, and addresses of user space are far below 2**63.
    call = array("q", (*[0] * _LISTS, *(tensor.data_ptr() for each in lists for tensor in each)))
    call[_PLACE["program"]] = tensors.words.data_ptr()
    call[_PLACE["dtype"]], call[_PLACE["state_dtype"]] = DTYPES[tensors.dtype], DTYPES[tensors.states[0].dtype]
    # Only an update asks for it, and one without a native form is made in PyTorch.
    call[_PLACE["rule"]] = RULES.get(tensors.rule, _GRADIENTS["sparse"])
    call[_PLACE["hyper"]], call[_PLACE["num_hyper"]] = tensors.hyper.data_ptr(), tensors.hyper.numel()
    place = call.buffer_info()[0] + 8 * _LISTS
    for name, each in zip(_POINTED_AT, lists):
        if each:
            call[_PLACE[name]] = place
        place += 8 * len(each)
    return call


def _no_such_row(weight: Tensor, index: Tensor) -> IndexError:
    wrong = index[(index < 0) | (index >= weight.shape[0])]
    return IndexError(f"row {int(wrong[0])} is out of range: the weight has {weight.shape[0]} rows")


def threads(num_rows: int) -> int:
    """As many as PyTorch uses, but one for a few rows."""
    return 1 if num_rows < 2 * _ROWS_A_THREAD else min(torch.get_num_threads(), num_rows // _ROWS_A_THREAD)


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether the library takes these weights: on the CPU, contiguous, and of one of its types, the same for all."""
    if not tensors:
        return True
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return False
    for t in tensors:
        kind = type(t)
        if (kind is not Tensor and kind is not torch.nn.Parameter) or not t.is_cpu:
            return False
        if t.dtype is not dtype or not t.is_contiguous():
            return False
    return True


def register(library: Library, in_use: Callable[[], bool], lookup: Any, update: Any) -> None:
    """Gives the operators of ``reference`` kernels for the CPU, which leave to it what the library does not take."""
    plain_lookup, plain_update = lookup._init_fn, update._init_fn

    @lookup.register_kernel("cpu")
    def _(
        weight: Tensor, state: list[Tensor], index: Tensor, hook: Tensor, hyper: Tensor, rule: str, dtype: torch.dtype
    ) -> Tensor:
        if in_use() and fits([weight]):
            return library.gather(weight, index).to(dtype)
        return plain_lookup(weight, state, index, hook, hyper, rule, dtype)

    @update.register_kernel("cpu")
    def _(weight: Tensor, state: list[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str) -> None:
        rows, step = split_step(state)
        native = in_use() and rule in RULES and fits([weight]) and fits(rows)
        own = torch.float32 if rounds_stochastically(weight, grad) else weight.dtype
        if native and all(takes_state(rule_of(rule), s.dtype, own) for s in rows):
            with training_lock:
                return library.update(weight, rows, index, grad, hyper, rule, int(step))
        return plain_update(weight, state, index, grad, hyper, rule)
