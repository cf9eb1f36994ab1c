"""A map as heat on its image."""

import math
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.types import Images, Maps

__all__ = ["overlay"]

RGB: TypeAlias = Float[Tensor, "b 3 h w"]

Picture: TypeAlias = UInt8[Tensor, "3 H W"]

# The overlay keeps this much of the photo's colour and brightness. The untouched photo stands beside
# it, and a greyer, darker one cannot be mistaken for heat (an orange cat is not a hot region).
SATURATION, BRIGHTNESS = 0.2, 0.75

# At value 1 a share of the photo stays, so edges remain visible under the peak. The exponent below 1
# is for middling heat, whose colours are dark and would drown in the photo otherwise.
_OPACITY, EXPONENT = 0.85, 0.75

_LUMA = (0.299, 0.587, 0.114)

# Cyan is none of inferno's colours.
LINE = (0.3, 0.95, 1.0)


def displayable(
    images: Images, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> RGB:
    """Turn network inputs into images that can be shown.

    Args:
        images: (b, c, h, w), any range. One channel becomes grey, of two the first is shown as grey,
            of more than three the first three are shown as red, green and blue.
        mean: one number a channel, to undo ``(x - mean) / std``; needs ``std``.
        std: one positive number a channel; needs ``mean``.

    Returns:
        (b, 3, h, w) float32 in [0, 1] on the device of ``images``. With ``mean`` and ``std`` the
        normalisation is undone and the rest is clipped. Without them an image that lies in [0, 1]
        (give or take 1/255, which a resize may overshoot) is kept, and any other is normalised by
        its own minimum and maximum over all shown channels; a constant one becomes mid-grey. NaN and
        infinite pixels become 0.

    Raises:
        ValueError: ``images`` is not 4-D with at least one channel, only one of ``mean`` and ``std``
            is given, their length is not c, or a ``std`` is not positive.
    """
    if images.ndim != 4 or images.shape[1] == 0:
        raise InvalidValueError(
            f"images must have shape [B, C, H, W] with C above 0, got {list(images.shape)}: "
            "add what is missing, a single image becomes a batch with images[None]"
        )
    x = images.detach().float()
    finite = x.isfinite()
    x = torch.where(finite, x, 0.0)
    if mean is not None and std is not None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != x.shape[1]:
                raise InvalidValueError(
                    f"{name} must hold one number for each of the images' {x.shape[1]} channels, "
                    f"got {len(values)}, {list(values)}: give the {name} the images were normalised "
                    "with"
                )
        if min(std) <= 0:
            raise InvalidValueError(
                f"std must be above 0 in every channel, got {list(std)}: give the std the images "
                "were normalised with, or neither mean nor std"
            )
        x = x * x.new_tensor(std).view(-1, 1, 1) + x.new_tensor(mean).view(-1, 1, 1)
    elif mean is not None or std is not None:
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise InvalidValueError(
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
    """Draw maps as heat over images: equal values get equal colours, in every map and at every epoch.

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
        maps: (b, h, w) in [0, 1], never normalised here; values outside are clipped. NaN and
            infinite values are drawn as no heat.

    Returns:
        (b, 3, h, w) float32 in [0, 1] on the device of ``maps``.

    Raises:
        ValueError: ``images`` and ``maps`` differ in b, h or w, or have other dimensions.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InvalidValueError(
            f"images must have shape [B, 3, H, W], got {list(images.shape)}: "
            "turn network inputs into images with displayable()"
        )
    check_same_size(images, maps)
    heat = heat_of(maps)
    image = images.detach().to(heat)
    grey = (image * image.new_tensor(_LUMA).view(-1, 1, 1)).sum(1, keepdim=True)
    base = BRIGHTNESS * torch.lerp(grey.expand_as(image), image, SATURATION)
    return torch.lerp(base, coloured(heat), _OPACITY * heat[:, None] ** EXPONENT)


def coloured(heat: Maps) -> RGB:
    """Return the colour of each value in [0, 1]."""
    level = (heat * 256).long().clamp(max=255)
    return _colours().to(heat.device)[level].movedim(-1, 1)


def check_same_size(images: Images, maps: Maps) -> None:
    expected = [images.shape[0], *images.shape[2:]]
    if list(maps.shape) != expected:
        raise InvalidValueError(
            f"maps must have shape {expected} for images of shape {list(images.shape)}, got "
            f"{list(maps.shape)}: give one map per image, resized to the images' height and width"
        )


def heat_of(maps: Maps) -> Maps:
    return maps.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)


def as_bytes(pictures: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    return (pictures * 255).round().byte()


def outlined(
    pictures: Float[Tensor, "b p 3 y x"], masks: Bool[Tensor, "b p y x"]
) -> Float[Tensor, "b p 3 y x"]:
    """Draw the inner border of each mask as a line with a dark halo, seen on any ground."""
    thick = max(round(max(masks.shape[2:]) / 112), 1)
    inner = 1 - _dilated(1 - masks.to(pictures), thick)  # beyond the image there is no border
    line = masks & (inner < 0.5)
    halo = (_dilated(line.to(pictures), 1) > 0.5) & ~line
    colour = pictures.new_tensor(LINE).view(3, 1, 1)
    shaded = torch.where(halo[:, :, None], 0.25 * pictures, pictures)
    return torch.where(line[:, :, None], colour, shaded)


def _dilated(x: Float[Tensor, "b p y x"], radius: int) -> Float[Tensor, "b p y x"]:
    return F.max_pool2d(x, 2 * radius + 1, stride=1, padding=radius)


def resized(x: Float[Tensor, "b c h w"], scale: float) -> Float[Tensor, "b c H W"]:
    size = [max(round(side * scale), 1) for side in x.shape[2:]]
    if size == list(x.shape[2:]):
        return x
    if scale == int(scale) and (x.shape[1] == 3 or scale == 2):
        # Whole pixels stay what they are: smoothing a 32-pixel image only blurs it. So do those of a
        # map where they are too small to be seen, and make the file half as large.
        return F.interpolate(x, size, mode="nearest")
    # Not bicubic: its overshoot would invent heat beside a sharp edge.
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
