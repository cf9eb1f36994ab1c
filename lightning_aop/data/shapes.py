"""A generated multilabel picture set with exact instance masks, in COCO's folder layout.

Each picture shows one to three plump, lit shapes on a textured ground. The class is told by the
outline alone: colours, sizes, textures and the ground are drawn without regard to it, so a
classifier that scores well has to look at the shapes. Needs numpy and pillow only.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from lightning_aop.errors import ExistingFileError, InvalidValueError
from lightning_aop.files import write_whole

Array = npt.NDArray[np.float64]

CLASSES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "crescent")
"""The six class names; the COCO category id of ``CLASSES[i]`` is ``i + 1``."""

_ABOUT = "Shapes, a generated multilabel picture set"
# Raise this with every change to the drawing: sets written by an older recipe are then redone.
_VERSION = "1"
_SPLITS = ("train2017", "val2017")
_SUPERSAMPLE = 4


def _round_corners(points: Array, cut: float) -> Array:
    """Cut each corner at ``cut`` of its edges, then smooth the cuts (Chaikin's scheme)."""
    for ratio in (cut, 0.25, 0.25):
        ends = np.stack([np.roll(points, 1, 0), np.roll(points, -1, 0)], 1)
        points = (points[:, None] * (1 - ratio) + ends * ratio).reshape(-1, 2)
    return points


def _area(points: Array) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _circle(angles: Array) -> Array:
    return np.stack([np.cos(angles), np.sin(angles)], 1)


@functools.cache
def _outline(name: str) -> Array:
    """Vertices (n, 2) of a class, x right and y down, inside a circle of diameter 1."""
    t = np.arange(48) / 48 * 2 * np.pi
    if name == "circle":
        points = _circle(t)
    elif name == "square":
        points = _round_corners(_circle(t[6::12]), 0.07)
    elif name == "triangle":
        points = _round_corners(_circle(t[::16] - np.pi / 2), 0.07)
    elif name == "star":
        points = _circle(np.arange(10) / 10 * 2 * np.pi - np.pi / 2)
        points[1::2] *= 0.45
        points = _round_corners(points, 0.15)
    elif name == "heart":
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([16 * np.sin(t) ** 3, -y], 1)
    else:
        # Two arcs through the same horns: the unit circle, and a smaller one bitten out of it.
        horn, bite = np.deg2rad(38), 0.72
        inner = np.arcsin(np.sin(horn) / bite)
        shift = np.array([np.cos(horn) - bite * np.cos(inner), 0])
        outside = _circle(np.linspace(horn, 2 * np.pi - horn, 34))
        inside = bite * _circle(np.linspace(2 * np.pi - inner, inner, 24)[1:-1]) + shift
        points = np.concatenate([outside, inside])
    points = points - (points.max(0) + points.min(0)) / 2
    points = points / np.hypot(*points.T).max() / 2
    # Full outlines are drawn a little smaller: the area should not tell the class.
    return np.asarray(points * (0.3 / _area(points)) ** 0.15, dtype=np.float64)


@functools.cache
def _kernel(size: int, cells: int, sigma: float, shift: float) -> Array:
    """Gaussian weights (size, cells) from cells to pixels; ``sigma`` and ``shift`` in cells."""
    at = (np.arange(size) + 0.5) / size * cells - 0.5 - shift
    # Cells beyond the border repeat the border, so that edges do not darken.
    near = np.arange(-cells, 2 * cells)
    weight = np.exp(-0.5 * ((at[:, None] - near) / sigma) ** 2)
    weight /= weight.sum(1, keepdims=True)
    folded = np.zeros((size, cells))
    np.add.at(folded.T, np.clip(near, 0, cells - 1), weight.T)
    return folded


def _spread(kernel: Array, plane: Array) -> Array:
    """Apply a kernel of ``_kernel`` down and across a square plane."""
    for _ in range(2):
        # In bands: a BLAS shares out larger products among threads, which costs far more than it
        # gains at these sizes, above all on a busy machine.
        bands = min(16, kernel.size * plane.shape[1] // 200_000 + 1)
        plane = np.concatenate([band @ plane for band in np.array_split(kernel, bands)]).T
    return plane


def _blur(plane: Array, sigma: float, shift: float = 0.0) -> Array:
    """Blur a square plane by ``sigma`` pixels and move it ``shift`` pixels right and down."""
    return _spread(_kernel(len(plane), len(plane), sigma, shift), plane)


def _noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """Smooth noise over four octaves, stretched to 0..1."""
    total = np.zeros((size, size))
    for octave in range(4):
        n = cells << octave
        grid = rng.standard_normal((n, n))
        total += _spread(_kernel(size, n, 0.55, 0.0), grid) * 0.5**octave
    return _stretch(total)


def _stretch(plane: Array) -> Array:
    return np.asarray((plane - plane.min()) / np.ptp(plane), dtype=np.float64)


def _ramp(light: tuple[float, float], chroma: float, hue: tuple[float, float]) -> Array:
    """A 256-step sRGB ramp (0..1) between two Oklab lightnesses and two hues (radians)."""
    t = np.linspace(0, 1, 256)
    lightness, angle = light[0] + (light[1] - light[0]) * t, hue[0] + (hue[1] - hue[0]) * t
    a, b = chroma * np.cos(angle), chroma * np.sin(angle)
    lms = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        1,
    )
    linear = lms**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = np.clip(linear, 0, 1)
    srgb = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(srgb, dtype=np.float64)


def _paint(ramp: Array, plane: Array) -> Array:
    return np.asarray(ramp[np.clip(plane * 255, 0, 255).astype(np.intp)], dtype=np.float64)


def _waves(rng: np.random.Generator, size: int, warp: Array, count: float) -> Array:
    """Waves 0..1 across a random direction, bent by ``warp``."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    x = (np.arange(size) + 0.5) / size
    along = np.cos(angle) * x[None] + np.sin(angle) * x[:, None] + 0.35 * warp
    return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * count * along + phase), dtype=np.float64)


def _ground(rng: np.random.Generator, size: int) -> tuple[Array, float, float]:
    """Paint a ground without shapes: its sRGB picture, its Oklab lightness and its hue."""
    dark = rng.random() < 0.5
    light = rng.uniform(0.30, 0.46) if dark else rng.uniform(0.78, 0.90)
    # Dark yellows are mud: a dark ground goes from green over blue and violet to red.
    hue = rng.uniform(2.9 if dark else 0.0, 6.6 if dark else 2 * np.pi)
    chroma = rng.uniform(0.07, 0.12) * (1.0 if dark else 0.8)
    span = rng.uniform(0.5, 1.3) * rng.choice([-1, 1])
    ramp = _ramp((light - 0.09, light + 0.09), chroma, (hue - span / 2, hue + span / 2))

    cloud = _noise(rng, size, int(rng.integers(2, 4)))
    plane = 0.6 * cloud + 0.4 * _waves(rng, size, cloud, 0.5)
    style = rng.integers(4)
    if style == 1:
        plane = 0.65 * plane + 0.35 * _waves(rng, size, 2 * cloud, rng.uniform(1.5, 3.5))
    elif style == 2:
        rings = 0.5 + 0.5 * np.cos(2 * np.pi * rng.uniform(4, 7) * cloud)
        plane = 0.8 * plane + 0.25 * rings**6
    elif style == 3:
        plane = 0.75 * plane + 0.25 * _noise(rng, size, 10)
    picture = _paint(ramp, _stretch(plane))

    # Distractors: soft blobs and strokes in the ramp of the ground, a little lighter or darker.
    x = (np.arange(size) + 0.5) / size
    for _ in range(rng.integers(2, 6)):
        cx, cy, angle = rng.uniform(0, 1, 3) * (1, 1, np.pi)
        u = np.cos(angle) * (x[None] - cx) + np.sin(angle) * (x[:, None] - cy)
        v = np.cos(angle) * (x[:, None] - cy) - np.sin(angle) * (x[None] - cx)
        if rng.random() < 0.5:
            wide, tall = rng.uniform(0.06, 0.2, 2)
            cover = np.exp(-0.5 * ((u / wide) ** 2 + (v / tall) ** 2))
        else:
            bend = rng.uniform(0.02, 0.1) * np.sin(rng.uniform(3, 9) * u)
            cover = np.exp(-0.5 * ((v - bend) / rng.uniform(0.006, 0.014)) ** 2)
        tint = light + rng.uniform(0.05, 0.14) * rng.choice([-1, 1])
        turn = hue + rng.uniform(-1.2, 1.2)
        colour = _ramp((tint, tint), chroma * 1.4, (turn, turn))[0]
        picture += (0.7 * cover)[..., None] * (colour - picture)
    vignette = 1 - 0.35 * ((x[None] - 0.5) ** 2 + (x[:, None] - 0.5) ** 2)
    return np.asarray(picture * vignette[..., None], dtype=np.float64), light, hue


def _coverage(points: Array, size: int) -> Array:
    """Share of each pixel inside a polygon whose vertices are in pixels, COCO's convention."""
    canvas = Image.new("L", (size * _SUPERSAMPLE,) * 2)
    # Pillow's whole numbers are pixel centres, COCO's are pixel corners.
    corners = (points * _SUPERSAMPLE - 0.5).ravel().tolist()
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float64) / 255


def _place(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Diameters and centres, in picture widths, of discs that lie inside and do not touch."""
    diameters = rng.uniform(0.32, 0.48, count)
    first, second = np.triu_indices(count, 1)
    while True:
        reach = diameters / 2 + 0.02
        centres = rng.uniform(reach[:, None], 1 - reach[:, None], (256, count, 2))
        gaps = np.hypot(*np.moveaxis(centres[:, first] - centres[:, second], -1, 0))
        free = np.flatnonzero((gaps > reach[first] + reach[second]).all(1))
        if len(free):
            return diameters, centres[free[0]]
        diameters = np.maximum(diameters * 0.95, 0.25)


def _picture(seed: int, split: int, index: int, size: int) -> tuple[Array, list[tuple[int, Array]]]:
    """Draw one picture: sRGB (size, size, 3) in 0..1, and (class, polygon in pixels) pairs."""
    rng = np.random.default_rng([seed, split, index])
    picture, light, hue = _ground(rng, size)
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    kinds = rng.integers(len(CLASSES), size=count)
    # Going round the classes makes even a set of six pictures show all of them.
    kinds[0] = index % len(CLASSES)
    instances = []
    for kind, diameter, centre in zip(kinds.tolist(), *_place(rng, count), strict=True):
        turn = rng.uniform(-0.7, 0.7)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        mirror = np.array([rng.choice([-1.0, 1.0]), 1.0])
        points = np.round(
            (_outline(CLASSES[kind]) * mirror @ rotation * diameter + centre) * size, 2
        )
        cover = _coverage(points, size)
        away = rng.uniform(0.38, 0.46) if light < 0.6 else -rng.uniform(0.34, 0.44)
        tone = float(np.clip(light + away, 0.4, 0.86))
        own = hue + np.pi + rng.uniform(-1.5, 1.5)
        ramp = _ramp(
            (tone - 0.07, tone + 0.07), rng.uniform(0.13, 0.18), (own, own + rng.uniform(-0.8, 0.8))
        )
        cloud = _noise(rng, size, 3)
        bands = _waves(rng, size, 0.6 * cloud, rng.choice([0.8, 5.0, 8.0]))
        weight = rng.choice([0.15, 0.45])
        fill = _paint(ramp, (1 - weight) * _waves(rng, size, 0 * cloud, 0.7) + weight * bands)
        # The blurred coverage serves as a height map, lit from the upper left.
        down, right = np.gradient(_blur(cover, 0.022 * size))
        lit = (down + right) * 0.022 * size
        fill = fill * (1 - 0.9 * np.maximum(-lit, 0)[..., None])
        fill += (1 - fill) * (1.3 * np.maximum(lit, 0) ** 1.2)[..., None]
        shadow = _blur(cover, 0.02 * size, 0.022 * size)
        picture *= 1 - (0.5 if light < 0.6 else 0.38) * shadow[..., None]
        picture += cover[..., None] * (fill - picture)
        instances.append((kind, points))
    return np.clip(picture, 0, 1), instances


def _annotation(number: int, image: int, kind: int, points: Array) -> dict[str, Any]:
    low, high = points.min(0), points.max(0)
    return {
        "id": number,
        "image_id": image,
        "category_id": kind + 1,
        "segmentation": [points.ravel().tolist()],
        "bbox": np.round([*low, *(high - low)], 2).tolist(),
        "area": round(_area(points), 2),
        "iscrowd": 0,
    }


def _head(path: Path, length: int) -> bytes:
    """Read the first bytes of a file, none where there is no file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(length)


def write_shapes(
    root: str | Path,
    *,
    train: int = 1200,
    val: int = 120,
    size: int = 96,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the picture set under ``root`` and return ``root``; the same arguments, the same bytes.

    Writes ``train`` PNG pictures of ``size`` x ``size`` pixels to ``train2017/``, ``val`` others to
    ``val2017/``, and last ``annotations/instances_{train,val}2017.json``, so that an interrupted
    call is redone by the next. A set already complete for these arguments is left as it is; one
    written with other arguments is replaced. ``progress`` shows a bar and needs tqdm.

    Raises ``ValueError`` on a bad argument, and ``FileExistsError`` where ``root`` holds
    annotations that this function did not write.
    """
    for name, value, least in (
        ("train", train, 0),
        ("val", val, 0),
        ("size", size, 32),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InvalidValueError(
                f"write_shapes got {name}={value}, but {name} must be a whole number of at least "
                f"{least}; pass {name}={least} or more."
            )
    root = Path(root).expanduser()
    counts = (train, val)
    recipe = {"train": train, "val": val, "size": size, "seed": seed}
    info = {"info": {"description": _ABOUT, "version": _VERSION, "recipe": recipe}}
    # Annotations appear whole and last, so their first bytes tell what the whole set is.
    head, ours = json.dumps(info)[:-1].encode(), f'{{"info": {{"description": "{_ABOUT}'.encode()
    annotations = [root / "annotations" / f"instances_{split}.json" for split in _SPLITS]
    pictures = [
        [root / name / f"{1_000_000 * split + i + 1:012d}.png" for i in range(counts[split])]
        for split, name in enumerate(_SPLITS)
    ]
    found = [_head(path, len(head)) for path in annotations]
    for path, start in zip(annotations, found, strict=True):
        if start and not start.startswith(ours):
            raise ExistingFileError(
                f"{path} was not written by write_shapes and would be overwritten; "
                "pass an empty or a new folder as root."
            )
    if all(start == head for start in found) and all(p.exists() for ps in pictures for p in ps):
        return root
    for path in annotations:
        path.unlink(missing_ok=True)
    for folder in ("annotations", *_SPLITS):
        (root / folder).mkdir(parents=True, exist_ok=True)

    jobs: Iterable[tuple[int, int]] = [(s, i) for s in (0, 1) for i in range(counts[s])]
    if progress:
        jobs = importlib.import_module("tqdm").tqdm(jobs, desc="shapes", unit="picture")
    categories = [
        {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)
    ]
    sets: list[dict[str, Any]] = [
        info | {"licenses": [], "images": [], "annotations": [], "categories": categories}
        for _ in _SPLITS
    ]
    for split, index in jobs:
        path = pictures[split][index]
        picture, instances = _picture(seed, split, index, size)
        image = int(path.stem)
        buffer = io.BytesIO()
        drawn = Image.fromarray(np.round(picture * 255).astype(np.uint8))
        drawn.save(buffer, "png", compress_level=3)
        write_whole(path, buffer.getvalue())
        sets[split]["images"].append(
            {"id": image, "file_name": path.name, "width": size, "height": size}
        )
        sets[split]["annotations"] += [
            _annotation(10 * image + k, image, kind, points)
            for k, (kind, points) in enumerate(instances)
        ]
    for path, content in zip(annotations, sets, strict=True):
        write_whole(path, json.dumps(content).encode())
    return root
