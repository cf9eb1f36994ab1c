"""What the examples share: generated images and a small network. Your project has its own."""

from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy


class Shapes(Dataset[tuple[Tensor, int]]):
    """Pictures [3, size, size] in [0, 1] of one shape each, in any colour on any ground."""

    classes = ("disc", "square", "cross")

    def __init__(self, count: int, seed: int = 0, size: int = 64, noise: float = 0.1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 3, (count,), generator=g)
        radius = size * (0.14 + 0.1 * torch.rand(count, 1, 1, generator=g))
        centre = radius[..., None] + (size - 2 * radius[..., None]) * torch.rand(
            count, 1, 1, 2, generator=g
        )
        places = torch.stack(
            torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), dim=-1
        )
        y, x = ((places - centre).abs() / radius[..., None]).unbind(dim=-1)
        kinds = [
            y**2 + x**2 < 1,
            (y < 0.85) & (x < 0.85),
            (y < 1) & (x < 1) & ((y < 0.33) | (x < 0.33)),
        ]
        self.masks = torch.stack(kinds)[self.labels, torch.arange(count)]
        ground = torch.rand(count, 3, 5, 5, generator=g)
        ground = 0.5 + 0.4 * (F.interpolate(ground, size, mode="bicubic") - 0.5)
        colours = 0.5 + 0.4 * torch.randn(count, 3, 1, 1, generator=g).sign()
        pictures = torch.where(self.masks[:, None], colours, ground)
        self.pictures = (pictures + noise * torch.randn(pictures.shape, generator=g)).clamp(0, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pictures[index], int(self.labels[index])

    def input_masks(self, index: int, classes: Sequence[int]) -> Tensor:
        """Return where the classes are, bool [len(classes), H, W]; the monitor looks for this."""
        mask, label = self.masks[index], int(self.labels[index])
        return torch.stack([mask & (c == label) for c in classes])


def small_network(classes: int = 3) -> nn.Module:
    """Return a network of four convolutions that learns the shapes in a few epochs."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 64)):
        layers += [
            nn.Conv2d(
                inputs, outputs, 3, stride=2 if outputs < 64 or inputs < 64 else 1, padding=1
            ),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, classes))


class Classifier(pl.LightningModule):
    """Any network from images to logits, trained with cross-entropy."""

    def __init__(self, network: nn.Module, classes: int = 3, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return cast("Tensor", self.network(images))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Judge a batch."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def loaders(pictures: int = 1200, **settings: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return a loader to train with, and one to validate with."""
    train = Shapes(pictures, seed=0, **settings)
    val = Shapes(max(pictures // 4, 16), seed=1, **settings)
    return DataLoader(train, 32, shuffle=True), DataLoader(val, 64)
