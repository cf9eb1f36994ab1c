"""Judges with other assumptions than deletion and insertion: ROAD and infidelity.

ROAD (Rong et al., *A Consistent and Efficient Evaluation Strategy for Attribution Methods*, ICML 2022)
removes pixels by noisy linear imputation: each becomes the weighted mean of its neighbours, so that what
was removed can't be read off the shape of the hole. Infidelity (Yeh et al., *On the (In)fidelity and
Sensitivity of Explanations*, NeurIPS 2019) asks whether the heat of a region says by how much the score
falls without it. Unlike the others it judges the values of a map, not only their order.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_aop.checks import require_counts, require_finite, require_tensors
from lightning_aop.errors import InvalidValueError
from lightning_aop.metrics.apart import tell_apart
from lightning_aop.metrics.functional import BLUR, fitting, saliency_ranks
from lightning_aop.model.adapter import Classifier, explaining
from lightning_aop.ops import Baseline
from lightning_aop.scores import Score, full_precision, softmax
from lightning_aop.types import Images, Maps, Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The shares of the pixels that ROAD removes."""

_CLOSE = 1e-4  # the largest error of the imputation's equations, beside what they are equal to
_LIMIT = 2000  # iterations
_TINY = torch.finfo(torch.float32).tiny
# Iterations until somebody looks whether they were enough: an accelerator has to be waited for.
_ASKED = {"cpu": 8}
_ASKED_ELSEWHERE = 32
_SMALLEST = 8  # pixels of a side: no start is looked for at half of it

_NOTHING = "nothing is left of an image to impute the rest from: remove less"


def impute(images: Images, missing: Bool[Tensor, "b h w"]) -> Images:
    """Return the images with every missing pixel the weighted mean of its eight neighbours.

    Neighbours to the sides weigh 1/6, diagonal ones 1/12; those beyond the border don't count. The
    equations of all missing pixels are solved at once, by conjugate gradients from the solution at half
    the size.

    Raises:
        ValueError: of an image nothing is left.
    """
    if bool(missing.flatten(1).all(dim=1).any()):
        raise InvalidValueError(_NOTHING)
    return _imputed(images, missing)


def _imputed(images: Images, missing: Bool[Tensor, "b h w"]) -> Images:
    known = full_precision(images).masked_fill(missing[:, None], 0.0)
    with torch.autocast(images.device.type, enabled=False):
        return _filled(known, missing[:, None].to(known)).to(images.dtype)


def _filled(known: Images, gaps: Float[Tensor, "b 1 h w"]) -> Images:
    """Return the images, which are 0 where the gaps are 1, with these filled."""
    height, width = known.shape[2:]
    start = torch.zeros_like(known)
    if min(height, width) > _SMALLEST:
        halved = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True, count_include_pad=False)
        there = halved(1 - gaps)
        means = torch.where(there > 0, halved(known) / there, 0.0)
        coarse = _filled(means, (there == 0).to(known))
        twice = [2 * side for side in coarse.shape[2:]]
        start = F.interpolate(coarse, twice, mode="bilinear")[..., :height, :width] * gaps
    # The equations' diagonal and their neighbours, for the sum that has each pixel itself 4 times.
    own = gaps * (_around(torch.ones_like(known[:1, :1])) + 1 / 3)
    others = gaps / -12

    def times(values: Tensor) -> Tensor:
        return torch.addcmul(own * values, others, _summed(values))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(2, 3), keepdim=True)

    wanted = gaps * _around(known)
    found = start
    residual = wanted - times(found)
    direction, square = residual, dot(residual, residual)
    enough = _CLOSE**2 * dot(wanted, wanted)
    asked = _ASKED.get(known.device.type, _ASKED_ELSEWHERE)
    for iteration in range(_LIMIT):
        if iteration % asked == 0 and not bool((square > enough).any()):
            break
        image = times(direction)
        # An image that is there stays as it is, however long the others of its batch take.
        step = torch.where(square > enough, square / dot(direction, image), 0.0)
        found = found.addcmul(step, direction)
        residual = residual.addcmul(step, image, value=-1)
        before, square = square, dot(residual, residual)
        direction = residual.addcmul(square / before.clamp_min(_TINY), direction)
    return known + gaps * found


def _around(values: Images) -> Images:
    """Return the weighted mean of the neighbours of each pixel, 0 beyond the border."""
    return _summed(values).sub_(values, alpha=4).div_(12)


def _summed(values: Images) -> Images:
    """Return the sum of each pixel 4 times, its neighbours to the sides twice and the diagonal ones."""
    # [1, 2, 1] down and across: a tenth of the time of a convolution.
    wide = F.pad(values, (1, 1, 1, 1))
    down = (wide[..., :-2, :] + wide[..., 2:, :]).add_(wide[..., 1:-1, :], alpha=2)
    return (down[..., :-2] + down[..., 2:]).add_(down[..., 1:-1], alpha=2)


def road(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    shares: Sequence[float] = SHARES,
    noise: float = 0.01,
    seed: int = 0,
    eval_batch_size: int | None = None,
) -> Float[Tensor, " b"]:
    """Return half of how much more of the score is left where the least salient pixels are removed.

    A mean over the shares that are removed; about 0 for a map without knowledge, higher is better.
    Half of it, as grad-cam's ROADCombined has it. Cost: 2 evaluations for each share.

    Args:
        model: maps images to logits [B, K].
        images: a batch as the model takes it.
        maps: saliency of each image; only its order counts. Ties go in row-major order.
        targets: the class whose score is watched.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        shares: which parts of the pixels are removed, each above 0 and below 1.
        noise: the standard deviation of what is added to imputed pixels, in units of the image.
        seed: of the noise, the same for every image.
        eval_batch_size: images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
    """
    _check_road(shares, noise, eval_batch_size)
    require_tensors(images=images, targets=targets)
    with explaining(model, images, targets) as (classifier, x, t), torch.no_grad():
        ranks = saliency_ranks(fitting(maps, x))
        pixels = ranks[0].numel()
        generator = torch.Generator().manual_seed(seed)
        grain = noise * torch.randn(x.shape[1:], generator=generator).to(x)
        counts = [round(share * pixels) for share in shares]
        if max(counts) == pixels:
            raise InvalidValueError(_NOTHING)
        removed = torch.tensor(counts, device=x.device)

        def without(rows: Tensor, which: Tensor) -> Images:
            # First the most salient pixels go, share by share, then the least salient.
            order = torch.where(
                (which < len(shares))[:, None, None], ranks[rows], pixels - 1 - ranks[rows]
            )
            missing = order < removed[which % len(shares)][:, None, None]
            return _imputed(x[rows], missing) + grain * missing[:, None]

        scores = _scores(classifier, x, t, score, 2 * len(shares), without, eval_batch_size)
        most, least = scores.chunk(2, dim=1)
        gain = (least - most).mean(dim=1) / 2
        require_finite(gain, t, "the class score of an imputed image")
        return gain


def _check_road(shares: Iterable[float], noise: float, eval_batch_size: int | None) -> None:
    found = list(shares)
    if not found or not all(0 < share < 1 for share in found):
        raise InvalidValueError(f"ROAD: shares must lie between 0 and 1, got {found}: as {SHARES}")
    if not isinstance(noise, float | int) or not 0 <= noise < math.inf:
        raise InvalidValueError(f"ROAD: noise must be a number of 0 or more, got {noise!r}")
    require_counts("ROAD", eval_batch_size=eval_batch_size)


def infidelity(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    baseline: Baseline = BLUR,
    samples: int = 64,
    seed: int = 0,
    eval_batch_size: int | None = None,
) -> Float[Tensor, " b"]:
    """Return the mean squared error of the heat of random squares as the fall of the score without them.

    mean_S (β Σ_{p ∈ S} map_p − [F(x) − F(x without S)])², with the best β of 0 or more, since maps have
    no unit. In units of the squared score; 0 is best, and a blank map has the mean squared fall itself.
    Cost: `samples` + 1 evaluations.

    Args:
        model: maps images to logits [B, K].
        images: a batch as the model takes it.
        maps: saliency of each image, whose values count.
        targets: the class whose score is watched.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: what takes the place of a square.
        samples: squares, with sides from an eighth to a half of the shorter side.
        seed: of the squares, the same for every image.
        eval_batch_size: images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
    """
    require_counts("infidelity", samples=samples, eval_batch_size=eval_batch_size)
    require_tensors(images=images, targets=targets)
    with explaining(model, images, targets) as (classifier, x, t), torch.no_grad():
        squares = random_squares((x.shape[2], x.shape[3]), samples, seed).to(x.device)
        values = fitting(maps, x).to(x)
        if not bool(values.isfinite().all()):
            raise InvalidValueError(
                "maps hold NaN or infinite values, which infidelity can't weigh: give finite maps"
            )
        with torch.autocast(x.device.type, enabled=False):
            heat = values.flatten(1) @ squares.flatten(1).T.to(x)
        replaced = baseline(x)
        # The whole image comes first.
        masks = torch.cat([torch.zeros_like(squares[:1]), squares])[:, None]

        def without(rows: Tensor, which: Tensor) -> Images:
            return torch.where(masks[which], replaced[rows], x[rows])

        scores = _scores(classifier, x, t, score, samples + 1, without, eval_batch_size)
        fall = scores[:, :1] - scores[:, 1:]
        require_finite(fall, t, "the class score of a perturbed image")
        size = heat.square().sum(dim=1)
        scale = torch.where(size > 0, (heat * fall).sum(dim=1) / size, 0.0).clamp_min(0)
        return (scale[:, None] * heat - fall).square().mean(dim=1)


def random_squares(size: tuple[int, int], count: int, seed: int) -> Bool[Tensor, "n h w"]:
    """Return random squares, each True inside."""
    generator = torch.Generator().manual_seed(seed)
    shorter = min(size)
    sides = torch.randint(
        max(1, shorter // 8), max(2, shorter // 2 + 1), (count,), generator=generator
    )
    places = torch.rand(count, 2, generator=generator)
    squares = torch.zeros(count, *size, dtype=torch.bool)
    for square, side, (down, right) in zip(squares, sides.tolist(), places.tolist(), strict=True):
        top, left = int(down * (size[0] - side + 1)), int(right * (size[1] - side + 1))
        square[top : top + side, left : left + side] = True
    return squares


def _scores(
    classifier: Classifier,
    images: Images,
    targets: Targets,
    score: Score,
    each: int,
    perturbed: Callable[[Tensor, Tensor], Images],
    wanted: int | None,
) -> Float[Tensor, "b each"]:
    """Return the scores of `each` perturbations of all images, in full passes.

    `perturbed(rows, which)` makes those of one pass: of the images in these rows, by number.
    """
    pairs = torch.arange(len(images) * each, device=images.device)
    found = []
    for part in pairs.split(classifier.pass_size(wanted, len(pairs), images)):
        rows = part // each
        found.append(classifier.scores(perturbed(rows, part % each), targets[rows], score))
    return torch.cat(found).view(len(images), each)


class _MeanJudge(Metric, ABC):
    """What both metrics share: the mean of a value of each image."""

    is_differentiable = False
    full_state_update = False
    value_sum: Tensor
    total: Tensor

    def __init__(self, settings: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings
        self.add_state("value_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        tell_apart(self, type(self).__name__, settings)

    def update(self, model: nn.Module, images: Images, maps: Maps, targets: Targets) -> None:
        """Judge the maps of a batch.

        Args:
            model: maps images to logits [B, K].
            images: a batch as the model takes it.
            maps: saliency of each image, at its size.
            targets: the class whose score is watched.
        """
        values = self._values(model, images, maps, targets)
        self.value_sum += values.sum().to(self.value_sum)
        self.total += len(images)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over all images so far."""
        return self.value_sum / self.total

    def plot(self, val: Any = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the value, or several of them, as torchmetrics does."""
        return self._plot(val, ax)  # type: ignore[return-value]

    @abstractmethod
    def _values(
        self, model: nn.Module, images: Images, maps: Maps, targets: Targets
    ) -> Float[Tensor, " b"]:
        """Return the value of each image."""


class ROAD(_MeanJudge):
    """Mean ROAD, in [−½, ½] for a probability; higher is more faithful. See `road` for the arguments."""

    higher_is_better = True
    plot_lower_bound = -0.5
    plot_upper_bound = 0.5

    def __init__(
        self,
        score: Score = softmax,
        shares: Sequence[float] = SHARES,
        noise: float = 0.01,
        seed: int = 0,
        eval_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        _check_road(shares, noise, eval_batch_size)
        settings = {"score": score, "shares": shares, "noise": noise, "seed": seed}
        super().__init__(settings | {"eval_batch_size": eval_batch_size}, **kwargs)

    @property
    def evaluations_per_image(self) -> int:
        """The model evaluations per image."""
        return 2 * len(self.settings["shares"])

    def _values(
        self, model: nn.Module, images: Images, maps: Maps, targets: Targets
    ) -> Float[Tensor, " b"]:
        return road(model, images, maps, targets, **self.settings)


class Infidelity(_MeanJudge):
    """Mean infidelity, 0 or more; lower is more faithful. See `infidelity` for the arguments."""

    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(
        self,
        score: Score = softmax,
        baseline: Baseline = BLUR,
        samples: int = 64,
        seed: int = 0,
        eval_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        require_counts("Infidelity", samples=samples, eval_batch_size=eval_batch_size)
        settings = {"score": score, "baseline": baseline, "samples": samples, "seed": seed}
        super().__init__(settings | {"eval_batch_size": eval_batch_size}, **kwargs)

    @property
    def evaluations_per_image(self) -> int:
        """The model evaluations per image."""
        return int(self.settings["samples"]) + 1

    def _values(
        self, model: nn.Module, images: Images, maps: Maps, targets: Targets
    ) -> Float[Tensor, " b"]:
        return infidelity(model, images, maps, targets, **self.settings)
