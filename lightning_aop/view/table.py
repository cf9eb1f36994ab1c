"""Many methods side by side: a row for each image, a column for each method."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.types import Images
from lightning_aop.view.grid import colour_bar, panels_of
from lightning_aop.view.heat import Picture, displayable
from lightning_aop.view.text import (
    BEST,
    INK,
    MUTED,
    PAPER,
    badge,
    font_of,
    lines_of,
    shortened,
    wrapped,
)


def map_table(
    images: Images,
    maps: Sequence[Sequence[Float[Tensor, "h w"] | None]],
    columns: Sequence[str],
    captions: Sequence[Sequence[str]],
    headings: Sequence[str],
    *,
    title: str | None = None,
    best: Sequence[int | None] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cell: int = 160,
    abreast: int = 13,
    percentile: int | None = None,
) -> Picture:
    """Draw several maps of every image: a row for each image, a column for each way to explain.

    More columns than `abreast` go into further bands below, each with the images at its left.

    Args:
        images: (b, c, h, w), as ``displayable`` takes them.
        maps: for each image its m maps (h, w) in [0, 1], as ``overlay`` takes them; None leaves a place
            that says "no map".
        columns: m texts of one or two lines, the second muted.
        captions: for each image m texts of one or two lines, below its maps.
        headings: for each image a text of one or two lines, below it.
        title: a line at the top; what follows a newline is muted, in as many lines as it needs.
        best: for each image the column whose caption is set off in colour, or None.
        mean: see ``displayable``.
        std: see ``displayable``.
        cell: longer side of a panel in pixels.
        abreast: columns in a band, at most.
        percentile: draw each map as a share of this percentile of its own values, and say so beside the
            colour bar: in the maps of gradients a few pixels outshine all others, which would be black.

    Returns:
        (3, H, W) uint8 on the CPU.

    Raises:
        ValueError: the numbers of images, maps, columns, captions and headings don't fit each other.
    """
    count, many = len(images), len(columns)
    for name, rows in (("maps", maps), ("captions", captions)):
        if len(rows) != count or any(len(row) != many for row in rows):
            raise InvalidValueError(
                f"{name} must hold {many} entries, one a column, for each of the {count} images, got "
                f"{[len(row) for row in rows]}"
            )
    if len(headings) != count or count == 0 or many == 0:
        raise InvalidValueError(
            f"headings must hold a text for each of the {count} images (1 or more), of {many} columns "
            f"(1 or more), got {len(headings)}"
        )
    pictures = displayable(images, mean, std)
    blank = pictures.new_zeros(pictures.shape[2:])
    flat = torch.stack([blank if m is None else m.to(blank) for row in maps for m in row])
    scale = "saliency"
    if percentile is not None:
        scale = f"saliency, as a share of each map's {percentile}th percentile"
        high = flat.flatten(1).nan_to_num(0.0).quantile(percentile / 100, dim=1)
        # A map with fewer warm pixels than that is seen anyway.
        high = torch.where(high > 0, high, 1.0)[:, None, None]
        flat = (flat / high).clamp(max=1)
    members = torch.arange(len(flat)).view(-1, many).tolist()
    panels, labels = panels_of(pictures, flat, cell, None, members)
    labels = [
        "no map" if m is None else label
        for m, label in zip((m for row in maps for m in row), labels, strict=True)
    ]
    high, wide = panels.shape[2:4]
    em = min(max(round(max(high, wide) / 13), 11), 24)
    font, bold = font_of("DejaVuSans.ttf", em), font_of("DejaVuSans-Bold.ttf", em)
    large, small = (
        font_of("DejaVuSans-Bold.ttf", round(1.3 * em)),
        font_of("DejaVuSans.ttf", em - 1),
    )
    margin, line, gap = round(1.6 * em), round(1.4 * em), max(em // 2, 4)
    texts = [[lines_of(text) for text in row] for row in captions]
    heads, names = [lines_of(text) for text in headings], [lines_of(text) for text in columns]
    step, band = wide + gap, math.ceil(many / math.ceil(many / abreast))
    head_high = line * max(map(len, names)) + em // 2
    row_high = high + em // 2 + line * max(map(len, itertools.chain(heads, *texts))) + em
    bands = [range(i, min(i + band, many)) for i in range(0, many, band)]
    bar_w, bar_h = 12 * em, round(0.7 * em)
    band_high = head_high + count * row_high + em
    width = (band + 1) * step + em - gap + 2 * margin
    name, _, note = (title or "").partition("\n")
    name = shortened(" ".join(name.split()), large, width - 2 * margin)
    notes = wrapped(note, font, width - 2 * margin)
    top = margin + (2 * line if name else 0) + (len(notes) * line + line // 2 if notes else 0)
    canvas = Image.new("RGB", (width, top + len(bands) * band_high + bar_h + 2 * margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), name, INK, large, "lt")
    for row, text in enumerate(notes):
        draw.text((margin, margin + 3 * line // 2 + row * line), text, MUTED, font, "la")

    def write(
        lines: Sequence[str], x: int, y: int, first: ImageFont.FreeTypeFont, colour: Any = INK
    ) -> None:
        for row, text in enumerate(lines):
            face = small if row else first
            draw.text(
                (x, y + row * line),
                shortened(text, face, wide),
                MUTED if row else colour,
                face,
                "la",
            )

    for number, shown in enumerate(bands):
        upper = top + number * band_high
        for place, j in enumerate(shown):
            write(names[j], margin + (place + 1) * step + em, upper, bold)
        for i in range(count):
            y = upper + head_high + i * row_high
            canvas.paste(Image.fromarray(panels[i * many, 0]), (margin, y))
            write(heads[i], margin, y + high + em // 2, bold)
            for place, j in enumerate(shown):
                x = margin + (place + 1) * step + em
                canvas.paste(Image.fromarray(panels[i * many + j, 1]), (x, y))
                if labels[i * many + j]:
                    badge(draw, (x, y + high), labels[i * many + j], small)
                colour = BEST if best is not None and best[i] == j else INK
                write(texts[i][j], x, y + high + em // 2, font, colour)
    x, y = width - margin - bar_w, canvas.height - margin - bar_h
    colour_bar(canvas, (x, y), (bar_w, bar_h), em, shortened(scale, font, x - margin - em))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()
