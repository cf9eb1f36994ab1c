"""ExplanationMonitor: the Lightning callback that shows, while a model trains, what it looks at."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_aop._version import __version__
from lightning_aop.history.rows import COLUMNS, evolution_rows
from lightning_aop.history.store import History, HistoryWriter, Record
from lightning_aop.methods.aop import fast_sigcam
from lightning_aop.methods.controls import CentreGaussian, RandomMap
from lightning_aop.metrics import EnergyPointingGame, Faithfulness, OverallAUC, PointingGame
from lightning_aop.model.adapter import predict
from lightning_aop.model.chunks import largest_chunk, with_chunk
from lightning_aop.model.frozen import FrozenPart
from lightning_aop.model.isolation import (
    device_of,
    in_float32,
    isolated,
    isolated_rng,
    undisturbed,
    unwrap,
)
from lightning_aop.monitor.budget import Budget
from lightning_aop.monitor.explanation import Found, Plan
from lightning_aop.monitor.lightning import (
    Callback,
    LightningModule,
    Trainer,
    misconfiguration,
    rank_zero_warn,
)
from lightning_aop.monitor.loggers import has_tables, log_image, log_table
from lightning_aop.monitor.panels import draw_change, draw_probe
from lightning_aop.monitor.probe import (
    Probe,
    ProbeSource,
    TargetChoice,
    class_names_of,
    collect,
    normalisation_of,
    source_of,
)
from lightning_aop.monitor.processes import Team
from lightning_aop.monitor.progress import progress_bar
from lightning_aop.monitor.run_folder import Earlier, RunFiles
from lightning_aop.scores import Score, sigmoid, softmax
from lightning_aop.types import Maps, SaliencyMethod, Targets
from lightning_aop.view.grid import PANELS, Panel
from lightning_aop.view.overlay import displayable

T = TypeVar("T")
Moment: TypeAlias = Literal["start", "step", "epoch"]


# What knows nothing of the model, and what the figures of its maps are called after.
_CONTROLS: dict[str, SaliencyMethod] = {
    "random map": RandomMap(),
    "centre gaussian": CentreGaussian(),
}


@dataclass
class _Worked:
    """What one process has done of the work."""

    maps: Maps
    curves: Float[Tensor, "mine 2 points"]
    metric: Metric | MetricCollection | None


class ExplanationMonitor(Callback):
    """Explain the same pictures again and again while a model trains, and log what is seen.

    Before training, at every chosen validation, and under `trainer.validate()`, the monitor logs

    - `explain/heatmaps`: each probe picture beside its overlay, with the class, its score and the map's
      over-all AUC, on one colour scale for the whole run; what is more than 32 explanations goes on in
      `explain/heatmaps-2` and so on;
    - `explain/deletion_auc`, `explain/insertion_auc`, `explain/overall_auc`: how faithful the maps
      are (`ModelCheckpoint(monitor="explain/overall_auc", mode="max")` works);
    - `explain/overall_auc_random_map`, `explain/overall_auc_centre_gaussian`: the same for two maps that
      know nothing of the model, measured at the 1st, 2nd, 4th, 8th … explanation and held in between;
    - `explain/change`: the first map, the previous one and that of now side by side, of up to 16
      explanations;
    - `explain/pointing_game`, `explain/energy_in_mask`: where the data has masks, how often the
      maximum of a map lies on the object, and which share of the heat; means over the classes;
    - `explain/drift`: how much the maps have changed since the explanation before, 1 − their rank
      correlation: 0 for none, 1 for no likeness;
    - `explain/blank_maps`: how many maps show nothing, or NaN; such are labelled in the picture;
    - `explain/seconds`: what it took.

    Where the data has masks (a dataset with `input_masks(index, classes)`, or a batch with bool
    `masks`), their outlines are drawn. Multilabel pictures show also what the model sees but the
    labels don't (a score above 0.5): the strongest such class is explained, but not judged.

    Under `fit` the maps and figures are also stored, in the folder `explanations` beside the logger's
    files, or in `default_root_dir`: `report.html`, a page to look through all of them, which
    grows as the run goes, and at the end `evolution.gif`, a film. `history.History` reads them.

    Training is left bit for bit as it would have been: weights, buffers, gradients, modes and random
    state. An explanation that fails gives a warning, and training goes on; one that runs out of
    memory is tried again with half as many images in a pass. With a callback that swaps weights
    around validation (`WeightAveraging`), the weights in place at its end are explained. Under DDP
    each process explains its share of the probe, with the first one's BatchNorm statistics. What a
    frozen backbone makes of the probe is computed once, and kept while its weights stay the same.

    Args:
        method: how to explain; `fast_sigcam()` by default, 39 model evaluations an explanation.
        probe: which pictures: a number of validation samples (training samples where there are no
            validation ones); or a batch as a DataLoader gives it; or a dataset; or a function
            without arguments that returns a batch. Chosen once, and kept when a run is resumed.
        targets: which classes: "label" for the true ones, one explanation for each positive class of
            a multilabel picture; "predicted" for the likeliest; or a list of class indices, each
            explained for every picture.
        target_layer: for the default method, the layer whose feature map it starts from: a name, a
            module, or None for the last one before the classifier.
        score: F_c; by default `scores.sigmoid` for multi-hot labels and `scores.softmax` for others.
        every_n_epochs: explain at validations of every n-th epoch (at the end of the training epoch
            where there is no validation); 1 by default, 0 for never.
        every_n_train_steps: explain after every n-th optimizer step instead.
        metrics: what judges the maps, a metric with `update(model, images, maps, targets)` whose
            `compute()` gives a value or a dictionary of values; by default `Faithfulness(steps=28)`,
            56 model evaluations an explanation, as `Faithfulness(evaluations=56)` takes for a closer
            estimate. False for none.
        controls: judge a random map and a centre gaussian too, where the metric is `Faithfulness` or
            `OverallAUC`: 112 evaluations an explanation when they are measured.
        panels: what stands beside each picture: "overlay"; "map", the heat alone; "curves", its
            deletion and insertion.
        class_names: names by class index; by default the dataset's `classes`, or the index.
        mean, std: what the pictures were normalised with, to show them as they were; by default what
            the dataset's `transform` says.
        max_classes_per_image: the most positive classes of one multilabel picture to explain.
        max_overhead: leave out explanations so that they take no more than this share of the training
            time (0.05 for a twentieth), as `explain/overhead` and `explain/skipped` tell. The first
            is always made, and paid off before the next. None for no limit.
        store: keep the maps and figures in files. Without them there is no drift.
        full_precision: explain in float32 whatever the trainer's precision; by default in the
            trainer's, but for the parts that need more.
    """

    def __init__(
        self,
        method: SaliencyMethod | None = None,
        *,
        probe: ProbeSource = 8,
        targets: TargetChoice = "label",
        target_layer: str | torch.nn.Module | None = None,
        score: Score | None = None,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        metrics: Metric | MetricCollection | bool = True,
        controls: bool = True,
        panels: Sequence[Panel] = ("overlay",),
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        max_classes_per_image: int = 3,
        max_overhead: float | None = None,
        store: bool = True,
        full_precision: bool = False,
    ) -> None:
        super().__init__()
        self.method = method
        self.probe = probe
        self.targets = targets
        self.target_layer = target_layer
        self.score = score
        if every_n_epochs is None:
            every_n_epochs = 0 if every_n_train_steps else 1
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps or 0
        self.metrics = metrics
        self.controls = controls
        self.panels = panels
        self.class_names = class_names
        self.mean, self.std = mean, std
        self.max_classes_per_image = max_classes_per_image
        self.max_overhead = max_overhead
        self.store = store
        self.full_precision = full_precision
        self._kept: Probe | None = None
        self._resumed = False  # the probe is a checkpoint's, and not compared with the data yet
        self._files = RunFiles(self._warn)
        self._explained = 0  # times
        self._controls: dict[str, dict[str, float]] = {}
        self._control_seconds = 0.0  # what they took when last measured
        self._last_step = 0
        self._chunk: int | None = None  # images in a pass, once there was too little memory
        self._budget = Budget(max_overhead)
        self._frozen = FrozenPart()
        self._warned: set[str] = set()

    # ---------------------------------------------------------------------------------------------
    # when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't work before any work is done."""
        problem = self._misuse() or _unsupported(trainer)
        if problem:
            raise misconfiguration(trainer, f"ExplanationMonitor: {problem}")
        if stage == "fit":
            self._kept, self._last_step, self._resumed = None, 0, False
            self._files, self._explained, self._controls = RunFiles(self._warn), 0, {}
            self._budget = Budget(self.max_overhead)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the untrained model; a resumed run has done so."""
        self._budget.started = time.perf_counter()
        if trainer.global_step == 0 and self._enabled:
            self._fire(trainer, pl_module, "start")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Explain after every n-th optimizer step."""
        step = trainer.global_step
        if self.every_n_train_steps and step != self._last_step:
            self._last_step = step
            if step % self.every_n_train_steps == 0:
                self._fire(trainer, pl_module, "step")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain at the chosen validations, never in the sanity check."""
        due = self._enabled if trainer.state.fn != "fit" else self._due(trainer)
        if due and not trainer.sanity_checking:
            self._fire(trainer, pl_module, "epoch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain at the chosen epochs where there is no validation."""
        if not trainer.enable_validation and self._due(trainer):
            self._fire(trainer, pl_module, "epoch")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a film of the maps, and a table for loggers that have tables."""
        folder = self._files.folder
        if folder is None:
            return
        try:
            with isolated_rng():
                self._files.finish()
                for logger in filter(has_tables, trainer.loggers):
                    rows = evolution_rows(History.load(folder))
                    log_table(logger, "explain/evolution", COLUMNS, rows, _step(trainer))
        except Exception as error:
            self._warn(
                f"ExplanationMonitor: no film or table of the maps. {type(error).__name__}: {error}"
            )

    @property
    def _enabled(self) -> bool:
        return bool(self.every_n_epochs or self.every_n_train_steps)

    def _due(self, trainer: Trainer) -> bool:
        n = self.every_n_epochs
        return n > 0 and (trainer.current_epoch + 1) % n == 0

    def _misuse(self) -> str | None:
        """Return what is wrong with the arguments, or None."""
        n, steps = self.every_n_epochs, self.every_n_train_steps
        if n < 0 or steps < 0:
            return f"every_n_epochs={n} and every_n_train_steps={steps} must not be negative"
        if n and steps:
            return (
                f"every_n_epochs={n} and every_n_train_steps={steps} exclude each other: set one of "
                "them to 0"
            )
        if isinstance(self.probe, int) and self.probe < 1:
            return f"probe={self.probe} must be at least 1 sample"
        if isinstance(self.targets, str) and self.targets not in ("label", "predicted"):
            return (
                f"targets={self.targets!r} must be 'label', 'predicted' or a list of class indices"
            )
        if self.max_classes_per_image < 1:
            return f"max_classes_per_image={self.max_classes_per_image} must be at least 1"
        if self.max_overhead is not None and self.max_overhead <= 0:
            return f"max_overhead={self.max_overhead} must be above 0, such as 0.05 for a twentieth"
        if isinstance(self.panels, str) or not self.panels or set(self.panels) - set(PANELS):
            return (
                f"panels={self.panels!r} must be a list of some of {', '.join(map(repr, PANELS))}"
            )
        if self.method is not None and not isinstance(self.method, SaliencyMethod):
            return (
                f"method must have explain(model, images, targets), got "
                f"{type(self.method).__name__}: pass fast_sigcam(), sigcam(), GradCAM() or your own"
            )
        if self.method is not None and self.target_layer is not None:
            return "target_layer is for the default method: name the layer in the method given"
        return None

    # ---------------------------------------------------------------------------------------------
    # what is kept in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the probe and where the history is, so that a resumed run goes on with both."""
        state = {} if self._kept is None else self._kept.state()
        state |= {"explained": self._explained, "controls": self._controls}
        return state | self._files.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the probe and the history of the run that is resumed."""
        self._files.take_up(state_dict)
        self._explained = state_dict.get("explained", 0)
        self._controls = state_dict.get("controls", {})
        if "images" in state_dict:
            self._kept, self._resumed = Probe.from_state(state_dict), True

    # ---------------------------------------------------------------------------------------------
    # what happens

    def _fire(self, trainer: Trainer, pl_module: LightningModule, moment: Moment) -> None:
        """Explain and log; whatever goes wrong becomes a warning, and no state is left changed."""
        device, team, started = device_of(pl_module), Team(), time.perf_counter()
        try:
            with isolated_rng(device), torch.inference_mode(False), torch.no_grad():
                # Each process has a clock of its own, and one must not wait for the others.
                if not team.from_first(self._affordable):
                    self._budget.skipped += 1
                    return
                with isolated(pl_module):
                    found = self._explain(trainer, pl_module, team)
                before: list[Earlier] = []  # for the one process that draws

                def drift_since() -> list[float | None]:
                    nonlocal before
                    drift, before = self._before(trainer, found)
                    return drift

                drift = team.from_first(drift_since)
                values = dict(found.values)
                known = [value for value in drift if value is not None]
                if known:
                    values["drift"] = sum(known) / len(known)
                values["seconds"] = time.perf_counter() - started
                if self.max_overhead is not None:
                    values["skipped"] = float(self._budget.skipped)
                    extra = self._control_seconds if found.controls else 0.0
                    self._budget.pay(values["seconds"], extra)
                    values["overhead"] = self._budget.overhead
                fresh = bool(found.controls)
                if fresh:
                    self._controls = found.controls
                if trainer.state.fn == "fit":
                    self._explained += 1
                self._log_values(trainer, pl_module, values | self._lines(), moment, team)
                if trainer.is_global_zero:
                    self._store(trainer, found, values, drift, fresh)
                    self._log_pictures(trainer, found, drift, before, moment)
        except Exception as error:
            self._budget.pay(time.perf_counter() - started)
            self._warn(
                f"ExplanationMonitor: no explanation at step {_step(trainer)}, training goes on. "
                f"{type(error).__name__}: {error}"
            )

    def _explain(self, trainer: Trainer, pl_module: LightningModule, team: Team) -> Found:
        """Return the maps and the metrics of the probe as the model is now, the same everywhere."""
        if self._kept is None:
            self._kept = team.from_first(lambda: self._draw(trainer, pl_module))
        elif self._resumed:
            self._resumed = False
            self._compare(trainer, pl_module)
        probe = self._kept
        device = device_of(pl_module)
        score = self.score or (sigmoid if probe.multilabel else softmax)
        with (
            self._precision(trainer, pl_module),
            team.buffers_of_first(pl_module),
            self._frozen.kept(unwrap(pl_module), len(probe.images)),
            progress_bar(trainer, pl_module, len(probe.images)),
        ):
            images = probe.images.to(device)
            plan = team.from_first(lambda: self._plan(pl_module, probe, images))
            rows, targets = plan.rows.to(device), plan.targets.to(device)
            # Where a process would have nothing to judge, each does all the work.
            workers = team if int(plan.judged.sum()) >= team.size else Team.alone()
            mine = workers.share(len(rows)).to(device)

            def work(chunk: int) -> _Worked:
                method = self.method or fast_sigcam(self.target_layer, score=score)
                maps = with_chunk(method, chunk).explain(
                    pl_module, images[rows[mine]], targets[mine]
                )
                judged = plan.judged.to(device)[mine]
                worked = _Worked(maps, maps.new_full((len(maps), 2, 2), torch.nan), None)
                metric = self._metric(score, chunk, workers)
                if metric is None or not judged.any():
                    return worked
                batch = images[rows[mine[judged]]], maps[judged], targets[mine[judged]]
                worked.metric = _updated(metric, pl_module, *batch)
                curves = getattr(metric, "last_curves", {})
                if len(curves) == 2:
                    both = torch.stack([curves["deletion"], curves["insertion"]], dim=1)
                    worked.curves = both.new_full((len(maps), *both.shape[1:]), torch.nan)
                    worked.curves[judged] = both
                return worked

            def judge_controls(chunk: int) -> dict[str, Metric | MetricCollection]:
                metric = self._metric(score, chunk, workers)
                assert metric is not None
                judged = mine[plan.judged.to(device)[mine]]
                pictures, classes = images[rows[judged]], targets[judged]
                return {
                    name: _updated(
                        metric.clone(),
                        pl_module,
                        pictures,
                        control.explain(pl_module, pictures, classes),
                        classes,
                    )
                    for name, control in _CONTROLS.items()
                }

            values: dict[str, float] = {}
            controls: dict[str, dict[str, float]] = {}
            maps = images.new_zeros(0, *images.shape[2:], dtype=torch.float32)
            curves = images.new_zeros(0, 2, 2, dtype=torch.float32)
            if len(rows):
                worked = team.together(lambda: self._within_memory(work, score))
                maps = workers.gather(worked.maps.float(), len(rows))
                curves = workers.gather(worked.curves.float(), len(rows))
                if worked.metric is not None:
                    values |= _computed(worked.metric)
                    if self._controls_due(trainer, worked.metric):
                        controls = self._judged(
                            team, lambda: self._within_memory(judge_controls, score)
                        )
        maps, curves = (_with_nan(found, plan.finite) for found in (maps, curves))
        masks, known = probe.masks_of(plan.all_rows, plan.all_targets)
        known &= plan.finite
        num_classes = plan.logits.shape[1]
        values |= _located(maps[known], masks[known], plan.all_targets[known], num_classes)
        pairs = plan.all_rows, plan.all_targets
        found = Found(*pairs, maps, masks, curves, plan.logits, score, values, controls)
        values["blank_maps"] = float(found.blank.sum())
        return found

    def _judged(
        self, team: Team, work: Callable[[], dict[str, Metric | MetricCollection]]
    ) -> dict[str, dict[str, float]]:
        """Return the figures of the controls; a failure costs them only."""
        started = time.perf_counter()
        try:
            return {name: _computed(metric) for name, metric in team.together(work).items()}
        except Exception as error:
            self._warn(
                f"ExplanationMonitor: no figures of the controls. {type(error).__name__}: {error}"
            )
            return {}
        finally:
            self._control_seconds = time.perf_counter() - started

    def _affordable(self) -> bool:
        return self._budget.allows_another(self._control_seconds if self._controls_next else 0.0)

    def _controls_due(self, trainer: Trainer, metric: Metric | MetricCollection) -> bool:
        # What a map that knows nothing gets depends on the model, which learns ever more slowly: after
        # 1, 2, 4, 8, … explanations it is measured again.
        wanted = self.controls and isinstance(metric, (Faithfulness, OverallAUC))
        return wanted and (trainer.state.fn != "fit" or self._controls_next)

    @property
    def _controls_next(self) -> bool:
        number = self._explained + 1
        return number & (number - 1) == 0

    def _lines(self) -> dict[str, float]:
        """Return the over-all AUC of the controls, as last measured."""
        return {
            f"overall_auc_{name.replace(' ', '_')}": figures["overall_auc"]
            for name, figures in self._controls.items()
            if self.controls and "overall_auc" in figures
        }

    def _plan(self, pl_module: LightningModule, probe: Probe, images: Tensor) -> Plan:
        """Choose what is explained."""
        logits = predict(pl_module, images, self._chunk or 32).cpu()
        rows, targets = probe.pairs(self.targets, logits, self.max_classes_per_image)
        labelled = len(rows)
        if probe.multilabel and self.targets == "label":
            # Judged are the labelled classes only, which stay the same from epoch to epoch.
            wrong = probe.false_positives(logits.sigmoid())
            rows, targets = (torch.cat(both) for both in zip((rows, targets), wrong, strict=True))
        finite = logits.isfinite().all(dim=1)[rows]
        judged = (torch.arange(len(rows)) < labelled)[finite]
        return Plan(rows, targets, finite, judged, logits)

    def _within_memory(self, work: Callable[[int], T], score: Score) -> T:
        """Do the work, with ever fewer images in a pass while there is too little memory for it."""
        chunk = self._chunk or largest_chunk(self.method or fast_sigcam(score=score)) or 32
        while True:
            try:
                return work(chunk)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or chunk == 1:
                    raise
            # Out of the handler, whose traceback holds on to the tensors of the failed pass.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            chunk = self._chunk = chunk // 2
            self._warn(
                "ExplanationMonitor: out of memory; from now on with fewer images in a pass, "
                f"{chunk} at first"
            )

    def _metric(self, score: Score, chunk: int, team: Team) -> Metric | MetricCollection | None:
        if self.metrics is False:
            return None
        if self.metrics is True:
            return Faithfulness(
                score, steps=28, eval_batch_size=chunk, sync_on_compute=team.size > 1
            )
        return self.metrics

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell whether the data still has the pictures of the run that is resumed."""
        assert self._kept is not None
        if callable(self.probe) and not hasattr(self.probe, "__getitem__"):
            return  # a function may give other pictures each time
        try:
            changed = self._draw(trainer, pl_module).fingerprint != self._kept.fingerprint
        except Exception:
            changed = True
        if changed:
            self._warn(
                "ExplanationMonitor: the data that the probe was taken from has changed since the run "
                "was started: the pictures of the checkpoint go on being explained; for others, start "
                "a new run"
            )

    @contextmanager
    def _precision(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Compute in the trainer's precision, or in float32."""
        kind = device_of(pl_module).type
        if self.full_precision:
            with in_float32(pl_module), torch.autocast(kind, enabled=False):
                yield
            return
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        dtype = mixed.get(str(trainer.precision))  # other precisions are the weights' own
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            yield

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> Probe:
        """Take the probe from its source, the way a validation batch would come to the model."""
        stage = trainer.state.stage
        try:
            # Hooks such as on_after_batch_transfer must not augment it as if it were for training.
            trainer.validating = True
            with undisturbed(pl_module), torch.no_grad():
                found = collect(self.probe, _loaders(trainer))
                batch = trainer.precision_plugin.convert_input(found.batch)
                batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        finally:
            trainer.state.stage = stage
        probe, count = Probe.from_batch(batch, found.limit), found.limit
        if found.read_masks is not None and probe.masks is None:
            try:
                probe = probe.with_masks(found.read_masks)
            except Exception as error:
                self._warn(
                    "ExplanationMonitor: no outlines and no pointing game, for the masks of the "
                    f"probe could not be read. {type(error).__name__}: {error}"
                )
        if count is not None and len(probe.images) < count:
            self._warn(
                f"ExplanationMonitor: probe={count} samples asked for, but the data has "
                f"{len(probe.images)}: all of them are explained; lower probe to silence this"
            )
        return probe

    def _log_values(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        values: Mapping[str, float],
        moment: Moment,
        team: Team,
    ) -> None:
        scalars = {f"explain/{name}": value for name, value in values.items()}
        together = team.size > 1
        if moment == "epoch":
            pl_module.log_dict(
                scalars, on_step=False, on_epoch=True, batch_size=1, sync_dist=together
            )
            return
        # Lightning would drop what is logged at a step off its log_every_n_steps, and refuses
        # to log before training: the loggers get it directly, ModelCheckpoint by log_dict.
        if moment == "step":
            pl_module.log_dict(
                scalars, on_step=True, on_epoch=False, logger=False, sync_dist=together
            )
        for logger in trainer.loggers:
            try:
                logger.log_metrics(scalars, step=_logged_step(trainer, moment))
            except Exception as error:
                name = type(logger).__name__
                self._warn(
                    f"ExplanationMonitor: {name} took no figures. {type(error).__name__}: {error}"
                )

    def _log_pictures(
        self,
        trainer: Trainer,
        found: Found,
        drift: list[float | None],
        before: list[Earlier],
        moment: Moment,
    ) -> None:
        assert self._kept is not None
        names, (mean, std) = self._names(trainer), self._normalisation(trainer)
        title, step = _title(trainer), _logged_step(trainer, moment)
        look: dict[str, Any] = {"title": title, "mean": mean, "std": std}
        pages = draw_probe(self._kept, found, names, panels=self.panels, **look)
        for number, panel in enumerate(pages, start=1):
            tag = "explain/heatmaps" if number == 1 else f"explain/heatmaps-{number}"
            self._log_picture(trainer, tag, panel, step)
        change = draw_change(self._kept, found, before, drift, names, **look)
        if change is not None:
            self._log_picture(trainer, "explain/change", change, step)

    def _log_picture(self, trainer: Trainer, tag: str, panel: Tensor, step: int) -> None:
        sinks: list[object] = [*trainer.loggers] or [None]
        for sink in sinks:
            try:
                root = None if sink else trainer.default_root_dir
                log_image(sink, tag, panel, step, fallback=root, caption=_title(trainer))
            except Exception as error:
                path = log_image(None, tag, panel, step, trainer.default_root_dir)
                self._warn(
                    f"ExplanationMonitor: {type(error).__name__}: {error}.",
                    f" The picture is at {path}",
                )

    def _normalisation(
        self, trainer: Trainer
    ) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        if self.mean is None and self.std is None:
            return normalisation_of(source_of(self.probe, _loaders(trainer))) or (None, None)
        return self.mean, self.std

    def _names(self, trainer: Trainer) -> Sequence[str] | None:
        source, validation = (source_of(p, _loaders(trainer)) for p in (self.probe, 1))
        return self.class_names or class_names_of(source) or class_names_of(validation)

    def _begun(self, trainer: Trainer, found: Found, folder: Path) -> HistoryWriter:
        """Begin the run's history in a folder."""
        assert self._kept is not None
        pictures = displayable(self._kept.images, *self._normalisation(trainer))
        masks: dict[tuple[int, int], Tensor] = {}
        if self._kept.masks is not None and self._kept.mask_pairs is not None:
            masks = dict(
                zip(map(tuple, self._kept.mask_pairs.tolist()), self._kept.masks, strict=True)
            )
        return HistoryWriter(
            folder,
            (pictures * 255).round().to(torch.uint8),
            configuration=self._configuration(trainer, found.score),
            class_names=dict(enumerate(map(str, self._names(trainer) or ()))),
            masks=masks,
        )

    def _configuration(self, trainer: Trainer, score: Score) -> dict[str, str]:
        found = {
            "model": type(trainer.lightning_module).__name__,
            "method": _printed(self.method or fast_sigcam(self.target_layer, score=score)),
            "targets": str(self.targets),
            "metrics": "Faithfulness(steps=28)" if self.metrics is True else _printed(self.metrics),
            "precision": "32" if self.full_precision else str(trainer.precision),
            "lightning_aop": __version__,
            "torch": torch.__version__,
        }
        if self.max_overhead is not None:
            found["max_overhead"] = str(self.max_overhead)
        return found

    def _before(self, trainer: Trainer, found: Found) -> tuple[list[float | None], list[Earlier]]:
        """Return each map's drift, None without one, and the maps that were found before."""
        try:
            if self.store:
                self._files.open(trainer, lambda folder: self._begun(trainer, found, folder))
            return self._files.drift(found.pairs, found.maps, (~found.blank).tolist())
        except Exception as error:
            self._warn(
                "ExplanationMonitor: the run's history can't be read or written. "
                f"{type(error).__name__}: {error}"
            )
            return [None] * len(found.pairs), []

    def _store(
        self,
        trainer: Trainer,
        found: Found,
        values: dict[str, float],
        drift: list[float | None],
        fresh: bool,
    ) -> None:
        """Add what was found to the run's files."""
        deletion, insertion = found.aucs.T.tolist()
        record = Record(
            step=_step(trainer),
            epoch=trainer.current_epoch,
            title=_title(trainer),
            values=values,
            images=found.rows.tolist(),
            targets=found.targets.tolist(),
            scores=found.scores.nan_to_num(0.0).tolist(),
            blank=found.blank.tolist(),
            drift=drift,
            deletion_auc=[None if math.isnan(value) else value for value in deletion],
            insertion_auc=[None if math.isnan(value) else value for value in insertion],
            controls=self._controls if fresh else {},
        )
        try:
            self._files.add(record, found.maps)
        except Exception as error:
            self._warn(
                f"ExplanationMonitor: the maps could not be stored. {type(error).__name__}: {error}"
            )

    def _warn(self, message: str, more: str = "") -> None:
        # The same trouble comes back at every epoch; its first line is said once.
        key = re.sub(r"\d+", "", message)
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message + more, stacklevel=2)


def _loaders(trainer: Trainer) -> Any:
    # Not `or`: the truth of a DataLoader is its length, which an iterable dataset has not.
    validation = trainer.val_dataloaders
    return trainer.train_dataloader if validation is None else validation


def _printed(value: object) -> str:
    # Functions by name: an address is another in each process.
    return re.sub(r"<function ([\w.]+) at 0x\w+>", r"\1", repr(value))


def _step(trainer: Trainer) -> int:
    # What Lightning's own callbacks log at; global_step counts each of several optimizers.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _logged_step(trainer: Trainer, moment: Moment) -> int:
    # A first epoch of a single batch ends at step 0 in Lightning's count, as training starts.
    return _step(trainer) if moment == "start" else max(_step(trainer), 1)


def _unsupported(trainer: Trainer) -> str | None:
    """Return why the monitor can't work with this trainer, or None."""
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"):
        return (
            f"{name} shards the weights over the processes, and a map needs all of them in each: use "
            "DDP, or leave the monitor out and explain a checkpoint by trainer.validate() on one device"
        )
    return None


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def _computed(metric: Metric | MetricCollection) -> dict[str, float]:
    result = metric.compute()
    if not isinstance(result, Mapping):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(metric).__name__).lower()
        result = {name: result}
    return {name: float(value) for name, value in result.items()}


def _updated(
    metric: Metric | MetricCollection,
    model: LightningModule,
    images: Tensor,
    maps: Maps,
    targets: Targets,
) -> Metric | MetricCollection:
    metric = metric.to(images.device)
    metric.reset()
    metric.update(model, images, maps, targets)
    return metric


def _with_nan(maps: Float[Tensor, "f h w"], finite: Bool[Tensor, " p"]) -> Float[Tensor, "p h w"]:
    """Return a map for each pair, or its curves, NaN for those that could not be explained."""
    every = maps.new_full((len(finite), *maps.shape[1:]), torch.nan)
    every[finite.to(maps.device)] = maps
    return every


def _title(trainer: Trainer) -> str:
    if trainer.state.fn != "fit":
        return "validation"
    step = trainer.global_step
    return "before training" if step == 0 else f"epoch {trainer.current_epoch} · step {step}"


def _located(
    maps: Maps, masks: Bool[Tensor, "b h w"], targets: Targets, num_classes: int
) -> dict[str, float]:
    """Return how much of the heat lies on the objects, as a mean over their classes."""
    if len(maps) == 0:
        return {}
    games = {
        "pointing_game": PointingGame(num_classes, score_threshold=None, sync_on_compute=False),
        "energy_in_mask": EnergyPointingGame(
            num_classes, score_threshold=None, sync_on_compute=False
        ),
    }
    result = {}
    for name, game in games.items():
        game.update(maps.cpu(), masks, targets.cpu())  # in float64, which not every device has
        result[name] = float(game.compute()["mean"])
    return result
