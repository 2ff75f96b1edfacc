"""What a run depends on beside its configuration: versions and hardware, without names or paths of the machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from embtables import __version__, ops

__all__ = ["environment", "peak_rss_bytes"]

_PACKAGES = (
    "numpy",
    "safetensors",
    "pyarrow",
    "polars",
    "fbgemm-gpu-cpu",
    "fbgemm-gpu",
    "torchrec",
)


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Versions of what takes part in the numbers (``None``: not installed), processor, memory, threads, device."""
    return {
        "python": platform.python_version(),
        "embtables": __version__,
        # The module's own word: the metadata of the public wheels do not tell which CUDA they were built for.
        "torch": str(torch.__version__),
        **{name: _version(name) for name in _PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "threads": threads,
        "operators": ops.backend() if ops.instructions() is None else f"{ops.backend()} ({ops.instructions()})",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process so far; ``None`` where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
