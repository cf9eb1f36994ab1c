import json
import multiprocessing
import os
import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_aop.coco import CocoMultilabel, ImageError, Preprocess
from lightning_aop.data.images import IMAGENET_MEAN, IMAGENET_STD, read_image

pytest.importorskip("pycocotools.coco")

SIZE = (24, 16)
rng = np.random.default_rng(0)
NOISE = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)


def raw(mode: str, values: Any, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.frombytes(mode, size, np.ascontiguousarray(values).tobytes())


def png(width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of these chunks after its header, as the specification writes them."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", head), *chunks):
        file += struct.pack(">I", len(body)) + name + body
        file += struct.pack(">I", zlib.crc32(name + body))
    return file


def header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixels."""
    return png(width, height, 8, 2, (b"IDAT", b""))


def deep_png(values: Any, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of 16 bits per channel; Pillow writes grey ones only."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    pixels = (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return png(width, height, 16, colour, *chunks, *pixels)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def secret(path: Path) -> None:
    raw("RGB", NOISE).save(path.parent.parent / "secret.png")
    link(path, path.parent.parent / "secret.png")


def locked(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut jpeg": ("x.jpg", cut, "can't be read .*truncated"),
    "cut png": ("x.png", cut, "can't be read .*truncated"),
    "empty": ("x.jpg", lambda p: p.write_bytes(b""), "the file is empty"),
    "text": ("x.jpg", lambda p: p.write_text("no picture"), "can't be read.*no image that Pillow reads"),
    "program": ("x.jpg", lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n"
                "%%EndComments\n"), "PostScript"),
    "folder": ("x.png", folder_instead, "it is not a file"),
    "pipe": ("x.png", pipe_instead, "it is not a file"),
    "missing": ("x.png", lambda p: p.unlink(), "the file is missing"),
    "bomb": ("x.png", lambda p: p.write_bytes(header(20_000, 20_000)), "DecompressionBombError"),
    "large": ("x.png", lambda p: p.write_bytes(header(10_000, 10_000)), "DecompressionBombWarning"),
    "link": ("x.png", secret, "a link out of .*, and nothing outside is read"),
    "loop": ("x.png", lambda p: link(p, p), "can't be read|missing"),
    "locked": ("x.png", locked, "can't be read .*PermissionError"),
    "other size": ("x.png", lambda p: raw("RGB", NOISE, (16, 24)).save(p),
                   "16 x 24 pixels, where 24 x 16 are annotated"),
}  # fmt: skip


def dataset(root: Path, names: list[str], **options: Any) -> CocoMultilabel:
    """Write a folder of good pictures with ids 100, 101, …, each of one class of two."""
    folder = root / "pictures"
    folder.mkdir(exist_ok=True)
    for name in names:
        raw("RGB", NOISE).save(folder / name)
    content = {
        "images": [
            {"id": 100 + i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for i, name in enumerate(names)
        ],
        "annotations": [
            {"id": i, "image_id": 100 + i, "category_id": 1} for i in range(len(names))
        ],
        "categories": [{"id": 1}, {"id": 2}],
    }
    (root / "file.json").write_text(json.dumps(content))
    return CocoMultilabel(folder, root / "file.json", **options)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_named_or_skipped(kind: str, tmp_path: Path) -> None:
    name, spoil, message = BAD[kind]
    data = dataset(tmp_path, [name, "good.png"])
    spoil(data.folder / name)
    where = rf"{re.escape(str(data.folder / name))}, image 100 of .*file.json: .*({message})"
    with pytest.raises(ImageError, match=rf"{where}.*; (restore|copy) the file.*on_error='skip'"):
        data[0]
    assert data[1][1].tolist() == [1, 0]
    assert data.skipped() == []

    data = CocoMultilabel(data.folder, data.file, Preprocess(8), on_error="skip")
    for _ in range(2):
        images, labels = next(iter(DataLoader(data, 2)))
        assert not images[0].any()
        assert images[1].any()
        assert labels.tolist() == [[-1, -1], [1, 0]]
    (line,) = data.skipped()
    assert re.match(where, line)
    ways = (
        "or take the image out of the annotations",
        "or follow links with links=True (--data.links true)",
    )
    assert line.endswith(ways)


def test_a_picture_of_unannotated_size_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw("RGB", NOISE).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").size == SIZE
    for most, kind in ((24 * 16 - 1, "Warning"), (24 * 16 // 2 - 1, "Error")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ImageError, match=f"DecompressionBomb{kind}"):
            read_image(tmp_path / "x.png")


def test_a_picture_that_came_back_is_told(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a.png", "b.png"], on_error="skip")
    content = (data.folder / "a.png").read_bytes()
    (data.folder / "a.png").unlink()
    assert data[0][1].tolist() == [-1, -1]
    (data.folder / "a.png").write_bytes(content)
    assert data[0][1].tolist() == [1, 0]
    (line,) = data.skipped()
    assert re.match(r".*a.png, image 100 of .*left out, but can be read now; run again", line)


def test_what_was_unreadable_elsewhere_is_told(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a.png", "b.png"])
    (data.folder / "b.png").unlink()
    data.mark_skipped(torch.tensor([False, True]))
    (line,) = data.skipped()
    assert "b.png, image 101 of " in line
    assert "the file is missing" in line


# Python 3.12 warns of any fork beside threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_tell_what_they_skipped(start: str, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(6)]
    data = dataset(tmp_path, names, transform=Preprocess(8), on_error="skip")
    for bad in (1, 2, 5):
        (data.folder / names[bad]).write_bytes(b"")
    context = multiprocessing.get_context(start)
    loader = DataLoader(data, 3, num_workers=2, multiprocessing_context=context)
    for _ in range(2 if start == "fork" else 1):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert images.shape == (6, 3, 8, 8)
        assert (labels[:, 0] < 0).nonzero()[:, 0].tolist() == [1, 2, 5]
        assert (labels[:, 0] < 0).tolist() == [not image.any() for image in images]
    lines = data.skipped()
    assert [re.search(r"image (\d+) of .*the file is empty", line)[1] for line in lines] == [  # type: ignore[index]
        "101",
        "102",
        "105",
    ]


def test_a_linked_folder_is_fine(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a.png"])
    (tmp_path / "linked").symlink_to(data.folder)
    (data.folder / "inside.png").symlink_to(data.folder / "a.png")
    for name in ("a.png", "inside.png"):
        np.testing.assert_array_equal(
            read_image(tmp_path / "linked" / name, root=tmp_path / "linked"), NOISE
        )


TURNED: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_upright_unless_its_annotation_is_not(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    raw("RGB", NOISE).save(path, exif=exif)
    upright = TURNED[orientation](NOISE)
    size = upright.shape[1::-1]
    for wanted in (None, size):
        np.testing.assert_array_equal(read_image(path, wanted), upright)
    if size != SIZE:
        np.testing.assert_array_equal(read_image(path, SIZE), NOISE)
    else:
        with pytest.raises(ImageError, match="24 x 16 pixels, where 16 x 24 are annotated"):
            read_image(path, (16, 24))
    with pytest.raises(ImageError, match="where 25 x 16 are annotated"):
        read_image(path, (25, 16))


def grey(values: Any) -> Any:
    return np.repeat(values[..., None], 3, axis=-1)


def on_white(colours: Any, alpha: Any) -> Any:
    return (colours.astype(float) * alpha + 255.0 * (255 - alpha)) / 255


FOUR = rng.integers(0, 256, (16, 24, 4), dtype=np.uint8)
DEEP = rng.integers(0, 65536, (16, 24), dtype=np.uint16)
INDEX = rng.integers(0, 8, (16, 24), dtype=np.uint8)
PALETTE = rng.integers(0, 256, (8, 3), dtype=np.uint8)
ALPHAS = rng.integers(0, 256, 8, dtype=np.uint8)
BITS = rng.random((16, 24)) < 0.5


def indexed() -> Image.Image:
    picture = raw("P", INDEX)
    picture.putpalette(PALETTE.tobytes())
    return picture


MODES: dict[str, tuple[Callable[[], Image.Image], str, dict[str, Any], Any]] = {
    "grey": (lambda: raw("L", NOISE[..., 0]), "png", {}, grey(NOISE[..., 0])),
    "grey, one clear": (lambda: raw("L", INDEX), "png", {"transparency": 3},
                        grey(np.where(INDEX == 3, 255, INDEX))),
    "LA": (lambda: raw("LA", FOUR[..., :2]), "png", {},
           on_white(grey(FOUR[..., 0]), FOUR[..., 1:2])),
    "RGBA": (lambda: raw("RGBA", FOUR), "png", {}, on_white(FOUR[..., :3], FOUR[..., 3:])),
    "palette": (indexed, "png", {}, PALETTE[INDEX]),
    "palette, one clear": (indexed, "png", {"transparency": 2},
                           np.where(INDEX[..., None] == 2, 255, PALETTE[INDEX])),
    "palette, alphas": (indexed, "png", {"transparency": ALPHAS.tobytes()},
                        on_white(PALETTE[INDEX], ALPHAS[INDEX][..., None])),
    "gif": (indexed, "gif", {"transparency": 2},
            np.where(INDEX[..., None] == 2, 255, PALETTE[INDEX])),
    "CMYK": (lambda: raw("CMYK", FOUR), "tif", {},
             (255.0 - FOUR[..., :3]) * (255 - FOUR[..., 3:].astype(float)) / 255),
    "16 bits": (lambda: raw("I;16", DEEP), "png", {}, grey(DEEP / 257)),
    "16 bits, tiff": (lambda: raw("I;16", DEEP), "tif", {}, grey(DEEP / 257)),
    "16 bits, big-endian": (lambda: raw("I;16B", DEEP.byteswap()), "tif", {}, grey(DEEP / 257)),
    "1 bit": (lambda: raw("1", np.packbits(BITS, axis=1)), "png", {}, grey(BITS * 255)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_is_what_a_viewer_shows(mode: str, tmp_path: Path) -> None:
    picture, ending, options, expected = MODES[mode]
    picture().save(tmp_path / f"x.{ending}", **options)
    found = read_image(tmp_path / f"x.{ending}", SIZE)
    assert found.mode == "RGB"
    # Half a step for rounding, and as much for Pillow's own.
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, atol=1)


DEEP_FOUR = rng.integers(0, 65536, (16, 24, 4), dtype=np.uint16)
DEEP_PNG: dict[str, tuple[bytes, Any]] = {
    "grey": (deep_png(DEEP, 0), grey(DEEP / 257)),
    "grey, one clear": (
        deep_png(DEEP, 0, (b"tRNS", int(DEEP[3, 5]).to_bytes(2, "big"))),
        grey(np.where(DEEP[3, 5] == DEEP, 255, DEEP / 257)),
    ),
    "colour": (deep_png(DEEP_FOUR[..., :3], 2), DEEP_FOUR[..., :3] / 257),
    "grey with alpha": (
        deep_png(DEEP_FOUR[..., :2], 4),
        on_white(grey(DEEP_FOUR[..., 0] / 257), DEEP_FOUR[..., 1:2] / 257),
    ),
    "colour with alpha": (
        deep_png(DEEP_FOUR, 6),
        on_white(DEEP_FOUR[..., :3] / 257, DEEP_FOUR[..., 3:] / 257),
    ),
}


@pytest.mark.parametrize("kind", DEEP_PNG)
def test_a_png_of_16_bits_is_what_a_viewer_shows(kind: str, tmp_path: Path) -> None:
    content, expected = DEEP_PNG[kind]
    (tmp_path / "x.png").write_bytes(content)
    found = np.asarray(read_image(tmp_path / "x.png"), dtype=float)
    np.testing.assert_allclose(found, expected, atol=2)


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [raw("L", NOISE[..., k]) for k in range(3)]
    for ending in ("gif", "png", "tif", "webp"):
        path = tmp_path / f"x.{ending}"
        lossless = {"lossless": True} if ending == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
        np.testing.assert_array_equal(read_image(path), grey(NOISE[..., 0]))


RAMP = np.linspace(0, 1, 16 * 24, dtype=np.float64).reshape(16, 24)


@pytest.mark.parametrize(
    ("mode", "values", "value_range", "message"),
    [
        (
            "F",
            RAMP.astype(np.float32),
            (0, 1),
            "values from 0 to 1 .Pillow's mode F. have no known",
        ),
        ("I", (RAMP * 1e6).astype(np.int32), (0, 1e6), "values from 0 to 1e.06 .* no known range"),
        ("I", (RAMP * 9e6 - 5e6).astype(np.int32), (-5e6, 4e6), "values from -5e.06 to 4e.06"),
        ("I;16", (RAMP * 4095).astype(np.uint16), (0, 4095), "values end at 4095 of 65535"),
        ("I;16", (RAMP * 255).astype(np.uint16), (0, 255), "values end at 255 of 65535"),
    ],
)
def test_an_image_of_no_known_range_is_refused_until_it_is_given(
    mode: str, values: Any, value_range: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.tif"
    raw(mode, values).save(path)
    low, high = (0, 4095) if mode == "I;16" else value_range
    remedy = re.escape(f"value_range=({low:g}, {high:g}), or --range {low:g} {high:g} on")
    with pytest.raises(ImageError, match=f"{message}.*: say .* {remedy}"):
        read_image(path)
    found = np.asarray(read_image(path, value_range=value_range), dtype=float)
    np.testing.assert_allclose(found, grey(RAMP * 255), atol=1)


def test_a_range_clips_and_leaves_8_bits_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    raw("F", RAMP.astype(np.float32)).save(path)
    found = np.asarray(read_image(path, value_range=(0.25, 0.75)), dtype=float)
    np.testing.assert_allclose(found, grey(np.clip(RAMP * 2 - 0.5, 0, 1) * 255), atol=1)
    raw("RGB", NOISE).save(path)
    np.testing.assert_array_equal(read_image(path, value_range=(0, 4095)), NOISE)
    with pytest.raises(ValueError, match=r"two finite numbers, the lower one first, got \(1, 0\)"):
        read_image(path, value_range=(1, 0))


def test_what_a_range_cannot_mend_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    values = RAMP.astype(np.float32)
    values[0, 0] = np.nan
    raw("F", values).save(path)
    with pytest.raises(ImageError, match="pixels that are not a number: replace them"):
        read_image(path, value_range=(0, 1))
    (tmp_path / "x.png").write_bytes(deep_png(DEEP_FOUR[..., :3] // 16, 2))
    with pytest.raises(ImageError, match="16-bit colours use less than 1/16 of their range"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("opened", [False, True])
def test_deep_tiffs_are_read_over_their_range(
    dtype: str, colours: bool, planar: bool, opened: bool, tmp_path: Path
) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=-1) / 65535
    values = values if colours else values[..., 0]
    top = 4000 if dtype == "uint16" else 0.5
    settings: dict[str, Any] = {"photometric": "rgb" if colours else "minisblack"}
    stored = (values * top).astype(dtype)
    if colours and planar:
        stored, settings["planarconfig"] = np.moveaxis(stored, -1, 0), "separate"
    tifffile.imwrite(tmp_path / "x.tif", stored, **settings, extratags=[(274, 3, 1, 3, True)])
    path = tmp_path / "x.tif"
    file = BytesIO(path.read_bytes()) if opened else path
    found = np.asarray(read_image(file, value_range=(0, top)), dtype=float)
    turned = np.rot90(values if colours else np.stack([values] * 3, axis=-1), 2)
    np.testing.assert_allclose(found, turned * 255, atol=0.7)
    remedy = "0 4095" if dtype == "uint16" else r"0\.00098\d+ 0\.498\d+"
    with pytest.raises(ImageError, match=f"or --range {remedy} on"):
        read_image(path)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "float64"])
def test_a_tiff_whose_zero_is_white_is_no_negative(kind: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    deep = values.astype(kind) * (257 if kind == "uint16" else 1)
    value_range = (0.0, 255.0) if kind.startswith("float") else None
    for photometric, wanted in (("minisblack", values), ("miniswhite", 255 - values)):
        path = tmp_path / f"{photometric}.tif"
        tifffile.imwrite(path, deep, photometric=photometric)
        image = np.asarray(read_image(path, value_range=value_range))
        np.testing.assert_array_equal(image, np.repeat(wanted[..., None], 3, axis=2))


def test_colours_of_16_bits_take_no_range_where_pillow_reads_them(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(deep_png(DEEP_FOUR[..., :3], 2))
    with pytest.raises(ImageError, match="can't be read over a range: save it as TIFF and pip"):
        read_image(tmp_path / "x.png", value_range=(0, 4095))


def test_a_black_image_is_black(tmp_path: Path) -> None:
    raw("I;16", np.zeros((16, 24), np.uint16)).save(tmp_path / "x.png")
    assert not np.asarray(read_image(tmp_path / "x.png")).any()


def test_an_image_without_a_root_may_be_a_link(tmp_path: Path) -> None:
    raw("RGB", NOISE).save(tmp_path / "x.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.png").symlink_to(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "folder" / "link.png"), NOISE)


some = settings(deadline=None, max_examples=60)
sides = st.integers(9, 70)
ways = st.sampled_from(["squash", "crop"])


@some
@given(sides, sides, st.integers(1, 50), ways)
def test_the_input_is_that_of_torchvision(width: int, height: int, size: int, resize: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = raw("RGB", noise, (width, height))
    shape = (
        [v2.Resize((size, size))]
        if resize == "squash"
        else [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
    )
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    pipeline = v2.Compose([*shape, *steps, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    torch.testing.assert_close(
        Preprocess(size, resize)(picture), pipeline(picture).as_subclass(torch.Tensor)
    )


@some
@given(sides, sides, st.integers(1, 50), ways)
def test_masks_are_those_of_a_slow_loop(width: int, height: int, size: int, resize: Any) -> None:
    masks = np.random.default_rng(0).random((2, height, width)) < 0.5
    if resize == "squash":
        rows = columns = size
        top = left = 0
    else:
        short = round(size * 8 / 7)
        rows, columns = (int(short * side / min(height, width)) for side in (height, width))
        top, left = round((rows - size) / 2), round((columns - size) / 2)
    found = Preprocess(size, resize).masks(masks)
    assert found.shape == (2, size, size)
    for y in range(size):
        for x in range(size):
            # The pixel that the centre lies in; on an edge between two, either.
            below, right = (2 * (y + top) + 1) * height, (2 * (x + left) + 1) * width
            if below % (2 * rows) and right % (2 * columns):
                expected = masks[:, below // (2 * rows), right // (2 * columns)]
                assert found[:, y, x].tolist() == expected.tolist()


@some
@given(st.integers(40, 200), st.integers(40, 200), ways, st.data())
def test_masks_stay_on_their_things(width: int, height: int, resize: Any, data: Any) -> None:
    radius = data.draw(st.integers(10, 18))
    x, y = (data.draw(st.integers(radius, side - radius)) for side in (width, height))
    down, right = np.mgrid[:height, :width]
    mask = np.hypot(down - y, right - x) < radius
    prepare = Preprocess(96, resize, mean=(0, 0, 0), std=(1, 1, 1))
    painted = (
        prepare(raw("L", mask.astype(np.uint8) * 255, (width, height)).convert("RGB"))[0] > 0.5
    )
    found = prepare.masks(mask[None])[0]
    assume(painted.sum() > 150)  # a border is a large part of a smaller disc
    assert (found & painted).sum() / (found | painted).sum() > 0.85


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_long_strip_takes_no_more_memory(size: tuple[int, int]) -> None:
    prepare = Preprocess(224, "crop", mean=(0, 0, 0), std=(1, 1, 1))
    assert (prepare(Image.new("RGB", size, "white")) == 1).all()
    assert prepare.masks(np.ones((1, *size[::-1]), dtype=bool)).all()


def test_no_masks_stay_none() -> None:
    for resize in ("squash", "crop"):
        masks = Preprocess(8, resize).masks(np.zeros((0, 20, 30), dtype=bool))  # type: ignore[arg-type]
        assert masks.shape == (0, 8, 8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"resize": "pad"}, "resize must be 'squash' or 'crop', got 'pad'"),
        ({"mean": (0.5,)}, r"mean must hold 3 numbers, .* got \[0.5\]"),
        ({"std": (1, 1, 1, 1)}, "std must hold 3 numbers"),
        ({"std": (1, 0, 1)}, "std must be above 0 in every channel"),
        ({"std": (1, float("nan"), 1)}, "std must be finite"),
        ({"mean": (0, float("inf"), 0)}, "mean must be finite"),
    ],
)
def test_wrong_options_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


def test_dicom_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"
    path.write_bytes(bytes(128) + b"DICM" + bytes(200))
    with pytest.raises(ImageError, match=r"DICOM, which is not supported: .*pydicom.*--range LOW"):
        read_image(path)
    with pytest.raises(ImageError, match="DICOM"):
        read_image(BytesIO(path.read_bytes()))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_is_read_and_the_number_said(suffix: str, tmp_path: Path) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    frames = [Image.new("RGB", (20, 10), colour) for colour in colours]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    image = read_image(path)
    assert image.info["frames"] == 3
    assert np.abs(np.asarray(image).astype(int) - colours[0]).max() < 12
    frames[0].save(path)
    assert read_image(path).info["frames"] == 1


def test_an_open_file_is_read_as_its_path_is(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    with path.open("rb") as opened:
        assert np.array_equal(np.asarray(read_image(opened)), noise)
    with pytest.raises(ImageError, match=r"missing; did you mean noise\.png"):
        read_image(tmp_path / "nois.png")
