"""Packed rows: bytes and scales against loops over bits, errors against their bounds, scales against a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_cases import PRECISIONS, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import bf16, kind_of, levels, rows_per_scale, scales_of, unpacked
from torch import Tensor

from embtables.formats import FORMATS, PackedFormat, row_format
from embtables.lookup.stored_rows import StoredRows

PACKED = [name for name in PRECISIONS if isinstance(row_format(name), PackedFormat)]
WIDTHS = (1, 2, 3, 5, 10, 16, 64)


def packed(precision: str, slabs: list[Tensor]) -> tuple[StoredRows, Tensor, Tensor | None]:
    """Slabs of one width, one after another."""
    rows = StoredRows(row_format(precision), slabs[0].shape[1])
    starts = [rows.add(len(slab)) for slab in slabs]
    stored, scales = rows.empty("cpu")
    for start, slab in zip(starts, slabs):
        rows.write(stored, scales, start, slab)
    return rows, stored, scales


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("precision", PACKED)
def test_rows_are_read_as_loops_over_bits_read_them(precision: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    slabs = [torch.randn(n, width, generator=generator) * 10.0**e for n, e in ((1, -3), (130, 0), (0, 0), (67, 2))]
    rows, stored, scales = packed(precision, slabs)
    first = 0
    for slab in slabs:
        # A slab is stored as if it were alone.
        _, own, own_scales = packed(precision, [slab])
        expected = torch.tensor(unpacked(precision, own, own_scales, *slab.shape)).view(slab.shape)
        index = torch.randint(len(slab), (50,), generator=generator) if len(slab) else torch.zeros(0, dtype=torch.int64)
        assert torch.equal(rows.read(stored, scales, first + index), expected[index])
        first += len(slab)
    num_bytes = stored.nbytes + (0 if scales is None else scales.nbytes)
    assert num_bytes == sum(row_format(precision).slab_bytes(*slab.shape) for slab in slabs)


numbers = st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)


@given(st.sampled_from(PACKED), st.sampled_from(WIDTHS), st.integers(1, 9), st.data())
@settings(max_examples=examples(200))
def test_no_scalar_moves_by_more_than_half_a_step(precision: str, width: int, rows: int, data: st.DataObject) -> None:
    """Those beyond the levels become the outermost one, which int8 and int4 never need."""
    scale = data.draw(st.sampled_from([1e-20, 1e-3, 1.0, 1e10]))
    drawn = data.draw(st.lists(numbers | st.floats(-1, 1, width=32), min_size=rows * width, max_size=rows * width))
    values = torch.tensor(drawn, dtype=torch.float32).view(rows, width)
    values = values * scale if float(values.abs().max()) < 10 else values
    stored_rows, stored, scales = packed(precision, [values])
    served = stored_rows.read(stored, scales, torch.arange(rows))
    share = rows_per_scale(precision, width, rows)
    of_blocks = bf16(scales_of(precision, stored, scales, width))
    of_rows = [levels(precision, of_blocks[row // share]) for row in range(rows)]
    for row in range(rows):
        for value, found in zip(values[row].tolist(), served[row].tolist()):
            nearest = min(abs(value - level) for level in of_rows[row])
            step = max(of_rows[row]) - min(of_rows[row])
            assert abs(value - found) <= nearest + 1e-6 * step if kind_of(precision)[2] == 1 else found in of_rows[row]
            if precision.startswith(("int8", "int4")):
                half = of_blocks[row // share][0] / 2
                assert abs(value - found) <= half * (1 + 1e-5)
                assert value != 0 or found == 0


@pytest.mark.parametrize("precision", ["int8/1", "int4/1"])
def test_the_smallest_numbers_have_a_scale_too(precision: str) -> None:
    """Among them are those whose quotient by the number of levels is nothing in fp32, or is rounded down there."""
    values = torch.tensor([1, 7, 10, 127, 190, 191, 10_000, 2**23 + 1]).unsqueeze(1) * torch.tensor(
        [2.0**-149, -(2.0**-149)]
    )
    rows, stored, scales = packed(precision, [values])
    served = rows.read(stored, scales, torch.arange(len(values))).double()
    halves = scales_of(precision, stored, scales, 2).double().flatten() / 2
    assert bool((halves > 0).all())
    assert bool(((served - values).abs().amax(1) <= halves).all())


def test_every_number_that_a_scale_may_be_is_read_from_its_bytes() -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    rows = StoredRows(row_format("int8/1"), 2)
    rows.add(len(bits))
    stored, scales = rows.empty("cpu")
    assert scales is None
    stored[:, :2] = 129  # once the scale
    stored[:, 2:] = bits.unsqueeze(1).view(torch.uint8)
    expected = bits.view(torch.bfloat16).float().unsqueeze(1).expand(-1, 2)
    torch.testing.assert_close(
        rows.read(stored, None, torch.arange(len(bits))), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("precision", ["int2/slab", "binary/slab"])
def test_few_levels_have_the_scale_of_least_squared_error(precision: str) -> None:
    """Against a search over a thousand scales."""
    for seed in range(5):
        values = torch.randn(400, 8, generator=torch.Generator().manual_seed(seed))
        rows, stored, scales = packed(precision, [values])
        found = float((rows.read(stored, scales, torch.arange(400)) - values).square().mean())
        flat = values.double().flatten().numpy()
        errors = []
        for scale in np.linspace(0.3, 3, 1000):
            each = np.array(levels(precision, [scale]))
            errors.append(np.square(np.abs(flat[:, None] - each).min(1)).mean())
        # The scale itself is rounded to 8 bits.
        assert found <= min(errors) * 1.002


def test_more_signs_leave_less() -> None:
    values = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    left = []
    for precision in ("binary/1", "binary2/1", "binary4/1"):
        rows, stored, scales = packed(precision, [values])
        left.append(float((rows.read(stored, scales, torch.arange(500)) - values).square().mean()))
    # The mean square of |x| − E|x| of a normal distribution is 1 − 2/π.
    assert left[0] == pytest.approx(1 - 2 / np.pi, rel=0.05) and left[1] < 0.5 * left[0] and left[2] < 0.5 * left[1]


@pytest.mark.parametrize("precision", PACKED)
def test_what_is_no_number_stays_none_and_zeros_are_zeros(precision: str) -> None:
    values = torch.randn(130, 16)
    values[5, 3] = float("nan")
    values[64:] = 0
    rows, stored, scales = packed(precision, [values])
    served = rows.read(stored, scales, torch.arange(130))
    assert not served[5].isfinite().all()
    if "slab" not in precision and "7" not in precision:
        assert torch.equal(served[64:], values[64:])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "int3",
            r"unknown precision 'int3' \(did you mean 'int\d'\?\); there are: fp32, fp16, bf16, int8, int4, int2, ",
        ),
        ("INT8", r"unknown precision 'INT8' \(did you mean 'int8'\?\)"),
        ("int4/0", "precision 'int4/0': behind the slash stands how many rows have a scale in common, as in 'int4/64'"),
        ("int4/row", "precision 'int4/row': behind the slash"),
        ("fp16/64", "precision 'fp16/64': fp16 has no scales"),
        (8, "unknown precision 8; there are: fp32"),
        ("", "unknown precision ''; there are"),
    ],
)
def test_unknown_precisions_are_answered_with_those_there_are(name: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_format(name)  # type: ignore[arg-type]


def test_every_format_is_tested() -> None:
    assert {name.partition("/")[0] for name in PACKED} == {n for n, f in FORMATS.items() if isinstance(f, PackedFormat)}
