"""Triton kernels: the gather, from every row format, with the sums of bags, and the step of a fused optimizer.

R rows, W width, N looked-up rows, as in ``reference``; M bags of them. Nothing here waits for the GPU: the host never
learns how many distinct rows there are. Element offsets are 64-bit, sums in float32 at least.

The step sorts the index, stably, so that occurrences of a row keep the order of the input, and cuts the sorted
positions into small windows. A row belongs to the window that holds its first occurrence, and to one program there: it
adds the row's gradients inside the window one after another, and then what later windows hold of them, which
``_window_sums`` has summed beforehand. There are no atomics: the same input gives the same bits, given one model of GPU
and one version of Triton.
"""

# Triton gives the parameters of its kernels their types.
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embtables.ops.program import PLAIN, RowForm
from embtables.ops.reference import numbers_of_bags, rounds_stochastically, split_step
from embtables.ops.stochastic import stream
from embtables.optimizers import rule_of

# The rules of ``embtables.optimizers`` that ``_step`` has a form of.
RULES = ("sgd", "rowwise_adagrad", "adagrad", "adam")

# Elements that a program holds at once, the most positions of a window, and the most windows, and elements of them,
# whose sums are read at once. Of what was timed on an H200 (D = 16, 64 and 128), these are the best or near it.
_TILE = 1024
_WINDOW = 32
_FOLLOWING = 64
_SUMS = 4096
# The widest tile where each column is updated by itself.
_COLUMNS = 64
# Multiplications and additions stay apart, as they are in the reference.
_OPTIONS = {"enable_fp_fusion": False}


def lookup(weight: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows ``index`` [N] of ``weight`` [R, W] → [N, W], in a type of their own or the weight's.

    The index has to be in range: a GPU does not check it here.
    """
    out = weight.new_empty(index.numel(), weight.shape[1], dtype=dtype or weight.dtype)
    return _gathered(weight, None, None, index, out, PLAIN)


def unpack(stored: Tensor, scales: Tensor | None, firsts: Tensor, index: Tensor, width: int, form: RowForm) -> Tensor:
    """Rows ``index`` [N] of a weight in a format → [N, W] in float32; the index has to be in range.

    ``stored``, ``scales``: as ``StoredRows.empty`` makes them; ``firsts``: ``StoredRows.firsts``.
    """
    out = torch.empty(index.numel(), width, device=stored.device)
    return _gathered(stored, scales, firsts, index, out, form)


def bag_sums(
    stored: Tensor,
    scales: Tensor | None,
    firsts: Tensor | None,
    index: Tensor,
    bags: Tensor,
    factors: Tensor | None,
    dtype: torch.dtype,
    width: int,
    form: RowForm,
) -> Tensor:
    """The sums [M, W] of the rows ``index`` [N] of each bag, added in float32 in the order of the index.

    An index of −1 adds nothing; all others have to be in range, and ``bags`` [M + 1], the offsets, to rise from 0 to N.

    Args:
        stored: the weight, in any format.
        scales: as for ``unpack``.
        firsts: as for ``unpack``; ``None`` where rows are plain.
        index: which rows, bag by bag.
        bags: where each bag begins, and where the last one ends.
        factors: [N], what each row is multiplied with; ``None``: nothing.
        dtype: of the sums.
        width: W.
        form: how the rows are stored.
    """
    out = torch.empty(bags.numel() - 1, width, dtype=dtype, device=stored.device)
    return _gathered(stored, scales, firsts, index, out, form, bags, factors)


def _gathered(
    stored: Tensor,
    scales: Tensor | None,
    firsts: Tensor | None,
    index: Tensor,
    out: Tensor,
    form: RowForm,
    bags: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    count, width = out.shape
    slabs = 0 if firsts is None else firsts.shape[1]
    # What a form does not read needs a pointer all the same.
    scales, firsts = stored if scales is None else scales, index if firsts is None else firsts
    _check_contiguous(stored, scales)
    if not out.numel():
        return out
    columns = min(triton.next_power_of_2(width), 512)
    if form.together == 1 and 0 < form.bits < 8:
        columns = max(columns, 8 // form.bits)  # whole bytes
    if bags is None:
        rows, warps = min(1024 // columns, 256) if columns < 512 else 2, 4
    else:
        # Few bags a program, which goes on until its longest one is done: 16 bytes of them for each thread.
        rows, warps = max(1, 1024 // out.element_size() // columns), 2
    grid = triton.cdiv(count, rows), triton.cdiv(width, columns)
    index = index.contiguous()
    read = width, stored.shape[1], *form, slabs.bit_length(), rows, columns
    with torch.cuda.device_of(stored):
        if bags is None:
            _gather[grid](stored, scales, firsts, index, out, count, slabs, *read, num_warps=warps, **_OPTIONS)
        else:
            weighs, factors = factors is not None, index if factors is None else factors.contiguous()
            _bag_sums[grid](
                stored, scales, firsts, index, bags.contiguous(), factors, out, count, slabs, *read, weighs,
                num_warps=warps, **_OPTIONS,
            )  # fmt: skip
    return out


def update_(
    weight: Tensor,
    state: list[Tensor],
    index: Tensor,
    grad: Tensor,
    hyper: Tensor,
    rule: str,
    bags: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """One step of ``rule`` on the rows ``index`` [N] of ``weight`` [R, W], given ``grad`` [N, W]; −1 is no row.

    With ``bags`` and ``factors``, as in ``bag_sums``, ``grad`` is that of the sums, [M, W].
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: {', '.join(RULES)}")
    count, width = index.numel(), weight.shape[1]
    if not count or not width:
        return
    clips = rule_of(rule).clips_rows(hyper)
    moments, step = split_step(state)
    rounds = rounds_stochastically(weight, grad)
    _check_contiguous(weight, *moments)
    # Half the passes of a radix sort, where the numbers of the rows leave room.
    keys = index.int() if weight.shape[0] < 2**31 else index
    rows, order = torch.sort(keys.contiguous(), stable=True)
    # Which row of the gradient each sorted occurrence has, and what that is multiplied with.
    sources = order if bags is None else numbers_of_bags(bags, count)[order]
    weighs, factors = factors is not None, hyper if factors is None else factors[order]
    grad = grad.contiguous()
    columns = triton.next_power_of_2(width)
    if rule != "rowwise_adagrad" and not clips:
        columns = min(columns, _COLUMNS)
    window = max(1, min(_WINDOW, _TILE // columns))
    grid = triton.cdiv(count, window), triton.cdiv(width, columns)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # What no rounding reads needs a pointer all the same.
    random = stream(step.to(weight.device), width) if rounds else hyper
    sums = torch.empty(grid[0], width, dtype=wide, device=weight.device)
    # 1 − βᵗ for both moments; in float64, and here because it is the same for all rows.
    corrections = 1 - hyper[3:5] ** step if rule == "adam" else hyper
    first, second = [*moments, weight, weight][:2]
    tile = window * columns
    following = max(1, min(_FOLLOWING, _SUMS // columns))
    # Sums are quickest with 16 elements a thread; the step, which needs more registers for each of them, with 4 to 8.
    warps_of_sums, warps = max(1, min(4, tile // 512)), max(1, min(4, tile // 128))
    with torch.cuda.device_of(weight):
        _window_sums[grid](
            rows, sources, factors, grad, sums, count, width, window, columns, weighs,
            num_warps=warps_of_sums, **_OPTIONS,
        )  # fmt: skip
        _step[grid](
            weight, first, second, rows, sources, factors, grad, sums, hyper, corrections, random, count,
            width, window, columns, following, rule, clips, rounds, weighs, num_warps=warps, **_OPTIONS,
        )  # fmt: skip


def _check_contiguous(*tensors: Tensor) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the weights and optimizer state of a lookup on a GPU must be contiguous")


@triton.jit(do_not_specialize=["count", "slabs"])
def _gather(
    stored, scales, firsts, index, out, count, slabs, W: tl.constexpr, UNIT: tl.constexpr,
    FORM: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, TOGETHER: tl.constexpr,
    HALVINGS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = position < count
    row = tl.load(index + position, mask=valid, other=0).to(tl.int64)
    values = _read(
        stored, scales, firsts, row, valid, slabs, W, UNIT, FORM, BITS, SHARE, TOGETHER, HALVINGS, ROWS, COLUMNS
    )
    inside = valid[:, None] & (column < W)[None, :]
    tl.store(out + position[:, None] * W + column[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "slabs"])
def _bag_sums(
    stored, scales, firsts, index, bags, factors, out, count, slabs, W: tl.constexpr, UNIT: tl.constexpr,
    FORM: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, TOGETHER: tl.constexpr,
    HALVINGS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """ROWS bags at once, each row after row; four at a time, whose loads do not wait for one another."""
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = bag < count
    start = tl.load(bags + bag, mask=valid, other=0)
    length = tl.load(bags + bag + 1, mask=valid, other=0) - start
    longest = tl.max(length, axis=0)
    sums = tl.zeros([ROWS, COLUMNS], dtype=wide)
    j = 0
    while j < longest:
        for i in tl.static_range(4):
            position = start + j + i
            row = tl.load(index + position, mask=j + i < length, other=-1).to(tl.int64)
            found = row >= 0
            values = _read(
                stored, scales, firsts, row, found, slabs, W, UNIT, FORM, BITS, SHARE, TOGETHER, HALVINGS, ROWS, COLUMNS
            ).to(wide)
            if WEIGHS:
                values *= tl.load(factors + position, mask=found, other=0).to(wide)[:, None]
            sums += values
        j += 4
    inside = valid[:, None] & (column < W)[None, :]
    tl.store(out + bag[:, None] * W + column[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _read(
    stored, scales, firsts, row, valid, slabs, W: tl.constexpr, UNIT: tl.constexpr,
    FORM: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, TOGETHER: tl.constexpr,
    HALVINGS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows in any format (1: integers, 2: signs, else scalars): W each, in units of UNIT elements for TOGETHER rows.

    This program's columns of them, and zeros where a row is not valid.
    """
    unit = row
    block = row
    number = tl.zeros([ROWS], dtype=tl.int64)
    if SHARE != 1 or TOGETHER != 1:
        # The last slab that begins at the row or before it.
        slab = tl.zeros([ROWS], dtype=tl.int32)
        for halving in tl.static_range(HALVINGS):
            further = slab + (1 << (HALVINGS - 1 - halving))
            begins = tl.load(firsts + further, mask=further < slabs, other=2**62)
            slab = tl.where(begins <= row, further, slab)
        within = row - tl.load(firsts + slab)
        unit = tl.load(firsts + slabs + slab) + within // TOGETHER
        number = within % TOGETHER
        block = tl.load(firsts + 2 * slabs + slab)
        if SHARE > 0:
            block += within // SHARE
    if FORM == 1 or FORM == 2:
        if TOGETHER == 1:
            # Each byte once, of which become as many columns as it holds scalars.
            per: tl.constexpr = 8 // BITS
            at = tl.program_id(1) * (COLUMNS // per) + tl.arange(0, COLUMNS // per)
            there = valid[:, None] & (at < UNIT)[None, :]
            byte = tl.load(stored + unit[:, None] * UNIT + at[None, :], mask=there, other=0).to(tl.int32)
            shifted = byte[:, :, None] >> (tl.arange(0, per) * BITS)[None, None, :]
            field = tl.reshape(shifted, [ROWS, COLUMNS]) & (2**BITS - 1)
        else:
            byte = tl.load(stored + unit, mask=valid, other=0).to(tl.int32)
            field = (byte >> (number * BITS).to(tl.int32))[:, None] & (2**BITS - 1)
        if FORM == 2:
            values = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for j in tl.static_range(BITS):
                scale = _scale(stored + unit * UNIT, scales + block * BITS, j, valid, UNIT, (BITS * W + 7) // 8)
                values += (((field >> j) & 1).to(tl.float32) - 0.5) * scale[:, None]
        else:
            scale = _scale(stored + unit * UNIT, scales + block, 0, valid, UNIT, (BITS * W + 7) // 8)
            zero: tl.constexpr = 2.0 ** (BITS - 1) - (0.0 if BITS > 2 else 0.5)
            values = (field.to(tl.float32) - zero) * scale[:, None]
    else:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = valid[:, None] & (column < W)[None, :]
        values = tl.load(stored + unit[:, None] * UNIT + column[None, :], mask=inside, other=0)
    return values


@triton.jit
def _scale(row, scales, number, valid, UNIT: tl.constexpr, SCALAR_BYTES: tl.constexpr):
    """A scale of each row, bf16 in fp32: among ``scales``, or behind the row's scalars, where it begins anywhere."""
    if UNIT > SCALAR_BYTES:
        low = tl.load(row + SCALAR_BYTES + 2 * number, mask=valid, other=0).to(tl.int32)
        high = tl.load(row + SCALAR_BYTES + 2 * number + 1, mask=valid, other=0).to(tl.int32)
        found = ((high << 24) | (low << 16)).to(tl.float32, bitcast=True)
    else:
        found = tl.load(scales + number, mask=valid, other=0).to(tl.float32)
    return found


@triton.jit(do_not_specialize=["count"])
def _window_sums(
    rows, sources, factors, grad, sums, count,
    W: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """The sum of the gradients of a window's first row, where that row began in an earlier window."""
    window = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = window * WINDOW
    head = tl.load(rows + start)
    if (head >= 0) & (tl.load(rows + start - 1, mask=window > 0, other=-1) == head):
        position = start + tl.arange(0, WINDOW)
        same = tl.load(rows + position, mask=position < count, other=-1) == head
        source = tl.load(sources + position, mask=same, other=0)
        inside = same[:, None] & (column < W)[None, :]
        values = tl.load(grad + source[:, None] * W + column[None, :], mask=inside, other=0)
        values = values.to(sums.dtype.element_ty)
        if WEIGHS:
            values *= tl.load(factors + position, mask=same, other=0).to(sums.dtype.element_ty)[:, None]
        summed = tl.sum(values, axis=0)
        tl.store(sums + window * W + column, summed, mask=column < W)


@triton.jit(do_not_specialize=["count"])
def _step(
    weight, first, second, rows, sources, factors, grad, sums, hyper, corrections, random, count,
    W: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr, FOLLOWING: tl.constexpr,
    RULE: tl.constexpr, CLIPS: tl.constexpr, ROUNDS: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """The rule, on each row whose first occurrence lies in this window."""
    wide: tl.constexpr = sums.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * WINDOW
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = (column < W)[None, :]
    position = start + tl.arange(0, WINDOW)
    valid = position < count
    row = tl.load(rows + position, mask=valid, other=-1).to(tl.int64)
    before = tl.load(rows + position - 1, mask=valid & (position > 0), other=-1).to(tl.int64)
    after = tl.load(rows + start + WINDOW, mask=start + WINDOW < count, other=-1)
    leads = (row >= 0) & (row != before)

    # Asked for before the gradients, so as to be on their way meanwhile.
    keep = leads[:, None] & in_row
    place = row[:, None] * W + column[None, :]
    old = tl.load(weight + place, mask=keep, other=0).to(wide)
    if RULE == "rowwise_adagrad":
        s = tl.load(first + row, mask=leads, other=0).to(wide)
    elif RULE == "adagrad":
        s = tl.load(first + place, mask=keep, other=0).to(wide)
    elif RULE == "adam":
        m = tl.load(first + place, mask=keep, other=0).to(wide)
        v = tl.load(second + place, mask=keep, other=0).to(wide)

    # Inside the window, in the order of the input; four at a time, whose loads do not wait for one another.
    equal = (row[:, None] == row[None, :]).to(tl.int32)
    run = tl.where(leads, tl.sum(equal, axis=1), 0)
    g = tl.zeros([WINDOW, COLUMNS], dtype=wide)
    longest = tl.max(run, axis=0)
    j = 0
    while j < longest:
        for i in tl.static_range(4):
            taken = j + i < run
            source = tl.load(sources + position + j + i, mask=taken, other=0)
            inside = taken[:, None] & in_row
            values = tl.load(grad + source[:, None] * W + column[None, :], mask=inside, other=0).to(wide)
            if WEIGHS:
                values *= tl.load(factors + position + j + i, mask=taken, other=0).to(wide)[:, None]
            g += values
        j += 4

    # Only the last row of the window can go on in those that follow: their sums, many windows at a time.
    last = tl.max(row, axis=0)
    led_last = leads & (row == last)
    goes_on = (tl.max(led_last.to(tl.int32), axis=0) == 1) & (after == last)
    rest = tl.zeros([COLUMNS], dtype=wide)
    window = tl.program_id(0).to(tl.int64) + 1
    while goes_on:
        following = window + tl.arange(0, FOLLOWING)
        exists = following * WINDOW < count
        same = exists & (tl.load(rows + following * WINDOW, mask=exists, other=-1) == last)
        inside = same[:, None] & in_row
        rest += tl.sum(tl.load(sums + following[:, None] * W + column[None, :], mask=inside, other=0), axis=0)
        window += FOLLOWING
        goes_on = tl.min(same.to(tl.int32), axis=0) == 1
    g += tl.where(led_last[:, None], rest[None, :], 0)

    if CLIPS:
        # Behind lr, l2 and the rule's own: eps; eps, beta1 and beta2.
        most = tl.load(hyper + (2 if RULE == "sgd" else 5 if RULE == "adam" else 3)).to(wide)
        norm = _sqrt(tl.sum(g * g, axis=1))
        g *= (most / tl.maximum(norm, most, propagate_nan=tl.PropagateNan.ALL))[:, None]
    g += tl.load(hyper + 1).to(wide) * old
    change = tl.load(hyper).to(wide) * g
    if RULE != "sgd":
        eps = tl.load(hyper + 2).to(wide)
    if RULE == "rowwise_adagrad":
        s += tl.sum(g * g, axis=1) / W
        tl.store(first + row, s.to(first.dtype.element_ty), mask=leads)
        change /= (_sqrt(s) + eps)[:, None]
    elif RULE == "adagrad":
        s += g * g
        tl.store(first + place, s.to(first.dtype.element_ty), mask=keep)
        change /= _sqrt(s) + eps
    elif RULE == "adam":
        # 1 − β is taken in float64: in float32 1 − 0.999 is off by 1e-5.
        beta1 = tl.load(hyper + 3)
        beta2 = tl.load(hyper + 4)
        m = beta1.to(wide) * m + (1 - beta1).to(wide) * g
        v = beta2.to(wide) * v + (1 - beta2).to(wide) * (g * g)
        tl.store(first + place, m.to(first.dtype.element_ty), mask=keep)
        tl.store(second + place, v.to(second.dtype.element_ty), mask=keep)
        m_hat = m / tl.load(corrections).to(wide)
        v_hat = v / tl.load(corrections + 1).to(wide)
        change = tl.load(hyper).to(wide) * m_hat / (_sqrt(v_hat) + eps)
    new = old - change
    if ROUNDS:
        new = _rounded(new, tl.load(random), place)
    tl.store(weight + place, new.to(weight.dtype.element_ty), mask=keep)


@triton.jit
def _rounded(x, random, place):
    """float32 that bfloat16 holds, one of the two neighbors, as ``stochastic.rounded`` gives it."""
    hashed = _mix(random.to(tl.uint64, bitcast=True) + (place >> 2).to(tl.uint64))
    drawn = ((hashed >> ((place & 3) * 16).to(tl.uint64)) & 0xFFFF).to(tl.uint32)
    moved = ((x.to(tl.uint32, bitcast=True) + drawn) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, moved, x)


@triton.jit
def _mix(x):
    """``embtables.hashing.mix``."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _sqrt(x):
    # The plain one is approximate in float32, and the rounded one does not exist in float64.
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)
