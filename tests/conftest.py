"""Small real networks, and the switch that lets bad shapes through to our own messages."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(min(2, os.cpu_count() or 1))


class SmallNet(nn.Module):
    """Convolutions, BatchNorm, in-place ReLU, dropout, global pooling and a linear head."""

    def __init__(self, classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.features(images).mean(dim=(2, 3))
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 40, 32, generator=generator), torch.tensor([0, 3, 1, 4])


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the shape checks off, as they are outside of tests, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real photos and weights, where LIGHTNING_AOP_DATA names one."""
    folder = os.environ.get("LIGHTNING_AOP_DATA")
    if not folder:
        pytest.skip("LIGHTNING_AOP_DATA names no folder of real photos and weights")
    return Path(folder)
