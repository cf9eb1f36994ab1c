"""What the labels of a batch are: classes, several classes, values, masks, and in which form.

`read_batch` finds images and labels in whatever a loader gives. What labels mean may depend on the
model: a column of whole numbers is a class of many outputs, and a value for a single one. So reading
has two steps, and between them the model is asked (see `model/adapter.py`):

    reading = read_batch(batch)
    adapter = find_adapter(module, reading.inputs, reading.expected(module))
    probe = Probe.of(reading, adapter)
"""

import ast
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor, nn

from lightning_aop.model.adapter import Adapter
from lightning_aop.model.batches import BatchError, ImageForm, Inputs, find_inputs, members
from lightning_aop.model.outputs import Expected, Kind, fitting, sums_to_one, written
from lightning_aop.scores import sigmoid, value

__all__ = ["Labels", "Layout", "Parts", "ReadBatch", "Reading", "read_batch"]

ReadBatch: TypeAlias = Callable[[Any], tuple[Any, Any]]
"""The user's own way from a batch to images and labels."""

Path: TypeAlias = tuple[object, ...]

_NAMES = (
    *("label", "labels", "target", "targets", "y", "class", "classes", "cls", "gt_label"),
    *("gt_labels", "category_id", "category", "class_id", "class_idx", "class_index", "label_id"),
    *("label_idx", "fine_label", "labels_id", "ground_truth", "gt", "annotation", "score", "value"),
    *("coarse_label", "attributes", "attr", "age", "output", "outputs", "json"),
)
# What a sample has beside its label.
_NO_LABELS = re.compile(
    r"(.*_)?(u?id|ids|idx|index|indices|number|height|width|size|length|weights?|time|timestamp|date)"
)
_MASKS = ("mask", "masks", "segmentation", "gt_mask", "gt_masks", "semantic_mask", "seg")
_OF_OBJECTS = ("labels", "class_labels", "category_id", "category_ids", "gt_classes", "label")


@dataclass(frozen=True)
class Labels:
    """Labels as the data has them, and what they seem to be.

    Attributes:
        kind: "class" for one class an image; "one-hot", "soft" and "multi-hot" for [N, K] with one
            class, shares of classes that sum to 1, and any number of classes; "value" for numbers
            to predict; "mask" for a class for each pixel; "boxes" for the classes of objects.
        values: [N], [N, K], [N, H, W] or [N, K, H, W], or for boxes a list of class indices for each
            image.
    """

    kind: Kind
    values: Any = field(repr=False)

    @property
    def highest(self) -> int:
        """The highest class, -1 for values; ignored labels below 0 and of 255 in masks don't count."""
        if self.kind == "value":
            return -1
        if self.kind in ("one-hot", "soft", "multi-hot"):
            return int(self.values.shape[1]) - 1
        if self.kind == "boxes":
            return max((int(v.max()) for v in self.values if len(v)), default=-1)
        if self.kind == "mask" and self.values.ndim == 4:
            return int(self.values.shape[1]) - 1
        if self.kind == "mask":
            counted = self.values[self.values != 255]
            return int(counted.max()) if counted.numel() else -1
        # 255 stands for none, as in masks, where the others are far below.
        counted = self.values[self.values != 255]
        return int((counted if len(counted) and counted.max() < 128 else self.values).max())

    @property
    def columns(self) -> int:
        """How many numbers an image has, 0 where it has none of its own, such as of masks."""
        if self.kind in ("mask", "boxes"):
            return 0
        return int(self.values[0].numel()) if len(self.values) else 1

    def expected(
        self, classes: int | None = None, how: tuple[bool, bool, bool] = (False,) * 3
    ) -> Expected:
        """Return what they say of a module's outputs, where it is trained by losses like these."""
        highest = self.highest
        if self.kind == "class" and classes is not None:
            # A higher label is one to ignore.
            below = self.values[self.values < classes]
            highest = int(below.max()) if len(below) else highest
        return Expected(self.kind, highest, classes, *how, columns=self.columns)

    def fitted(
        self,
        outputs: int | None,
        as_values: bool,
        separately: bool,
        like: "Labels | None" = None,
    ) -> "Fitted":
        """Return the labels that the probe has, for a model of that many outputs (None: unknown).

        Args:
            outputs: K.
            as_values: the outputs are values, not classes.
            separately: each class has a probability of its own.
            like: other labels of the same data, where these are too few to tell what they mean.

        Raises:
            BatchError: no label fits the outputs.
        """
        if self.kind == "value" and not as_values:
            of_class = self.values > 0.5 if outputs == 2 else torch.zeros(len(self.values))
            return Fitted(of_class.long())
        if as_values and outputs is not None:
            count = outputs // 2  # values, and their negatives
            both = torch.full((len(self.values), outputs), -1)
            both[:, [0, count]] = 1
            note = (
                f"the model predicts {count} values: the first is explained; name others by "
                f"targets=[1, {count + 1}, …], what raises the second and what lowers it"
            )
            return Fitted(both, note if count > 1 else "")
        if self.kind == "class":
            return self._classes(self.values.long(), outputs, like)
        if self.kind == "soft" or (self.kind == "one-hot" and not separately):
            return self._classes(self.values.argmax(dim=1), outputs)
        if self.kind in ("one-hot", "multi-hot"):
            if outputs is not None and self.values.shape[1] != outputs:
                raise BatchError(_misfit(f"have {self.values.shape[1]} columns", outputs))
            return Fitted(self.values)
        count = outputs if outputs is not None else self.highest + 1
        if self.kind == "mask" and self.values.ndim == 4:  # one for each class
            if outputs is not None and self.values.shape[1] != outputs:
                raise BatchError(_misfit(f"are masks of {self.values.shape[1]} classes", outputs))
            return Fitted((self.values == 1).flatten(2).any(dim=2).float())
        present = torch.zeros(len(self.values), count)
        for row, classes in enumerate(self.values):
            found = classes.unique().long()
            present[row, found[(found >= 0) & (found < count)]] = 1
        return Fitted(present)

    def _classes(
        self, classes: Tensor, outputs: int | None, like: "Labels | None" = None
    ) -> "Fitted":
        known = like.values if like is not None and like.kind == "class" else classes
        if outputs == 2 and set(known.tolist()) == {-1, 1}:
            classes = (classes + 1) // 2  # as for a hinge loss
        most = math.inf if outputs is None else outputs
        rows = [row for row, index in enumerate(classes.tolist()) if not 0 <= index < most]
        if not rows:
            return Fitted(classes)
        if len(rows) == len(classes) and outputs is not None:
            raise BatchError(_misfit(f"are all outside, such as {int(classes[0])}", outputs))
        values = sorted(set(classes[rows].tolist()))[:3]
        note = (
            f"{len(rows)} of {len(classes)} images are not explained, for their labels, such as "
            f"{values}, are none of the {outputs or ''} classes".replace("  ", " ")
        )
        return Fitted(classes.index_fill(0, torch.tensor(rows), -1), note)


@dataclass(frozen=True)
class Fitted:
    """The labels of a probe, [N] with -1 for none or [N, K] multi-hot, and what to say of them."""

    labels: Num[Tensor, "n *k"]
    note: str = ""


def _misfit(what: str, outputs: int) -> str:
    return (
        f"the labels {what}, where the model gives {outputs} outputs an image: set logits=fn, a "
        "function fn(module, images) that returns logits [B, K], or read_batch=fn with "
        "fn(batch) -> (images, labels)"
    )


@dataclass(frozen=True)
class Reading:
    """What was found in a batch.

    Attributes:
        inputs: the images, and the batch around them.
        labels: None where there are none.
        masks: bool [B, H, W], where the labelled class is, or [B, K, H, W], where each class is.
        masks_named: whether the batch calls them masks.
        note: why there are no labels, where that is known.
        heads: by their keys, all that may be the labels, where the batch calls none of several so.
        place: the keys, attributes and indices that lead to the labels.
        places: likewise for each of the heads.
        pixels: whether there are no labels, but values for each pixel beside the images.
        columns: all of its dictionaries that may be labels by their keys, and where they are.
    """

    inputs: Inputs
    labels: Labels | None = None
    masks: Tensor | None = field(default=None, repr=False)
    masks_named: bool = False
    note: str = ""
    heads: Mapping[str, Labels] = field(default_factory=dict, repr=False)
    place: Path | None = None
    places: Mapping[str, Path] = field(default_factory=dict)
    pixels: bool = False
    columns: Mapping[str, tuple[Path, Labels]] = field(default_factory=dict, repr=False)

    def used_by(self, module: nn.Module) -> "Reading":
        """Return it with the labels that a module's losses take from a dictionary, where that is seen.

        Where it isn't, and no key has a name that labels have, the only column there is.
        """
        used = _keys_of_losses(module) & {*self.columns}
        if self.place is not None and str(self.place[-1]).lower() in used:
            return self
        if not used and self.labels is None and not self.pixels:
            likely = [
                key
                for key, (_, labels) in self.columns.items()
                if not (_NO_LABELS.fullmatch(key) or _counts_up(labels))
            ]
            if len(likely) > 1:
                image, label = self.inputs.path[-1], self.columns[likely[0]][0][-1]
                note = (
                    f"which of {', '.join(likely)} has the labels isn't known: say it by read_batch, as "
                    f"in read_batch=lambda batch: (batch[{image!r}], batch[{label!r}])"
                )
                return replace(self, note=note)
            used = {*likely}
        if not used:
            return self
        chosen = {key: each for key, each in self.columns.items() if key in used}
        place, labels = next(iter(chosen.values()))
        return replace(
            self,
            labels=labels,
            note="",
            heads={key: each for key, (_, each) in chosen.items()},
            place=place,
            places={key: path for key, (path, _) in chosen.items()},
        )

    def expected(self, module: nn.Module, classes: int | None = None) -> Expected:
        """Return what the labels, and the names of the classes, say of the module's outputs."""
        how = trained(module)
        if self.labels is None:
            heads = {name: labels.expected(None, how) for name, labels in self.heads.items()}
            return Expected(None, -1, classes, *how, heads=heads, pixels=self.pixels)
        heads = {name: labels.expected(classes, how) for name, labels in self.heads.items()}
        return replace(self.labels.expected(classes, how), heads=heads)

    def head_for(self, adapter: Adapter | None) -> str | None:
        """Return which of the heads an adapter's output has as its labels."""
        if adapter is None or adapter.head in self.heads:
            return None if adapter is None else adapter.head
        if self.labels is None:
            return None
        return fitting(
            {name: each.expected() for name, each in self.heads.items()}, adapter.classes
        )

    def labels_for(self, adapter: Adapter | None) -> Labels | None:
        """Return the labels of the output that an adapter reads."""
        head = self.head_for(adapter)
        labels = self.labels if head is None else self.heads[head]
        if labels is None and adapter is not None and adapter.score is value:
            # What raises a value and what lowers it needs none.
            labels = Labels("value", torch.zeros(len(self.inputs.images)))
        return labels

    def place_for(self, adapter: Adapter | None) -> Path | None:
        """Return where these labels are."""
        head = self.head_for(adapter)
        return self.place if head is None else self.places[head]


@dataclass(frozen=True)
class Parts:
    """Images and labels as a batch has them: none of their values has been looked at.

    Attributes:
        images: in the form of the batch.
        form: which that is.
        labels: likewise.
    """

    images: Any
    form: ImageForm
    labels: Any

    def read(self, names: Sequence[str] | None) -> Labels | None:
        """Return what the labels are."""
        one = self.form.inside(self.images[:1])
        images = one.expand(len(self.images), *one.shape[1:])  # of which none but the size counts
        return as_labels(self.labels, Inputs((), (), self.form, images), names)


@dataclass(frozen=True)
class Layout:
    """Where the images and labels are in all batches of a loader, as one of them has told.

    Attributes:
        made: what the batches are made of.
        images: the keys, attributes and indices that lead to the images.
        labels: likewise, None where there are none.
    """

    made: tuple[object, ...]
    images: Path
    labels: Path | None

    @classmethod
    def of(cls, reading: Reading, adapter: Adapter | None = None) -> "Layout":
        """Return where the batch that was read has its parts; of several labels the adapter's."""
        inputs = reading.inputs
        return cls(_made_of(inputs.batch), inputs.path, reading.place_for(adapter))

    def parts(self, batch: Any) -> Parts | None:
        """Return the parts of another batch, None where it is made otherwise."""
        if _made_of(batch) != self.made:
            return None
        images = _at(batch, self.images)
        form = ImageForm.of(images)
        return None if form is None else Parts(images, form, _at(batch, self.labels))


def parts_by(read: ReadBatch, batch: Any) -> Parts | None:
    """Return the parts of a batch as the user's own function gives them."""
    images, labels = _pair(read(batch))
    form = ImageForm.of(images)
    return None if form is None else Parts(images, form, labels)


def _made_of(batch: Any) -> tuple[object, ...]:
    return (type(batch), *(key for key, _ in members(batch)))


def _at(batch: Any, path: Path | None) -> Any:
    if path is None:
        return None
    for key in path:
        batch = dict(members(batch)).get(key)
    return batch


def read_batch(
    batch: Any,
    limit: int | None = None,
    read: ReadBatch | None = None,
    names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
) -> Reading:
    """Find the images and labels of a batch's first samples.

    Args:
        batch: as a loader gives it.
        limit: how many samples, None for all.
        read: the user's own way to images and labels.
        names: of the classes, where they are known, for labels that are text.
        numbers: of the samples in their dataset, which a batch may have beside the labels.

    Raises:
        BatchError: the batch has no images.
    """
    if read is not None:
        images, given = _pair(read(batch))
        try:  # in the batch itself, which the forward may take
            inputs = find_inputs(batch, images)
        except BatchError:
            inputs = find_inputs((images, given))
        labels = as_labels(given, inputs, names)
        if given is not None and labels is None:
            raise BatchError(
                f"the labels that read_batch returned, a {type(given).__name__}, are no labels of "
                f"{len(inputs.images)} images: return class indices [B], or [B, K]{_text_note(given)}"
            )
        return Reading(inputs.first(limit), _first(labels, limit))
    inputs = find_inputs(batch)
    found = _find(batch, inputs, names, numbers)
    place, labels = found[0] if found else (None, None)
    masks, named = _find_masks(batch, inputs)
    if labels is None and masks is not None:  # which are the labels then
        labels, masks = as_labels(masks.byte(), inputs), None
    note = "" if labels is not None else _unread(batch, inputs)
    masks = None if masks is None else masks[:limit]
    columns = {
        key: (path, Labels(each.kind, each.values[:limit]))
        for key, (path, each) in _heads(batch, inputs, names).items()
    }
    heads = {written(path): (path, each) for path, each in found} if len(found) > 1 else {}
    heads = columns if labels is None else heads
    return Reading(
        inputs.first(limit),
        _first(labels, limit),
        masks,
        named,
        note.lstrip("; "),
        {name: Labels(each.kind, each.values[:limit]) for name, (_, each) in heads.items()},
        place,
        {name: path for name, (path, _) in heads.items()},
        labels is None and _has_pixels(batch, inputs),
        columns,
    )


def _heads(
    batch: Any, inputs: Inputs, names: Sequence[str] | None
) -> dict[str, tuple[Path, Labels]]:
    """Return all that may be labels in the dictionaries of a batch, by key, and where it is."""
    found = {
        name: (path, as_labels(_at(batch, path), inputs, names))
        for path, name in _headed(batch)
        if path != inputs.path
    }
    return {name: (path, each) for name, (path, each) in found.items() if each is not None}


def _headed(batch: Any) -> list[tuple[Path, str]]:
    """Return what stands in the dictionaries of a batch, and its name in small letters."""
    parts: list[tuple[Path, Any]] = [((), batch), *(((key,), part) for key, part in members(batch))]
    return [
        ((*path, key), str(key).lower())
        for path, part in parts
        if isinstance(part, Mapping)
        for key, value in part.items()
        if not isinstance(value, Mapping)
    ]


def _named(batch: Any) -> Any:
    """Return what a batch calls labels, whatever it is; in a tuple its text."""
    parts = {str(key).lower(): part for key, part in members(batch)}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return next((p for p in batch if _is_text(p) and not re.search(r"/|\.\w+$", p[0])), None)
    return next((parts[name] for name in _NAMES if name in parts), None)


def _has_pixels(batch: Any, inputs: Inputs) -> bool:
    """Tell whether a batch has values for each pixel beside its images, as depths are."""
    return any(
        isinstance(part, Tensor) and part.is_floating_point() and part.ndim in (3, 4)
        for key, part in members(batch)
        if (key,) != inputs.path[:1]
    )


def _unread(batch: Any, inputs: Inputs) -> str:
    """Return why what may be meant as labels is none."""
    labels = _named(batch)
    if labels is None and isinstance(batch, (tuple, list)):
        others = (part for key, part in members(batch) if (key,) != inputs.path[:1])
        labels = next((each for each in others if isinstance(each, Tensor)), None)
    count = len(inputs.images)
    if not isinstance(labels, Tensor) or labels.ndim != 2 or len(labels) != count:
        return _text_note(labels)
    return (
        f"the labels {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)} are neither "
        f"classes [{count}] nor zeros and ones: choose a column of them by read_batch=fn, such as "
        "lambda batch: (batch[0], batch[1][:, 0]); numbers to predict have to be floats"
    )


def _text_note(labels: Any) -> str:
    if not _is_text(labels):
        return ""
    return (
        f"; the labels are text, such as {labels[0]!r}, and no class names give their indices: set "
        "class_names=[…], or let the dataset have them as classes"
    )


def _is_text(value: Any) -> bool:
    listed = isinstance(value, (list, tuple)) and len(value) > 0
    return listed and all(isinstance(each, str) for each in value)


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise BatchError(
            f"read_batch must return a pair (images, labels), got a {type(result).__name__}: return "
            "(images, None) where there are no labels"
        )
    return result[0], result[1]


def _first(labels: Labels | None, limit: int | None) -> Labels | None:
    return None if labels is None else Labels(labels.kind, labels.values[:limit])


def _find(
    batch: Any,
    inputs: Inputs,
    names: Sequence[str] | None,
    numbers: Sequence[int] | None = None,
) -> list[tuple[Path, Labels]]:
    """Return the labels of a batch, and where they are: by their names, or in a tuple by their place.

    In a tuple all that may be the labels, the likeliest first: the model's outputs decide.
    """
    if inputs.bare:
        return []
    parts = members(batch)
    for name in (*_NAMES, *_MASKS):
        for key, part in parts:
            if str(key).lower().removesuffix(".txt") == name and part is not batch:
                found = as_labels(part, inputs, names)
                if found is not None:
                    return [((key,), found)]
    if isinstance(batch, (tuple, list)):
        here = [key for key, _ in parts].index(inputs.path[0])
        others = [_columns(key, part, inputs) for key, part in (*parts[here + 1 :], *parts[:here])]
        read = [(path, as_labels(part, inputs, names)) for each in others for path, part in each]
        several = [(path, labels) for path, labels in read if labels is not None]
        # The samples' own numbers are none where others may be; of two samples it may be chance.
        counted = [path for path, labels in several if _counts_up(labels, numbers)]
        chosen = [(path, labels) for path, labels in several if path not in counted]
        if len(inputs.images) < 3 or not any(labels.columns for _, labels in chosen):
            chosen = several
        if chosen:  # rows of measurements come last
            return sorted(chosen, key=lambda f: (f[0] in counted, _measures(f[1])))
    if len(inputs.path) > 1:  # beside the images, in a part of the batch
        inner = inputs.part
        inside = _find(inner.batch, inner, names, numbers)
        return [((inputs.path[0], *path), labels) for path, labels in inside]
    return []


def _columns(key: object, part: Any, inputs: Inputs) -> list[tuple[Path, Any]]:
    """Return a part of a tuple, or the parts that it is made of where each has all images' rows."""
    count = len(inputs.images)
    several = isinstance(part, (tuple, list)) and len(part) != count
    if several and all(isinstance(v, Tensor) and v.ndim and len(v) == count for v in part):
        return [((key, index), each) for index, each in enumerate(part)]
    return [((key,), part)]


def _counts_up(labels: Labels, numbers: Sequence[int] | None = None) -> bool:
    """Tell whether these are the samples' numbers: those that are known, or any in a row."""
    values = labels.values
    if labels.kind != "class":
        return False
    if numbers is not None and values[: len(numbers)].tolist() == [*numbers][: len(values)]:
        return True
    return len(values) >= 3 and bool((values.diff() == 1).all())


def _measures(labels: Labels) -> bool:
    rows = isinstance(labels.values, Tensor) and labels.values.ndim == 2
    return rows and labels.kind in ("value", "multi-hot") and bool((labels.values % 1 != 0).any())


def as_labels(raw: Any, inputs: Inputs, names: Sequence[str] | None = None) -> Labels | None:
    """Return what may be the labels of the images, None if it can't be."""
    count, size = len(inputs.images), inputs.images.shape[2:]
    if isinstance(raw, Mapping) or hasattr(raw, "__dataclass_fields__"):
        parts = {str(key).lower(): part for key, part in members(raw)}
        named = (as_labels(parts[name], inputs, names) for name in _NAMES if name in parts)
        if (found := next((labels for labels in named if labels is not None), None)) is not None:
            return found
        others = [as_labels(part, inputs, names) for part in parts.values()]
        only = [labels for labels in others if labels is not None and not _counts_up(labels)]
        return only[0] if len(only) == 1 else None
    if isinstance(raw, np.ndarray) and raw.dtype.kind in "iufb":
        raw = torch.from_numpy(raw)
    if isinstance(raw, (list, tuple)):
        return _of_list(raw, inputs, names)
    if not isinstance(raw, Tensor) or raw.ndim == 0 or len(raw) != count or raw.is_complex():
        return None
    values = raw.detach().cpu()
    if values.dtype == torch.bool:
        values = values.long()
    if values.ndim >= 3 and math.prod(values.shape[1:]) == max(values.shape[1:]):
        values = values.flatten(1)  # dimensions of one
    if values.ndim >= 3:
        return _of_pixels(values, raw.dtype == torch.bool, size)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 1:
        missing = values.isnan()
        if bool(missing.any()) and bool(((values == 0) | (values == 1) | missing).all()):
            values = values.masked_fill(missing, -100)  # as losses leave it out
            return Labels("class", values.long())
        whole = not values.is_floating_point() or bool(
            (values.isfinite() & (values >= 0) & (values == values.round())).all()
        )
        return Labels("class", values.long()) if whole else Labels("value", values)
    return _of_rows(values)


def _of_pixels(values: Tensor, flags: bool, size: torch.Size) -> Labels | None:
    """Return masks: a class for each pixel, or a mask for each class."""
    if values.shape[-2:] != size or values.ndim > 4:
        return None
    if values.ndim == 4 and values.shape[1] == 1:
        values, flags = values[:, 0], False
    if values.is_floating_point():
        if not bool(((values == values.round()) & (values >= 0) & (values < 256)).all()):
            return None
        values = values.long()
    if set(values.unique().tolist()) == {0, 255}:
        values = (values == 255).long()  # black and white
    if values.ndim == 4:
        return Labels("mask", values) if bool((values <= 1).all()) else None
    # Flags without a channel may be where the class of a label is.
    return None if flags else Labels("mask", values)


def _of_rows(values: Tensor) -> Labels | None:
    missing = values.isnan()
    if bool(missing.any()) and bool(
        ((values == 0) | (values == 1) | (values == -1) | missing).all()
    ):
        return Labels("multi-hot", values.masked_fill(missing, -1))  # where nobody has said
    positive = (values == 1).sum(dim=1)
    if bool(((values == 0) | (values == 1) | (values == -1)).all()):
        one_each = bool((positive == 1).all()) and bool((values >= 0).all())
        return Labels("one-hot" if one_each else "multi-hot", values)
    if not values.is_floating_point():
        return None
    if bool(((values >= 0) & (values <= 1)).all()):
        shares = sums_to_one(values)
        return Labels("soft" if shares else "multi-hot", values)
    return Labels("value", values)


def _of_list(
    raw: list[Any] | tuple[Any, ...], inputs: Inputs, names: Sequence[str] | None
) -> Labels | None:
    count = len(inputs.images)
    if len(raw) == count and _is_text(raw):
        # Other text, such as the names of files, has none of the names.
        numbers = {name: index for index, name in enumerate(names or ())}
        classes = torch.tensor([numbers.get(name, -1) for name in raw])
        return Labels("class", classes) if bool((classes >= 0).any()) else None
    if len(raw) == count and all(isinstance(v, (bool, int, float, np.number)) for v in raw):
        return as_labels(torch.tensor(raw), inputs)
    if len(raw) == count:
        objects = [_classes_of_objects(v) for v in raw]
        raw = raw if any(v is None for v in objects) else objects
    if len(raw) == count and all(
        isinstance(v, Tensor) and v.ndim == 1 and not v.is_floating_point() for v in raw
    ):
        if all(v.dtype == torch.long or v.dtype == torch.int for v in raw):
            return Labels("boxes", [v.detach().cpu() for v in raw])
        return None
    if len(raw) == count and all(isinstance(v, Tensor) and v.ndim == 0 for v in raw):
        return as_labels(torch.stack(list(raw)), inputs)
    found = (as_labels(part, inputs) for part in raw if isinstance(part, Tensor))
    return next((labels for labels in found if labels is not None), None)


def _classes_of_objects(annotation: Any) -> Tensor | None:
    """Return the classes of one image's objects from its annotation, None if it is none."""
    if isinstance(annotation, Mapping):
        found = next((annotation[name] for name in _OF_OBJECTS if name in annotation), None)
        return found if isinstance(found, Tensor) and found.ndim == 1 else None
    listed = isinstance(annotation, (list, tuple)) and all(
        isinstance(each, Mapping) and "category_id" in each for each in annotation
    )
    if listed:  # as COCO's files have them
        return torch.tensor([int(each["category_id"]) for each in annotation], dtype=torch.long)
    return None


def _find_masks(batch: Any, inputs: Inputs) -> tuple[Tensor | None, bool]:
    parts = members(batch)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        flags = [
            part for part in batch[1:3] if isinstance(part, Tensor) and part.dtype == torch.bool
        ]
        return next((part for part in reversed(flags) if part.ndim > 2), None), False
    named = (part for name in _MASKS for key, part in parts if str(key).lower() == name)
    masks = next((m for m in named if isinstance(m, Tensor) and m.dtype == torch.bool), None)
    return masks, True


_STEPS = ("training_step", "validation_step", "_shared_step", "shared_step", "step", "loss")
_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "builtins")
# In the names of modules and functions.
_SEPARATE = (
    *("BCEWithLogitsLoss", "BCELoss", "SoftMarginLoss"),
    *("binary_cross_entropy", "soft_margin_loss", "sigmoid_focal_loss"),
)
_OF_VALUES = (
    *("MSELoss", "L1Loss", "HuberLoss", "GaussianNLLLoss", "PoissonNLLLoss"),
    *("mse_loss", "l1_loss", "huber_loss", "poisson_nll", "gaussian_nll"),
)


_OF_EMBEDDINGS = "ntxent|triplet|contrastive|infonce|cosineembedding|negativecosine|barlow|vicreg"
# Losses that have the classes' vectors themselves.
_WITH_CLASSES = "(arcface|cosface|sphereface|proxy|angular|margin|normalizedsoftmax)\\w*loss"


def trained(module: nn.Module) -> tuple[bool, bool, bool]:
    """Tell by its losses whether a module's classes are trained each on its own, or values are.

    Returns:
        Whether there is a binary cross entropy, whether there are none but losses of values, and
        whether there is one that compares embeddings.
    """
    held = [*module.modules(), *vars(module).values()]
    kinds = {cls.__name__ for each in held for cls in type(each).__mro__[:2]}
    functions = (e.func if isinstance(e, partial) else e for e in vars(module).values())
    kinds |= {str(getattr(each, "__name__", "")) for each in functions}
    losses = _source_of_losses(held)
    source = "".join(_source_of_steps(type(module)).values()) + losses
    said = " ".join([*kinds, source])
    separately = any(word in said for word in _SEPARATE) or "sigmoid" in losses
    values = any(word in said for word in _OF_VALUES)
    others = any("crossentropy" in kind.lower() for kind in kinds) or "cross_entropy" in said
    embeddings = any(re.search(_OF_EMBEDDINGS, kind.lower()) for kind in kinds) and not others
    embeddings = embeddings or any(
        re.search(_WITH_CLASSES, type(each).__name__.lower())
        and any(parameter.ndim == 2 for parameter in each.parameters())
        for each in module.modules()
    )
    return separately, values and not separately and not others, embeddings


def _source_of_losses(held: Sequence[Any]) -> str:
    """Return the source of the losses that are modules of the user's own, or of another library."""
    kinds = {type(each) for each in held if isinstance(each, nn.Module)}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES]
    return "".join(_source(kind, "forward") for kind in own if "loss" in kind.__name__.lower())


def _source(kind: type, name: str) -> str:
    try:
        return inspect.getsource(getattr(kind, name))
    except (AttributeError, OSError, TypeError):
        return ""


def _source_of_steps(kind: type) -> dict[str, str]:
    """Return the source of a module's steps, and of those of its own methods that they use."""
    own = {
        name
        for base in kind.__mro__
        if base.__module__.partition(".")[0] not in _LIBRARIES
        for name in vars(base)
    }
    waiting, found = [*_STEPS], dict[str, str]()
    while waiting:
        name = waiting.pop()
        if name in found or name not in own:
            continue
        found[name] = _source(kind, name)
        waiting += re.findall(r"\.(\w+)", found[name])
    return found


_LOSS = re.compile(
    r"loss|crit|entropy|xent|\bce\b|bce|nll|mse|kl_div|focal|dice|hinge", re.IGNORECASE
)


# Read once for each module: failures ask for batches of one or two images again and again.
_loss_keys: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()


def _keys_of_losses(module: nn.Module) -> set[str]:
    """Return the keys, in small letters, by which a module's steps take what a loss is given."""
    known = _loss_keys.get(module)
    if known is None:
        known = _loss_keys[module] = _read_keys(module)
    return known


def _read_keys(module: nn.Module) -> set[str]:
    found: set[str] = set()
    for source in _source_of_steps(type(module)).values():
        try:
            tree = ast.parse(textwrap.dedent(source))
        except SyntaxError:
            continue
        own = next((node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)), "self")
        keys = _Keys(module, own)
        for node in sorted(
            (n for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.Call))),
            key=lambda n: (n.lineno, isinstance(n, ast.Call)),
        ):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    keys.assign(target, node.value)
            elif _LOSS.search(ast.unparse(node.func)):
                given = [*node.args, *(word.value for word in node.keywords)]
                found |= set().union(*map(keys.of, given))
    return {key.lower() for key in found}


class _Keys:
    """Finds the keys of a batch in the expressions of a method, which calls its module `own`."""

    def __init__(self, module: nn.Module, own: str) -> None:
        self._module, self._own = module, own
        self._held: dict[str, set[str]] = {}

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """Remember which keys the names stand for that a value is assigned to."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each in zip(target.elts, value.elts, strict=False):
                self.assign(*each)
        elif isinstance(target, ast.Name):
            self._held[target.id] = self.of(value)

    def of(self, node: ast.AST) -> set[str]:
        """Return the keys in an expression, but for those of what the module's methods are given."""
        if isinstance(node, ast.Call) and self._is_own(node.func):
            return set()
        if isinstance(node, ast.Name) and node.id in self._held:
            return self._held[node.id]
        if isinstance(node, (ast.Constant, ast.Name)) or self._is_own(node):
            key = self._known(node)
            return {key} if isinstance(key, str) else set()
        return set().union(*map(self.of, ast.iter_child_nodes(node)))

    def _is_own(self, node: ast.AST) -> bool:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return isinstance(node, ast.Name) and node.id == self._own

    def _known(self, node: ast.AST) -> Any:
        """Return what a constant, a global name or an expression such as self.keys["y"] stands for."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            namespace = sys.modules.get(type(self._module).__module__)
            return self._module if node.id == self._own else getattr(namespace, node.id, None)
        try:
            if isinstance(node, ast.Attribute):
                return getattr(self._known(node.value), node.attr)
            return self._known(node.value)[self._known(node.slice)]  # type: ignore[attr-defined]
        except Exception:  # it is the user's code
            return None


def fit_labels(
    labels: Labels | None, adapter: Adapter | None, like: Labels | None = None
) -> Fitted | None:
    """Return the labels that a probe has; without an adapter, as far as they say it themselves."""
    if labels is None:
        return None
    if adapter is None:
        return labels.fitted(None, False, labels.kind == "one-hot")
    return labels.fitted(adapter.classes, adapter.score is value, adapter.score is sigmoid, like)
