"""I-GOS: integrated gradients with a backtracking Armijo line search."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_aop.checks import require_finite, require_positive
from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.masks import PerturbedScore, starting_mask, upsampled
from lightning_aop.model.adapter import explaining
from lightning_aop.model.passes import pass_size
from lightning_aop.ops import Baseline, GaussianBlur, total_variation
from lightning_aop.scores import Score, softmax
from lightning_aop.types import CoarseMaps, Images, Maps, Targets

__all__ = ["IGOS", "ArmijoSearch"]


@dataclass(frozen=True)
class ArmijoSearch:
    """Backtracking line search along −direction, for all images at once.

    The step shrinks by `decay` until the loss has fallen by `slope`·step·‖direction‖², or the step is
    below `smallest`. The last trial is taken even if it failed, as in I-GOS; with the defaults
    there are at most 12. Images that are done are not evaluated again.
    """

    first: float = 200.0
    decay: float = 0.2
    slope: float = 1e-4
    smallest: float = 1e-5

    def __post_init__(self) -> None:
        require_positive("ArmijoSearch", first=self.first, smallest=self.smallest)
        if not 0 < self.decay < 1:
            raise InvalidValueError(
                f"ArmijoSearch: decay must lie between 0 and 1, got {self.decay}"
            )

    def __call__(
        self,
        objective: Callable[
            [Float[Tensor, "a i j"], Int[Tensor, " a"]],
            tuple[Float[Tensor, " a"], Float[Tensor, " a"]],
        ],
        masks: CoarseMaps,
        direction: Float[Tensor, "b i j"],
        loss: Float[Tensor, " b"],
    ) -> tuple[CoarseMaps, Float[Tensor, " b"]]:
        """Return the new masks in [0, 1] and the score that the objective reports beside its loss.

        `objective(masks[rows], rows)` gives loss and score of the images `rows`; `loss` [b] is its
        value at `masks`.
        """
        fall = self.slope * direction.square().sum(dim=(1, 2))
        found, scores = masks.clone(), torch.empty_like(loss)
        active = torch.arange(len(masks), device=masks.device)
        step = self.first
        while True:
            trial = (masks[active] - step * direction[active]).clamp(0, 1)
            value, score = objective(trial, active)
            found[active], scores[active] = trial, score
            active = active[value > loss[active] - step * fall[active]]
            if step < self.smallest or len(active) == 0:
                return found, scores
            step *= self.decay


@dataclass(frozen=True)
class IGOS:
    """Integrated-Gradients Optimized Saliency (Qi, Khorram and Li 2020; paper, Eq. 6).

    Minimises L(M) = l1·mean|1 − M| + tv·TV(M) + F_c(Φ(M)): the smallest region whose blurring
    lowers the score. The direction is the gradient of the regularisers plus that of the score,
    averaged over `samples` points s/S·M of the blur path, each with fresh gaussian noise; the step
    is an Armijo search on the plain L. The direction need not be one of descent for L; then the
    search fails and the mask hardly moves, which is how the published method behaves.

    Halfway, an image whose score moved by 1e-3 at most has its l1 divided by 10; at 4/5 of the
    iterations, one that moved by 1e-2 at most has it divided by 5.

    Cost per image: `iterations` × (2·`samples` + 1 to 12) + 1 evaluations, one more with `warmup`.

    Attributes:
        iterations: all iterations, the warm-up included.
        samples: points on the blur path, S.
        mask_size: height and width of the mask.
        l1: weight of the mask's blurred area, mean|1 − M|.
        tv: weight of the total variation.
        noise: standard deviation of the noise, as a share of the span, max − min, of each channel of
            the image: a photo in another normalisation gets the same map. 0 for none. "port" divides
            0.25 by the span of the perturbed image over all channels, as the authors' port does: about
            as much where photos span 4.6 units, as in ImageNet's normalisation, and several times as
            much in others. Drawn from `seed`, the same for every image, so that no image depends on
            its batch.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: the image without information.
        warmup: iterations at the start that use `warmup_baseline`, a lighter blur.
        search: the line search.
        align_corners: the mask is upsampled with aligned corners, as in I-GOS.
        seed: one seed gives one answer.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory; None
            for 32, or fewer where memory runs out.
    """

    iterations: int = 15
    samples: int = 20
    mask_size: int = 28
    l1: float = 1.0
    tv: float = 20.0
    noise: float | Literal["port"] = 0.012
    score: Score = softmax
    baseline: Baseline = field(default_factory=GaussianBlur)
    warmup: int = 0
    warmup_baseline: Baseline = field(default_factory=lambda: GaussianBlur(31, 30.0))
    search: ArmijoSearch = field(default_factory=ArmijoSearch)
    align_corners: bool = True
    seed: int = 0
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            "IGOS",
            iterations=self.iterations,
            samples=self.samples,
            mask_size=self.mask_size,
            eval_batch_size=self.eval_batch_size,
        )
        if self.noise != "port" and not (
            isinstance(self.noise, float | int) and 0 <= self.noise < math.inf
        ):
            raise InvalidValueError(
                f"IGOS: noise must be a share of the image's span from 0 on, such as 0.012, or "
                f'"port", got {self.noise!r}'
            )

    @property
    def evaluations(self) -> int:
        """The model evaluations per image, about: the line search takes 1 to 12 an iteration."""
        return self.iterations * (2 * self.samples + 8) + 1

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return 1 − M of the last iterate, from M = 1 − start, at the images' size."""
        with explaining(model, images, targets, self.seed) as (classifier, x, t):
            generator = torch.Generator(x.device).manual_seed(self.seed)
            everyone = torch.arange(len(x), device=x.device)
            mask = starting_mask(start, x, self.mask_size, self.align_corners)
            l1 = torch.full((len(x),), self.l1, device=x.device, dtype=x.dtype)
            for iteration in range(self.iterations):
                if iteration in (0, self.warmup):
                    baseline = self.warmup_baseline if iteration < self.warmup else self.baseline
                    perturbed = PerturbedScore(
                        classifier, x, baseline(x), t, self.score, self.eval_batch_size
                    )
                    score = perturbed.values(self._up(mask, x), everyone)
                if iteration == 0:
                    require_finite(score, t, "the class score")
                    first = score
                l1 = self._relaxed(l1, iteration, (first - score).abs())
                direction = self._regularisers_gradient(mask, l1) + self._integrated_gradient(
                    perturbed, mask, generator
                )

                def objective(
                    trial: CoarseMaps,
                    rows: Int[Tensor, " b"],
                    perturbed: PerturbedScore = perturbed,
                    l1: Float[Tensor, " n"] = l1,
                ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
                    score = perturbed.values(self._up(trial, x), rows)
                    return self._regularisers(trial, l1[rows]) + score, score

                loss = self._regularisers(mask, l1) + score
                mask, score = self.search(objective, mask, direction, loss)
            return 1 - self._up(mask, x)

    def _up(self, mask: Float[Tensor, "a i j"], images: Images) -> Float[Tensor, "a h w"]:
        return upsampled(mask, images, self.align_corners)

    def _regularisers(self, mask: CoarseMaps, l1: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return l1 * (1 - mask).abs().mean(dim=(1, 2)) + self.tv * total_variation(mask)

    def _regularisers_gradient(
        self, mask: CoarseMaps, l1: Float[Tensor, " b"]
    ) -> Float[Tensor, "b i j"]:
        leaf = mask.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._regularisers(leaf, l1).sum(), leaf)
        return gradient

    def _integrated_gradient(
        self, perturbed: PerturbedScore, mask: CoarseMaps, generator: torch.Generator
    ) -> Float[Tensor, "b i j"]:
        """Return ∇_M (1/S) Σ_s F_c(Φ(s/S · M) + noise_s); each term carries its factor s/S."""
        x, samples = perturbed.images, self.samples
        draws = torch.randn(
            samples, *x.shape[1:], generator=generator, device=x.device, dtype=x.dtype
        )
        spread = None if self.noise == "port" else self.noise * _span(x.flatten(2))
        leaf = mask.detach().requires_grad_()
        enlarged = self._up(leaf, x)
        keep = enlarged.detach().requires_grad_()
        total = torch.zeros_like(keep)
        pairs = torch.arange(len(x) * samples, device=x.device)
        for part in pairs.split(pass_size(self.eval_batch_size)):
            rows, sample = part // samples, part % samples
            fraction = ((sample + 1) / samples)[:, None, None].to(keep.dtype)
            noisy = partial(
                _noisy, spread=None if spread is None else spread[rows], draws=draws[sample]
            )
            scores = perturbed.at(fraction * keep[rows], rows, noisy)
            total += torch.autograd.grad(scores.sum() / samples, keep)[0]
        # Back through the upsampling once for all samples, not once for each chunk.
        return torch.autograd.grad(enlarged, leaf, total)[0]

    def _relaxed(
        self, l1: Float[Tensor, " b"], iteration: int, moved: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        if iteration > 0 and iteration == self.iterations // 2:
            return torch.where(moved <= 1e-3, l1 / 10, l1)
        if iteration > 0 and iteration == int(self.iterations / 1.25):
            return torch.where(moved <= 1e-2, l1 / 5, l1)
        return l1


def _noisy(perturbed: Images, spread: Float[Tensor, "b c 1 1"] | None, draws: Images) -> Images:
    """Return the images with noise of this standard deviation, the port's if there is none given."""
    if spread is None:
        span = _span(perturbed.detach().flatten(1))
        spread = torch.where(span > 0, 0.25 / span, 0.0)
    return perturbed.addcmul(spread, draws)


def _span(values: Float[Tensor, "b *channels p"]) -> Float[Tensor, "b c 1 1"]:
    """Return max − min over the last dimension, to be multiplied with images."""
    span = values.amax(dim=-1) - values.amin(dim=-1)
    return span.view(len(values), -1, 1, 1)
