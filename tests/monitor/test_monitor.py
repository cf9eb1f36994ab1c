import copy
import csv
import io
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SmallNet, assert_same
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from scipy.stats import spearmanr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchmetrics import MetricCollection
from torchvision.transforms import v2

from lightning_aop import (
    ExplanationMonitor,
    GradCAM,
    HiResCAM,
    RankedMask,
    WGradCAM,
    fast_sigcam,
)
from lightning_aop.history.store import History, stored
from lightning_aop.methods.controls import CentreGaussian, RandomMap
from lightning_aop.metrics import (
    DeletionAUC,
    Faithfulness,
    OverallAUC,
    auc,
    deletion_insertion_curves,
)
from lightning_aop.monitor import panels, progress
from lightning_aop.monitor.explanation import Explanation, Moment
from lightning_aop.monitor.probe import Probe
from lightning_aop.scores import contrast, logit, sigmoid
from lightning_aop.view.grid import heatmap_grid

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


class Classifier(pl.LightningModule):
    def __init__(self, classes: int = 5, multilabel: bool = False, validates: bool = True) -> None:
        super().__init__()
        self.net = SmallNet(classes)
        self.loss = nn.BCEWithLogitsLoss() if multilabel else nn.CrossEntropyLoss()
        self.losses: list[float] = []
        if not validates:
            self.validation_step = None

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.net(images))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = cast("Tensor", self.loss(self(batch[0]), batch[1]))
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Pictures(Dataset[Any]):
    """Random pictures with augmentation from torch's random stream, and a count of look-ups."""

    classes = ("ant", "bee", "cat", "dog", "emu")

    def __init__(self, count: int = 24, labels: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(9)
        self.images = torch.rand(count, 3, 32, 32, generator=generator)
        self.labels = (
            torch.randint(0, 5, (count,), generator=generator) if labels is None else labels
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.rand(3, 32, 32) + 0.01 * np.random.rand()
        return self.images[index] + noise.float(), self.labels[index]


def trainer(folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": CSVLogger(folder),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=[*callbacks], **(settings | kwargs))


def loaders(count: int = 24) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(Pictures(count), batch_size=8, shuffle=True)
    return train, DataLoader(Pictures(count), batch_size=8)


def pictures_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("heatmaps/*.png"))


class Watch(ExplanationMonitor):
    """The monitor, remembering when it explained and what."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, sinks=[self])
        self.steps: list[int] = []

    def write(self, explanation: Explanation, moment: Moment) -> None:
        self.steps.append(moment.step)


Grids: TypeAlias = list[dict[str, Any]]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the grids were asked to show, but for those of the change."""
    calls: list[dict[str, Any]] = []

    def grid(images: Any, maps: Any, captions: Any, **layout: Any) -> Any:
        if "panels" in layout:
            calls.append({"captions": list(captions), **layout})
        return heatmap_grid(images, maps, captions, **layout)

    monkeypatch.setattr(panels, "heatmap_grid", grid)
    return calls


def probe_of(monitor: ExplanationMonitor) -> Probe:
    return Probe.from_state(monitor.state_dict())


# --------------------------------------------------------------------------------------------------
# when and what


def test_one_line_is_enough(grids: Grids, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="explain/overall_auc", mode="max")
    monitor = Watch()
    logger = TensorBoardLogger(tmp_path / "tb")
    run = trainer(tmp_path, monitor, checkpoint, logger=[logger, CSVLogger(tmp_path / "csv")])
    run.fit(Classifier(), *loaders())
    assert monitor.steps == [0, 2, 5]
    names = ("deletion_auc", "insertion_auc", "overall_auc", "seconds")
    assert {f"explain/{name}" for name in names} <= run.callback_metrics.keys()
    overall = (
        run.callback_metrics["explain/insertion_auc"] - run.callback_metrics["explain/deletion_auc"]
    )
    torch.testing.assert_close(run.callback_metrics["explain/overall_auc"], overall)
    assert checkpoint.best_model_score is not None
    events = EventAccumulator(str(logger.log_dir), {"images": 0, "scalars": 0}).Reload()
    assert [image.step for image in events.Images("explain/heatmaps")] == [0, 2, 5]
    assert [value.step for value in events.Scalars("explain/overall_auc")] == [0, 2, 5]
    assert pictures_in(tmp_path / "csv") == [f"step-{step:08d}.png" for step in (0, 2, 5)]
    assert grids[0]["captions"][0].startswith(Pictures.classes[int(Pictures().labels[0])])


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_long_explanation_shows_its_evaluations(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    bar: type[TQDMProgressBar] | type[RichProgressBar],
) -> None:
    model = Classifier()

    def counts(delay: float, *bars: pl.Callback, **settings: Any) -> list[int]:
        monkeypatch.setattr(progress, "_DELAY", delay)
        monkeypatch.setattr(progress, "_INTERVAL", 0.0)
        monitor = ExplanationMonitor(WGradCAM(), probe=3, controls=False)
        folder = tmp_path / f"{delay}{len(bars)}"
        trainer(folder, monitor, *bars, **settings).validate(model, loaders()[1], verbose=False)
        written = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "".join(capfd.readouterr()))
        assert ("Validation" in written) == bool(bars)
        shown = re.findall(r"explaining 3 images.*?(\d+)/(\d+)", written)
        assert {int(total) for _, total in shown} <= {3, 3 * (1 + 2 + 56)}  # a first pass, all
        return [int(count) for count, _ in shown]

    # Rich needs room for its columns, and draws for a terminal only.
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not counts(0.0)  # where the trainer shows nothing
    assert not counts(60.0, bar(), enable_progress_bar=True)
    shown = counts(0.0, bar(), enable_progress_bar=True)
    assert shown == sorted(shown)
    assert len(shown) > 3
    # The prediction, WGradCAM's forward and backward, and both curves, for each of 3 images.
    assert shown[-1] == 3 * (1 + 2 + 56)
    assert not model._forward_hooks


def test_controls_are_judged_as_the_maps_are(tmp_path: Path) -> None:
    images, labels = torch.rand(3, 3, 32, 32), torch.arange(3)
    images[:, :, 8:24, 8:24] += 3
    monitor = Watch(GradCAM("net.features"), probe=(images, labels))
    model = Classifier()
    with torch.no_grad():
        model.net.head.weight *= 20  # an untrained one hardly cares
    (result,) = trainer(tmp_path, monitor).validate(model, loaders()[1], verbose=False)
    height, width = images.shape[2:]
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    gaussian = np.exp(-(y[:, None] ** 2 + x**2) / (2 * 0.25**2))
    metric = Faithfulness(steps=28)
    metric.update(model, images, torch.tensor(gaussian).float().repeat(3, 1, 1), labels)
    expected = float(metric.compute()["overall_auc"])
    assert result["explain/overall_auc_centre_gaussian"] == pytest.approx(expected, abs=1e-6)
    assert result["explain/overall_auc_random_map"] != result["explain/overall_auc"]
    assert abs(expected) > 1e-3
    quiet = Watch(GradCAM("net.features"), probe=3, controls=False)
    (result,) = trainer(tmp_path, quiet).validate(model, loaders()[1], verbose=False)
    assert "explain/overall_auc_centre_gaussian" not in result


@pytest.mark.filterwarnings("ignore:.*1 of 4 images have pixels that are NaN")
def test_the_controls_of_each_image_and_class_are_stored(tmp_path: Path) -> None:
    images, labels = torch.rand(4, 3, 32, 32), torch.zeros(4, 5)
    images[:, :, 8:24, 8:24] += 3
    images[1] = torch.nan  # has no logits that could be judged
    labels[0, [1, 2]] = labels[1, 0] = labels[2, 4] = labels[3, 3] = 1
    model = Classifier(multilabel=True)
    with torch.no_grad():
        model.net.head.weight *= 20
        model.net.head.bias += 1  # so that classes are seen that are not there
    monitor = Watch(GradCAM("net.features"), probe=(images, labels))
    start = copy.deepcopy(model)
    given = DataLoader(TensorDataset(images[2:], labels[2:]), batch_size=2)
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, monitor, logger=logger, max_epochs=1).fit(model, given, given)
    record = History.load(Path(logger.log_dir) / "explanations").records[0]
    assert record.pairs[:5] == [(0, 1), (0, 2), (1, 0), (2, 4), (3, 3)]
    assert "false positive" in record.verdicts[5:]
    kinds = {"random map": RandomMap(), "centre gaussian": CentreGaussian()}
    assert list(record.control_aucs) == list(record.controls) == list(kinds)
    for name, control in kinds.items():
        found = record.control_aucs[name]
        assert [value is None for value in found] == [n == 2 or n >= 5 for n in range(len(found))]
        pairs = [(row, target) for row, target in record.pairs[:5] if row != 1]
        rows, classes = (torch.tensor(column) for column in zip(*pairs, strict=True))
        maps = control.explain(start, images[rows], classes)
        alone = []
        for n in range(len(rows)):
            metric = OverallAUC(sigmoid, steps=28)
            metric.update(start, images[rows[n : n + 1]], maps[n : n + 1], classes[n : n + 1])
            alone.append(float(metric.compute()))
        known = [value for value in found if value is not None]
        assert known == pytest.approx(alone, abs=1e-6)
        assert record.controls[name]["overall_auc"] == pytest.approx(np.mean(alone), abs=1e-6)
        assert np.std(alone) > 1e-3


def test_tensorboard_shows_the_controls_in_the_chart_of_the_auc(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    logger = TensorBoardLogger(tmp_path)
    monitors = [ExplanationMonitor(GradCAM(), probe=2, name=name) for name in (None, "cam")]
    fit = trainer(tmp_path, *monitors, max_epochs=1, logger=[logger, CSVLogger(tmp_path)])
    fit.fit(Classifier(), *loaders())
    events = EventAccumulator(logger.log_dir).Reload()
    (written,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(written.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["explain", "explain/cam"]
    logged = events.Tags()["scalars"]
    for prefix, category in zip(("explain/", "explain/cam/"), layout.category, strict=True):
        (first, second) = category.chart
        (overall,), (both,) = first.multiline.tag, second.multiline.tag
        names = {name.removeprefix(prefix) for name in logged if re.search(overall, name)}
        assert names == {f"overall_auc{of}" for of in ("", "_random_map", "_centre_gaussian")}
        names = {name.removeprefix(prefix) for name in logged if re.search(both, name)}
        assert names == {"deletion_auc", "insertion_auc"}


def test_the_normalised_auc_stands_beside_the_plain_one(tmp_path: Path) -> None:
    images, labels = torch.rand(3, 3, 32, 32), torch.arange(3)
    images[:, :, 8:24, 8:24] += 3
    model = Classifier()
    with torch.no_grad():
        model.net.head.weight *= 20
    monitor = Watch(GradCAM("net.features"), probe=(images, labels), controls=False)
    (result,) = trainer(tmp_path, monitor).validate(model, loaders()[1], verbose=False)
    maps = GradCAM("net.features").explain(model, images, labels)
    deletion, insertion = deletion_insertion_curves(
        model, images, maps, labels, steps=28, normalise=True
    )
    found = (auc(insertion) - auc(deletion)).nanmean()
    assert result["explain/overall_auc_normalised"] == pytest.approx(float(found), abs=1e-4)
    assert result["explain/overall_auc_undefined"] == int(deletion[:, 0].isnan().sum()) == 2
    unsure = Classifier()
    with torch.no_grad():
        unsure.net.head.weight *= 0  # no image has more of any class than its blur
    monitor = Watch(GradCAM("net.features"), probe=(images, labels), controls=False)
    (result,) = trainer(tmp_path, monitor).validate(unsure, loaders()[1], verbose=False)
    assert result["explain/overall_auc_undefined"] == 3
    assert result["explain/overall_auc_normalised"] == -1  # the worst, for who compares


def test_controls_are_measured_ever_more_seldom(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, Watch(GradCAM("net.features"), probe=2), logger=logger, max_epochs=5)
    run.fit(Classifier(), *loaders())
    records = History.load(Path(logger.log_dir) / "explanations").records
    assert [bool(r.controls) for r in records] == [True, True, False, True, False, False]
    assert set(records[0].controls) == {"random map", "centre gaussian"}
    assert all(record.control_aucs.keys() == record.controls.keys() for record in records)
    # In between the figure stays, so that loggers draw a line as long as the others.
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["explain/overall_auc"]]
    measured = [r.controls["random map"]["overall_auc"] for r in records if r.controls]
    shown = [float(r["explain/overall_auc_random_map"]) for r in rows]
    expected = [measured[n] for n in (0, 1, 1, 2, 2, 2)]
    assert shown == pytest.approx(expected, abs=1e-6)


def test_a_drift_has_a_floor_of_two_seeds(tmp_path: Path) -> None:
    images, labels = torch.rand(3, 3, 32, 32), torch.arange(3)
    images[:, :, 8:24, 8:24] += 3
    method = fast_sigcam("net.features", iterations=3, score=logit)
    logger = CSVLogger(tmp_path)
    model = Classifier()
    with torch.no_grad():
        model.net.head.weight *= 20
    start = copy.deepcopy(model)
    monitor = Watch(method, probe=(images, labels), metrics=False)
    trainer(tmp_path, monitor, logger=logger, max_epochs=4).fit(model, *loaders())
    records = History.load(Path(logger.log_dir) / "explanations").records
    measured = ["drift_floor" in record.values for record in records]
    assert measured == [True, True, False, True, False]
    one = stored(method.explain(start, images, labels)).flatten(1).double()
    perturbation = replace(cast("RankedMask", method.perturbation), seed=1)
    two = replace(method, perturbation=perturbation).explain(start, images, labels)
    alike = [spearmanr(a, b).statistic for a, b in zip(one, stored(two).flatten(1), strict=True)]
    assert records[0].values["drift_floor"] == pytest.approx(1 - np.mean(alike), abs=1e-5)
    assert records[0].values["drift_floor"] > 0.001
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["explain/seconds"]]
    shown = [float(row["explain/drift_floor"]) for row in rows]
    held = [records[n].values["drift_floor"] for n in (0, 1, 1, 3, 3)]
    assert shown == pytest.approx(held, abs=1e-6)
    quiet = Watch(method, probe=(images, labels), metrics=False, controls=False)
    for other in (Watch(GradCAM("net.features"), probe=2, metrics=False), quiet):
        run = trainer(tmp_path, other, max_epochs=1)
        run.fit(Classifier(), *loaders())
        assert "explain/drift" in run.callback_metrics
        assert "explain/drift_floor" not in run.callback_metrics


class Channels(pl.LightningModule):
    """The logit of a class is the mean of a channel."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.seen = nn.Conv2d(4, 4, 1, bias=False)
        self.seen.weight.data = 40 * torch.eye(4)[:, :, None, None]
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[2] != self.size:
            raise RuntimeError(f"Input image height must be {self.size}")
        return cast("Tensor", self.seen(images).mean(dim=(2, 3)))

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])


def test_four_images_in_one_are_pointed_at_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    amounts = 0.1 + 0.9 * torch.eye(4)
    images = amounts[[0, 1, 2, 3, 1], :, None, None] * torch.rand(5, 1, 8, 8)
    images[:, :, 0, 0] = 0
    labels = torch.tensor([0, 1, 2, 3, 2])  # of which the last is wrong
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    settings: dict[str, Any] = {"probe": 5, "metrics": False, "grid_pointing": True}
    monitor = Watch(HiResCAM("seen"), **settings)
    with caplog.at_level("INFO"):
        (result,) = trainer(tmp_path, monitor).validate(Channels(), loader, verbose=False)
    # A forward and a backward for each of five maps, and for each of four of the tiled image.
    assert "for 18 model evaluations" in caplog.text
    means = images[:4].mean(dim=(2, 3))
    expected = float((means.diag() / means.sum(dim=0)).mean())
    assert result["explain/grid_pointing"] == pytest.approx(expected, abs=1e-5)
    monitor = Watch(HiResCAM("seen"), **settings)
    with pytest.warns(UserWarning, match="no grid pointing: the model, or the method, takes no im"):
        (result,) = trainer(tmp_path, monitor).validate(Channels(8), loader, verbose=False)
    assert "explain/grid_pointing" not in result
    # Whatever is explained, four images are sure by their probability.
    for score in (logit, contrast()):
        monitor = Watch(HiResCAM("seen"), score=score, **settings)
        (result,) = trainer(tmp_path, monitor).validate(Channels(), loader, verbose=False)
        assert result["explain/grid_pointing"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (torch.tensor([0, 1, 2, 0, 1]), "the probe has images of fewer than four classes"),
        (torch.tensor([3, 2, 1, 0, 2]), "the model does not yet give images of four different"),
        (torch.eye(5)[:, :4], "it takes images of one class each, and the probe's labels are"),
    ],
    ids=["three classes", "not recognised", "multilabel"],
)
def test_what_can_not_be_tiled_has_no_value_and_ends_no_training(
    labels: Tensor, why: str, tmp_path: Path
) -> None:
    class Trained(Channels):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    images = torch.cat([torch.eye(4), torch.eye(4)[1:2]])[:, :, None, None].expand(5, 4, 8, 8)
    loader = DataLoader(TensorDataset(images + 0.1, labels), batch_size=5)
    key = "explain/grid_pointing"
    for waits in (False, True):
        monitor = Watch(HiResCAM("seen"), probe=5, metrics=False, grid_pointing=True)
        kept = ModelCheckpoint(tmp_path / "best", monitor=key, mode="max") if waits else None
        run = trainer(
            tmp_path,
            *([monitor] if kept is None else [monitor, kept]),
            max_epochs=2,
            enable_checkpointing=waits,
        )
        with pytest.warns(UserWarning, match=f"no grid pointing: {why}"):
            run.fit(Trained(), loader, loader)
        assert run.current_epoch == 2
        assert (key in run.callback_metrics) == waits
    assert kept is not None
    assert float(kept.best_model_score) == 0


class OwnAUC(OverallAUC):
    """A metric whose only figure has a name of its own."""


def test_a_metric_of_the_user_s_own_is_logged(tmp_path: Path) -> None:
    monitor = Watch(GradCAM("net.features"), probe=2, metrics=OwnAUC(steps=4))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ExplanationMonitor")
        (result,) = trainer(tmp_path, monitor).validate(Classifier(), loaders()[1], verbose=False)
    assert "explain/own_auc" in result


def test_estimated_curves_are_logged_with_their_errors(tmp_path: Path) -> None:
    monitor = Watch(GradCAM("net.features"), probe=2, metrics=Faithfulness(evaluations=24))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ExplanationMonitor")
        (result,) = trainer(tmp_path, monitor).validate(Classifier(), loaders()[1], verbose=False)
    assert result["explain/evaluations"] == 24
    parts = [result[f"explain/{game}_auc_error"] for game in ("deletion", "insertion")]
    assert result["explain/overall_auc_error"] == pytest.approx(sum(e**2 for e in parts) ** 0.5)
    assert "explain/overall_auc_centre_gaussian" in result


def test_a_failing_control_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*batch: Any) -> Tensor:
        raise RuntimeError("no noise today")

    monkeypatch.setattr(RandomMap, "explain", broken)
    monitor = Watch(GradCAM("net.features"), probe=2)
    with pytest.warns(UserWarning, match="no metrics of the controls. RuntimeError: no noise"):
        (result,) = trainer(tmp_path, monitor).validate(Classifier(), loaders()[1], verbose=False)
    assert "explain/overall_auc" in result
    assert "explain/overall_auc_centre_gaussian" not in result


def test_controls_can_be_left_out_of_a_resumed_run(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    first = trainer(tmp_path, Watch(GradCAM("net.features"), probe=2), checkpoint, max_epochs=1)
    first.fit(Classifier(), *loaders())
    assert "explain/overall_auc_random_map" in first.callback_metrics
    quiet = Watch(GradCAM("net.features"), probe=2, controls=False)
    again = trainer(tmp_path, quiet, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    again.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert "explain/overall_auc" in again.callback_metrics
    assert "explain/overall_auc_random_map" not in again.callback_metrics


def test_each_map_has_its_own_auc(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, Watch(GradCAM("net.features"), probe=4), logger=logger, max_epochs=1)
    run.fit(Classifier(), *loaders())
    for record in History.load(Path(logger.log_dir) / "explanations").records:
        for name, values in (
            ("deletion_auc", record.deletion_auc),
            ("insertion_auc", record.insertion_auc),
        ):
            assert len(set(values)) == 4
            assert np.mean(values) == pytest.approx(record.values[name], abs=1e-6)


def test_panels_on_request(tmp_path: Path) -> None:
    heights = []
    for wanted in (["overlay"], ["overlay", "map", "curves"]):
        folder = tmp_path / str(len(wanted))
        monitor = Watch(GradCAM("net.features"), probe=2, panels=wanted)
        run = trainer(folder, monitor, logger=CSVLogger(folder))
        run.validate(Classifier(), loaders()[1], verbose=False)
        (path,) = folder.rglob("heatmaps/*.png")
        with Image.open(path) as picture:
            heights.append(picture.height)
    assert heights[1] > 1.5 * heights[0]  # two pairs, or an input and its three panels, in a row


@pytest.mark.usefixtures("unchecked")
def test_unknown_panels(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"panels=\['heat'\] must be"):
        trainer(tmp_path, Watch(panels=["heat"])).validate(Classifier(), loaders()[1])


def test_validate_explains_and_reports(grids: Grids, tmp_path: Path) -> None:
    monitor = Watch(GradCAM("net.features"), probe=3)
    (result,) = trainer(tmp_path, monitor).validate(Classifier(), loaders()[1], verbose=False)
    assert "explain/overall_auc" in result
    assert len(grids[0]["captions"]) == 3


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("settings", "run", "steps"),
    [
        ({"every_n_epochs": 2}, {"max_epochs": 4}, [0, 5, 11]),
        ({"every_n_train_steps": 2}, {"max_epochs": 2}, [0, 1, 3, 5]),
        ({"every_n_train_steps": 2}, {"accumulate_grad_batches": 3, "max_epochs": 4}, [0, 1, 3]),
        ({"every_n_epochs": 0}, {}, []),
        ({}, {"val_check_interval": 1 / 3, "max_epochs": 1}, [0, 1, 1, 2]),  # 0 is before training
        ({}, {"check_val_every_n_epoch": 2}, [0, 5]),
        ({}, {"limit_val_batches": 0}, [0, 2, 5]),
        ({}, {"fast_dev_run": True}, [0, 1]),
        ({}, {"max_steps": 2}, [0, 1]),  # it ends before a validation
        ({}, {"check_val_every_n_epoch": 2, "max_epochs": 1}, [0, 2]),
        ({"every_n_epochs": 2}, {"max_epochs": 1}, [0]),
    ],
)
def test_when(settings: Any, run: Any, steps: list[int], tmp_path: Path) -> None:
    monitor = Watch(WGradCAM(), metrics=False, probe=2, **settings)
    trainer(tmp_path, monitor, **run).fit(Classifier(), *loaders())
    assert monitor.steps == steps


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
@pytest.mark.parametrize("nothing", [[], DataLoader(Pictures(0))])
def test_where_validation_has_no_batch_the_training_samples_are_explained(
    nothing: Any, tmp_path: Path
) -> None:
    for settings, steps in (({}, [0, 2, 5]), ({"check_val_every_n_epoch": 2}, [0, 2, 5])):
        monitor = Watch(WGradCAM(), metrics=False, probe=2)
        trainer(tmp_path, monitor, **settings).fit(Classifier(), loaders()[0], nothing)
        assert monitor.steps == steps
        assert not [*monitor._state.warn.told]


class Prepares(Classifier):
    """Normalises the images in its steps, before it calls the network."""

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(((batch[0] - 0.5) / 0.25, *batch[1:]), index)


def test_a_step_that_prepares_images_for_the_network_is_noticed(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning,
        match="the validation step gives the network other images .* set logits=fn, a function",
    ):
        trainer(tmp_path, Watch(WGradCAM(), metrics=False, probe=2)).fit(
            module := Prepares(), *loaders()
        )
    assert not module._forward_hooks
    assert not module.net._forward_hooks

    def prepared(module: Any, images: Tensor) -> Tensor:
        logits: Tensor = module((images - 0.5) / 0.25)
        return logits

    monitor = Watch(WGradCAM(), metrics=False, probe=2, logits=prepared)
    trainer(tmp_path, monitor).fit(Prepares(), *loaders())
    assert not [*monitor._state.warn.told]


class ByKeyword(Classifier):
    """Gives its network the images by keyword in the step, which no hook is told."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(self(images=batch[0]), batch[1]))


class TwoViews(Classifier):
    """Looks at the images the other way round, too."""

    def validation_step(self, batch: Any, index: int) -> None:
        logits = self(batch[0].flip(3)) + self(batch[0])
        self.log("val_loss", self.loss(logits, batch[1]))


@pytest.mark.parametrize("module", [Classifier, ByKeyword, TwoViews])
def test_a_step_that_gives_the_network_the_images_is_not_warned_of(
    module: type[Classifier], tmp_path: Path
) -> None:
    monitor = Watch(WGradCAM(), metrics=False, probe=2)
    trainer(tmp_path, monitor).fit(module(), *loaders())
    assert not [*monitor._state.warn.told]


def test_the_images_of_a_step_are_those_that_the_user_reads(tmp_path: Path) -> None:
    class Pairs(TensorDataset):
        classes = ("ant", "bee", "cat", "dog", "emu")

    class OfTheSecond(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch[1:], index)

        def validation_step(self, batch: Any, index: int) -> None:
            super().validation_step(batch[1:], index)

    views = torch.rand(2, 24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = DataLoader(Pairs(*views, torch.arange(24) % 5), batch_size=8)
    monitor = Watch(WGradCAM(), metrics=False, probe=2, read_batch=lambda batch: batch[1:])
    trainer(tmp_path, monitor).fit(OfTheSecond(), data, data)
    assert not [*monitor._state.warn.told]


@pytest.mark.wide
def test_a_monitor_that_has_seen_a_run_can_be_copied(tmp_path: Path) -> None:
    monitor = ExplanationMonitor(WGradCAM(), metrics=False, probe=2)
    trainer(tmp_path, monitor).fit(Classifier(), *loaders())
    assert monitor._state.explained == 3
    for copied in (pickle.loads(pickle.dumps(monitor)), copy.deepcopy(monitor)):
        assert copied._state.explained == 0
        trainer(tmp_path, copied).fit(Classifier(), *loaders())
        assert copied._state.explained == 3


def test_without_a_validation_loop_the_training_samples_are_explained(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="explain/overall_auc", mode="max", save_on_train_epoch_end=True
    )
    monitor = Watch(WGradCAM(), probe=2)
    trainer(tmp_path, monitor, checkpoint).fit(Classifier(validates=False), loaders()[0])
    assert monitor.steps == [0, 2, 5]
    assert checkpoint.best_model_score is not None


def test_multilabel_labels_give_one_explanation_a_class(grids: Grids, tmp_path: Path) -> None:
    labels = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]] * 8).float()
    data = DataLoader(Pictures(24, labels), batch_size=8)
    monitor = Watch(probe=3, max_classes_per_image=4)
    trainer(tmp_path, monitor, max_epochs=1).fit(Classifier(multilabel=True), data, data)
    labelled = [c.split()[0] for c in grids[0]["captions"] if "false positive" not in c]
    assert labelled == ["ant", "cat", "ant", "bee", "cat", "dog"]
    assert all("predicted" not in caption for caption in grids[0]["captions"])


class Masked(Pictures):
    """Multilabel pictures whose classes lie in known places."""

    def input_masks(self, index: int, classes: Any) -> Tensor:
        masks = torch.zeros(len(classes), 32, 32, dtype=torch.bool)
        for row, k in enumerate(classes):
            masks[row, 4 * k : 4 * k + 8, 2 + index : 20] = True
        return masks


def masked(count: int = 24) -> DataLoader[Any]:
    labels = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]] * 8).float()
    return DataLoader(Masked(24, labels), batch_size=8)


def test_masks_are_outlined_and_judge_the_maps(grids: Grids, tmp_path: Path) -> None:
    monitor = Watch(GradCAM("net.features"), probe=3)
    model = Classifier(multilabel=True)
    run = trainer(tmp_path, monitor, max_epochs=1)
    run.fit(model, masked(), masked())
    probe = probe_of(monitor)
    assert probe is not None
    assert probe.mask_pairs is not None
    assert probe.mask_pairs.tolist() == [[0, 0], [0, 2], [2, 1], [2, 4]]
    rows, targets = probe.mask_pairs.T
    masks = torch.cat(
        [masked().dataset.input_masks(0, [0, 2]), masked().dataset.input_masks(2, [1, 4])]
    )  # type: ignore[attr-defined]
    maps = GradCAM("net.features").explain(model, probe.images[rows], targets)
    hits, shares = [], []
    for found, mask in zip(maps, masks, strict=True):
        best = (found == found.max()).nonzero().tolist()
        hits.append(np.mean([bool(mask[y, x]) for y, x in best]))
        shares.append(float(found[mask].sum() / found.sum()) if found.sum() else 0.0)
    # Every class is there once, so the mean over classes is that over pairs.
    assert float(run.callback_metrics["explain/pointing_game"]) == pytest.approx(np.mean(hits))
    assert float(run.callback_metrics["explain/energy_in_mask"]) == pytest.approx(np.mean(shares))
    layout = grids[-1]
    known = [i for i, c in enumerate(grids[-1]["captions"]) if "false positive" not in c]
    assert torch.equal(layout["outlines"][known], masks)
    assert sorted(set(layout["groups"])) == sorted({0, 2} | set(layout["groups"]))


def test_false_positives_are_drawn_and_not_judged(grids: Grids, tmp_path: Path) -> None:
    class Sure(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * 0.01 + torch.tensor([3.0, -3.0, -3.0, 2.0, 4.0])

    values = []
    for targets in ("label", [0, 2]):
        monitor = Watch(GradCAM("net.features"), probe=1, targets=targets)
        run = trainer(tmp_path, monitor)
        torch.manual_seed(0)
        run.validate(Sure(multilabel=True), masked(), verbose=False)
        values.append({k: float(v) for k, v in run.callback_metrics.items() if "auc" in k})
        if targets == "label":
            found, missed, wrong = grids[0]["captions"]
            assert found.startswith("ant 0.9")
            assert "missed" not in found
            assert missed.startswith("cat 0.0")
            assert missed.split(" · ")[0].endswith("\nmissed")
            assert wrong.startswith("emu 0.9")
            assert wrong.endswith("\nfalse positive")
            assert grids[0]["groups"] == [0, 0, 0]
            (heading,) = grids[0]["headings"]
            assert heading.startswith("false: dog 0.8")
            assert not grids[0]["outlines"][2].any()
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_masks_may_come_with_the_batch(grids: Grids, tmp_path: Path) -> None:
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 3])
    masks = torch.zeros(2, 32, 32).bool()
    masks[:, 8:20, 8:20] = True
    for probe in ((images, labels, masks), {"image": images, "label": labels, "masks": masks}):
        monitor = Watch(GradCAM("net.features"), probe=probe, metrics=False)
        (result,) = trainer(tmp_path, monitor).validate(Classifier(), loaders()[1], verbose=False)
        assert "explain/pointing_game" in result
        assert torch.equal(grids[0]["outlines"], masks)


def test_masks_behind_a_subset_are_those_of_its_samples(tmp_path: Path) -> None:
    data = Subset(masked().dataset, [5, 2, 0])
    monitor = Watch(GradCAM("net.features"), probe=2, metrics=False)
    trainer(tmp_path, monitor).validate(
        Classifier(multilabel=True), DataLoader(data, batch_size=3), verbose=False
    )
    assert probe_of(monitor).masks is not None
    expected = torch.cat([masked().dataset.input_masks(i, [1, 4]) for i in (5, 2)])  # type: ignore[attr-defined]
    assert torch.equal(probe_of(monitor).masks, expected)


def test_masks_that_cannot_be_read_cost_only_the_outlines(grids: Grids, tmp_path: Path) -> None:
    class Broken(Masked):
        def input_masks(self, index: int, classes: Any) -> Tensor:
            return super().input_masks(index, classes)[:, :9]

    data = DataLoader(Broken(8, torch.ones(8, 5)), batch_size=8)
    monitor = Watch(GradCAM("net.features"), probe=2, metrics=False)
    with pytest.warns(UserWarning, match="no outlines and no pointing game.*size of the images"):
        trainer(tmp_path, monitor).validate(Classifier(multilabel=True), data, verbose=False)
    assert grids
    assert "outlines" not in grids[0]


def test_a_resumed_run_keeps_its_masks(tmp_path: Path) -> None:
    monitor = Watch(GradCAM("net.features"), probe=3, metrics=False)
    trainer(tmp_path, monitor).validate(Classifier(multilabel=True), masked(), verbose=False)
    path = tmp_path / "state.pt"
    torch.save(monitor.state_dict(), path)
    again = ExplanationMonitor(GradCAM("net.features"), metrics=False)
    again.load_state_dict(torch.load(path, weights_only=True))
    assert_same(monitor.state_dict(), again.state_dict())


def test_the_normalisation_is_that_of_the_dataset(grids: Grids, tmp_path: Path) -> None:
    class Normalised(Pictures):
        transform = v2.Compose([v2.ToImage(), v2.Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])])

    data = DataLoader(Normalised(8), batch_size=8)
    monitor = Watch(GradCAM("net.features"), probe=2, metrics=False)
    trainer(tmp_path, monitor).validate(Classifier(), data, verbose=False)
    assert list(grids[0]["mean"]) == pytest.approx([0.1, 0.2, 0.3])
    assert list(grids[0]["std"]) == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize("targets", ["predicted", [4, 1]])
def test_targets(grids: Grids, targets: Any, tmp_path: Path) -> None:
    monitor = Watch(WGradCAM(), probe=2, targets=targets, class_names=list("VWXYZ"), metrics=False)
    model = Classifier()
    trainer(tmp_path, monitor, max_epochs=1).fit(model, *loaders())
    names = [caption.split()[0] for caption in grids[-1]["captions"]]
    if targets == "predicted":
        with torch.no_grad():
            best = model.eval()(probe_of(monitor).images).argmax(dim=1).tolist()
        assert names == ["VWXYZ"[c] for c in best]
    else:
        assert names == ["Z", "W", "Z", "W"]


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", ["batch", "dictionary", "dataset", "callable", "iterable"])
def test_where_the_probe_comes_from(kind: str, tmp_path: Path) -> None:
    images, labels = torch.rand(3, 3, 32, 32), torch.tensor([1, 2, 3])

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return zip(images, labels, strict=True)

    probe: Any = {
        "batch": (images, labels),
        "dictionary": {"pixel_values": images, "labels": labels},
        "dataset": TensorDataset(images, labels),
        "callable": lambda: (images, labels),
        "iterable": 3,
    }[kind]
    train, val = loaders()
    if kind == "iterable":
        val = DataLoader(Stream(), batch_size=2)
    monitor = Watch(WGradCAM(), probe=probe, metrics=False)
    trainer(tmp_path, monitor, max_epochs=1).fit(Classifier(), train, val)
    assert torch.equal(probe_of(monitor).images, images)
    assert probe_of(monitor).labels is not None
    assert torch.equal(probe_of(monitor).labels, labels)


def test_the_probe_comes_through_the_batch_hooks_of_validation(tmp_path: Path) -> None:
    class OnDevice(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            # What is common for augmentation and normalisation on the device.
            scale = 100.0 if self.trainer.training else 2.0
            return batch[0] * scale, batch[1]

    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    monitor = Watch(WGradCAM(), probe=(images, labels), metrics=False)
    trainer(tmp_path, monitor, max_epochs=1).fit(OnDevice(), *loaders())
    assert torch.equal(probe_of(monitor).images, images * 2)


def test_metrics_can_be_chosen(tmp_path: Path) -> None:
    run = trainer(tmp_path, ExplanationMonitor(metrics=OverallAUC(steps=4)), max_epochs=1)
    run.fit(Classifier(), *loaders())
    assert "explain/overall_auc" in run.callback_metrics
    both = MetricCollection([OverallAUC(steps=4), DeletionAUC(steps=4)])
    run = trainer(tmp_path, ExplanationMonitor(metrics=both), max_epochs=1)
    run.fit(Classifier(), *loaders())
    assert "explain/DeletionAUC" in run.callback_metrics


def test_the_probe_survives_a_resume(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    first = Watch(WGradCAM(), probe=3, metrics=False)
    trainer(tmp_path, first, checkpoint).fit(Classifier(), *loaders())
    again = Watch(WGradCAM(), probe=3, metrics=False)
    other = DataLoader(Pictures(12, torch.zeros(12, dtype=torch.long)), batch_size=4)
    run = trainer(tmp_path, again, ModelCheckpoint(tmp_path, save_last=True), max_epochs=3)
    with pytest.warns(UserWarning, match="data that the probe was taken from has changed"):
        run.fit(Classifier(), loaders()[0], other, ckpt_path=tmp_path / "last.ckpt")
    assert again.steps == [8]
    assert torch.equal(probe_of(first).images, probe_of(again).images)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (kept,) = (value for key, value in state.items() if key.startswith("Watch"))
    assert kept["images"].shape == (3, 3, 32, 32)


def test_the_same_data_resumes_without_a_word(tmp_path: Path) -> None:
    # The pictures are augmented from three random streams, in a state that no run has twice.
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    first, again = (Watch(WGradCAM(), probe=3, metrics=False) for _ in range(2))
    trainer(tmp_path, first, checkpoint).fit(Classifier(), *loaders())
    np.random.seed(77)
    run = trainer(tmp_path, again, ModelCheckpoint(tmp_path, save_last=True), max_epochs=3)
    run.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert again.steps == [8]
    assert torch.equal(probe_of(first).images, probe_of(again).images)


def test_pictures_of_8_bits_take_a_byte_a_value_in_a_checkpoint() -> None:
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (8, 3, 224, 224), generator=generator, dtype=torch.uint8)
    images = v2.functional.normalize(bytes_.float() / 255, [0.4, 0.5, 0.6], [0.2, 0.3, 0.2])
    probe = Probe(images, torch.arange(8))
    file = io.BytesIO()
    torch.save(probe.state(), file)
    assert len(file.getvalue()) < 1.01 * bytes_.numel()
    file.seek(0)
    again = Probe.from_state(torch.load(file, weights_only=True))
    assert torch.equal(again.images, images)
    assert again.fingerprint == probe.fingerprint
    for other in (torch.randn(2, 3, 40, 40), torch.full((1, 1, 4, 4), torch.nan)):
        found = Probe.from_state(Probe(other).state()).images
        assert torch.equal(found.nan_to_num(7), other.nan_to_num(7))


# --------------------------------------------------------------------------------------------------
# harmless: what tests/test_harmless.py does not compare


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_the_loaders_own_generator_is_not_touched(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(Pictures(), batch_size=8, shuffle=True, generator=generator)
    states: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            states.append(generator.get_state())

    monitor = Watch(WGradCAM(), metrics=False)
    trainer(tmp_path, Look(), monitor, Look(), max_epochs=1).fit(Classifier(), data, data)
    assert monitor.steps == [0, 2]
    assert torch.equal(*states)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(precision: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*does not have many workers|.*LeafSpec|.*not used")
        run = trainer(tmp_path, ExplanationMonitor(probe=2), precision=precision, max_epochs=1)
        run.fit(Classifier(), *loaders())
    assert run.callback_metrics["explain/overall_auc"].isfinite()


# --------------------------------------------------------------------------------------------------
# what goes wrong


def test_a_failing_explanation_is_a_warning_said_once(tmp_path: Path) -> None:
    class Broken:
        def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            raise RuntimeError(f"no map {torch.rand(())}")

    run = trainer(tmp_path, ExplanationMonitor(Broken()), max_epochs=3)
    with pytest.warns(UserWarning, match="training goes on. RuntimeError: no map") as caught:
        run.fit(Classifier(), *loaders())
    assert sum("no map" in str(w.message) for w in caught) == 1
    assert run.global_step == 9


def test_a_model_without_convolution_trains_on(tmp_path: Path) -> None:
    model = Classifier()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    run = trainer(tmp_path, ExplanationMonitor(), max_epochs=1)
    with pytest.warns(UserWarning, match="no layer that gives a feature map.*perturbation alone"):
        run.fit(model, *loaders())
    assert run.global_step == 3


def test_an_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    class Interrupt:
        def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Classifier()
    run = trainer(tmp_path, ExplanationMonitor(Interrupt()))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.fit(model, *loaders())
    assert all(not m._forward_hooks for m in model.modules())


def test_a_probe_larger_than_the_data_takes_what_there_is(grids: Grids, tmp_path: Path) -> None:
    monitor = Watch(WGradCAM(), probe=64, metrics=False)
    with pytest.warns(UserWarning, match="probe=64 samples asked for, but the data has 10"):
        trainer(tmp_path, monitor, max_epochs=1).fit(Classifier(), *loaders(10))
    assert len(grids[0]["captions"]) == 10


class Nowhere(Logger):
    """A logger that holds scalars and has no directory."""

    name = "nowhere"
    version = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_a_logger_without_a_directory_loses_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, Watch(WGradCAM()), logger=Nowhere(), max_epochs=1)
    with pytest.warns(UserWarning, match="Nowhere can't hold pictures and has no directory.*give"):
        run.fit(Classifier(), *loaders())
    assert pictures_in(tmp_path) == ["step-00000000.png", "step-00000002.png"]


def test_no_logger_at_all(tmp_path: Path) -> None:
    trainer(tmp_path, Watch(WGradCAM()), logger=False, max_epochs=1).fit(Classifier(), *loaders())
    assert pictures_in(tmp_path) == ["step-00000000.png", "step-00000003.png"] or pictures_in(
        tmp_path
    ) == ["step-00000000.png", "step-00000002.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, "exclude each other: set one"),
        ({"every_n_epochs": -1}, "must not be negative"),
        ({"mean": 0.5}, "mean=0.5 and std=None must come together: give both, or neither"),
        ({"mean": 0.5, "std": [0.2, 0, 0.2]}, r"std=\[0.2, 0, 0.2\] must be above 0"),
        ({"mean": "imagenet", "std": 1}, "mean='imagenet' must be a number, or one for each"),
        ({"probe": 0}, "probe=0 must be at least 1"),
        ({"targets": "labels"}, "targets='labels' must be 'label', 'predicted', 'confused' or"),
        ({"method": GradCAM(), "target_layer": "x"}, "name the layer in the method given"),
        ({"max_classes_per_image": 0}, "max_classes_per_image=0 must be at least 1"),
        ({"every_n_epochs": 1.5}, "every_n_epochs=1.5 and .* must not be negative, and whole"),
        ({"method": GradCAM}, r"got the class GradCAM, not GradCAM\(\): pass"),
        ({"method": "gradcam"}, r"must have explain.*got 'gradcam': pass fast_sigcam\(\)"),
        (
            {"metrics": OverallAUC},
            r"metrics must be .*got the class OverallAUC, not OverallAUC\(\)",
        ),
        (
            {"metrics": [OverallAUC()]},
            r"metrics must be .*got list: pass .*MetricCollection\(\[…\]\)",
        ),
        ({"score": "softmax"}, "score must be a function such as scores.sigmoid, got 'softmax'"),
        ({"logits": "net"}, "logits must be a function such as lambda module, images"),
        ({"read_batch": 3}, "read_batch must be a function such as lambda batch.*got 3"),
        ({"class_names": "abc"}, "class_names must be a list of names, got 'abc'"),
        ({"name": 3}, "name=3 must be text made of letters"),
        ({"sinks": print}, "sinks must be a list, got builtin_function.*: put it in brackets"),
    ],
)
def test_misuse_is_refused_before_training(
    arguments: Any, message: str, tmp_path: Path, unchecked: None
) -> None:
    run = trainer(tmp_path, ExplanationMonitor(**arguments))
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(Classifier(), *loaders())


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (
            (torch.rand(2, 3, 8, 8),),
            "needs labels.*pass probe=.images, labels., or read_batch=fn, or targets='pred",
        ),
        (({"a": torch.rand(2, 3)}), "no image.*dict.*pass probe="),
        (
            (torch.rand(2, 3, 8, 8), torch.zeros(2, 5)),
            "none of the probe's 2 images has a positive",
        ),
        (
            (torch.rand(2, 3, 32, 32), torch.tensor([0, 9])),
            r"1 of 2 images are not explained.*\[9\].*none of the 5 classes",
        ),
        (
            (torch.zeros(2, 7, 8, 8), torch.tensor([0, 1])),
            "no logits of Classifier found.*channels.*Set logits=fn",
        ),
    ],
)
def test_a_bad_probe_is_explained(
    probe: Any, message: str, tmp_path: Path, unchecked: None
) -> None:
    run = trainer(tmp_path, ExplanationMonitor(probe=probe), max_epochs=1)
    with pytest.warns(UserWarning, match=message):
        run.fit(Classifier(), *loaders())
    assert run.global_step == 3


# --------------------------------------------------------------------------------------------------
# loggers, and the other Lightning


@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_pictures_and_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    run = trainer(tmp_path, Watch(WGradCAM(), probe=2), logger=logger, max_epochs=1)
    run.fit(Classifier(), *loaders())
    summary = logger.experiment.summary
    assert "explain/overall_auc" in summary.keys()  # noqa: SIM118
    wandb.finish()
    pictures = list(tmp_path.rglob("media/images/explain/heatmaps_[0-9]*.png"))
    assert len(pictures) == 2
    assert np.asarray(Image.open(pictures[0])).std() > 10


@pytest.mark.filterwarnings("ignore:.*treespec")
def test_lightning_pytorch_is_served_as_well(tmp_path: Path, unchecked: None) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import TensorBoardLogger as Other

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallNet()

        forward = Classifier.forward

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self(batch[0])

        configure_optimizers = Classifier.configure_optimizers

    monitor, logger = Watch(), Other(tmp_path)
    run = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    run.fit(Module(), *loaders())
    assert monitor.steps == [0, 2]
    assert "explain/overall_auc" in run.callback_metrics
    events = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    assert len(events.Images("explain/heatmaps")) == 2


def test_score_can_be_chosen(grids: Grids, tmp_path: Path) -> None:
    monitor = Watch(score=sigmoid, probe=2)
    trainer(tmp_path, monitor, max_epochs=1).fit(model := Classifier(), *loaders())
    assert probe_of(monitor).labels is not None
    with torch.no_grad():
        value = model.eval()(probe_of(monitor).images)[0, probe_of(monitor).labels[0]].sigmoid()
    assert grids[-1]["captions"][0].split("\n")[0].endswith(f"{float(value):.2f}")
