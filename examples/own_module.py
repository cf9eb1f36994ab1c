"""The monitor in a LightningModule of your own: dictionaries as batches, normalised images.

    python examples/own_module.py

Batches may be dictionaries: images and labels are read from their usual names ("image", "label",
"pixel_values", …). All the monitor asks of the module is that `forward(images)` returns logits.
"""

from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
from common import Shapes
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_aop import ExplanationMonitor, fast_sigcam

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Normalised(Dataset[dict[str, Any]]):
    """The images as this network takes them."""

    def __init__(self, data: Shapes) -> None:
        self.data, self.input_masks = data, data.input_masks

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return {"image": (image - 0.5) / 0.25, "label": label}


class Net(pl.LightningModule):
    """A ResNet18 whose embedding is trained, too: forward gives the logits only."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18(weights=None)
        self.backbone.fc = torch.nn.Identity()
        self.head = torch.nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return cast("Tensor", self.head(self.backbone(images)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        embedding = self.backbone(batch["image"])
        loss = F.cross_entropy(self.head(embedding), batch["label"])
        return loss + torch.mean(1e-4 * embedding**2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main(epochs: int = 2, pictures: int = 600, output: Path = Path("runs/own_module")) -> None:
    """Train without any validation: the monitor then explains training images, every 10 steps."""
    pl.seed_everything(0)
    monitor = ExplanationMonitor(
        fast_sigcam("backbone.layer3", iterations=4),  # a finer layer than the last
        probe=4,
        every_n_train_steps=10,
        panels=["overlay", "curves"],
        class_names=Shapes.classes,
        mean=MEAN,
        std=STD,
    )
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[monitor], default_root_dir=output)
    trainer.fit(Net(3), DataLoader(Normalised(Shapes(pictures)), 32, shuffle=True))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
