"""Explain a probe: no Trainer, no logging, on one process or on several."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_aop.methods.aop import OrBlank, fast_sigcam
from lightning_aop.methods.cam import WGradCAM
from lightning_aop.model.adapter import predict
from lightning_aop.model.isolation import device_of
from lightning_aop.model.passes import Passes
from lightning_aop.monitor.explanation import Explanation, Plan
from lightning_aop.monitor.judge import Judge, Judging, computed, located, updated
from lightning_aop.monitor.probe import Probe, TargetChoice
from lightning_aop.monitor.processes import Processes
from lightning_aop.scores import Score, of_all_classes, sigmoid, softmax
from lightning_aop.types import Images, Maps, SaliencyMethod, Targets


@dataclass(frozen=True)
class Way:
    """How a probe is explained; see `ExplanationMonitor` for the settings.

    Attributes:
        method: None for the default one, `fast_sigcam()`.
        target_layer: for the default method.
        targets: which classes.
        score: the class score F_c; None for the one that suits the labels.
        max_classes_per_image: the most positive classes of one multilabel image.
    """

    method: SaliencyMethod | None = None
    target_layer: str | nn.Module | None = None
    targets: TargetChoice = "label"
    score: Score | None = None
    max_classes_per_image: int = 3

    def score_for(self, probe: Probe) -> Score:
        """Return the class score: by default sigmoid for multi-hot labels, softmax for others."""
        return self.score or (sigmoid if probe.multilabel else softmax)

    def method_for(self, score: Score, warn: Callable[[str], None] = print) -> SaliencyMethod:
        """Return the method; the default one does without a layer where none is named or found."""
        if self.method is not None:
            return self.method
        default = fast_sigcam(self.target_layer, score=score)
        if self.target_layer is not None:
            return default
        return replace(default, activation=OrBlank(WGradCAM(), warn))


@dataclass
class _Worked:
    """What one process has done of the work."""

    maps: Maps
    curves: Float[Tensor, "mine 2 points"]
    metric: Judging | None


def explain(
    model: nn.Module,
    probe: Probe,
    way: Way,
    judge: Judge,
    processes: Processes,
    passes: Passes,
    warn: Callable[[str], None],
) -> Explanation:
    """Explain the probe as the model is now; every process returns the same.

    Args:
        model: maps images [B, C, H, W] to logits [B, K].
        probe: what is explained.
        way: how.
        judge: what judges the maps; it keeps the metrics of the controls.
        processes: who shares the work.
        passes: how many images go through the model at once; it shrinks where memory runs out.
        warn: is called with a sentence for the user.

    Raises:
        Exception: whatever the model, the method or a metric raised, on any of the processes.
    """
    images = probe.images.to(device_of(model))
    plan = processes.from_first(lambda: _plan(model, probe, images, way, passes))
    # Where a process would have nothing to judge, each does all the work.
    workers = processes if int(plan.judged.sum()) >= processes.size else Processes.alone()
    possible = plan.finite.nonzero()[:, 0]
    mine = possible[workers.share(len(possible))]
    pictures, targets = images[plan.rows[mine]], plan.targets[mine].to(images.device)
    judged = plan.judged[mine].to(images.device)

    def metric() -> Judging | None:
        return judge.metric(plan.score, together=workers.size > 1)

    def work() -> _Worked:
        method = way.method_for(plan.score, warn)
        maps = passes.in_parts(partial(method.explain, model), pictures, targets)
        worked = _Worked(maps, maps.new_full((len(maps), 2, 2), torch.nan), None)
        judging = metric()
        if judging is None or not judged.any():
            return worked
        batch = pictures[judged], maps[judged], targets[judged]
        worked.metric, measured = updated(judging, model, *batch, passes)
        if measured is not None:
            worked.curves = measured.new_full((len(maps), *measured.shape[1:]), torch.nan)
            worked.curves[judged] = measured
        return worked

    values: dict[str, float] = {}
    controls: dict[str, dict[str, float]] = {}
    maps = images.new_zeros(0, *images.shape[2:], dtype=torch.float32)
    curves = images.new_zeros(0, 2, 2, dtype=torch.float32)
    if len(possible):
        worked = processes.together(lambda: _within_memory(work, len(mine), passes, warn))
        maps = workers.gather(worked.maps.float(), len(possible))
        curves = workers.gather(worked.curves.float(), len(possible))
        if worked.metric is not None:
            values |= computed(worked.metric)
            if judge.controls_due:
                batch = pictures[judged], targets[judged]
                controls = _controls(judge, metric, model, batch, processes, passes, warn)
    maps, curves = (_with_nan(found, plan.finite) for found in (maps, curves))
    masks, known = probe.masks_of(plan.rows, plan.targets)
    known &= plan.finite
    values |= located(maps[known], masks[known], plan.targets[known], plan.logits.shape[1])
    return Explanation.of(probe, plan, maps, curves, values, controls)


def _plan(model: nn.Module, probe: Probe, images: Images, way: Way, passes: Passes) -> Plan:
    """Choose what is explained."""
    logits = passes.within_memory(lambda: predict(model, images), len(images))[0].cpu()
    rows, targets = probe.pairs(way.targets, logits, way.max_classes_per_image)
    labelled = len(rows)
    if probe.multilabel and way.targets == "label":
        # Judged are the labelled classes only, which stay the same from epoch to epoch.
        wrong = probe.false_positives(of_all_classes(way.score_for(probe), logits).float())
        rows, targets = (torch.cat(both) for both in zip((rows, targets), wrong, strict=True))
    finite = logits.isfinite().all(dim=1)[rows]
    judged = (torch.arange(len(rows)) < labelled) & finite
    return Plan(rows, targets, finite, judged, logits, way.score_for(probe))


def _within_memory(
    work: Callable[[], _Worked], images: int, passes: Passes, warn: Callable[[str], None]
) -> _Worked:
    worked, ran_out = passes.within_memory(work, images)
    if ran_out:
        warn(f"out of memory; from now on with fewer images in a pass, {passes.limit} at first")
    return worked


def _controls(
    judge: Judge,
    metric: Callable[[], Judging | None],
    model: nn.Module,
    batch: tuple[Images, Targets],
    processes: Processes,
    passes: Passes,
    warn: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Return the metrics of the controls; a failure costs them only."""
    started = time.perf_counter()
    judging = metric()
    assert judging is not None

    def work() -> dict[str, Judging]:
        update = judge.update_controls
        return passes.within_memory(lambda: update(judging, model, *batch, passes), len(batch[0]))[
            0
        ]

    try:
        return {name: computed(each) for name, each in processes.together(work).items()}
    except Exception as error:
        warn(f"no metrics of the controls. {type(error).__name__}: {error}")
        return {}
    finally:
        judge.seconds = time.perf_counter() - started


def _with_nan(maps: Float[Tensor, "f h w"], finite: Bool[Tensor, " p"]) -> Float[Tensor, "p h w"]:
    """Return a map for each pair, or its curves, NaN for those that could not be explained."""
    every = maps.new_full((len(finite), *maps.shape[1:]), torch.nan)
    every[finite.to(maps.device)] = maps
    return every.cpu()
