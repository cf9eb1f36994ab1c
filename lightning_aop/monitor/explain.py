"""Explain a batch, or a probe: no Trainer, no logging, on one process or on several."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_aop.errors import InvalidTypeError, InvalidValueError
from lightning_aop.history.store import stored
from lightning_aop.methods.aop import OrBlank, fast_sigcam
from lightning_aop.methods.cam import WGradCAM
from lightning_aop.metrics.functional import auc
from lightning_aop.metrics.grid import choose_fours, shares_of
from lightning_aop.metrics.similarity import rank_correlation
from lightning_aop.model.adapter import Adapter, LogitsFunction, find_adapter, predict
from lightning_aop.model.isolation import (
    device_of,
    isolated,
    isolated_rng,
    precision_of,
    unwrap,
)
from lightning_aop.model.passes import Passes
from lightning_aop.monitor.explanation import Explanation, Plan
from lightning_aop.monitor.facts import Scale, class_count, found_look, given_look
from lightning_aop.monitor.facts import class_names as known_names
from lightning_aop.monitor.judge import (
    CONTROLS,
    Judge,
    Judging,
    computed,
    located,
    name_of,
    singles,
    synced,
    updated,
    with_another_seed,
)
from lightning_aop.monitor.labels import ReadBatch
from lightning_aop.monitor.labels import read_batch as find_labels
from lightning_aop.monitor.lightning import inform, to_device, warn
from lightning_aop.monitor.probe import Drawn, Probe, TargetChoice, collect
from lightning_aop.monitor.processes import Processes
from lightning_aop.monitor.progress import Begin, progress_bar
from lightning_aop.scores import (
    Score,
    contrast,
    contrasts,
    logit,
    of_all_classes,
    sigmoid,
    softmax,
)
from lightning_aop.types import Images, Maps, SaliencyMethod, Targets
from lightning_aop.view.grid import Panel

T = TypeVar("T")

_COMPARES = (
    "score=contrast() tells a class from the others, and here an image may have several classes: take "
    "scores.sigmoid or scores.logit"
)


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
        """Return the class score: by default sigmoid for multi-hot labels, softmax for others.

        Raises:
            ValueError: classes are compared, of which an image may have several.
        """
        stages = (self, self.method, getattr(self.method, "perturbation", None))
        if probe.multilabel and any(contrasts(getattr(each, "score", None)) for each in stages):
            raise InvalidValueError(_COMPARES)
        return self.score or (sigmoid if probe.multilabel else softmax)

    def method_for(
        self, score: Score, warn: Callable[[str], None] = lambda text: None
    ) -> SaliencyMethod:
        """Return the method; the default one does without a layer where none is named or found."""
        if self.method is not None:
            return self.method
        if self.targets == "confused" and score is softmax:
            score = contrast(references=1)
        default = fast_sigcam(self.target_layer, score=score)
        if self.target_layer is not None:
            return default
        start = WGradCAM(score=score if contrasts(score) else logit)
        return replace(default, activation=OrBlank(start, warn))


def fitting_score(score: Score | None, adapter: Adapter) -> Score:
    """Return the score that was asked for, by default the one that suits the model.

    Raises:
        ValueError: classes are compared, of which an image may have several.
    """
    if adapter.score is sigmoid and adapter.classes > 2 and contrasts(score):
        raise InvalidValueError(_COMPARES)
    return score or adapter.score


def explain(
    model: nn.Module,
    batch: Any,
    *,
    method: SaliencyMethod | None = None,
    targets: TargetChoice | None = None,
    target_layer: str | nn.Module | None = None,
    score: Score | None = None,
    metrics: Judging | bool = True,
    panels: Sequence[Panel] = ("overlay",),
    class_names: Sequence[str] | None = None,
    mean: Scale | None = None,
    std: Scale | None = None,
    max_classes_per_image: int = 3,
    graphs: Literal["auto", False] = False,
    logits: LogitsFunction | None = None,
    read_batch: ReadBatch | None = None,
) -> Explanation:
    """Explain a batch without a Trainer: in a notebook, a script, with Fabric or in a loop of one's own.

        explanation = lightning_aop.explain(model, (images, labels))
        explanation  # in a notebook: the images beside their heatmaps
        explanation.save("maps.png")
        explanation.maps, explanation.targets, explanation.values["overall_auc"]

    The model is left as it was, bit for bit, and explained on its device.

    Args:
        model: any module that `ExplanationMonitor` can explain, in Fabric's wrapper or without.
        batch: as a DataLoader gives it, or a dataset, of which all is explained, or a function that
            returns a batch.
        method: how to explain; `fast_sigcam()` by default.
        targets: which classes, as for `ExplanationMonitor`; by default the labels where the batch has
            some, else the predicted class.
        target_layer: of the default method.
        score: the class score F_c; by default what suits the model and the labels.
        metrics: what judges the maps; by default deletion and insertion AUC, 56 model evaluations per
            map. False for none.
        panels: what stands beside each image in the picture.
        class_names: names by class index; by default those of the dataset or of the model.
        mean: what the images were normalised with, one number or one for each channel; by default what
            the dataset says.
        std: likewise.
        max_classes_per_image: the most positive classes of one multilabel image to explain.
        graphs: "auto" to replay passes as CUDA graphs on a GPU where that gives the same. It has not run
            on enough GPUs yet to be the default.
        logits: `fn(module, images)` that returns logits [B, K], where they are not found.
        read_batch: `fn(batch)` that returns images and labels, where they are not found.

    Returns:
        The explanation, one map for each image and class.

    Raises:
        ValueError: no images, no labels or no logits were found, or they don't fit each other.
    """
    if graphs not in ("auto", False):
        raise InvalidValueError(f'graphs={graphs!r} must be "auto" or False')
    device, passes = device_of(model), Passes(graphs=graphs)
    with (
        isolated_rng(device),
        torch.inference_mode(False),
        torch.no_grad(),
        isolated(unwrap(model)),
        precision_of(model),
    ):
        found = collect(batch, None)
        named = [] if class_names is None else [{"class_names": list(class_names)}]
        sources = [*named, batch if isinstance(batch, Dataset) else None, unwrap(model)]
        drawn = Drawn(
            find_labels(
                to_device(found.batch, device),
                None,
                read_batch,
                known_names(sources).value,
                found.numbers,
            ).used_by(unwrap(model)),
            class_count(sources),
            None,
            found.read_masks,
            named,
        )
        expected = drawn.reading.expected(unwrap(model), drawn.classes)
        adapter = find_adapter(model, drawn.reading.inputs, expected, logits)
        probe = drawn.probe(adapter, warn)
        if targets is None:
            targets = "predicted" if probe.labels is None else "label"
        adapted = adapter.model(unwrap(model))
        score = fitting_score(score, adapter)
        way = Way(method, target_layer, targets, score, max_classes_per_image)
        with progress_bar(None, adapted, len(probe.images)) as begin:
            explanation = explain_probe(
                adapted,
                probe,
                way,
                Judge(metrics, controls=False),
                Processes.alone(),
                passes,
                warn,
                begin,
            )
        images = None if drawn.reading.inputs.form.integer else probe.images
        look, unfit = given_look(class_names, mean, std, panels, probe.images.shape[1])
        look, notes = found_look(look, sources, adapter, images)
        for note in unfit + notes:
            inform(f"explain: {note}")
        return replace(explanation, look=look)


def explain_probe(
    model: nn.Module,
    probe: Probe,
    way: Way,
    judge: Judge,
    processes: Processes,
    passes: Passes,
    warn: Callable[[str], None],
    begin: Begin,
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
        begin: is called before the work, with what it takes on this process.

    Raises:
        Exception: whatever the model, the method or a metric raised, on any of the processes.
    """
    images = processes.together(lambda: probe.images.to(device_of(model)))
    started = time.perf_counter()
    plan = processes.same(lambda: _plan(model, probe, images, way, passes))
    seconds = (time.perf_counter() - started) / len(images)
    # Where a process would have nothing to judge, each does all the work.
    shared = not processes.alike and int(plan.judged.sum()) >= processes.size
    workers = processes if shared else Processes.alone()
    # Judged ones first, so that each share has some of them.
    judged_first = (plan.judged, plan.finite & ~plan.judged)
    possible = torch.cat([each.nonzero()[:, 0] for each in judged_first])
    mine = possible[workers.share(len(possible))]
    pictures, targets = images[plan.rows[mine]], plan.targets[mine].to(images.device)
    judged = plan.judged[mine].to(images.device)
    method = way.method_for(plan.score, warn)
    tiles = _fours(probe, plan.logits, plan.score) if judge.grid else None
    tiled = 0 if tiles is None else tiles[0].numel()
    begin(_evaluations(method, judge, len(mine), int(judged.sum()), tiled), seconds)

    def metric() -> Judging | None:
        return judge.metric(plan.score, together=workers.size > 1)

    def judge_by(
        judging: Judging, own: Maps
    ) -> tuple[dict[str, float], Float[Tensor, "mine 2 points"] | None]:
        """Return what a metric says of the maps, and the curves behind it."""
        batch = pictures[judged], own[judged], targets[judged]
        update = partial(updated, judging, model, *batch, passes)
        judging, measured = processes.together(
            lambda: _within_memory(update, len(batch[0]), passes, warn)
        )
        return _computed(judging, workers, processes), measured

    values: dict[str, float] = {}
    controls: dict[str, dict[str, float]] = {}
    maps = images.new_zeros(0, *images.shape[2:], dtype=torch.float32)
    curves = images.new_zeros(0, 2, 2, dtype=torch.float32)
    lines = images.new_zeros(len(possible), 0, 1, dtype=torch.float32)
    if judge.controls_due:
        judge.seconds = 0.0
    if len(possible):
        draw = partial(passes.in_parts, partial(_maps_of, method, model), pictures, targets)
        own = processes.together(lambda: _within_memory(draw, len(mine), passes, warn))
        maps = workers.gather(own.float(), len(possible))
        found = own.new_full((len(own), 2, 2), torch.nan)
        for judging in singles(metric()) if judged.any() else ():
            try:
                said, measured = judge_by(judging, own)
            except Exception as error:  # the maps are there all the same, and the other metrics
                warn(f"no values of {name_of(judging)}. {type(error).__name__}: {error}")
                continue
            values |= said
            if measured is not None:
                found = measured.new_full((len(own), *measured.shape[1:]), torch.nan)
                found[judged] = measured
        curves = workers.gather(found.float(), len(possible))
        if values and judge.controls_due:
            with _rarely(judge, "metrics of the controls", warn):
                measure = partial(_controls, judge, metric, model, pictures, targets, judged)
                controls, lines = measure(len(possible), workers, processes, passes)
        other = with_another_seed(method) if judge.controls_due and judge.drifts else None
        if other is not None:
            with _rarely(judge, "floor of the drift", warn):
                again = partial(other.explain, model)
                floor = partial(_floor, again, pictures, targets, own, len(possible))
                values |= floor(workers, processes, passes)
    maps, curves, lines = (
        _with_nan(found, possible, len(plan.rows)) for found in (maps, curves, lines)
    )
    masks, known = probe.masks_of(plan.rows, plan.targets)
    known &= plan.finite
    values |= located(maps[known], masks[known], plan.targets[known], plan.logits.shape[1])
    if tiles is not None:
        values |= _grid(model, probe, images, tiles, method, processes, passes, warn)
    return Explanation.of(probe, plan, maps, curves, values, controls, lines[..., 0])


def evaluations_of(method: SaliencyMethod) -> int | None:
    """Return what a map costs, None if the method doesn't say."""
    return getattr(method, "evaluations", None)


def _evaluations(
    method: SaliencyMethod, judge: Judge, maps: int, judged: int, tiled: int
) -> int | None:
    """Return what the maps and their metrics cost, None if the method or the metric doesn't say."""
    each, metric = evaluations_of(method), judge.evaluations
    if each is None or metric is None:
        return None
    again = judge.controls_due and judge.drifts and with_another_seed(method) is not None
    judging = judged * metric * (1 + len(CONTROLS) * judge.controls_due)
    return (maps * (1 + again) + tiled) * each + judging


def _plan(model: nn.Module, probe: Probe, images: Images, way: Way, passes: Passes) -> Plan:
    """Choose what is explained."""
    logits = passes.within_memory(lambda: predict(model, images), len(images))[0].cpu()
    rows, targets = probe.pairs(way.targets, logits, way.max_classes_per_image)
    labelled = len(rows)
    if probe.multilabel and way.targets in ("label", "confused"):
        # Judged are the labelled classes only, which stay the same from epoch to epoch.
        wrong = probe.false_positives(of_all_classes(way.score_for(probe), logits).float())
        rows, targets = (torch.cat(both) for both in zip((rows, targets), wrong, strict=True))
    finite = logits.isfinite().all(dim=1)[rows]
    judged = (torch.arange(len(rows)) < labelled) & finite
    if way.targets == "confused" and probe.labels is not None and not probe.multilabel:
        judged &= targets == probe.labels[rows]  # likewise
    return Plan(rows, targets, finite, judged, logits, way.score_for(probe))


def _maps_of(method: SaliencyMethod, model: nn.Module, images: Images, targets: Targets) -> Maps:
    """Return what a method, maybe the user's own, makes of the images.

    Raises:
        TypeError: it is no tensor of floats.
        ValueError: it has another shape.
    """
    maps: object = method.explain(model, images, targets)
    wanted, remedy = [len(images), *images.shape[2:]], ""
    what = (
        f"{type(method).__name__}.explain must return one map in [0, 1] for each image, a floating-"
        f"point tensor {wanted}, got"
    )
    if not isinstance(maps, Tensor):
        raise InvalidTypeError(f"{what} {type(maps).__name__}: convert it with torch.as_tensor")
    if not maps.is_floating_point():
        remedy = ": divide bytes by 255" if maps.dtype == torch.uint8 else ""
        raise InvalidTypeError(f"{what} {maps.dtype}{remedy}")
    if list(maps.shape) != wanted:
        single = maps.ndim == 4 and maps.shape[1] == 1
        remedy = (
            "drop the channel with [:, 0]" if single else "upsample with nn.functional.interpolate"
        )
        raise InvalidValueError(f"{what} {list(maps.shape)}: {remedy}")
    return maps


def _within_memory(
    work: Callable[[], T], images: int, passes: Passes, warn: Callable[[str], None]
) -> T:
    worked, ran_out = passes.within_memory(work, images)
    if ran_out:
        warn(f"out of memory; from now on with fewer images in a pass, {passes.limit} at first")
    return worked


def _computed(metric: Judging, workers: Processes, processes: Processes) -> dict[str, float]:
    """Return a metric's values: first what the workers exchange, then what may fail on one of them."""
    synced(metric, workers.size > 1)
    return processes.together(lambda: computed(metric))


@contextmanager
def _rarely(judge: Judge, what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Time what is measured rarely; a failure costs this only."""
    started = time.perf_counter()
    try:
        yield
    except Exception as error:
        warn(f"no {what}. {type(error).__name__}: {error}")
    finally:
        judge.seconds += time.perf_counter() - started


def _controls(
    judge: Judge,
    metric: Callable[[], Judging | None],
    model: nn.Module,
    images: Images,
    targets: Targets,
    judged: Bool[Tensor, " mine"],
    count: int,
    workers: Processes,
    processes: Processes,
    passes: Passes,
) -> tuple[dict[str, dict[str, float]], Float[Tensor, "all controls 1"]]:
    """Return the metrics of the controls, and the overall AUC of each for each image and class."""

    def work() -> dict[str, tuple[Judging, Float[Tensor, "b 2 points"] | None]]:
        judging = metric()
        assert judging is not None
        batch = images[judged], targets[judged]
        update = partial(judge.update_controls, judging, model, *batch, passes)
        return passes.within_memory(update, len(batch[0]))[0]

    found = processes.together(work)
    values = {name: _computed(each, workers, processes) for name, (each, _) in found.items()}
    mine = images.new_full((len(images), len(found), 1), torch.nan, dtype=torch.float32)
    for n, (_, curves) in enumerate(found.values()):
        if curves is not None:
            deletion, insertion = (auc(curves[:, game]) for game in range(2))
            mine[judged, n, 0] = (insertion - deletion).float()
    return values, workers.gather(mine, count)


def _floor(
    again: Callable[[Images, Targets], Maps],
    images: Images,
    targets: Targets,
    maps: Maps,
    count: int,
    workers: Processes,
    processes: Processes,
    passes: Passes,
) -> dict[str, float]:
    """Return how much maps differ by their random numbers alone."""

    def work() -> Float[Tensor, "mine 1 1"]:
        first, second = (
            stored(each.cpu()) for each in (maps, passes.in_parts(again, images, targets))
        )
        differ = 1 - rank_correlation(first.double(), second.double())
        blank = first.flatten(1).amax(dim=1) == first.flatten(1).amin(dim=1)
        return differ.masked_fill(blank, torch.nan)[:, None, None].to(images.device, torch.float32)

    mine = processes.together(lambda: passes.within_memory(work, len(images))[0])
    found = float(workers.gather(mine, count).nanmean())
    return {"drift_floor": found} if math.isfinite(found) else {}


def _fours(
    probe: Probe, logits: Float[Tensor, "b k"], score: Score
) -> tuple[Int[Tensor, "g 4"], str]:
    """Return which images of the probe are tiled for grid pointing, and why none is."""
    none = torch.zeros(0, 4, dtype=torch.long)
    if probe.labels is None or probe.multilabel:
        return none, "it takes images of one class each, and the probe's labels are others"
    classes = probe.labels.long().clamp_min(0)
    # Whatever is explained, a probability tells whether an image is recognised.
    sure = of_all_classes(sigmoid if score is sigmoid else softmax, logits)
    own = sure.gather(1, classes[:, None])[:, 0].masked_fill(probe.labels < 0, -torch.inf)
    if len(set(probe.labels[probe.labels >= 0].tolist())) < 4:
        return none, "the probe has images of fewer than four classes: set a larger probe=…"
    fours = choose_fours(classes.tolist(), own.tolist(), 0.5)
    return fours, "" if len(fours) else (
        "the model does not yet give images of four different classes of the probe a probability "
        "above 0.5"
    )


def _grid(
    model: nn.Module,
    probe: Probe,
    images: Images,
    tiles: tuple[Int[Tensor, "g 4"], str],
    method: SaliencyMethod,
    processes: Processes,
    passes: Passes,
    warn: Callable[[str], None],
) -> dict[str, float]:
    """Return the share of the heat in the right quarter, nothing where four images can't be tiled."""
    fours, unfit = tiles
    if unfit or probe.labels is None:
        warn(f"no grid pointing: {unfit}")
        return {}
    classes = probe.labels.long()

    def work() -> dict[str, float]:
        found = partial(shares_of, method, model, images, classes, fours)
        shares = passes.within_memory(found, fours.numel())[0]
        return {"grid_pointing": float(shares.mean())}

    try:
        return processes.same(work)
    except Exception as error:
        size = f"{2 * images.shape[2]} x {2 * images.shape[3]}"
        warn(
            f"no grid pointing: the model, or the method, takes no images of {size}. "
            f"{type(error).__name__}: {error}"
        )
        return {}


def _with_nan(
    maps: Float[Tensor, "f h w"], places: Int[Tensor, " f"], count: int
) -> Float[Tensor, "p h w"]:
    """Return a map for each pair, or its curves, NaN for those that could not be explained."""
    every = maps.new_full((count, *maps.shape[1:]), torch.nan)
    every[places.to(maps.device)] = maps
    return every.cpu()
