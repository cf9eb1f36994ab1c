"""The work that `peers.py` measures: in each race, ours first and then that of the other tools."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import published_loops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_aop import AOP, Blank, GradCAM, fast_sigcam, sigcam
from lightning_aop.methods.cam import LayerCAM, XGradCAM
from lightning_aop.methods.igos import IGOS
from lightning_aop.methods.rise import RISE
from lightning_aop.methods.superpixels import superpixels
from lightning_aop.methods.xrai import XRAI
from lightning_aop.metrics.functional import deletion_curve, deletion_insertion_curves
from lightning_aop.ops import Constant, min_max

OURS = "lightning_aop"
STEPS = 28  # of a curve


@dataclass
class Batch:
    """What all tools are given."""

    model: nn.Module
    layer: str
    images: Tensor
    targets: Tensor

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.model.get_submodule(self.layer)

    def first(self, count: int) -> "Batch":
        """Return the same with fewer pictures."""
        return Batch(self.model, self.layer, self.images[:count], self.targets[:count])

    def ramp(self) -> Tensor:
        """Return a map of noise for each picture, which puts the pixels in some order."""
        size = len(self.images), *self.images.shape[2:]
        noise = torch.rand(size, generator=torch.Generator().manual_seed(0))
        return noise.to(self.images.device)


@dataclass
class Race:
    """The work of each tool, ours first.

    Attributes:
        tools: by name.
        pictures: how many are explained.
        allowed: a tool whose result differs by more is not timed. Infinite where rounding may decide a
            comparison and with it the rest of the way; then the difference is only told.
    """

    tools: dict[str, Callable[[], Tensor]]
    pictures: int
    allowed: float = 0.01


def races(batch: Batch, few: int) -> dict[str, Race]:
    """Return the races; `few` pictures are taken for the methods that need hundreds of evaluations."""
    model, images, targets = batch.model, batch.images, batch.targets
    small = batch.first(few)
    least = small.images, small.targets
    ramp = batch.ramp()
    ours = {"GradCAM": GradCAM, "XGradCAM": XGradCAM, "LayerCAM": LayerCAM}
    found: dict[str, Race] = {}
    for name, method in ours.items():
        tools: dict[str, Callable[[], Tensor]] = {
            OURS: lambda method=method: method(batch.layer).explain(model, images, targets),  # type: ignore[misc]
            "grad-cam": lambda name=name: _grad_cam(batch, name),  # type: ignore[misc]
        }
        if name == "GradCAM":
            tools |= {"captum": lambda: _captum(batch), "torchcam": lambda: _torchcam(batch)}
        found[name] = Race(tools, len(images))
    found["deletion curve"] = Race(
        {
            OURS: lambda: deletion_curve(
                model, images, ramp, targets, baseline=Constant(0.0), steps=STEPS
            )[:, 1:],
            "quantus": lambda: _quantus(batch, ramp),
        },
        len(images),
    )
    found["both curves"] = Race({OURS: lambda: both_curves(batch, ramp)}, len(images))
    found["RISE, 256 masks"] = Race(
        {
            OURS: lambda: RISE(masks=256).explain(model, *least),
            "published loop": lambda: min_max(published_loops.rise(model, *least, masks=256)),
        },
        few,
    )
    found["I-GOS"] = Race(
        {
            OURS: lambda: AOP(Blank(), IGOS()).explain(model, *least),
            "published loop": lambda: min_max(published_loops.igos(model, *least)),
        },
        few,
        math.inf,
    )
    xrai = XRAI(steps=25)
    found["XRAI, 25 steps"] = Race(
        {
            OURS: lambda: xrai.explain(model, *least),
            "saliency": lambda: _saliency(small, xrai),
        },
        few,
        0.1,  # float32 decides between segments of about equal worth
    )
    found["sigcam()"] = Race({OURS: lambda: sigcam(batch.layer).explain(model, *least)}, few)
    found["fast_sigcam()"] = Race(
        {OURS: lambda: fast_sigcam(batch.layer).explain(model, images, targets)}, len(images)
    )
    return found


def both_curves(batch: Batch, maps: Tensor, eval_batch_size: int | None = None) -> Tensor:
    """Return deletion and insertion side by side."""
    curves = deletion_insertion_curves(
        batch.model,
        batch.images,
        maps,
        batch.targets,
        steps=STEPS,
        eval_batch_size=eval_batch_size,
    )
    return torch.cat(curves, dim=1)


def _grad_cam(batch: Batch, name: str) -> Tensor:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with getattr(pytorch_grad_cam, name)(model=batch.model, target_layers=[batch.module]) as cam:
        chosen = [ClassifierOutputTarget(int(t)) for t in batch.targets]
        return torch.from_numpy(cam(input_tensor=batch.images, targets=chosen))


def _captum(batch: Batch) -> Tensor:
    from captum.attr import LayerAttribution, LayerGradCam

    maps = LayerGradCam(batch.model, batch.module).attribute(
        batch.images, batch.targets, relu_attributions=True
    )
    size = tuple(batch.images.shape[2:])
    large = LayerAttribution.interpolate(maps, size, interpolate_mode="bilinear")
    return min_max(large[:, 0].detach())


def _torchcam(batch: Batch) -> Tensor:
    from torchcam.methods import GradCAM as Peer

    with Peer(batch.model, batch.layer) as cam:
        scores = batch.model(batch.images.clone().requires_grad_())
        (maps,) = cam(batch.targets.tolist(), scores)
    large = F.interpolate(maps.detach()[:, None], batch.images.shape[2:], mode="bilinear")
    return min_max(large[:, 0])


def _quantus(batch: Batch, maps: Tensor) -> Tensor:
    import quantus

    # It moves the values of the three channels one by one: a third of a step for each of ours.
    height, width = batch.images.shape[2:]
    metric = quantus.PixelFlipping(
        features_in_step=height * width // STEPS,
        perturb_baseline=0.0,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    curves = metric(
        model=batch.model,
        x_batch=batch.images.cpu().numpy(),
        y_batch=batch.targets.cpu().numpy(),
        a_batch=maps[:, None].cpu().numpy(),
        softmax=True,
        device=str(batch.images.device),
        batch_size=len(batch.images),
    )
    return torch.tensor(curves)[:, 2::3]


def _saliency(batch: Batch, method: XRAI) -> Tensor:
    """Explain one picture after the other, as the package does, with our superpixels."""
    from saliency.core import xrai

    maps = []
    for image, target in zip(batch.images, batch.targets.tolist(), strict=True):

        def call(points: np.ndarray, target: int = target, **_: Any) -> dict[str, np.ndarray]:
            inputs = torch.from_numpy(points).movedim(-1, 1).to(batch.images).requires_grad_()
            score = batch.model(inputs).softmax(dim=1)[:, target].sum()
            (gradients,) = torch.autograd.grad(score, inputs)
            return {"INPUT_OUTPUT_GRADIENTS": gradients.movedim(1, -1).cpu().numpy()}

        pixels = image.movedim(0, -1).cpu().numpy()
        scales = superpixels(pixels, method.segments)
        merged = xrai.XRAI().GetMask(
            pixels,
            call,
            segments=[labels == label for labels in scales for label in np.unique(labels)],
            extra_parameters=xrai.XRAIParameters(steps=method.steps),
            batch_size=method.eval_batch_size,
        )
        maps.append(torch.from_numpy(merged))
    return min_max(torch.stack(maps))
