"""Text on pictures: fonts, colours, shortening and badges."""

import re
from bisect import bisect_right
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

PAPER, INK, MUTED = (20, 22, 27), (238, 240, 244), (156, 163, 175)

VERDICTS = {"missed": (245, 180, 80), "false positive": (248, 113, 113)}

BEST = (134, 239, 172)

# Characters of one line that are looked at: to measure text takes as long as to write it.
_LONGEST = 2000


def lines_of(text: str) -> list[str]:
    """Return the lines of a caption, three at most, with single spaces."""
    return [" ".join(part.split()) for part in text.strip().split("\n", 2)]


@cache
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font that comes with matplotlib, `size` pixels high."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(str(path), size)  # Pillow 10.1 takes no Path


def shortened(
    text: str, font: ImageFont.FreeTypeFont, width: float, keep_score: bool = True
) -> str:
    """Return the text, cut so that it is no wider than `width` pixels."""
    if len(text) <= _LONGEST and font.getlength(text) <= width:
        return text
    score = re.search(r"\s[-+.\d]{1,20}%?$", text) if keep_score else None
    tail = score.group() if score and font.getlength(score.group()) < width / 2 else ""
    kept = text.removesuffix(tail)[:_LONGEST]

    def cut(length: int) -> str:
        return f"{kept[:length].rstrip()}…{tail}"

    # A longer text is a wider one: by bisection a dozen are measured, whatever the length.
    return cut(bisect_right(range(1, len(kept) + 1), width, key=lambda n: font.getlength(cut(n))))


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the text in lines no wider than `width` pixels; a word too long for one is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(shortened(word, font, width))
    return lines


def badge(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, font: ImageFont.FreeTypeFont
) -> None:
    """Label the panel whose lower left corner is given."""
    pad = round(font.size / 3)
    x, y = corner[0] + pad, corner[1] - pad
    _, top, right, _ = draw.textbbox((x + pad, y - pad), text, font, "ls")
    draw.rectangle((x, top - pad, right + pad, y), PAPER)
    draw.text((x + pad, y - pad), text, INK, font, "ls")
