"""Deletion, insertion and overall AUC as torchmetrics, over the curves of `functional`."""

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_aop.checks import require_counts
from lightning_aop.metrics.apart import tell_apart
from lightning_aop.metrics.functional import (
    BLUR,
    GameName,
    auc,
    check_evaluations,
    check_steps,
    deletion_curve,
    deletion_insertion_curves,
    estimate_curves,
    gap,
    insertion_curve,
    normalised,
)
from lightning_aop.ops import Baseline
from lightning_aop.scores import Score, softmax
from lightning_aop.types import Images, Maps, Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID = 101
"""Points on which mean curves are kept, so that images of any size and step can be averaged."""


class _FaithfulnessAUC(Metric, ABC):
    """What the metrics share: sums of AUCs and of curves, so that processes add up.

    Args:
        score: the class score; `softmax`, or `sigmoid` for a multilabel model.
        baseline: what takes the place of a pixel, a function of the images; the paper's blur.
        steps: the number of steps of each curve, if `pixels_per_step` is None.
        pixels_per_step: N of the protocol, 448 in the default at 224 × 224.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
        evaluations: per image, for all its curves together, for an estimate by `estimate_curves`, whose
            standard errors are `auc_errors`; None for the full curves.
        normalise: take each curve relative to the scores of the whole and of the blurred image, see
            `functional.normalised`; images for which that is undefined are left out, and counted in
            `undefined`. It takes no further evaluations.
        kwargs: torchmetrics' own arguments, such as `sync_on_compute`.
    """

    is_differentiable = False
    full_state_update = False
    games: ClassVar[tuple[GameName, ...]]
    total: Tensor
    undefined: Tensor
    """With `normalise`: how many images have no normalised curve."""
    last_curves: dict[str, Tensor]
    """The scores of the last update's batch [B, points], by "deletion" and "insertion"."""
    last_evaluated: dict[str, Bool[Tensor, "b points"]]
    """The points of `last_curves` that were evaluated, where `evaluations` is given."""
    last_errors: dict[str, Float[Tensor, " b"]]
    """The standard error of each image's AUC, where `evaluations` is given."""

    def __init__(
        self,
        score: Score = softmax,
        baseline: Baseline = BLUR,
        steps: int = 112,
        pixels_per_step: int | None = None,
        eval_batch_size: int | None = None,
        evaluations: int | None = None,
        normalise: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_steps(type(self).__name__, steps, pixels_per_step)
        require_counts(type(self).__name__, eval_batch_size=eval_batch_size)
        if evaluations is not None:
            check_evaluations(evaluations, self.games)
        self.normalise = normalise
        self.last_curves, self.last_evaluated, self.last_errors = {}, {}, {}
        self.evaluations = evaluations
        self.settings: dict[str, Any] = {
            "score": score,
            "baseline": baseline,
            "steps": steps,
            "pixels_per_step": pixels_per_step,
            "eval_batch_size": eval_batch_size,
        }
        for game in self.games:
            for kind in self._kinds:
                self.add_state(f"{game}_auc{kind}", torch.tensor(0.0), dist_reduce_fx="sum")
                self.add_state(f"{game}_curve{kind}", torch.zeros(_GRID), dist_reduce_fx="sum")
                if evaluations is not None:
                    zero = torch.tensor(0.0)
                    self.add_state(f"{game}_variance{kind}", zero, dist_reduce_fx="sum")
            if evaluations is not None:
                self.add_state(f"{game}_evaluated", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        if normalise:
            self.add_state("undefined", torch.tensor(0), dist_reduce_fx="sum")
        # Not by their kind, which states tell by name: Faithfulness and OverallAUC share one work.
        tell_apart(self, self.settings, evaluations)

    def update(self, model: nn.Module, images: Images, maps: Maps, targets: Targets) -> None:
        """Evaluate the curves of a batch.

        Args:
            model: maps images to logits [B, K].
            images: a batch as the model takes it.
            maps: saliency of each image, at its size; only its order counts.
            targets: the class whose score is watched.
        """
        self.last_curves = self._curves(model, images, maps, targets)
        for game in self.games:
            curve, error = self.last_curves[game], self.last_errors.get(game)
            for kind in self._kinds:
                if kind:
                    defined = ~(width := gap(curve, game)).isnan()
                    error = None if error is None else (error / width)[defined]
                    curve = normalised(curve, game)[defined]
                self._add(f"{game}_auc{kind}", auc(curve).sum())
                self._add(f"{game}_curve{kind}", _on_grid(curve).sum(dim=0))
                if error is not None:
                    self._add(f"{game}_variance{kind}", error.square().sum())
            if error is not None:
                self._add(f"{game}_evaluated", self.last_evaluated[game].sum())
        if self.normalise:
            first = self.games[0]
            self._add("undefined", gap(self.last_curves[first], first).isnan().sum())
        self.total += len(images)

    def _add(self, state: str, value: Tensor) -> None:
        mine: Tensor = getattr(self, state)
        mine += value.to(mine)

    @property
    def _kinds(self) -> tuple[str] | tuple[str, str]:
        """The ends of the names of the sums that are kept."""
        return (_NORMALISED,) if self.normalise else ("",)

    def _count(self, kind: str) -> Tensor:
        """Return how many images a sum is of."""
        return self.total - self.undefined if kind else self.total

    @property
    def evaluations_per_image(self) -> int | None:
        """The most model evaluations for all curves of an image, None where its size decides."""
        if self.evaluations is not None or self.settings["pixels_per_step"] is not None:
            return self.evaluations
        games = len(self.games)
        # Both together start where the other ends.
        return games * int(self.settings["steps"]) + (games == 1)

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self.last_curves, self.last_evaluated, self.last_errors = {}, {}, {}

    def _curves(
        self, model: nn.Module, images: Images, maps: Maps, targets: Targets
    ) -> dict[str, Float[Tensor, "b points"]]:
        batch = (model, images, maps, targets)
        if self.evaluations is not None:
            found = estimate_curves(*batch, self.evaluations, games=self.games, **self.settings)
            self.last_evaluated = {game: each.evaluated for game, each in found.items()}
            self.last_errors = {game: each.error for game, each in found.items()}
            return {game: each.curve for game, each in found.items()}
        if len(self.games) == 2:
            both = deletion_insertion_curves(*batch, **self.settings)
            return dict(zip(("deletion", "insertion"), both, strict=True))
        play = deletion_curve if self.games == ("deletion",) else insertion_curve
        return {self.games[0]: play(*batch, **self.settings)}

    def _mean_auc(self, game: str, kind: str | None = None) -> Float[Tensor, ""]:
        kind = self._kinds[0] if kind is None else kind
        mean: Tensor = getattr(self, f"{game}_auc{kind}") / self._count(kind)
        return mean

    def auc_errors(self) -> dict[str, Float[Tensor, ""]]:
        """Return the standard error of each mean AUC over all images so far, the overall AUC included.

        Errors of images and curves are taken for independent. Nothing comes back where `evaluations` is
        None. Over processes it is synchronised inside `sync_context()`, as `compute()` is automatically.
        """
        if self.evaluations is None:
            return {}
        errors = {}
        for kind in self._kinds:
            variances: dict[str, Tensor] = {
                g: getattr(self, f"{g}_variance{kind}") for g in self.games
            }
            if len(variances) == 2:
                variances["overall"] = variances["deletion"] + variances["insertion"]
            for game, variance in variances.items():
                errors[f"{game}_auc{kind}_error"] = variance.sqrt() / self._count(kind)
        return errors

    def plot(self, val: object = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw each mean curve with its AUC; `val` is torchmetrics' and has no use."""
        from matplotlib import pyplot as plt

        if ax is None:
            ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")[1]
        share, kind = torch.linspace(0, 100, _GRID).tolist(), self._kinds[-1]
        for game in self.games:
            curve = (getattr(self, f"{game}_curve{kind}") / self._count(kind)).tolist()
            label = f"{game}, AUC {self._mean_auc(game, kind):.3f}"
            ax.plot(share, curve, label=label, color=_COLOURS[game], linewidth=2)
        ax.set(
            xlabel="pixels moved, most salient first (%)",
            ylabel=f"mean {'normalised ' * bool(kind)}score of the class",
        )
        ax.set(xlim=(0, 100), ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
        figure = ax.get_figure()
        assert figure is not None
        return figure, ax  # type: ignore[return-value]


_NORMALISED = "_normalised"
_COLOURS = {"deletion": "#c44536", "insertion": "#2a6f97"}


class DeletionAUC(_FaithfulnessAUC):
    """Mean area under the deletion curve, in [0, 1] for a probability; lower is more faithful."""

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    games = ("deletion",)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over all images so far."""
        return self._mean_auc("deletion")


class InsertionAUC(_FaithfulnessAUC):
    """Mean area under the insertion curve, in [0, 1] for a probability; higher is more faithful."""

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    games = ("insertion",)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over all images so far."""
        return self._mean_auc("insertion")


class OverallAUC(_FaithfulnessAUC):
    """Insertion AUC − deletion AUC, the paper's overall score: the symmetric relevance gain (SRG).

    About 0 for a map that does not depend on the model. In [−1, 1] for a probability; higher is
    more faithful. Costs 2n evaluations per image.
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    games = ("deletion", "insertion")

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over all images so far."""
        return self._mean_auc("insertion") - self._mean_auc("deletion")


class Faithfulness(_FaithfulnessAUC):
    """All three in one pass: `compute()` gives deletion_auc, insertion_auc and overall_auc.

    With `normalise`, overall_auc_normalised beside them, over the images for which it is defined, and
    overall_auc_undefined, the number of the others. With `evaluations`, their standard errors too, as
    deletion_auc_error and so on, and `evaluations`, the mean number per image.
    """

    games = ("deletion", "insertion")
    deletion_evaluated: Tensor
    insertion_evaluated: Tensor

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means over all images so far."""
        found = {f"{game}_auc": self._mean_auc(game, "") for game in self.games}
        found["overall_auc"] = found["insertion_auc"] - found["deletion_auc"]
        if self.normalise:
            deletion, insertion = (self._mean_auc(game, _NORMALISED) for game in self.games)
            found |= {"overall_auc_normalised": insertion - deletion}
            found |= {"overall_auc_undefined": self.undefined.to(insertion)}
        return {
            **found,
            **self.auc_errors(),
            **self._evaluations(),
        }

    @property
    def _kinds(self) -> tuple[str] | tuple[str, str]:
        return ("", _NORMALISED) if self.normalise else ("",)

    def _evaluations(self) -> dict[str, Float[Tensor, ""]]:
        if self.evaluations is None:
            return {}
        points: Tensor = self.deletion_evaluated + self.insertion_evaluated
        return {"evaluations": points / self.total - 2}  # each curve starts where the other ends


def _on_grid(curve: Float[Tensor, "b points"]) -> Float[Tensor, "b grid"]:
    """Resample the curves linearly to `_GRID` equal steps over the same range."""
    return nn.functional.interpolate(curve[:, None], size=_GRID, mode="linear", align_corners=True)[
        :, 0
    ]
