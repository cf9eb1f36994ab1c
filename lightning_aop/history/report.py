"""A run's stored explanations as one page to open in a browser, with nothing to install or serve."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_aop.files import write_whole
from lightning_aop.history.store import History, Record
from lightning_aop.view.heat import BRIGHTNESS, EXPONENT, SATURATION

__all__ = ["write_report"]

Bytes = npt.NDArray[np.uint8]

_TEMPLATE = Path(__file__).with_name("page.html")
# The first is shown until another is chosen: it is that of all other pictures.
_PALETTES = ("inferno", "turbo")
_OUTLINE = (77, 242, 255)  # as in the pictures that loggers get
_PICTURE_QUALITY = 85
# Above this many bytes of one record's maps a page is slow to open and to send, and slight loss the
# lesser evil.
_LOSSLESS_BYTES = 80_000
_LOSSY_QUALITY = 80


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder that holds a run's explanations.

    The page is one file that needs no network and no server: it can be mailed, attached to a run or
    opened years later. A reader never sees half of it, so it may be rewritten while it is open.

    Args:
        folder: where the explanations were stored; the page is titled by the ends of its path.

    Returns:
        The path of the page.

    Raises:
        OSError: the explanations cannot be read, or the page cannot be written.
    """
    folder = Path(folder)
    path = folder / "report.html"
    title = " / ".join(part for part in folder.resolve().parts[-2:] if part != folder.anchor)
    write_whole(path, page(History.load(folder), title).encode())
    return path


def add_to_report(folder: str | Path, record: Record, maps: Bytes) -> None:
    """Add what was found last to the page of `write_report`, whatever its length in no more time.

    Args:
        folder: where the page lies.
        record: what is added.
        maps: uint8 [P, h, w], those of the record.

    Raises:
        OSError: there is no page, or it cannot be written.
    """
    with (Path(folder) / "report.html").open("r+b") as file:
        file.seek(0, io.SEEK_END)
        file.write(_record(record, maps).encode())


def page(history: History, title: str = "Explanations") -> str:
    """Return the page as HTML; a run without a single explanation has one too.

    The maps keep every value, as greyscale PNG, unless they are so many or so rugged that the page
    would grow unwieldy; then they are JPEG, which is off by a few in 255, and the page says so.

    Args:
        history: what was stored of the run.
        title: what the page is headed.
    """
    data = {
        "title": title,
        "configuration": history.configuration,
        "class_names": {str(index): name for index, name in history.class_names.items()},
        "picture_size": list(history.images.shape[1:3]),
        "images": [
            _url("jpeg", _encode(image, "JPEG", quality=_PICTURE_QUALITY, subsampling=0))
            for image in history.images
        ],
        "masks": [
            [picture, target, _url("png", _encode(mask, "PNG"))]
            for (picture, target), mask in history.masks.items()
        ],
        "outline": _OUTLINE,
        "palettes": _palettes(),
        "palette": _PALETTES[0],
        "saturation": SATURATION,
        "brightness": BRIGHTNESS,
        "exponent": EXPONENT,
    }
    return "".join(
        [
            _TEMPLATE.read_text(encoding="utf-8"),
            f'<script type="application/json" id="data">{_script_json(data)}</script>\n',
            *(_record(each, history.maps[each.first : each.end]) for each in history.records),
        ]
    )


def _record(record: Record, maps: Bytes) -> str:
    """Return the page's line about one time."""
    sheet, columns = _sheet(maps)
    kind, file = "png", _encode(sheet, "PNG")
    if len(file) > _LOSSLESS_BYTES:
        kind, file = "jpeg", _encode(sheet, "JPEG", quality=_LOSSY_QUALITY)
    data = {
        "step": record.step,
        "epoch": record.epoch,
        "title": record.title,
        "values": record.values,
        "images": record.images,
        "targets": record.targets,
        "scores": record.scores,
        "blank": record.blank,
        "predicted": record.predicted,
        "verdicts": record.verdicts,
        "drift": record.drift,
        "deletion_auc": record.deletion_auc,
        "insertion_auc": record.insertion_auc,
        "controls": record.controls,
        "columns": columns,
        "map_size": list(maps.shape[1:]),
        "sheet": _url(kind, file),
        "lossy": kind == "jpeg",
    }
    return f'<script type="application/json" class="record">{_script_json(data)}</script>\n'


def _sheet(maps: Bytes) -> tuple[Bytes, int]:
    """Lay maps side by side in rows; return the sheet and how many are in a row."""
    count = len(maps)
    height, width = maps.shape[1:3]
    columns = max(1, math.ceil(math.sqrt(count)))
    rows = max(1, math.ceil(count / columns))
    if not height or not width:
        return np.zeros((1, 1), np.uint8), columns
    tiles = np.zeros((rows * columns, height, width), np.uint8)
    tiles[:count] = maps
    sheet = tiles.reshape(rows, columns, height, width).swapaxes(1, 2)
    return sheet.reshape(rows * height, columns * width), columns


def _encode(image: Bytes | npt.NDArray[np.bool_], kind: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, kind, **options)
        return file.getvalue()


def _url(kind: str, file: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def _palettes() -> dict[str, str]:
    """Return the colours of 0 to 255, as 256 times RRGGBB, of each palette."""
    from matplotlib import colormaps

    table = np.arange(256)
    return {name: colormaps[name](table, bytes=True)[:, :3].tobytes().hex() for name in _PALETTES}


def _script_json(data: Any) -> str:
    """Return JSON that is safe inside a script element.

    The characters that could end the element or start a comment stand in strings only, where JSON
    allows them to be written as escapes. U+2028 and U+2029 are among what ``json`` escapes anyway.
    """
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(data: Any) -> Any:
    """Replace NaN and infinity, which JSON has no word for, with None; NumPy's numbers with Python's."""
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, np.generic):
        data = data.item()
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
