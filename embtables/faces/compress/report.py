"""What ``compress_`` did, as data and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

from embtables._util.names import few
from embtables.plan.solver import Plan
from embtables.sizes.memory import format_bytes


@dataclass(frozen=True)
class SwappedTable:
    """A table: its qualified name, further names of the modules that share it, the shape, how it is stored, bytes.

    ``bytes_after`` are those of its own storage; what tables share is in ``Compression.shared_bytes``. ``kept`` says
    whether it goes on with the trained weights, or starts anew, and ``share_kept`` how much of them it holds, as
    ``EmbeddingTables.take_over`` measures it; ``None`` where it starts anew, or nobody said that the model is trained.
    ``std_before`` and ``std_after`` are the standard deviations of its old weights and of its first vectors; ``None``
    where the old weights are on the meta device.
    """

    name: str
    other_names: tuple[str, ...]
    num_embeddings: int
    embedding_dim: int
    method: str
    stored_as: str
    bytes_before: int
    bytes_after: int
    kept: bool
    share_kept: float | None = None
    std_before: float | None = None
    std_after: float | None = None


@dataclass(frozen=True)
class Compression:
    """What ``compress_`` swapped, left alone and moved; printable.

    Attributes:
        plan: of all tables swapped, under their qualified names.
        tables: what was swapped.
        shared_bytes: of storage that several tables share, by group.
        left_alone: the reason for each table that was not swapped, by qualified name.
        left_alone_bytes: of their weights, those of tied ones once.
        moved: what was done about optimizers and other holders of the old tables, a sentence each.
        not_freed: names of old tables that are still in memory, since a variable outside the model, or a view, holds
            them.
        copies: tables whose old weights were equal to another's, as a deep copy's are, with the other's name. The rows
            of the new ones stand for other ids, so nothing may be copied or averaged between the two.
        measured_before: what ``evaluate`` gave of the model as it was; ``None`` where it was not given.
        measured_after: what it gave with the new tables in the form in which they will be served; ``None`` where it
            failed with them, too.
    """

    plan: Plan
    tables: Sequence[SwappedTable]
    shared_bytes: Mapping[str, int]
    left_alone: Mapping[str, str]
    left_alone_bytes: int
    moved: Sequence[str]
    not_freed: Sequence[str]
    copies: Mapping[str, str] = field(default_factory=dict)
    measured_before: float | None = None
    measured_after: float | None = None

    @property
    def kept(self) -> list[str]:
        """Tables that go on with their trained weights."""
        return [table.name for table in self.tables if table.kept]

    @property
    def anew(self) -> list[str]:
        """Tables that start anew."""
        return [table.name for table in self.tables if not table.kept]

    @property
    def rescaled(self) -> list[SwappedTable]:
        """Tables whose first vectors are larger or smaller than their old weights by more than a tenth."""
        scales = ((table, table.std_before, table.std_after) for table in self.tables)
        return [table for table, old, new in scales if old and new and not 1 / 1.1 <= new / old <= 1.1]

    @property
    def untrained(self) -> list[SwappedTable]:
        """Tables whose old weights had a standard deviation of 1, within chance, which a new nn.Embedding has."""
        return [
            table
            for table in self.tables
            if table.std_before is not None
            and abs(table.std_before - 1) < 4 / sqrt(2 * table.num_embeddings * table.embedding_dim)
        ]

    @property
    def bytes_before(self) -> int:
        return sum(table.bytes_before for table in self.tables)

    @property
    def bytes_after(self) -> int:
        """Inference bytes, as planned."""
        return self.plan.inference_bytes

    def __str__(self) -> str:
        header = ("table", "shape", "method", "stored as", "before", "after", "weights")
        rows = [
            (
                table.name + "".join(f" = {name}" for name in table.other_names),
                f"{table.num_embeddings:,} × {table.embedding_dim}",
                table.method,
                table.stored_as,
                format_bytes(table.bytes_before),
                format_bytes(table.bytes_after) if table.bytes_after or not self.shared_bytes else "shared",
                _goes_on_with(table),
            )
            for table in self.tables
        ]
        rows += [(f"(shared by {g})", "", "", "", "", format_bytes(n), "") for g, n in self.shared_bytes.items()]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        numeric = {1, 4, 5}
        lines = [
            "  ".join(c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in [header, *rows]
        ]
        share = f"{self.bytes_after / self.bytes_before:.2%}" if self.bytes_before else "0%"
        budget = "" if self.plan.budget_bytes is None else f" (budget {self.plan.budget_bytes:,} B)"
        lines.append(
            f"{len(self.tables)} tables: {self.bytes_before:,} B before, {self.bytes_after:,} B served after{budget}, "
            f"{share}"
        )
        before, after = self.measured_before, self.measured_after
        if before is not None:
            then = "failed" if after is None else f"{after:.6g} as it is served after ({after - before:+.2g})"
            lines.append(f"evaluate: {before:.6g} before, {then}")
        if self.anew:
            lines.append(f"starting anew, so train them: {few(self.anew)}")
        if self.untrained:
            names = few([table.name for table in self.untrained])
            std = 1 / max(table.embedding_dim for table in self.untrained)
            advice = f"from where models that multiply vectors hardly learn; give std={std:.2g}"
            lines.append(f"standard deviation 1, {advice}: {names}")
        if self.rescaled:
            changes = "; ".join(
                f"{table.name} {table.std_before:.3g} → {table.std_after:.3g}" for table in self.rescaled
            )
            lines.append(f"first vectors of another standard deviation than the old weights had: {changes}")
        if self.copies:
            pairs = ", ".join(f"{copy} of {first}" for copy, first in self.copies.items())
            lines.append(f"copies until now, whose rows no longer fit each other, so copy after compress_: {pairs}")
        if self.left_alone:
            lines.append(f"left alone, {format_bytes(self.left_alone_bytes)}:")
            lines += [f"  {name}: {reason}" for name, reason in self.left_alone.items()]
        if self.moved:
            lines += ["moved:", *(f"  {text}" for text in self.moved)]
        if self.not_freed:
            lines.append("still in memory, since something holds them or a view of them: " + ", ".join(self.not_freed))
        else:
            lines.append("the old tables are freed")
        return "\n".join(lines)


def _goes_on_with(table: SwappedTable) -> str:
    if not table.kept:
        return "new"
    return "kept" if table.share_kept is None or table.share_kept > 0.9995 else f"{table.share_kept:.1%} kept"
