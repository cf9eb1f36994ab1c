"""How alike two maps are: rank correlation and SSIM."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_aop.checks import require_tensors
from lightning_aop.errors import InvalidValueError
from lightning_aop.ops import GaussianBlur
from lightning_aop.scores import full_precision
from lightning_aop.types import Maps

__all__ = ["rank_correlation", "ssim"]


def rank_correlation(a: Maps, b: Maps) -> Float[Tensor, " b"]:
    """Return Spearman's correlation in [-1, 1] of each pair of maps, equal values sharing a rank.

    A constant map ranks no pixel above another: with one that does, its correlation is 0. Two
    constant maps rank alike and have 1, so that a method whose map is always blank is not taken for
    one that reacts. A map with NaN has NaN.
    """
    _require_same_shape(a, b)
    x, y = _centred_ranks(a), _centred_ranks(b)
    spread_x, spread_y = x.square().sum(dim=1).sqrt(), y.square().sum(dim=1).sqrt()
    spread = spread_x * spread_y
    correlation = torch.where(spread > 0, (x * y).sum(dim=1) / spread, 0.0)
    correlation = torch.where((spread_x == 0) & (spread_y == 0), 1.0, correlation)
    correlation = correlation.clamp(-1, 1).to(full_precision(a).dtype)
    unknown = (a.isnan() | b.isnan()).flatten(1).any(dim=1)
    return torch.where(unknown.to(correlation.device), torch.nan, correlation)


def ssim(a: Maps, b: Maps) -> Float[Tensor, " b"]:
    """Return the structural similarity in [-1, 1] of each pair of maps (Wang et al. 2004).

    With their gaussian window of 11 × 11 pixels and sigma 1.5, their constants for values in [0, 1],
    and their mean over all places where the window lies inside the map. (torchmetrics takes the
    border in, too, where the window sees mirrored pixels.)
    """
    _require_same_shape(a, b)
    require_room((a.shape[1], a.shape[2]))
    x, y = _double(a), _double(b)
    # In float64, because a variance is a small difference of two means.
    moments = GaussianBlur(_WINDOW, 1.5)(torch.stack([x, y, x * x, y * y, x * y], dim=1))
    edge = _WINDOW // 2
    mean_x, mean_y, xx, yy, xy = moments[..., edge:-edge, edge:-edge].unbind(dim=1)
    means = (2 * mean_x * mean_y + 1e-4) / (mean_x.square() + mean_y.square() + 1e-4)
    variances = (xx - mean_x.square()) + (yy - mean_y.square())
    structure = (2 * (xy - mean_x * mean_y) + 9e-4) / (variances + 9e-4)
    return (means * structure).mean(dim=(1, 2)).clamp(-1, 1).to(full_precision(a).dtype)


_WINDOW = 11


def require_room(size: tuple[int, int]) -> None:
    """Raise ValueError for maps that are smaller than the window of SSIM."""
    if min(size) < _WINDOW:
        raise InvalidValueError(
            f"the structural similarity needs maps of {_WINDOW} by {_WINDOW} pixels or more, its "
            f"window, got {size[0]} by {size[1]}: upsample the images"
        )


def _require_same_shape(a: Maps, b: Maps) -> None:
    require_tensors(a=a, b=b)
    if a.shape != b.shape:
        raise InvalidValueError(
            f"maps must have the same shape to be compared, got {list(a.shape)} and {list(b.shape)}"
        )


def _double(maps: Maps) -> Maps:
    maps = maps.detach()
    return (maps.cpu() if maps.device.type == "mps" else maps).double()  # MPS has no float64


def _centred_ranks(maps: Maps) -> Float[Tensor, "b n"]:
    """Return twice the average rank of each pixel, less its mean; whole numbers.

    torchmetrics and SciPy rank one map after the other, on the host or with a loop over the ties.
    """
    pixels = _double(maps).flatten(1).contiguous()
    ordered = pixels.sort(dim=1).values
    below = torch.searchsorted(ordered, pixels)
    not_above = torch.searchsorted(ordered, pixels, right=True)
    return (below + not_above - pixels.shape[1]).double()
