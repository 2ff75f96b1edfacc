"""The server of examples/ as a client over HTTP meets it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embtables.datasets import PreparedDataset
from embtables.training import Predictor, Trainer, load_config, save_bundle

ROOT = Path(__file__).resolve().parents[2]
httpx = pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("fastapi", reason="needs fastapi")
pytest.importorskip("uvicorn", reason="needs uvicorn")


@pytest.fixture(scope="module")
def bundle(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    Trainer(load_config(flags={"training.epochs": 1}), PreparedDataset(data), folder / "run").run()
    save_bundle(folder / "run", PreparedDataset(data), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    """Of a server that waits long enough for requests to meet; the system chooses its port, which it tells."""
    command = [sys.executable, "examples/serve_fastapi.py", str(bundle), "--port", "0", "--milliseconds", "1000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = ""
        try:
            for line in server.stderr:
                said += line
                if "running on " in line:
                    yield line.split("running on ")[1].split()[0]
                    break
            else:
                raise AssertionError(said)
        finally:
            server.terminate()


def rows_of(seed: int, size: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [{"feature_0": int(a), "feature_1": int(b)} for a, b in generator.integers(0, 50, (size, 2))]


def test_health(address: str) -> None:
    found = httpx.get(f"{address}/health")
    assert found.status_code == 200
    assert found.json() == {"status": "ok", "columns": ["feature_0", "feature_1"], "batches": 0}


def test_requests_are_scored_together_and_each_gets_its_own(address: str, bundle: Path) -> None:
    """A bad one among them is told so, and the others have their scores."""
    requests = [rows_of(seed, seed + 1) for seed in range(8)]
    bad: list[Any] = [[{"feature_0": 1}], [{"feature_0": [1], "feature_1": 2}], [{"feature_0": 1.5, "feature_1": 2}]]

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            asked = [client.post("/predict", json={"rows": rows}) for rows in [*requests, *bad]]
            return await asyncio.gather(*asked)

    before = httpx.get(f"{address}/health").json()["batches"]
    answers = asyncio.run(ask())
    assert httpx.get(f"{address}/health").json()["batches"] - before < len(requests) // 2
    predictor = Predictor.load(bundle)
    for rows, answer in zip(requests, answers):
        assert answer.status_code == 200
        np.testing.assert_allclose(answer.json()["scores"], predictor.predict(rows), rtol=1e-5)
    assert [answer.status_code for answer in answers[8:]] == [422, 422, 422]
    told = [answer.json()["detail"] for answer in answers[8:]]
    assert told[0] == "the rows: no column feature_1, which the model needs"
    assert "column 'feature_0' is of type List(Int64)" in told[1]
    assert "column 'feature_0' is of type Float64, where the training had none" in told[2]


@pytest.mark.parametrize("content", [{"rows": []}, {"rows": [1]}, {"row": []}, []])
def test_what_is_no_request(address: str, content: Any) -> None:
    assert httpx.post(f"{address}/predict", json=content).status_code == 422
