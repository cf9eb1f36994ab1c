"""Tensors in, picture out: heat overlays and captioned grids of them.

Nothing here uses a random number, a figure or a backend. matplotlib lends only its colour table and
its font, and is imported at the first drawing.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_aop.files import write_whole
from lightning_aop.types import Images, Maps

__all__ = ["heatmap_grid", "overlay", "write_png"]

RGB: TypeAlias = Float[Tensor, "b 3 h w"]
Picture: TypeAlias = UInt8[Tensor, "3 H W"]
Panel: TypeAlias = Literal["overlay", "map", "curves"]
PANELS: tuple[Panel, ...] = get_args(Panel)

# The overlay keeps this much of the photo's colour and brightness. The untouched photo stands beside
# it, and a greyer, darker one cannot be mistaken for heat (an orange cat is not a hot region).
SATURATION, BRIGHTNESS = 0.2, 0.75
# At value 1 a share of the photo stays, so edges remain visible under the peak. The exponent below 1
# is for middling heat, whose colours are dark and would drown in the photo otherwise.
_OPACITY, EXPONENT = 0.85, 0.75
_LUMA = (0.299, 0.587, 0.114)

_LARGEST = 224  # longer side of a panel in pixels, unless `cell` asks for another
_SMALLEST = 32
PAPER, _INK, _MUTED = (20, 22, 27), (238, 240, 244), (156, 163, 175)
_VERDICTS = {"missed": (245, 180, 80), "false positive": (248, 113, 113)}
_BEST = (134, 239, 172)
# Deletion and insertion: apart by brightness too, and none of them a colour of the maps.
_GAMES = {"deletion": (248, 150, 160), "insertion": (120, 200, 255)}
_CHART, _AXIS = (31, 34, 41), (75, 80, 90)
# Cyan is none of inferno's colours.
_LINE = (0.3, 0.95, 1.0)
_ABREAST = 5  # overlays of one group in a row


def displayable(
    images: Images, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> RGB:
    """Turn network inputs into pictures to look at.

    Args:
        images: (b, c, h, w), any range. One channel becomes grey, of two the first is shown as grey,
            of more than three the first three are shown as red, green and blue.
        mean: one number a channel, to undo ``(x - mean) / std``; needs ``std``.
        std: one positive number a channel; needs ``mean``.

    Returns:
        (b, 3, h, w) float32 in [0, 1] on the device of ``images``. With ``mean`` and ``std`` the
        normalisation is undone and the rest is clipped. Without them an image that lies in [0, 1]
        (give or take 1/255, which a resize may overshoot) is kept, and any other is stretched from
        its own minimum and maximum over all shown channels; a constant one becomes mid-grey. NaN and
        infinite pixels become 0.

    Raises:
        ValueError: ``images`` is not 4-D with at least one channel, only one of ``mean`` and ``std``
            is given, their length is not c, or a ``std`` is not positive.
    """
    if images.ndim != 4 or images.shape[1] == 0:
        raise ValueError(
            f"images must have shape [B, C, H, W] with C above 0, got {list(images.shape)}: "
            "add what is missing, a single image becomes a batch with images[None]"
        )
    x = images.detach().float()
    finite = x.isfinite()
    x = torch.where(finite, x, 0.0)
    if mean is not None and std is not None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != x.shape[1]:
                raise ValueError(
                    f"{name} must hold one number for each of the images' {x.shape[1]} channels, "
                    f"got {len(values)}, {list(values)}: give the {name} the images were normalised "
                    "with"
                )
        if min(std) <= 0:
            raise ValueError(
                f"std must be above 0 in every channel, got {list(std)}: give the std the images "
                "were normalised with, or neither mean nor std"
            )
        x = x * x.new_tensor(std).view(-1, 1, 1) + x.new_tensor(mean).view(-1, 1, 1)
    elif mean is not None or std is not None:
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(
            f"mean and std must come together, got {given} but no {missing}: "
            f"give {missing} too, or neither"
        )
    shown = 3 if x.shape[1] >= 3 else 1
    x, finite = x[:, :shown], finite[:, :shown]
    if mean is None and x.numel():
        low = torch.where(finite, x, math.inf).amin((1, 2, 3), keepdim=True)
        high = torch.where(finite, x, -math.inf).amax((1, 2, 3), keepdim=True)
        kept = (low >= -1 / 255) & (high <= 1 + 1 / 255)
        stretched = torch.where(high > low, (x - low) / (high - low), 0.5)
        x = torch.where(kept, x, stretched)
    return torch.where(finite, x, 0.0).clamp(0, 1).expand(-1, 3, -1, -1)


@cache
def _colours() -> Float[Tensor, "256 3"]:
    import matplotlib

    table = matplotlib.colormaps["inferno"](np.arange(256))[:, :3]
    return torch.from_numpy(table.astype(np.float32))


def overlay(images: RGB, maps: Maps) -> RGB:
    """Lay heat over pictures: equal values get equal colours, in every map and at every epoch.

    The colours are inferno. It is perceptually uniform (equal steps of value look like equal steps),
    its lightness only ever rises, so it still reads in grey print and with any colour blindness, and
    it ends in bright yellow, which glows on a darkened photo. Magma ends in a pale pink that is
    weaker on skin and sky; turbo's lightness peaks in the middle, so its red maximum looks darker
    than half heat; jet has that fault and false edges besides.

    With v a map's value, the photo is made greyer and darker,
    ``base = 0.75 * (0.2 * image + 0.8 * grey)``, and heat covers a share ``a = 0.85 * v ** 0.75`` of
    it: ``out = (1 - a) * base + a * inferno(v)``. Cold regions show ``base`` alone.

    Args:
        images: (b, 3, h, w) in [0, 1].
        maps: (b, h, w) in [0, 1], never stretched here; values outside are clipped. NaN and
            infinite values are drawn as no heat.

    Returns:
        (b, 3, h, w) float32 in [0, 1] on the device of ``maps``.

    Raises:
        ValueError: ``images`` and ``maps`` differ in b, h or w, or have other dimensions.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must have shape [B, 3, H, W], got {list(images.shape)}: "
            "make pictures of network inputs with displayable()"
        )
    _check_same_size(images, maps)
    heat = _heat(maps)
    image = images.detach().to(heat)
    grey = (image * image.new_tensor(_LUMA).view(-1, 1, 1)).sum(1, keepdim=True)
    base = BRIGHTNESS * torch.lerp(grey.expand_as(image), image, SATURATION)
    return torch.lerp(base, _coloured(heat), _OPACITY * heat[:, None] ** EXPONENT)


def _coloured(heat: Maps) -> RGB:
    """Return the colour of each value in [0, 1]."""
    level = (heat * 256).long().clamp(max=255)
    return _colours().to(heat.device)[level].movedim(-1, 1)


def heatmap_grid(
    images: Images,
    maps: Maps,
    captions: Sequence[str],
    *,
    title: str | None = None,
    columns: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cell: int | None = None,
    outlines: Bool[Tensor, "b h w"] | None = None,
    groups: Sequence[int] | None = None,
    headings: Sequence[str] | None = None,
    panels: Sequence[Panel] = ("overlay",),
    curves: Float[Tensor, "b 2 points"] | None = None,
) -> Picture:
    """Draw every sample as "input | overlay" with its caption, and one colour bar for all.

    Args:
        images: (b, c, h, w), as ``displayable`` takes them.
        maps: (b, h, w) in [0, 1], as ``overlay`` takes them. One that is zero everywhere is labelled
            "blank map" on its overlay, and one with a NaN or infinite value "NaN map".
        captions: b texts of one or two lines (split at a newline). A line too long for its place is
            shortened with an ellipsis; a number at its end, such as a score, is kept. A second line
            is muted, but one that begins with "missed" is amber, with "false positive" a soft red.
        title: one line at the top.
        columns: pairs in a row; by default chosen for a picture about 1.6 times as wide as high.
        mean: see ``displayable``.
        std: see ``displayable``.
        cell: longer side of a panel in pixels, at least 32. By default larger images are reduced to
            224, smaller ones are enlarged by the largest whole factor that stays within 224.
        outlines: (b, h, w), where the class of each sample is; its border is drawn on both panels
            and explained beside the colour bar. An empty mask has none, and none runs along the edge
            of the picture.
        groups: a number for each sample; neighbours with the same number show the same image. They
            are drawn as one input with all their outlines, beside an overlay for each with its caption
            below it. Groups are laid out for a picture about 1.6 times as wide as high.
        headings: a text of one or two lines for each group, below its input, shortened without keeping
            a number; needs ``groups``.
        panels: what stands beside the input: "overlay"; "map", the heat alone; "curves", a chart of
            deletion and insertion.
        curves: of each sample the scores in deletion and in insertion, in equal steps from nothing to
            all, as ``metrics.functional`` gives them; NaN for a sample without.

    Returns:
        (3, H, W) uint8 on the CPU, reached by one copy from the device of ``maps``.

    Raises:
        ValueError: ``images``, ``maps``, ``captions``, ``outlines``, ``groups`` or ``headings`` differ
            in number or size, there is no sample, ``columns`` is below 1 or given with ``groups``,
            ``headings`` come without them, ``cell`` is below 32, ``mean`` and ``std`` are wrong, or
            ``panels`` are unknown, none, or "curves" without ``curves``.
    """
    pictures = displayable(images, mean, std)
    _check_same_size(pictures, maps)
    _check_layout(images, captions, columns, cell, outlines, groups, headings)
    _check_panels(panels, curves, len(images))
    count = len(pictures)
    members = _runs(groups) if groups is not None else [[i] for i in range(count)]
    drawn, labels = _panels(pictures, maps, cell, outlines, members, panels)
    high, wide = drawn.shape[2:4]
    em = min(max(round(max(high, wide) / 13), 11), 24)
    font, bold = _font("DejaVuSans.ttf", em), _font("DejaVuSans-Bold.ttf", round(1.15 * em))
    small = _font("DejaVuSans.ttf", max(round(0.8 * em), 10))

    seam, margin, line = max(em // 4, 2), round(1.6 * em), round(1.4 * em)
    texts = [_lines(text) for text in captions]
    heads = [_lines(text) for text in headings or [""] * len(members)]
    rows = max(map(len, texts + heads))
    # A label may be wider than its panel, and must not run into the next tile or, in a group, panel.
    last = max(wide, math.ceil(small.getlength("blank map")) + em)
    first = wide + seam  # from the input to the first sample
    if groups is not None:
        # Of each caption a verdict must fit, and with it a score.
        last = max(last, math.ceil(font.getlength("false positive")) + em // 4)
        first = last + em // 2
    head_width, strip = last - em // 4, len(panels) * (wide + seam) - seam
    last = max(last, strip)
    step = last + em // 2  # from one sample of a group to the next
    down = high + em // 2 + line * rows + em
    # As many in each row of a group that is too long for one.
    across = [math.ceil(len(s) / math.ceil(len(s) / _ABREAST)) for s in members]
    sizes = [
        (first + (n - 1) * step + last + margin, math.ceil(len(samples) / n) * down)
        for n, samples in zip(across, members, strict=True)
    ]
    bar_w, bar_h = 12 * em, round(0.7 * em)
    note = "outline: annotated mask" if outlines is not None else ""
    legend_w = math.ceil(font.getlength("saliency")) + em + bar_w
    legend_w += math.ceil(font.getlength(note)) + 5 * em if note else 0
    top, bottom = margin + (2 * line if title else 0), bar_h + em + margin

    def size(limit: int) -> tuple[int, int]:
        places = _flow(sizes, limit)
        right = max(x + w for (x, _), (w, _) in zip(places, sizes, strict=True))
        under = max(y + h for (_, y), (_, h) in zip(places, sizes, strict=True))
        return max(right - margin, legend_w) + 2 * margin, top + under + bottom

    if columns is not None or groups is None:
        columns = min(columns or _pleasing(count, lambda n: size(n * sizes[0][0])), count)
        limit = columns * sizes[0][0]
    else:
        limit = _pleasing_limit(sizes, size)
    canvas = Image.new("RGB", size(limit), PAPER)
    content, foot = canvas.width - 2 * margin, canvas.height - bottom
    draw = ImageDraw.Draw(canvas)
    if title:
        text = _shortened(" ".join(title.split()), bold, content)
        draw.text((margin, margin), text, _INK, bold, "lt")

    def write(lines: Sequence[str], x: int, y: int, width: float, keep_score: bool = True) -> None:
        for row, text in enumerate(lines):
            colour = _VERDICTS.get(text.split(" · ")[0], _MUTED) if row else _INK
            text = _shortened(text, font, width, keep_score)
            draw.text((x, y + row * line), text, colour, font, "la")

    for place, samples, head, n in zip(_flow(sizes, limit), members, heads, across, strict=True):
        left, upper = margin + place[0], top + place[1]
        below = high + em // 2
        canvas.paste(Image.fromarray(drawn[samples[0], 0]), (left, upper))
        if groups is not None:
            # A heading lists classes: its last score belongs to the last of them, not to the first.
            write(head, left, upper + below, head_width, keep_score=False)
        for k, i in enumerate(samples):
            x, y = left + first + k % n * step, upper + k // n * down
            pixels = iter(drawn[i, 1:])
            for column, panel in enumerate(panels):
                corner = x + column * (wide + seam), y
                if panel == "curves":
                    assert curves is not None
                    _curve_panel(canvas, corner, (wide, high), curves[i], small)
                    continue
                canvas.paste(Image.fromarray(next(pixels)), corner)
                if labels[i]:
                    _badge(draw, (corner[0], y + high), labels[i], small)
            if groups is None:
                write(texts[i], left, y + below, first + last)
            else:
                write(texts[i], x, y + below, last - em // 4)

    _colour_bar(canvas, (margin + content - bar_w, foot), (bar_w, bar_h), em)
    if note:
        colour = tuple(round(255 * c) for c in _LINE)
        middle = foot + bar_h // 2
        draw.line((margin, middle, margin + 2 * em, middle), colour, max(em // 6, 2))
        draw.text((margin + round(2.7 * em), middle), note, _INK, font, "lm")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _colour_bar(
    canvas: Image.Image,
    corner: tuple[int, int],
    size: tuple[int, int],
    em: int,
    name: str = "saliency",
) -> None:
    """Draw the scale of the colours; its name stands to the left of `corner`."""
    (x, y), (width, height), draw = corner, size, ImageDraw.Draw(canvas)
    font, small = _font("DejaVuSans.ttf", em), _font("DejaVuSans.ttf", max(round(0.8 * em), 10))
    # The bar is an overlay on mid-grey, so it shows the colours as they look on a picture.
    ramp = torch.linspace(0, 1, width, device="cpu", dtype=torch.float32).expand(1, height, -1)
    bar = overlay(torch.full_like(ramp, 0.5)[:, None].expand(-1, 3, -1, -1), ramp)
    canvas.paste(Image.fromarray(_bytes(bar)[0].permute(1, 2, 0).numpy()), (x, y))
    draw.text((x - em, y + height / 2), name, _INK, font, "rm")
    for share, text, anchor in ((0.0, "0", "la"), (0.5, "0.5", "ma"), (1.0, "1", "ra")):
        draw.text((x + share * width, y + height + em // 4), text, _MUTED, small, anchor)


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
        title: one line at the top.
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
            raise ValueError(
                f"{name} must hold {many} entries, one a column, for each of the {count} images, got "
                f"{[len(row) for row in rows]}"
            )
    if len(headings) != count or count == 0 or many == 0:
        raise ValueError(
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
    panels, labels = _panels(
        pictures.repeat_interleave(many, dim=0), flat, cell, None, [[i] for i in range(len(flat))]
    )
    labels = [
        "no map" if m is None else label
        for m, label in zip((m for row in maps for m in row), labels, strict=True)
    ]
    high, wide = panels.shape[2:4]
    em = min(max(round(max(high, wide) / 13), 11), 24)
    font, bold = _font("DejaVuSans.ttf", em), _font("DejaVuSans-Bold.ttf", em)
    large, small = _font("DejaVuSans-Bold.ttf", round(1.3 * em)), _font("DejaVuSans.ttf", em - 1)
    margin, line, gap = round(1.6 * em), round(1.4 * em), max(em // 2, 4)
    texts = [[_lines(text) for text in row] for row in captions]
    heads, names = [_lines(text) for text in headings], [_lines(text) for text in columns]
    step, band = wide + gap, math.ceil(many / math.ceil(many / abreast))
    head_high = line * max(map(len, names)) + em // 2
    row_high = high + em // 2 + line * max(map(len, itertools.chain(heads, *texts))) + em
    bands = [range(i, min(i + band, many)) for i in range(0, many, band)]
    bar_w, bar_h = 12 * em, round(0.7 * em)
    top = margin + (2 * line if title else 0)
    band_high = head_high + count * row_high + em
    width = (band + 1) * step + em - gap + 2 * margin
    canvas = Image.new("RGB", (width, top + len(bands) * band_high + bar_h + 2 * margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        text = _shortened(" ".join(title.split()), large, width - 2 * margin)
        draw.text((margin, margin), text, _INK, large, "lt")

    def write(
        lines: Sequence[str], x: int, y: int, first: ImageFont.FreeTypeFont, colour: Any = _INK
    ) -> None:
        for row, text in enumerate(lines):
            face = small if row else first
            draw.text(
                (x, y + row * line),
                _shortened(text, face, wide),
                _MUTED if row else colour,
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
                    _badge(draw, (x, y + high), labels[i * many + j], small)
                colour = _BEST if best is not None and best[i] == j else _INK
                write(texts[i][j], x, y + high + em // 2, font, colour)
    x, y = width - margin - bar_w, canvas.height - margin - bar_h
    _colour_bar(canvas, (x, y), (bar_w, bar_h), em, _shortened(scale, font, x - margin - em))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _lines(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.strip().split("\n", 1)]


def _runs(groups: Sequence[int]) -> list[list[int]]:
    """Return the samples of each group, neighbours with the same number."""
    found = itertools.groupby(range(len(groups)), key=lambda i: groups[i])
    return [list(samples) for _, samples in found]


def _flow(sizes: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Place tiles of (width, height) left to right in rows no wider than `limit`, if one fits."""
    places, x, y, row = [], 0, 0, 0
    for width, height in sizes:
        if x and x + width > limit:
            x, y, row = 0, y + row, 0
        places.append((x, y))
        x, row = x + width, max(row, height)
    return places


def _unpleasant(size: tuple[int, int]) -> float:
    """Return how far a canvas is from 1.6 : 1."""
    return abs(math.log(size[0] / size[1] / 1.6))


def _pleasing_limit(
    sizes: Sequence[tuple[int, int]], size: Callable[[int], tuple[int, int]]
) -> int:
    """Choose the width of rows that brings the canvas near 1.6 : 1 and leaves little of it empty."""
    filled = sum(width * height for width, height in sizes)

    def unpleasant(limit: int) -> float:
        width, height = size(limit)
        return _unpleasant((width, height)) + 1 - filled / (width * height)

    widths = list(itertools.accumulate((width for width, _ in sizes), initial=0))
    limits = {end - start for start, end in itertools.combinations(widths, 2)}
    return min(sorted(limits), key=unpleasant)


def _check_layout(
    images: Images,
    captions: Sequence[str],
    columns: int | None,
    cell: int | None,
    outlines: Tensor | None,
    groups: Sequence[int] | None,
    headings: Sequence[str] | None,
) -> None:
    count = len(images)
    if isinstance(captions, str) or len(captions) != count:
        given = f"the text {captions!r}" if isinstance(captions, str) else len(captions)
        raise ValueError(
            f"captions must hold {count} texts, one an image, got {given}: "
            "give a list of one text for each image, empty where there is nothing to say"
        )
    if images.numel() == 0:
        raise ValueError(
            f"images must hold at least one image of at least one pixel, got {list(images.shape)}: "
            "draw nothing when there is nothing to draw"
        )
    if columns is not None and columns < 1:
        raise ValueError(
            f"columns must be 1 or more, got {columns}: leave it out to have it chosen"
        )
    if cell is not None and cell < _SMALLEST:
        raise ValueError(
            f"cell must be {_SMALLEST} pixels or more, got {cell}: leave it out to have it chosen"
        )
    expected = [count, *images.shape[2:]]
    if outlines is not None and (list(outlines.shape) != expected or outlines.dtype != torch.bool):
        raise ValueError(
            f"outlines must be torch.bool of shape {expected}, got {outlines.dtype} of shape "
            f"{list(outlines.shape)}: give one mask an image, resized to its height and width"
        )
    if groups is not None and len(groups) != count:
        raise ValueError(
            f"groups must hold {count} numbers, one an image, got {len(groups)}: "
            "give images that belong together the same number"
        )
    if groups is not None and columns is not None:
        raise ValueError(f"columns={columns} counts pairs, and groups have none: leave it out")
    if headings is None:
        return
    if groups is None:
        raise ValueError(
            f"headings must come with groups, got {len(headings)} but no groups: "
            "give groups too, or write the texts into captions"
        )
    wanted = len(_runs(groups))
    if isinstance(headings, str) or len(headings) != wanted:
        given = f"the text {headings!r}" if isinstance(headings, str) else len(headings)
        raise ValueError(
            f"headings must hold {wanted} texts, one a group, got {given}: "
            "give a list of one text for each group, empty where there is nothing to say"
        )


def _check_panels(panels: Sequence[str], curves: Tensor | None, count: int) -> None:
    wrong = [panel for panel in panels if panel not in PANELS]
    if wrong or not panels or isinstance(panels, str):
        raise ValueError(
            f"panels must be one or more of {', '.join(map(repr, PANELS))}, got {panels!r}: "
            'give a list such as ["overlay", "map"]'
        )
    if "curves" in panels and (curves is None or list(curves.shape[:2]) != [count, 2]):
        raise ValueError(
            f"curves must have shape [{count}, 2, points] to be drawn, got "
            f"{None if curves is None else list(curves.shape)}: give deletion and insertion of each "
            "image, NaN where there are none"
        )


def _curve_panel(
    canvas: Image.Image,
    corner: tuple[int, int],
    size: tuple[int, int],
    curves: Float[Tensor, "2 points"],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Draw deletion and insertion over the share of pixels moved, with their AUCs."""
    (x, y), (width, height), pad = corner, size, round(font.size / 2)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((x, y, x + width - 1, y + height - 1), _CHART)
    if not curves.isfinite().all():
        draw.text((x + width / 2, y + height / 2), "not measured", _MUTED, font, "mm")
        return
    line = round(1.3 * font.size)
    left, right, top, bottom = x + pad, x + width - pad, y + pad + 2 * line, y + height - pad
    # A probability has the whole range from 0 to 1, so that charts are comparable.
    low, high = min(0.0, float(curves.min())), max(1.0, float(curves.max()))
    roomy = bottom - top > 2 * line  # in a flat picture there is room for the numbers only
    if roomy:
        draw.line((left, top, left, bottom, right, bottom), _AXIS, 1)
    share = np.linspace(left, right, curves.shape[1])
    for row, (curve, (name, colour)) in enumerate(zip(curves, _GAMES.items(), strict=True)):
        if roomy:
            heights = bottom - (curve.double().numpy() - low) / (high - low) * (bottom - top)
            draw.line(list(zip(share, heights, strict=True)), colour, max(width // 96, 1), "curve")
        area = float(torch.trapezoid(curve.double())) / (len(curve) - 1)
        text = f"{name} {area:.2f}"
        if font.getlength(text) > width - 2 * pad:
            text = f"{area:.2f}"
        draw.text((left, y + pad // 2 + row * line), text, colour, font, "la")


def write_png(image: Picture, path: str | Path) -> Path:
    """Write a picture as a PNG file; a reader never sees half a file.

    Args:
        image: (3, H, W) uint8 on any device.
        path: where to; missing folders are made and an existing file is replaced.

    Returns:
        ``path`` as a ``Path``.

    Raises:
        ValueError: ``image`` has another shape or dtype.
        OSError: the file cannot be written; an existing one is left as it was.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"image must be torch.uint8 of shape [3, H, W], got {image.dtype} of shape "
            f"{list(image.shape)}: give what heatmap_grid() returned"
        )
    target, content = Path(path), io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy()).save(content, "PNG")
    write_whole(target, content.getvalue())
    return target


def _check_same_size(images: RGB, maps: Maps) -> None:
    expected = [images.shape[0], *images.shape[2:]]
    if list(maps.shape) != expected:
        raise ValueError(
            f"maps must have shape {expected} for images of shape {list(images.shape)}, got "
            f"{list(maps.shape)}: give one map an image, resized to the images' height and width"
        )


def _heat(maps: Maps) -> Maps:
    return maps.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)


def _bytes(pictures: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    return (pictures * 255).round().byte()


def _panels(
    pictures: RGB,
    maps: Maps,
    cell: int | None,
    outlines: Bool[Tensor, "b h w"] | None,
    members: Sequence[Sequence[int]],
    panels: Sequence[Panel] = ("overlay",),
) -> tuple[UInt8[np.ndarray, "b n y x 3"], list[str]]:
    """Draw the input and the panels that have pixels, and name the maps that show nothing."""
    longer = max(pictures.shape[2:])
    scale = cell / longer if cell else _LARGEST / longer
    if cell is None and scale > 1:
        scale = math.floor(scale)
    heat = _heat(maps)
    state = torch.where(heat.amax((1, 2)) > 0, 0, 1)
    state = torch.where(maps.isfinite().all(2).all(1), state, 2)
    pictures, heat = _resized(pictures.to(heat), scale), _resized(heat[:, None], scale)[:, 0]
    kinds = {"overlay": lambda: overlay(pictures, heat), "map": lambda: _coloured(heat)}
    both = torch.stack([pictures, *(kinds[kind]() for kind in panels if kind in kinds)], 1)
    if outlines is not None:
        # Whole pixels when enlarged; when reduced, a thin or small object does not vanish.
        masks = F.adaptive_max_pool2d(outlines.to(heat), list(both.shape[-2:])) > 0
        group = [number for number, samples in enumerate(members) for _ in samples]
        where = torch.tensor(group, device=heat.device)
        # The input of a group stands for all of its samples.
        union = (
            torch.zeros_like(heat[: len(members)]).index_add(0, where, masks.to(heat))[where] > 0
        )
        both = _outlined(both, torch.stack([union, *[masks] * (both.shape[1] - 1)], 1))
    shown = _bytes(both.movedim(2, -1))
    # The states travel in the same buffer as the pixels, for every copy waits for the device.
    flat = torch.cat((shown.flatten(1), state.byte()[:, None]), 1).cpu().numpy()
    return flat[:, :-1].reshape(shown.shape), [("", "blank map", "NaN map")[i] for i in flat[:, -1]]


def _outlined(
    pictures: Float[Tensor, "b p 3 y x"], masks: Bool[Tensor, "b p y x"]
) -> Float[Tensor, "b p 3 y x"]:
    """Draw the inner border of each mask as a line with a dark halo, seen on any ground."""
    thick = max(round(max(masks.shape[2:]) / 112), 1)
    inner = 1 - _dilated(1 - masks.to(pictures), thick)  # beyond the picture there is no border
    line = masks & (inner < 0.5)
    halo = (_dilated(line.to(pictures), 1) > 0.5) & ~line
    colour = pictures.new_tensor(_LINE).view(3, 1, 1)
    shaded = torch.where(halo[:, :, None], 0.25 * pictures, pictures)
    return torch.where(line[:, :, None], colour, shaded)


def _dilated(x: Float[Tensor, "b p y x"], radius: int) -> Float[Tensor, "b p y x"]:
    return F.max_pool2d(x, 2 * radius + 1, stride=1, padding=radius)


def _resized(x: Float[Tensor, "b c h w"], scale: float) -> Float[Tensor, "b c H W"]:
    size = [max(round(side * scale), 1) for side in x.shape[2:]]
    if size == list(x.shape[2:]):
        return x
    if x.shape[1] == 3 and scale == int(scale):
        # Whole pixels stay what they are: smoothing a 32-pixel picture only blurs it.
        return F.interpolate(x, size, mode="nearest")
    # Not bicubic: its overshoot would invent heat beside a sharp edge.
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def _pleasing(count: int, size: Callable[[int], tuple[int, int]]) -> int:
    """Choose the columns that bring the canvas near 1.6 : 1 and leave few places empty."""

    def unpleasant(columns: int) -> float:
        return _unpleasant(size(columns)) + (-count % columns) / count

    return min(range(1, count + 1), key=unpleasant)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(str(path), size)  # Pillow 10.1 takes no Path


def _shortened(
    text: str, font: ImageFont.FreeTypeFont, width: float, keep_score: bool = True
) -> str:
    if font.getlength(text) <= width:
        return text
    score = re.search(r"\s[-+.\d]+%?$", text) if keep_score else None
    tail = score.group() if score and font.getlength(score.group()) < width / 2 else ""
    kept = text.removesuffix(tail)
    while kept and font.getlength(f"{kept}…{tail}") > width:
        kept = kept[:-1].rstrip()
    return f"{kept}…{tail}"


def _badge(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, font: ImageFont.FreeTypeFont
) -> None:
    """Label the panel whose lower left corner is given."""
    pad = round(font.size / 3)
    x, y = corner[0] + pad, corner[1] - pad
    _, top, right, _ = draw.textbbox((x + pad, y - pad), text, font, "ls")
    draw.rectangle((x, top - pad, right + pad, y), PAPER)
    draw.text((x + pad, y - pad), text, _INK, font, "ls")
