"""Semantic segmentation: what makes the network see a shape, beside where the shape is.

    python examples/segmentation.py

A class is scored by its mean probability over the image; the labels of the pixels serve as masks.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import Shapes
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor


class UNet(pl.LightningModule):
    """One step down, one step up, and the fine features beside the coarse ones."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(16, 32, 5, 4, 2), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Conv2d(16 + 32, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        coarse = F.interpolate(self.coarse(fine), fine.shape[2:], mode="bilinear")
        return F.interpolate(self.head(torch.cat([fine, coarse], dim=1)), images.shape[2:])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 5e-3)


def main(epochs: int = 8, pictures: int = 600, output: Path = Path("runs/segmentation")) -> None:
    """Train a small network on generated images, watched."""
    pl.seed_everything(0)
    data = [Shapes(pictures, seed=0), Shapes(64, seed=1)]
    pixels = [d.masks * (d.labels + 1)[:, None, None] for d in data]  # 0 is the ground
    train, val = (TensorDataset(d.pictures, p) for d, p in zip(data, pixels, strict=True))
    monitor = ExplanationMonitor(class_names=["ground", *Shapes.classes])
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[monitor], default_root_dir=output)
    trainer.fit(UNet(4), DataLoader(train, 16, shuffle=True), DataLoader(val, 64))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
