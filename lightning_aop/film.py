"""The maps of a run over the epochs as one moving picture: `evolution.gif`."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_aop.files import write_whole
from lightning_aop.history import History, Record
from lightning_aop.rendering import heatmap_grid

_FIGURES = {"overall_auc": "over-all AUC", "pointing_game": "pointing game"}


def write_film(
    folder: str | Path, *, seconds: float = 0.5, explanations: int = 12, cell: int = 128
) -> Path:
    """Write `evolution.gif` into the folder of a run's history, and return its path.

    A frame shows what was explained last, as it was then, with the epoch and the figures above; a
    map that shows nothing is labelled. The last frame stays for three seconds.

    Args:
        folder: what the monitor has written, `explanations`.
        seconds: how long a frame is shown.
        explanations: the most maps in a frame, the first ones.
        cell: the longer side of a picture, in pixels.

    Raises:
        FileNotFoundError: there is no history in the folder.
        ValueError: it has no record yet, or is damaged.
    """
    folder = Path(folder)
    history = History.load(folder)
    if not history.records:
        raise ValueError(f"{folder} has no record yet: a film needs at least one explanation")
    frames = [
        Image.fromarray(frame.permute(1, 2, 0).numpy())
        for frame in film_frames(history, explanations, cell)
    ]
    milliseconds = [round(1000 * seconds)] * (len(frames) - 1) + [3000]
    # The colours of one frame are those of all: with a palette for each, flat areas would flicker.
    palette = _palette(frames)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    path = folder / "evolution.gif"
    write_whole(path, content.getvalue())
    return path


def film_frames(
    history: History, explanations: int = 12, cell: int = 128
) -> Iterator[UInt8[Tensor, "3 height width"]]:
    """Yield a picture for each record, all of one size."""
    last = history.records[-1]
    pairs = list(zip(last.images, last.targets, strict=True))[:explanations]
    images = torch.from_numpy(history.images[[image for image, _ in pairs]])
    images = images.permute(0, 3, 1, 2).float() / 255
    for record in history.records:
        places = {
            pair: place
            for place, pair in enumerate(zip(record.images, record.targets, strict=True))
        }
        maps = np.zeros((len(pairs), *history.maps.shape[1:]), dtype=np.uint8)
        captions = []
        for n, pair in enumerate(pairs):
            place = places.get(pair)
            name = history.class_names.get(pair[1], f"class {pair[1]}")
            if place is None:
                captions.append(f"{name}\nnot explained")
                continue
            maps[n] = history.maps[record.first + place]
            captions.append(f"{name}\n{record.scores[place]:.2f}")
        enlarged = interpolate(
            torch.from_numpy(maps)[:, None] / 255, images.shape[2:], mode="bilinear"
        )
        yield heatmap_grid(images, enlarged[:, 0], captions, title=_title(record), cell=cell)


def _title(record: Record) -> str:
    figures = [
        f"{shown} {record.values[name]:.2f}"
        for name, shown in _FIGURES.items()
        if math.isfinite(record.values.get(name, math.nan))
    ]
    return " · ".join([record.title, *figures])


def _palette(frames: list[Image.Image]) -> Image.Image:
    """Return 256 colours for the first, the middle and the last frame."""
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    strip = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for n, frame in enumerate(chosen):
        strip.paste(frame, (0, n * frames[0].height))
    # By octree, whose error is half of the default's and which is ten times as fast.
    return strip.quantize(256, Image.Quantize.FASTOCTREE)
