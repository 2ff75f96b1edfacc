"""Columns that are computed from others: parts of a time, groups of ages, buckets of numbers."""

from __future__ import annotations

import polars as pl


def hour_of_day(hour: pl.Expr) -> pl.Expr:
    """The hour, 0 … 23, of a time written as YYMMDDHH."""
    return hour.str.slice(6).cast(pl.Int64, strict=False)


def day(hour: pl.Expr) -> pl.Expr:
    """The date of a time written as YYMMDDHH; null where the text is not a date."""
    return hour.str.slice(0, 6).str.to_date("%y%m%d", strict=False)


def weekday(hour: pl.Expr) -> pl.Expr:
    """The day of the week, 0 (Sunday) … 6, of a time written as YYMMDDHH."""
    return day(hour).dt.weekday().cast(pl.Int64) % 7


def weekend(hour: pl.Expr) -> pl.Expr:
    """1 on Saturday and Sunday, else 0."""
    return (day(hour).dt.weekday() >= 6).cast(pl.Int64)


def country(isrc: pl.Expr) -> pl.Expr:
    """The country of an ISRC (International Standard Recording Code): its first two letters."""
    return isrc.str.slice(0, 2)


def age_group(age: pl.Expr) -> pl.Expr:
    """The group of an age: 1 … 7 for ages from 1 up to 10, 20, … 60, 95; null for other ages."""
    years = age.cast(pl.Float64, strict=False)
    return pl.when(years.is_between(1, 95)).then((years / 10).ceil().clip(1, 7).cast(pl.Int64))


def squared_log(number: pl.Expr) -> pl.Expr:
    """The bucket of a number x: ⌊(ln x)²⌋ where x is above 2, else x itself. A bucket of 0 counts as missing."""
    x = number.cast(pl.Float64, strict=False)
    bucket = pl.when(x > 2).then((x.log() ** 2).floor()).otherwise(x).cast(pl.Int64)
    return pl.when(bucket != 0).then(bucket)


DERIVED = {of.__name__: of for of in (hour_of_day, weekday, weekend, country, age_group, squared_log)}
"""Functions of a column as text, by name."""
