"""Blurred patches in training images, so that a model knows what deletion and insertion will show it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_aop.checks import require_counts
from lightning_aop.errors import InvalidTypeError, InvalidValueError
from lightning_aop.ops import Baseline, GaussianBlur
from lightning_aop.scores import full_precision

__all__ = ["RandomPatchBlur"]


class RandomPatchBlur(nn.Module):
    """A transform for training images: some cells of a grid are replaced by their blur.

    A network that has never seen half-blurred images loses score on them for that alone, whatever was
    blurred. One that was trained on them is judged in its own domain, as IDSDS and F-Fidelity ask for.
    It changes the model, and so what is explained: see the docs. Put it after the conversion to a
    tensor, beside other random transforms, and not into those of validation.

    Args:
        p: the chance that an image is changed.
        most: the largest share of the cells that is blurred; the share is drawn evenly from 0 to it.
        cells: along each side.
        baseline: what takes the place of a cell, that of the metrics by default.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self, p: float = 0.5, most: float = 0.5, cells: int = 8, baseline: Baseline | None = None
    ) -> None:
        super().__init__()
        for name, value in (("p", p), ("most", most)):
            if not 0 <= value <= 1:
                raise InvalidValueError(f"RandomPatchBlur: {name} must lie in [0, 1], got {value}")
        require_counts("RandomPatchBlur", cells=cells)
        self.p, self.most, self.cells = p, most, cells
        self.baseline = GaussianBlur() if baseline is None else baseline

    def forward(self, images: Tensor, *others: Any) -> Any:
        """Return an image [C, H, W], or images [B, C, H, W] with cells of their own, in their dtype.

        Args:
            images: the image, or a batch of them; a subclass of tensors is returned as one.
            others: what else a sample has, such as its label; it is handed on as it is.

        Returns:
            The image, or a tuple of it and the others where there are some, as in `v2.Compose`.

        Raises:
            TypeError: it is no tensor.
            ValueError: it has another shape.
        """
        if not isinstance(images, Tensor):
            raise InvalidTypeError(
                f"RandomPatchBlur takes tensors, got {type(images).__name__}: put it after ToTensor() "
                "or v2.ToImage()"
            )
        if images.ndim not in (3, 4):
            raise InvalidValueError(
                f"RandomPatchBlur takes [C, H, W] or [B, C, H, W], got {list(images.shape)}: call it on "
                "an image, or on a batch of them"
            )
        changed = self._changed(images)
        return (changed, *others) if others else changed

    def _changed(self, images: Tensor) -> Tensor:
        batch = images.reshape(-1, *images.shape[-3:]).as_subclass(Tensor)
        count, size = len(batch), (batch.shape[2], batch.shape[3])
        # All is drawn for every image, so that as much comes off the random stream for any outcome.
        chosen, share = torch.rand(2, count)
        order = torch.rand(count, self.cells**2).argsort(dim=1).argsort(dim=1)
        number = (share * self.most * self.cells**2).round() * (chosen < self.p)
        grid = (order < number[:, None]).view(count, 1, self.cells, self.cells)
        if not bool(grid.any()):
            return images
        hidden = F.interpolate(grid.float(), size=size, mode="nearest").bool().to(batch.device)
        floating = batch.is_floating_point()
        blurred = self.baseline(full_precision(batch if floating else batch.float()))
        blurred = (blurred if floating else blurred.round()).to(batch.dtype)
        changed = torch.where(hidden, blurred, batch).view(images.shape)
        if type(images) is not Tensor:  # such as torchvision's Image, with what hangs on it
            changed = changed.as_subclass(type(images))
            vars(changed).update(vars(images))
        return changed

    def extra_repr(self) -> str:
        """Return the settings for the module's description."""
        return f"p={self.p}, most={self.most}, cells={self.cells}, baseline={self.baseline}"
