"""A metric of your own: what the class loses when only the hot part of the image is kept."""

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_aop import ExplanationMonitor
from lightning_aop.model import predict
from lightning_aop.ops import GaussianBlur, blend
from lightning_aop.scores import softmax
from lightning_aop.types import Images, Maps, Targets


class AverageDrop(Metric):
    """Mean of max(0, before − after) / before (Chattopadhyay et al. 2018); 2 evaluations per image."""

    drops: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("drops", [], dist_reduce_fx="cat")

    def update(self, model: nn.Module, images: Images, maps: Maps, targets: Targets) -> None:
        """Judge a batch of maps [B, H, W] in [0, 1]."""
        heat = blend(images, GaussianBlur()(images), maps)
        before, after = (softmax(predict(model, x), targets) for x in (images, heat))
        self.drops.append((before - after).relu() / before)

    def compute(self) -> Tensor:
        """Return the mean over all images so far."""
        return torch.cat(self.drops).mean()


monitor = ExplanationMonitor(metrics=AverageDrop())  # logs explain/average_drop
