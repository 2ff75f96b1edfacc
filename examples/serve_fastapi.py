"""Scores of raw rows over HTTP, by a bundle.

    pip install fastapi uvicorn
    embtables bundle runs/clicks data/clicks bundles/clicks
    python examples/serve_fastapi.py bundles/clicks --port 8000

    curl localhost:8000/health
    curl localhost:8000/predict -H 'content-type: application/json' \
        -d '{"rows": [{"user": "u17", "item": 4, "device": null}]}'

Requests that arrive within a few milliseconds of each other are scored together, which is what a model is quick at. A
request that cannot be scored is answered with 422 and the sentence that says why, and spoils no other.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from embtables.training import Predictor

Row = dict[str, Any]


class Request(BaseModel):
    rows: list[Row] = Field(min_length=1, max_length=10_000)


class Batcher:
    """Scores the rows of several requests at once.

    Args:
        predictor: what scores them.
        most_rows: at which number of rows no further request is waited for.
        seconds: how long a request waits for others.
        most_waiting: more requests than these are turned away.
    """

    def __init__(self, predictor: Predictor, most_rows: int, seconds: float, most_waiting: int = 1000) -> None:
        self.predictor, self.most_rows, self.seconds = predictor, most_rows, seconds
        self.waiting: asyncio.Queue[tuple[list[Row], asyncio.Future[list[float]]]] = asyncio.Queue(most_waiting)
        self.num_batches = 0

    async def score(self, rows: list[Row]) -> list[float]:
        """The score of each row. Raises ValueError as ``Predictor.predict``, asyncio.QueueFull where too many wait."""
        # Beside another request's rows a column that these lack would pass for missing values.
        missing = [name for name in self.predictor.columns if not any(name in row for row in rows)]
        if missing:
            raise ValueError(f"the rows: no column {', '.join(missing)}, which the model needs")
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((rows, answer))
        return await answer

    async def work(self) -> None:
        """Answers requests for as long as the server runs."""
        while True:
            requests = [await self.waiting.get()]
            until = asyncio.get_running_loop().time() + self.seconds
            while sum(len(rows) for rows, _ in requests) < self.most_rows:
                try:
                    left = until - asyncio.get_running_loop().time()
                    requests.append(await asyncio.wait_for(self.waiting.get(), left))
                except asyncio.TimeoutError:
                    break
            self.num_batches += 1
            try:
                await self.answer(requests)
            except ValueError:  # of one of them: each by itself, so that the others have their scores
                for request in requests:
                    try:
                        await self.answer([request])
                    except Exception as error:
                        _fail([request], error)
            except Exception as error:
                _fail(requests, error)

    async def answer(self, requests: list[tuple[list[Row], asyncio.Future[list[float]]]]) -> None:
        scores = await asyncio.to_thread(self.predictor.predict, [row for rows, _ in requests for row in rows])
        start = 0
        for rows, answer in requests:
            if not answer.done():  # the client may have gone
                answer.set_result(scores[start : start + len(rows)].tolist())
            start += len(rows)


def _fail(requests: list[tuple[list[Row], asyncio.Future[list[float]]]], error: Exception) -> None:
    for _, answer in requests:
        if not answer.done():
            answer.set_exception(error)


def make_app(bundle: str, most_rows: int = 4096, milliseconds: float = 2.0) -> FastAPI:
    """The application; it is healthy once the bundle is loaded."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = Batcher(Predictor.load(bundle), most_rows, milliseconds / 1000)
        app.state.batcher = batcher
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()

    app = FastAPI(title="embtables", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        batcher: Batcher = app.state.batcher
        return {"status": "ok", "columns": batcher.predictor.columns, "batches": batcher.num_batches}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, list[float]]:
        try:
            return {"scores": await app.state.batcher.score(request.rows)}
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests wait", {"retry-after": "1"}) from None

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--most-rows", type=int, default=4096)
    parser.add_argument("--milliseconds", type=float, default=2.0, help="How long a request waits for others.")
    options = parser.parse_args()
    uvicorn.run(make_app(options.bundle, options.most_rows, options.milliseconds), host=options.host, port=options.port)
