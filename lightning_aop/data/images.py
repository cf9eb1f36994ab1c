"""From an image file to the tensor that a network takes, and its masks along with it."""

import importlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.transforms import v2

from lightning_aop.errors import FileError, InvalidValueError, did_you_mean_file
from lightning_aop.ops import resize
from lightning_aop.scores import full_precision
from lightning_aop.types import Maps

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ValueRange: TypeAlias = tuple[float, float]
_Shaped = TypeVar("_Shaped", Image.Image, Tensor)


_PHOTOMETRIC = 262
"""The tag of a TIFF whose value 0 says that its value 0 is white."""


class ImageError(FileError):
    """An image that can't be read, or is not the one that was annotated.

    Attributes:
        link: it is a link out of the folder that may be read.
    """

    link = False


def read_image(
    path: Path | BytesIO | BufferedReader,
    size: tuple[int, int] | None = None,
    value_range: ValueRange | None = None,
    root: Path | None = None,
    exif: bool = True,
) -> Image.Image:
    """Read an image file as a viewer shows it: upright, in RGB, transparent parts on white.

    Greyscale, palette, CMYK and 16-bit images are converted to 8-bit RGB; of an animation the first
    frame is read, and the result's `info["frames"]` says of how many.

    Args:
        path: the file, or one that is open for reading from its beginning.
        size: the width and height that it must have. One that has them only as stored, before it is
            turned upright as its EXIF data says, is left as stored, so that its masks fit.
        value_range: the values that are shown black and white, for greyscale images of more than 8
            bits; by default (0, 65535) for 16 bits. An image of 8 bits is not changed by it.
        root: a folder; a file outside it is refused, a link that leads out of it too.
        exif: turn it upright.

    Raises:
        ImageError: in words for the user, who knows which file it is about.
    """
    if value_range is not None and not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise InvalidValueError(
            f"the value range must be two finite numbers, the lower one first, got {value_range}"
        )
    try:
        if isinstance(path, Path):
            _check_file(path, root)
        with warnings.catch_warnings():
            # A bomb that Pillow only warns of has four times more pixels than any photo.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency")
            with _deep_tiff(path, value_range) or Image.open(path) as opened:
                if opened.format == "EPS":
                    raise ImageError("it is PostScript, a program that is not run")
                # Pillow keeps the upper 8 of 16 bits per channel; only the raw mode shows it.
                deep = ";16" in str(getattr(opened, "tile", ""))
                # And inverts a TIFF whose 0 is white only up to 8 bits.
                tags = opened.tag_v2 if isinstance(opened, TiffImageFile) else {}
                negative = tags.get(_PHOTOMETRIC) == 0
                opened.load()
                upright = ImageOps.exif_transpose(opened) if exif else opened
                fits = size in (None, upright.size) or opened.size != size
                image = _rgb(upright if fits else opened, value_range, deep, negative)
                # A phone's JPEG may hold a second image (MPO), which no viewer shows.
                moves = opened.format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
                image.info["frames"] = getattr(opened, "n_frames", 1) if moves else 1
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"it can't be read: {_unknown(path)}") from error
    except Exception as error:
        # Pillow raises whatever its decoders stumble over: OSError, SyntaxError, struct.error, …
        raise ImageError(f"it can't be read ({type(error).__name__}: {error})") from error
    if size is not None and image.size != size:
        raise ImageError(
            f"it has {image.width} x {image.height} pixels, where {size[0]} x {size[1]} are "
            "annotated, so that the masks would not fit"
        )
    return image


def _check_file(path: Path, root: Path | None) -> None:
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        outside = ImageError(f"it is a link out of {root}, and nothing outside is read")
        outside.link = True
        raise outside
    # Opening a pipe would wait for ever.
    if not path.is_file():
        raise ImageError(
            "it is not a file" if path.exists() else f"the file is missing{did_you_mean_file(path)}"
        )
    if path.stat().st_size == 0:
        raise ImageError("the file is empty")


def _unknown(path: Path | BytesIO | BufferedReader) -> str:
    """Return why Pillow does not know a file, and the way out."""
    if isinstance(path, Path):
        with path.open("rb") as opened:
            start = opened.read(132)
    else:
        path.seek(0)
        start = path.read(132)
    if start[128:] == b"DICM":
        return (
            "it is DICOM, which is not supported: save its pixels as TIFF, "
            "Image.fromarray(pydicom.dcmread(FILE).pixel_array).save('image.tif'), and name the values "
            "that are black and white: --range LOW HIGH"
        )
    if start[:4] in (b"II*\0", b"MM\0*"):
        return (
            "it is a TIFF of a kind that Pillow does not read, such as colours of floats: pip install "
            "tifffile, or save it with 8 bits a channel"
        )
    if start[:3] == b"\xff\xd8\xff" or start[:4] in (b"\x89PNG", b"GIF8", b"RIFF"):
        return "it is damaged or cut short: copy or download it again"
    return "it is no image that Pillow reads: save it as PNG, JPEG or TIFF"


def _deep_tiff(
    path: Path | BytesIO | BufferedReader, value_range: ValueRange | None
) -> Image.Image | None:
    """Read a TIFF of deep colours or of floats other than 32 bits, where tifffile is installed.

    Returns:
        None for what Pillow reads: it keeps 8 bits of colours, and knows no other floats.
    """
    if isinstance(path, Path):
        with path.open("rb") as opened:
            start = opened.read(4)
    else:
        start = path.read(4)
        path.seek(0)
    if start not in (b"II*\0", b"MM\0*"):
        return None
    try:
        tool = importlib.import_module("tifffile")
        with tool.TiffFile(path) as tiff:
            page = tiff.pages[0]
            colours = page.photometric == 2 and page.samplesperpixel >= 3
            shallow = page.dtype is None or page.dtype.itemsize == 1
            known = not colours and page.dtype not in (np.float16, np.float64)
            if shallow or known or page.size > 4 * (Image.MAX_IMAGE_PIXELS or math.inf):
                return None
            values = page.asarray().astype(np.float64)
            if colours and page.planarconfig == 2:
                values = np.moveaxis(values, 0, -1)
            values = values[..., :3] if colours else values
            negative = page.photometric == 0
            floats, orientation = page.dtype.kind == "f", int(page.tags.valueof(274, 1))
    except (
        ImportError,
        ValueError,
    ):  # it is not installed, or knows the file's compression less than Pillow
        return None
    finally:
        if not isinstance(path, Path):
            path.seek(0)
    pixels = _bytes(values, value_range, "F" if floats else "I;16")
    image = Image.fromarray(255 - pixels if negative else pixels).convert("RGB")
    image.getexif()[0x0112] = orientation
    return image


def _bytes(
    values: Float[np.ndarray, "h w *c"], value_range: ValueRange | None, mode: str
) -> UInt8[np.ndarray, "h w *c"]:
    """Return values scaled so that a range becomes black to white."""
    low, high = value_range or _full_range(values, mode)
    scaled = np.round(((values - low) / (high - low)).clip(0, 1) * 255)
    if not np.isfinite(scaled).all():
        raise ImageError("it has pixels that are not a number: replace them")
    return scaled.astype(np.uint8)


def _rgb(
    image: Image.Image, value_range: ValueRange | None, deep: bool, negative: bool
) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        # Pillow would clip these to white instead of scaling them.
        values = np.asarray(image, dtype=np.float64)
        grey = _bytes(values, value_range, image.mode)
        grey = 255 - grey if negative else grey
        grey[values == image.info.get("transparency")] = 255
        return Image.fromarray(grey).convert("RGB")
    if deep and value_range is not None:
        raise ImageError(
            "its 16-bit colours can't be read over a range: save it as TIFF and pip install tifffile, "
            "or save it with 8 bits a channel"
        )
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    if deep and 0 < max(high for _, high in cast("list[tuple[int, int]]", image.getextrema())) < 16:
        raise ImageError(
            "its 16-bit colours use less than 1/16 of their range and would be nearly black: save it "
            "with 8 bits a channel"
        )
    return image


def _full_range(values: Float[np.ndarray, "h w *c"], mode: str) -> ValueRange:
    """Return the range of 16 bits, unless the values leave it, or hardly use it."""
    low, high = values.min(), values.max()
    span = (0, 4095) if 0 <= low <= high < 4096 and mode != "F" else (low, high)
    remedy = (
        f"say which values are black and white, as in value_range=({span[0]:g}, {span[1]:g}), or "
        f"--range {span[0]:g} {span[1]:g} on the command line"
    )
    if mode == "F" or not 0 <= low <= high <= 65535:
        raise ImageError(
            f"its values from {low:g} to {high:g} (Pillow's mode {mode}) have no known range: {remedy}"
        )
    if 0 < high < 4096:
        raise ImageError(
            f"its values end at {high:g} of 65535, as those of 12-bit cameras and scanners do, and it "
            f"would be nearly black: {remedy}"
        )
    return 0, 65535


def to_tensor(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """Return the image at its own size as floats in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Preprocess:
    """An image at one size, normalised; its masks take the same way.

    Attributes:
        size: of the result, in pixels.
        resize: "squash" the whole image into the square, as in the paper; or "crop": the shorter
            side to 8/7 of the size (256 for 224), and the square in the middle.
        mean: one number per channel, in [0, 1].
        std: one number per channel.
    """

    size: int = 224
    resize: Literal["squash", "crop"] = "squash"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.resize not in ("squash", "crop"):
            raise InvalidValueError(f"resize must be 'squash' or 'crop', got {self.resize!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3:
                raise InvalidValueError(
                    f"{name} must hold 3 numbers, one for red, green and blue, got {list(values)}"
                )
            if not all(math.isfinite(value) for value in values):
                raise InvalidValueError(f"{name} must be finite, got {list(values)}")
        if min(self.std) <= 0:
            raise InvalidValueError(f"std must be above 0 in every channel, got {list(self.std)}")

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 size size"]:
        """Return the network's input."""
        values = to_tensor(self._shaped(image, v2.InterpolationMode.BILINEAR))
        mean, std = (values.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (values - mean) / std

    def masks(self, masks: Bool[np.ndarray, "k h w"]) -> Bool[Tensor, "k size size"]:
        """Return masks of an image as they lie on the network's input, by nearest neighbour."""
        shaped = self._shaped(torch.from_numpy(masks).byte(), v2.InterpolationMode.NEAREST_EXACT)
        return shaped.bool()

    def photo_maps(self, maps: Maps, size: tuple[int, int]) -> Float[Tensor, "b height width"]:
        """Return maps of the network's input as they lie on an image of `size` = (height, width).

        Bilinearly, anti-aliased where the image is smaller than the input; what a crop leaves out
        has 0. Computed in float64 and then rounded, so that equal values stay equal.
        """
        precise = maps.double()
        if self.resize == "squash":
            return resize(precise, size).to(full_precision(maps))
        side = max(1, round(min(size) * self.size / round(self.size * 8 / 7)))
        top, left = ((whole - side) // 2 for whole in size)
        placed = full_precision(maps).new_zeros(len(maps), *size)
        placed[:, top : top + side, left : left + side] = resize(precise, (side, side))
        return placed

    def _shaped(self, image: _Shaped, interpolation: v2.InterpolationMode) -> _Shaped:
        if self.resize == "squash":
            size = [self.size, self.size]
            return cast("_Shaped", v2.functional.resize(image, size, interpolation))
        return middle(image, self.size, round(self.size * 8 / 7), interpolation)


def middle(image: _Shaped, size: int, shorter: int, interpolation: v2.InterpolationMode) -> _Shaped:
    """Return the square of `size` pixels in the middle, the shorter side resized to `shorter` first."""
    # Of a long strip only the middle is seen, and the whole could be too large once resized.
    height, width = v2.functional.get_size(image)
    most = 8 * min(height, width)
    image = v2.functional.center_crop(image, [min(height, most), min(width, most)])
    wider = v2.functional.resize(image, [shorter], interpolation)
    return cast("_Shaped", v2.functional.center_crop(wider, [size]))
