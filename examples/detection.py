"""Object detection with a model of torchvision: what makes it draw a box of a class.

    python examples/detection.py

In eval mode it returns boxes with labels and scores: a class is scored by its best box.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import BoxedShapes, small_network
from jsonargparse import auto_cli
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from lightning_aop import ExplanationMonitor


class Detector(pl.LightningModule):
    """FCOS on a few convolutions, for images of 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        backbone = small_network()[:-3]  # without its head
        backbone.out_channels = 64  # type: ignore[assignment]
        anchors, head = AnchorGenerator(((8,),), ((1.0,),)), FCOSHead(64, 1, 3, num_convs=1)
        self.network = FCOS(backbone, 3, 64, 64, anchor_generator=anchors, head=head)

    def forward(self, images: Any, targets: Any = None) -> Any:
        return self.network(images, targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(self(*batch).values())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/boxes", float(len(self(batch[0])[0]["boxes"])), batch_size=1, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-3)


def main(epochs: int = 6, pictures: int = 600, output: Path = Path("runs/detection")) -> None:
    """Train a small detector on generated images, watched."""
    pl.seed_everything(0)
    monitor = ExplanationMonitor(probe=4)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[monitor], default_root_dir=output)
    loader = partial(DataLoader, batch_size=16, collate_fn=lambda b: tuple(zip(*b, strict=True)))
    train = loader(BoxedShapes(pictures, seed=0), shuffle=True)
    trainer.fit(Detector(), train, loader(BoxedShapes(16, seed=1)))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
