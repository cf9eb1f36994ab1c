"""The picture of a probe: its maps, with what the labels and the model say of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightning_aop.rendering import heatmap_grid
from lightning_aop.samples import Probe
from lightning_aop.scores import Score
from lightning_aop.types import Maps


@dataclass(frozen=True)
class Explanations:
    """What was found for the P pairs of a probe of N pictures and K classes.

    Attributes:
        rows: which picture each explanation is of.
        targets: which class.
        maps: where the model saw it.
        masks: where it is; empty where that is not known.
        logits: of the pictures.
    """

    rows: Int[Tensor, " p"]
    targets: Int[Tensor, " p"]
    maps: Maps
    masks: Bool[Tensor, "p h w"]
    logits: Float[Tensor, "n k"]

    def by_picture(self) -> "Explanations":
        """Bring those of one picture together."""
        order = self.rows.argsort(stable=True)
        return replace(
            self,
            rows=self.rows[order],
            targets=self.targets[order],
            maps=self.maps[order],
            masks=self.masks[order.to(self.masks.device)],
        )


def draw_probe(
    probe: Probe,
    found: Explanations,
    score: Score,
    names: Sequence[str] | None,
    *,
    title: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> UInt8[Tensor, "3 height width"]:
    """Draw each explanation with its class and score, and the outline of the mask where one is known.

    Under a single-label picture stands also what the model would have said where it is wrong. The
    explanations of one multilabel picture stand together: found classes, missed ones (a score of at
    most 0.5) and false positives are told apart, and the classes that are not drawn are listed.
    """
    layout: dict[str, Any] = {"title": title, "mean": mean, "std": std}
    if probe.multilabel:
        found = found.by_picture()
        layout["groups"] = found.rows.tolist()
        layout["headings"] = _headings(probe, found, names)
        captions = _multilabel_captions(probe, found, score, names)
    else:
        captions = _captions(found, score, names)
    if probe.masks is not None:
        layout["outlines"] = found.masks
    images = probe.images.to(found.maps.device)[found.rows]
    return heatmap_grid(images, found.maps, captions, **layout)


def _captions(found: Explanations, score: Score, names: Sequence[str] | None) -> list[str]:
    """Return the class and its score for each pair; for a wrong prediction that one as well."""
    logits = found.logits[found.rows]
    predicted = logits.argmax(dim=1)
    columns = (found.targets, score(logits, found.targets), predicted, score(logits, predicted))
    captions = []
    for target, value, other, higher in zip(*(c.tolist() for c in columns), strict=True):
        caption = f"{_name(names, target)} {value:.2f}"
        if other != target:
            caption += f"\npredicted {_name(names, other)} {higher:.2f}"
        captions.append(caption)
    return captions


def _multilabel_captions(
    probe: Probe, found: Explanations, score: Score, names: Sequence[str] | None
) -> list[str]:
    assert probe.labels is not None
    rows, targets = found.rows.cpu(), found.targets.cpu()
    values = score(found.logits[found.rows], found.targets).tolist()
    positive = (probe.labels[rows, targets] > 0.5).tolist()
    captions = []
    for target, value, labelled in zip(targets.tolist(), values, positive, strict=True):
        verdict = "" if labelled and value > 0.5 else "\nmissed" if labelled else "\nfalse positive"
        if not labelled and value <= 0.5:
            verdict = "\nnot in the picture"
        captions.append(f"{_name(names, target)} {value:.2f}{verdict}")
    return captions


def _headings(probe: Probe, found: Explanations, names: Sequence[str] | None) -> list[str]:
    """Return for each picture which classes were found, missed or made up, beside those drawn."""
    assert probe.labels is not None
    scores = found.logits.sigmoid().cpu()
    positive, over = probe.labels > 0.5, scores > 0.5
    drawn = torch.zeros_like(positive)
    drawn[found.rows.cpu(), found.targets.cpu()] = True
    headings = []
    for row in found.rows.unique_consecutive().tolist():
        parts = []
        for word, kind in (
            ("also", positive & over),
            ("missed", positive & ~over),
            ("false", ~positive & over),
        ):
            classes = (kind & ~drawn)[row].nonzero()[:, 0].tolist()
            if classes:
                listed = ", ".join(f"{_name(names, k)} {scores[row, k]:.2f}" for k in classes)
                parts.append(f"{word}: {listed}")
        headings.append("\n".join([*parts[:1], " · ".join(parts[1:])]).strip())
    return headings


def _name(names: Sequence[str] | None, index: int) -> str:
    return str(names[index]) if names is not None and index < len(names) else f"class {index}"
