"""Deletion and insertion: how well does the score follow the map (Petsiuk et al. 2018).

Both move pixels in the order of falling saliency, in n = ceil(H·W / N) steps of N pixels, and
record the class score after each, the start included. Deletion replaces the top pixels of the image
by a baseline; insertion replaces the top pixels of the baseline by the true ones. With a faithful
map the first curve falls early and the second rises early.

Insertion by a map is deletion by its negative, read backwards. So insertion AUC − deletion AUC, the
overall AUC, is the area between the curves of deleting the least and the most salient pixels first: the
symmetric relevance gain (SRG; Blücher et al., TMLR 2024) with this baseline.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite, require_tensors
from lightning_aop.errors import InvalidValueError
from lightning_aop.model.adapter import Classifier, explaining
from lightning_aop.model.outputs import sums_to_one
from lightning_aop.model.passes import slices
from lightning_aop.ops import Baseline, GaussianBlur
from lightning_aop.scores import Score, full_precision, logit, softmax
from lightning_aop.types import Images, Maps, Targets

BLUR = GaussianBlur()
"""The paper's baseline: a gaussian blur of 51 pixels, sigma 50."""

RISE_BLUR = GaussianBlur(11, 5.0, "zeros")
"""The start of RISE's insertion; its deletion fills with `Constant(0)`."""

GameName: TypeAlias = Literal["deletion", "insertion"]

_BOTH: tuple[GameName, ...] = ("deletion", "insertion")

_LEAST = 0.01
"""Where the whole image does not score higher than the baseline by more than this, there is nothing to
normalise a curve by."""

_COARSE, _ROUND = 4, 8
"""A fourth of the evaluations goes to equal steps, and an eighth to each round that halves some."""

_CHOSEN = 4 / 3
"""A gap that is not halved is one that looked smooth, often by chance: errors are larger by this factor,
which was set on the half of the photos that the values of `estimate_curves` are not from."""


def deletion_curve(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    baseline: Baseline = BLUR,
    steps: int = 112,
    pixels_per_step: int | None = None,
    eval_batch_size: int | None = None,
    normalise: bool = False,
) -> Float[Tensor, "b points"]:
    """Return the score after 0, N, 2N, … of the most salient pixels were replaced by the baseline.

    Cost: n + 1 evaluations per image.

    Args:
        model: maps images to logits [B, K]. If it ends in a softmax, and `score` is `softmax`, its
            outputs are taken as they are.
        images: a batch as the model takes it.
        maps: saliency of each image; only its order counts. Ties go in row-major order.
        targets: the class whose score is watched.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: what replaces the pixels, a function of the images.
        steps: the number of steps, if `pixels_per_step` is None; then N = ceil(H·W / steps), 448
            pixels at 224 × 224.
        pixels_per_step: N; all channels of a pixel move together.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
        normalise: give (F − F_baseline) / (F_image − F_baseline), clipped to [0, 1], in place of the
            score F, from the ends of the same curve: see `normalised`. NaN for an image whose score is
            not above that of its baseline by more than 0.01.

    Raises:
        TypeError: images, maps or targets are no tensors.
        ValueError: the shapes don't fit each other, an image has one pixel only, a map holds NaN, or a
            score is not finite.
    """
    with _game(model, images, maps, targets, score, baseline, steps, pixels_per_step) as game:
        curve = game.play(insert=False, steps=range(game.steps + 1), chunk=eval_batch_size)
    return normalised(curve, "deletion") if normalise else curve


def insertion_curve(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    baseline: Baseline = BLUR,
    steps: int = 112,
    pixels_per_step: int | None = None,
    eval_batch_size: int | None = None,
    normalise: bool = False,
) -> Float[Tensor, "b points"]:
    """Return the score after 0, N, 2N, … of the most salient pixels were put into the baseline.

    Arguments, cost and errors are those of `deletion_curve`.
    """
    with _game(model, images, maps, targets, score, baseline, steps, pixels_per_step) as game:
        curve = game.play(insert=True, steps=range(game.steps + 1), chunk=eval_batch_size)
    return normalised(curve, "insertion") if normalise else curve


def deletion_insertion_curves(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    *,
    score: Score = softmax,
    baseline: Baseline = BLUR,
    steps: int = 112,
    pixels_per_step: int | None = None,
    eval_batch_size: int | None = None,
    normalise: bool = False,
) -> tuple[Float[Tensor, "b points"], Float[Tensor, "b points"]]:
    """Return both curves for 2n evaluations per image: each starts where the other ends.

    Arguments and errors are those of `deletion_curve`.
    """
    with _game(model, images, maps, targets, score, baseline, steps, pixels_per_step) as game:
        deletion, insertion = game.play_both(eval_batch_size)
    if normalise:
        return normalised(deletion, "deletion"), normalised(insertion, "insertion")
    return deletion, insertion


class CurveEstimate(NamedTuple):
    """Curves of which some points were evaluated; those between lie on straight lines.

    Attributes:
        curve: the score at all points of the full curve, for `auc`.
        evaluated: the points at which it is the model's.
        error: how far `auc(curve)` is expected to be from that of the full curve, as a standard
            deviation, in units of the score; 0 where all points were evaluated.
    """

    curve: Float[Tensor, "b points"]
    evaluated: Bool[Tensor, "b points"]
    error: Float[Tensor, " b"]


def estimate_curves(  # noqa: D417
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    evaluations: int,
    *,
    games: tuple[GameName, ...] = _BOTH,
    score: Score = softmax,
    baseline: Baseline = BLUR,
    steps: int = 112,
    pixels_per_step: int | None = None,
    eval_batch_size: int | None = None,
    normalise: bool = False,
) -> dict[GameName, CurveEstimate]:
    """Return the curves from fewer evaluations: large steps first, halved where the score moves.

    A fourth of the evaluations goes to equal steps. Then, in rounds of an eighth, the steps are halved
    that are expected to add most to the error, of both curves of an image together. Between its ends the
    score is taken for a random walk with their difference: with the roughness σ² = Δ²/w, averaged with
    those of the steps beside it ½ : 1 : ½, the sum of the scores inside has the variance
    σ² w (w² − 1) / 12, for w steps of the full curve. `error` is 4/3 of the root of their sum, over n.

    On 63 photos and 3 networks, with 56 evaluations for the 224 of both curves, the AUCs of single
    images were off by 0.0016 (deletion), 0.0029 (insertion) and 0.0033 (overall), root mean square,
    on the half that nothing was chosen on; with 28 equal steps each by 0.0033, 0.0035 and 0.0044. The
    true error lay within `error` for 80, 63 and 68 images of 100, and within twice of it for 99, 95 and
    97. A peak between two points of about equal score is missed, and `error` can't reflect it: fewer
    than 56 evaluations are a risk, up to 0.05 for a single image with 40. With 84 the overall AUC was
    off by 0.0020, and `error` was somewhat small: the true one lay within twice of it for 87 to 91.

    The images of a batch don't influence each other. Arguments not named here, and errors, are
    those of `deletion_curve`.

    Args:
        evaluations: per image, for all its curves together, 8 or more per curve; the full curves take
            n + 1, and 2n for both. With that many, or more, these are the full curves.
        games: ("deletion", "insertion"), or one of them alone.

    Returns:
        One estimate for each of `games`.
    """
    if games not in (_BOTH, _BOTH[:1], _BOTH[1:]):
        raise InvalidValueError(f"games must be {_BOTH}, or one of them in a tuple, got {games}")
    check_evaluations(evaluations, games)
    with _game(model, images, maps, targets, score, baseline, steps, pixels_per_step) as game:
        if evaluations >= (2 * game.steps if len(games) == 2 else game.steps + 1):
            whole = (
                game.play_both(eval_batch_size)
                if len(games) == 2
                else (game.play("insertion" in games, range(game.steps + 1), eval_batch_size),)
            )
            found = [
                CurveEstimate(
                    curve, torch.ones_like(curve, dtype=torch.bool), torch.zeros_like(curve[:, 0])
                )
                for curve in whole
            ]
        else:
            inserts = [name == "insertion" for name in games]
            found = game.refine(inserts, evaluations, eval_batch_size)
    estimates = dict(zip(games, found, strict=True))
    if normalise:
        estimates = {
            name: each._replace(
                curve=normalised(each.curve, name), error=each.error / gap(each.curve, name)
            )
            for name, each in estimates.items()
        }
    return estimates


def auc(curve: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Return the area under each curve over [0, 1]: the trapezoid rule with equal steps."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def gap(curve: Float[Tensor, "b points"], game: GameName) -> Float[Tensor, " b"]:
    """Return by how much the score of each image is above that of its baseline, NaN for 0.01 or less."""
    whole, replaced = (
        (curve[:, 0], curve[:, -1]) if game == "deletion" else (curve[:, -1], curve[:, 0])
    )
    found = whole - replaced
    return found.masked_fill(found <= _LEAST, torch.nan)


def normalised(curve: Float[Tensor, "b points"], game: GameName) -> Float[Tensor, "b points"]:
    """Return (F − F_baseline) / (F_image − F_baseline) for the scores F of a curve, clipped to [0, 1].

    Whole and blurred image then score 1 and 0, however sure the model is. A curve is NaN where that is
    undefined: where the image does not score above its baseline by more than 0.01. (Where it scores
    below, the fraction would have its sign turned, and the map that points the wrong way would win.)
    """
    low = curve[:, -1:] if game == "deletion" else curve[:, :1]
    return ((curve - low) / gap(curve, game)[:, None]).clamp(0, 1)


@dataclass(frozen=True)
class _Game:
    """A batch with its pixels in order, ready to move them between the image and the baseline."""

    classifier: Classifier
    images: Images
    replaced: Images
    targets: Targets
    ranks: Int[Tensor, "b h w"]
    score: Score
    pixels_per_step: int

    @property
    def steps(self) -> int:
        return ceil(self.ranks[0].numel() / self.pixels_per_step)

    def play(self, insert: bool, steps: range, chunk: int | None) -> Float[Tensor, "b points"]:
        """Return the scores after the given numbers of steps, evaluated in chunks."""
        taken = torch.arange(steps.start, steps.stop, device=self.images.device)
        inserted = torch.full_like(taken, insert, dtype=torch.bool)
        images = len(self.images)
        return self._scores(taken.expand(images, -1), inserted.expand(images, -1), chunk)

    def play_both(
        self, chunk: int | None
    ) -> tuple[Float[Tensor, "b points"], Float[Tensor, "b points"]]:
        """Return the full curves of deletion and of insertion, evaluated in one go."""
        n = self.steps
        taken = torch.cat([torch.arange(n + 1), torch.arange(1, n)]).to(self.images.device)
        inserted = torch.arange(2 * n, device=self.images.device) > n
        images = len(self.images)
        found = self._scores(taken.expand(images, -1), inserted.expand(images, -1), chunk)
        deletion, between = found[:, : n + 1], found[:, n + 1 :]
        return deletion, torch.cat([deletion[:, -1:], between, deletion[:, :1]], dim=1)

    def refine(
        self, inserts: list[bool], evaluations: int, chunk: int | None
    ) -> list[CurveEstimate]:
        """Return the estimate of each curve from fewer evaluations than the full curves take.

        The curves of an image lie end to end, and a place counts along all of them.
        """
        device, points, count = self.images.device, self.steps + 1, len(inserts)
        both = count == 2
        halvings = evaluations - (not both)  # as many evaluations as there are steps in the end
        coarse = max(2, halvings // (_COARSE * count))
        first = torch.arange(coarse + 1, device=device) * self.steps // coarse
        offsets = torch.arange(count, device=device) * points
        places = (offsets[:, None] + first).flatten().expand(len(self.images), -1)
        insert = torch.tensor(inserts, device=device).repeat_interleave(points)

        def score(at: Int[Tensor, "b m"]) -> Float[Tensor, "b m"]:
            return self._scores(at % points, insert[at], chunk)

        fresh = places
        if both:  # insertion starts where deletion ends, and the other way round
            fresh = torch.cat([places[:, : coarse + 1], places[:, coarse + 2 : -1]], dim=1)
        found = score(fresh)
        values = found.new_zeros(len(self.images), count * points).scatter(1, fresh, found)
        if both:
            values[:, points], values[:, -1] = values[:, points - 1], values[:, 0]
        remaining = halvings - coarse * count
        while remaining:
            now = min(ceil(halvings / _ROUND), remaining)
            gains = _variances(places, values, points)
            middles = (places[:, :-1] + places[:, 1:]) // 2
            # With few steps left to halve, the points inside them are next: all images get as many.
            urgency = torch.full_like(values, -1.0).scatter(1, middles, gains)
            urgency = urgency.scatter(1, places, -torch.inf)
            chosen = urgency.argsort(dim=1, descending=True, stable=True)[:, :now]
            values = values.scatter(1, chosen, score(chosen))
            places = torch.cat([places, chosen], dim=1).sort(dim=1).values
            remaining -= now
        variances = _variances(places, values, points)
        evaluated = torch.zeros_like(values, dtype=torch.bool).scatter(1, places, True)
        curves = _between(places, values)
        return [
            CurveEstimate(
                curves[:, part],
                evaluated[:, part],
                _CHOSEN * (variances * inside).sum(dim=1).sqrt() / self.steps,
            )
            for part, inside in (
                (slice(i * points, (i + 1) * points), places[:, :-1] // points == i)
                for i in range(count)
            )
        ]

    def _scores(
        self, steps: Int[Tensor, "b m"], insert: Bool[Tensor, "b m"], wanted: int | None
    ) -> Float[Tensor, "b m"]:
        """Return the scores after numbers of steps that may differ from image to image."""
        require_counts("deletion and insertion", eval_batch_size=wanted)
        images, points = steps.shape
        chunk = self.classifier.pass_size(wanted, images * points, self.images)
        moved = (steps * self.pixels_per_step).to(self.ranks)
        # Blocks of images × steps: no image is copied only to be perturbed.
        at_once = _block(images, points, chunk)
        seen = self.classifier.repeated(self._seen, images * points // chunk)
        parts = []
        for some in slices(images, at_once):
            block = self.images[some], self.replaced[some], self.ranks[some], self.targets[some]
            below, inserted = moved[some].T, insert[some].T
            scores = [
                seen(*block, below[part], inserted[part])[0]
                for part in slices(points, chunk // len(block[0]))
            ]
            parts.append(torch.cat(scores).T)
        found = torch.cat(parts)
        require_finite(found, self.targets, "the class score of a perturbed image")
        return found

    def _seen(
        self,
        images: Images,
        replaced: Images,
        ranks: Int[Tensor, "b h w"],
        targets: Targets,
        below: Int[Tensor, "s b"],
        inserted: Bool[Tensor, "s b"],
    ) -> tuple[Float[Tensor, "s b"]]:
        """Return the scores after `below` pixels of each image were moved."""
        hidden = (ranks < below[:, :, None, None]) != inserted[:, :, None, None]
        # By 0 and 1 exactly the one or the other, in a fifth of the time of torch.where. Into memory in
        # the order of the images, for the strides that it would choose cost a copy.
        perturbed = images.new_empty(*below.shape, *images.shape[1:])
        torch.lerp(images, replaced, hidden.to(images)[:, :, None], out=perturbed)
        perturbed = perturbed.flatten(0, 1)
        scores = self.classifier.scores(perturbed, targets.repeat(len(below)), self.score)
        return (scores.view(below.shape),)


def _block(images: int, points: int, chunk: int) -> int:
    """Return of how many images the blocks are that fill passes of `chunk` best, the most of several."""

    def passes(block: int) -> int:
        whole, rest = divmod(images, block)
        of_rest = ceil(points / (chunk // rest)) if rest else 0
        return whole * ceil(points / (chunk // block)) + of_rest

    return min(range(min(images, chunk), 0, -1), key=passes)


def _variances(
    places: Int[Tensor, "b known"], values: Float[Tensor, "b all"], points: int
) -> Float[Tensor, "b gaps"]:
    """Return the variance of the sum of the scores inside each gap, as `estimate_curves` explains."""
    width = places.diff(dim=1)
    roughness = values.gather(1, places).diff(dim=1).square() / width
    # A flat gap is not known to be flat inside: of several, the widest is halved.
    roughness = roughness.clamp(min=1e-30)
    # Not from the end of one curve to the start of the next.
    same = (places[:, :-1] // points == places[:, 1:] // points).to(values)
    total, weights = (
        of + (nn.functional.pad(of, (1, 0))[:, :-1] + nn.functional.pad(of, (0, 1))[:, 1:]) / 2
        for of in (roughness * same, same)
    )
    return total / weights * width * (width**2 - 1) / 12


def _between(
    places: Int[Tensor, "b known"], values: Float[Tensor, "b all"]
) -> Float[Tensor, "b all"]:
    """Return the values with those that are not known on straight lines between those that are."""
    everywhere = torch.arange(values.shape[1], device=places.device).expand_as(values)
    left = torch.searchsorted(places, everywhere.contiguous(), right=True) - 1
    right = (left + 1).clamp(max=places.shape[1] - 1)
    start, end = places.gather(1, left), places.gather(1, right)
    share = (everywhere - start) / (end - start).clamp(min=1)
    before, after = values.gather(1, start), values.gather(1, end)
    return before + share.to(values) * (after - before)


@contextmanager
def _game(
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    score: Score,
    baseline: Baseline,
    steps: int,
    pixels_per_step: int | None,
) -> Iterator[_Game]:
    check_steps("deletion and insertion", steps, pixels_per_step)
    require_tensors(images=images, targets=targets)
    if images.ndim == 4 and images.shape[2] * images.shape[3] < 2:
        raise InvalidValueError(
            f"images must have 2 pixels or more for an order to count, got {list(images.shape)}: give "
            "larger images"
        )
    with explaining(model, images, targets) as (classifier, x, t), torch.no_grad():
        ranks = saliency_ranks(fitting(maps, x))
        step = pixels_per_step or ceil(ranks[0].numel() / steps)
        score = _OfProbabilities() if score is softmax else score
        yield _Game(classifier, x, baseline(x), t, ranks.int(), score, step)


def check_steps(owner: str, steps: object, pixels_per_step: object) -> None:
    """Raise ValueError or TypeError for settings that make no curve."""
    require_counts(owner, steps=steps, pixels_per_step=pixels_per_step)
    if steps is None and pixels_per_step is None:
        raise InvalidValueError(
            f"{owner}: steps must be a whole number where pixels_per_step is None, got None: 112 are "
            "the protocol's"
        )


def check_evaluations(evaluations: int, games: tuple[GameName, ...]) -> None:
    """Raise ValueError or TypeError for too few of them."""
    require_counts("curves", evaluations=evaluations)
    if evaluations < 8 * len(games):
        raise InvalidValueError(
            f"evaluations must be 8 or more for each curve, {8 * len(games)} for {' and '.join(games)}, "
            f"got {evaluations}: give more"
        )


class _OfProbabilities:
    """`softmax`, but for a model that ends in a softmax itself: its outputs are the scores.

    Those of the first pass decide: none is negative, and those of each image add up to 1. Logits don't.
    """

    def __init__(self) -> None:
        self._given: bool | None = None

    def __call__(self, logits: Float[Tensor, "b k"], targets: Targets) -> Float[Tensor, " b"]:
        if self._given is None:
            self._given = sums_to_one(logits) and bool((logits >= 0).all())
        return logit(logits, targets) if self._given else softmax(logits, targets)


def fitting(maps: Maps, images: Images) -> Maps:
    """Return maps on the device of the images that they are of.

    Raises:
        ValueError: they are not one for each image, at its size.
        TypeError: they are no tensor.
    """
    require_tensors(maps=maps)
    if tuple(maps.shape) != (len(images), *images.shape[-2:]):
        remedy = "upsample them to the images' size first"
        if tuple(maps.shape) == (len(images), 1, *images.shape[-2:]):
            remedy = "drop the channel with maps[:, 0]"
        elif tuple(maps.shape) == tuple(images.shape[:3]):
            remedy = "of images with the channels last give images.permute(0, 3, 1, 2)"
        raise InvalidValueError(
            f"maps must be one [H, W] map for each image, {[len(images), *images.shape[-2:]]}, got "
            f"{list(maps.shape)}: {remedy}"
        )
    return maps.detach().to(images.device)


def saliency_ranks(maps: Maps) -> Int[Tensor, "b h w"]:
    """Return the place of each pixel in the order of falling saliency, 0 first; ties row by row."""
    values = full_precision(maps).flatten(1)
    if values.isnan().any():
        raise InvalidValueError("maps hold NaN: a map without an order can't be tested")
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(maps)
