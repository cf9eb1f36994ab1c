"""EMP: the extremal mask of Fong and Vedaldi, optimised by plain Adam."""

from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_aop.checks import require_counts, require_finite, require_positive
from lightning_aop.methods.masks import PerturbedScore, starting_mask, upsampled
from lightning_aop.model.adapter import explaining
from lightning_aop.model.passes import slices
from lightning_aop.ops import Baseline, GaussianBlur, total_variation
from lightning_aop.scores import Score, softmax
from lightning_aop.types import CoarseMaps, Images, Maps, Targets

__all__ = ["EMP"]


@dataclass(frozen=True)
class EMP:
    """Meaningful perturbation, after Fong and Vedaldi (2017), by plain Adam.

    Minimises L(M) = l1·mean|1 − M| + tv·TV(M) + F_c(Φ(M)), TV with differences to the power
    `tv_exponent`: the smallest region whose blurring lowers the score. The constants are those of the
    PyTorch port that I-GOS descends from; the baseline is the paper's blur, so that the methods can be
    compared.

    Adam's first steps move every cell by about `lr`, whatever the gradient's size: a starting mask of
    depth 0.15, as the paper's λ gives, can be gone after two of them.

    Cost per image: 2·`iterations` evaluations.

    Attributes:
        iterations: Adam steps.
        mask_size: height and width of the mask.
        lr: Adam's step.
        l1: weight of the mask's blurred area, mean|1 − M|.
        tv: weight of the total variation.
        tv_exponent: the power of the differences in it.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: the image without information.
        align_corners: the mask is upsampled with aligned corners.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
    """

    iterations: int = 500
    mask_size: int = 28
    lr: float = 0.1
    l1: float = 0.01
    tv: float = 0.2
    tv_exponent: int = 3
    score: Score = softmax
    baseline: Baseline = field(default_factory=GaussianBlur)
    align_corners: bool = True
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_counts(
            "EMP",
            iterations=self.iterations,
            mask_size=self.mask_size,
            eval_batch_size=self.eval_batch_size,
        )
        require_positive("EMP", lr=self.lr, tv_exponent=self.tv_exponent)

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 2 * self.iterations

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return 1 − M of the last iterate, from M = 1 − start, at the images' size."""
        with explaining(model, images, targets) as (classifier, x, t):
            baseline = self.baseline(x)
            perturbed = PerturbedScore(classifier, x, baseline, t, self.score, self.eval_batch_size)
            mask = starting_mask(start, x, self.mask_size, self.align_corners)
            optimizer = torch.optim.Adam([mask.requires_grad_()], lr=self.lr)
            parts = slices(len(x), perturbed.size(len(x), self.iterations))
            through_model = classifier.repeated(perturbed.gradient, self.iterations)
            for iteration in range(self.iterations):
                enlarged = upsampled(mask, x, self.align_corners)
                passes = [
                    through_model(x[part], baseline[part], t[part], enlarged.detach()[part])
                    for part in parts
                ]
                gradient, scores = map(torch.cat, zip(*passes, strict=True))
                if iteration == 0:
                    require_finite(scores, t, "the class score")
                penalty = self.l1 * (1 - mask).abs().mean(dim=(1, 2))
                penalty = penalty + self.tv * total_variation(mask, self.tv_exponent)
                (mask.grad,) = torch.autograd.grad(
                    (enlarged, penalty.sum()), mask, (gradient, None)
                )
                optimizer.step()
                with torch.no_grad():
                    mask.clamp_(0, 1)
            return 1 - upsampled(mask.detach(), x, self.align_corners)
