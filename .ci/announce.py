"""Says which build of torch pip has chosen, before it downloads it: ``python announce.py [FLAGS OF PIP]``.

On Linux the builds on PyPI are those for CUDA, with gigabytes of libraries that a host without a GPU has no use for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

from pip._vendor.packaging.requirements import Requirement

_CUDA = ("nvidia-", "cuda-")


def sentence(torch: dict[str, Any], has_gpu: bool) -> str:
    """What there is to say of a distribution, by its metadata as pip reports it."""
    needed = [Requirement(text) for text in torch.get("requires_dist", [])]
    cuda = [r for r in needed if r.name.startswith(_CUDA) and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    text = f"pip takes torch {torch['version']}"
    if not cuda:
        return f"{text}."
    text += f" and {len(cuda)} packages of CUDA libraries with it, several gigabytes."
    if not has_gpu:
        text += (
            " No NVIDIA GPU is seen here. To spare them, stop this (Ctrl-C), take the address of the index of CPU "
            "builds from https://pytorch.org/get-started/locally, and say: make … PIP_FLAGS='--extra-index-url ADDRESS'"
        )
    return text


def main() -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *sys.argv[1:], "torch"]
    command += ["--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode == 0:  # else the installation itself will tell what is wrong
        (torch,) = (item["metadata"] for item in json.loads(found.stdout)["install"])
        print(sentence(torch, os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi") is not None))


if __name__ == "__main__":
    main()
