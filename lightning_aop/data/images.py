"""From a picture file to the tensor that a network takes, and its masks along with it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from lightning_aop.errors import FileError, InvalidValueError
from lightning_aop.ops import resize
from lightning_aop.scores import full_precision
from lightning_aop.types import Maps

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Pillow's module and its class share a name.
Picture: TypeAlias = Image.Image
_Shaped = TypeVar("_Shaped", Picture, Tensor)


class PictureError(FileError):
    """A picture that can't be read, or is not the one that was annotated."""


def read_picture(folder: Path, name: str, size: tuple[int, int] | None = None) -> Picture:
    """Read a picture in RGB.

    Greyscale, palette, CMYK, 16-bit and transparent pictures are converted to what a viewer shows;
    one that is transparent lies on white.

    Args:
        folder: nothing outside it is read, by links neither.
        name: the file, relative to the folder.
        size: the width and height that it must have, as stored or turned as its EXIF data says.

    Raises:
        PictureError: in words for the user, who knows which file it is about.
    """
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PictureError(f"it is a link out of {folder}, and nothing outside is read")
        # Opening a pipe would wait for ever.
        if not path.is_file():
            raise PictureError("it is no file" if path.exists() else "the file is missing")
        if path.stat().st_size == 0:
            raise PictureError("the file is empty")
        with warnings.catch_warnings():
            # A bomb that Pillow only warns of has four times more pixels than any photo.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency")
            with Image.open(path) as opened:
                if opened.format == "EPS":
                    raise PictureError("it is PostScript, a program that is not run")
                opened.load()
                turned = size is not None and opened.size != size
                picture = _rgb(ImageOps.exif_transpose(opened) if turned else opened)
    except PictureError:
        raise
    except Exception as error:
        # Pillow raises whatever its decoders stumble over: OSError, SyntaxError, struct.error, …
        raise PictureError(f"it can't be read ({type(error).__name__}: {error})") from error
    if size is not None and picture.size != size:
        raise PictureError(
            f"it has {picture.width} x {picture.height} pixels, where {size[0]} x {size[1]} are "
            "annotated, so that the masks would not fit"
        )
    return picture


def _rgb(picture: Picture) -> Picture:
    if picture.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        # Pillow would clip these to white instead of scaling them.
        values = np.asarray(picture, dtype=np.float64)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise PictureError(f"its pixels (Pillow's mode {picture.mode}) have no range known")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def to_tensor(picture: Picture) -> Float[Tensor, "3 h w"]:
    """Return the picture at its own size as floats in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Preprocess:
    """The picture at one size, normalised; its masks take the same way.

    Attributes:
        size: of the result, in pixels.
        resize: "squash" the whole picture into the square, as in the paper; or "crop": the shorter
            side to 8/7 of the size (256 for 224), and the square in the middle.
        mean: one number a channel, in [0, 1].
        std: one number a channel.
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

    def __call__(self, picture: Picture) -> Float[Tensor, "3 size size"]:
        """Return the network's input."""
        image = to_tensor(self._shaped(picture, v2.InterpolationMode.BILINEAR))
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / std

    def masks(self, masks: Bool[np.ndarray, "k h w"]) -> Bool[Tensor, "k size size"]:
        """Return masks of a picture as they lie on the network's input, by nearest neighbour."""
        shaped = self._shaped(torch.from_numpy(masks).byte(), v2.InterpolationMode.NEAREST_EXACT)
        return shaped.bool()

    def photo_maps(self, maps: Maps, size: tuple[int, int]) -> Float[Tensor, "b height width"]:
        """Return maps of the network's input as they lie on a picture of `size` = (height, width).

        Bilinearly, anti-aliased where the picture is smaller than the input; what a crop leaves out
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
        # Of a long strip only the middle is seen, and the whole could be too large once resized.
        height, width = v2.functional.get_size(image)
        most = 8 * min(height, width)
        image = v2.functional.center_crop(image, [min(height, most), min(width, most)])
        wider = v2.functional.resize(image, [round(self.size * 8 / 7)], interpolation)
        return cast("_Shaped", v2.functional.center_crop(wider, [self.size]))
