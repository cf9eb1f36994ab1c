"""A saliency method of your own: anything with `explain(model, images, targets)`.

    python examples/custom_method.py

It works in the monitor, in the metrics and by `class_path` in a configuration. Stages for AOP, a
metric and a logger of your own are in `extending/`.
"""

from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from common import Classifier, Shapes, loaders, small_network
from jsonargparse import auto_cli
from torch import nn

from lightning_aop import ExplanationMonitor, GradCAM
from lightning_aop.metrics import OverallAUC
from lightning_aop.model import explaining
from lightning_aop.ops import min_max
from lightning_aop.scores import logit
from lightning_aop.types import Images, Maps, Targets


@dataclass(frozen=True)
class GradientTimesInput:
    """|Σ_c x_c · ∂z/∂x_c|: what a small change of a pixel does, times the pixel; 2 evaluations."""

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return maps [B, H, W] in [0, 1]."""
        # Eval mode, gradients on, random state kept, checks made; all is as it was afterwards.
        with explaining(model, images, targets) as (classifier, x, t):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(classifier.scores(x, t, logit).sum(), x)
            return min_max((x * gradient).sum(dim=1).abs().detach())


def main(epochs: int = 6, pictures: int = 1200, output: Path = Path("runs/custom_method")) -> None:
    """Watch a training with it, and compare it with GradCAM on new images."""
    pl.seed_everything(0)
    model = Classifier(small_network())
    monitor = ExplanationMonitor(GradientTimesInput())
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[monitor], default_root_dir=output)
    trainer.fit(model, *loaders(pictures))
    test = Shapes(32, seed=2)
    for method in (GradientTimesInput(), GradCAM()):
        metric = OverallAUC(steps=28)
        maps = method.explain(model, test.pictures, test.labels)
        metric.update(model, test.pictures, maps, test.labels)
        print(f"{type(method).__name__:20} overall AUC {float(metric.compute()):.3f}")


if __name__ == "__main__":
    auto_cli(main)
