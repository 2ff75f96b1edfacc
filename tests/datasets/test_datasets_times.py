"""Times in the forms that logs have, against Python's own calendar."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import polars as pl
import pytest

from embtables.datasets.readers.interactions import Interactions
from embtables.datasets.times import Clock, say

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MOMENTS = [
    datetime(2019, 10, 1, tzinfo=timezone.utc),
    datetime(2019, 10, 31, 12, 5, 9, tzinfo=timezone.utc),
    datetime(2020, 2, 29, 23, 59, 59, tzinfo=timezone.utc),
    datetime(1999, 12, 13, 0, 30, tzinfo=timezone.utc),
    *(
        datetime(2001, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=random.Random(seed).randrange(10**9))
        for seed in range(60)
    ),
]


def ms(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(milliseconds=1)


def read(texts: list[str | None], clock: Clock | None = None) -> list[int | None]:
    clock = clock or Clock()
    moments = clock.read(pl.Series(texts, dtype=pl.String))
    settled = clock.settled(moments.with_columns(pl.all().fill_null(-1)))
    return [None if value == -1 else int(value) for value in settled]


def date_only(form: str) -> Callable[[datetime], tuple[str, datetime]]:
    return lambda moment: (moment.strftime(form), moment.replace(hour=0, minute=0, second=0))


def to_the_minute(form: str) -> Callable[[datetime], tuple[str, datetime]]:
    return lambda moment: (moment.strftime(form), moment.replace(second=0))


def whole(form: str) -> Callable[[datetime], tuple[str, datetime]]:
    return lambda moment: (moment.strftime(form), moment)


def in_zone(form: str, minutes: int) -> Callable[[datetime], tuple[str, datetime]]:
    zone = timezone(timedelta(minutes=minutes))
    return lambda moment: (moment.astimezone(zone).strftime(form), moment)


FORMS = {
    "iso": whole("%Y-%m-%dT%H:%M:%S"),
    "iso Z": whole("%Y-%m-%dT%H:%M:%SZ"),
    "iso zone": in_zone("%Y-%m-%dT%H:%M:%S%z", 330),
    "iso west": in_zone("%Y-%m-%d %H:%M:%S %z", -210),
    "iso UTC": whole("%Y-%m-%d %H:%M:%S UTC"),
    "iso GMT": whole("%Y-%m-%d %H:%M:%S GMT"),
    "iso date": date_only("%Y-%m-%d"),
    "iso minute": to_the_minute("%Y-%m-%d %H:%M"),
    "slashes": whole("%Y/%m/%d %H:%M:%S"),
    "dots, year first": whole("%Y.%m.%d %H:%M:%S"),
    "American": whole("%m/%d/%Y %I:%M:%S %p"),
    "American, short year": to_the_minute("%m/%d/%y %H:%M"),
    "British": whole("%d/%m/%Y %H:%M:%S"),
    "German": to_the_minute("%d.%m.%Y %H:%M"),
    "German date": date_only("%d.%m.%Y"),
    "dashes": whole("%d-%m-%Y %H:%M:%S"),
    "Twitter": whole("%a %b %d %H:%M:%S +0000 %Y"),
    "ctime": whole("%a %b %d %H:%M:%S %Y"),
    "date(1)": whole("%a %b %d %H:%M:%S UTC %Y"),
    "mail": whole("%a, %d %b %Y %H:%M:%S GMT"),
    "mail, zone": in_zone("%a, %d %b %Y %H:%M:%S %z", 60),
    "web server": in_zone("[%d/%b/%Y:%H:%M:%S %z]", -480),
    "month's name": whole("%d %B %Y %H:%M:%S"),
    "month's name first": to_the_minute("%b %d, %Y, %I:%M %p"),
    "dashes and name": date_only("%d-%b-%Y"),
    "digits": whole("%Y%m%d%H%M%S"),
    "digits to the minute": to_the_minute("%Y%m%d%H%M"),
    "digits date": date_only("%Y%m%d"),
    "digits T": whole("%Y%m%dT%H%M%SZ"),
    "seconds": lambda moment: (str(ms(moment) // 1000), moment),
    "seconds with a fraction": lambda moment: (f"{ms(moment) // 1000}.25", moment + timedelta(milliseconds=250)),
    "milliseconds": lambda moment: (str(ms(moment)), moment),
    "microseconds": lambda moment: (f"{ms(moment)}123", moment),
    "nanoseconds": lambda moment: (f"{ms(moment)}999999", moment),
    "fraction": lambda moment: (moment.strftime("%Y-%m-%dT%H:%M:%S.123456Z"), moment + timedelta(milliseconds=123)),
    "comma": lambda moment: (moment.strftime("%Y-%m-%d %H:%M:%S,5"), moment + timedelta(milliseconds=500)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str) -> None:
    written = [FORMS[form](moment) for moment in MOMENTS]
    bad = ["N/A", "NULL", "", "noon", "2019-13-01", "2019-02-30 10:00:00", "2019-10-01 25:00:00", "32.10.2019", "inf"]
    bad += ["2019-10-01T12:30:00+25:00", "2019-10-01T12:30:00+05:75", "0000-00-00", "0001-01-01", "9999-12-31 23:59:59"]
    texts = [text for text, _ in written]
    expected = [ms(moment) for _, moment in written]
    assert read([*bad, None, *texts]) == [None] * (len(bad) + 1) + expected
    # every block is read as the first one was
    clock = Clock()
    clock.read(pl.Series(texts))
    assert read([texts[1], "x"], clock) == [expected[1], None]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_numbers_of_parquet(unit: str) -> None:
    scale = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[unit]
    numbers = [ms(moment) // 1000 * scale for moment in MOMENTS]
    for dtype in (pl.Int64, pl.UInt64, pl.Float64):
        clock = Clock()
        moments = clock.read(pl.Series([*numbers, None], dtype=dtype))
        assert moments["time"].to_list() == [*map(ms, MOMENTS), None]
        assert clock.read(pl.Series([5, 3], dtype=dtype))["time"].to_list() == [
            value * 1000 // scale for value in (5, 3)
        ]


def test_dates_of_parquet() -> None:
    naive = [moment.replace(tzinfo=None) for moment in MOMENTS]
    expected = [ms(moment) for moment in MOMENTS]
    for unit in ("ms", "us", "ns"):
        values = pl.Series(naive, dtype=pl.Datetime(unit))  # type: ignore[arg-type]
        assert Clock().read(values)["time"].to_list() == expected
        assert Clock().read(values.dt.replace_time_zone("UTC"))["time"].to_list() == expected
    abroad = pl.Series(naive).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Kolkata")
    assert Clock().read(abroad)["time"].to_list() == expected
    days = pl.Series([moment.date() for moment in MOMENTS])
    assert Clock().read(days)["time"].to_list() == [
        ms(moment.replace(hour=0, minute=0, second=0)) for moment in MOMENTS
    ]
    with pytest.raises(ValueError, match="the time column is of type Boolean: numbers, dates or text are needed"):
        Clock().read(pl.Series([True]))


def test_small_numbers_are_places_in_an_order() -> None:
    assert read([str(number) for number in range(100)]) == [number * 1000 for number in range(100)]
    assert read(["-5", "0", "7"]) == [-5000, 0, 7000]


def test_numbers_that_would_be_dates_in_part_are_no_dates() -> None:
    texts = [str(number) for number in range(20_191_001, 20_191_101)]  # 69 of 100 are no date
    assert read(texts) == [int(text) * 1000 for text in texts]
    assert read(["20191001", "20191002"], Clock("s")) == [20_191_001_000, 20_191_002_000]


@pytest.mark.parametrize("kind", [pl.String, pl.Int64])
def test_a_value_of_another_unit_is_no_time(kind: type[pl.DataType]) -> None:
    values = [ms(moment) for moment in MOMENTS]
    odd = [values[0] // 1000, values[0] * 1000]
    moments = Clock().read(pl.Series([*odd, *values]).cast(kind))
    assert moments["time"].to_list() == [None, None, *values]
    assert Clock("ms").read(pl.Series([*odd, *values]).cast(kind))["time"].to_list() == [*odd, *values]


def test_day_first_after_a_first_block_that_does_not_tell() -> None:
    for later, order in (("13/08/2019", "day"), ("08/13/2019", "month")):
        clock = Clock()
        blocks = [clock.read(pl.Series(["03/04/2019", "05/06/2019"])), clock.read(pl.Series([later, "01/02/2019"]))]
        found = clock.settled(pl.concat(blocks)).tolist()
        days = [(3, 4), (5, 6), (13, 8), (1, 2)] if order == "day" else [(4, 3), (6, 5), (13, 8), (2, 1)]
        assert found == [ms(datetime(2019, month, day, tzinfo=timezone.utc)) for day, month in days]
        assert f"dates {order}-first" in clock.description()


def test_one_date_in_the_other_order_is_one_wrong_row() -> None:
    texts = [f"{day:02d}/10/2019" for day in range(1, 31)]
    assert read(["10/25/2019", *texts]) == [
        None,
        *(ms(datetime(2019, 10, day, tzinfo=timezone.utc)) for day in range(1, 31)),
    ]


def test_dates_that_do_not_tell_their_order_are_refused() -> None:
    with pytest.raises(
        ValueError, match="the time '03/04/2019' may be day/month or month/day.*--time-format day-first"
    ):
        read(["03/04/2019", "05/06/2019"])
    with pytest.raises(ValueError, match=r"as many times have the day first as the month \(1 each\)"):
        read(["13/04/2019", "04/13/2019"])
    april, march = datetime(2019, 4, 3, tzinfo=timezone.utc), datetime(2019, 3, 4, tzinfo=timezone.utc)
    assert read(["03/04/2019"], Clock(form="day-first")) == [ms(april)]
    assert read(["03/04/2019"], Clock(form="month-first")) == [ms(march)]
    assert read(["03.04.2019"]) == [ms(april)]
    assert read(["04/04/2019"]) == [ms(april + timedelta(days=1))]  # either way


def test_a_format_of_the_user_s() -> None:
    clock = Clock(form="%d|%m|%Y %H.%M")
    moment = datetime(2019, 4, 3, 10, 30, tzinfo=timezone.utc)
    assert read(["03|04|2019 10.30", "2019-04-03"], clock) == [ms(moment), None]
    assert read(["03|04|19"], Clock(form="%d|%m|%y")) == [ms(moment.replace(hour=0, minute=0))]
    assert "'%d|%m|%Y %H.%M'" in clock.description()


@pytest.mark.parametrize("form", ["", "%Q%", "%H:%M", "noon", "%d.%m", "%Y-%m-%d %H", "%"])
def test_formats_that_are_none_are_refused_before_anything_is_read(form: str) -> None:
    with pytest.raises(ValueError, match=r"^--time-format '.*': not a format of times \(.*\); day-first, ") as caught:
        Interactions(time_format=form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        "%s",
        "%c",
        "%+",
        "%F %T",
        "%Y-%m-%dT%H:%M:%S%#z",
        "[%d/%b/%Y:%H:%M:%S %z]",
        "%D",
        "%d/%b/%Y:%H:%M:%S %z",
        "%j %Y",
        "%Y-%m",
        "%m/%d/%y %I:%M %p",
        "%Y%m%d",
    ],
)
def test_formats_of_times(form: str) -> None:
    moment = datetime(2020, 2, 29, 0, 0, tzinfo=timezone.utc)
    written = moment.strftime(form.replace("%+", "%Y-%m-%dT%H:%M:%S+00:00").replace("%#z", "+00"))
    (time,) = read([written], Clock(form=form))
    assert time == ms(moment if form != "%Y-%m" else moment.replace(day=1))


def test_placeholders_of_databases_are_no_times() -> None:
    """The first and the last date of .NET and of SQL."""
    moment = datetime(2019, 10, 1)
    values = pl.Series([datetime(1, 1, 1), moment, datetime(9999, 12, 31)])
    beyond = pl.Series([0, -(2**63), 2**62]).cast(pl.Datetime("ms"))  # the second is what NumPy calls NaT
    assert Clock().read(beyond)["time"].to_list() == [0, None, None]
    expected = [None, ms(moment.replace(tzinfo=timezone.utc)), None]
    assert Clock().read(values)["time"].to_list() == expected
    assert Clock().read(values.cast(pl.Date))["time"].to_list() == expected
    assert read(["0001-01-01", "2019-10-01", "9999-12-31"], Clock(form="%Y-%m-%d")) == expected


def test_zones_reach_as_far_as_there_are_some() -> None:
    moment = datetime(2019, 10, 1, 12, tzinfo=timezone.utc)
    assert (
        read(["2019-10-02T02:00:00+14:00", "2019-10-01T00:00:00-12:00", "2019-10-01T17:45:00+05:45"])
        == [ms(moment)] * 3
    )


def test_points() -> None:
    clock = Clock()
    clock.read(pl.Series(["1569888000000"]))
    assert clock.point("1569888000000", "from") == 1_569_888_000_000
    assert clock.point("2019-10-01", "from") == clock.point("2019-10-01T00:00Z", "from") == 1_569_888_000_000
    digits = Clock()
    digits.read(pl.Series(["20191001", "20191002"]))
    assert digits.point("20191001", "from") == 1_569_888_000_000
    assert clock.point("9999-12-31", "to") == 253_402_214_400_000 and clock.point("1800-01-01", "from") < 0
    for text in ("soon", "inf", "03/04/2019"):
        with pytest.raises(
            ValueError, match=f"to '{text}': a number or an ISO date such as 2017-10-02T12:00 is needed"
        ):
            Clock().point(text, "to")


def test_times_in_words() -> None:
    assert say(1_569_888_000_999) == "2019-10-01T00:00:00+00:00" and say(-1) == "1969-12-31T23:59:59+00:00"
    assert say(10**18) == f"{10**18} ms"
