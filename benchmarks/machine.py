"""What the machine is, and what its memory gives at most: copying, and rows gathered at random."""

from __future__ import annotations

import mmap
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Call

PACKAGES = ("fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "fuxictr", "deepctr-torch", "numpy")
TABLE_BYTES = 2**31  # far beyond what a core's caches hold
COPY_BYTES = 2**29


def describe() -> dict[str, Any]:
    """Processor, memory, system, versions; what cannot be found out is left out."""
    flags = _cpuinfo("flags").split()
    info: dict[str, Any] = {
        "processor": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "instructions": " ".join(f for f in flags if f in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in PACKAGES:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            continue
    return {name: value for name, value in info.items() if value}


def label(info: Mapping[str, Any]) -> str:
    """A machine in few words, from what ``describe`` said of it: ``Intel Xeon, L3 480 MiB``."""
    name = " ".join(re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b", " ", str(info.get("processor", ""))).split())
    kibibytes = re.search(r"L3 (\d+)K", str(info.get("caches", "")))
    return name + (f", L3 {int(kibibytes[1]) / 1024:.0f} MiB" if kibibytes else "") or "a machine"


def backend() -> str:
    """Which of embtables' operators run here: ``native`` or ``reference``."""
    from embtables import ops

    name: str = ops.backend() if hasattr(ops, "backend") else "reference"
    return name


def spare_bytes() -> int:
    """Memory that tables may take: 85 % of what is free; the rest is for batches, gradients and everybody else."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    except OSError:
        pass
    return free * 85 // 100


def copies() -> tuple[Call, int]:
    """A copy between two large buffers, and the bytes it reads and writes."""
    source, target = _huge_pages(COPY_BYTES), _huge_pages(COPY_BYTES)

    def copy(_: int) -> None:
        target.copy_(source)

    return copy, 2 * COPY_BYTES


def gathers(width: int, count: int, table_bytes: int = TABLE_BYTES) -> dict[str, Call]:
    """Ways to fetch ``count`` rows of ``width`` floats, drawn at random from a large table in huge pages.

    The addresses are computed beforehand, so that little but the memory is measured.
    """
    table = _huge_pages(table_bytes).view(-1, width)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(table.shape[0], (count,), generator=generator) for _ in range(16)]
    out = torch.empty(count, width)
    ways: dict[str, Call] = {
        "random rows, torch.index_select": lambda batch: _drop(torch.index_select(table, 0, rows[batch % 16], out=out)),
        "random rows, F.embedding": lambda batch: _drop(F.embedding(rows[batch % 16], table)),
    }
    if backend() == "native":
        from embtables.ops import fused_lookup

        hook, hyper = torch.zeros(()), torch.zeros(2, dtype=torch.float64)
        ways["random rows, embtables"] = lambda batch: _drop(
            fused_lookup(table, [], rows[batch % 16], hook, hyper, "sgd", table.dtype)
        )
    return ways


def _drop(_: Any) -> None:
    """So that a call of a contestant returns nothing."""


def _huge_pages(num_bytes: int) -> Tensor:
    """Touched float32 memory in huge pages, where the system has them."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def _caches() -> str:
    """Of the first core, such as ``L1d 48K, L2 2048K, L3 491520K``."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found)


def _chosen(path: str) -> str:
    """The word in brackets of a system's setting."""
    try:
        return Path(path).read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        return ""
