"""What perturbation methods share: the class score of an image seen through a mask."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.model.adapter import Classifier
from lightning_aop.model.graphs import Work
from lightning_aop.model.passes import slices
from lightning_aop.ops import blend, resize
from lightning_aop.scores import Score
from lightning_aop.types import CoarseMaps, Images, Targets


@dataclass(frozen=True)
class PerturbedScore:
    """F_c(Φ(M)) of a batch against one baseline, evaluated in chunks.

    Attributes:
        times: how often `values` will be asked, about.
    """

    classifier: Classifier
    images: Images
    baseline: Images
    targets: Targets
    score: Score
    eval_batch_size: int | None
    times: int = 1

    def size(self, rows: int, rounds: int = 1) -> int:
        """Return how many of so many perturbed images, a round, go through the model in one pass."""
        return self.classifier.pass_size(self.eval_batch_size, rows, self.images, rounds)

    def at(self, keep: Float[Tensor, "a h w"], rows: Int[Tensor, " a"]) -> Float[Tensor, " a"]:
        """Return the score of images[rows] seen through the masks `keep`, differentiable."""
        return self._seen(self.images[rows], self.baseline[rows], self.targets[rows], keep)[0]

    def values(self, keep: Float[Tensor, "a h w"], rows: Int[Tensor, " a"]) -> Float[Tensor, " a"]:
        """Return the same without a graph, in chunks."""
        with torch.no_grad():
            batch = self.images[rows], self.baseline[rows], self.targets[rows], keep
            parts = slices(len(keep), self.size(len(keep)))
            return torch.cat([self._values(*(each[part] for each in batch))[0] for part in parts])

    def gradient(
        self, images: Images, baseline: Images, targets: Targets, keep: Float[Tensor, "a h w"]
    ) -> tuple[Float[Tensor, "a h w"], Float[Tensor, " a"]]:
        """Return the gradient of the score of images seen through masks, for these, and the score."""
        keep = keep.detach().requires_grad_()
        (scores,) = self._seen(images, baseline, targets, keep)
        (gradient,) = torch.autograd.grad(scores.sum(), keep)
        return gradient, scores.detach()

    @cached_property
    def _values(self) -> Work:
        return self.classifier.repeated(self._seen, self.times)

    def _seen(
        self, images: Images, baseline: Images, targets: Targets, keep: Float[Tensor, "a h w"]
    ) -> tuple[Float[Tensor, " a"]]:
        return (self.classifier.scores(blend(images, baseline, keep), targets, self.score),)


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
