"""Every metric is a torchmetric like any other: collected, tracked, wrapped, merged, pickled, drawn."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pytest
import torch
from conftest import SmallNet
from matplotlib import pyplot as plt
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

from lightning_aop import GradCAM
from lightning_aop import metrics as own
from lightning_aop.metrics import BLUR
from lightning_aop.ops import Constant
from lightning_aop.scores import logit

torch.manual_seed(2)
NET = SmallNet().eval()
NET.head.weight.data *= 20
IMAGES = torch.rand(12, 3, 16, 16) * torch.rand(12, 3, 1, 1)
TARGETS = torch.arange(12) % 5
with torch.no_grad():  # classes of which there is more than in the blur
    SEEN = (NET(IMAGES) - NET(BLUR(IMAGES))).argmax(dim=1)
MAPS = torch.rand(12, 16, 16)
MASKS = torch.rand(12, 16, 16) > 0.5
SCORES = torch.rand(12)


@dataclass(frozen=True)
class Citizen:
    """A metric, the same with other settings, and what it is updated with."""

    name: str
    make: Callable[..., Metric]
    other: dict[str, Any]
    inputs: tuple[str, ...] = ("model", "images", "maps", "targets")

    def batch(self, rows: slice) -> dict[str, Any]:
        given: dict[str, Any] = {"images": IMAGES, "maps": MAPS, "targets": TARGETS, "masks": MASKS}
        batch = {name: value[rows] for name, value in given.items()}
        batch["scores"] = SCORES[rows]
        if "maps" in self.inputs and "model" in self.inputs:
            batch["targets"] = SEEN[rows]
        return {n: v for n, v in (batch | {"model": NET}).items() if n in self.inputs}

    @property
    def batches(self) -> list[dict[str, Any]]:
        return [self.batch(slice(0, 6)), self.batch(slice(6, 12))]


def faithful(kind: Any, **fixed: Any) -> Callable[..., Metric]:
    return lambda **kwargs: kind(**({"steps": 6} | fixed | kwargs))


PAIRS = ("maps", "masks", "targets", "scores")
CITIZENS = [
    Citizen("DeletionAUC", faithful(own.DeletionAUC), {"steps": 9}),
    Citizen("InsertionAUC", faithful(own.InsertionAUC), {"steps": 9}),
    Citizen("OverallAUC", faithful(own.OverallAUC), {"steps": 9}),
    Citizen("OverallAUC, normalised", faithful(own.OverallAUC, normalise=True), {"steps": 9}),
    Citizen("Faithfulness", faithful(own.Faithfulness), {"steps": 9}),
    Citizen(
        "Faithfulness, estimated and normalised",
        faithful(own.Faithfulness, steps=30, evaluations=20, normalise=True),
        {"evaluations": 24},
    ),
    Citizen(
        "OverallAUC, of another baseline",
        faithful(own.OverallAUC),
        {"baseline": Constant(0.0)},
    ),
    Citizen("PointingGame", lambda **k: own.PointingGame(5, **k), {"tolerance": 3}, PAIRS),
    Citizen(
        "EnergyPointingGame",
        lambda **k: own.EnergyPointingGame(5, **k),
        {"score_threshold": 0.2},
        PAIRS,
    ),
    Citizen(
        "GridPointing",
        lambda **k: own.GridPointing(GradCAM("features"), logit, **({"least": -99.0} | k)),
        {"least": -0.5},
        ("model", "images", "targets"),
    ),
    Citizen("ROAD", lambda **k: own.ROAD(**({"shares": (0.2, 0.6)} | k)), {"shares": (0.4,)}),
    Citizen("Infidelity", lambda **k: own.Infidelity(**({"samples": 5} | k)), {"samples": 8}),
]


def scalar(value: Any) -> Tensor:
    """Return one number of a metric's value."""
    if isinstance(value, dict):
        value = value["mean" if "mean" in value else "overall_auc"]
    assert isinstance(value, Tensor)
    assert value.ndim == 0
    return value


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, equal_nan=True, check_dtype=False)


def whole(citizen: Citizen, **settings: Any) -> Any:
    metric = citizen.make(**settings)
    for batch in citizen.batches:
        metric.update(**batch)
    return metric.compute()


citizens = pytest.mark.parametrize("citizen", CITIZENS, ids=lambda c: c.name)


def test_all_metrics_are_on_the_list() -> None:
    offered = {n for n in own.__all__ if isinstance(getattr(own, n), type)} - {"CurveEstimate"}
    assert {citizen.name.partition(",")[0] for citizen in CITIZENS} == offered


@citizens
def test_forward_gives_the_batchs_value_and_adds_it(citizen: Citizen) -> None:
    metric = citizen.make()
    for batch in citizen.batches:
        alone = citizen.make()
        alone.update(**batch)
        same(metric(**batch), alone.compute())
    same(metric.compute(), whole(citizen))


@citizens
def test_collections_keep_metrics_of_other_settings_apart(citizen: Citizen) -> None:
    members = {
        "first": citizen.make(),
        "same": citizen.make(),
        "other": citizen.make(**citizen.other),
    }
    collection = MetricCollection(members, compute_groups=True)
    for batch in citizen.batches:
        collection.update(**batch)
    groups = [set(group) for group in collection.compute_groups.values()]
    assert {"first", "same"} in groups
    assert {"other"} in groups
    expected = {"first": whole(citizen), "other": whole(citizen, **citizen.other)}
    for name, value in expected.items():
        part = collection[name].compute()
        same(part, value)
    same(collection["same"].compute(), expected["first"])


class Flat(torch.nn.Module):
    """Gives every image the same logits, so that metrics agree whatever their settings."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 5) + 0 * images.sum()


@citizens
def test_a_first_batch_on_which_they_agree_ties_no_metrics_of_other_settings(
    citizen: Citizen,
) -> None:
    flat = {"model": Flat(), "scores": torch.ones(6), "masks": torch.zeros_like(MASKS[:6])}
    if citizen.name == "GridPointing":
        flat = {"targets": torch.zeros(6, dtype=torch.long)}  # of which no four are tiled
    first = {name: flat.get(name, value) for name, value in citizen.batches[0].items()}
    members = {"one": citizen.make(), "other": citizen.make(**citizen.other)}
    collection = MetricCollection(members, compute_groups=True)
    collection.update(**first)
    collection.reset()
    for batch in citizen.batches:
        collection.update(**batch)
    same(collection["one"].compute(), whole(citizen))
    same(collection["other"].compute(), whole(citizen, **citizen.other))


def test_a_collection_of_all_judges_gives_each_what_it_takes() -> None:
    chosen = [c for c in CITIZENS if "maps" in c.inputs or c.name == "GridPointing"]
    collection = MetricCollection({c.name: c.make() for c in chosen})
    everything = {k: v for c in chosen for k, v in c.batch(slice(0, 12)).items()}
    everything["targets"] = TARGETS
    collection.update(**everything)
    for citizen in chosen:
        alone = citizen.make()
        alone.update(**{name: everything[name] for name in citizen.inputs})
        same(collection[citizen.name].compute(), alone.compute())


@citizens
def test_a_tracker_remembers_each_epoch(citizen: Citizen) -> None:
    tracker = MetricTracker(citizen.make(), maximize=True)
    expected = []
    for batch in citizen.batches:
        tracker.increment()
        tracker.update(**batch)
        alone = citizen.make()
        alone.update(**batch)
        expected.append(scalar(alone.compute()))
    steps = [scalar(step.compute()) for step in list(tracker)[1:]]
    same(torch.stack(steps), torch.stack(expected))


@citizens
def test_wrappers_take_it(citizen: Citizen) -> None:
    window = Running(citizen.make(), window=1)
    for batch in citizen.batches:
        window(**batch)
    last = citizen.make()
    last.update(**citizen.batches[1])
    same(window.compute(), last.compute())
    if isinstance(last.compute(), dict):
        return  # these wrappers are for single numbers
    extremes = MinMaxMetric(citizen.make())
    extremes.update(**citizen.batches[0])
    assert scalar(extremes.compute()["raw"]).isfinite()
    torch.manual_seed(0)
    boot = BootStrapper(citizen.make(), num_bootstraps=2, sampling_strategy="multinomial")
    boot.update(**citizen.batch(slice(0, 12)))
    assert boot.compute()["mean"].isfinite()


@citizens
def test_states_are_merged_pickled_saved_and_reset(citizen: Citizen) -> None:
    first, second = citizen.make(), citizen.make()
    first.update(**citizen.batches[0])
    second.update(**citizen.batches[1])
    copied = pickle.loads(pickle.dumps(first))
    half = copied.compute()
    alone = citizen.make()
    alone.update(**citizen.batches[0])
    same(half, alone.compute())
    first.merge_state(second)
    same(first.compute(), whole(citizen))
    first.persistent(True)
    restored = citizen.make()
    restored.persistent(True)
    restored.load_state_dict(first.state_dict())
    restored._update_count = 1
    same(restored.compute(), whole(citizen))
    clone = first.clone()
    clone.reset()
    clone.update(**citizen.batches[0])
    same(clone.compute(), half)


@citizens
def test_it_is_drawn(citizen: Citizen) -> None:
    mpl.use("agg")
    metric = citizen.make()
    for batch in citizen.batches:
        metric.update(**batch)
    figure, axes = metric.plot()
    assert axes.get_figure() is figure
    assert axes.has_data()
    again = plt.figure().subplots()
    assert metric.plot(ax=again)[1] is again
    plt.close("all")


@citizens
def test_which_way_is_better_is_said(citizen: Citizen) -> None:
    metric = citizen.make()
    if citizen.name.startswith("Faithfulness"):
        assert metric.higher_is_better is None  # of several values
        return
    assert metric.higher_is_better is (citizen.name not in ("DeletionAUC", "Infidelity"))
    assert metric.plot_lower_bound is not None
    assert not metric.full_state_update
