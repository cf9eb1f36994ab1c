"""Pointing games: does the heat of a class lie on the objects of that class?

In the pointing game (Zhang, J. et al., *Top-down Neural Attention by Excitation Backprop*, 2016) the
maximum of a map is a hit if it lies in the mask of the explained class. The paper: Acc = Hits /
(Hits + Misses) for each category, then the mean accuracy across categories, where only classes with
F_c(I_0) > 0.5 are tested. The energy-based game (Wang et al., *Score-CAM*, 2020) takes the share of the
heat in the mask instead. A *pair* is an image with one of its classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from math import ceil, inf, isqrt
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from lightning_aop.checks import require_tensors
from lightning_aop.errors import InvalidTypeError, InvalidValueError
from lightning_aop.metrics.apart import tell_apart
from lightning_aop.scores import full_precision
from lightning_aop.types import Maps, Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Masks: TypeAlias = Bool[Tensor, "b h w"]
"""Where the objects of the explained class are, at the size of the maps."""


def pointing_hits(maps: Maps, masks: Masks, tolerance: float = 0) -> Float[Tensor, " b"]:
    """Return whether the maximum of each map lies in its mask, in [0, 1].

    Several equal maxima count by the share of them that hits: a constant map gets the share of the
    mask's area. A maximum hits if a pixel of the mask is nearer than max(tolerance, 1) pixels, so 0 and
    1 both ask for the pixel itself. An empty mask is never hit.

    Args:
        maps: saliency; only the places of its maximum count.
        masks: the objects of the explained class.
        tolerance: in pixels of the maps; TorchRay's rule, which publishes with 15 and takes maps and
            masks at the photo's own size.

    Raises:
        TypeError: the masks are not bool.
        ValueError: the shapes don't fit each other, a map holds NaN, or the tolerance is negative.
    """
    _check_tolerance(tolerance)
    _check_shapes(maps, masks)
    _refuse(_pointing_fault(maps))
    return _hits(maps, masks.to(maps.device), tolerance)


def energy_in_mask(maps: Maps, masks: Masks) -> Float[Tensor, " b"]:
    """Return the share of each map's sum that falls in its mask, in [0, 1]; 0 without any heat.

    Args:
        maps: saliency, finite and not negative.
        masks: the objects of the explained class.

    Raises:
        TypeError: the masks are not bool.
        ValueError: the shapes don't fit each other, or a map holds NaN, infinite or negative values.
    """
    _check_shapes(maps, masks)
    _refuse(_energy_fault(maps))
    return _energy(maps, masks.to(maps.device))


class _PairGame(Metric, ABC):
    """What both metrics share: for each class the sums of the shares that hit and that miss.

    Args:
        num_classes: K.
        score_threshold: pairs whose score is not above it are not tested; None tests all.
        untested_as_zero: count classes without a tested pair as 0 in the mean, as TorchRay does;
            otherwise they are left out.
        class_names: K names, for the plot.
        kwargs: torchmetrics' own arguments, such as `sync_on_compute`.

    Raises:
        TypeError: a setting is no number.
        ValueError: a setting is out of its range.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    hits: Tensor
    misses: Tensor

    def __init__(
        self,
        num_classes: int,
        score_threshold: float | None = 0.5,
        untested_as_zero: bool = False,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(num_classes, int | Integral):
            raise InvalidTypeError(
                f"num_classes must be a whole number, got {num_classes!r}: give the number of the "
                "model's classes"
            )
        if not isinstance(score_threshold, float | Real | None):
            raise InvalidTypeError(
                f"score_threshold must be a probability in [0, 1], got {score_threshold!r}: give None "
                "to test all pairs"
            )
        if num_classes < 1:
            raise InvalidValueError(f"num_classes must be at least 1, got {num_classes}")
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise InvalidValueError(
                f"score_threshold must be a probability in [0, 1], got {score_threshold}: give None "
                "to test all pairs"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise InvalidValueError(
                f"class_names must name each of the {num_classes} classes, got {len(class_names)} "
                "names: give one for each class, in the order of the targets"
            )
        self.num_classes = num_classes
        self.score_threshold = score_threshold
        self.untested_as_zero = untested_as_zero
        self.class_names = list(class_names or map(str, range(num_classes)))
        for side in ("hits", "misses"):
            empty = torch.zeros(num_classes, dtype=torch.float64)
            self.add_state(side, empty, dist_reduce_fx="sum")
        tell_apart(self, type(self).__name__, score_threshold)

    def update(
        self,
        maps: Maps,
        masks: Masks,
        targets: Targets,
        scores: Float[Tensor, " b"] | None = None,
    ) -> None:
        """Add a batch of pairs.

        Args:
            maps: saliency of each pair.
            masks: the objects of the target class, at the size of the maps.
            targets: the class of each pair, in 0..K−1.
            scores: the model's probability in [0, 1] of that class; all pairs are tested without.

        Raises:
            TypeError: an argument is no tensor, or the masks are not bool.
            ValueError: the shapes don't fit each other, or a map, target or score is out of range.
        """
        _check_shapes(maps, masks)
        given = {"targets": targets} | ({} if scores is None else {"scores": scores})
        require_tensors(**given)
        for name, values in given.items():
            if values.shape != maps.shape[:1]:
                raise InvalidValueError(
                    f"{name} must have shape {[len(maps)]}, got {list(values.shape)}: give one for "
                    "each map"
                )
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise InvalidValueError(
                f"targets must be class indices, got {targets.dtype}: give one integer for each map"
            )
        maps, masks, classes = maps.detach(), masks.to(maps.device), targets.to(maps.device).long()
        faults = [self._fault(maps), _target_fault(classes, self.num_classes)]
        weight = torch.ones(len(maps), dtype=torch.bool, device=maps.device)
        if scores is not None and self.score_threshold is not None:
            scores = scores.detach().to(maps.device)
            faults.append(_score_fault(scores))
            weight = scores > self.score_threshold
        _refuse(*faults)
        # No row is picked out: how many are tested stays on the device.
        share, tested = self._shares(maps, masks).to(self.hits), weight.to(self.hits)
        classes, none = classes.to(self.hits.device), torch.zeros_like(self.hits)
        self.hits = self.hits + none.index_add(0, classes, tested * share)
        self.misses = self.misses + none.index_add(0, classes, tested * (1 - share))

    def compute(self) -> dict[str, Tensor]:
        """Return the results over all pairs so far.

        Returns:
            mean: over the tested classes, in [0, 1]; NaN if none was tested. With `untested_as_zero`
                over all K classes.
            pooled: over all tested pairs, whatever their class; NaN if none was tested.
            per_class: [K], NaN for untested classes.
            hits: [K], sums of the shares that hit.
            misses: [K], sums of the shares that don't.
            tested: [K], the number of tested pairs.
            tested_classes: how many classes have one.
        """
        # Each pair adds exactly 1 to both sides together, apart from rounding.
        tested = (self.hits + self.misses).round().long()
        per_class = self.hits / tested
        counted = per_class.nan_to_num(0) if self.untested_as_zero else per_class
        return {
            "mean": counted.nanmean(),
            "pooled": self.hits.sum() / tested.sum(),
            "per_class": per_class,
            "hits": self.hits,
            "misses": self.misses,
            "tested": tested,
            "tested_classes": (tested > 0).sum(),
        }

    def plot(
        self, val: dict[str, Tensor] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure, Axes]":
        """Draw a bar for each tested class, best first, and the mean as a line.

        Args:
            val: what `compute()` returned; computed by default.
            ax: where to draw. By default a figure that grows with the number of tested classes.
        """
        from matplotlib import pyplot as plt

        result = self.compute() if val is None else val
        mean = float(result["mean"])
        # torchmetrics gives the [1] of a single class as a scalar.
        lists = (result[key].reshape(-1).tolist() for key in ("per_class", "tested", "hits"))
        values, tested, hits = lists
        # The best first; of equals the one with more pairs, then the order of the classes.
        drawn = [k for k in range(self.num_classes) if tested[k]]
        drawn.sort(key=lambda k: (-values[k], -tested[k]))
        dense = len(drawn) > 30
        if ax is None:
            size = (5.6, 0.9 + (0.17 if dense else 0.28) * max(len(drawn), 3))
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        font = 7 if dense else 9
        ax.barh(range(len(drawn)), [values[k] for k in drawn], height=0.72, color=_BAR)
        names = [self.class_names[k] for k in drawn]
        # A $ in a name begins no formula.
        ax.set_yticks(range(len(drawn)), names, fontsize=font, parse_math=False)
        for row, k in enumerate(drawn):
            ax.annotate(
                f"{values[k]:.2f}  {self._count(hits[k], tested[k])}",
                (values[k], row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=font,
                color=_TEXT,
                annotation_clip=False,
                # Where the line of the mean runs through it, the text stays readable.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                zorder=4,
            )
        if drawn:
            ax.axvline(mean, color=_LINE, linewidth=1.2, zorder=3)
            ax.annotate(
                f"mean {mean:.2f}",
                (mean, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=_LINE,
            )
        else:
            ax.text(0.5, 0, "no pair was tested", ha="center", va="center")
        ax.set(xlim=(0, 1), ylim=(max(len(drawn), 1) - 0.4, -0.6))
        label, untested = self._label, self.num_classes - len(drawn)
        if untested and drawn:
            label += f"\n{untested} of {self.num_classes} classes not tested"
            label += ", 0 in the mean" if self.untested_as_zero else ""
        ax.set_xlabel(label)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
        figure = ax.get_figure()
        assert figure is not None
        return figure, ax  # type: ignore[return-value]

    _label: str

    @abstractmethod
    def _shares(self, maps: Maps, masks: Masks) -> Float[Tensor, " b"]:
        """Return the hit of each pair, in [0, 1]."""

    @abstractmethod
    def _fault(self, maps: Maps) -> "_Fault":
        """Return which maps can't be evaluated."""

    @abstractmethod
    def _count(self, hits: float, tested: int) -> str:
        """Return the counts of a class as they are written beside its bar."""


_BAR, _LINE, _TEXT = "#8fb8d0", "#c44536", "#333333"


class PointingGame(_PairGame):
    """Hits / (hits + misses) of the maps' maxima, for each class and as the mean over classes.

    Args:
        num_classes: K.
        tolerance: how far, in pixels of the maps, a maximum may lie from the mask; see
            `pointing_hits`. The paper names none; TorchRay publishes with 15 pixels of the photo.
        score_threshold: pairs whose score is not above it are not tested, the paper's rule; None
            tests all.
        untested_as_zero: count classes without a tested pair as 0 in the mean, as TorchRay does;
            otherwise they are left out.
        class_names: K names, for the plot.
        kwargs: torchmetrics' own arguments, such as `sync_on_compute`.

    Raises:
        ValueError: a setting is out of its range.
    """

    _label = "share of maxima that hit"

    def __init__(
        self,
        num_classes: int,
        tolerance: float = 0,
        score_threshold: float | None = 0.5,
        untested_as_zero: bool = False,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_tolerance(tolerance)
        super().__init__(num_classes, score_threshold, untested_as_zero, class_names, **kwargs)
        self.tolerance = tolerance
        tell_apart(self, type(self).__name__, score_threshold, tolerance)

    def _shares(self, maps: Maps, masks: Masks) -> Float[Tensor, " b"]:
        return _hits(maps, masks, self.tolerance)

    def _fault(self, maps: Maps) -> "_Fault":
        return _pointing_fault(maps)

    def _count(self, hits: float, tested: int) -> str:
        return f"{f'{hits:.1f}'.removesuffix('.0')} of {tested}"


class EnergyPointingGame(_PairGame):
    """Share of the heat that falls in the mask, for each class and as the mean over classes.

    `hits` holds the sums of the shares inside the masks, `misses` of those outside; a map without any
    heat misses.

    Args:
        num_classes: K.
        score_threshold: pairs whose score is not above it are not tested, the paper's rule; None
            tests all.
        untested_as_zero: count classes without a tested pair as 0 in the mean, as TorchRay does;
            otherwise they are left out.
        class_names: K names, for the plot.
        kwargs: torchmetrics' own arguments, such as `sync_on_compute`.

    Raises:
        ValueError: a setting is out of its range.
    """

    _label = "share of the heat in the mask"

    def _shares(self, maps: Maps, masks: Masks) -> Float[Tensor, " b"]:
        return _energy(maps, masks)

    def _fault(self, maps: Maps) -> "_Fault":
        return _energy_fault(maps)

    def _count(self, hits: float, tested: int) -> str:
        return f"{tested} pairs" if tested > 1 else "1 pair"


def _hits(maps: Maps, masks: Masks, tolerance: float) -> Float[Tensor, " b"]:
    maxima = maps == maps.amax(dim=(1, 2), keepdim=True)
    hits = maxima & _dilated(masks, tolerance)
    return hits.sum(dim=(1, 2)) / maxima.sum(dim=(1, 2))


def _energy(maps: Maps, masks: Masks) -> Float[Tensor, " b"]:
    heat = full_precision(maps)
    inside = torch.where(masks, heat, 0).sum(dim=(1, 2))
    total = inside + torch.where(masks, 0, heat).sum(dim=(1, 2))  # never below `inside` by rounding
    return torch.where(total > 0, inside / total, 0)


def _dilated(masks: Masks, tolerance: float) -> Masks:
    """Return the pixels that have one of the mask nearer than max(tolerance, 1).

    The distance along the row comes from a running maximum and minimum. In a row dy away it may be up to
    √(r² − dy²), with r² the largest integer below tolerance²: exact, and linear in the radius.
    """
    reach = max(ceil(Fraction(float(tolerance)) ** 2) - 1, 0)
    if reach == 0:
        return masks
    height, width = masks.shape[-2:]
    column = torch.arange(width, dtype=torch.int32, device=masks.device)
    left = column - torch.where(masks, column, -width).cummax(dim=2).values
    right = torch.where(masks, column, 2 * width).flip(2).cummin(dim=2).values.flip(2) - column
    distance = torch.minimum(left, right)  # at least the width where the row has none
    near = torch.zeros_like(masks)
    for dy in range(min(isqrt(reach), height - 1) + 1):
        row = distance <= min(isqrt(reach - dy * dy), width - 1)
        near[:, dy:] |= row[:, : height - dy]
        near[:, : height - dy] |= row[:, dy:]
    return near


class _Fault(NamedTuple):
    """Rows that are refused, and what to say of them: {rows}, and their {values}."""

    rows: Bool[Tensor, " b"]
    message: str
    values: Tensor | None = None


def _refuse(*faults: _Fault) -> None:
    """Raise ValueError for the first fault that any row has, at the cost of one copy to the host."""
    if not torch.stack([fault.rows for fault in faults]).any():
        return
    for rows, message, values in faults:
        bad = rows.nonzero()[:, 0].tolist()
        if bad:
            shown = None if values is None else values[rows].tolist()
            raise InvalidValueError(message.format(rows=bad, values=shown))


def _pointing_fault(maps: Maps) -> _Fault:
    message = (
        "maps hold NaN in row(s) {rows}: such a map has no maximum; check the explanation, or leave "
        "these pairs out"
    )
    return _Fault(maps.amax(dim=(1, 2)).isnan(), message)


def _energy_fault(maps: Maps) -> _Fault:
    message = (
        "maps hold NaN, infinite or negative values in row(s) {rows}: a share of the heat needs finite "
        "values from 0 up; cut maps with a sign off at 0 (maps.relu())"
    )
    # NaN fails both comparisons.
    valid = (maps.amin(dim=(1, 2)) >= 0) & (maps.amax(dim=(1, 2)) < inf)
    return _Fault(~valid, message)


def _target_fault(targets: Targets, num_classes: int) -> _Fault:
    message = (
        f"targets must lie in 0..{num_classes - 1}, got {{values}} in row(s) {{rows}}: give the index "
        "of a class, or a larger num_classes"
    )
    return _Fault((targets < 0) | (targets >= num_classes), message, targets)


def _score_fault(scores: Float[Tensor, " b"]) -> _Fault:
    message = (
        "scores must be probabilities in [0, 1], got {values} in row(s) {rows}: turn logits into them "
        "with lightning_aop.scores.sigmoid or softmax"
    )
    return _Fault(~((scores >= 0) & (scores <= 1)), message, scores)


def _check_shapes(maps: Tensor, masks: Tensor) -> None:
    require_tensors(maps=maps, masks=masks)
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise InvalidValueError(
            f"maps must have shape [B, H, W], got {list(maps.shape)}: give one map for each pair"
        )
    if masks.shape != maps.shape:
        raise InvalidValueError(
            f"masks must have the shape of the maps, {list(maps.shape)}, got {list(masks.shape)}: "
            "bring both to the size of the image first"
        )
    if masks.dtype != torch.bool:
        raise InvalidTypeError(
            f"masks must be bool, got {masks.dtype}: compare them, as masks > 0.5"
        )


def _check_tolerance(tolerance: float) -> None:
    if not isinstance(tolerance, float | Real):
        raise InvalidTypeError(
            f"tolerance must be a number of pixels, 0 or more, got {tolerance!r}: give 0 for the pixel "
            "itself, 15 for TorchRay's rule"
        )
    if not 0 <= tolerance < inf:
        raise InvalidValueError(
            f"tolerance must be a finite distance in pixels, 0 or more, got {tolerance}: give 0 for "
            "the pixel itself, 15 for TorchRay's rule"
        )
