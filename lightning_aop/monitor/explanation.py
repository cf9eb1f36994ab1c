"""An explanation of the probe: each fact about it once, for all who draw, store and log it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_aop.history.store import stored
from lightning_aop.metrics.functional import auc
from lightning_aop.monitor.facts import Look
from lightning_aop.monitor.probe import Probe
from lightning_aop.scores import Score, logit, of_all_classes, shown, value
from lightning_aop.view.heat import Picture
from lightning_aop.view.png import png, write_png

Pair: TypeAlias = tuple[int, int]
"""The image and the class that one map is of."""

MomentKind: TypeAlias = Literal["start", "step", "epoch", "end"]
"""Before training, after an optimizer step, at the end of an epoch, and after training."""

Verdict: TypeAlias = Literal["right", "wrong", "missed", "false positive", "absent"]
"""What the model says of a pair, against its label.

A single-label image is "right" or "wrong", by its likeliest class. A multilabel one has a verdict for
each class: "right" (labelled, score above 0.5), "missed" (labelled, below), "false positive" (not
labelled, above) or "absent" (not labelled, below).
"""


@dataclass(frozen=True)
class Moment:
    """When the probe is explained.

    Attributes:
        kind: what has just happened.
        step: the one that Lightning's loggers show, which counts batches from 0: 9 after ten of them.
        epoch: which one, from 0.
        title: when, in words.
        fitting: under `fit`; otherwise under `validate` or `test`.
    """

    kind: MomentKind
    step: int
    epoch: int
    title: str
    fitting: bool


@dataclass(frozen=True)
class Plan:
    """What is explained at one time, on the CPU.

    Attributes:
        rows: which image of the probe each pair has.
        targets: which class.
        finite: the pairs whose image has finite logits; only those can be explained.
        judged: the pairs that the metrics are about, finite or not.
        logits: of all images.
        score: the class score F_c.
    """

    rows: Int[Tensor, " p"]
    targets: Int[Tensor, " p"]
    finite: Bool[Tensor, " p"]
    judged: Bool[Tensor, " p"]
    logits: Float[Tensor, "b k"]
    score: Score


@dataclass(frozen=True)
class Explanation:
    """What is known of P pairs of an image and a class. A notebook shows it as a picture.

    Attributes:
        probe: the images, with what the data says of them.
        rows: which image of the probe each pair has.
        targets: which class.
        maps: where the model sees it, in [0, 1]; NaN where there is no map.
        blank: the maps that show nothing: constant once stored, or NaN.
        masks: where the object is; empty where that is not known.
        curves: deletion and insertion curve of each, NaN where they were not measured.
        aucs: deletion and insertion AUC of each, NaN where they were not measured.
        scores: the class score of each.
        predicted: the likeliest class of each pair's image.
        predicted_scores: the score of that class.
        verdicts: what the model says of each against its label; None without labels.
        drift: 1 − the rank correlation of each map with the one before; None without one.
        chances: the score of every class, for all images of the probe.
        values: the metrics, by name.
        controls: the metrics of maps that don't depend on the model, by their name; empty where they
            were not measured this time.
        control_aucs: the overall AUC of each of them for each pair, in their order; NaN where it was not
            judged.
        look: how it is shown.
    """

    probe: Probe
    rows: Int[Tensor, " p"]
    targets: Int[Tensor, " p"]
    maps: Float[Tensor, "p h w"]
    blank: Bool[Tensor, " p"]
    masks: Bool[Tensor, "p h w"]
    curves: Float[Tensor, "p 2 points"]
    aucs: Float[Tensor, "p 2"]
    scores: Float[Tensor, " p"]
    predicted: Int[Tensor, " p"]
    predicted_scores: Float[Tensor, " p"]
    verdicts: Sequence[Verdict | None]
    drift: Sequence[float | None]
    chances: Float[Tensor, "n k"]
    values: dict[str, float]
    controls: dict[str, dict[str, float]]
    control_aucs: Float[Tensor, "p controls"]
    look: Look = field(default_factory=Look)

    @classmethod
    def of(
        cls,
        probe: Probe,
        plan: Plan,
        maps: Float[Tensor, "p h w"],
        curves: Float[Tensor, "p 2 points"],
        values: dict[str, float],
        controls: dict[str, dict[str, float]],
        control_aucs: Float[Tensor, "p controls"],
    ) -> "Explanation":
        """Find out all that follows from the maps, the logits and the labels."""
        rows, targets, maps, curves = plan.rows, plan.targets, maps.cpu(), curves.cpu()
        logits = plan.logits[rows]
        predicted = logits.argmax(dim=1)
        small = stored(maps).flatten(1)
        faint = small.amax(dim=1) == small.amin(dim=1)
        finite = maps.flatten(1).isfinite().all(dim=1)
        maps = maps.masked_fill((faint & finite)[:, None, None], 0.0)  # the same for who draws it
        return cls(
            probe,
            rows,
            targets,
            maps,
            faint | ~finite,
            probe.masks_of(rows, targets)[0],
            curves,
            auc(curves.flatten(0, 1)).view(-1, 2),
            shown(plan.score, logits, targets).float(),
            predicted,
            shown(plan.score, logits, predicted).float(),
            _verdicts(probe, plan, predicted),
            [None] * len(rows),
            of_all_classes(plan.score, plan.logits).float(),
            values | {"blank_maps": float((faint | ~finite).sum())},
            controls,
            control_aucs,
        )

    @property
    def pairs(self) -> list[Pair]:
        """The image and the class of each map."""
        return list(zip(self.rows.tolist(), self.targets.tolist(), strict=True))

    def only(self, chosen: Int[Tensor, " c"]) -> "Explanation":
        """Return some of the pairs; the metrics stay those of all."""
        changes: dict[str, object] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("probe", "chances", "values", "controls", "look"):
                continue
            changes[each.name] = (
                value[chosen] if isinstance(value, Tensor) else [value[i] for i in chosen.tolist()]
            )
        return replace(self, **changes)  # type: ignore[arg-type]

    def pictures(self, title: str = "") -> list[Picture]:
        """Return the grid of images and maps, uint8 [3, height, width]; several beyond 32 maps."""
        from lightning_aop.monitor.panels import draw_probe  # which draws this class

        return list(draw_probe(self, title=title))

    def save(self, path: str | Path, title: str = "") -> Path:
        """Write the first of the pictures as a PNG file, and return its path."""
        return write_png(self.pictures(title)[0], path)

    def _repr_png_(self) -> bytes:
        return png(self.pictures()[0])


def _verdicts(probe: Probe, plan: Plan, predicted: Int[Tensor, " p"]) -> list[Verdict | None]:
    rows, targets = plan.rows, plan.targets
    if probe.labels is None or plan.score in (logit, value):
        return [None] * len(rows)
    if not probe.multilabel:
        right = predicted == probe.labels[rows].long()
        return ["right" if known else "wrong" for known in right.tolist()]
    labelled = probe.labels[rows, targets] > 0.5
    over = plan.score(plan.logits[rows], targets) > 0.5
    words: dict[tuple[bool, bool], Verdict] = {
        (True, True): "right",
        (True, False): "missed",
        (False, True): "false positive",
        (False, False): "absent",
    }
    return [words[pair] for pair in zip(labelled.tolist(), over.tolist(), strict=True)]


def mean_drift(drift: Sequence[float | None]) -> float | None:
    """Return the mean over the maps that have an earlier one, None without any."""
    known = [value for value in drift if value is not None]
    return float(torch.tensor(known, dtype=torch.float64).mean()) if known else None
