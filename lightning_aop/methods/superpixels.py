"""Superpixels, the regions that XRAI, the regional multi-scale method and LIME explain by."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from lightning_aop.errors import MissingPackageError

__all__ = ["require_slic", "superpixels"]


def superpixels(
    image: Float[np.ndarray, "h w c"], counts: Sequence[int]
) -> list[Integer[np.ndarray, "h w"]]:
    """Return one map of SLIC labels (Achanta et al. 2012) for each number of superpixels asked for.

    SLIC rescales the image's own range to [0, 1], so normalised images will do, and may return fewer
    superpixels than asked for. Three channels are taken for RGB and compared in Lab colours. Any
    other number is compared as it is, with a compactness of 0.1 in place of 10: lightness in Lab
    has the range 100 and not 1, and with 10 the superpixels would be plain squares.

    Raises:
        ImportError: scikit-image is not installed.
    """
    slic = require_slic()
    rgb = image.shape[2] == 3
    pixels, compactness = image.astype(np.float64), 10.0 if rgb else 0.1
    return [
        slic(pixels, n_segments=n, compactness=compactness, convert2lab=rgb, channel_axis=-1)
        for n in counts
    ]


def require_slic() -> Callable[..., Any]:
    """Return SLIC; called before a model is evaluated, an error comes before the work and not after.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise MissingPackageError(
            'superpixels need scikit-image: install it with pip install "lightning-aop[methods]"'
        ) from error
    return slic  # type: ignore[no-any-return]
