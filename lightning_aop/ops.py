"""Maths that several modules share: resize, min-max, gaussian blur, total variation and the blend."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.scores import full_precision
from lightning_aop.types import CoarseMaps, Images, Maps

__all__ = ["Baseline", "Constant", "GaussianBlur", "blend", "min_max", "resize", "total_variation"]


def resize(
    maps: CoarseMaps, size: tuple[int, int], align_corners: bool = False
) -> Float[Tensor, "b h w"]:
    """Resample maps bilinearly to `size` = (height, width); shrinking is anti-aliased.

    `align_corners` has torch's meaning and counts only where maps are upsampled.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    return F.interpolate(
        maps[:, None],
        size=size,
        mode="bilinear",
        align_corners=align_corners and not shrinks,
        antialias=shrinks,
    ).squeeze(1)


def min_max(maps: CoarseMaps) -> CoarseMaps:
    """Stretch each map to [0, 1] (paper, Eq. 4). A constant map has no range and becomes zero."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def total_variation(masks: CoarseMaps, exponent: int = 2) -> Float[Tensor, " b"]:
    """Return mean |row difference|^exponent + mean |column difference|^exponent of each mask."""
    rows = masks.diff(dim=1).abs().pow(exponent).mean(dim=(1, 2))
    columns = masks.diff(dim=2).abs().pow(exponent).mean(dim=(1, 2))
    return rows + columns


def blend(images: Images, baseline: Images, keep: Maps) -> Images:
    """Return Φ = x ⊙ keep + baseline ⊙ (1 − keep), the same mask for all channels (paper, Eq. 6)."""
    return torch.lerp(baseline, images, keep[:, None].to(images.dtype))


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a gaussian of `kernel` pixels width (odd) and standard deviation `sigma` pixels.

    The default is the paper's "highly blurred version" of a 224 × 224 image. `padding` says what
    lies beyond the border: "reflect", which works for images of any size, also smaller than the
    kernel, or "zeros". Computed in float32 or wider whatever the autocast state, and
    returned in the images' dtype.
    """

    kernel: int = 51
    sigma: float = 50.0
    padding: Literal["reflect", "zeros"] = "reflect"

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InvalidValueError(
                f"GaussianBlur: kernel must be a positive odd number of pixels, got {self.kernel}"
            )
        if self.sigma <= 0:
            raise InvalidValueError(f"GaussianBlur: sigma must be above 0 pixels, got {self.sigma}")
        if self.padding not in ("reflect", "zeros"):
            raise InvalidValueError(
                f"GaussianBlur: padding must be 'reflect' or 'zeros', got {self.padding!r}"
            )

    def __call__(self, images: Images) -> Images:
        """Return the blurred images."""
        height, width = images.shape[-2:]
        with torch.autocast(images.device.type, enabled=False):
            pixels = full_precision(images)
            rows, columns = (
                _blur_matrix(
                    side, self.kernel, self.sigma, self.padding, pixels.dtype, pixels.device
                )
                for side in (height, width)
            )
            return (rows @ pixels @ columns.T).to(images.dtype)


@dataclass(frozen=True)
class Constant:
    """Fill with one value in every channel; RISE deletes with 0, the mean of a normalised image."""

    value: float = 0.0

    def __call__(self, images: Images) -> Images:
        """Return images that hold the value everywhere."""
        return torch.full_like(images, self.value)


if TYPE_CHECKING:
    _Replaced: TypeAlias = Images
else:
    _Replaced = Any  # as in scores.Score
# The classes are named beside the general type because a command line has to find a type that the
# default, a dataclass, is an instance of.
Baseline: TypeAlias = GaussianBlur | Constant | Callable[[Images], _Replaced]
"""What takes the place of removed pixels: a function of the images, such as `GaussianBlur()`."""


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be asked for by a gradient later
def _blur_matrix(
    n: int, kernel: int, sigma: float, padding: str, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "n n"]:
    """Return the 1-D blur of n pixels as a banded matrix on a device, the padding folded in.

    Two products with it equal the padded separable convolution and need no pad, so that an image
    may be smaller than the kernel. Kept, as an accelerator would have to be waited for each time.
    """
    radius = kernel // 2
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma).square())
    weights = (weights / weights.sum()).expand(n, -1)
    sources = torch.arange(n)[:, None] + offsets
    if padding == "reflect":
        period = max(2 * (n - 1), 1)
        sources = sources.remainder(period)
        sources = torch.where(sources < n, sources, period - sources)
    else:
        weights = torch.where((sources >= 0) & (sources < n), weights, 0.0)
        sources = sources.clamp(0, n - 1)
    matrix = torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, sources, weights)
    return matrix.to(device, dtype)
