"""Masks found by perturbing the image and watching the class score (the second stage of AOP).

A mask is optimised on a coarse grid, 28 × 28, and enlarged bilinearly: M = 1 keeps a pixel, M = 0
replaces it by a blurred one, Φ(M) = x ⊙ up(M) + blur(x) ⊙ (1 − up(M)). Saliency is 1 − M.

`EMP` is plain Adam on the deletion score; `IGOS` is integrated gradients with a backtracking Armijo
line search; `RankedMask` ranks the pixels and plays deletion and insertion at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_aop.checks import require_finite, require_positive
from lightning_aop.ops import Baseline, GaussianBlur, blend, min_max, resize, total_variation
from lightning_aop.probing import Classifier, explaining
from lightning_aop.scores import Score, softmax
from lightning_aop.types import CoarseMaps, Images, Maps, Targets

__all__ = ["EMP", "IGOS", "ArmijoSearch", "RankedMask"]


@dataclass(frozen=True)
class _PerturbedScore:
    """F_c(Φ(M)) of a batch against one baseline, evaluated in chunks."""

    classifier: Classifier
    images: Images
    baseline: Images
    targets: Targets
    score: Score
    eval_batch_size: int

    def at(
        self,
        keep: Float[Tensor, "a h w"],
        rows: Int[Tensor, " a"],
        noise: Float[Tensor, "a c h w"] | None = None,
    ) -> Float[Tensor, " a"]:
        """Return the score of images[rows] seen through the masks `keep`, differentiable."""
        perturbed = blend(self.images[rows], self.baseline[rows], keep)
        if noise is not None:
            perturbed = perturbed + noise
        return self.classifier.scores(perturbed, self.targets[rows], self.score)

    def values(self, keep: Float[Tensor, "a h w"], rows: Int[Tensor, " a"]) -> Float[Tensor, " a"]:
        """Return the same without a graph, in chunks."""
        size = self.eval_batch_size
        with torch.no_grad():
            parts = zip(keep.split(size), rows.split(size), strict=True)
            return torch.cat([self.at(masks, part) for masks, part in parts])


@dataclass(frozen=True)
class EMP:
    """Meaningful perturbation, after Fong and Vedaldi (2017), by plain Adam.

    Minimises L(M) = l1·mean|1 − M| + tv·TV(M) + F_c(Φ(M)), TV with differences to the power
    `tv_exponent`: the smallest region whose blurring lowers the score. The constants are those of the
    PyTorch port that I-GOS descends from; the baseline is the paper's blur, so that the methods can be
    compared.

    Adam's first steps move every cell by about `lr`, whatever the gradient's size: a starting mask of
    depth 0.15, as the paper's λ gives, can be gone after two of them.

    Cost an image: 2·`iterations` evaluations.

    Attributes:
        iterations: Adam steps.
        mask_size: height and width of the mask.
        lr: Adam's step.
        l1: weight of the mask's blurred area, mean|1 − M|.
        tv: weight of the total variation.
        tv_exponent: the power of the differences in it.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: the image without information.
        align_corners: the mask is enlarged with aligned corners.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory.
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
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        require_positive(
            "EMP",
            iterations=self.iterations,
            mask_size=self.mask_size,
            lr=self.lr,
            tv_exponent=self.tv_exponent,
            eval_batch_size=self.eval_batch_size,
        )

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return 1 − M of the last iterate, from M = 1 − start, at the images' size."""
        with explaining(model, images, targets) as (classifier, x, t):
            perturbed = _PerturbedScore(
                classifier, x, self.baseline(x), t, self.score, self.eval_batch_size
            )
            everyone = torch.arange(len(x), device=x.device)
            mask = _starting_mask(start, x, self.mask_size, self.align_corners)
            optimizer = torch.optim.Adam([mask.requires_grad_()], lr=self.lr)
            for iteration in range(self.iterations):
                enlarged = _enlarged(mask, x, self.align_corners)
                keep = enlarged.detach().requires_grad_()
                through_model = torch.zeros_like(keep)
                scores = []
                for rows in everyone.split(self.eval_batch_size):
                    score = perturbed.at(keep[rows], rows)
                    through_model += torch.autograd.grad(score.sum(), keep)[0]
                    scores.append(score.detach())
                if iteration == 0:
                    require_finite(torch.cat(scores), t, "the class score")
                penalty = self.l1 * (1 - mask).abs().mean(dim=(1, 2))
                penalty = penalty + self.tv * total_variation(mask, self.tv_exponent)
                (mask.grad,) = torch.autograd.grad(
                    (enlarged, penalty.sum()), mask, (through_model, None)
                )
                optimizer.step()
                with torch.no_grad():
                    mask.clamp_(0, 1)
            return 1 - _enlarged(mask.detach(), x, self.align_corners)


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
            raise ValueError(f"ArmijoSearch: decay must lie between 0 and 1, got {self.decay}")

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

    Cost an image: `iterations` × (2·`samples` + 1 to 12) + 1 evaluations, one more with `warmup`.

    Attributes:
        iterations: all iterations, the warm-up included.
        samples: points on the blur path, S.
        mask_size: height and width of the mask.
        l1: weight of the mask's blurred area, mean|1 − M|.
        tv: weight of the total variation.
        noise: standard deviation of the noise, in units of the normalised image; 0 for none.
            Drawn from `seed`, the same for every image, so that no image depends on its batch.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: the image without information.
        warmup: iterations at the start that use `warmup_baseline`, a lighter blur.
        search: the line search.
        align_corners: the mask is enlarged with aligned corners, as in I-GOS.
        seed: one seed gives one answer.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory.
    """

    iterations: int = 15
    samples: int = 20
    mask_size: int = 28
    l1: float = 1.0
    tv: float = 20.0
    noise: float = 0.2
    score: Score = softmax
    baseline: Baseline = field(default_factory=GaussianBlur)
    warmup: int = 0
    warmup_baseline: Baseline = field(default_factory=lambda: GaussianBlur(31, 30.0))
    search: ArmijoSearch = field(default_factory=ArmijoSearch)
    align_corners: bool = True
    seed: int = 0
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        require_positive(
            "IGOS",
            iterations=self.iterations,
            samples=self.samples,
            mask_size=self.mask_size,
            eval_batch_size=self.eval_batch_size,
        )

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return 1 − M of the last iterate, from M = 1 − start, at the images' size."""
        with explaining(model, images, targets, self.seed) as (classifier, x, t):
            generator = torch.Generator(x.device).manual_seed(self.seed)
            everyone = torch.arange(len(x), device=x.device)
            mask = _starting_mask(start, x, self.mask_size, self.align_corners)
            l1 = torch.full((len(x),), self.l1, device=x.device, dtype=x.dtype)
            for iteration in range(self.iterations):
                if iteration in (0, self.warmup):
                    baseline = self.warmup_baseline if iteration < self.warmup else self.baseline
                    perturbed = _PerturbedScore(
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
                    perturbed: _PerturbedScore = perturbed,
                    l1: Float[Tensor, " n"] = l1,
                ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
                    score = perturbed.values(self._up(trial, x), rows)
                    return self._regularisers(trial, l1[rows]) + score, score

                loss = self._regularisers(mask, l1) + score
                mask, score = self.search(objective, mask, direction, loss)
            return 1 - self._up(mask, x)

    def _up(self, mask: Float[Tensor, "a i j"], images: Images) -> Float[Tensor, "a h w"]:
        return _enlarged(mask, images, self.align_corners)

    def _regularisers(self, mask: CoarseMaps, l1: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return l1 * (1 - mask).abs().mean(dim=(1, 2)) + self.tv * total_variation(mask)

    def _regularisers_gradient(
        self, mask: CoarseMaps, l1: Float[Tensor, " b"]
    ) -> Float[Tensor, "b i j"]:
        leaf = mask.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._regularisers(leaf, l1).sum(), leaf)
        return gradient

    def _integrated_gradient(
        self, perturbed: _PerturbedScore, mask: CoarseMaps, generator: torch.Generator
    ) -> Float[Tensor, "b i j"]:
        """Return ∇_M (1/S) Σ_s F_c(Φ(s/S · M) + noise_s); each term carries its factor s/S."""
        x, samples = perturbed.images, self.samples
        noise = None
        if self.noise > 0:
            noise = self.noise * torch.randn(
                samples, *x.shape[1:], generator=generator, device=x.device, dtype=x.dtype
            )
        leaf = mask.detach().requires_grad_()
        enlarged = self._up(leaf, x)
        keep = enlarged.detach().requires_grad_()
        total = torch.zeros_like(keep)
        pairs = torch.arange(len(x) * samples, device=x.device)
        for part in pairs.split(self.eval_batch_size):
            rows, sample = part // samples, part % samples
            fraction = ((sample + 1) / samples)[:, None, None].to(keep.dtype)
            scores = perturbed.at(
                fraction * keep[rows], rows, None if noise is None else noise[sample]
            )
            total += torch.autograd.grad(scores.sum() / samples, keep)[0]
        # Back through the enlargement once for all samples, not once for each chunk.
        return torch.autograd.grad(enlarged, leaf, total)[0]

    def _relaxed(
        self, l1: Float[Tensor, " b"], iteration: int, moved: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        if iteration > 0 and iteration == self.iterations // 2:
            return torch.where(moved <= 1e-3, l1 / 10, l1)
        if iteration > 0 and iteration == int(self.iterations / 1.25):
            return torch.where(moved <= 1e-2, l1 / 5, l1)
        return l1


@dataclass(frozen=True)
class RankedMask:
    """A ranking of the pixels that plays deletion and insertion as their metrics do.

    The mask's grid holds a ranking R. The game at a share q of the picture uses its soft top

        m_q = σ((R − R_q) / `temperature`),    R_q the value that a share q of the cells exceeds,

    and each iteration takes a step of R down the gradient of

        F_c(Φ(1 − m_a)) − F_c(Φ(m_b)):

    the score must fall when the top a is blurred, and hold when all but the top b is. Since q is
    given, the area needs no price, and what is asked of the first pixels is asked of all that follow.
    The shares a and b are the middles of equal parts of (0, 1), to the power `focus`, each in a random
    order of its own: all sizes are played once, small ones in finer steps.

    The gradient is centred, for a ranking has no level, smoothed by a gaussian that narrows from
    `coarse` to `fine` cells, and divided by its largest absolute value; steps have a `momentum`. So
    no step depends on how sure the model is.

    The map is R stretched to [0, 1] and squared, which sets its top off and keeps the order, times
    its strength: twice the mean of [F_c(Φ(m_b)) − F_c(Φ(1 − m_a))] / F_c(x) over the iterations, at
    most 1. A ranking that the score doesn't follow, as of a class that the model all but excludes,
    stays faint.

    The orders are drawn from `seed`, the same for every image of a batch, so that no image depends
    on its batch. The two games are those of iGOS++ (Khorram, Lawson and Li 2021).

    Cost an image: 4·`iterations` + 1 evaluations, in each iteration two perturbed images forward
    and backward.

    Attributes:
        iterations: the dial between speed and quality.
        mask_size: height and width of the grid.
        lr: the step of the cell with the largest gradient; the first R lies in [0, 1].
        momentum: what is left of a step in the next one.
        temperature: the width of the soft edge of m_q, in units of R.
        focus: above 1, small shares are played more often than large ones.
        coarse: the gradient's smoothing in the first iteration, standard deviation in cells.
        fine: that in the last.
        score_floor: a score F_c(x) below this counts as this much in the map's strength.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: the image without information.
        align_corners: the mask is enlarged with aligned corners.
        seed: one seed gives one answer.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory.
    """

    iterations: int = 9
    mask_size: int = 28
    lr: float = 0.3
    momentum: float = 0.9
    temperature: float = 0.1
    focus: float = 1.5
    coarse: float = 3.0
    fine: float = 1.0
    score_floor: float = 0.05
    score: Score = softmax
    baseline: Baseline = field(default_factory=GaussianBlur)
    align_corners: bool = True
    seed: int = 0
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        require_positive(
            "RankedMask",
            iterations=self.iterations,
            mask_size=self.mask_size,
            lr=self.lr,
            temperature=self.temperature,
            focus=self.focus,
            coarse=self.coarse,
            fine=self.fine,
            score_floor=self.score_floor,
            eval_batch_size=self.eval_batch_size,
        )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"RankedMask: momentum must lie in [0, 1), got {self.momentum}")

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return the map of the last iterate, from R = start, at the images' size."""
        with explaining(model, images, targets, self.seed) as (classifier, x, t):
            perturbed = _PerturbedScore(
                classifier, x, self.baseline(x), t, self.score, self.eval_batch_size
            )
            rows = torch.arange(len(x), device=x.device)
            whole = perturbed.values(torch.ones_like(x[:, 0]), rows)
            require_finite(whole, t, "the class score")
            rows, sign = rows.repeat(2), torch.ones_like(whole).repeat(2)
            sign[: len(x)] = -1
            ranking = 1 - _starting_mask(start, x, self.mask_size, self.align_corners)
            velocity, gained = torch.zeros_like(ranking), torch.zeros_like(whole)
            for shares, smooth in zip(self._shares(x), self._filters(x), strict=True):
                ranking.requires_grad_()
                kept = self._kept(ranking, shares)
                enlarged = _enlarged(kept, x, self.align_corners)
                keep = enlarged.detach().requires_grad_()
                through_model = torch.zeros_like(keep)
                for part in torch.arange(len(rows), device=x.device).split(self.eval_batch_size):
                    scores = sign[part] * perturbed.at(keep[part], rows[part])
                    through_model += torch.autograd.grad(scores.sum(), keep)[0]
                    gained.index_add_(0, rows[part], scores.detach().to(gained))
                (slope,) = torch.autograd.grad(enlarged, ranking, through_model)
                slope = slope - slope.mean(dim=(1, 2), keepdim=True)
                slope = smooth @ slope @ smooth.T
                largest = slope.abs().amax(dim=(1, 2), keepdim=True)
                velocity *= self.momentum
                velocity += slope / largest.clamp_min(torch.finfo(slope.dtype).tiny)
                ranking = ranking.detach() + self.lr * velocity
            strength = 2 * gained / self.iterations / whole.abs().clamp_min(self.score_floor)
            maps = _enlarged(min_max(ranking), x, self.align_corners).square()
            return maps * strength.clamp(0, 1)[:, None, None].to(maps)

    def _kept(
        self, ranking: Float[Tensor, "b n n"], shares: Float[Tensor, " 2"]
    ) -> Float[Tensor, "2*b n n"]:
        """Return the masks 1 − m_a of all images, then m_b of all images."""
        cuts = ranking.detach().flatten(1).quantile(1 - shares, dim=1)
        top = torch.sigmoid((ranking - cuts[..., None, None]) / self.temperature)
        return torch.cat([1 - top[0], top[1]])

    def _shares(self, like: Images) -> Float[Tensor, "n 2"]:
        """Return a and b of each iteration."""
        generator = torch.Generator().manual_seed(self.seed)
        n = self.iterations
        orders = [torch.randperm(n, generator=generator) for _ in range(2)]
        shares: Tensor = ((torch.stack(orders, dim=1).double() + 0.5) / n) ** self.focus
        return shares.to(like)

    def _filters(self, like: Images) -> Float[Tensor, "n m m"]:
        """Return the gradient's smoothing in each iteration: the 1-D gaussian filter as a matrix."""
        steps = torch.arange(self.iterations, dtype=torch.float64) / max(self.iterations - 1, 1)
        spreads = self.coarse * (self.fine / self.coarse) ** steps
        place = torch.arange(self.mask_size, dtype=torch.float64)
        apart = (place[:, None] - place) / spreads[:, None, None]
        weights = torch.exp(-0.5 * apart.square())
        return (weights / weights.sum(dim=2, keepdim=True)).to(like)


def _enlarged(
    mask: Float[Tensor, "a i j"], images: Images, align_corners: bool
) -> Float[Tensor, "a h w"]:
    return resize(mask, (images.shape[-2], images.shape[-1]), align_corners)


def _starting_mask(
    start: CoarseMaps, images: Images, mask_size: int, align_corners: bool
) -> Float[Tensor, "b n n"]:
    """Return M0 = 1 − start on the mask's grid."""
    if start.ndim != 3 or len(start) != len(images):
        raise ValueError(
            f"start must hold one map [h, w] for each of the {len(images)} images, got shape "
            f"{list(start.shape)}"
        )
    # Out of inference mode, where the caller may have made it.
    start = start.detach().clone().to(images)
    return 1 - resize(start, (mask_size, mask_size), align_corners).clamp(0, 1)
