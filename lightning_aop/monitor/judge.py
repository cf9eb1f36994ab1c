"""How faithful the maps are, and how faithful maps would be that don't depend on the model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.controls import CentreGaussian, RandomMap
from lightning_aop.metrics import EnergyPointingGame, Faithfulness, OverallAUC, PointingGame
from lightning_aop.model.passes import Passes
from lightning_aop.scores import Score
from lightning_aop.types import Images, Maps, SaliencyMethod, Targets

T = TypeVar("T")

Judging: TypeAlias = Metric | MetricCollection

_STEPS = 28  # of the default metric's curves: 56 model evaluations per explanation
_CONTROLS: dict[str, SaliencyMethod] = {
    "random map": RandomMap(),
    "centre gaussian": CentreGaussian(),
}


CONTROLS = {name: f"overall_auc_{name.replace(' ', '_')}" for name in _CONTROLS}
"""The name that each control's overall AUC is logged by."""


@dataclass
class Judge:
    """The metrics of the maps, and when the controls are measured.

    Attributes:
        metrics: a metric, True for the default one, False for none.
        controls: measure the controls, where a metric is `Faithfulness` or `OverallAUC`.
        explained: explanations so far.
        lines: the metrics of the controls, as last measured.
        seconds: how long the controls, and the floor of the drift, took when last measured.
        drifts: maps are compared with those of the explanation before.
        grid: tile recognised images of the probe, and see whether the heat lies in the right one.
    """

    metrics: Judging | bool = True
    controls: bool = True
    explained: int = 0
    lines: dict[str, dict[str, float]] | None = None
    seconds: float = 0.0
    drifts: bool = False
    grid: bool = False

    def __str__(self) -> str:
        """Return the metric for the configuration of a run."""
        if self.metrics is True:
            return f"Faithfulness(steps={_STEPS}, normalise=True)"
        return str(self.metrics)

    def metric(self, score: Score, together: bool) -> Judging | None:
        """Return what judges the maps; `together` if several processes judge a share each."""
        if self.metrics is True:
            return Faithfulness(score, steps=_STEPS, normalise=True, sync_on_compute=together)
        return None if self.metrics is False else self.metrics

    @property
    def evaluations(self) -> int | None:
        """The model evaluations for each map, None where the metric doesn't say."""
        metric = Faithfulness(steps=_STEPS) if self.metrics is True else self.metrics
        if isinstance(metric, bool):
            return 0
        costs = [getattr(part, "evaluations_per_image", None) for part in _parts(metric)]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    @property
    def names(self) -> set[str]:
        """The values that are there from the first explanation on, as far as that is known before."""
        metric = Faithfulness(normalise=True) if self.metrics is True else self.metrics
        if isinstance(metric, bool):
            return {"grid_pointing"} if self.grid else set()
        names = {"grid_pointing"} if self.grid else set()
        before = after = ""
        named: Iterable[tuple[str, Metric]]
        if isinstance(metric, MetricCollection):
            before, after = metric.prefix or "", metric.postfix or ""
            named = metric.items(keep_base=True, copy_state=False)
        else:
            named = [(_name(metric), metric)]
        for name, part in named:
            if isinstance(part, Faithfulness):
                own = {"deletion_auc", "insertion_auc", "overall_auc"}
                own |= {"overall_auc_normalised"} if part.normalise else set()
            else:
                own = {name}
            names |= {f"{before}{each}{after}" for each in own}
        return names

    @property
    def controls_due(self) -> bool:
        """Whether the next explanation measures the controls.

        The 1st, 2nd, 4th, 8th … does: what these maps get hangs on the scores of the model, which learns
        ever more slowly.
        """
        number = self.explained + 1
        return self.controls and number & (number - 1) == 0

    @property
    def extra_seconds(self) -> float:
        """How long the controls of the next explanation will take."""
        return self.seconds if self.controls_due else 0.0

    def scalars(self) -> dict[str, float]:
        """Return the overall AUC of the controls, as last measured, by the name that is logged."""
        return {
            CONTROLS[name]: values["overall_auc"]
            for name, values in (self.lines or {}).items()
            if self.controls and "overall_auc" in values
        }

    def update_controls(
        self, metric: Judging, model: nn.Module, images: Images, targets: Targets, passes: Passes
    ) -> dict[str, tuple[Judging, Float[Tensor, "b 2 points"] | None]]:
        """Judge the maps of the controls as `updated` does, by a `Faithfulness` or `OverallAUC`."""
        judges = [part for part in _parts(metric) if isinstance(part, (Faithfulness, OverallAUC))]
        return {
            name: updated(
                judges[0].clone(),
                model,
                images,
                control.explain(model, images, targets),
                targets,
                passes,
            )
            for name, control in _CONTROLS.items()
            if judges
        }


def with_another_seed(method: T) -> T | None:
    """Return the method with other random numbers, None where none of its parts has a seed."""
    if not is_dataclass(method) or isinstance(method, type):
        return None
    changes: dict[str, Any] = {}
    for each in fields(method):
        part = getattr(method, each.name)
        other = part + 1 if each.name == "seed" and type(part) is int else with_another_seed(part)
        if each.init and other is not None:
            changes[each.name] = other
    return replace(method, **changes) if changes else None


def singles(metric: Judging | None) -> Iterator[Judging]:
    """Yield the metrics of a collection, each in one of its own: one may fail without the others."""
    if not isinstance(metric, MetricCollection):
        yield from () if metric is None else (metric,)
        return
    for name, part in metric.items(keep_base=True, copy_state=False):
        yield MetricCollection({name: part}, prefix=metric.prefix, postfix=metric.postfix)


def name_of(metric: Judging) -> str:
    """Return the classes of a metric, or of those of a collection."""
    return " and ".join(type(part).__name__ for part in _parts(metric))


def updated(
    metric: Judging,
    model: nn.Module,
    images: Images,
    maps: Maps,
    targets: Targets,
    passes: Passes,
) -> tuple[Judging, Float[Tensor, "b 2 points"] | None]:
    """Judge maps, from the beginning.

    Returns:
        The metric, and the deletion and insertion curve of each map where it measures them.
    """
    metric = metric.to(images.device)
    metric.reset()
    size = passes.at_once(len(images))
    curves = []
    for part in zip(images.split(size), maps.split(size), targets.split(size), strict=True):
        metric.update(model, *part)
        measured = (getattr(each, "last_curves", {}) for each in _parts(metric))
        both = next((found for found in measured if len(found) == 2), None)
        if both is not None:
            curves.append(torch.stack([both["deletion"], both["insertion"]], dim=1))
    return metric, torch.cat(curves) if curves else None


def synced(metric: Judging, together: bool) -> None:
    """Add up what the processes have found, if `together`; `computed` exchanges nothing then."""
    for part in _parts(metric):
        if together:
            part.sync()
        part._to_sync = False


def computed(metric: Judging) -> dict[str, float]:
    """Return the metric's values by name."""
    try:
        result = metric.compute()
    finally:
        for part in _parts(metric):
            if part._is_synced:
                part.unsync()
            part._to_sync = part.sync_on_compute
    if not isinstance(result, Mapping):
        result = {_name(metric): result}
    for name, value in result.items():
        if torch.as_tensor(value).numel() != 1:
            raise InvalidValueError(
                f"{name} must be one number, got the shape {list(torch.as_tensor(value).shape)}: let "
                "compute() return a mean, or a dictionary of numbers"
            )
    return {name: float(value) for name, value in result.items()}


def located(
    maps: Maps,
    masks: Bool[Tensor, "b h w"],
    targets: Int[Tensor, " b"],
    num_classes: int,
) -> dict[str, float]:
    """Return how much of the heat lies on the objects, as a mean over their classes."""
    if len(maps) == 0:
        return {}
    metrics = {
        "pointing_game": PointingGame(num_classes, score_threshold=None, sync_on_compute=False),
        "energy_in_mask": EnergyPointingGame(
            num_classes, score_threshold=None, sync_on_compute=False
        ),
    }
    result = {}
    for name, metric in metrics.items():
        metric.update(maps.cpu(), masks, targets.cpu())  # in float64, which not every device has
        result[name] = float(metric.compute()["mean"])
    return result


def _name(metric: object) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(metric).__name__).lower()


def _parts(metric: Judging) -> Iterator[Metric]:
    if isinstance(metric, MetricCollection):
        yield from metric.values(copy_state=False)
    else:
        yield metric
