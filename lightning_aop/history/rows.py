"""A run's explanations as rows of a table, for loggers that can sort and filter them."""

import math

import numpy as np
import torch
from torch.nn.functional import interpolate

from lightning_aop.history.store import History
from lightning_aop.view.heat import overlay

COLUMNS = (
    "epoch",
    "step",
    "image",
    "class",
    "verdict",
    "score",
    "deletion AUC",
    "insertion AUC",
    "overall AUC",
    "drift",
    "map",
)


def evolution_rows(history: History, records: int = 50) -> list[list[object]]:
    """Return a row of `COLUMNS` for each explanation of the last records.

    The map is drawn over its image, uint8 [h, w, 3] at the resolution of the maps. A blank map, an AUC
    that was not measured and the verdict on what has no label are None.
    """
    height, width = history.maps.shape[1:]
    images = torch.from_numpy(history.images).permute(0, 3, 1, 2).float() / 255
    small = interpolate(images, (height, width), mode="area")
    rows: list[list[object]] = []
    for record in history.records[-records:]:
        maps = torch.from_numpy(np.array(history.maps[record.first : record.end])) / 255
        shown = (overlay(small[record.images], maps) * 255).round().to(torch.uint8)
        for n, drawn in enumerate(shown.permute(0, 2, 3, 1).numpy()):
            deletion, insertion = record.deletion_auc[n], record.insertion_auc[n]
            rows.append(
                [
                    record.epoch,
                    record.step,
                    record.images[n],
                    history.class_name(record.targets[n]),
                    record.verdicts[n] if record.verdicts else None,
                    record.scores[n],
                    deletion,
                    insertion,
                    None if deletion is None or insertion is None else insertion - deletion,
                    record.drift[n],
                    None if record.blank[n] else drawn,
                ]
            )
    return rows


def auc_lines(history: History) -> dict[str, tuple[list[int], list[float]]]:
    """Return by name the steps and values of the overall AUC, and of each control that was measured."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for record in history.records:
        measured = {"overall AUC": record.values, **record.controls}
        for name, values in measured.items():
            value = values.get("overall_auc", math.nan)
            if not math.isnan(value):
                steps, found = lines.setdefault(name, ([], []))
                steps.append(record.step)
                found.append(value)
    return lines
