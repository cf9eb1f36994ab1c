"""Binary classification in the style of X-rays: one grey channel, one logit, labels 0 and 1.

    python examples/binary_xray.py

Each image is explained for its own label: what speaks for a nodule where there is one, and against one
where there is none. Masks of the nodules are found by the dataset's `input_masks`.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import Chests, small_network
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_aop import ExplanationMonitor


class Radiologist(pl.LightningModule):
    """A small network that returns the logit of a nodule, [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network(1, channels=1)
        self.loss = nn.BCEWithLogitsLoss()

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return self.loss(self(images)[:, 0], labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def main(epochs: int = 6, pictures: int = 600, output: Path = Path("runs/binary_xray")) -> None:
    """Train a small network on generated images, watched."""
    pl.seed_everything(0)
    monitor = ExplanationMonitor()
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[monitor], default_root_dir=output)
    train, val = Chests(pictures, seed=0), Chests(64, seed=1)
    trainer.fit(Radiologist(), DataLoader(train, 32, shuffle=True), DataLoader(val, 64))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
