"""A run's explanations as rows of a table, for loggers that can sort and filter them."""

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
    "score",
    "deletion AUC",
    "insertion AUC",
    "over-all AUC",
    "drift",
    "map",
)


def evolution_rows(history: History, records: int = 50) -> list[list[object]]:
    """Return a row for each explanation of the last records, in the order of `COLUMNS`.

    The map is laid over its picture, uint8 [h, w, 3] in the size of the maps; None for a map that
    shows nothing, as for an AUC that was not measured.
    """
    height, width = history.maps.shape[1:]
    pictures = torch.from_numpy(history.images).permute(0, 3, 1, 2).float() / 255
    small = interpolate(pictures, (height, width), mode="area")
    rows: list[list[object]] = []
    for record in history.records[-records:]:
        maps = torch.from_numpy(np.array(history.maps[record.first : record.end])) / 255
        shown = (overlay(small[record.images], maps) * 255).round().to(torch.uint8)
        for n, picture in enumerate(shown.permute(0, 2, 3, 1).numpy()):
            deletion, insertion = record.deletion_auc[n], record.insertion_auc[n]
            rows.append(
                [
                    record.epoch,
                    record.step,
                    record.images[n],
                    history.class_name(record.targets[n]),
                    record.scores[n],
                    deletion,
                    insertion,
                    None if deletion is None or insertion is None else insertion - deletion,
                    record.drift[n],
                    None if record.blank[n] else picture,
                ]
            )
    return rows
