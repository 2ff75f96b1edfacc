"""A model as a graph of PyTorch's own operators, from ids, numbers and lists to logits."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from embtables.datasets import Batch, Jagged

__all__ = ["export_graphs"]

PROGRAM, ONNX = "graph.pt2", "graph.onnx"
TOLERANCE = 1e-5


class Graph(nn.Module):
    """A model whose batch is written out: dense float32 [B, n], ids int64 [B, F], and of each list, in the order of
    ``names``, its values int64 [N] and offsets int64 [B + 1]. It returns logits [B]."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, dense: Tensor, ids: Tensor, lists: list[tuple[Tensor, Tensor]]) -> Tensor:
        named = {name: Jagged(*of) for name, of in zip(self.names, lists)}
        logits: Tensor = self.model(Batch(dense.new_zeros(dense.shape[0]), dense, ids, None, named))
        return logits


def export_graphs(model: nn.Module, batch: Batch, folder: Path) -> dict[str, str]:
    """Writes ``graph.pt2`` and ``graph.onnx``, for every batch size, and says what became of each.

    Args:
        model: in evaluation mode, on the CPU.
        batch: at least two examples, on which both are held against the model.
        folder: where to write.
    """
    names = list(batch.lists)
    graph = Graph(model, names).eval()
    size = Dim("batch")
    shapes = ({0: size}, {0: size}, [({0: Dim(f"values_{i}")}, {0: size + 1}) for i in range(len(names))])
    said = {}
    program: ExportedProgram | None = None

    def exported() -> Callable[..., Any]:
        nonlocal program
        with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
            program = torch.export.export(graph, _inputs(batch), dynamic_shapes=shapes)
        torch.export.save(program, folder / PROGRAM)
        return torch.export.load(folder / PROGRAM).module()

    def in_onnx() -> Callable[..., Any]:
        import onnxruntime

        assert program is not None
        inputs = ["dense", "ids", *(f"{name}_{part}" for name in names for part in ("values", "offsets"))]
        made = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=inputs, output_names=["logits"])
        assert made is not None
        made.save(folder / ONNX)
        session = onnxruntime.InferenceSession(folder / ONNX)
        taken = {place.name for place in session.get_inputs()}

        def run(dense: Tensor, ids: Tensor, lists: list[tuple[Tensor, Tensor]]) -> Tensor:
            given = dict(zip(inputs, (tensor.numpy() for tensor in (dense, ids, *(t for of in lists for t in of)))))
            return torch.from_numpy(session.run(None, {name: given[name] for name in taken})[0])

        return run

    for file, make in ((PROGRAM, exported), (ONNX, in_onnx)):
        try:
            with _quietly():
                difference = _difference(graph, make(), batch)
            if difference > TOLERANCE:
                raise ValueError(f"its logits differ by {difference:.1g}")
            said[file] = f"{file}: held against the model, logits differ by at most {difference:.1g}"
        except Exception as error:  # whatever an exporter meets in a model
            (folder / file).unlink(missing_ok=True)
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            said[file] = f"no {file}: the model cannot be exported so ({reason})"
            if program is None:
                said[ONNX] = f"no {ONNX}: it is made of {PROGRAM}"
                break
    return said


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters print pages about what they meet, of which the sentence of their error is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _inputs(batch: Batch) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    return batch.dense, batch.ids, [(of.values, of.offsets) for of in batch.lists.values()]


@torch.no_grad()
def _difference(graph: Graph, other: Callable[..., Tensor], batch: Batch) -> float:
    """The largest difference of logits, over batches of one example and of all."""
    inputs = _inputs(batch)
    first = [(values[: int(offsets[1])], offsets[:2]) for values, offsets in inputs[2]]
    return max(float((graph(*of) - other(*of)).abs().max()) for of in (inputs, (inputs[0][:1], inputs[1][:1], first)))
