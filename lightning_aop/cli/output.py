"""Where a command writes its picture: refused before the work begins, in the format of the suffix."""

import io
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lightning_aop.errors import UserError
from lightning_aop.files import write_whole
from lightning_aop.types import Maps
from lightning_aop.view.heat import Picture, heat_of, overlay

RASTER = (".png", ".jpg", ".jpeg", ".webp")
"""The formats of `write_picture`."""

VECTOR = (".pdf", ".svg")
"""The formats of `write_figure` whose text stays text."""

FIGURE = (".png", *VECTOR)
"""The formats of `write_figure`."""


def check_output(path: Path, suffixes: Sequence[str], photos: Sequence[Path] = ()) -> None:
    """Make the folder of a picture, before minutes are spent on it.

    Raises:
        UserError: the suffix names no format, nothing can be written there, or it is one of the photos.
    """
    if any(path.exists() and photo.exists() and path.samefile(photo) for photo in photos):
        raise UserError(
            f"--output {path}: is one of the photos, and would be overwritten; name another file"
        )
    if path.is_dir():
        raise UserError(
            f"--output {path}: is a folder; name a file in it, such as {path / 'map.png'}"
        )
    if path.suffix.lower() not in suffixes:
        raise UserError(
            f"--output {path}: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: its folder can't be made ({error.strerror})") from error
    try:
        # Tried, for the rights of a folder say nothing of /proc.
        with tempfile.NamedTemporaryFile(dir=path.parent):
            writable = not path.exists() or os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"--output {path}: nothing can be written there; name another file")


def write_picture(picture: Picture, path: Path) -> None:
    """Write a picture in the format that the suffix names."""
    content = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())
    image.save(content, Image.registered_extensions()[path.suffix.lower()])
    write_whole(path, content.getvalue())


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the suffix names, with its text as text."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
        figure.savefig(content, format=path.suffix.lower().removeprefix("."))
    write_whole(path, content.getvalue())


@matplotlib.rc_context({"text.parse_math": False})  # a $ in a name begins no formula
def figure_of(
    pictures: Float[Tensor, "b 3 h w"], maps: Maps, captions: Sequence[str], title: str
) -> Figure:
    """Draw each picture, in [0, 1], beside its overlay, as a figure whose text can be searched.

    As in `heatmap_grid`, a map that shows nothing is named, and one colour bar stands for all.
    """
    columns = max(1, min(3, math.isqrt(len(pictures))))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(5 * columns, 2.9 * rows + 0.4), layout="constrained", dpi=200)
    figure.suptitle(title)
    axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    heated = overlay(pictures, maps)
    for axis in axes:
        axis.set_axis_off()
    for i, caption in enumerate(captions):
        for axis, shown in zip(axes[2 * i : 2 * i + 2], (pictures[i], heated[i]), strict=True):
            axis.imshow(shown.permute(1, 2, 0).numpy())
        axes[2 * i].set_title(caption, fontsize=9, loc="left")
        if not maps[i].isfinite().all() or not heat_of(maps[i : i + 1]).any():
            name = "blank map" if maps[i].isfinite().all() else "NaN map"
            options: Any = {"ha": "center", "va": "center", "transform": axes[2 * i + 1].transAxes}
            axes[2 * i + 1].text(0.5, 0.5, name, bbox={"facecolor": "white", "lw": 0}, **options)
    ramp = torch.linspace(0, 1, 256)[None, None]
    on_grey = overlay(torch.full((1, 3, 1, 256), 0.5), ramp)[0, :, 0].T
    scale = ScalarMappable(Normalize(0, 1), ListedColormap(on_grey.numpy()))
    where: Any = {"location": "bottom", "aspect": 40, "shrink": 0.5, "ticks": [0, 0.5, 1]}
    figure.colorbar(scale, ax=list(axes), label="saliency", **where)
    return figure
