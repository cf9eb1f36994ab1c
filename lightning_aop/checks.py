"""What is refused at the public edge: messages name the value, what was expected and what to do."""

import math
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from lightning_aop.errors import InvalidTypeError, InvalidValueError, NonFiniteScoreError
from lightning_aop.types import Targets


def is_made(value: object, protocol: type) -> bool:
    """Tell whether a value has a protocol's methods, and is no class that has yet to be made one."""
    return isinstance(value, protocol) and not isinstance(value, type)


def in_words(value: object) -> str:
    """Return what a value of the wrong type is, in words."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not {value.__name__}()"
    return repr(value) if isinstance(value, (str, int, float)) else type(value).__name__


def require_score(score: object) -> None:
    """Raise TypeError for a score that is no function, such as its name."""
    if not callable(score):
        raise InvalidTypeError(
            f"score must be a function such as scores.softmax, got {in_words(score)}"
        )


def require_tensors(**values: object) -> None:
    """Raise TypeError for an argument that is no tensor: an array, a list, a number, or None."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            kind = "None" if value is None else type(value).__name__
            raise InvalidTypeError(
                f"{name} must be a torch.Tensor, got {kind}: {_as_tensor(name, value)}"
            )


def _as_tensor(name: str, value: object) -> str:
    """Return how what is no tensor becomes one."""
    if value is None:
        return "give one"
    if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
        return f"convert it with torch.stack({name})"
    if isinstance(value, Integral):
        return f"give one for each image, such as torch.tensor([{value}])"
    if isinstance(value, np.ndarray) and any(stride < 0 for stride in value.strides):
        return f"convert it with torch.as_tensor({name}.copy())"
    return f"convert it with torch.as_tensor({name})"


def check_batch(images: Tensor, targets: Tensor) -> None:
    """Raise ValueError or TypeError unless `images` [B,C,H,W] and `targets` [B] fit each other."""
    require_tensors(images=images, targets=targets)
    if images.ndim != 4:
        hint = "; add a batch dimension with images[None]" if images.ndim == 3 else ""
        raise InvalidValueError(
            f"images must have shape [B, C, H, W], got {list(images.shape)}{hint}"
        )
    if not images.is_floating_point():
        raise InvalidTypeError(
            f"images must be floating point, got {images.dtype}: scale and normalise them as for "
            "training (for uint8 pictures: images.float() / 255)"
        )
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        remedy = "for multilabel data repeat the image once for each class that is explained"
        if targets.shape == (len(images), 1):
            remedy = "give targets[:, 0]" + ".long()" * targets.is_floating_point()
        elif targets.ndim == 2 and bool(((targets != 0).sum(dim=1) == 1).all()):
            remedy += ", of one-hot targets give targets.argmax(dim=1)"
        raise InvalidValueError(
            "targets must hold one class index an image, an integer tensor of shape [B], got "
            f"{targets.dtype} of shape {list(targets.shape)}; {remedy}"
        )
    if len(images) != len(targets):
        raise InvalidValueError(
            f"images and targets must have the same length, got {len(images)} images and "
            f"{len(targets)} targets: give one target for each image"
        )
    if len(images) == 0:
        raise InvalidValueError("the batch is empty, images has no row: give at least one image")


def require_finite(values: Tensor, targets: Targets, what: str) -> None:
    """Raise NonFiniteScoreError that names the images whose value is NaN or infinite."""
    bad = (~values.reshape(len(values), -1).isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        classes = targets[bad].tolist()
        raise NonFiniteScoreError(
            f"{what} is NaN or infinite for image(s) {bad} (class(es) {classes}): check the model's "
            "weights for NaN (a diverged training?) and the images' normalisation"
        )


def require_positive(owner: str, **values: object) -> None:
    """Raise ValueError, or TypeError, for a setting that must be above zero where it is given."""
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, float | Integral):
            raise InvalidTypeError(f"{owner}: {name} must be a number, got {value!r}")
        if not 0 < float(value) < math.inf:
            raise InvalidValueError(f"{owner}: {name} must be above 0, got {value}")


def require_counts(owner: str, **values: object) -> None:
    """Raise ValueError for a setting that must be a whole number from 1 on where it is given."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Integral):
            raise InvalidTypeError(f"{owner}: {name} must be a whole number, got {value!r}")
    require_positive(owner, **values)
