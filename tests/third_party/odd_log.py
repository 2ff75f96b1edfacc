"""A reader of another package: a shop's log whose lines are ``time user>item [tag;tag] price ok`` or ``… no``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import polars as pl
import typer

from embtables.datasets import Block, Rejections, RowReader, Schema, read_lines

LINE = re.compile(r"(\S+) (\w*)>(\w+) \[([\w;]*)\] (\S+) (ok|no)")


@dataclass(frozen=True, kw_only=True)
class OddLog(RowReader):
    """A shop's odd log.

    This paragraph is not part of the help.
    """

    kind: ClassVar[str] = "oddlog"
    input_help: ClassVar[str] = "The log, as the shop writes it."
    example: ClassVar[str] = "Example: embtables prepare oddlog shop.log data/shop --without tea,salt"
    schema: ClassVar[Schema] = Schema(
        label="bought", dense=["price"], categorical=["user", "item"], lists=["tags"], group="user", item="item"
    )
    time: ClassVar[str | None] = "time"

    dearest: Annotated[float, typer.Option(help="Rows with a higher price are malformed.")] = 1e6
    without: Annotated[tuple[str, ...], typer.Option(help="Items to leave out.")] = ()

    def blocks(self, source: Path, rejections: Rejections, advance: Callable[[int], None]) -> Iterator[Block]:
        lines = self._parsed(source, rejections, advance)
        while rows := list(islice(lines, 64)):
            number, time, user, item, tags, price, bought = zip(*rows)
            columns = {"time": time, "user": user, "item": item, "price": price, "bought": bought}
            listed = pl.Series("tags", [text.split(";") if text else [] for text in tags], dtype=pl.List(pl.String))
            yield Block(pl.DataFrame(columns).with_columns(listed), np.array(number))

    def _parsed(
        self, source: Path, rejections: Rejections, advance: Callable[[int], None]
    ) -> Iterator[tuple[int | str, ...]]:
        for number, line in read_lines(source, rejections, advance):
            match = LINE.fullmatch(line)
            if match is None:
                rejections.reject("not a line of the shop", f"{source}:{number}")
                continue
            time, user, item, tags, price, bought = match.groups()
            if price.replace(".", "").isdigit() and float(price) > self.dearest:
                rejections.reject("too dear", f"{source}:{number}")
            elif item not in self.without:
                yield number, time, user, item, tags, price, int(bought == "ok")
