"""ExplanationMonitor: the Lightning callback that shows, while a model trains, what it looks at."""

import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, is_dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parameter import is_lazy
from torchmetrics import Metric, MetricCollection

from lightning_aop._version import __version__
from lightning_aop.checks import in_words, is_made
from lightning_aop.errors import InvalidValueError
from lightning_aop.history.store import HistoryWriter
from lightning_aop.model.adapter import Adapter, LogitsFunction, find_adapter, name_of
from lightning_aop.model.collectives import collectives_noticed, is_sharded
from lightning_aop.model.isolation import device_of, foreign_state, isolated, isolated_rng
from lightning_aop.model.layers import find_feature_map
from lightning_aop.model.listening import Compared
from lightning_aop.model.passes import Passes
from lightning_aop.monitor.budget import Budget
from lightning_aop.monitor.explain import Way, evaluations_of, explain, explain_probe, fitting_score
from lightning_aop.monitor.explanation import Explanation, Moment, MomentKind, mean_drift
from lightning_aop.monitor.facts import Look, Scale, found_look, given_look, numbers_of
from lightning_aop.monitor.failures import Failures, is_steady
from lightning_aop.monitor.judge import CONTROLS, Judge
from lightning_aop.monitor.labels import ReadBatch, read_batch
from lightning_aop.monitor.lightning import (
    Callback,
    LightningModule,
    Trainer,
    data_name,
    draw,
    fact_sources,
    inform,
    is_last,
    log_scalars,
    logs_folder,
    misconfiguration,
    moment_of,
    precision_of,
    unsupported,
    validates,
    wants_files,
    warn,
    watched,
)
from lightning_aop.monitor.loggers import lay_out_charts
from lightning_aop.monitor.probe import (
    Drawn,
    Probe,
    ProbeSource,
    TargetChoice,
)
from lightning_aop.monitor.processes import Processes
from lightning_aop.monitor.progress import Begin, progress_bar
from lightning_aop.monitor.run_folder import Earlier, RunFolder
from lightning_aop.monitor.sinks import Pictures, Scalars, Sink, Warnings, write_tables
from lightning_aop.scores import Score
from lightning_aop.tables import decimals
from lightning_aop.types import SaliencyMethod
from lightning_aop.view.grid import PANELS, Panel
from lightning_aop.view.heat import displayable

# What is logged where there is no value yet: nothing better than this is promised to who compares.
_WORST = {"deletion_auc": 1.0, "insertion_auc": 0.0}
_WORST |= {"overall_auc": -1.0, "overall_auc_normalised": -1.0}
# Likewise, but told only to who waits for a value that may come late, or never: the least share, or
# beyond all that are measured.
_SHARES = ("grid_pointing", "pointing_game", "energy_in_mask")
_BEYOND = {"min": 1e9, "max": -1e9}


@dataclass
class _Run:
    """All state of one fit, or of a validation without one.

    Attributes:
        judge: the metrics and controls.
        budget: the time that explanations may take.
        warn: tells the user each trouble once.
        folder: what the run leaves in files.
        passes: how many images go through the model at once.
        probe: the images, once they are chosen.
        adapter: how the user's module maps images to logits, once that was found.
        module: the user's module.
        model: the same as a model from images to logits.
        integers: the data's images are integers, which no normalisation has seen.
        resumed: the probe is a checkpoint's, and not compared with the data yet.
        last_step: the optimizer steps at the last look at them.
        last_epoch: the epochs that were over when one was explained last.
        validations: how many there were.
        held: the values last logged.
        last: the values of the last explanation; None before the first.
        images: how many it was of.
        explained: how many there were.
        alike: all processes do all the work, since the model's forward exchanges something.
        failures: the worst samples of the last validation.
        compared: whether a validation step gives the network the images that are explained, until it is
            known.
        drawn: what the probe was made of; None where that can't be read any more.
        pictures: the folder of the pictures that no logger holds itself.
    """

    judge: Judge
    budget: Budget
    warn: Warnings
    folder: RunFolder
    passes: Passes
    probe: Probe | None = None
    adapter: Adapter | None = None
    module: torch.nn.Module | None = None
    model: torch.nn.Module | None = None
    integers: bool = False
    resumed: bool = False
    last_step: int = 0
    last_epoch: int = 0
    validations: int = 0
    held: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] | None = None
    images: int = 0
    explained: int = 0
    alike: bool = False
    failures: Failures = field(default_factory=lambda: Failures(0))
    compared: Compared | None = None
    drawn: Drawn | None = None
    pictures: Path | None = None

    def wrote(self, picture: Path) -> None:
        """Remember where pictures are, of which each tag has a folder."""
        self.pictures = picture.parents[1]

    def hold(self, values: dict[str, float]) -> dict[str, float]:
        """Return the values, and the last ones in place of those that are missing or not finite."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.held |= finite
        return values | self.held


class ExplanationMonitor(Callback):
    """Explain the same images again and again while a model trains, and log what the model looks at.

    Before training, at every chosen validation, and under `trainer.validate()`, the monitor logs

    - `explain/heatmaps`: each image of the probe beside its overlay, with the class, its score and the
      map's overall AUC, on one colour scale for the whole run; more than 20 explanations continue in
      `explain/heatmaps-2` and so on;
    - `explain/deletion_auc`, `explain/insertion_auc`, `explain/overall_auc`: how faithful the maps are;
    - `explain/overall_auc_normalised`: the same relative to the scores of the whole and of the blurred
      image, so that it does not rise only because the model becomes sure;
      `explain/overall_auc_undefined`: how many images have none;
    - `explain/overall_auc_random_map`, `explain/overall_auc_centre_gaussian`: the same for two maps that
      don't depend on the model, measured at the 1st, 2nd, 4th, 8th … explanation and held in between;
    - `explain/heatmaps_change`: the first map, the previous one and the current one side by side, for up
      to 16 explanations;
    - `explain/pointing_game`, `explain/energy_in_mask`: where the data has masks, how often the
      maximum of a map lies on the object, and which share of the heat; means over the classes;
    - `explain/drift`: how much the maps have changed since the previous explanation, 1 − their rank
      correlation: 0 for no change, 1 for no resemblance; `explain/drift_floor`: the same for two seeds
      of the method at the same weights, measured as rarely as the controls: no drift is smaller;
    - `explain/blank_maps`: how many maps show nothing, or NaN; they are labelled in the picture;
    - `explain/seconds`: wall-clock time;
    - `explain/failures`, with `failures=8`: the worst samples of the validation.

    `ModelCheckpoint(monitor="explain/overall_auc", mode="max")`, `EarlyStopping` and schedulers may rely
    on these metrics: a validation without an explanation keeps the last value, and the worst before
    there is one. So does a value that is not finite.

    Where the data has masks (a dataset with `input_masks(index, classes)`, or a batch with bool
    `masks`), their outlines are drawn. Multilabel images also show what the model sees but the
    labels don't (a score above 0.5): the strongest such class is explained, but not judged.

    Under `fit` the maps and metrics are also stored, in the folder `explanations` beside the logger's
    files, or in `default_root_dir`: `report.html`, a page to look through all of them, which
    grows during the run, and at the end `evolution.gif`, an animation. `history.History` reads them.

    Training is left bit for bit as it would have been: weights, buffers, gradients, modes and random
    state. An explanation that fails gives a warning, and training goes on; one that runs out of
    memory is tried again with half as many images in a pass. With a callback that swaps weights around
    validation (`WeightAveraging`), the weights that validation saw are explained: the monitor takes its
    place before it in `trainer.callbacks`. Under DDP each process explains its share of the probe, with
    the first one's BatchNorm statistics.

    Args:
        method: how to explain; `fast_sigcam()` by default, 39 model evaluations per explanation.
        probe: which images: a number of validation samples (training samples where there are no
            validation ones), or a list, array or range of their indices, or `Stratified(per_class=2)`
            for as many of each class; or a batch as a DataLoader gives it; or a dataset; or a function
            without arguments that returns a batch. Chosen once, and kept when a run is resumed.
        targets: which classes: "label" for the true ones, one explanation for each positive class of
            a multilabel image; "predicted" for the likeliest; "confused" for the label against the
            prediction where they differ, both maps side by side, and the label elsewhere (the default
            method then explains `scores.contrast(references=1)`); or a list of class indices, each
            explained for every image.
        target_layer: for the default method, the layer whose feature map it starts from: a name, a
            module, or None for the last one before the classifier.
        score: the class score; by default `scores.sigmoid` for multi-hot labels and
            `scores.softmax` for others.
        every_n_epochs: explain at the validations of every n-th epoch, or at the next one where that
            epoch has none (at the end of the training epoch without any validation); of an endless
            epoch, at every n-th validation. 1 by default, 0 for never.
        every_n_train_steps: explain whenever n more optimizer steps have been taken instead.
        metrics: what judges the maps, a metric with `update(model, images, maps, targets)` whose
            `compute()` gives a value or a dictionary of values; by default
            `Faithfulness(steps=28, normalise=True)`, 56 model evaluations per explanation, as
            `Faithfulness(evaluations=56)` takes for a closer estimate. False for none.
        failures: show so many of the worst samples of each validation beside the probe, label against
            prediction: those with the highest loss, those that were right at the validation before,
            and those that are wrong with the most confidence. They are found by the logits that the
            validation step computes, without any evaluation; none of them enters a metric.
        grid_pointing: tile four images of the probe in one, of different classes that the model gives
            scores above 0.5, and log which share of the heat of each class lies in the right quarter,
            `explain/grid_pointing`: 0.25 is chance. It takes four explanations of images of twice the
            size, and is left out, with a warning, where the model takes one size only or is not sure of
            four classes yet.
        controls: judge a random map and a centre gaussian too, where a metric is `Faithfulness` or
            `OverallAUC`: 112 evaluations per explanation when they are measured. False spares the floor
            of the drift, too.
        panels: what stands beside each image: "overlay"; "map", the heat alone; "curves", its
            deletion and insertion.
        class_names: names by class index; by default the dataset's `classes`, or the index.
        mean: what the images were normalised with, to show them as they were, one number or one for
            each channel; by default what the dataset's `transform` says.
        std: likewise.
        max_classes_per_image: the most positive classes of one multilabel image to explain.
        max_overhead: leave out explanations so that they take no more than this share of the training
            time, a tenth by default, as `explain/overhead` and `explain/skipped` tell. The first
            minute of explanations is free, and the first and the last are always made. None for no
            limit.
        store: keep the maps and metrics in files. Without them there is no drift.
        logits: `fn(module, images)` that returns logits [B, K], where they are not found or others are
            meant.
        read_batch: `fn(batch)` that returns images and labels, where they are not found or others are
            meant.
        full_precision: explain in float32 whatever the trainer's precision; by default in the
            trainer's, but for the parts that need more.
        graphs: "auto" to replay passes as CUDA graphs on a GPU where that gives the same. It has not run
            on enough GPUs yet to be the default.
        sinks: who else gets every `Explanation` with its `Moment`, on every process: objects with
            `write(explanation, moment)`.
        name: tells several monitors of one Trainer apart: they log under `explain/NAME/…` and store in
            `explanations-NAME`. Without names, the second logs under `explain/2/…`, and so on; their
            methods must differ then.
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
        failures: int = 0,
        grid_pointing: bool = False,
        controls: bool = True,
        panels: Sequence[Panel] = ("overlay",),
        class_names: Sequence[str] | None = None,
        mean: Scale | None = None,
        std: Scale | None = None,
        max_classes_per_image: int = 3,
        max_overhead: float | None = 0.1,
        store: bool = True,
        full_precision: bool = False,
        graphs: Literal["auto", False] = False,
        logits: LogitsFunction | None = None,
        read_batch: ReadBatch | None = None,
        name: str | None = None,
        sinks: Sequence[Sink] = (),
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
        self.failures = failures
        self.grid_pointing = grid_pointing
        self.controls = controls
        self.panels = panels
        self.class_names = class_names
        self.mean, self.std = mean, std
        self.max_classes_per_image = max_classes_per_image
        self.max_overhead = max_overhead
        self.store = store
        self.full_precision = full_precision
        self.graphs = graphs
        self.logits, self.read_batch = logits, read_batch
        self.name = name
        self.sinks = sinks
        # Before it is used: a method of the user's may count what it does.
        self._printed_method = "" if method is None else _printed(method)
        self._label = name  # what is logged under, the number of one without a name
        self._run: _Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the run: a copy, or one in another process, begins its own."""
        return vars(self) | {"_run": None}

    # ---------------------------------------------------------------------------------------------
    # without a Trainer

    def explain(self, module: torch.nn.Module, batch: Any) -> Explanation:
        """Explain a batch with the settings of this monitor; see `lightning_aop.explain`.

        Raises:
            ValueError: a setting can't work, or the batch or the module's outputs can't be read.
        """
        if problem := self._misuse():
            raise InvalidValueError(f"ExplanationMonitor: {problem}")
        return explain(
            module,
            batch,
            method=self.method,
            targets=self.targets,
            target_layer=self.target_layer,
            score=self.score,
            metrics=self.metrics,
            panels=self.panels,
            class_names=self.class_names,
            mean=self.mean,
            std=self.std,
            max_classes_per_image=self.max_classes_per_image,
            graphs=self.graphs,
            logits=self.logits,
            read_batch=self.read_batch,
        )

    # ---------------------------------------------------------------------------------------------
    # when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't work before any work is done."""
        others = [each for each in _callbacks(trainer) if isinstance(each, ExplanationMonitor)]
        problem = self._misuse() or self._twin(others) or unsupported(trainer)
        if problem:
            raise misconfiguration(trainer, f"ExplanationMonitor: {problem}")
        if self.name is None:
            names = {each.name for each in others}
            unnamed = [each for each in others if each.name is None]
            numbers = (str(n) for n in itertools.count(2) if str(n) not in names)
            self._label = dict(zip(unnamed, itertools.chain([None], numbers), strict=False))[self]
        # A validation may be of another module, and on other data.
        if stage == "fit" or (self._run and self._run.module not in (None, pl_module)):
            self._run = self._new_run()
        _step_before_swaps(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what of the model could not be put back after an explanation, and lay out the charts."""
        try:
            found = foreign_state(pl_module) if self._enabled else {}
        except Exception:  # the first explanation fails likewise, and says why
            found = {}
        if found:
            named = ", ".join(f"{place} ({kind})" for place, kind in [*found.items()][:5])
            more = "" if len(found) <= 5 else f" and {len(found) - 5} more"
            self._state.warn(
                f"on the model are objects that can't be put back after an explanation: {named}{more}. "
                "Where a forward changes one, let it not do so while lightning_aop.is_explaining(), "
                "or training goes another way"
            )
        monitors = [each for each in _callbacks(trainer) if isinstance(each, ExplanationMonitor)]
        if monitors[0] is self:  # one layout holds the charts of all
            prefixes = [each._prefix for each in monitors]
            try:
                with isolated_rng(device_of(pl_module)):
                    lay_out_charts(trainer.loggers if trainer.is_global_zero else [], prefixes)
            except Exception as error:
                self._state.warn(f"no layout of charts. {type(error).__name__}: {error}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the untrained model, if it has its weights already; a resumed run has done so."""
        run = self._state
        run.budget.started = time.perf_counter()
        run.last_step, run.last_epoch = trainer.global_step, trainer.current_epoch
        # A lazy layer draws its weights at the first batch: now there is nothing to explain.
        lazy = any(map(is_lazy, (*pl_module.parameters(), *pl_module.buffers())))
        if trainer.global_step == 0 and self._enabled and not lazy:
            self._fire(trainer, pl_module, "start")
        if self._enabled:
            # A checkpoint, a stop or a schedule that watches these values would end the training without
            # them. Lightning keeps them until others are logged.
            waiting = watched(trainer)
            late = {
                name: 0.0 if name in _SHARES else _BEYOND[waiting[self._prefix + name]]
                for name in self._logged_names()
                if self._prefix + name in waiting
            }
            for name, value in (late | run.held).items():
                trainer.callback_metrics.setdefault(self._prefix + name, torch.tensor(value))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Explain after every n-th optimizer step; a batch may have several, or none."""
        run, n, step = self._state, self.every_n_train_steps, trainer.global_step
        if n and step // n > run.last_step // n:
            self._fire(trainer, pl_module, "step")
        run.last_step = step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the validation, where its failures are to be shown."""
        if self._follows(trainer):
            self._attempt(pl_module, lambda: self._listen(trainer, pl_module))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen to the batch."""
        run = self._state
        if self._follows(trainer):
            run.failures.listen()
        if run.compared and run.module is pl_module and not trainer.sanity_checking:
            with isolated_rng(), suppress(Exception):  # of a batch of another form
                inputs = read_batch(batch, None, self.read_batch).inputs
                run.compared.start(pl_module, inputs.images)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the worst samples of the batch."""
        if self._follows(trainer):
            self._attempt(pl_module, lambda: self._see(trainer, outputs, batch, dataloader_idx))
        run = self._state
        if run.compared and run.compared.open:
            found, run.compared = run.compared.stop(), None  # one batch tells
            if found is not None:
                name = f"its '{found}'" if found else "the network"
                run.warn(
                    f"the validation step gives {name} other images than those of the batch, which are "
                    "explained: if it prepares them, as by a normalisation, set logits=fn, a function "
                    "fn(module, images) that does likewise and returns logits [B, K]"
                )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain at the chosen validations, never in the sanity check."""
        if trainer.sanity_checking or not self._enabled:
            return
        if self._follows(trainer):
            self._attempt(pl_module, lambda: self._choose(trainer))
        self._state.validations += 1
        due = trainer.state.fn != "fit" or self._due(trainer)
        if due:
            self._fire(trainer, pl_module, "epoch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done in a validation of its own, which has no page to show it."""
        if trainer.state.fn == "validate" and self._enabled:
            with isolated_rng():
                inform(f"{self._state.warn.name}: {self._summary()}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain at the chosen epochs where there is no validation."""
        if not validates(trainer) and self._due(trainer):
            self._fire(trainer, pl_module, "epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the model as it was left, where that was due and left out."""
        run = self._state
        # max_steps may end it before the first validation.
        unseen = self.every_n_epochs and validates(trainer) and not run.validations
        if run.budget.skipped or (unseen and trainer.global_step):
            self._fire(trainer, pl_module, "end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make an animation of the maps, and a table for loggers that have tables; say what was done."""
        run = self._state
        with isolated_rng():
            if run.folder.folder is not None:
                step = moment_of(trainer, "epoch").step
                try:
                    run.folder.finish()
                    write_tables(run.folder.folder, trainer.loggers, self._prefix, step)
                except Exception as error:
                    run.warn(f"no animation or table of the maps. {type(error).__name__}: {error}")
            if run.last is not None or run.warn.told:
                inform(f"{run.warn.name}: {self._summary()}")

    def _summary(self) -> str:
        """Return what was done in the run, in a line, and what went wrong, in a line each."""
        run = self._state
        if run.last is None:
            parts = ["nothing was explained"]
        else:
            count, times = run.images, run.explained
            parts = [
                f"explained {count} image{'s' * (count != 1)} {times} time{'s' * (times != 1)}"
            ]
        if run.budget.left_out:
            parts[0] += f", and left out {run.budget.left_out} for max_overhead={self.max_overhead}"
        values = {} if run.last is None else run.last | run.judge.scalars()
        if "overall_auc" in values:
            controls = " and ".join(
                f"{decimals(values[name])} for a {control}"
                for name, control in (
                    ("overall_auc_random_map", "random map"),
                    ("overall_auc_centre_gaussian", "centre gaussian"),
                )
                if name in values
            )
            against = f", against {controls}" if controls else ""
            parts.append(f"overall AUC {decimals(values['overall_auc'])}{against}")
        if run.folder.folder is not None:
            parts.append(f"the page is {run.folder.folder / 'report.html'}")
        elif run.pictures is not None:
            parts.append(f"pictures are in {run.pictures}")
        return "\n  ".join(["; ".join(parts), *run.warn.told])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook on the module of a validation that was broken off."""
        self._state.failures.end()
        if self._state.compared:
            self._state.compared.stop()

    @property
    def _enabled(self) -> bool:
        return bool(self.every_n_epochs or self.every_n_train_steps)

    def _due(self, trainer: Trainer) -> bool:
        run, n, epochs = self._state, self.every_n_epochs, trainer.current_epoch + 1
        if n <= 0:
            return False
        if math.isinf(trainer.num_training_batches):
            return run.validations % n == 0
        due = epochs % n == 0 or epochs // n > run.last_epoch // n
        if due:
            run.last_epoch = epochs
        return due

    def _misuse(self) -> str | None:
        """Return what is wrong with the arguments, or None."""
        n, steps = self.every_n_epochs, self.every_n_train_steps
        if not all(isinstance(each, Integral) and each >= 0 for each in (n, steps)):
            return f"every_n_epochs={n} and every_n_train_steps={steps} must not be negative, and whole"
        if n and steps:
            return (
                f"every_n_epochs={n} and every_n_train_steps={steps} exclude each other: set one of "
                "them to 0"
            )
        if isinstance(self.probe, Integral) and self.probe < 1:
            return f"probe={self.probe} must be at least 1 sample"
        choices = ("label", "predicted", "confused")
        if isinstance(self.targets, str) and self.targets not in choices:
            return (
                f"targets={self.targets!r} must be 'label', 'predicted', 'confused' or a list of class "
                "indices"
            )
        if self.failures < 0:
            return f"failures={self.failures} must be a number of samples, 0 for none"
        if self.max_classes_per_image < 1:
            return f"max_classes_per_image={self.max_classes_per_image} must be at least 1"
        named = isinstance(self.name, str) and re.fullmatch(r"[\w.-]+", self.name)
        if self.name is not None and not named:
            return f"name={self.name!r} must be text made of letters, digits, '_', '-' and '.'"
        if self.max_overhead is not None and self.max_overhead <= 0:
            return f"max_overhead={self.max_overhead} must be above 0, such as 0.05 for a twentieth"
        if (self.mean is None) is not (self.std is None):
            return f"mean={self.mean} and std={self.std} must come together: give both, or neither"
        for name, value in (("mean", self.mean), ("std", self.std)):
            try:
                values = [] if value is None else numbers_of(value)
            except (TypeError, ValueError, RuntimeError):
                return f"{name}={value!r} must be a number, or one for each channel"
            if name == "std" and any(each <= 0 for each in values):
                return f"std={value} must be above 0 in every channel"
        if self.graphs not in ("auto", False):
            return f'graphs={self.graphs!r} must be "auto" or False'
        if isinstance(self.panels, str) or not self.panels or set(self.panels) - set(PANELS):
            return (
                f"panels={self.panels!r} must be a list of some of {', '.join(map(repr, PANELS))}"
            )
        if self.method is not None and not is_made(self.method, SaliencyMethod):
            return (
                f"method must have explain(model, images, targets), got {in_words(self.method)}: pass "
                "fast_sigcam(), sigcam(), GradCAM() or your own"
            )
        if not isinstance(self.metrics, (bool, Metric, MetricCollection)):
            return (
                "metrics must be True, False or a torchmetrics metric, got "
                f"{in_words(self.metrics)}: pass OverallAUC() or, of several, MetricCollection([…])"
            )
        for name, example in (
            ("score", "scores.sigmoid"),
            ("logits", "lambda module, images: module(images)"),
            ("read_batch", "lambda batch: (batch['image'], batch['label'])"),
        ):
            function = getattr(self, name)
            if not (function is None or callable(function)):
                return f"{name} must be a function such as {example}, got {in_words(function)}"
        if isinstance(self.class_names, str):
            return f"class_names must be a list of names, got {in_words(self.class_names)}"
        if not isinstance(self.sinks, Iterable):
            return f"sinks must be a list, got {in_words(self.sinks)}: put it in brackets"
        if self.method is not None and self.target_layer is not None:
            return "target_layer is for the default method: name the layer in the method given"
        return None

    def _twin(self, others: Sequence["ExplanationMonitor"]) -> str | None:
        """Return what is wrong with several monitors, or None."""
        names = [each.name for each in others if each.name is not None]
        if self.name is not None and names.count(self.name) > 1:
            return f"{names.count(self.name)} monitors have name={self.name!r}: give each another"
        return None

    # ---------------------------------------------------------------------------------------------
    # what is kept in a checkpoint

    @property
    def state_key(self) -> str:
        """The monitor's entry in a checkpoint, by its name, or by what it explains and how."""
        key: str = super().state_key
        parts = [self._printed_method] if self._printed_method else []
        if not isinstance(self.probe, Integral):
            # Without its address, or a run that is resumed would not know it.
            text = re.sub(r" at 0x\w+", "", _printed(self.probe, depth=0))
            short = text if len(text) < 50 else hashlib.sha256(text.encode()).hexdigest()[:12]
            parts.append(f"probe={short}")
        if self.targets != "label":
            parts.append(f"targets={_printed(self.targets)}")
        own = self.name or ", ".join(parts)
        return f"{key}[{own}]" if own else key

    def state_dict(self) -> dict[str, Any]:
        """Return the probe and where the history is, so that a resumed run goes on with both."""
        run = self._state
        state = {} if run.probe is None else run.probe.state()
        state |= {"explained": run.judge.explained, "controls": run.judge.lines}
        return state | {"held": run.held} | run.folder.state() | run.failures.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the probe and the history of the run that is resumed."""
        run = self._state
        try:
            probe = Probe.from_state(state_dict) if "images" in state_dict else None
            explained, lines = state_dict.get("explained", 0), state_dict.get("controls", {})
            held = {
                name: value
                for name, value in state_dict.get("held", {}).items()
                if self.controls or name not in CONTROLS.values()
            }
            run.folder.take_up(state_dict)
            run.failures.take_up(state_dict)
        except Exception as error:
            run.warn(
                "what the checkpoint says of the monitor can't be read, it begins anew. "
                f"{type(error).__name__}: {error}"
            )
            return
        run.judge.explained, run.judge.lines = explained, lines
        run.held |= held
        if probe is not None:
            run.probe, run.resumed = probe, True

    @property
    def _state(self) -> _Run:
        if self._run is None:
            self._run = self._new_run()
        return self._run

    def _new_run(self) -> _Run:
        own = "" if self._label is None else f"({self._label})"
        said = Warnings(warn, f"ExplanationMonitor{own}")
        run = _Run(
            Judge(self.metrics, self.controls, grid=self.grid_pointing),
            Budget(self.max_overhead),
            said,
            RunFolder(said),
            Passes(graphs=self.graphs),
        )
        run.failures = Failures(self.failures)
        run.held |= {name: _WORST[name] for name in run.judge.names if name in _WORST}
        return run

    def _logged_names(self) -> set[str]:
        """Return the values that this run may log."""
        run = self._state
        names = run.judge.names | {"blank_maps", "seconds"}
        if "overall_auc_normalised" in names:
            names.add("overall_auc_undefined")
        if "overall_auc" in names and self.controls:
            names |= {*CONTROLS.values()}
        if self.store:
            names |= {"drift", "drift_floor"} if self.controls else {"drift"}
        if self.max_overhead is not None:
            names |= {"overhead", "skipped"}
        if run.probe is None or run.probe.masks is not None:
            names |= {"pointing_game", "energy_in_mask"}
        return names

    @property
    def _prefix(self) -> str:
        return "explain/" if self._label is None else f"explain/{self._label}/"

    # ---------------------------------------------------------------------------------------------
    # what happens

    def _fire(self, trainer: Trainer, pl_module: LightningModule, kind: MomentKind) -> bool:
        """Explain and log; whatever goes wrong becomes a warning, and no state is left changed.

        Returns:
            Whether values were logged.
        """
        run, started = self._state, time.perf_counter()
        processes = Processes(run.alike)
        moment = moment_of(trainer, kind)
        run.judge.drifts = self.store and moment.fitting
        logged = False
        try:
            with (
                isolated_rng(device_of(pl_module)),
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                # Each process has a clock of its own, and one must not wait for the others.
                extra = run.judge.extra_seconds
                last = kind == "end" or is_last(trainer)
                if not processes.from_first(lambda: last or run.budget.allows_another(extra)):
                    run.budget.skip()
                    return False
                with ExitStack() as stack:
                    # What fails on one process must not leave the others waiting.
                    processes.together(lambda: stack.enter_context(isolated(pl_module)))
                    shown, run.failures.fresh = run.failures.fresh, False
                    explanation, failed = self._explain(trainer, pl_module, processes, shown)
                before: list[Earlier] = []  # for the one process that draws

                def drift_since() -> list[float | None]:
                    nonlocal before
                    drift, before = self._before(trainer, explanation)
                    return drift

                drift = processes.from_first(drift_since)
                explanation = self._timed(replace(explanation, drift=drift), started, moment)
                run.last, run.explained = explanation.values, run.explained + 1
                run.images = len(explanation.probe.images)
                if explanation.controls:
                    run.judge.lines = explanation.controls
                if moment.fitting:
                    run.judge.explained += 1
                scalars = self._scalars(trainer, pl_module, explanation)
                logged = self._write(scalars, explanation, moment)
                if trainer.is_global_zero:
                    self._write(run.folder, explanation, moment)
                    self._write(self._pictures(trainer, before), explanation, moment)
                    if failed is not None:
                        self._write_failures(trainer, failed, moment)
                for sink in self.sinks:
                    self._write(sink, explanation, moment)
        except Exception as error:
            run.budget.pay(time.perf_counter() - started)
            run.warn(
                f"no explanation at step {moment.step}, training goes on. "
                f"{type(error).__name__}: {error}"
            )
        return logged

    def _write(self, sink: Sink, explanation: Explanation, moment: Moment) -> bool:
        """Let a sink write, and tell whether it could: the others must not miss theirs."""
        try:
            sink.write(explanation, moment)
        except Exception as error:
            lost = getattr(sink, "fails", f"{type(sink).__name__} could not take the explanation")
            self._state.warn(f"{lost}. {type(error).__name__}: {error}")
            return False
        return True

    def _explain(
        self, trainer: Trainer, pl_module: LightningModule, processes: Processes, failures: bool
    ) -> tuple[Explanation, Explanation | None]:
        """Return the maps and the metrics of the probe as the model is now, the same everywhere.

        Where there are failures, their maps as well.
        """
        run = self._state
        if run.module is not pl_module:
            self._prepare(trainer, pl_module, processes)
        assert run.probe is not None
        assert run.model is not None
        first = run.last is None

        def tell(text: str) -> None:
            inform(f"{run.warn.name}: {text}")

        def ready() -> Begin:
            assert run.model is not None
            assert run.probe is not None
            stack.enter_context(precision_of(trainer, pl_module, self.full_precision))
            images = len(run.probe.images) + len(run.failures.now) * failures
            bar = progress_bar(trainer, run.model, images, tell if first else None)
            begin, more = stack.enter_context(bar), self._cost_of_failures() if failures else 0

            def begin_both(evaluations: int | None, seconds: float) -> None:
                known = evaluations is not None and more is not None
                begin(evaluations + more if known else None, seconds)  # type: ignore[operator]

            return begin_both

        with ExitStack() as stack:
            begin = processes.together(ready)
            stack.enter_context(processes.buffers_of_first(pl_module))
            if first:
                tell(self._description(trainer))
            explanation = explain_probe(
                run.model, run.probe, self._way, run.judge, processes, run.passes, run.warn, begin
            )
            failed = self._explain_failures(processes) if failures else None
        look = self._look(trainer)[0]
        failed = None if failed is None else replace(failed, look=look)
        return replace(explanation, look=look), failed

    @property
    def _way_of_failures(self) -> Way:
        return replace(self._way, targets="confused")

    def _cost_of_failures(self) -> int | None:
        """Return about how many evaluations they take, on all processes; None if it isn't known."""
        way, probe = self._way_of_failures, self._state.failures.probe
        each = evaluations_of(way.method_for(way.score_for(probe)))
        # The logits, and a map of the label and of the prediction.
        return None if each is None else len(probe.images) * (1 + 2 * each)

    def _explain_failures(self, processes: Processes) -> Explanation | None:
        """Return the maps of the failures; what goes wrong costs no other."""
        run = self._state
        assert run.model is not None
        way, judge = self._way_of_failures, Judge(False, controls=False)
        try:
            found = (run.model, run.failures.probe, way, judge, processes, run.passes, run.warn)
            return explain_probe(*found, lambda evaluations, seconds: None)
        except Exception as error:
            run.warn(f"the failures could not be explained. {type(error).__name__}: {error}")
            return None

    def _write_failures(self, trainer: Trainer, failed: Explanation, moment: Moment) -> None:
        run = self._state
        tag, headings = "failures", run.failures.headings
        self._write(
            replace(self._pictures(trainer, []), tag=tag, headings=headings), failed, moment
        )
        if moment.fitting:
            try:
                run.folder.write_failures(run.failures.record(failed, moment))
            except Exception as error:
                run.warn(f"the failures could not be stored. {type(error).__name__}: {error}")

    # The validation of the user's, whose failures are shown.

    def _follows(self, trainer: Trainer) -> bool:
        return bool(self.failures) and self._enabled and not trainer.sanity_checking

    def _attempt(self, pl_module: LightningModule, work: Callable[[], None]) -> None:
        """Do what must not disturb a validation."""
        run = self._state
        try:
            with isolated_rng(device_of(pl_module)):
                work()
        except Exception as error:
            run.failures.stop()
            run.warn(f"failures are not followed here. {type(error).__name__}: {error}")

    def _listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self._state
        run.failures.end()  # of a validation that was broken off
        if run.module is not pl_module:
            processes = Processes(run.alike)
            with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
                processes.together(lambda: stack.enter_context(isolated(pl_module)))
                self._prepare(trainer, pl_module, processes)
        assert run.adapter is not None
        reading = None if run.drawn is None else run.drawn.reading
        names = self.class_names if run.drawn is None else run.drawn.names
        run.failures.begin(run.adapter, pl_module, reading, names)

    def _see(self, trainer: Trainer, outputs: Any, batch: Any, loader: int) -> None:
        steady = is_steady(trainer.val_dataloaders, loader)
        failures = self._state.failures
        failures.see(batch, outputs, loader, Processes(), steady, self.read_batch)

    def _choose(self, trainer: Trainer) -> None:
        run = self._state
        for trouble in run.failures.choose(moment_of(trainer, "epoch").title, Processes()):
            run.warn(trouble)

    def _description(self, trainer: Trainer) -> str:
        """Return what is explained, and how, as far as it was found and not given."""
        run = self._state
        assert run.adapter is not None
        assert run.model is not None
        assert run.probe is not None
        parts = [f"{name_of(run.model)}, {run.adapter.description}"]
        if self.method is None and self.target_layer is None:
            with suppress(Exception):  # the explanation itself will tell
                found = find_feature_map(run.model, run.probe.images[:1])
                parts.append(f"feature map '{found.layer}'")
        return "; ".join([*parts, *self._look(trainer)[1]])

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, processes: Processes) -> None:
        """Choose the probe, and find how the module maps images to logits."""
        run = self._state

        def drawn() -> Drawn | None:
            try:
                return draw(self.probe, self.read_batch, trainer, pl_module, self.class_names)
            except Exception:
                if run.probe is None:
                    raise
                return None  # the probe of the run that is resumed is explained without it

        found = processes.together(drawn)

        noticed: set[str] = set()

        def adapter() -> Adapter:
            with (
                precision_of(trainer, pl_module, self.full_precision),
                collectives_noticed(noticed),
            ):
                if found is None:
                    assert run.probe is not None
                    batch = run.probe.images.to(device_of(pl_module)), run.probe.labels
                    return find_adapter(pl_module, batch, None, self.logits)
                expected = found.reading.expected(pl_module, found.classes)
                return find_adapter(pl_module, found.reading.inputs, expected, self.logits)

        way = run.adapter = processes.together(adapter)
        run.alike = processes.alike = processes.any(bool(noticed) or is_sharded(pl_module))
        run.drawn = found if self.failures else None  # it holds the whole batch
        run.integers = found is not None and found.reading.inputs.form.integer
        if run.probe is None:
            assert found is not None
            first = found.probe
            run.probe = processes.from_first(lambda: first(way, run.warn))
        elif run.resumed:
            run.resumed = False
            self._compare(found, run.probe)
        run.module, run.model = pl_module, way.model(pl_module)
        run.compared = Compared(way.takes) if self.logits is None and way.takes else None

    @property
    def _way(self) -> Way:
        adapter = self._state.adapter
        score = self.score if adapter is None else fitting_score(self.score, adapter)
        return Way(self.method, self.target_layer, self.targets, score, self.max_classes_per_image)

    def _timed(self, explanation: Explanation, started: float, moment: Moment) -> Explanation:
        """Add how much has changed, and how long it took; the budget pays for it."""
        budget, values = self._state.budget, dict(explanation.values)
        if (drift := mean_drift(explanation.drift)) is not None:
            values["drift"] = drift
        values["seconds"] = time.perf_counter() - started
        if self.max_overhead is not None:
            values["skipped"] = float(budget.skipped)
            extra = bool(explanation.controls) or "drift_floor" in values
            budget.pay(values["seconds"], self._state.judge.seconds if extra else 0.0)
            if moment.fitting and moment.kind != "start":
                values["overhead"] = budget.overhead
        return replace(explanation, values=values)

    def _scalars(
        self, trainer: Trainer, pl_module: LightningModule, explanation: Explanation
    ) -> Scalars:
        run = self._state
        values = run.hold(explanation.values | run.judge.scalars())
        return Scalars(
            lambda scalars, moment: log_scalars(trainer, pl_module, scalars, moment, run.warn),
            self._prefix,
            values,
        )

    def _pictures(self, trainer: Trainer, before: Sequence[Earlier]) -> Pictures:
        run = self._state
        root = trainer.default_root_dir
        return Pictures(trainer.loggers, root, before, self._prefix, run.warn, run.wrote)

    def _look(self, trainer: Trainer) -> tuple[Look, list[str]]:
        """Return how images are shown, and what was found for it and does not fit."""
        run = self._state
        assert run.adapter is not None
        assert run.probe is not None
        images = run.probe.images
        look, unfit = given_look(
            self.class_names, self.mean, self.std, self.panels, images.shape[1]
        )
        shown = None if run.integers else images
        look, notes = found_look(look, fact_sources(self.probe, trainer), run.adapter, shown)
        return look, unfit + notes

    def _compare(self, found: Drawn | None, probe: Probe) -> None:
        """Tell whether the data still has the images of the run that is resumed."""
        if callable(self.probe) and not hasattr(self.probe, "__getitem__"):
            return  # a function may give other images each time
        run = self._state
        assert run.adapter is not None
        if found is None or Probe.of(found.reading, run.adapter).fingerprint != probe.fingerprint:
            run.warn(
                "the data that the probe was taken from has changed since the run was started: the "
                "images of the checkpoint go on being explained; for others, start a new run"
            )

    def _before(
        self, trainer: Trainer, explanation: Explanation
    ) -> tuple[list[float | None], list[Earlier]]:
        """Return each map's drift, None without one, and the maps that were found before."""
        folder = self._state.folder
        try:
            if self.store and trainer.state.fn == "fit" and wants_files(trainer):
                name = "explanations" if self._label is None else f"explanations-{self._label}"
                wanted, images = logs_folder(trainer) / name, len(explanation.probe.images)
                folder.open(wanted, images, lambda path: self._begun(trainer, path))
            return folder.compare(explanation)
        except Exception as error:
            self._state.warn(
                f"the run's history can't be read or written. {type(error).__name__}: {error}"
            )
            return [None] * len(explanation.rows), []

    def _begun(self, trainer: Trainer, folder: Path) -> HistoryWriter:
        """Begin the run's history in a folder."""
        probe, (look, _) = self._state.probe, self._look(trainer)
        assert probe is not None
        masks: dict[tuple[int, int], torch.Tensor] = {}
        if probe.masks is not None and probe.mask_pairs is not None:
            masks = dict(zip(map(tuple, probe.mask_pairs.tolist()), probe.masks, strict=True))
        return HistoryWriter(
            folder,
            (displayable(probe.images, look.mean, look.std) * 255).round().to(torch.uint8),
            configuration=self._configuration(trainer, probe),
            class_names=dict(enumerate(map(str, look.names or ()))),
            masks=masks,
            epochs=None if (trainer.max_epochs or -1) < 0 else trainer.max_epochs,
        )

    def _configuration(self, trainer: Trainer, probe: Probe) -> dict[str, str]:
        found = {
            "model": type(trainer.lightning_module).__name__,
            "data": data_name(self.probe, trainer),
            "logits": "" if self._state.adapter is None else self._state.adapter.description,
            "method": _printed(self._way.method_for(self._way.score_for(probe))),
            "targets": str(self.targets),
            "metrics": str(self._state.judge),
            "precision": "32" if self.full_precision else str(trainer.precision),
            "lightning_aop": __version__,
            "torch": torch.__version__,
        }
        if self.max_overhead is not None:
            found["max_overhead"] = str(self.max_overhead)
        return found


def _printed(value: object, depth: int = 3) -> str:
    """Return a value in words that are the same in each process, as far as it has such."""
    # Functions by name: an address is another in each process.
    text = re.sub(r"<function ([\w.]+) at 0x\w+>", r"\1", repr(value))
    plain = type(value).__repr__ is object.__repr__ or is_dataclass(value)
    if not (depth and plain and " at 0x" in text and hasattr(value, "__dict__")):
        return text
    parts = (f"{name}={_printed(part, depth - 1)}" for name, part in vars(value).items())
    return f"{type(value).__qualname__}({', '.join(parts)})"


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(getattr(trainer, "callbacks"))  # noqa: B009  # which its class does not declare


def _step_before_swaps(monitor: ExplanationMonitor, trainer: Trainer) -> None:
    """Take the place before all callbacks that do something at the end of a validation.

    One of them may be an average of weights, which puts back those that it swapped for validation.
    """
    callbacks = _callbacks(trainer)
    own = callbacks.index(monitor)
    for place, other in enumerate(callbacks[:own]):
        kinds = [cls for cls in type(other).__mro__ if "on_validation_epoch_end" in vars(cls)]
        # Of either package the base class has the hook, and does nothing.
        if not isinstance(other, ExplanationMonitor) and len(kinds) > 1:
            callbacks.insert(place, callbacks.pop(own))
            setattr(trainer, "callbacks", callbacks)  # noqa: B010  # another list: Lightning is going through the old one
            return
