"""What the examples share: generated images and a small network. Your project has its own."""

from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.ops import masks_to_boxes


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


class BoxedShapes(Shapes):
    """The same pictures, each with the box and the class of its shape, as detectors take them."""

    def __getitem__(self, index: int) -> Any:
        box = masks_to_boxes(self.masks[[index]])
        return self.pictures[index], {"boxes": box, "labels": self.labels[[index]]}


class Chests(Dataset[tuple[Tensor, Tensor]]):
    """Grey images [1, 64, 64] in the style of X-rays: two lungs, in every second one a nodule."""

    classes = ("clear", "nodule")

    def __init__(self, count: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        self.lungs = ((x - 32).abs() - 14) ** 2 / 80 + (y - 32) ** 2 / 500 < 1
        side = 32 + 14 * torch.randn(count, 1, 1, generator=g).sign()
        height = 18 + 28 * torch.rand(count, 1, 1, generator=g)
        self.nodules = (x - side) ** 2 + (y - height) ** 2 < 25
        self.labels = (torch.arange(count) % 2).float()
        haze = F.interpolate(torch.randn(count, 1, 9, 9, generator=g), 64, mode="bicubic")[:, 0]
        films = 0.7 - 0.45 * self.lungs + 0.08 * haze
        films += 0.25 * self.nodules * self.labels[:, None, None]
        self.films = films.clamp(0, 1)[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.films[index], self.labels[index]

    def input_masks(self, index: int, classes: Sequence[int]) -> Tensor:
        """Return where a nodule is, or where one would be, bool [len(classes), H, W]."""
        return torch.stack([self.nodules[index] if c == 1 else self.lungs for c in classes])


def small_network(classes: int = 3, channels: int = 3) -> nn.Sequential:
    """Return a network of four convolutions that learns the shapes in a few epochs."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 16), (16, 32), (32, 64), (64, 64)):
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
