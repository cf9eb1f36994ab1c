"""RegionalMultiscale: what each superpixel of several sizes is worth to the class."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite, require_score
from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.superpixels import require_slic, superpixels
from lightning_aop.model.adapter import explaining
from lightning_aop.model.passes import pass_size
from lightning_aop.ops import min_max
from lightning_aop.scores import Score, sigmoid, softmax
from lightning_aop.types import Images, Maps, Targets

__all__ = ["RegionalMultiscale"]


@dataclass(frozen=True)
class RegionalMultiscale:
    """Prediction difference over superpixels of several sizes (Seo, Oh and Oh 2020).

    A region r is left out by `fills` images in which its pixels are drawn from a normal distribution;
    p(c | x without r) is the mean of their class scores. The distribution has the mean and the standard
    deviation of each channel of the image's border, for borders tend to be background. The region's
    relevance is the weight of evidence of prediction difference analysis (Robnik-Šikonja and
    Kononenko 2008; Zintgraf et al. 2017),

        log₂ odds(c | x) − log₂ odds(c | x without r),    odds(p) = p' / (1 − p'),
        p' = (p·`examples` + 1) / (`examples` + K),

    for K classes (2 with `sigmoid`). A score that is no probability, such as `logit`, is compared as
    it is. Each pixel gets its region's relevance, of every segmentation; the map is the mean over these,
    its positive part min-max normalised. A region that the fills leave as it is has none, so that a
    constant image has a map of zeros.

    The paper's text was not available, only its abstract. Chosen here are therefore the sizes of the
    superpixels (XRAI's), the number of fills, the border (the outermost pixels), pixels and channels
    drawn independently of each other, equal weights of the segmentations, and the positive part.
    `examples` stands for the number of training images in prediction difference analysis, whose
    authors' code has 100,000.

    What is drawn comes from `seed`, the same for every region and image, so that no image depends on
    its batch. Segmentation works on the CPU, one image after the other.

    Cost per image: `fills` forwards for each region and 1 more, no backward. SLIC makes of a photo about
    four fifths of the superpixels that it is asked for.

    Attributes:
        segments: the number of superpixels of each segmentation.
        fills: of each region, S.
        examples: of the Laplace correction, which keeps the odds finite.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        seed: one seed gives one answer.
        eval_batch_size: filled images in one pass of the model, which bounds the memory; None
            for 32, or fewer where memory runs out.
    """

    segments: tuple[int, ...] = (50, 100, 150, 250, 500)
    fills: int = 4
    examples: int = 100_000
    score: Score = softmax
    seed: int = 0
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_counts(
            "RegionalMultiscale",
            fills=self.fills,
            examples=self.examples,
            eval_batch_size=self.eval_batch_size,
        )
        if not self.segments or min(self.segments) <= 0:
            raise InvalidValueError(
                "RegionalMultiscale: segments must be numbers of superpixels above 0, at least one, "
                f"got {self.segments}"
            )

    @property
    def evaluations(self) -> int:
        """The model evaluations per image, about: SLIC decides how many regions there are."""
        return self.fills * sum(self.segments) * 4 // 5 + 1

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return the maps [B, H, W] in [0, 1].

        Raises:
            ImportError: scikit-image is not installed.
        """
        require_score(self.score)
        require_slic()  # so that a missing package is known before the model is evaluated
        with explaining(model, images, targets, self.seed) as (classifier, x, t), torch.no_grad():
            size = pass_size(self.eval_batch_size)
            logits = torch.cat([classifier.logits(part) for part in x.split(size)])
            whole = self.score(logits, t).to(x)
            require_finite(whole, t, "the class score")
            regions, rows, scales = self._regions(x)
            fills = self._fills(x)
            scores = torch.empty(len(rows) * self.fills, device=x.device, dtype=x.dtype)
            changed = torch.zeros_like(rows, dtype=torch.bool)
            for part in torch.arange(len(scores), device=x.device).split(size):
                region = part // self.fills
                row = rows[region]
                left_out = regions[row, scales[region]] == region[:, None, None]
                filled = torch.where(left_out[:, None], fills[row, part % self.fills], x[row])
                changed[region[(filled != x[row]).flatten(1).any(dim=1)]] = True
                scores[part] = classifier.scores(filled, t[row], self.score).to(x)
            classes = logits.shape[1]
            without = self._evidence(scores.view(-1, self.fills).mean(dim=1), classes)
            relevance = self._evidence(whole, classes)[rows] - without
            maps = relevance.where(changed, 0.0)[regions].mean(dim=1)
            require_finite(maps, t, "the class score")
            return min_max(maps.clamp_min(0))

    def _regions(
        self, images: Images
    ) -> tuple[Int[Tensor, "b s h w"], Int[Tensor, " r"], Int[Tensor, " r"]]:
        """Return each pixel's region of each segmentation, and the image and segmentation of each.

        Regions are numbered through all segmentations of all images.
        """
        pixels = images.movedim(1, -1).cpu().numpy()
        labels = torch.from_numpy(np.stack([superpixels(p, self.segments) for p in pixels]))
        count, scales = labels.shape[:2]
        runs = torch.arange(count * scales).view(count, scales, 1, 1)
        names, regions = torch.unique(labels * runs.numel() + runs, return_inverse=True)
        run = (names % runs.numel()).to(images.device)
        return regions.to(images.device), run // scales, run % scales

    def _fills(self, images: Images) -> Float[Tensor, "b f c h w"]:
        """Return images drawn from the distribution of each one's border."""
        border = torch.cat(
            [images[:, :, [0, -1]].flatten(2), images[:, :, 1:-1, [0, -1]].flatten(2)], dim=2
        )
        # No further off than rounding can take it: a border of one colour is filled with that.
        mean = border.mean(dim=2).clamp(border.amin(dim=2), border.amax(dim=2))
        spread = (border - mean[:, :, None]).square().mean(dim=2).sqrt()
        generator = torch.Generator(images.device).manual_seed(self.seed)
        # In float32 whatever the images are, so that these don't choose what is drawn.
        drawn = torch.randn(
            self.fills,
            *images.shape[1:],
            generator=generator,
            device=images.device,
            dtype=torch.float32,
        ).to(images)
        mean, spread = (of[:, None, :, None, None] for of in (mean, spread))
        return mean + spread * drawn

    def _evidence(self, score: Float[Tensor, " n"], classes: int) -> Float[Tensor, " n"]:
        """Return the log₂ odds of a probability, Laplace-corrected; another score as it is."""
        if self.score not in (softmax, sigmoid):
            return score
        others = (2 if self.score is sigmoid else classes) - 1
        return ((score * self.examples + 1) / ((1 - score) * self.examples + others)).log2()
