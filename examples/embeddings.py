"""Metric learning: what makes an image's embedding similar to those of its class.

    python examples/embeddings.py

The network returns an embedding [B, D] and no classes, so `logits=` says what is explained: here the
cosine similarity to a learned proxy of each class. Any other similarity goes in the same way.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import loaders, small_network
from jsonargparse import auto_cli
from torch import Tensor, nn

from lightning_aop import ExplanationMonitor


class MetricLearner(pl.LightningModule):
    """Embeddings [B, 16] that are pulled to the proxy of their class."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network(16)
        self.proxies = nn.Parameter(torch.randn(3, 16))

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def similarities(self, images: Tensor) -> Tensor:
        """Return 10 times the cosine similarity to each class, [B, 3]."""
        return 10 * F.normalize(self(images)) @ F.normalize(self.proxies).T

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.similarities(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def main(epochs: int = 6, pictures: int = 1200, output: Path = Path("runs/embeddings")) -> None:
    """Train a small network on generated images, watched."""
    pl.seed_everything(0)
    monitor = ExplanationMonitor(logits=MetricLearner.similarities)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[monitor], default_root_dir=output)
    trainer.fit(MetricLearner(), *loaders(pictures))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
