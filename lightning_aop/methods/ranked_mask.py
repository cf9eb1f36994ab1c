"""RankedMask: a ranking of the pixels, optimised for deletion and insertion at once."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite, require_positive
from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.masks import PerturbedScore, starting_mask, upsampled
from lightning_aop.model.adapter import explaining
from lightning_aop.model.passes import slices
from lightning_aop.ops import Baseline, GaussianBlur, min_max
from lightning_aop.scores import Score, contrasts, softmax, value
from lightning_aop.types import CoarseMaps, Images, Maps, Targets

__all__ = ["RankedMask"]


@dataclass(frozen=True)
class RankedMask:
    """A ranking of the pixels, optimised for deletion and insertion as the metrics measure them.

    The mask's grid holds a ranking R. At a share q of the image, the mask is the soft top of R,

        m_q = σ((R − R_q) / `temperature`),    R_q the value that a share q of the cells exceeds,

    and each iteration takes a step of R down the gradient of

        F_c(Φ(1 − m_a)) − F_c(Φ(m_b)):

    the score must fall when the top a is blurred (deletion), and hold when all but the top b is
    (insertion). Since q is given, the mask needs no area penalty, and every part of the ranking is
    optimised, not only its top. The shares a and b are the midpoints of equal parts of (0, 1), to the
    power `focus`, each in its own random order: every size is used once, small ones in finer steps.

    The gradient is centred, for a ranking has no level, smoothed by a gaussian of `smoothing` cells,
    and divided by its largest absolute value; steps have a `momentum`. So no step depends on how sure
    the model is. Before, those of both terms are brought nearer to one size by `balance`: else the term
    whose share lies where the score falls most would have its way.

    A few gradients are noisy, and the start is not: in the end R, min-max normalised to [0, 1], gets
    `prior` times the start added.

    The map is this R min-max normalised and cubed, times its strength. The cube keeps the order, and
    leaves little heat where the score follows nothing: that lies near 0.3 in R. The strength is twice
    the mean of [F_c(Φ(m_b)) − F_c(Φ(1 − m_a))] / F_c(x) over the iterations, at most 1. Of a `value`,
    the difference that all of the image makes takes the place of F_c(x), of a `contrast()` that to the
    lowest of the iterations. A ranking that the score doesn't follow, as of a class that the model all
    but excludes, stays faint.

    The orders are drawn from `seed`, the same for every image of a batch, so that no image depends
    on its batch. The two terms are those of iGOS++ (Khorram, Lawson and Li 2021).

    Cost per image: 4·`iterations` + 1 evaluations, in each iteration two perturbed images forward
    and backward.

    Attributes:
        iterations: the dial between speed and quality.
        mask_size: height and width of the grid.
        lr: the step of the cell with the largest gradient; the first R lies in [0, 1].
        momentum: what is left of a step in the next one.
        temperature: the width of the soft edge of m_q, in units of R.
        focus: above 1, small shares are used more often than large ones.
        smoothing: of the gradient, standard deviation in cells.
        balance: the gradient of each term is divided by its largest absolute value to this power: 0
            leaves it as it is, 1 makes both as large.
        prior: the weight of the start in the map, beside that of the optimised ranking.
        score_floor: a score F_c(x) below this counts as this much in the map's strength.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: the image without information.
        align_corners: the mask is upsampled with aligned corners.
        seed: one seed gives one answer.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
    """

    iterations: int = 9
    mask_size: int = 28
    lr: float = 0.3
    momentum: float = 0.9
    temperature: float = 0.1
    focus: float = 1.5
    smoothing: float = 1.0
    balance: float = 0.5
    prior: float = 0.35
    score_floor: float = 0.05
    score: Score = softmax
    baseline: Baseline = field(default_factory=GaussianBlur)
    align_corners: bool = True
    seed: int = 0
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_counts(
            "RankedMask",
            iterations=self.iterations,
            mask_size=self.mask_size,
            eval_batch_size=self.eval_batch_size,
        )
        require_positive(
            "RankedMask",
            lr=self.lr,
            temperature=self.temperature,
            focus=self.focus,
            smoothing=self.smoothing,
            score_floor=self.score_floor,
        )
        if not 0 <= self.momentum < 1:
            raise InvalidValueError(f"RankedMask: momentum must lie in [0, 1), got {self.momentum}")
        for name, given in (("balance", self.balance), ("prior", self.prior)):
            if not 0 <= given < math.inf:
                raise InvalidValueError(f"RankedMask: {name} must be 0 or more, got {given}")

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 4 * self.iterations + 1

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return the map of the last iterate, from R = start, at the images' size."""
        with explaining(model, images, targets, self.seed) as (classifier, x, t):
            baseline = self.baseline(x)
            perturbed = PerturbedScore(classifier, x, baseline, t, self.score, self.eval_batch_size)
            rows = torch.arange(len(x), device=x.device)
            whole = perturbed.values(torch.ones_like(x[:, 0]), rows)
            require_finite(whole, t, "the class score")
            both = x.repeat(2, 1, 1, 1), baseline.repeat(2, 1, 1, 1), t.repeat(2)
            count = 2 * len(x)
            parts = slices(count, perturbed.size(count, self.iterations))
            through_model = classifier.repeated(
                perturbed.gradient, self.iterations * (count // len(parts))
            )
            first = ranking = 1 - starting_mask(start, x, self.mask_size, self.align_corners)
            edges = torch.tensor([-1.0, 1.0]).to(x).view(2, 1, 1, 1) / self.temperature
            velocity = torch.zeros_like(ranking)
            games: list[Tensor] = []
            smooth = self._filter(x)
            for shares in self._shares(x):
                kept, steep = self._kept(ranking, shares, edges)
                kept.requires_grad_()
                enlarged = upsampled(kept, x, self.align_corners)
                keep = enlarged.detach()
                passes = [through_model(*(each[part] for each in (*both, keep))) for part in parts]
                gradient, scores = map(torch.cat, zip(*passes, strict=True))
                games.append(scores)
                (slope,) = torch.autograd.grad(enlarged, kept, gradient)
                velocity = torch.add(
                    self._direction(slope * steep, smooth), velocity, alpha=self.momentum
                )
                ranking = torch.add(ranking, velocity, alpha=self.lr)
            removed, held = torch.stack(games).to(whole).unflatten(1, (2, -1)).unbind(1)
            level = whole.abs().clamp_min(self.score_floor)
            if self.score is value:  # has no zero to fall to, nor a scale
                nothing = perturbed.values(torch.zeros_like(x[:, 0]), rows)
                level = (whole - nothing).abs()
            elif contrasts(self.score):  # likewise
                lowest = torch.minimum(removed, held).amin(dim=0)
                level = (whole - lowest).clamp_min(self.score_floor)
            strength: Tensor = 2 * (held - removed).mean(dim=0) / level
            ranking = min_max(min_max(ranking) + self.prior * first)
            maps: Tensor = upsampled(ranking, x, self.align_corners).pow(3)
            return maps * strength.clamp(0, 1)[:, None, None].to(maps)

    def _direction(
        self, slope: Float[Tensor, "both n n"], smooth: Float[Tensor, "n n"]
    ) -> Float[Tensor, "b n n"]:
        """Return a step's direction from both terms' gradients; its largest absolute value is 1."""
        slope = slope - slope.mean(dim=(1, 2), keepdim=True)
        with torch.autocast(slope.device.type, enabled=False):
            slope = smooth @ slope @ smooth.T
        both = (slope / _largest(slope) ** self.balance).view(2, -1, *slope.shape[1:]).sum(dim=0)
        return both / _largest(both)

    def _kept(
        self,
        ranking: Float[Tensor, "b n n"],
        shares: Float[Tensor, " 2"],
        edges: Float[Tensor, "2 1 1 1"],
    ) -> tuple[Float[Tensor, "2*b n n"], Float[Tensor, "2*b n n"]]:
        """Return the masks 1 − m_a of all images, then m_b of all images, and their slopes.

        These are d m / d R, up to a factor that cancels out. Of 1 − m_a the sign is missing, as it is
        before that score: one cancels the other.
        """
        cuts = ranking.flatten(1).quantile(1 - shares, dim=1)
        kept = torch.sigmoid((ranking - cuts[..., None, None]) * edges).flatten(0, 1)
        return kept, kept * (1 - kept)

    def _shares(self, like: Images) -> Float[Tensor, "n 2"]:
        """Return a and b of each iteration."""
        generator = torch.Generator().manual_seed(self.seed)
        n = self.iterations
        orders = [torch.randperm(n, generator=generator) for _ in range(2)]
        shares: Tensor = ((torch.stack(orders, dim=1).double() + 0.5) / n) ** self.focus
        return shares.to(like)

    def _filter(self, like: Images) -> Float[Tensor, "n n"]:
        """Return the gradient's smoothing: the 1-D gaussian filter as a matrix."""
        place = torch.arange(self.mask_size, dtype=torch.float64)
        weights = torch.exp(-0.5 * ((place[:, None] - place) / self.smoothing).square())
        return (weights / weights.sum(dim=1, keepdim=True)).to(like)


def _largest(values: Float[Tensor, "b n n"]) -> Float[Tensor, "b 1 1"]:
    """Return the largest absolute value of each, and never 0."""
    largest: Tensor = torch.linalg.vector_norm(values, math.inf, dim=(1, 2), keepdim=True)
    return largest.clamp_min(torch.finfo(values.dtype).tiny)
