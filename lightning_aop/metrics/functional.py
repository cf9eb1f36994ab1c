"""Deletion and insertion: how well does the score follow the map (Petsiuk et al. 2018).

Both games move pixels in the order of falling saliency, in n = ceil(H·W / N) steps of N pixels, and
record the class score after each, the start included. Deletion replaces the top pixels of the image
by a fill; insertion replaces the top pixels of a filled image by the true ones. With a faithful
map the first curve falls early and the second rises early.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_aop.checks import require_finite, require_positive
from lightning_aop.ops import Fill, GaussianBlur
from lightning_aop.probing import Classifier, explaining
from lightning_aop.scores import Score, full_precision, softmax
from lightning_aop.types import Images, Maps, Targets

BLUR = GaussianBlur()
"""The paper's fill: a gaussian blur of 51 pixels, sigma 50."""

RISE_BLUR = GaussianBlur(11, 5.0, "zeros")
"""The start of RISE's insertion; its deletion fills with `Constant(0)`."""


def deletion_curve(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    fill: Fill = BLUR,
    steps: int = 112,
    pixels_per_step: int | None = None,
    eval_batch_size: int = 32,
) -> Float[Tensor, "b points"]:
    """Return the score after 0, N, 2N, … of the most salient pixels were replaced by the fill.

    Cost: n + 1 evaluations an image.

    Args:
        model: maps images to logits [B, K].
        images: a batch as the model takes it.
        maps: saliency of each image; only its order counts. Ties go in row-major order.
        targets: the class whose score is watched.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        fill: what replaces the pixels, a function of the images.
        steps: the number of steps, if `pixels_per_step` is None; then N = ceil(H·W / steps), 448
            pixels at 224 × 224.
        pixels_per_step: N; all channels of a pixel move together.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory.

    Raises:
        ValueError: the shapes don't fit each other, a map holds NaN, or a score is not finite.
    """
    with _game(model, images, maps, targets, score, fill, steps, pixels_per_step) as game:
        return game.play(insert=False, steps=range(game.steps + 1), chunk=eval_batch_size)


def insertion_curve(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    fill: Fill = BLUR,
    steps: int = 112,
    pixels_per_step: int | None = None,
    eval_batch_size: int = 32,
) -> Float[Tensor, "b points"]:
    """Return the score after 0, N, 2N, … of the most salient pixels were put into the fill.

    Arguments, cost and errors are those of `deletion_curve`.
    """
    with _game(model, images, maps, targets, score, fill, steps, pixels_per_step) as game:
        return game.play(insert=True, steps=range(game.steps + 1), chunk=eval_batch_size)


def deletion_insertion_curves(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    fill: Fill = BLUR,
    steps: int = 112,
    pixels_per_step: int | None = None,
    eval_batch_size: int = 32,
) -> tuple[Float[Tensor, "b points"], Float[Tensor, "b points"]]:
    """Return both curves for 2n evaluations an image: each starts where the other ends.

    Arguments and errors are those of `deletion_curve`.
    """
    with _game(model, images, maps, targets, score, fill, steps, pixels_per_step) as game:
        deletion = game.play(insert=False, steps=range(game.steps + 1), chunk=eval_batch_size)
        between = game.play(insert=True, steps=range(1, game.steps), chunk=eval_batch_size)
        return deletion, torch.cat([deletion[:, -1:], between, deletion[:, :1]], dim=1)


def auc(curve: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Return the area under each curve over [0, 1]: the trapezoid rule with equal steps."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


@dataclass(frozen=True)
class _Game:
    """A batch with its pixels in order, ready to move them between the image and the fill."""

    classifier: Classifier
    images: Images
    filled: Images
    targets: Targets
    ranks: Int[Tensor, "b h w"]
    score: Score
    pixels_per_step: int

    @property
    def steps(self) -> int:
        return ceil(self.ranks[0].numel() / self.pixels_per_step)

    def play(self, insert: bool, steps: range, chunk: int) -> Float[Tensor, "b points"]:
        """Return the scores after the given numbers of steps, evaluated in chunks."""
        require_positive("deletion and insertion", eval_batch_size=chunk)
        old, new = (self.filled, self.images) if insert else (self.images, self.filled)
        pairs = torch.arange(len(self.images) * len(steps), device=self.images.device)
        scores = []
        for part in pairs.split(chunk):
            rows = part // len(steps)
            moved = (steps.start + part % len(steps)) * self.pixels_per_step
            mask = self.ranks[rows] < moved[:, None, None]
            perturbed = torch.where(mask[:, None], new[rows], old[rows])
            scores.append(self.classifier.scores(perturbed, self.targets[rows], self.score))
        curve = torch.cat(scores).view(len(self.images), len(steps))
        require_finite(curve, self.targets, "the class score of a perturbed image")
        return curve


@contextmanager
def _game(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    score: Score,
    fill: Fill,
    steps: int,
    pixels_per_step: int | None,
) -> Iterator[_Game]:
    require_positive("deletion and insertion", steps=steps, pixels_per_step=pixels_per_step or 1)
    with explaining(model, images, targets) as (classifier, x, t), torch.no_grad():
        if tuple(maps.shape) != (len(x), *x.shape[-2:]):
            raise ValueError(
                f"maps must be one [H, W] map for each image, {[len(x), *x.shape[-2:]]}, got "
                f"{list(maps.shape)}: enlarge them to the images' size first"
            )
        ranks = saliency_ranks(maps.detach().to(x.device))
        step = pixels_per_step or ceil(ranks[0].numel() / steps)
        yield _Game(classifier, x, fill(x), t, ranks, score, step)


def saliency_ranks(maps: Maps) -> Int[Tensor, "b h w"]:
    """Return the place of each pixel in the order of falling saliency, 0 first; ties row by row."""
    values = full_precision(maps).flatten(1)
    if values.isnan().any():
        raise ValueError("maps hold NaN: a map without an order can't be tested")
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(maps)
