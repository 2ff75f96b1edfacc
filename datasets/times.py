"""Times as people write them, as milliseconds since 1970 (UTC). Times without a zone are taken for UTC."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import numpy as np
import polars as pl

UNITS_MS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
ORDERS = ("day-first", "month-first")
NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", "digits": "digits of a date"}
READ_AS = (
    "times that are read are seconds, milliseconds, microseconds or nanoseconds since 1970, 2019-10-01T12:30:00Z and "
    "its kin (with / or . too, without a zone or a time), 01.10.2019, 10/01/2019 12:30 PM, 1 Oct 2019, "
    "Tue Oct 01 12:30:00 +0000 2019, 20191001 and 20191001123000, and any other form that --time-format describes; "
    "dates are of the years 1900 to 2100"
)
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
PLAUSIBLE_S = (631_152_000, 4_102_444_800)  # 1990 and 2100: times within tell the unit
YEARS = (1900, 2100)  # that dates may be of: 0001-01-01 and 9999-12-31 stand for missing ones
FARTHEST_ZONE = 14 * 60  # minutes from UTC
DIGITS = (8, 10, 12, 14)  # YYYYMMDD, and with hour, minute, second
FIRST_MS, PAST_MS = (
    1000 * int(datetime(year, 1, 1, tzinfo=timezone.utc).timestamp()) for year in (YEARS[0], YEARS[1] + 1)
)

_AROUND = " []"  # characters around times, as in the logs of web servers
_WEEKDAY = r"(?:[A-Za-z]{3,9}\.?,?\s+)?"
_CLOCK = (
    r"(?<hour>\d{1,2}):(?<minute>\d{2})(?::(?<second>\d{2})(?:[.,:](?<fraction>\d{1,9}))?)?\s*"
    r"(?<half>[AaPp]\.?[Mm]\.?)?"
)
_ZONE = r"\s*(?<zone>[Zz]|UTC|GMT|(?:UTC|GMT)?[+-]\d{1,2}(?::?[0-5]\d)?)?\s*(?:\([A-Za-z ]+\))?"
_REST = rf"(?:[T:,\s]+{_CLOCK})?{_ZONE}$"
_MONTH = r"(?<month>[A-Za-z]{3,9})\.?"
_YEAR_FIRST = rf"^(?<year>\d{{4}})[-/.](?<month>\d{{1,2}}|[A-Za-z]{{3,9}})[-/.](?<day>\d{{1,2}}){_REST}"
_NUMBERS = rf"^{_WEEKDAY}(?<first>\d{{1,2}})(?<between>[-/.])(?<second_>\d{{1,2}})[-/.](?<year>\d{{4}}|\d{{2}}){_REST}"
_FORMS = (
    _YEAR_FIRST,
    rf"^{_WEEKDAY}(?<day>\d{{1,2}})(?:st|nd|rd|th)?[-/.\s]+{_MONTH}[-/.,\s]+(?<year>\d{{4}}|\d{{2}}){_REST}",
    rf"^{_WEEKDAY}{_MONTH}\s+(?<day>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?<year>\d{{4}}){_REST}",
    rf"^{_WEEKDAY}{_MONTH}\s+(?<day>\d{{1,2}})\s+{_CLOCK}{_ZONE}\s+(?<year>\d{{4}})$",
    r"^(?<year>\d{4})(?<month>\d{2})(?<day>\d{2})[T _-](?<hour>\d{2}):?(?<minute>\d{2})"
    rf"(?::?(?<second>\d{{2}})(?:[.,](?<fraction>\d{{1,9}}))?)?{_ZONE}$",
)
_DIGITS = r"^(?<year>\d{4})(?<month>\d{2})(?<day>\d{2})(?<hour>\d{2})?(?<minute>\d{2})?(?<second>\d{2})?$"


class Clock:
    """Reads the times of one log, block by block; what is ambiguous is settled by what the log shows.

    Numbers are of the unit that most of the first block's are of, or dates written as digits. Where day and month may
    be either of two numbers, the first block in which one of them is above 12 tells their order.

    Args:
        unit: of numbers: "s", "ms", "us", "ns", or "auto".
        form: "day-first" or "month-first", or a format as of ``strftime``, which all times then are of.

    Raises:
        ValueError: ``form`` is neither, or its times do not tell the year.
    """

    def __init__(self, unit: str = "auto", form: str | None = None) -> None:
        self._given = unit if unit in UNITS_MS else None
        self._unit = self._given
        self._order = form if form in ORDERS else None
        self._form = None if form is None or form in ORDERS else form.strip(_AROUND)
        self._first, self._past = FIRST_MS, PAST_MS
        if self._form is not None:
            _check_form(self._form)
        self._ambiguous: str | None = None  # the first date that may be read in two ways

    def read(self, values: pl.Series) -> pl.DataFrame:
        """``time``, Int64 milliseconds, null where the value is no time, and ``swapped``: the same, day and month
        exchanged, where their order is not settled yet.

        Raises:
            ValueError: the column is of a type that holds no times, or half of the dates contradict the others.
        """
        if values.dtype == pl.Date or isinstance(values.dtype, pl.Datetime):
            return _unambiguous(self._within_years(values.cast(pl.Datetime("ms")).cast(pl.Int64)))
        if values.dtype == pl.String:
            return self._of_text(values.str.strip_chars(_AROUND))
        if values.dtype.is_numeric():
            return _unambiguous(self._of_numbers(values if values.dtype.is_integer() else values.cast(pl.Float64)))
        if values.dtype == pl.Null:
            return _unambiguous(values.cast(pl.Int64))
        raise ValueError(f"the time column is of type {values.dtype}: numbers, dates or text are needed")

    def settled(self, moments: pl.DataFrame) -> np.ndarray:
        """The times of rows that ``read`` gave, int64.

        Raises:
            ValueError: no date of the log tells whether days or months come first.
        """
        if self._order is None and self._ambiguous is not None and (moments["time"] != moments["swapped"]).any():
            raise ValueError(
                f"the time {self._ambiguous!r} may be day/month or month/day, and so may all others: give "
                "--time-format day-first or --time-format month-first"
            )
        return moments["swapped" if self._order == "day-first" else "time"].to_numpy()

    def point(self, text: str, option: str) -> int:
        """A moment that the user names: a number in the log's unit or a date."""
        number = pl.Series([text]).cast(pl.Float64, strict=False)[0]
        if number is not None and np.isfinite(number) and self._unit != "digits":
            return int(number * UNITS_MS[self._unit or "s"])
        clock = Clock(form=self._order)
        clock._unit = self._unit
        clock._first, clock._past = -(2**62), 2**62  # a span may be said to have no end
        try:
            moments = clock.read(pl.Series([text])).drop_nulls()
            return int(clock.settled(moments)[0])
        except (ValueError, IndexError):
            raise ValueError(f"{option} {text!r}: a number or an ISO date such as 2017-10-02T12:00 is needed") from None

    def description(self) -> str:
        """How the times were read, in words."""
        parts = []
        if self._unit is not None:
            parts.append(NAMES[self._unit] + ("" if self._unit == "digits" else " since 1970"))
        if self._form is not None:
            parts.append(f"text as {self._form!r}")
        if self._ambiguous is not None and self._order is not None:
            parts.append(f"dates {self._order}")
        return ", ".join(parts) or "dates"

    def _of_text(self, values: pl.Series) -> pl.DataFrame:
        if self._form is not None:
            return _unambiguous(self._within_years(_formatted(values, self._form)))
        numbers = _numbers_of(values)
        time = self._of_numbers(numbers)
        moments = pl.DataFrame({"time": time, "swapped": time})
        texts = values.set(numbers.is_not_null(), None)
        for form in _FORMS:
            if texts.null_count() == len(texts):
                return moments
            read = self._within_years(_extracted(texts, form))
            texts = texts.set(read.is_not_null(), None)
            moments = moments.with_columns(pl.all().fill_null(read))
        if texts.null_count() < len(texts):
            month_first, day_first = self._in_order(texts)
            moments = moments.with_columns(
                pl.col("time").fill_null(month_first), pl.col("swapped").fill_null(day_first)
            )
        return moments

    def _in_order(self, texts: pl.Series) -> tuple[pl.Series, pl.Series]:
        """Dates of two numbers and a year: read month-first and day-first; the same twice where that is settled."""
        dotted = texts.str.extract(_NUMBERS, 2) == "."  # day-first wherever it is in use
        month_first, day_first = (
            self._within_years(_extracted(texts, _NUMBERS, "second_", "first")),
            self._within_years(_extracted(texts, _NUMBERS, "first", "second_")),
        )
        undecided = texts.set(dotted.fill_null(False), None)
        either = month_first.is_not_null() & day_first.is_not_null() & undecided.is_not_null()
        if self._ambiguous is None and either.any():
            self._ambiguous = undecided.filter(either)[0]
        if self._order is None:
            only_days = int((undecided.is_not_null() & month_first.is_null() & day_first.is_not_null()).sum())
            only_months = int((undecided.is_not_null() & day_first.is_null() & month_first.is_not_null()).sum())
            if only_days == only_months and only_days:
                raise ValueError(
                    f"as many times have the day first as the month ({only_days:,} each): give --time-format day-first "
                    "or --time-format month-first"
                )
            if only_days or only_months:
                self._order = "day-first" if only_days > only_months else "month-first"
        if self._order is None:
            month_first = pl.select(pl.when(dotted.fill_null(False)).then(day_first).otherwise(month_first)).to_series()
            return month_first, day_first
        settled = day_first if self._order == "day-first" else month_first
        settled = pl.select(pl.when(dotted.fill_null(False)).then(day_first).otherwise(settled)).to_series()
        return settled, settled

    def _within_years(self, milliseconds: pl.Series) -> pl.Series:
        """Null where a date is of a year that no log has."""
        return milliseconds.set(~milliseconds.is_between(self._first, self._past, closed="left").fill_null(False), None)

    def _of_numbers(self, values: pl.Series) -> pl.Series:
        """Int64 milliseconds; null where the number is of another unit than most."""
        if values.dtype.is_float():
            values = values.set(~values.is_finite(), None)
        if values.null_count() == len(values):
            return pl.Series([None] * len(values), dtype=pl.Int64)
        if self._unit is None:
            self._unit = "digits" if _write_dates(values) else _unit_of(values)
        if self._unit == "digits":
            return self._within_years(_extracted(_whole(values).cast(pl.String), _DIGITS))
        if self._given is None:
            plausible = [_plausible(values, unit) for unit in UNITS_MS if unit != self._unit]
            values = values.set(pl.DataFrame(plausible).max_horizontal().fill_null(False), None)
        per_ms = {"us": 1000, "ns": 1_000_000}
        if values.dtype.is_integer() and self._unit in per_ms:
            return (values // per_ms[self._unit]).cast(pl.Int64, strict=False)
        scale = UNITS_MS[self._unit]
        return (values if scale == 1 else (values * scale).floor()).cast(pl.Int64, strict=False)


def say(milliseconds: int) -> str:
    """A time as an ISO date, or as a number where there is no such date."""
    try:
        moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=int(milliseconds) // 1000 * 1000)
        return moment.isoformat(timespec="seconds")
    except OverflowError:
        return f"{int(milliseconds)} ms"


def _unambiguous(time: pl.Series) -> pl.DataFrame:
    return pl.DataFrame({"time": time, "swapped": time})


def _numbers_of(texts: pl.Series) -> pl.Series:
    """The numbers that texts write: Int64 where all of them are whole, so that none loses its last digits."""
    numbers = texts.cast(pl.Float64, strict=False)
    numbers = numbers.set(~numbers.is_finite(), None)
    whole = texts.cast(pl.Int64, strict=False)
    return whole if whole.null_count() == numbers.null_count() else numbers


def _whole(values: pl.Series) -> pl.Series:
    whole = values.cast(pl.Int64, strict=False)
    return whole.set((whole != values).fill_null(False), None)


def _write_dates(values: pl.Series) -> bool:
    """Whether (nearly) all numbers have as many digits as a date, and write one."""
    digits = _whole(values).cast(pl.String)
    lengths = digits.str.len_bytes()
    most = lengths.drop_nulls().mode()
    if len(most) == 0 or most[0] not in DIGITS:
        return False
    dates = _extracted(digits.set((lengths != most[0]).fill_null(True), None), _DIGITS)
    years = digits.str.slice(0, 4).cast(pl.Int64, strict=False)
    fitting = dates.is_not_null() & years.is_between(*YEARS)
    return int(fitting.sum()) >= 0.95 * (len(values) - values.null_count())


def _plausible(values: pl.Series, unit: str) -> pl.Series:
    first, past = (second * 1000 / UNITS_MS[unit] for second in PLAUSIBLE_S)
    return values.is_between(first, past).alias(unit)


def _unit_of(values: pl.Series) -> str:
    counts = {unit: int(_plausible(values, unit).sum()) for unit in UNITS_MS}
    if any(counts.values()):
        return max(counts, key=lambda unit: counts[unit])
    largest = values.cast(pl.Float64).abs().max()
    size = float(largest) if isinstance(largest, (int, float)) else 0.0
    return "s" if size < 1e11 else "ms" if size < 1e14 else "us" if size < 1e17 else "ns"


def _formatted(texts: pl.Series, form: str) -> pl.Series:
    if any(f"%{letter}" in form for letter in "HIklTRrXcs+"):
        moments = texts.str.to_datetime(form, strict=False, time_unit="ms")
    else:
        moments = texts.str.to_date(form, strict=False)
    return moments.cast(pl.Datetime("ms")).cast(pl.Int64)


def _check_form(form: str) -> None:
    """Raises ``ValueError`` unless what the format writes can be read again, and is of the year that was written."""
    year = 2019
    try:
        # Of zones that may be short, %#z, only reading knows.
        moment = pl.Series([datetime(year, 10, 23, 15, 30, tzinfo=timezone.utc)])
        written = moment.dt.strftime(form.replace("%#z", "%z"))
        read = pl.from_epoch(_formatted(written, form), time_unit="ms").dt.year()[0]
    except pl.exceptions.PolarsError as error:
        read = str(error).partition("\n")[0]
    if read != year:
        reason = read if isinstance(read, str) else "it tells no year"
        raise ValueError(
            f"--time-format {form!r}: not a format of times ({reason}); day-first, month-first and '%d.%m.%Y %H:%M' "
            "are some"
        )


def _extracted(texts: pl.Series, form: str, day: str = "day", month: str = "month") -> pl.Series:
    """Int64 milliseconds of texts that match the form and are times."""
    parts = texts.str.extract_groups(form).struct.unnest()
    found = {name: parts[name] for name in parts.columns}
    nothing = pl.Series([None] * len(texts), dtype=pl.String)
    of = {name: found.get(name, nothing) for name in ("hour", "minute", "second", "fraction", "half", "zone")}
    frame = pl.DataFrame({"year": found["year"], "month": found[month], "day": found[day], **of})
    year = pl.col("year").cast(pl.Int64)
    short = pl.col("year").str.len_bytes() == 2
    name = pl.col("month").str.slice(0, 3).str.to_lowercase()
    number = pl.coalesce(
        pl.col("month").cast(pl.Int64, strict=False),
        name.replace_strict(list(MONTHS), list(range(1, 13)), default=None, return_dtype=pl.Int64),
    )
    hour, half = pl.col("hour").cast(pl.Int64).fill_null(0), pl.col("half").str.slice(0, 1).str.to_lowercase()
    hour = pl.when(half.is_null()).then(hour).when(hour.is_between(1, 12)).then(hour % 12 + 12 * (half == "p"))
    zone = pl.col("zone").str.extract_groups(r"(?<sign>[+-])(?<hours>\d{1,2}):?(?<minutes>\d{2})?$")
    minutes = zone.struct.field("hours").cast(pl.Int64) * 60 + zone.struct.field("minutes").cast(pl.Int64).fill_null(0)
    offset = pl.when(zone.struct.field("sign") == "-").then(-minutes).otherwise(minutes).fill_null(0)
    two_digits = [
        part.cast(pl.String).str.zfill(2)
        for part in (number, pl.col("day"), hour, pl.col("minute").fill_null("0"), pl.col("second").fill_null("0"))
    ]
    full_year = pl.when(short).then(year + pl.when(year < 70).then(2000).otherwise(1900)).otherwise(year)
    text = pl.format("{}-{}-{} {}:{}:{}", full_year.cast(pl.String).str.zfill(4), *two_digits)
    fraction = (pl.col("fraction") + "00").str.slice(0, 3).cast(pl.Int64).fill_null(0)
    moment = text.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="ms")
    moment = pl.when(offset.abs() <= FARTHEST_ZONE).then(moment.cast(pl.Int64))
    return frame.select(moment + fraction - offset * 60_000).to_series()
