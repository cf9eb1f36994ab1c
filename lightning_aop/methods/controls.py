"""Maps that know nothing of the model, to judge the others by.

A method that is not clearly better than these has not been shown to explain anything: on photographs
the centre alone scores well, and edges look convincing. None of them evaluates the model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lightning_aop.checks import check_batch, require_positive
from lightning_aop.ops import min_max
from lightning_aop.scores import full_precision
from lightning_aop.types import Images, Maps, Targets


@dataclass(frozen=True)
class RandomMap:
    """Uniform noise, the same for every image: its overall AUC is that of chance.

    Attributes:
        seed: one seed gives one answer.
    """

    seed: int = 0

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 0

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return noise [B, H, W] in [0, 1]."""
        check_batch(images, targets)
        generator = torch.Generator().manual_seed(self.seed)  # the CPU's, to be the same everywhere
        noise = torch.rand(images.shape[2:], generator=generator).to(images.device)
        return noise.repeat(len(images), 1, 1)


@dataclass(frozen=True)
class CentreGaussian:
    """A gaussian in the middle of the image, where photographers put their objects.

    Attributes:
        sigma: standard deviation along each side, as a share of that side.
    """

    sigma: float = 0.25

    def __post_init__(self) -> None:
        require_positive("CentreGaussian", sigma=self.sigma)

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 0

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return exp(−d²/2σ²) [B, H, W], min-max normalised to [0, 1]."""
        check_batch(images, targets)
        rows, columns = (
            torch.linspace(-0.5 + 0.5 / n, 0.5 - 0.5 / n, n, device=images.device).square()
            for n in images.shape[2:]
        )
        gaussian = torch.exp(-(rows[:, None] + columns) / (2 * self.sigma**2))
        return min_max(gaussian[None]).repeat(len(images), 1, 1)


@dataclass(frozen=True)
class EdgeDetector:
    """The magnitude of the image's gradient, by Sobel's filter (Adebayo et al. 2018 compare with it).

    Of the mean of the channels; the border repeats the outermost pixels.
    """

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 0

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return √(∂x² + ∂y²) [B, H, W], each map min-max normalised to [0, 1]."""
        check_batch(images, targets)
        grey = full_precision(images.detach()).mean(dim=1, keepdim=True)
        sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(grey)
        kernels = torch.stack([sobel, sobel.T])[:, None]
        with torch.autocast(images.device.type, enabled=False):
            slopes = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
        return min_max(slopes.square().sum(dim=1).sqrt())
