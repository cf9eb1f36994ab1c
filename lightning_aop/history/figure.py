"""A figure for a paper: chosen explanations over chosen epochs, light, with vector text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from lightning_aop.errors import InvalidValueError
from lightning_aop.history.store import History, Record
from lightning_aop.view.heat import overlay

__all__ = ["write_figure"]

_WIDTHS = {1: 3.3, 2: 6.9}  # inches, of one column of a paper and of two
_TEXT = 7  # points
_KINDS = ("pdf", "svg", "eps", "png")


def write_figure(
    folder: str | Path,
    path: str | Path,
    *,
    explanations: Sequence[int] | int = 4,
    epochs: Sequence[int] | None = None,
    columns: int = 1,
) -> Path:
    """Write the maps of a run as a figure: a row for each explanation, a column for each epoch.

    Text is text, in fonts that journals take; maps are drawn over their images, with the mask's outline
    where there is one, and the class score below. All have one colour scale, which is beside them.

    Args:
        folder: the `explanations` folder that the monitor has written.
        path: where to, by its ending a PDF, SVG, EPS or PNG.
        explanations: the places of the explanations in the last record, from 0, or how many of the
            first ones.
        epochs: which epochs; by default up to four of one column or eight of two, evenly spread. -1 is
            before training.
        columns: 1 or 2, the columns of the paper that the figure is as wide as.

    Returns:
        The path.

    Raises:
        FileNotFoundError: there is no history in the folder.
        ValueError: the history has no record, or not those that are asked for.
    """
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    folder, path = Path(folder), Path(path)
    if path.suffix[1:].lower() not in _KINDS:
        raise InvalidValueError(
            f"{path} must end in one of {', '.join(f'.{kind}' for kind in _KINDS)}"
        )
    history = History.load(folder)
    if not history.records:
        raise InvalidValueError(f"{folder} has no record yet: a figure needs one explanation")
    if columns not in _WIDTHS:
        raise InvalidValueError(f"columns={columns} must be 1 or 2, those of a paper")
    places, records = _places(history, explanations), _records(history, epochs, 4 * columns)
    pairs = [history.records[-1].pairs[place] for place in places]
    height, width = history.images.shape[1:3]
    settings: Any = {
        "font.size": _TEXT,
        "font.family": "sans-serif",
        "pdf.fonttype": 42,  # fonts that can be searched and edited, and that arXiv takes
        "ps.fonttype": 42,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a $ in a name begins no formula
    }
    across, wide = len(records) + 1, _WIDTHS[columns]
    cell = wide / (across + 0.5)  # beside the colours
    with rc_context(settings):
        layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
        high = len(pairs) * (cell * height / width + 0.13) + 0.25
        figure = Figure((wide, high), layout=layout)
        axes = figure.subplots(len(pairs), across, squeeze=False)
        for row, (image, target) in enumerate(pairs):
            picture = history.images[image]
            axes[row, 0].imshow(picture)
            axes[row, 0].set_xlabel(history.class_name(target))
            for column, record in enumerate(records, start=1):
                place = (
                    record.pairs.index((image, target)) if (image, target) in record.pairs else None
                )
                ax = axes[row, column]
                if place is None:
                    ax.set_xlabel("not explained")
                    ax.imshow(np.full((height, width, 3), 235, np.uint8))
                    continue
                ax.imshow(_drawn(picture, history.maps[record.first + place]))
                ax.set_xlabel("blank" if record.blank[place] else f"{record.scores[place]:.2f}")
                mask = history.masks.get((image, target))
                if mask is not None and mask.any() and not mask.all():
                    ax.contour(mask, levels=[0.5], colors=["#4df2ff"], linewidths=0.6)
        for column, record in enumerate(records, start=1):
            axes[0, column].set_title(_when(record), fontsize=_TEXT)
        axes[0, 0].set_title("image", fontsize=_TEXT)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.xaxis.labelpad = 1.5
            ax.spines[:].set_visible(False)
        bar = figure.colorbar(
            ScalarMappable(cmap="inferno"),
            ax=axes,
            fraction=0.02,
            pad=0.01,
            ticks=[0, 1],
            aspect=30,
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, pad=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=300)
    return path


def _places(history: History, wanted: Sequence[int] | int) -> list[int]:
    count = len(history.records[-1].images)
    places = list(range(min(wanted, count))) if isinstance(wanted, int) else list(wanted)
    if not places or min(places) < 0 or max(places) >= count:
        raise InvalidValueError(
            f"explanations {wanted} must be some of 0 to {count - 1}, as the last record has them"
        )
    return places


def _records(history: History, epochs: Sequence[int] | None, most: int) -> list[Record]:
    if epochs is None:
        count = len(history.records)
        chosen = np.linspace(0, count - 1, min(count, most)).round().astype(int)
        return [history.records[n] for n in chosen]
    found = {-1 if record.step == 0 else record.epoch: record for record in history.records}
    if missing := [epoch for epoch in epochs if epoch not in found]:
        raise InvalidValueError(
            f"epoch {missing[0]} was not explained: choose from {', '.join(map(str, found))}, where "
            "-1 is before training"
        )
    return [found[epoch] for epoch in epochs]


def _when(record: Record) -> str:
    return "before\ntraining" if record.step == 0 else f"epoch {record.epoch}"


def _drawn(picture: np.ndarray, stored: np.ndarray) -> np.ndarray:
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    small = torch.from_numpy(np.array(stored))[None, None].float() / 255
    heat = interpolate(small, image.shape[2:], mode="bilinear")[:, 0]
    drawn: np.ndarray = (overlay(image, heat)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    return drawn
