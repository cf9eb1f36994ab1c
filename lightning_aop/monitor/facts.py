"""What a dataset, a datamodule or a model says beside its samples: names of classes, normalisation.

All of it is a guess from attributes that people name in a few ways. One that does not fit the model or
the images is left out, with a note that says so; none is ever an error.
"""

import math
import re
from collections import deque
from collections.abc import Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_aop.model.adapter import Adapter
from lightning_aop.types import Images
from lightning_aop.view.grid import Panel

T = TypeVar("T")

_CLASSES = (
    *("classes", "class_names", "label_names", "categories", "names", "id2label", "classes_"),
    *("CLASSES", "label_encoder", "encoder", "features"),
)
_INDICES = ("class_to_idx", "label2id", "idx_to_class")
# Such as classnames, target_names, idx2label, label_map.
_ALIKE = re.compile(
    r"(class|label|target|categor(y|ies))\w*_?names?|(class|label|category)(es|s)?_?map(ping)?"
    r"|(class|label|category|cls|cat)s?_(list|names)|LABELS"
    r"|(class|label|category|cat|name|id|idx|index|int)s?_?(to|2)_?(class|label|category|cat|name|id|idx|index)"
)
_TRANSFORMS = (
    *("transform", "transforms", "val_transform", "test_transform", "train_transform"),
    *("image_processor", "processor", "feature_extractor", "preprocess"),
)
# Such as tfms, image_transform, _transform, augmentations, normalize; not what undoes one.
_ALSO_TRANSFORMS = re.compile(
    r"(?!\w*(target|label|mask|inv|de_?norm|un_?norm))"
    r"(\w*(tfm|transform|augment|normali[sz]e|preproc)\w*|aug|pipeline)"
)


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A guess, None where nobody says or it does not fit, and a note where it does not fit."""

    value: T | None = None
    note: str = ""


def class_names(sources: Sequence[Any], count: int | None = None) -> Fact[list[str]]:
    """Return the names of the classes, by index.

    Args:
        sources: datasets, datamodules and modules, the likeliest first; wrappers are looked into.
        count: how many classes the model has, None where that isn't known.
    """
    note = ""
    for source in _wrapped(sources):
        alike = [
            name
            for name in {**getattr(source, "__dict__", {}), **vars(type(source))}
            if _ALIKE.fullmatch(name)
        ]
        for attribute in (*_CLASSES, *_INDICES, *alike):
            found = _attribute(source, attribute)
            # Of Hugging Face's columns; elsewhere the word has other meanings.
            other = attribute == "features" and not isinstance(found, Mapping)
            names = None if other else _names(found)
            if names and (count is None or len(names) == count):
                return Fact(names)
            if names and attribute not in alike:
                owner = "" if isinstance(source, Mapping) else f"{type(source).__name__}."
                note = note or (
                    f"{owner}{attribute} has {len(names)} names, where the model has "
                    f"{count} classes: classes are shown by index; set class_names=[…] for names"
                )
    return Fact(None, note)


Scale: TypeAlias = float | Sequence[float] | Tensor
"""A mean or std that images were normalised with: of all channels, or of each."""


@dataclass(frozen=True)
class Look:
    """How images are shown.

    Attributes:
        names: of the classes, by index.
        mean: what the images were normalised with.
        std: likewise.
        panels: what stands beside each image.
    """

    names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    panels: Sequence[Panel] = ("overlay",)


def given_look(
    names: Sequence[str] | None,
    mean: Scale | None,
    std: Scale | None,
    panels: Sequence[Panel],
    channels: int,
) -> tuple[Look, list[str]]:
    """Return a look as the user wants it for images of so many channels, and what doesn't fit them."""
    both = [None if value is None else numbers_of(value) for value in (mean, std)]
    first, second = (v * channels if v is not None and len(v) == 1 else v for v in both)
    if all(v is None or len(v) == channels for v in (first, second)):
        return Look(names, first, second, panels), []
    note = (
        f"mean={mean} and std={std} can't be undone in what is shown, since the images have {channels} "
        f"channel{'s' * (channels != 1)}: give one number, or one for each"
    )
    return Look(names, None, None, panels), [note]


def numbers_of(value: Scale) -> list[float]:
    """Return a mean, or a std, as numbers.

    Raises:
        TypeError, ValueError: it is none.
    """
    found: list[float] = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    return found


def found_look(
    look: Look, sources: Sequence[Any], adapter: Adapter, images: Images | None
) -> tuple[Look, list[str]]:
    """Return a look with what was not given filled in from what is found.

    Args:
        look: as the user wants it.
        sources: datasets, datamodules and modules, the likeliest first.
        adapter: the way to the model's outputs.
        images: those to show; None where they are as they were taken.

    Returns:
        The look, and what was found and does not fit.
    """
    notes = []
    if look.names is None and adapter.names:
        look = replace(look, names=adapter.names)
    elif look.names is None:
        names = class_names(sources, adapter.classes)
        look = replace(look, names=names.value)
        notes.append(names.note)
    if look.mean is None and look.std is None and images is not None:
        below = bool((images < 0).any())
        if not below:  # what a model normalises by, it has yet to do
            sources = [source for source in sources if not isinstance(source, nn.Module)]
        scale = normalisation(sources, images.shape[1], own=below)
        if scale.value is not None:
            scale = _undoing(*scale.value, images)
        mean, std = scale.value or (None, None)
        look = replace(look, mean=mean, std=std)
        notes.append(scale.note)
    return look, [note for note in notes if note]


def class_count(sources: Sequence[Any]) -> int | None:
    """Return how many classes there are, None where nobody says."""
    names = class_names(sources).value
    if names:
        return len(names)
    for source in _wrapped(sources):
        for attribute in ("num_classes", "n_classes", "num_labels", "classes"):
            value = _attribute(source, attribute)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def normalisation(
    sources: Sequence[Any], channels: int, own: bool = True
) -> Fact[tuple[Sequence[float], Sequence[float]]]:
    """Return the mean and std, one number a channel, that the images were normalised with.

    Args:
        sources: datasets and datamodules, the likeliest first; wrappers are looked into.
        channels: how many the images have.
        own: whether a source's own mean and std count, which may be of labels, beside its transforms'.
    """
    note = ""
    for source in _wrapped(sources):
        own_names = [*getattr(source, "__dict__", {})]
        also = [n for n in own_names if _ALSO_TRANSFORMS.fullmatch(n) and n not in _TRANSFORMS]
        # Looked at from the last to the first.
        steps = [s for name in (*also, *_TRANSFORMS) for s in _steps(_attribute(source, name))]
        for step in (*reversed(steps), *([source] if own else [])):
            for first, second in (("mean", "std"), ("image_mean", "image_std")):
                mean, std = (_numbers(_attribute(step, name)) for name in (first, second))
                if not mean or not std:
                    continue
                mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
                if len(mean) == len(std) == channels and min(std) > 0:
                    return Fact((mean, std))
                note = note or (
                    f"{type(step).__name__} has mean {mean} and std {std}, which do not fit images of "
                    f"{channels} channels: they are shown stretched; set mean=[…] and std=[…]"
                )
    return Fact(None, note)


def _undoing(
    mean: Sequence[float], std: Sequence[float], images: Images
) -> Fact[tuple[Sequence[float], Sequence[float]]]:
    """Return a mean and std in units of images from 0 to 1, where undoing them gives such."""
    rows = images.float().cpu().transpose(0, 1).flatten(1)
    undone = rows * torch.tensor(std)[:, None] + torch.tensor(mean)[:, None]
    low, high = undone.min().item(), undone.max().item()
    # Filters overshoot a little.
    for unit in (1, 255):
        if -0.1 * unit <= low and high <= 1.1 * unit:
            return Fact(([v / unit for v in mean], [v / unit for v in std]))
    return Fact(
        None,
        f"undoing the mean {list(mean)} and std {list(std)} that were found gives images from "
        f"{low:.3g} to {high:.3g}, not from 0 to 1: they are shown stretched; set mean=[…] and std=[…]",
    )


def _wrapped(sources: Sequence[Any]) -> Iterator[Any]:
    """Go through the sources, what they wrap (Subset, ConcatDataset), and their configurations."""
    seen: list[Any] = []
    waiting = [source for source in sources if source is not None]
    while waiting and len(seen) < 100:
        source = waiting.pop(0)
        if any(source is other for other in seen):
            continue
        seen.append(source)
        yield source
        inside = [_attribute(source, name) for name in ("image_dataset", "dataset", "config")]
        inside += [v for v in getattr(source, "__dict__", {}).values() if isinstance(v, Dataset)]
        several = _attribute(source, "datasets")
        inside += several if isinstance(several, (list, tuple)) else []
        inside += [_attribute(source, name) for name in ("hparams", "model", "net", "backbone")]
        waiting[:0] = [each for each in inside if each is not None and not callable(each)]
        waiting += [each for each in inside if callable(each) and hasattr(each, "config")]


def _attribute(source: Any, name: str) -> Any:
    """Return an attribute, or what a method of the name returns; None if there is none."""
    try:
        value: Any = (
            source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        )
        method = callable(value) and not isinstance(value, type)
        return value() if name in (*_CLASSES, *_INDICES) and method else value
    except Exception:  # a property or method that can't be had now
        return None


def _names(found: Any) -> list[str] | None:
    """Return names by class index from any form that has an order."""
    if hasattr(found, "classes_"):  # a label encoder
        found = found.classes_
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(found, Mapping):  # columns, one of which may know its classes
        inside = [getattr(column, "names", None) for column in found.values()]
        found = next((names for names in inside if isinstance(names, (list, tuple))), found)
    if isinstance(found, type) and issubclass(found, Enum):
        found = {member.name: member.value for member in found}
    if isinstance(found, (KeysView, ValuesView, deque)):
        found = list(found)
    if isinstance(found, (list, tuple)) and all(isinstance(each, (list, tuple)) for each in found):
        pairs = [each for each in found if len(each) == 2]
        if [each[0] for each in pairs] == [*range(len(found))]:
            found = [each[1] for each in pairs]
    if isinstance(found, Mapping):
        if all(hasattr(v, "__index__") for v in found.values()):
            found = {int(index): name for name, index in found.items()}
        try:
            numbered = {int(index): name for index, name in found.items()}
        except (TypeError, ValueError):
            return None
        if sorted(numbered) != [*range(len(numbered))]:
            return None
        found = [numbered[index] for index in range(len(numbered))]
    if not isinstance(found, (list, tuple)):
        return None
    numbers = {e["id"]: e for e in found if isinstance(e, Mapping) and isinstance(e.get("id"), int)}
    if len(numbers) == len(found):
        found = [numbers[number] for number in sorted(numbers)]
    # ImageNet's have several names each.
    firsts = [each[0] if isinstance(each, (list, tuple)) and each else each for each in found]
    named = [_name(each) for each in firsts]
    return [str(each) for each in named] if all(isinstance(n, (str, int)) for n in named) else None


def _name(found: Any) -> Any:
    """Return the name of a class from its description, as a member of an enumeration is one."""
    if isinstance(found, Mapping):
        return found.get("name")
    if isinstance(found, bytes):
        return found.decode(errors="replace")
    return getattr(found, "name", found)


def _steps(transform: Any, depth: int = 6) -> list[Any]:
    """Return a transform, or the steps that it is composed of."""
    if transform is None:
        return []
    if isinstance(transform, Mapping):  # one for each stage
        parts: Any = list(transform.values())
    elif isinstance(transform, (nn.Sequential, nn.ModuleList)):
        parts = list(transform)
    else:
        parts = getattr(transform, "transforms", transform)
    if depth == 0 or not isinstance(parts, (list, tuple)):
        return [transform]
    return [step for part in parts for step in _steps(part, depth - 1)]


def _numbers(found: Any) -> list[float] | None:
    try:
        if hasattr(found, "flatten"):
            found = found.flatten().tolist()
        values = [float(v) for v in (found if isinstance(found, (list, tuple)) else [found])]
    except (TypeError, ValueError, RuntimeError):
        return None
    return values if values and all(math.isfinite(v) for v in values) else None
