"""What a run keeps and logs: failing sinks, values that others rely on, several monitors, schedules."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_monitor import Classifier, Watch, loaders, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from lightning_aop import AOP, ExplanationMonitor, GradCAM, LayerCAM, WGradCAM
from lightning_aop.history import History
from lightning_aop.methods import RankedMask
from lightning_aop.metrics import Faithfulness, OverallAUC
from lightning_aop.monitor.explanation import Explanation, Moment

CHEAP: dict[str, Any] = {"probe": 3, "metrics": OverallAUC(steps=4), "controls": False}


class Failing:
    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("no map today")


class Full:
    """A sink without room."""

    def write(self, explanation: Explanation, moment: Moment) -> None:
        raise OSError("no room")


def history_of(folder: Path) -> History:
    return History.load(next(folder.rglob("run.json")).parent)


# --------------------------------------------------------------------------------------------------
# sinks


def test_a_sink_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    monitor = ExplanationMonitor(GradCAM("net.features"), sinks=[Full()], **CHEAP)
    run = trainer(tmp_path, monitor, logger=logger, max_epochs=1)
    with pytest.warns(UserWarning, match="Full could not take the explanation. OSError: no room"):
        run.fit(Classifier(), *loaders())
    assert "explain/overall_auc" in run.callback_metrics
    assert len(history_of(tmp_path).records) == 2
    events = EventAccumulator(str(logger.log_dir), {"images": 0}).Reload()
    assert len(events.Images("explain/heatmaps")) == 2


def test_a_page_that_cannot_be_written_costs_only_the_page(tmp_path: Path) -> None:
    class Blocked(pl.Callback):
        """Puts a folder where the page goes."""

        def on_train_batch_end(self, *arguments: Any) -> None:
            page = next(tmp_path.rglob("report.html"))
            if page.is_file():
                page.unlink()
                page.mkdir()

    monitor = Watch(GradCAM("net.features"), **CHEAP)
    run = trainer(tmp_path, Blocked(), monitor, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match=r"ExplanationMonitor: .*page|animation"):
        run.fit(Classifier(), *loaders())
    assert monitor.steps == [0, 2, 5]
    assert len(history_of(tmp_path).records) == 3


def test_a_second_fit_starts_afresh(tmp_path: Path) -> None:
    monitor = ExplanationMonitor(Failing(), **CHEAP)
    for _ in range(2):
        with pytest.warns(UserWarning, match="no map today"):
            trainer(tmp_path, monitor, max_epochs=1).fit(Classifier(), *loaders())


def test_the_members_of_a_collection_keep_their_curves_and_controls(tmp_path: Path) -> None:
    metrics = MetricCollection([Faithfulness(steps=4)])
    monitor = ExplanationMonitor(GradCAM("net.features"), probe=3, metrics=metrics)
    run = trainer(tmp_path, monitor, logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(Classifier(), *loaders())
    assert "explain/overall_auc_centre_gaussian" in run.callback_metrics
    for record in history_of(tmp_path).records:
        assert None not in record.deletion_auc
        overall = [i - d for i, d in zip(record.insertion_auc, record.deletion_auc, strict=True)]
        assert sum(overall) / 3 == pytest.approx(record.values["overall_auc"], abs=1e-6)


@pytest.mark.parametrize(("top", "blank"), [(0.001, True), (0.1, False)])
def test_a_map_too_faint_to_be_stored_is_blank_everywhere(
    top: float, blank: bool, tmp_path: Path
) -> None:
    class Faint:
        def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            maps = torch.zeros(len(images), *images.shape[2:])
            maps[:, 5:9, 5:9] = top
            return maps

    monitor = ExplanationMonitor(Faint(), **CHEAP)
    run = trainer(tmp_path, monitor, logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(Classifier(), *loaders())
    history = history_of(tmp_path)
    assert float(run.callback_metrics["explain/blank_maps"]) == 3 * blank
    for record in history.records:
        assert record.blank == [blank] * 3
        stored = history.maps[record.first : record.end]
        assert [not each.any() for each in stored] == record.blank


def test_predictions_and_verdicts_are_stored(tmp_path: Path) -> None:
    monitor = ExplanationMonitor(GradCAM("net.features"), **(CHEAP | {"probe": 6}))
    model = Classifier()
    trainer(tmp_path, monitor, logger=CSVLogger(tmp_path), max_epochs=1).fit(model, *loaders())
    record = history_of(tmp_path).records[-1]
    batch = torch.stack([loaders()[1].dataset[i][0] for i in range(6)])
    labels = [int(loaders()[1].dataset[i][1]) for i in range(6)]
    with torch.no_grad():
        predicted = model.eval()(batch).argmax(dim=1).tolist()
    assert record.predicted == predicted
    assert record.verdicts == [
        "right" if p == label else "wrong" for p, label in zip(predicted, labels, strict=True)
    ]


# --------------------------------------------------------------------------------------------------
# what others rely on


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_epochs": 2},
        {"every_n_train_steps": 5},
        {"max_overhead": 1e-6},
        {"method": Failing()},
    ],
    ids=["epochs", "steps", "budget", "failing"],
)
@pytest.mark.filterwarnings("ignore:ExplanationMonitor")
def test_a_checkpoint_and_a_stop_may_watch_the_auc(settings: Any, tmp_path: Path) -> None:
    monitor = ExplanationMonitor(**({"method": GradCAM("net.features")} | CHEAP | settings))
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="explain/overall_auc", mode="max")
    stop = EarlyStopping("explain/overall_auc", mode="max", patience=9, check_finite=True)
    run = trainer(tmp_path, checkpoint, stop, monitor, max_epochs=3)
    run.fit(Classifier(), *loaders())
    assert run.current_epoch == 3
    assert list((tmp_path / "best").glob("*.ckpt"))


@pytest.mark.parametrize("fails", [1, 2, 99])
@pytest.mark.filterwarnings("ignore:ExplanationMonitor")
def test_a_checkpoint_and_a_stop_may_watch_any_value(fails: int, tmp_path: Path) -> None:
    """Also one that the first explanations, which fail, have not given yet; a measured one is better."""

    class Late(GradCAM):
        left = fails

        def explain(self, *arguments: Any, **options: Any) -> Tensor:
            if Late.left > 0:
                Late.left -= 1
                raise RuntimeError("no map today")
            return super().explain(*arguments, **options)

    lowest = ["blank_maps", "seconds", "drift", "overhead", "overall_auc_undefined"]
    highest = ["overall_auc_random_map", "overall_auc_centre_gaussian"]
    modes = [(name, "min") for name in lowest] + [(name, "max") for name in highest]
    kept = [
        ModelCheckpoint(tmp_path / name, monitor=f"explain/{name}", mode=mode)
        for name, mode in modes
    ]
    stops = [EarlyStopping(f"explain/{name}", mode=mode, patience=9) for name, mode in modes]
    monitor = ExplanationMonitor(Late("net.features"), probe=3)
    run = trainer(tmp_path, *kept, *stops, monitor, max_epochs=3)
    run.fit(Classifier(), *loaders())
    assert run.current_epoch == 3
    for checkpoint in kept:
        assert checkpoint.best_model_score is not None
        assert (abs(float(checkpoint.best_model_score)) < 100) is (fails < 99), checkpoint.monitor


@pytest.mark.parametrize(
    ("metrics", "key"),
    [
        (MetricCollection({"area": OverallAUC(steps=4)}, prefix="own_"), "own_area"),
        (MetricCollection([OverallAUC(steps=4)]), "OverallAUC"),
        (MetricCollection([Faithfulness(steps=4)], postfix="_4"), "overall_auc_4"),
    ],
)
@pytest.mark.filterwarnings("ignore:ExplanationMonitor")
def test_a_checkpoint_may_watch_a_metric_by_its_name_in_a_collection(
    metrics: MetricCollection, key: str, tmp_path: Path
) -> None:
    scores = []
    for method in (Failing(), GradCAM("net.features")):
        folder = tmp_path / type(method).__name__
        checkpoint = ModelCheckpoint(folder, monitor=f"explain/{key}", mode="max")
        monitor = ExplanationMonitor(method, probe=3, metrics=metrics, controls=False)
        run = trainer(tmp_path, checkpoint, monitor, max_epochs=1)
        run.fit(Classifier(), *loaders())
        assert checkpoint.best_model_score is not None
        scores.append(float(checkpoint.best_model_score))
    assert scores[0] < -1 < scores[1] < 1


# --------------------------------------------------------------------------------------------------
# several monitors, and when they explain


def test_two_monitors_log_and_store_under_their_own_names(tmp_path: Path) -> None:
    first = Watch(GradCAM("net.features"), **CHEAP)
    second = Watch(LayerCAM("net.features"), **CHEAP)
    named = Watch(GradCAM("net.features"), name="fine", **CHEAP)
    run = trainer(tmp_path, first, second, named, logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(Classifier(), *loaders())
    keys = {f"explain/{name}overall_auc" for name in ("", "2/", "fine/")}
    assert keys <= run.callback_metrics.keys()
    folders = {path.parent.name for path in tmp_path.rglob("run.json")}
    assert folders == {"explanations", "explanations-2", "explanations-fine"}
    assert first.steps == second.steps == named.steps == [0, 2]


def test_two_monitors_of_one_method_explain_two_probes(tmp_path: Path) -> None:
    """Also where they go on from a checkpoint."""
    given = (torch.rand(2, 3, 32, 32), torch.tensor([1, 3]))

    def monitors() -> list[Watch]:
        probes: list[dict[str, Any]] = [
            {"probe": [0, 1]},
            {"probe": [5, 6]},
            {"probe": given},
            {"probe": (given[0] / 2, given[1])},
            {"probe": 3, "targets": "predicted"},
            {"probe": 3},
        ]
        settings = {"metrics": False, "controls": False}
        return [Watch(GradCAM("net.features"), **each, **settings) for each in probes]

    first, again = monitors(), monitors()
    run = trainer(tmp_path, *first, max_epochs=1)
    run.fit(Classifier(), *loaders())
    run.save_checkpoint(tmp_path / "last.ckpt")
    following = trainer(tmp_path, *again, max_epochs=2)
    following.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    for one, other in zip(first, again, strict=True):
        assert (one.steps, other.steps) == ([0, 2], [5])
        assert torch.equal(one._state.probe.images, other._state.probe.images)  # type: ignore[union-attr]


class Plain:
    """A method of the user's that prints as any object."""

    def __init__(self, layer: str) -> None:
        self.method = GradCAM(layer)

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return self.method.explain(model, images, targets)


def test_two_monitors_of_methods_that_print_alike(tmp_path: Path) -> None:
    monitors = [Watch(Plain(layer), **CHEAP) for layer in ("net.features", "net.features.3")]
    trainer(tmp_path, *monitors, max_epochs=1).fit(Classifier(), *loaders())
    assert [monitor.steps for monitor in monitors] == [[0, 2], [0, 2]]


def test_a_method_that_prints_as_any_object_is_known_again(tmp_path: Path) -> None:
    """Also where it counts what it has done: its address and its state are others in a new process."""

    class Counting(Plain):
        calls = 0

        def explain(self, *arguments: Any) -> Tensor:
            self.calls += 1
            return super().explain(*arguments)

    def monitors() -> list[Watch]:
        methods = [Counting("net.features"), AOP(Counting("net.features.3"), RankedMask(3))]
        return [Watch(method, **CHEAP) for method in methods]

    first, again = monitors(), monitors()
    run = trainer(tmp_path, *first, max_epochs=1)
    run.fit(Classifier(), *loaders())
    run.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, *again, max_epochs=2).fit(
        Classifier(), *loaders(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert [monitor.steps for monitor in first + again] == [[0, 2], [0, 2], [5], [5]]
    taken_up = (tmp_path / "lightning_logs" / "version_1").rglob("run.json")
    assert [len(History.load(path.parent).records) for path in taken_up] == [3, 3]


@pytest.mark.wide
def test_a_number_that_is_a_name_is_no_other_monitors(tmp_path: Path) -> None:
    methods = [GradCAM("net.features"), LayerCAM("net.features"), WGradCAM("net.features")]
    named, first, second = (
        Watch(method, name=name, **CHEAP)
        for method, name in zip(methods, ("2", None, None), strict=True)
    )
    run = trainer(tmp_path, named, first, second, logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(Classifier(), *loaders())
    folders = {path.parent.name for path in tmp_path.rglob("run.json")}
    assert folders == {"explanations", "explanations-2", "explanations-3"}


def test_another_module_is_explained_on_its_own_images(tmp_path: Path) -> None:
    """By trainer.validate() after fit; there is no training time then."""
    monitor = Watch(GradCAM("net.features"), **CHEAP)
    run = trainer(tmp_path, monitor, max_epochs=1)
    run.fit(Classifier(), *loaders())
    assert "explain/overhead" in run.callback_metrics
    other = TensorDataset(torch.rand(8, 3, 24, 24), torch.arange(8) % 5)
    run.validate(Classifier(), DataLoader(other, batch_size=8), verbose=False)
    assert monitor._state.probe is not None
    assert torch.equal(monitor._state.probe.images, other.tensors[0][:3])
    assert "explain/overhead" not in run.callback_metrics


def test_two_monitors_of_one_name_are_refused(tmp_path: Path) -> None:
    twins = [ExplanationMonitor(GradCAM(layer), name="a") for layer in ("net.features", None)]
    with pytest.raises(RuntimeError, match="stateful"):
        trainer(tmp_path, *twins).fit(Classifier(), *loaders())


def test_a_step_is_not_missed_where_a_batch_takes_several(tmp_path: Path) -> None:
    class Twice(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer: Any = self.optimizers()
            for _ in range(3):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    monitor = Watch(GradCAM("net.features"), every_n_train_steps=4, **CHEAP)
    trainer(tmp_path, monitor, max_epochs=2).fit(Twice(), *loaders())
    # Six batches of three steps: the 4th is in the second batch, the 8th in the third, the 12th and the
    # 16th in the fourth and the sixth. The loggers count batches, from 0.
    assert monitor.steps == [0, 1, 2, 3, 5]


def test_a_validation_in_every_third_epoch_is_explained(tmp_path: Path) -> None:
    monitor = Watch(GradCAM("net.features"), every_n_epochs=2, **CHEAP)
    run = trainer(tmp_path, monitor, max_epochs=3, check_val_every_n_epoch=3)
    run.fit(Classifier(), *loaders())
    assert monitor.steps == [0, 8]


def test_another_module_is_explained_as_itself(tmp_path: Path) -> None:
    monitor = Watch(GradCAM("net.features"), **CHEAP)
    run, (_, data) = trainer(tmp_path, monitor, max_epochs=1), loaders()
    run.fit(Classifier(), *loaders())
    torch.manual_seed(5)
    other = Classifier()
    (found,) = run.validate(other, data, verbose=False)
    fresh = Watch(GradCAM("net.features"), **CHEAP)
    (expected,) = trainer(tmp_path, fresh).validate(other, data, verbose=False)
    assert found["explain/overall_auc"] == expected["explain/overall_auc"]


def test_a_run_says_what_was_found_and_what_was_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_aop.monitor.progress._DELAY", 0.0)

    settings = CHEAP | {"metrics": Faithfulness(steps=4), "controls": True}
    monitor = ExplanationMonitor(GradCAM(), sinks=[Full()], **settings)
    run = trainer(tmp_path, monitor, max_epochs=2)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="Full could not take") as told:
        run.fit(Classifier(), *loaders())
    assert ["Full" in str(each.message) for each in told].count(True) == 1
    said = [text for text in caplog.messages if text.startswith("ExplanationMonitor: ")]
    found, estimate, done = said
    assert found == "ExplanationMonitor: Classifier, forward(images) gives logits [B, 5]"
    # GradCAM's forward and backward, and both curves, of three images; and those of two controls.
    assert re.fullmatch(
        r".*: explaining 3 images takes about \d+ s, for 78 model evaluations", estimate
    )
    values = {
        name: f"{float(run.callback_metrics[f'explain/{name}']):.2f}".replace("-0.00", "0.00")
        for name in monitor._state.held
    }
    (page,) = tmp_path.rglob("report.html")
    assert done.splitlines() == [
        f"ExplanationMonitor: explained 3 images 3 times; overall AUC {values['overall_auc']}, "
        f"against {values['overall_auc_random_map']} for a random map and "
        f"{values['overall_auc_centre_gaussian']} for a centre gaussian; the page is {page}",
        "  3 times: Full could not take the explanation. OSError: no room",
    ]


def test_a_validation_of_its_own_says_what_was_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = CHEAP | {"metrics": Faithfulness(steps=4)}
    run = trainer(tmp_path, ExplanationMonitor(GradCAM(), **settings))
    with caplog.at_level("INFO"):
        (found,) = run.validate(Classifier(), loaders()[1], verbose=False)
    (picture,) = tmp_path.rglob("*.png")
    assert caplog.messages[-1] == (
        "ExplanationMonitor: explained 3 images 1 time; overall AUC "
        f"{round(found['explain/overall_auc'], 2) + 0.0:.2f}; pictures are in {picture.parents[1]}"
    )


@pytest.mark.wide
def test_a_warning_is_told_in_our_own_words_beside_a_bar() -> None:
    script = """
import sys
from tqdm import tqdm
from lightning_aop.monitor.lightning import warn
with tqdm(total=3, file=sys.stderr) as bar:
    bar.update()
    warn("ExplanationMonitor: no explanation at step 3")
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True
    )
    lines = re.split(r"[\r\n]+", done.stderr)
    assert "ExplanationMonitor: no explanation at step 3" in lines
    assert not any("UserWarning" in line for line in lines)
