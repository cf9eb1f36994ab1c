"""Text on pictures: fonts, colours, shortening and badges."""

import re
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

PAPER, INK, MUTED = (20, 22, 27), (238, 240, 244), (156, 163, 175)

VERDICTS = {"missed": (245, 180, 80), "false positive": (248, 113, 113)}

BEST = (134, 239, 172)


def lines_of(text: str) -> list[str]:
    """Return the one or two lines of a caption, with single spaces."""
    return [" ".join(part.split()) for part in text.strip().split("\n", 1)]


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
    if font.getlength(text) <= width:
        return text
    score = re.search(r"\s[-+.\d]+%?$", text) if keep_score else None
    tail = score.group() if score and font.getlength(score.group()) < width / 2 else ""
    kept = text.removesuffix(tail)
    while kept and font.getlength(f"{kept}…{tail}") > width:
        kept = kept[:-1].rstrip()
    return f"{kept}…{tail}"


def badge(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, font: ImageFont.FreeTypeFont
) -> None:
    """Label the panel whose lower left corner is given."""
    pad = round(font.size / 3)
    x, y = corner[0] + pad, corner[1] - pad
    _, top, right, _ = draw.textbbox((x + pad, y - pad), text, font, "ls")
    draw.rectangle((x, top - pad, right + pad, y), PAPER)
    draw.text((x + pad, y - pad), text, INK, font, "ls")
