"""The numbers of a run for other programs: a row for each explanation at each time."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_aop.errors import InvalidValueError
from lightning_aop.files import write_whole
from lightning_aop.history.store import History
from lightning_aop.tables import csv_text

__all__ = ["write_numbers"]


def write_numbers(folder: str | Path, kind: str = "csv") -> Path:
    """Write the numbers of a run into its folder, as `explanations.csv` or `explanations.json`.

    The first has a row for each explanation at each time; the second also has the metrics of each time,
    those of the controls, their overall AUC for each explanation, and the curves.

    Args:
        folder: the `explanations` folder that the monitor has written.
        kind: "csv" or "json".

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: there is no history in the folder.
        ValueError: the history is damaged, or there is no such kind.
    """
    if kind not in ("csv", "json"):
        raise InvalidValueError(f"kind={kind!r} must be 'csv' or 'json'")
    folder = Path(folder)
    history = History.load(folder)
    path = folder / f"explanations.{kind}"
    if kind == "csv":
        rows = [row for time in _times(history) for row in time["explanations"]]
        names = list(_COLUMNS)
        text = csv_text([names, *([_cell(row[name]) for name in names] for row in rows)])
    else:
        about = {"configuration": history.configuration, "times": _times(history, curves=True)}
        text = json.dumps(about, indent=1, allow_nan=False) + "\n"
    write_whole(path, text.encode())
    return path


_COLUMNS = (
    *("epoch", "step", "image", "target", "class", "verdict", "score", "predicted"),
    *("predicted_class", "predicted_score", "deletion_auc", "insertion_auc", "overall_auc"),
    *("energy_in_mask", "hottest_on_object", "distance_to_object", "drift", "blank"),
)


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _times(history: History, curves: bool = False) -> list[dict[str, Any]]:
    times = []
    for record in history.records:
        rows = []
        for n, (image, target) in enumerate(record.pairs):
            predicted = _at(record.predicted, n)
            row = {
                "epoch": record.epoch,
                "step": record.step,
                "image": image,
                "target": target,
                "class": history.class_name(target),
                "verdict": _at(record.verdicts, n),
                "score": record.scores[n],
                "predicted": predicted,
                "predicted_class": None if predicted is None else history.class_name(predicted),
                "predicted_score": _at(record.predicted_scores, n),
                "deletion_auc": _at(record.deletion_auc, n),
                "insertion_auc": _at(record.insertion_auc, n),
                "overall_auc": record.overall_auc(n),
                "energy_in_mask": _at(record.energy, n),
                "hottest_on_object": _at(record.hits, n),
                "distance_to_object": _at(record.away, n),
                "drift": record.drift[n],
                "blank": record.blank[n],
            }
            if curves:
                row |= {"deletion": _at(record.deletion, n), "insertion": _at(record.insertion, n)}
                row["control_aucs"] = {
                    name: _at(values, n) for name, values in record.control_aucs.items()
                }
            rows.append(row)
        times.append(
            {
                "title": record.title,
                "values": _finite(record.values),
                "controls": {name: _finite(values) for name, values in record.controls.items()},
                "explanations": rows,
            }
        )
    return times


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in values.items()
    }


def _at(values: list[Any], place: int) -> Any:
    """Return an entry of what earlier versions did not store."""
    return values[place] if values else None
