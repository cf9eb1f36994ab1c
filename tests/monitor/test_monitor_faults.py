"""What may go wrong while a model trains, and what it must not cost."""

import errno
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import SmallNet, snapshot
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_monitor import Classifier, Pictures, Watch, loaders, pictures_in, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_aop import AOP, IGOS, ExplanationMonitor, GradCAM, WGradCAM, fast_sigcam
from lightning_aop.metrics import OverallAUC
from lightning_aop.model.isolation import in_float32
from lightning_aop.model.passes import Passes, pass_size
from lightning_aop.monitor.budget import Budget
from lightning_aop.monitor.explanation import Explanation, Moment
from lightning_aop.monitor.sinks import Warnings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


class Found(Watch):
    """Remembers what was found."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: list[Any] = []
        self.moments: list[Moment] = []

    def write(self, explanation: Explanation, moment: Moment) -> None:
        super().write(explanation, moment)
        self.found.append(explanation)
        self.moments.append(moment)


# --------------------------------------------------------------------------------------------------
# memory


@dataclass
class Greedy:
    """GradCAM that has memory for so many images, however many it is given."""

    room: int
    error: type[BaseException] = torch.OutOfMemoryError
    tried: list[int] = field(default_factory=list)

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        self.tried.append(len(images))
        if len(images) > self.room:
            raise self.error("out of memory")
        return GradCAM("net.features").explain(model, images, targets)


class GreedyMetric(Metric):
    """Has memory for so many images, too."""

    full_state_update = False

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor) -> None:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        self.total += maps.sum().cpu()

    def compute(self) -> Tensor:
        return self.total


@pytest.mark.sample(1)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_method_that_runs_out_of_memory_gets_half_as_many_images(
    error: Any, tmp_path: Path
) -> None:
    method, plain = Greedy(3, error), Found(GradCAM("net.features"), metrics=False)
    monitor = Found(method, metrics=False)
    model = Classifier()
    with pytest.warns(UserWarning, match="fewer images in a pass, 2 at first") as caught:
        trainer(tmp_path, monitor, max_epochs=1).fit(model, *loaders())
    assert sum("out of memory" in str(w.message) for w in caught) == 1
    assert method.tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # the second explanation knows
    torch.manual_seed(0)
    again = trainer(tmp_path, plain, max_epochs=1)
    again.validate(model, loaders()[1], verbose=False)
    torch.testing.assert_close(monitor.found[-1].maps, plain.found[-1].maps)


def test_a_metric_that_runs_out_of_memory_gets_half_as_many_images(tmp_path: Path) -> None:
    small, large = (Found(GradCAM("net.features"), metrics=GreedyMetric(room)) for room in (2, 100))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="out of memory"):
        trainer(tmp_path, small, max_epochs=1).fit(Classifier(), *loaders())
    torch.manual_seed(0)
    trainer(tmp_path, large, max_epochs=1).fit(Classifier(), *loaders())
    totals = [each.found[0].values["greedy_metric"] for each in (small, large)]
    assert totals[0] == pytest.approx(totals[1])


class Counts(Metric):
    """How many maps there were, or each map's mean; or it refuses them."""

    full_state_update = False

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor) -> None:
        if self.kind == "refuses":
            raise ValueError("needs 16 images")
        self.total += len(maps)

    def compute(self) -> Tensor:
        return self.total.expand(2) if self.kind == "each" else self.total


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("refuses", "no values of Counts. ValueError: needs 16 images"),
        (
            "each",
            r"no values of Counts. .*must be one number, got the shape \[2\]: let compute\(\)",
        ),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_a_metric_that_fails_costs_its_own_values_only(
    kind: str, words: str, beside: bool, tmp_path: Path
) -> None:
    metrics: Any = Counts(kind)
    if beside:
        counted = {"maps": Counts(""), "auc": OverallAUC(steps=4)}
        metrics = MetricCollection({"first": metrics, **counted}, prefix="own_")
    monitor = Found(GradCAM("net.features"), metrics=metrics)
    module = Classifier()
    with pytest.warns(UserWarning, match=words):
        trainer(tmp_path, monitor, max_epochs=1).fit(module, *loaders())
    assert pictures_in(tmp_path)
    for explanation in monitor.found:
        assert explanation.maps.any()
        own = {name for name in explanation.values if "own" in name or "counts" in name}
        assert own == ({"own_maps", "own_auc"} if beside else set())
        if beside:
            assert explanation.values["own_maps"] == len(explanation.maps)
            alone = OverallAUC(steps=4)
            shown = explanation.probe.images[explanation.rows]
            if explanation is monitor.found[-1]:
                alone.update(module.eval(), shown, explanation.maps, explanation.targets)
                assert explanation.values["own_auc"] == pytest.approx(float(alone.compute()))


@dataclass
class Other:
    """GradCAM whose maps come in a form that nobody can draw."""

    form: Callable[[Tensor], Any]

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Any:
        return self.form(GradCAM("net.features").explain(model, images, targets))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Tensor.numpy, r"got ndarray: convert it with torch.as_tensor"),
        (list, r"got list: convert it with torch.as_tensor"),
        (lambda maps: (255 * maps).byte(), "got torch.uint8: divide bytes by 255"),
        (lambda maps: maps > 0.5, "got torch.bool"),
        (lambda maps: maps[:, None], r"got \[8, 1, 32, 32\]: drop the channel with \[:, 0\]"),
        (lambda maps: maps[:, ::4, ::4], r"got \[8, 8, 8\]: upsample"),
        (lambda maps: maps[:2], r"got \[2, 32, 32\]: "),
    ],
)
def test_maps_of_another_form_are_told_by_name(
    form: Callable[[Tensor], Any], words: str, tmp_path: Path
) -> None:
    said = "Other.explain must return one map in .0, 1. for each image, a floating-point tensor "
    with pytest.warns(UserWarning, match=rf"{said}\[8, 32, 32\], {words}"):
        trainer(tmp_path, Found(Other(form)), max_epochs=1).fit(Classifier(), *loaders())


def test_one_number_stands_for_all_channels_and_what_does_not_fit_is_left_out(
    tmp_path: Path,
) -> None:
    found = {}
    given: dict[str, Any] = {
        "one": (0.5, 0.2),
        "each": ([0.5] * 3, torch.full((3, 1, 1), 0.2)),
        "none": (None, None),
        "unfit": ([0.5] * 2, [0.2] * 2),
    }
    for name, (mean, std) in given.items():
        pl.seed_everything(0, verbose=False)
        monitor = Found(GradCAM("net.features"), metrics=False, mean=mean, std=std)
        trainer(tmp_path / name, monitor, max_epochs=1).fit(Classifier(), *loaders())
        found[name] = [path.read_bytes() for path in sorted(tmp_path.rglob(f"{name}/**/*.png"))]
        assert found[name]
    assert found["one"] == found["each"] != found["none"] == found["unfit"]


SEEN: list[int] = []


def test_passes_shrink_to_what_fits_and_grow_again(net: nn.Module, batch: Any) -> None:
    method = AOP(WGradCAM(eval_batch_size=8), IGOS(iterations=1, samples=3, eval_batch_size=20))
    expected, passes, room = method.explain(net, *batch), Passes(), 6
    seen = SEEN  # not a list of the hook's own, which would be put back
    seen.clear()

    def heard(module: nn.Module, args: Any) -> None:
        SEEN.append(len(args[0]))
        if len(args[0]) > room:
            raise torch.OutOfMemoryError("out of memory")

    handle = net.register_forward_pre_hook(heard)
    maps, ran_out = passes.within_memory(lambda: method.explain(net, *batch), len(batch[0]))
    assert ran_out
    assert passes.limit == 5  # of 20, by way of 10
    torch.testing.assert_close(maps, expected)
    room = 100
    sizes = []
    for _ in range(20):
        seen.clear()
        _, ran_out = passes.within_memory(lambda: method.explain(net, *batch), len(batch[0]))
        assert not ran_out
        sizes.append(max(seen))
    handle.remove()
    assert sizes[0] == 4  # all images of a trial; the three samples of one image are a pass
    assert sizes[-1] == max(sizes) > 10
    assert passes.limit is None
    assert pass_size(None) == 32
    assert pass_size(7) == 7


def test_too_little_memory_for_one_image_skips_with_one_warning(tmp_path: Path) -> None:
    method = Greedy(0)
    run = trainer(tmp_path, ExplanationMonitor(method, metrics=False))
    with pytest.warns(UserWarning, match="ExplanationMonitor") as caught:
        run.fit(Classifier(), *loaders())
    said = [str(w.message) for w in caught if "ExplanationMonitor" in str(w.message)]
    assert sum("training goes on. OutOfMemoryError" in text for text in said) == 1
    assert run.global_step == 6
    assert method.tried[:4] == [8, 4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    class Broken:
        calls = 0

        def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            Broken.calls += 1
            raise RuntimeError("no map today")

    with pytest.warns(UserWarning, match="no map today"):
        trainer(tmp_path, ExplanationMonitor(Broken()), max_epochs=1).fit(Classifier(), *loaders())
    assert Broken.calls == 2


# --------------------------------------------------------------------------------------------------
# maps that show nothing


class Poisoned(SmallNet):
    """Gives NaN for pictures that are brighter than a limit."""

    limit = 0.0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        bright = images.mean(dim=(1, 2, 3)) > self.limit
        return torch.where(bright[:, None], torch.nan, logits)


def test_pictures_with_nan_are_marked_and_the_others_explained(tmp_path: Path) -> None:
    data = Pictures(6)
    data.images[2] += 3.0
    model = Classifier()
    model.net = Poisoned()
    model.net.limit = 2.0
    monitor = Found(GradCAM("net.features"), probe=(data.images, data.labels))
    run = trainer(tmp_path, monitor)
    run.validate(model, loaders()[1], verbose=False)
    (found,) = monitor.found
    assert found.maps[2].isnan().all()
    assert found.maps[[0, 1, 3, 4, 5]].isfinite().all()
    blank = (found.maps[[0, 1, 3, 4, 5]].amax(dim=(1, 2)) == 0).sum() + 1
    assert run.callback_metrics["explain/blank_maps"] == blank
    assert run.callback_metrics["explain/overall_auc"].isfinite()


class Filled(SmallNet):
    """Takes zero for pixels that hold no data."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.nan_to_num())


def test_pixels_without_data_are_told(tmp_path: Path) -> None:
    data, model = Pictures(6), Classifier()
    data.images[[1, 4], :, :5] = torch.nan
    model.net = Filled()
    monitor = Found(probe=(data.images, data.labels))
    with pytest.warns(UserWarning, match=r"2 of 6 images have pixels that are NaN") as caught:
        trainer(tmp_path, monitor).fit(model, *loaders())
    assert sum("pixels that are NaN" in str(w.message) for w in caught) == 1
    maps = monitor.found[-1].maps
    assert maps[[0, 2, 3, 5]].isfinite().all()


def test_a_diverged_model_is_drawn_without_maps(tmp_path: Path) -> None:
    model, monitor = Classifier(), Found()
    nn.init.constant_(model.net.head.weight, torch.nan)
    run = trainer(tmp_path, monitor)
    run.validate(model, loaders()[1], verbose=False)
    assert run.callback_metrics["explain/blank_maps"] == 8
    assert float(run.callback_metrics["explain/overall_auc"]) == -1  # the worst, for who compares
    assert monitor.found[0].maps.isnan().all()
    assert len(pictures_in(tmp_path)) == 1


def test_blank_maps_are_counted(tmp_path: Path) -> None:
    model = Classifier()
    nn.init.constant_(model.net.head.weight, -1.0)
    run = trainer(tmp_path, ExplanationMonitor(GradCAM("net.features")))
    run.validate(model, loaders()[1], verbose=False)
    assert run.callback_metrics["explain/blank_maps"] == 8


# --------------------------------------------------------------------------------------------------
# loggers and disks


class Lost(CSVLogger):
    """A logger whose connection is gone, and whose errors are never quite the same."""

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        if any(key.startswith("explain") for key in metrics):
            raise ConnectionError(f"no route to host, request {uuid.uuid4().hex}")
        super().log_metrics(metrics, step)

    def log_image(self, **anything: Any) -> None:
        raise ConnectionError(f"no route to host, request {uuid.uuid4()} at {id(uuid.uuid4()):#x}")


def test_a_lost_logger_costs_its_own_pictures_only(tmp_path: Path) -> None:
    kept = TensorBoardLogger(tmp_path / "kept")
    monitor = Found(WGradCAM(), metrics=False, every_n_train_steps=1)
    run = trainer(tmp_path, monitor, logger=[Lost(tmp_path / "lost"), kept], max_epochs=1)
    with pytest.warns(UserWarning, match="ConnectionError") as caught:
        run.fit(Classifier(), *loaders())
    said = [str(w.message) for w in caught]
    assert sum("could not log metrics to Lost. ConnectionError" in text for text in said) == 1
    assert sum("The picture is at" in text for text in said) == 1
    assert run.global_step == 3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(kept.log_dir, {"images": 0}).Reload()
    assert len(events.Images("explain/heatmaps")) == len(monitor.found) == 4
    assert len(pictures_in(tmp_path)) == 3  # the last step and the epoch have one


def test_a_trouble_is_said_once_whatever_its_request_is_called() -> None:
    said: list[str] = []
    warnings = Warnings(said.append)
    for name in ("0b4c", "abcd", "edfa"):  # a part of such a name may have no digit
        warnings(f"no route, request 5f0a9c1e-{name}-4aaa-{name}-{3 * name} at 0x7fc8e9cf9380")
    assert len(said) == 1
    assert warnings.told[0].startswith("3 times: no route")


def test_a_full_disk_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    run = trainer(tmp_path, ExplanationMonitor(WGradCAM()), max_epochs=2)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        run.fit(Classifier(), *loaders())
    said = sorted(str(w.message) for w in caught if "No space left" in str(w.message))
    assert len(said) == 2  # once for the pictures, once for the history
    assert "picture" in said[0] or "explanation" in said[0]
    assert "history" in said[1]
    assert run.global_step == 6
    assert "explain/overall_auc" in run.callback_metrics
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_interrupt_in_the_middle_of_a_map_leaves_no_trace(tmp_path: Path) -> None:
    model, states = Classifier(), []

    class Interrupted:
        def explain(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            calls = []

            def stop(*_: Any) -> None:
                calls.append(1)
                if len(calls) == 5:
                    raise KeyboardInterrupt

            handle = model.net.features[0].register_forward_pre_hook(stop)
            try:
                return fast_sigcam("net.features").explain(network, images, targets)
            finally:
                handle.remove()

    class Before(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            states.append(snapshot(pl_module))

    monitor = ExplanationMonitor(Interrupted(), metrics=False)
    run = trainer(tmp_path, Before(), monitor)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(model, *loaders())
    (before,), after = states, snapshot(model)
    for name in ("state", "requires_grad", "hooks", "attributes"):
        for old, new in zip(before[name], after[name], strict=True):
            assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


# --------------------------------------------------------------------------------------------------
# time


def test_the_budget_pays_off_what_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("lightning_aop.monitor.budget._FREE", 0.0)
    budget = Budget(0.1, started=100.0)
    assert budget.allows_another()  # nobody knows yet what it takes
    now[0] += 5.0
    budget.pay(5.0)
    assert (budget.training, budget.spent) == (0, 5)
    for training in (0, 40, 99):
        now[0] = 105.0 + training
        assert not budget.allows_another()
    now[0] = 105.0 + 100.0  # 5 spent and 5 to come are a tenth of 100
    assert budget.allows_another()
    assert budget.overhead == pytest.approx(0.05)
    assert Budget(None).allows_another()
    # What not every explanation has is asked for only when it comes.
    budget = Budget(0.1, started=100.0)
    budget.pay(11.0, extra=6.0)
    now[0] = 100.0 + 11.0 + 165.0
    assert budget.allows_another()  # 11 + 5 of 165
    assert not budget.allows_another(6.0)


def test_the_first_minute_of_explanations_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    budget = Budget(0.1, started=0.0)
    for _ in range(6):  # without any training between
        assert budget.allows_another()
        now[0] += 10.0
        budget.pay(10.0)
    assert not budget.allows_another()
    now[0] += 699.0
    assert not budget.allows_another()
    now[0] += 1.0  # 70 s are a tenth
    assert budget.allows_another()


class Clock:
    """Time that passes only where it is said to: an explanation takes 20 ms, a step 10 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("lightning_aop.monitor.budget._FREE", 0.0)
        for room in ("monitor.budget", "monitor.callback"):
            monkeypatch.setattr(f"lightning_aop.{room}.time", self)

    def perf_counter(self) -> float:
        return self.now

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        self.now += 0.02
        return GradCAM("net.features").explain(model, images, targets)


class Steps(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += 0.01


def test_explanations_are_left_out_to_keep_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monitor = Found(clock, metrics=False, probe=2, every_n_train_steps=1, max_overhead=0.5)
    run = trainer(tmp_path, monitor, Steps(clock), max_epochs=20)
    run.fit(Classifier(), *loaders())
    # The first in any case; the second is paid for after 80 ms, 8 steps, each other after 40 more.
    steps = [0, *range(8, 61, 4)]
    assert len(monitor.found) == pytest.approx(len(steps), abs=1)  # rounding may put one off
    assert monitor.moments[-1].step == 59  # where training ends
    spent = [each.values["seconds"] for each in monitor.found]
    assert spent == pytest.approx([0.02] * len(monitor.found))
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    header, *rows = [line.split(",") for line in text.splitlines()]
    skipped = [row[header.index("explain/skipped")] for row in rows]
    overhead = [float(v) for row in rows if (v := row[header.index("explain/overhead")])]
    told = sum(float(v) for v in skipped if v) + len(monitor.found)
    assert 1 + 60 - 4 <= told <= 1 + 60  # those after the last explanation are not told any more
    assert len(overhead) == len(monitor.found) - 1  # before training there is no share of it
    assert all(share <= 0.5 + 1e-6 for share in overhead)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_model_is_explained_as_it_was_left(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    class Stop(Steps):
        def on_train_epoch_end(self, run: pl.Trainer, *_: Any) -> None:
            run.should_stop = stopped and run.current_epoch == 3

    monitor = Found(clock, metrics=False, probe=2, max_overhead=1e-6)
    module = Classifier()
    run = trainer(tmp_path, monitor, Stop(clock), max_epochs=4 + 3 * stopped)
    run.fit(module, *loaders())
    assert [each.step for each in monitor.moments] == [0, 11]
    assert [each.epoch for each in monitor.moments] == [0, 3]
    last = monitor.found[-1]
    expected = GradCAM("net.features").explain(module, last.probe.images[last.rows], last.targets)
    torch.testing.assert_close(last.maps, expected)
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    header, *rows = [line.split(",") for line in text.splitlines()]
    logged = [row[header.index("step")] for row in rows if row[header.index("explain/seconds")]]
    assert logged == ["0", "11"]
    # A checkpoint that watches a value finds it in each validation.
    assert "explain/seconds" in run.callback_metrics


def test_without_a_budget_nothing_is_left_out(tmp_path: Path) -> None:
    monitor = Found(
        GradCAM("net.features"),
        metrics=False,
        probe=2,
        every_n_train_steps=1,
        max_overhead=None,
    )
    run = trainer(tmp_path, monitor, max_epochs=1)
    run.fit(Classifier(), *loaders())
    assert len(monitor.found) == 1 + 3
    assert "explain/skipped" not in run.callback_metrics


def test_graphs_are_wanted_or_not(tmp_path: Path, unchecked: None) -> None:
    wrong: Any = True
    run = trainer(tmp_path, ExplanationMonitor(graphs=wrong))
    with pytest.raises(MisconfigurationException, match='graphs=True must be "auto" or False'):
        run.fit(Classifier(), *loaders())
    for graphs in ("auto", False):
        monitor = ExplanationMonitor(graphs=graphs, metrics=False)  # type: ignore[arg-type]
        trainer(tmp_path, monitor, max_epochs=1).fit(Classifier(), *loaders())
        assert monitor._state.passes.graphs == graphs


@pytest.mark.parametrize("share", [0, -0.1])
def test_a_budget_of_nothing_is_refused(share: float, tmp_path: Path) -> None:
    run = trainer(tmp_path, ExplanationMonitor(max_overhead=share))
    with pytest.raises(MisconfigurationException, match=r"max_overhead=.* must be above 0"):
        run.fit(Classifier(), *loaders())


# --------------------------------------------------------------------------------------------------
# precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_maps_in_full_precision(precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Classifier()
    probe = (torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    maps = {}
    for full in (False, True):
        monitor = Found(WGradCAM("net.features"), probe=probe, metrics=False, full_precision=full)
        run = trainer(tmp_path, monitor, precision=precision)
        run.validate(model, loaders()[1], verbose=False)
        maps[full] = monitor.found[0].maps
    wide = SmallNet().eval()
    wide.load_state_dict({k: v.float() for k, v in model.net.state_dict().items()})
    images = probe[0].to(torch.bfloat16).float() if precision == "bf16-true" else probe[0]
    expected = WGradCAM("features").explain(wide, images, probe[1])
    torch.testing.assert_close(maps[True], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(maps[False], expected, atol=1e-5)
    torch.testing.assert_close(maps[False], expected, atol=0.15, rtol=0)
    assert {str(p.dtype) for p in model.parameters()} == {
        "torch.bfloat16" if precision == "bf16-true" else "torch.float32"
    }


def test_float32_copies_leave_a_half_precision_model_alone() -> None:
    model = nn.Sequential(SmallNet(), nn.BatchNorm1d(5), nn.Linear(5, 5)).to(torch.bfloat16).eval()
    before, parameters = snapshot(model), [id(p) for p in model.parameters()]
    with in_float32(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
        model(torch.rand(4, 3, 32, 32)).sum().backward()
    assert [id(p) for p in model.parameters()] == parameters
    assert before["modes"] == snapshot(model)["modes"]
    assert all(p.grad is None for p in model.parameters())
    for old, new in zip(before["state"].values(), model.state_dict().values(), strict=True):
        assert torch.equal(old, new)


# --------------------------------------------------------------------------------------------------
# strategies


def test_sharded_weights_are_refused_in_setup(tmp_path: Path) -> None:
    from pytorch_lightning.strategies import FSDPStrategy
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    run = trainer(tmp_path)
    run.strategy.__class__ = FSDPStrategy
    monitor = ExplanationMonitor()
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards the weights"):
        monitor.setup(run, Classifier(), "fit")


# --------------------------------------------------------------------------------------------------
# what a batch has beside the labels


class Beside(Pictures):
    """Has something between each image and its label."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)[:2]
        return image, self.make(index, image), label


class ByTheLast(Classifier):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step((batch[0], batch[2]), index)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step((batch[0], batch[2]), index)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "make",
    [
        lambda index, image: index,
        lambda index, image: (image[0] > image[0].mean()).long(),
        lambda index, image: 40 + index % 3,
        lambda index, image: torch.tensor(0.5 + index),
    ],
    ids=["index", "mask", "meta", "weight"],
)
@pytest.mark.parametrize("probe", [2, [3, 5], 4])
def test_the_label_is_explained_and_not_what_stands_before_it(
    make: Any, probe: Any, tmp_path: Path
) -> None:
    data = Beside(make)
    monitor = Found(GradCAM("net.features"), probe=probe, metrics=False, failures=2)
    loader = DataLoader(data, 4)
    trainer(tmp_path, monitor, max_epochs=1).fit(ByTheLast(), loader, loader)
    numbers = range(probe) if isinstance(probe, int) else probe
    wanted = [int(data[number][2]) for number in numbers]
    assert [each.targets.tolist() for each in monitor.found] == [wanted] * len(monitor.found)
    assert len(monitor.found) > 1


class InAnotherMethod(Classifier):
    """Has its loss in a method of its own; NaN stands for what nobody has labelled."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self._common_step(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self._common_step(batch))

    def _common_step(self, batch: Any) -> Tensor:
        known, logits = ~batch[1].isnan(), self(batch[0])
        return nn.functional.binary_cross_entropy_with_logits(logits[known], batch[1][known])


@pytest.mark.parametrize("missing", [False, True])
def test_classes_of_their_own_are_told_by_a_loss_in_any_method(
    missing: bool, tmp_path: Path
) -> None:
    labels = nn.functional.one_hot(torch.arange(24) % 5, 5).float()
    if missing:
        labels[:, 4] = torch.nan
    model = InAnotherMethod()
    model.loss = None
    monitor = Found(GradCAM("net.features"), probe=4, metrics=False)
    loader = DataLoader(Pictures(labels=labels), 4)
    trainer(tmp_path, monitor, max_epochs=1).fit(model, loader, loader)
    assert monitor.found[-1].targets.tolist() == [0, 1, 2, 3]
    scores = monitor.found[-1].chances.sum(dim=1)
    assert not torch.allclose(scores, torch.ones(4), atol=0.1)  # by a sigmoid each


class Autoencoder(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 3, 2, 2))
        self.loss = nn.MSELoss()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step((batch[0], batch[0]), index)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step((batch[0], batch[0]), index)


def test_an_autoencoder_is_explained_by_how_alike_its_images_are(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="as an autoencoder does, .* logits=lambda module, images"):
        trainer(tmp_path / "a", ExplanationMonitor(), max_epochs=1).fit(Autoencoder(), *loaders())
    assert not pictures_in(tmp_path / "a")

    def alike(module: Any, images: Tensor) -> Tensor:
        return -(module(images) - images).square().mean(dim=(1, 2, 3))[:, None]

    monitor = Found(GradCAM("net.0"), probe=2, metrics=False, logits=alike)
    trainer(tmp_path / "b", monitor, max_epochs=1).fit(Autoencoder(), *loaders())
    assert monitor.found[-1].targets.tolist() == [0, 1, 0, 1]  # what raises it, and what lowers it
