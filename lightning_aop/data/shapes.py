"""A generated multilabel data set with exact instance masks, in COCO's folder layout.

Each image shows one to three shapes on a textured ground. Only the outline depends on the class, so
a classifier that scores well has to look at the shapes. Points are complex numbers: x to the right,
iy down.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from tqdm import tqdm

from lightning_aop.errors import ExistingFileError, InvalidValueError
from lightning_aop.files import write_whole

Array = npt.NDArray[Any]

CLASSES = ("circle", "square", "triangle", "star", "heart", "crescent")
"""The six class names; the COCO category id of `CLASSES[i]` is `i + 1`."""

_ABOUT = "Shapes, a generated multilabel picture set"
_VERSION = "1"  # Raise it with every change to the drawing: older sets are then replaced.

# Oklab, https://bottosson.github.io/posts/oklab; transposed, as colours are rows.
_LAB_TO_LMS = [
    [1, 1, 1],
    [0.3963377774, -0.1055613458, -0.0894841775],
    [0.2158037573, -0.0638541728, -1.2914855480],
]
_LMS_TO_RGB = [
    [4.0767416621, -1.2684380046, -0.0041960863],
    [-3.3077115913, 2.6097574011, -0.7034186147],
    [0.2309699292, -0.3413193965, 1.7076147010],
]


def _area(points: Array) -> float:
    x, y = points.real, points.imag
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _box(points: Array) -> list[float]:
    x, y = points.real, points.imag
    return [round(float(v), 2) for v in (x.min(), y.min(), np.ptp(x), np.ptp(y))]


def _round_corners(points: Array, cut: float) -> Array:
    """Cut each corner at `cut` of its edges, then smooth the cuts (Chaikin's scheme)."""
    for ratio in (cut, 0.25, 0.25):
        ends = np.stack([np.roll(points, 1), np.roll(points, -1)], 1)
        points = (points[:, None] * (1 - ratio) + ends * ratio).ravel()
    return points


@functools.cache
def _outline(name: str) -> Array:
    """The vertices of a class, centred, in a circle of about unit diameter."""
    t = np.arange(48) / 48 * 2 * np.pi
    points = np.exp(1j * t)
    if name == "square":
        points = _round_corners(points[6::12], 0.07)
    elif name == "triangle":
        points = _round_corners(points[::16] / 1j, 0.07)
    elif name == "star":
        points = np.exp(0.2j * np.pi * np.arange(10)) / 1j
        points[1::2] *= 0.45
        points = _round_corners(points, 0.15)
    elif name == "heart":
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = 16 * np.sin(t) ** 3 - 1j * y
    elif name == "crescent":
        # Two arcs through the same horns: the unit circle, and a smaller one bitten out of it.
        horn, bite = np.deg2rad(38), 0.72
        inner = np.arcsin(np.sin(horn) / bite)
        outside = np.exp(1j * np.linspace(horn, 2 * np.pi - horn, 34))
        inside = bite * np.exp(1j * np.linspace(2 * np.pi - inner, inner, 24)[1:-1])
        points = np.concatenate([outside, inside + np.cos(horn) - bite * np.cos(inner)])
    x, y = points.real, points.imag
    points = points - (x.max() + x.min() + 1j * (y.max() + y.min())) / 2
    points = points / abs(points).max() / 2
    # Full outlines are drawn a little smaller, so that the area is no clue.
    return np.asarray(points * (0.3 / _area(points)) ** 0.15)


@functools.cache
def _kernel(size: int, cells: int, sigma: float, shift: float) -> Array:
    """Gaussian weights (size, cells) from cells to pixels; `sigma` and `shift` in cells."""
    at = (np.arange(size) + 0.5) / size * cells - 0.5 - shift
    near = np.arange(-cells, 2 * cells)  # cells beyond the border repeat it: edges do not darken
    weight = np.exp(-0.5 * ((at[:, None] - near) / sigma) ** 2)
    weight /= weight.sum(1, keepdims=True)
    return np.asarray(weight @ np.eye(cells)[near.clip(0, cells - 1)])


def _spread(kernel: Array, plane: Array) -> Array:
    """Apply a kernel down and across; in bands, as a BLAS is slower with threads at these sizes."""
    size, cells = kernel.shape
    bands = kernel.reshape(-1, math.gcd(size, 4), cells)
    for _ in range(2):
        plane = (bands @ plane).reshape(size, -1).T
    return plane


def _blur(plane: Array, sigma: float, shift: float = 0.0) -> Array:
    """Blur a square plane by `sigma` pixels and move it `shift` pixels right and down."""
    return _spread(_kernel(len(plane), len(plane), sigma, shift), plane)


def _normalised(plane: Array) -> Array:
    return np.asarray((plane - plane.min()) / np.ptp(plane))


def _noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """Smooth noise over four octaves, in 0..1."""
    total = np.zeros((size, size))
    for octave in range(4):
        n = cells << octave
        total += _spread(_kernel(size, n, 0.55, 0.0), rng.standard_normal((n, n))) * 0.5**octave
    return _normalised(total)


@functools.cache
def _grid(size: int) -> Array:
    """The centres of the pixels, in the unit square."""
    x = (np.arange(size) + 0.5) / size
    return np.asarray(x + 1j * x[:, None])


def _waves(rng: np.random.Generator, warp: Array, count: float) -> Array:
    """Waves in 0..1 across a random direction, bent by `warp`."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    along = (_grid(len(warp)) * np.exp(-1j * angle)).real + 0.35 * warp
    return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * count * along + phase))


def _srgb(lightness: Array | float, chroma: float, hue: Array | float) -> Array:
    """Colours (..., 3) in 0..1, given in Oklab; the hue in radians."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1)
    linear = np.clip((lab @ _LAB_TO_LMS) ** 3 @ _LMS_TO_RGB, 0, 1)
    srgb = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(srgb)


def _paint(
    plane: Array, lightness: tuple[float, float], chroma: float, hue: tuple[float, float]
) -> Array:
    """Colour a plane in 0..1 by a ramp of 256 steps."""
    ramp = _srgb(np.linspace(*lightness, 256), chroma, np.linspace(*hue, 256))
    return np.asarray(ramp[(plane * 255).astype(int)])


def _ground(rng: np.random.Generator, size: int) -> tuple[Array, float, float]:
    """Paint a ground without shapes: its sRGB image, its Oklab lightness and its hue."""
    dark = rng.random() < 0.5
    light = rng.uniform(0.30, 0.46) if dark else rng.uniform(0.78, 0.90)
    # Dark yellows are mud: a dark ground goes from green over blue and violet to red.
    hue = rng.uniform(2.9 if dark else 0.0, 6.6 if dark else 2 * np.pi)
    chroma = rng.uniform(0.07, 0.12) * (1.0 if dark else 0.8)
    span = rng.uniform(0.5, 1.3) * rng.choice([-1, 1])

    cloud = _noise(rng, size, int(rng.integers(2, 4)))
    plane = 0.6 * cloud + 0.4 * _waves(rng, cloud, 0.5)
    style = rng.integers(4)
    if style == 1:
        plane = 0.65 * plane + 0.35 * _waves(rng, 2 * cloud, rng.uniform(1.5, 3.5))
    elif style == 2:
        rings = 0.5 + 0.5 * np.cos(2 * np.pi * rng.uniform(4, 7) * cloud)
        plane = 0.8 * plane + 0.25 * rings**6
    elif style == 3:
        plane = 0.75 * plane + 0.25 * _noise(rng, size, 10)
    tones = light - 0.09, light + 0.09
    picture = _paint(_normalised(plane), tones, chroma, (hue - span / 2, hue + span / 2))

    # Distractors: soft blobs and strokes in the colours of the ground, a little lighter or darker.
    for _ in range(rng.integers(2, 6)):
        x, y, angle = rng.uniform(0, 1, 3)
        place = (_grid(size) - x - 1j * y) * np.exp(-1j * np.pi * angle)
        if rng.random() < 0.5:
            wide, tall = rng.uniform(0.06, 0.2, 2)
            cover = np.exp(-0.5 * ((place.real / wide) ** 2 + (place.imag / tall) ** 2))
        else:
            bend = rng.uniform(0.02, 0.1) * np.sin(rng.uniform(3, 9) * place.real)
            cover = np.exp(-0.5 * ((place.imag - bend) / rng.uniform(0.006, 0.014)) ** 2)
        tint = light + rng.uniform(0.05, 0.14) * rng.choice([-1, 1])
        colour = _srgb(tint, chroma * 1.4, hue + rng.uniform(-1.2, 1.2))
        picture += (0.7 * cover)[..., None] * (colour - picture)
    vignette = 1 - 0.35 * abs(_grid(size) - 0.5 - 0.5j) ** 2
    return picture * vignette[..., None], light, hue


def _coverage(points: Array, size: int) -> Array:
    """Share of each pixel inside a polygon whose vertices are in pixels, COCO's convention."""
    canvas = Image.new("L", (4 * size, 4 * size))
    # Pillow's whole numbers are pixel centres, COCO's are pixel corners.
    ImageDraw.Draw(canvas).polygon((4 * points - 0.5 - 0.5j).view(float).tolist(), fill=255)
    return np.asarray(canvas.reduce(4)) / 255


def _place(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Diameters and centres, in image widths, of discs that lie inside and do not touch."""
    diameters = rng.uniform(0.32, 0.48, count)
    first, second = np.triu_indices(count, 1)
    while True:
        reach = diameters / 2 + 0.02
        corners = rng.uniform(reach[:, None], 1 - reach[:, None], (256, count, 2))
        centres = corners.view(complex)[..., 0]
        gaps = abs(centres[:, first] - centres[:, second])
        free = np.flatnonzero((gaps > reach[first] + reach[second]).all(1))
        if len(free):
            return diameters, centres[free[0]]
        diameters = np.maximum(diameters * 0.95, 0.25)


def _picture(seed: int, split: int, index: int, size: int) -> tuple[Array, list[tuple[int, Array]]]:
    """Draw one image: sRGB (size, size, 3) in 0..1, and (class, polygon in pixels) pairs."""
    rng = np.random.default_rng([seed, split, index])
    picture, light, hue = _ground(rng, size)
    dark = light < 0.6
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    kinds = rng.integers(len(CLASSES), size=count)
    kinds[0] = index % len(CLASSES)  # so that six images show all classes
    instances = []
    for kind, diameter, centre in zip(kinds.tolist(), *_place(rng, count), strict=True):
        turn = np.exp(1j * rng.uniform(-0.7, 0.7))
        outline = _outline(CLASSES[kind])
        outline = outline.real * rng.choice([-1, 1]) + 1j * outline.imag
        points = np.round((outline * turn * diameter + centre) * size, 2)
        instances.append((kind, points))

        away = rng.uniform(0.38, 0.46) if dark else -rng.uniform(0.34, 0.44)
        tone = float(np.clip(light + away, 0.4, 0.86))
        own = hue + np.pi + rng.uniform(-1.5, 1.5)
        chroma, span = rng.uniform(0.13, 0.18), rng.uniform(-0.8, 0.8)
        cloud = _noise(rng, size, 3)
        bands = _waves(rng, 0.6 * cloud, rng.choice([0.8, 5.0, 8.0]))
        weight = rng.choice([0.15, 0.45])
        plane = (1 - weight) * _waves(rng, 0 * cloud, 0.7) + weight * bands
        fill = _paint(plane, (tone - 0.07, tone + 0.07), chroma, (own, own + span))
        # The blurred coverage serves as a height map, lit from the upper left.
        cover = _coverage(points, size)
        lit = sum(np.gradient(_blur(cover, 0.022 * size)))[..., None] * 0.022 * size
        fill *= 1 - 0.9 * np.maximum(-lit, 0)
        fill += (1 - fill) * 1.3 * np.maximum(lit, 0) ** 1.2
        shadow = _blur(cover, 0.02 * size, 0.022 * size)
        picture *= 1 - (0.5 if dark else 0.38) * shadow[..., None]
        picture += cover[..., None] * (fill - picture)
    return np.clip(picture, 0, 1), instances


def write_shapes(
    root: str | Path, *, train: int = 1200, val: int = 120, size: int = 96, seed: int = 0
) -> Path:
    """Write the data set and return `root`; the same arguments give the same bytes.

    A set that is complete for these arguments is left as it is, any other that was generated is
    replaced. The annotations are written last, so an interrupted call is redone by the next one.

    Args:
        root: where to write `train2017/`, `val2017/` and `annotations/`.
        train: how many images to train with.
        val: how many others to validate with.
        size: of the square images, in pixels.
        seed: of the drawing.

    Raises:
        ValueError: an argument is too small.
        FileExistsError: `root` holds annotations that were not written by this function.
    """
    recipe = {"train": train, "val": val, "size": size, "seed": seed}
    for name, value in recipe.items():
        if value < (least := 32 if name == "size" else 0):
            raise InvalidValueError(f"{name}={value} must be at least {least}")
    root = Path(root).expanduser()
    info = {"info": {"description": _ABOUT, "version": _VERSION, "recipe": recipe}}
    head = json.dumps(info)[:-1].encode()  # with it, annotations begin
    files = [root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")]
    starts = [file.read_bytes()[: len(head)] if file.exists() else b"" for file in files]
    for file, start in zip(files, starts, strict=True):
        if start and _ABOUT.encode() not in start:
            raise ExistingFileError(
                f"{file} was not written by write_shapes and would be overwritten: "
                "give an empty or a new folder as root"
            )
    jobs = [
        (split, index, root / folder / f"{1_000_000 * split + index + 1:012d}.png")
        for split, (folder, count) in enumerate([("train2017", train), ("val2017", val)])
        for index in range(count)
    ]
    if all(start == head for start in starts) and all(path.exists() for *_, path in jobs):
        return root

    for file in files:
        file.unlink(missing_ok=True)
    for folder in ("train2017", "val2017"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    categories = [
        {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)
    ]
    contents: list[dict[str, Any]] = [
        info | {"licenses": [], "images": [], "annotations": [], "categories": categories}
        for _ in files
    ]
    for split, index, path in tqdm(jobs, "shapes", unit="image", disable=None):
        picture, instances = _picture(seed, split, index, size)
        Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(path, compress_level=3)
        number = int(path.stem)
        contents[split]["images"].append(
            {"id": number, "file_name": path.name, "width": size, "height": size}
        )
        contents[split]["annotations"] += [
            {
                "id": 10 * number + k,
                "image_id": number,
                "category_id": kind + 1,
                "segmentation": [points.view(float).tolist()],
                "bbox": _box(points),
                "area": round(_area(points), 2),
                "iscrowd": 0,
            }
            for k, (kind, points) in enumerate(instances)
        ]
    for file, content in zip(files, contents, strict=True):
        write_whole(file, json.dumps(content).encode())
    return root
