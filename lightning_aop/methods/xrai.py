"""XRAI: superpixels, ranked by integrated gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite
from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.superpixels import require_slic, superpixels
from lightning_aop.model.adapter import Classifier, explaining
from lightning_aop.ops import min_max
from lightning_aop.scores import Score, softmax
from lightning_aop.types import Images, Maps, Targets


def merge_segments(
    attribution: Float[np.ndarray, "h w"],
    labels: Sequence[Integer[np.ndarray, "h w"]],
    *,
    min_area: int = 50,
    fast: bool = False,
) -> Float[np.ndarray, "h w"]:
    """Return the map [H, W] of XRAI, float64, from an attribution and overlapping segmentations.

    Takes the segment whose pixels not yet covered have the highest mean attribution, gives them that
    mean, and so on. Segments that would add fewer than `min_area` pixels are dropped; the pixels left
    over in the end get their own mean. Of equal segments the first is taken, by label map and then
    by label. With `fast` the order is that of the means over whole segments, settled at the start.

    The result is the published package's to the last bit for the same float64 attribution, at about
    one addition for each pixel and label map in all. Near ties are what this hangs on, as the map is
    no continuous function of the attribution: sums kept up to date by subtraction drift by a few
    roundings, which decides between two segments of equal worth, and the pixels that the loser would
    have taken may then be dropped. So every sum carries a bound of its error, and those that could be
    the highest within it are summed afresh.

    Args:
        attribution: of each pixel; finite.
        labels: label maps, in each of which the pixels of one number are a segment.
        min_area: pixels, 1 or more.
        fast: settle the order at the start.
    """
    require_counts("merge_segments", min_area=min_area)
    values = np.asarray(attribution, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        raise InvalidValueError("merge_segments: attribution holds NaN or infinity")
    if not labels:
        raise InvalidValueError("merge_segments: labels must hold at least one label map")
    for label_map in labels:
        if label_map.shape != attribution.shape:
            raise InvalidValueError(
                f"merge_segments: labels must have the attribution's shape {attribution.shape}, got "
                f"{label_map.shape}"
            )
    merging = _Merging(values, labels, min_area)
    if fast:
        merging.in_order()
    else:
        merging.highest_first()
    return merging.finished().reshape(attribution.shape)


class _Merging:
    """The segments of all label maps, with what each would still add to the map."""

    def __init__(
        self,
        values: Float[np.ndarray, " hw"],
        labels: Sequence[Integer[np.ndarray, "h w"]],
        min_area: int,
    ) -> None:
        self.values, self.min_area = values, min_area
        self.merged = np.zeros_like(values)
        self.covered = np.zeros(len(values), dtype=bool)
        self.pixels: list[Integer[np.ndarray, " n"]] = []  # of each segment, row by row
        owners = np.empty((len(labels), len(values)), dtype=np.intp)
        for owner, label_map in zip(owners, labels, strict=True):
            flat = label_map.ravel()
            order = flat.argsort(kind="stable")
            starts = np.flatnonzero(np.diff(flat[order])) + 1
            segments = np.split(order, starts)
            lengths = [len(pixels) for pixels in segments]
            owner[order] = np.repeat(np.arange(len(segments)), lengths) + len(self.pixels)
            self.pixels.extend(segments)
        self.owners = owners
        self.counts = self._count(slice(None))
        self.sums = self._add(slice(None), values)
        # A sum of n numbers is off by n·ε/2 of the sum of their sizes, and n are added, added up to
        # be taken off, taken off, and, where the sum is compared with a fresh one, added there.
        sizes = self._add(slice(None), np.abs(values))
        self.bounds = 4 * np.finfo(np.float64).eps * (self.counts + 1) * sizes
        self.errors = self.bounds.copy()

    def highest_first(self) -> None:
        """Cover the image, taking the highest mean of the uncovered pixels each time."""
        while True:
            alive = np.flatnonzero(self.counts >= self.min_area)
            if len(alive) == 0:
                return
            counts = self.counts[alive]
            gains, errors = self.sums[alive] / counts, self.errors[alive] / counts
            best = gains.argmax()
            rivals = (gains + errors >= gains[best] - errors[best]) & (errors > 0)
            if rivals.any():
                for segment in alive[rivals].tolist():
                    self.sums[segment] = self.values[self._uncovered(segment)].sum()
                    self.errors[segment] = 0.0
            else:
                self._cover(self._uncovered(int(alive[best])), gains[best])

    def in_order(self) -> None:
        """Cover the image in the order of the segments' own means."""
        means = np.array([self.values[pixels].mean() for pixels in self.pixels])
        for segment in np.argsort(-means, kind="stable").tolist():
            pixels = self._uncovered(segment)
            if len(pixels) >= self.min_area:
                self.merged[pixels] = self.values[pixels].mean()
                self.covered[pixels] = True

    def finished(self) -> Float[np.ndarray, " hw"]:
        """Return the map, the pixels left over filled with their mean."""
        left = ~self.covered
        if left.any():
            self.merged[left] = self.values[left].mean()
        return self.merged

    def _uncovered(self, segment: int) -> Integer[np.ndarray, " n"]:
        pixels = self.pixels[segment]
        return np.compress(~self.covered[pixels], pixels)

    def _cover(self, pixels: Integer[np.ndarray, " n"], gain: float) -> None:
        self.merged[pixels] = gain
        self.covered[pixels] = True
        lost = self._count(pixels)
        self.counts -= lost
        self.sums -= self._add(pixels, self.values[pixels])
        np.copyto(self.errors, self.bounds, where=lost > 0)

    def _count(self, pixels: Integer[np.ndarray, " n"] | slice) -> Integer[np.ndarray, " s"]:
        owners = self.owners[:, pixels].ravel()
        counts: Integer[np.ndarray, " s"] = np.bincount(owners, minlength=len(self.pixels))
        return counts

    def _add(
        self, pixels: Integer[np.ndarray, " n"] | slice, values: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " s"]:
        owners = self.owners[:, pixels]
        repeated = np.tile(values, len(owners))
        return np.bincount(owners.ravel(), repeated, minlength=len(self.pixels))


@dataclass(frozen=True)
class XRAI:
    """Superpixels, ranked by their integrated gradients (Kapishnikov et al. 2019).

    Integrated gradients run from two constant baselines, the image's own minimum and maximum over
    all pixels and channels; their mean counts, and of a pixel its highest channel. The points lie at
    0, 1/(n−1), …, 1 of each path, for n = `steps`, as in the published package. Both paths end in
    the image itself, which is evaluated once.

    Segments are SLIC superpixels at several scales (`superpixels`), not dilated, and are merged by
    `merge_segments`. Both work on the CPU, one image after the other. The result is the min-max
    normalised map; a constant image has a map of zeros. The map is no continuous function of the
    attribution: where two overlapping segments are equal but for float noise, the noise decides.

    Cost per image: 2·`steps` − 1 forwards and as many backwards.

    Attributes:
        steps: points on each of the two paths, 2 or more.
        segments: the number of superpixels of each SLIC run.
        fast: rank the segments once, by their means over all their pixels.
        min_area: segments that would add fewer pixels than this to an image of 224 × 224 are dropped;
            in smaller images fewer in proportion, or none of their segments would be left.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        eval_batch_size: images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
    """

    steps: int = 100
    segments: tuple[int, ...] = (50, 100, 150, 250, 500)
    fast: bool = False
    min_area: int = 50
    score: Score = softmax
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_counts(
            "XRAI", steps=self.steps, min_area=self.min_area, eval_batch_size=self.eval_batch_size
        )
        if self.steps < 2:
            raise InvalidValueError(
                f"XRAI: steps must be 2 or more, the ends of the path, got {self.steps}"
            )
        if not self.segments or min(self.segments) <= 0:
            raise InvalidValueError(
                "XRAI: segments must be numbers of superpixels above 0, at least one, got "
                f"{self.segments}"
            )

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 2 * (2 * self.steps - 1)

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return the maps [B, H, W] in [0, 1].

        Raises:
            ImportError: scikit-image is not installed.
        """
        require_slic()  # so that a missing package is known before the model is evaluated
        with explaining(model, images, targets) as (classifier, x, t):
            attribution = self._integrated_gradients(classifier, x, t).amax(dim=1).cpu().numpy()
            pixels = x.movedim(1, -1).cpu().numpy()
            maps = [
                merge_segments(
                    values,
                    superpixels(image, self.segments),
                    min_area=max(round(self.min_area * min(x[0, 0].numel() / 224**2, 1)), 1),
                    fast=self.fast,
                )
                for values, image in zip(attribution, pixels, strict=True)
            ]
            return min_max(torch.from_numpy(np.stack(maps))).to(x)

    def _integrated_gradients(
        self, classifier: Classifier, images: Images, targets: Targets
    ) -> Float[Tensor, "b c h w"]:
        """Return (1/2S) Σ_k (x − b_k) Σ_s ∇F_c(b_k + α_s (x − b_k)) for the two baselines b_k."""
        low, high = images.amin(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))
        alpha = torch.linspace(0, 1, self.steps, device=images.device, dtype=images.dtype)
        # All points from the minimum, then those from the maximum, without the image itself again.
        fractions = torch.cat([alpha, alpha[:-1]])
        points, last = len(fractions), self.steps - 1
        origins = torch.stack([low, high], dim=1).repeat_interleave(self.steps, dim=1)[:, :points]
        total = torch.zeros_like(images)
        scores = torch.empty(len(images) * points, device=images.device, dtype=images.dtype)
        at_once = classifier.pass_size(self.eval_batch_size, len(scores), images)
        through_model = classifier.repeated(
            partial(self._gradient, classifier), len(scores) // at_once
        )
        for part in torch.arange(len(scores), device=images.device).split(at_once):
            rows, point = part // points, part % points
            x, origin = images[rows], origins[rows, point][:, None, None, None]
            inputs = torch.lerp(origin, x, fractions[point][:, None, None, None])
            gradient, values = through_model(inputs, targets[rows])
            scores[part] = values.to(scores)
            # The image's own gradient counts for both paths.
            other = (point == last).to(x)[:, None, None, None]
            distance = (x - origin) + other * (x - high[rows][:, None, None, None])
            total.index_add_(0, rows, gradient * distance)
        require_finite(scores.view(-1, points), targets, "the class score")
        require_finite(total, targets, "the gradient of the class score")
        return total / (2 * self.steps)

    def _gradient(
        self, classifier: Classifier, inputs: Images, targets: Targets
    ) -> tuple[Float[Tensor, "a c h w"], Float[Tensor, " a"]]:
        """Return the gradient of the score, and the score."""
        inputs = inputs.detach().requires_grad_()
        values = classifier.scores(inputs, targets, self.score)
        (gradient,) = torch.autograd.grad(values.sum(), inputs)
        return gradient, values.detach()
