"""A perturbation stage of your own: step by step, blur where that lowers the class score."""

from dataclasses import dataclass

import torch
from torch import nn

from lightning_aop import AOP, WGradCAM
from lightning_aop.model import explaining
from lightning_aop.ops import GaussianBlur, blend, resize
from lightning_aop.scores import softmax
from lightning_aop.types import CoarseMaps, Images, Maps, Targets


@dataclass(frozen=True)
class SignDescent:
    """Each step moves a cell by 0.1, against its gradient's sign; 2·`steps` evaluations per image."""

    steps: int = 5

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return how far each pixel is blurred in the end, [B, H, W] in [0, 1]."""
        height, width = images.shape[-2:]
        with explaining(model, images, targets) as (classifier, x, t):
            blurred, mask = GaussianBlur()(x), start.detach().clone().to(x)
            for _ in range(self.steps):
                keep = 1 - resize(mask.requires_grad_(), (height, width))
                score = classifier.scores(blend(x, blurred, keep), t, softmax)
                (gradient,) = torch.autograd.grad(score.sum(), mask)
                mask = (mask.detach() - 0.1 * gradient.sign()).clamp(0, 1)
            return resize(mask, (height, width))


method = AOP(WGradCAM(), SignDescent())
