"""Deletion, insertion and overall AUC as torchmetrics, over the curves of `functional`."""

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_aop.metrics.functional import (
    BLUR,
    GameName,
    auc,
    deletion_curve,
    deletion_insertion_curves,
    estimate_curves,
    insertion_curve,
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
        kwargs: torchmetrics' own arguments, such as `sync_on_compute`.
    """

    is_differentiable = False
    full_state_update = False
    games: ClassVar[tuple[GameName, ...]]
    total: Tensor
    last_curves: dict[str, Tensor]
    """Of the batch of the last update [B, points], by "deletion" and "insertion"."""
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
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
            self.add_state(f"{game}_auc", torch.tensor(0.0), dist_reduce_fx="sum")
            self.add_state(f"{game}_curve", torch.zeros(_GRID), dist_reduce_fx="sum")
            if evaluations is not None:
                self.add_state(f"{game}_variance", torch.tensor(0.0), dist_reduce_fx="sum")
                self.add_state(f"{game}_evaluated", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, model: nn.Module, images: Images, maps: Maps, targets: Targets) -> None:
        """Evaluate the curves of a batch.

        Args:
            model: maps images to logits [B, K].
            images: a batch as the model takes it.
            maps: saliency of each image, at its size; only its order counts.
            targets: the class whose score is watched.
        """
        self.last_curves = self._curves(model, images, maps, targets)
        for game, curve in self.last_curves.items():
            area, mean = getattr(self, f"{game}_auc"), getattr(self, f"{game}_curve")
            area += auc(curve).sum().to(area)
            mean += _on_grid(curve).sum(dim=0).to(mean)
        for game, error in self.last_errors.items():
            variance, evaluated = (
                getattr(self, f"{game}_variance"),
                getattr(self, f"{game}_evaluated"),
            )
            variance += error.square().sum().to(variance)
            evaluated += self.last_evaluated[game].sum().to(evaluated)
        self.total += len(images)

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

    def _mean_auc(self, game: str) -> Float[Tensor, ""]:
        mean: Tensor = getattr(self, f"{game}_auc") / self.total
        return mean

    def auc_errors(self) -> dict[str, Float[Tensor, ""]]:
        """Return the standard error of each mean AUC over all images so far, the overall AUC included.

        Errors of images and curves are taken for independent. Nothing comes back where `evaluations` is
        None. Over processes it is synchronised inside `sync_context()`, as `compute()` is automatically.
        """
        if self.evaluations is None:
            return {}
        variances: dict[str, Tensor] = {g: getattr(self, f"{g}_variance") for g in self.games}
        if len(variances) == 2:
            variances["overall"] = variances["deletion"] + variances["insertion"]
        return {f"{game}_auc_error": v.sqrt() / self.total for game, v in variances.items()}

    def plot(self, val: object = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw each mean curve with its AUC; `val` is torchmetrics' and has no use."""
        from matplotlib import pyplot as plt

        if ax is None:
            ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")[1]
        share = torch.linspace(0, 100, _GRID).tolist()
        for game in self.games:
            curve = (getattr(self, f"{game}_curve") / self.total).tolist()
            label = f"{game}, AUC {self._mean_auc(game):.3f}"
            ax.plot(share, curve, label=label, color=_COLOURS[game], linewidth=2)
        ax.set(xlabel="pixels moved, most salient first (%)", ylabel="mean score of the class")
        ax.set(xlim=(0, 100), ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
        figure = ax.get_figure()
        assert figure is not None
        return figure, ax  # type: ignore[return-value]


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
    """Insertion AUC − deletion AUC, the paper's overall score.

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

    With `evaluations`, their standard errors too, as deletion_auc_error and so on, and `evaluations`,
    the mean number per image.
    """

    games = ("deletion", "insertion")
    deletion_evaluated: Tensor
    insertion_evaluated: Tensor

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means over all images so far."""
        deletion, insertion = self._mean_auc("deletion"), self._mean_auc("insertion")
        return {
            "deletion_auc": deletion,
            "insertion_auc": insertion,
            "overall_auc": insertion - deletion,
            **self.auc_errors(),
            **self._evaluations(),
        }

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
