"""Gradients through a model that computes in float16, whose smallest number is 6e-8.

The gradient of a probability of 0.005, shared out over the cells of a feature map, is less than that.
As a `GradScaler` does for a loss, it is raised where it enters the model and lowered where it leaves it,
here for each image by the size of its own: a faint class has as exact a map as a sure one.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from lightning_aop.types import Images

# The largest gradient of an image's logits. Of float16's 12 decades this leaves 9 below it for the cells
# of large feature maps, and 3 above it for a head that multiplies by 100.
_RAISED = 64.0


def in_float16(model: nn.Module, device: str) -> bool:
    """Tell whether a model computes in float16, as its parameters or autocast around it have it."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return True
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return dtype == torch.float16


class Raise:
    """By how much the gradients of one pass are raised.

    Attributes:
        factor: of each image, once its backward has begun; None before, or if nothing is raised.
    """

    def __init__(self) -> None:
        self.factor: Float[Tensor, " b"] | None = None

    def entering(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Return the logits, whose gradient will be raised."""
        raised: Tensor = _Entering.apply(logits, self)
        return raised

    def leaving(self, images: Images) -> Images:
        """Return the images, whose gradient will be lowered again."""
        lowered: Tensor = _Leaving.apply(images, self)
        return lowered

    def lowered(self, gradient: Float[Tensor, "b *more"]) -> Float[Tensor, "b *more"]:
        """Return a gradient of some of the model's values, one row an image, as it truly is."""
        if self.factor is None:
            return gradient
        return gradient / self.factor.view(-1, *[1] * (gradient.ndim - 1))


class _Entering(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, by: Raise) -> Tensor:
        ctx.by = by
        return logits.clone()  # of a view autograd forbids what is done in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # So small a gradient that its factor would be infinite is left as small.
        largest = gradient.abs().amax(dim=1).clamp_min(1e-30)
        ctx.by.factor = _RAISED / largest
        return gradient * ctx.by.factor[:, None], None


class _Leaving(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, by: Raise) -> Tensor:
        ctx.by = by
        return images.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.by.lowered(gradient), None
