"""The examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def output(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_pytorch() -> None:
    text = output(
        "examples/plain_pytorch.py", "--rows", "20000", "--epochs", "1", "--method", "hash", "--budget", "10%"
    )
    (planned,) = re.findall(r"^inference ([\d,]+) B", text, re.M)
    (served, auc) = re.findall(r"served from its file: ([\d,]+) bytes, test AUC (0\.\d+)", text)[0]
    assert planned == served and float(auc) > 0.6


def test_own_model() -> None:
    text = output("examples/own_model.py")
    assert re.search(r"full tables: largest difference \d\.\de[-+]\d\d", text) and text.count("logits (256,)") == 3
