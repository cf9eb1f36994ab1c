"""What perturbation methods share: the class score of an image seen through a mask."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.model.adapter import Classifier
from lightning_aop.model.passes import pass_size
from lightning_aop.ops import blend, resize
from lightning_aop.scores import Score
from lightning_aop.types import CoarseMaps, Images, Targets


@dataclass(frozen=True)
class PerturbedScore:
    """F_c(Φ(M)) of a batch against one baseline, evaluated in chunks."""

    classifier: Classifier
    images: Images
    baseline: Images
    targets: Targets
    score: Score
    eval_batch_size: int | None

    def at(
        self,
        keep: Float[Tensor, "a h w"],
        rows: Int[Tensor, " a"],
        noisy: Callable[[Images], Images] | None = None,
    ) -> Float[Tensor, " a"]:
        """Return the score of images[rows] seen through the masks `keep`, differentiable.

        `noisy` adds noise to the perturbed images.
        """
        perturbed = blend(self.images[rows], self.baseline[rows], keep)
        if noisy is not None:
            perturbed = noisy(perturbed)
        return self.classifier.scores(perturbed, self.targets[rows], self.score)

    def values(self, keep: Float[Tensor, "a h w"], rows: Int[Tensor, " a"]) -> Float[Tensor, " a"]:
        """Return the same without a graph, in chunks."""
        size = pass_size(self.eval_batch_size)
        with torch.no_grad():
            parts = zip(keep.split(size), rows.split(size), strict=True)
            return torch.cat([self.at(masks, part) for masks, part in parts])


def upsampled(
    mask: Float[Tensor, "a i j"], images: Images, align_corners: bool
) -> Float[Tensor, "a h w"]:
    """Return the masks at the size of the images."""
    return resize(mask, (images.shape[-2], images.shape[-1]), align_corners)


def starting_mask(
    start: CoarseMaps, images: Images, mask_size: int, align_corners: bool
) -> Float[Tensor, "b n n"]:
    """Return M0 = 1 − start on the mask's grid."""
    if start.ndim != 3 or len(start) != len(images):
        raise InvalidValueError(
            f"start must hold one map [h, w] for each of the {len(images)} images, got shape "
            f"{list(start.shape)}"
        )
    # Out of inference mode, where the caller may have made it.
    start = start.detach().clone().to(images)
    return 1 - resize(start, (mask_size, mask_size), align_corners).clamp(0, 1)
