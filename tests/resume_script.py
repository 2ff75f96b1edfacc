"""Trains compressed models by frameworks and their own checkpoints: FOLDER begin|resume FRAMEWORKS OPTIMIZERS

``begin`` trains two epochs, writes a checkpoint, and trains other objects for four; ``resume`` goes on from the
checkpoint for two. The state dicts that come of it are left in the folder, in one for each framework. The names of
frameworks and optimizers stand between commas.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from embtables import compress_


class Model(nn.Module):
    """A click model whose two tables share their storage."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.item, self.city = nn.Embedding(60, 8), nn.Embedding(40, 8)
        self.head = nn.Linear(16, 1)
        compress_(self, "hash", "50%", optimizer=optimizer)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cat([self.item(ids[:, 0]), self.city(ids[:, 1])], 1)).squeeze(1)


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(40, (64, 2), generator=generator)
    return DataLoader(TensorDataset(ids, (ids.sum(1) % 2).float()), batch_size=16)


def with_lightning(folder: Path, optimizer: str, begin: int, end: int, path: Path) -> nn.Module:
    import pytorch_lightning as pl

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(optimizer)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameters(), lr=0.01)

    module = Module()
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = pl.Trainer(max_epochs=end, accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(module, batches(), ckpt_path=str(path) if begin else None, weights_only=True)
    trainer.save_checkpoint(path)
    return module.model


def with_accelerate(folder: Path, optimizer: str, begin: int, end: int, path: Path) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Model(optimizer)
    model, dense, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01), batches())
    if begin:
        accelerator.load_state(str(path))
    for _ in range(begin, end):
        for ids, labels in loader:
            loss = nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
            dense.zero_grad()
            accelerator.backward(loss)
            dense.step()
    accelerator.save_state(str(path))
    return accelerator.unwrap_model(model)


FRAMEWORKS: dict[str, Callable[[Path, str, int, int, Path], nn.Module]] = {
    "pytorch_lightning": with_lightning,
    "accelerate": with_accelerate,
}


def main(out: str, how: str, frameworks: str, optimizers: str) -> None:
    warnings.simplefilter("ignore")
    for framework, optimizer in product(frameworks.split(","), optimizers.split(",")):
        folder, train = Path(out) / framework, FRAMEWORKS[framework]
        folder.mkdir(exist_ok=True)
        kept = folder / f"{optimizer}.ckpt"
        runs = {"half": (0, 2, kept), "straight": (0, 4, folder / "not-used.ckpt")}
        if how == "resume":
            runs = {"resumed": (2, 4, kept)}
        for name, (begin, end, path) in runs.items():
            torch.manual_seed(5 if begin == 0 else 6)
            model = train(folder, optimizer, begin, end, path)
            torch.save(model.state_dict(), folder / f"{optimizer}-{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
