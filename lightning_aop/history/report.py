"""A run's stored explanations as one page to open in a browser, with nothing to install or serve."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_aop.errors import InvalidValueError
from lightning_aop.files import write_whole
from lightning_aop.history.failures import FailureRecord
from lightning_aop.history.store import History, Record
from lightning_aop.view.heat import BRIGHTNESS, EXPONENT, SATURATION

__all__ = ["write_comparison", "write_report"]

Bytes = npt.NDArray[np.uint8]

_PARTS = Path(__file__).with_name("page")
_SCRIPTS = ("numbers", "verdict", "pixels", "charts", "page")
# The first is shown until another is chosen: it is that of all other output.
_PALETTES = ("inferno", "turbo")
_OUTLINE = (77, 242, 255)  # as in the grids that loggers get
_PICTURE_QUALITY = 85
# Above this many bytes of one record's maps a page is slow to open and to send, and slight loss the
# lesser evil; above the second, maps of half the size.
_LOSSLESS_BYTES, _LOSSY_BYTES = 80_000, 160_000
_LOSSY_QUALITY = 80
# A page above the first is made anew with the maps of fewer times, so that it has the second and may
# grow again.
_PAGE_BYTES, _THINNED_BYTES = 25_000_000, 20_000_000
_IMAGE_BYTES = 5_000_000  # of all images; beyond, they are shown smaller
_END = '<script type="application/json" class="end">{}</script>\n'


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
    write_whole(path, page(History.load(folder), title_of(folder)).encode())
    return path


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write a page that shows a run beside others: the same images, on the same slider.

    Args:
        folders: where the explanations of each were stored; the first is the one that is looked at.
        path: of the page.

    Returns:
        The path of the page.

    Raises:
        OSError: the explanations cannot be read, or the page cannot be written.
        ValueError: another run has no image of the first.
    """
    path = Path(path)
    titles = [title_of(folder) for folder in folders]
    first, *others = [History.load(folder) for folder in folders]
    for title, history in zip(titles[1:], others, strict=True):
        if not _matches(history.images, first.images):
            raise InvalidValueError(
                f"{title} has no image of {titles[0]}: compare runs that explain the same images, or "
                "give both monitors the same probe"
            )
    beside = list(zip(_apart(titles)[1:], others, strict=True))
    write_whole(path, page(first, titles[0], beside).encode())
    return path


def add_to_report(folder: str | Path, record: Record, maps: Bytes) -> None:
    """Add the last record to the page of `write_report`, in a time that does not grow with the page.

    Args:
        folder: where the page lies.
        record: what is added.
        maps: uint8 [P, h, w], those of the record.

    Raises:
        OSError: there is no page, or it cannot be written.
    """
    path, line = Path(folder) / "report.html", _record(record, maps).line.encode()
    if path.stat().st_size + len(line) > _PAGE_BYTES:
        write_report(folder)
        return
    with path.open("r+b") as file:
        file.seek(0, io.SEEK_END)
        file.write(line)


def add_failures_to_report(folder: str | Path, record: FailureRecord) -> None:
    """Add the worst samples of a validation to the page of `write_report`.

    Raises:
        OSError: there is no page, or it cannot be written.
    """
    with (Path(folder) / "report.html").open("r+b") as file:
        file.seek(0, io.SEEK_END)
        file.write(_script("failures", asdict(record)).encode())


def end_report(folder: str | Path) -> None:
    """Let the page say that the run has ended, as `write_report` does for one that has.

    Raises:
        OSError: there is no page, or it cannot be written.
    """
    with (Path(folder) / "report.html").open("r+b") as file:
        file.seek(0, io.SEEK_END)
        file.write(_END.encode())


def inline(history: History) -> str:
    """Return the page as HTML that a notebook shows in place."""
    return (
        f'<iframe srcdoc="{html.escape(page(history))}" sandbox="allow-scripts" '
        'title="Explanations of a run" style="width: 100%; height: 860px; border: 0"></iframe>'
    )


def title_of(folder: str | Path) -> str:
    """Return what a run is called: the ends of the path of its folder of explanations."""
    parts = [part for part in Path(folder).resolve().parts if part != Path(folder).anchor]
    last = parts[-1] if parts else ""
    if last == "explanations" and len(parts) > 1:
        return " / ".join(parts[-3:-1])
    if last.startswith("explanations-") and len(parts) > 1:
        return f"{' / '.join(parts[-3:-1])} · {last.partition('-')[2]}"
    return " / ".join(parts[-2:])


def _apart(titles: Sequence[str]) -> list[str]:
    """Return titles without the beginning that all have."""
    parts = [re.split("( / | · )", title) for title in titles]
    same = 0
    while all(len(each) > same + 2 and each[same] == parts[0][same] for each in parts):
        same += 2
    return ["".join(each[same:]) for each in parts]


def page(
    history: History, title: str = "Explanations", others: Sequence[tuple[str, History]] = ()
) -> str:
    """Return the page as HTML; a run without a single explanation has one too.

    The maps keep every value, as greyscale PNG, unless they are so many or so rugged that the page
    would grow unwieldy; then they are JPEG, which is off by a few in 255, or those of some of the
    times only, and the page says so.

    Args:
        history: what was stored of the run.
        title: what the page is headed.
        others: other runs to compare with, each with what it is called.
    """
    pictures, size = _pictures(history.images)
    data = {
        "title": title,
        "configuration": history.configuration,
        "class_names": {str(index): name for index, name in history.class_names.items()},
        "epochs": history.epochs,
        "image_size": list(history.images.shape[1:3]),
        "picture_size": size,
        "images": pictures,
        "masks": [
            [picture, target, _url("png", _encode(_resized(mask, size), "PNG")), float(mask.mean())]
            for (picture, target), mask in history.masks.items()
        ],
        "outline": _OUTLINE,
        "palettes": _palettes(),
        "palette": _PALETTES[0],
        "saturation": SATURATION,
        "brightness": BRIGHTNESS,
        "exponent": EXPONENT,
    }
    kept = [_record(each, history.maps[each.first : each.end]) for each in history.records]
    beside = [_other(name, other, history) for name, other in others]
    head = [
        _template(),
        _script("data", data, "id"),
        *(_script("other", other) for other in beside),
        *(_script("failures", asdict(failed)) for failed in history.failures),
    ]
    room = [sum(map(len, head)), *(len(record.line) for record in kept)]
    if sum(room) > _PAGE_BYTES:
        kept = _thinned(kept, _THINNED_BYTES - room[0])
    return "".join([*head, *(record.line for record in kept), _END * history.finished])


@dataclass(frozen=True)
class _Line:
    """The page's line about one time, and the same without its maps."""

    line: str
    without: str


def _record(record: Record, maps: Bytes) -> _Line:
    data = _facts(record, maps)
    return _Line(_script("record", data), _script("record", data | {"sheet": None}))


def _facts(record: Record, maps: Bytes) -> dict[str, Any]:
    """Return all that is known of one time, with its maps as one image."""
    sheet, columns = _sheet(maps)
    kind, file = "png", _encode(sheet, "PNG")
    if len(file) > _LOSSLESS_BYTES:
        kind, file = "jpeg", _encode(sheet, "JPEG", quality=_LOSSY_QUALITY)
    if len(file) > _LOSSY_BYTES:
        sheet, columns = _sheet(_halved(maps))
        file = _encode(sheet, "JPEG", quality=_LOSSY_QUALITY)
        maps = maps[:, ::2, ::2]
    known = {each.name: getattr(record, each.name) for each in fields(Record)}
    del known["first"]
    return known | {
        "columns": columns,
        "map_size": list(maps.shape[1:]),
        "sheet": _url(kind, file),
        "lossy": kind == "jpeg",
    }


def _thinned(records: list[_Line], room: int) -> list[_Line]:
    """Leave out the maps of some times, evenly spread, but not of the first and the last."""
    bare = sum(len(record.without) for record in records)
    for many in range(len(records) - 1, 1, -1):
        chosen = {round(n) for n in np.linspace(0, len(records) - 1, many)}
        if bare + sum(len(records[n].line) - len(records[n].without) for n in chosen) <= room:
            break
    else:
        chosen = {len(records) - 1}
    return [
        record if n in chosen else _Line(record.without, record.without)
        for n, record in enumerate(records)
    ]


def _other(title: str, history: History, first: History) -> dict[str, Any]:
    """Return another run, with the first one's numbers for the images that both have."""
    same = _matches(history.images, first.images)
    records = []
    for record in history.records:
        facts = _facts(record, history.maps[record.first : record.end])
        records.append(facts | {"images": [same.get(image, -1) for image in record.images]})
    return {
        "title": title,
        "configuration": history.configuration,
        "shared": len(same),
        "records": records,
    }


def _matches(images: Bytes, others: Bytes) -> dict[int, int]:
    """Return which of the others each image is, for those that are among them."""
    places = {(image.shape, image.tobytes()): n for n, image in enumerate(others)}
    found = {n: places.get((image.shape, image.tobytes())) for n, image in enumerate(images)}
    return {n: place for n, place in found.items() if place is not None}


def _template() -> str:
    """Return the page before its data: `page.html` with its styles and scripts in place."""
    text = {path.name: path.read_text(encoding="utf-8") for path in _PARTS.iterdir()}
    script = "\n".join(text[f"{name}.js"] for name in _SCRIPTS)
    return (
        text["page.html"].replace("/* page.css */", text["page.css"]).replace("/* *.js */", script)
    )


def _pictures(images: Bytes) -> tuple[list[str], list[int]]:
    """Return the images for the page, and their size there: that of the data unless they are many."""
    size = list(images.shape[1:3])
    while True:
        found = [
            _encode(_resized(image, size), "JPEG", quality=_PICTURE_QUALITY, subsampling=0)
            for image in images
        ]
        if sum(map(len, found)) <= _IMAGE_BYTES or max(size) <= 224:
            return [_url("jpeg", file) for file in found], size
        size = [max(1, side // 2) for side in size]


def _resized(image: npt.NDArray[Any], size: Sequence[int]) -> npt.NDArray[Any]:
    if list(image.shape[:2]) == list(size):
        return image
    kind = Image.Resampling.NEAREST if image.dtype == np.bool_ else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), kind))


def _halved(maps: Bytes) -> Bytes:
    """Return maps of half the size, each value a mean of up to four."""
    size = [-(-side // 2) for side in maps.shape[1:]]
    return np.stack([_resized(each, size) for each in maps])


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


def _encode(image: npt.NDArray[Any], kind: str, **options: Any) -> bytes:
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


def _script(name: str, data: Mapping[str, Any], attribute: str = "class") -> str:
    """Return data as an element that the page reads.

    The characters that could end the element or start a comment stand in strings only, where JSON
    allows them to be written as escapes. U+2028 and U+2029 are among what ``json`` escapes anyway.
    """
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" {attribute}="{name}">{text}</script>\n'


def _finite(data: Any) -> Any:
    """Replace NaN and infinity, which JSON has no word for, with None; NumPy's numbers with Python's."""
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, np.generic):
        data = data.item()
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
