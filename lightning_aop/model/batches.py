"""Where the images of a batch are, and the same batch with other images in their place.

A batch is a tensor, or a tuple, list, dictionary, named tuple, dataclass or plain object around one.
Nothing here writes to the user's batch: a batch with other images is a shallow copy.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import normalize

from lightning_aop.errors import InvalidValueError
from lightning_aop.scores import full_precision
from lightning_aop.types import Images

__all__ = ["BatchError", "ImageForm", "Inputs", "find_inputs", "members", "rows_of"]

IMAGE_NAMES = (
    *("image", "images", "pixel_values", "img", "imgs", "x", "input", "inputs", "data"),
    *("picture", "pictures", "photo", "rgb", "pixels", "jpg", "jpeg", "png", "webp", "ppm"),
)

_Path: TypeAlias = tuple[object, ...]


class BatchError(InvalidValueError):
    """A batch in which no images, or no usable labels, were found."""


@dataclass(frozen=True)
class ImageForm:
    """How a user's batch holds images that are [B, C, H, W] in floating point here.

    Attributes:
        bytes: uint8 in 0..255; here they are in [0, 1].
        channels_last: [B, H, W, C].
        listed: a list of images [C, H, W] of one size.
        integers: the integer dtype of other integers (16 bits a channel), whose values stay.
        grey: [B, H, W], without a channel.
    """

    bytes: bool = False
    channels_last: bool = False
    listed: bool = False
    integers: torch.dtype | None = None
    grey: bool = False

    @classmethod
    def of(cls, raw: Any) -> "ImageForm | None":
        """Return the form of what may be images, None if it is none."""
        grey = _is_grey(raw)
        if grey:
            raw = raw[:, None]
        if _is_list_of_images(raw):
            raw, listed = raw[0][None], True
        elif isinstance(raw, Tensor) and raw.ndim == 4:
            listed = False
        else:
            return None
        last = raw.shape[3] in (1, 3, 4) and raw.shape[1] not in (1, 3, 4)
        whole = not raw.is_floating_point() and raw.dtype not in (torch.uint8, torch.bool)
        return cls(raw.dtype == torch.uint8, last, listed, raw.dtype if whole else None, grey)

    def inside(self, raw: Any) -> Images:
        """Return the images of a batch as [B, C, H, W] in floating point."""
        images: Tensor = torch.stack(list(raw)) if self.listed else raw
        images = images[:, None] if self.grey else images
        if self.channels_last:
            images = images.permute(0, 3, 1, 2)
        if self.bytes:
            return images.float() / 255
        return images if images.is_floating_point() else images.float()

    def outside(self, images: Images, exact: bool = False) -> Any:
        """Return images as the batch has them; integers stay floating point unless `exact`."""
        if self.bytes:
            images = images * 255
        if exact:
            dtype = torch.uint8 if self.bytes else self.integers
            images = images if dtype is None else images.round().to(dtype)
        if self.channels_last:
            images = images.permute(0, 2, 3, 1)
        images = images[:, 0] if self.grey else images
        return list(images) if self.listed else images

    @property
    def integer(self) -> bool:
        """Whether the pixels are integers."""
        return self.bytes or self.integers is not None

    @property
    def described(self) -> str:
        """The form in words, empty for [B, C, H, W] in floating point."""
        words = [
            "a list of" * self.listed,
            "uint8" * self.bytes,
            str(self.integers).removeprefix("torch.") * (self.integers is not None),
            "channels-last" * self.channels_last,
            "channelless" * self.grey,
        ]
        found = " ".join(word for word in words if word)
        return found and f"{found} images"


@dataclass(frozen=True)
class Inputs:
    """A batch, and the images in it.

    Attributes:
        batch: as the user's loader gives it.
        path: the keys, attributes and indices that lead to the images; empty if it is the images.
        form: how the batch holds them.
        images: [B, C, H, W] in floating point.
    """

    batch: Any = field(repr=False)
    path: _Path
    form: ImageForm
    images: Images = field(repr=False)

    @property
    def bare(self) -> bool:
        """Whether the batch is nothing but its images."""
        return not self.path

    @property
    def part(self) -> "Inputs":
        """The part of the batch that holds the images, as a batch of its own."""
        return replace(self, batch=dict(members(self.batch))[self.path[0]], path=self.path[1:])

    def first(self, count: int | None) -> "Inputs":
        """Return the batch of the first samples."""
        if count is None or count >= len(self.images):
            return self
        rows = torch.arange(count)
        batch = rows_of(self.batch, rows, len(self.images))
        return replace(self, batch=batch, images=self.images[:count])

    def with_images(self, images: Images, exact: bool = False) -> Any:
        """Return a copy of the batch that holds these images, and the other values of their rows.

        An image that is not in the batch, such as one with pixels deleted, has the values of the one
        that it is most like.
        """
        raw = self.form.outside(images, exact)
        if self.bare:
            return raw
        return _replaced(rows_of(self.batch, self.rows(images), len(self.images)), self.path, raw)

    def value(self, name: str, images: Images) -> Any:
        """Return what the batch has under a name, for each of these images."""
        return rows_of(dict(members(self.batch))[name], self.rows(images), len(self.images))

    def rows(self, images: Images) -> Int[Tensor, " n"]:
        """Return for each image the row of the batch whose image it is most like."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            given = normalize(full_precision(images.detach()).flatten(1), dim=1)
            return (given @ self._directions.to(given).T).argmax(dim=1)

    @cached_property
    def _directions(self) -> Tensor:
        return normalize(full_precision(self.images.detach()).flatten(1), dim=1)


def find_inputs(batch: Any, images: object = None) -> Inputs:
    """Return the images of a batch: what is named like images, or else the first [B, C, H, W].

    `images` are those in the batch that are wanted, where that is known.

    Raises:
        BatchError: there are none, or they are signals, volumes or images of several sizes.
    """
    candidates = [c for c in _walk(batch) if images is None or c[1] is images]
    named = [c for c in candidates if c[0] and str(c[0][-1]).lower() in IMAGE_NAMES]
    forms = [(path, raw, ImageForm.of(raw)) for path, raw in (*named, *candidates)]
    several = [each for each in forms if each[2] is not None and not each[2].grey]
    for path, raw, form in several or forms:
        # [3, H, W] is one image, unless something else in the batch has as many rows.
        several_rows = any(
            isinstance(other, Tensor) and other.ndim in (1, 2) and len(other) == len(raw)
            for _, other in candidates
        )
        if form is not None and not (form.grey and len(raw) in (1, 3, 4) and not several_rows):
            return Inputs(batch, path, form, form.inside(raw))
    raise BatchError(_refusal(batch, [raw for _, raw in (*named, *candidates)]))


def _refusal(batch: Any, values: Sequence[Any]) -> str:
    remedy = "pass probe=(images, labels), or read_batch=fn with fn(batch) -> (images, labels)"
    for value in values:
        if isinstance(value, np.ndarray) and value.ndim in (3, 4):
            return (
                f"the batch has a NumPy array {list(value.shape)}, and images must be a tensor "
                "[B, C, H, W], beside labels that are a tensor or list: pass "
                "probe=(torch.as_tensor(images), labels), or read_batch=fn that returns such a pair"
            )
        if isinstance(value, Tensor) and value.ndim == 5:
            return (
                f"the batch has volumes or videos, {list(value.shape)}: only images [B, C, H, W] are "
                f"explained; {remedy} for slices of them"
            )
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return (
                f"the batch has {list(value.shape)}, 1-D signals [B, C, L] or a single image: only "
                f"batches of images [B, C, H, W] are explained; {remedy}"
            )
        images = isinstance(value, (list, tuple)) and all(
            isinstance(each, Tensor) and each.ndim == 3 for each in value
        )
        if images and len({tuple(v.shape) for v in value}) > 1:
            sizes = sorted({tuple(v.shape) for v in value})[:3]
            return (
                f"the images of the batch have several sizes, such as {sizes}: the probe takes images "
                f"of one size; {remedy}"
            )
    keys = f" with keys {list(batch)}" if isinstance(batch, Mapping) else ""
    shape = f" {list(batch.shape)}" if isinstance(batch, Tensor) else ""
    return f"no images [B, C, H, W] found in a {type(batch).__name__}{keys}{shape}: {remedy}"


def members(batch: Any) -> list[tuple[object, Any]]:
    """Return what a batch is made of, by key, attribute or index; nothing for a tensor or text."""
    if isinstance(batch, Mapping):
        return list(batch.items())
    if isinstance(batch, (Tensor, str, bytes, type)):
        return []
    if isinstance(batch, (tuple, list)):
        return list(zip(getattr(batch, "_fields", range(len(batch))), batch, strict=True))
    if is_dataclass(batch):
        return [(f.name, getattr(batch, f.name)) for f in fields(batch) if hasattr(batch, f.name)]
    found = getattr(batch, "__dict__", {})
    return [(name, value) for name, value in found.items() if not name.startswith("__")]


def rows_of(value: Any, rows: Tensor, count: int) -> Any:
    """Return the given rows of everything in a batch of `count` samples."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == count else value
    if isinstance(value, (list, tuple)):
        if not any(isinstance(v, Tensor) and v.ndim and len(v) == count for v in value) and (
            len(value) == count
        ):
            return type(value)([value[row] for row in rows.tolist()])
    elif not isinstance(value, Mapping) and not is_dataclass(value):
        return value
    for key, part in members(value):
        if (taken := rows_of(part, rows, count)) is not part:
            value = _replaced(value, (key,), taken)
    return value


def _replaced(batch: Any, path: _Path, value: Any) -> Any:
    """Return a shallow copy of the batch with another value at the path."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    inner = _replaced(dict(members(batch))[key], rest, value)
    if isinstance(batch, tuple):
        if hasattr(batch, "_replace"):
            return batch._replace(**{str(key): inner})
        return tuple(inner if index == key else part for index, part in enumerate(batch))
    changed: Any = copy.copy(batch)
    if isinstance(batch, (Mapping, list)):
        changed[key] = inner
    else:
        object.__setattr__(changed, str(key), inner)
    return changed


def _walk(batch: Any, path: _Path = (), depth: int = 4) -> Iterator[tuple[_Path, Any]]:
    """Go through a batch and all that it is made of, in order."""
    yield path, batch
    if depth and not _is_list_of_images(batch):
        for key, part in members(batch):
            yield from _walk(part, (*path, key), depth - 1)


def _is_grey(value: Any) -> bool:
    """Tell images without a channel from signals [B, C, L] and from one image [C, H, W]."""
    if not isinstance(value, Tensor) or value.ndim != 3 or value.dtype == torch.bool:
        return False
    height, width = value.shape[1:]
    return min(height, width) >= 8 and max(height, width) <= 2 * min(height, width)


def _is_list_of_images(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if not all(isinstance(v, Tensor) and v.ndim == 3 for v in value):
        return False
    channels = value[0].shape[0] in (1, 3, 4)
    return channels and len({tuple(v.shape) for v in value}) == 1
