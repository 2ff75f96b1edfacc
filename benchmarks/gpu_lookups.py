"""Lookups and training steps of every method on a GPU, against the reference operators on the CPU.

    python -m benchmarks.gpu_lookups --out runs/gpu-lookups

Small tables, two steps over a matrix of ids and over bags, and what is served in int8. Saves lookups.csv in --out, a
row for each method and way, and fails where a value differs by more than sums in another order may.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import NO_DEVICE
from embtables import EmbeddingTables, Plan, TableConfig, ops, plan
from embtables._util.files import replacing
from embtables.methods import kinds

TABLES = [
    TableConfig("item", 600, 8, ["item", "history"], pooling="mean", padding_idx=0),
    TableConfig("user", 400, 8, on_out_of_range="oov"),
    TableConfig("city", 300, 16, padding_idx=3),
]
COUNTS = {table.name: list(range(table.num_embeddings or 0, 0, -1)) for table in TABLES}
FEATURES, BATCH = 4, 64
RTOL, ATOL = 1e-4, 1e-5

Row = dict[str, Any]


def batches(bags: bool) -> Iterator[list[Tensor]]:
    """The arguments of two lookups: a matrix of ids, or flat ids with offsets and weights, some bags being empty."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        if not bags:
            yield [torch.randint(300, (BATCH, FEATURES), generator=generator)]
            continue
        lengths = torch.randint(12, (FEATURES * BATCH,), generator=generator)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        ids = torch.randint(300, (int(offsets[-1]),), generator=generator)
        yield [ids, offsets, torch.randn(len(ids), generator=generator)]


def trained(solved: Plan, device: str, bags: bool) -> list[Tensor]:
    """The vectors of two steps, and what the tables hold then."""
    tables, found = EmbeddingTables(solved, seed=3, device=device), []
    for given in batches(bags):
        vectors = tables(*(tensor.to(device) for tensor in given))
        vectors.square().sum().backward()
        found.append(vectors.detach())
    return [tensor.cpu() for tensor in [*found, *tables.store.buffers()]]


def served(solved: Plan, device: str, bags: bool) -> list[Tensor]:
    tables = EmbeddingTables(solved, seed=3, device=device).serve()
    with torch.no_grad():
        return [tables(*(tensor.to(device) for tensor in given)).cpu() for given in batches(bags)]


def plans(method: str) -> tuple[Plan, Plan]:
    """Of tables that are trained, and of tables that are served in int8, which alone takes less than a third."""
    budgets = (None, None) if method == "full" else ("50%", "15%")
    return (
        plan(TABLES, method, budgets[0], frequencies=COUNTS, optimizer="adagrad"),
        plan(TABLES, method, budgets[1], frequencies=COUNTS, optimizer=None, precision="int8"),
    )


def cases(method: str) -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """What is compared, and what a device gives for it."""
    steps, packed = plans(method)
    for bags in (False, True):
        what = "bags" if bags else "a matrix of ids"
        yield f"two steps over {what}", lambda device, bags=bags: trained(steps, device, bags)  # type: ignore[misc]
        yield f"{what}, served in int8", lambda device, bags=bags: served(packed, device, bags)  # type: ignore[misc]


def compare(device: str) -> list[Row]:
    rows = []
    for method in kinds():
        for what, run in cases(method):
            with ops.using("reference"):
                expected = run("cpu")
            row: Row = {"method": method, "what": what, "equal": True, "largest_difference": 0.0, "error": ""}
            try:
                for got, want in zip(run(device), expected, strict=True):
                    row["equal"] &= torch.allclose(got, want, rtol=RTOL, atol=ATOL, equal_nan=True)
                    if want.numel():
                        difference = float((got.double() - want.double()).abs().max())
                        row["largest_difference"] = max(row["largest_difference"], difference)
            except Exception as error:  # the other methods are compared all the same
                row |= {"equal": False, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            rows.append(row)
            print(f"{method}, {what}: {'equal' if row['equal'] else row['error'] or 'DIFFERENT'}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_lookups",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-lookups"), help="folder of the results")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # "cpu": a trial of the comparison itself
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    rows = compare(chosen.device)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with replacing(chosen.out / "lookups.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    wrong = [f"{row['method']}, {row['what']}" for row in rows if not row["equal"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} differ from the reference on the CPU: {'; '.join(wrong)}")
    print(f"all {len(rows)} comparisons of {len(kinds())} methods are equal to the reference on the CPU")


if __name__ == "__main__":
    main()
