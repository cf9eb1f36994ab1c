"""I-GOS: integrated gradients with a backtracking Armijo line search."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite, require_positive
from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.masks import PerturbedScore, starting_mask, upsampled
from lightning_aop.model.adapter import Classifier, explaining
from lightning_aop.model.graphs import Work
from lightning_aop.model.passes import slices
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

    An accelerator evaluates all trials at once, though they are more: that takes it less time than a
    few passes of few images, and nobody waits to hear which images are done.

    Attributes:
        first: the first step.
        decay: by which the step shrinks.
        slope: the share of the fall that the direction promises.
        smallest: no step after one below it is tried.
        at_once: trials that are evaluated together; None for one on a CPU, and all elsewhere.
    """

    first: float = 200.0
    decay: float = 0.2
    slope: float = 1e-4
    smallest: float = 1e-5
    at_once: int | None = None

    def __post_init__(self) -> None:
        require_positive("ArmijoSearch", first=self.first, smallest=self.smallest)
        require_counts("ArmijoSearch", at_once=self.at_once)
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
        steps: Float[Tensor, " n"] | None = None,
    ) -> tuple[CoarseMaps, Float[Tensor, " b"]]:
        """Return the new masks in [0, 1] and the score that the objective reports beside its loss.

        `objective(masks[rows], rows)` gives loss and score of the images `rows`; `loss` [b] is its
        value at `masks`; `steps` are those of `steps_for(masks)`, where there are many searches.
        """
        fall = self.slope * direction.square().sum(dim=(1, 2))
        found, scores = masks, torch.empty_like(loss)
        active = torch.arange(len(masks), device=masks.device)
        trials = self.steps_for(masks) if steps is None else steps
        at_once = self.at_once or (1 if masks.is_cpu else len(trials))
        for part in slices(len(trials), at_once):
            steps = trials[part]
            tried = masks[active, None] - steps[:, None, None] * direction[active, None]
            tried = tried.clamp(0, 1)
            value, score = objective(tried.flatten(0, 1), active.repeat_interleave(len(steps)))
            failed = value.view(-1, len(steps)) > loss[active, None] - steps * fall[active, None]
            # The first that has not failed, or the last.
            taken = failed.cumprod(dim=1).sum(dim=1).clamp(max=len(steps) - 1)
            of = torch.arange(len(active), device=masks.device), taken
            found = found.index_copy(0, active, tried[of])
            scores = scores.index_copy(0, active, score.view(-1, len(steps))[of])
            if part.stop == len(trials):
                break
            active = active[failed.all(dim=1)]
            if len(active) == 0:
                break
        return found, scores

    def steps(self) -> list[float]:
        """Return the steps that are tried, one after the other."""
        steps = [self.first]
        while steps[-1] >= self.smallest:
            steps.append(steps[-1] * self.decay)
        return steps

    def steps_for(self, masks: CoarseMaps) -> Float[Tensor, " n"]:
        """Return them beside the masks; to take them there, an accelerator has to be waited for."""
        return torch.tensor(self.steps(), dtype=masks.dtype, device=masks.device)


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
            for what suits the device, or fewer where memory runs out.
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
        require_counts(
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
            steps = self.search.steps_for(mask)
            l1 = torch.full((len(x),), self.l1, device=x.device, dtype=x.dtype)
            fractions = torch.arange(1, self.samples + 1, device=x.device).to(x) / self.samples
            spread = (0.0 if self.noise == "port" else self.noise) * _span(x.flatten(2))
            through_model = classifier.repeated(
                partial(self._through_model, classifier), self.iterations
            )
            for iteration in range(self.iterations):
                if iteration in (0, self.warmup):
                    light = iteration < self.warmup
                    perturbed = PerturbedScore(
                        classifier,
                        x,
                        (self.warmup_baseline if light else self.baseline)(x),
                        t,
                        self.score,
                        self.eval_batch_size,
                        times=self.warmup if light else self.iterations - self.warmup,
                    )
                    score = perturbed.values(self._up(mask, x), everyone)
                if iteration == 0:
                    require_finite(score, t, "the class score")
                    first = score
                l1 = self._relaxed(l1, iteration, (first - score).abs())
                draws = torch.randn(
                    self.samples, *x.shape[1:], generator=generator, device=x.device, dtype=x.dtype
                )
                leaf = mask.detach().requires_grad_()
                enlarged, regularisers = self._up(leaf, x), self._regularisers(leaf, l1)
                points = spread[:, None, :, None, None], fractions, draws
                gradient = self._integrated_gradient(
                    through_model, perturbed, enlarged.detach(), *points
                )
                # Back through the upsampling once for all samples, not once for each pass.
                (direction,) = torch.autograd.grad(
                    [enlarged, regularisers.sum()], leaf, [gradient, None]
                )

                def objective(
                    trial: CoarseMaps,
                    rows: Int[Tensor, " b"],
                    perturbed: PerturbedScore = perturbed,
                    l1: Float[Tensor, " n"] = l1,
                ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
                    score = perturbed.values(self._up(trial, x), rows)
                    return self._regularisers(trial, l1[rows]) + score, score

                loss = regularisers.detach() + score
                mask, score = self.search(objective, mask, direction, loss, steps)
            return 1 - self._up(mask, x)

    def _up(self, mask: Float[Tensor, "a i j"], images: Images) -> Float[Tensor, "a h w"]:
        return upsampled(mask, images, self.align_corners)

    def _regularisers(self, mask: CoarseMaps, l1: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return l1 * (1 - mask).abs().mean(dim=(1, 2)) + self.tv * total_variation(mask)

    def _integrated_gradient(
        self,
        through_model: Work,
        perturbed: PerturbedScore,
        keep: Float[Tensor, "b h w"],
        spread: Float[Tensor, "b 1 c 1 1"],
        fractions: Float[Tensor, " s"],
        draws: Float[Tensor, "s c h w"],
    ) -> Float[Tensor, "b h w"]:
        """Return the gradient of the mean score over the blur path, for the upsampled mask."""
        x, samples = perturbed.images, self.samples
        size = perturbed.size(len(x) * samples)
        # Blocks of images × samples, equal ones: no image is copied only to be perturbed.
        at_once = math.ceil(samples / math.ceil(samples / size))
        found = []
        for some in slices(len(x), max(1, size // samples)):
            block = x[some], perturbed.baseline[some], perturbed.targets[some], keep[some]
            parts = [
                through_model(*block, spread[some], fractions[part], draws[part])[0]
                for part in slices(samples, at_once)
            ]
            found.append(reduce(torch.add, parts))
        return torch.cat(found)

    def _through_model(
        self,
        classifier: Classifier,
        images: Images,
        baseline: Images,
        targets: Targets,
        keep: Float[Tensor, "a h w"],
        spread: Float[Tensor, "a 1 c 1 1"],
        fractions: Float[Tensor, " s"],
        draws: Float[Tensor, "s c h w"],
    ) -> tuple[Float[Tensor, "a h w"]]:
        """Return ∇ (1/S) Σ_s F_c(Φ(s/S · M) + noise_s); each term carries its factor s/S."""
        keep = keep.detach().requires_grad_()
        masks = fractions[:, None, None] * keep[:, None]
        perturbed = torch.lerp(baseline[:, None], images[:, None], masks[:, :, None])
        if self.noise == "port":
            span = _span(perturbed.detach().flatten(2))[:, :, None, None, None]
            spread = torch.where(span > 0, 0.25 / span, 0.0)
        if self.noise:
            perturbed = perturbed.addcmul(spread, draws)
        classes = targets[:, None].expand(-1, len(draws)).flatten()
        scores = classifier.scores(perturbed.flatten(0, 1), classes, self.score)
        share = torch.full_like(scores, 1 / self.samples)
        return torch.autograd.grad(scores, keep, share)  # type: ignore[return-value]

    def _relaxed(
        self, l1: Float[Tensor, " b"], iteration: int, moved: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        if iteration > 0 and iteration == self.iterations // 2:
            return torch.where(moved <= 1e-3, l1 / 10, l1)
        if iteration > 0 and iteration == int(self.iterations / 1.25):
            return torch.where(moved <= 1e-2, l1 / 5, l1)
        return l1


def _span(values: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows"]:
    """Return max − min over the last dimension."""
    return values.amax(dim=-1) - values.amin(dim=-1)
