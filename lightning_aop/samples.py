"""The probe: which pictures, and which of their classes, are explained over and over.

A probe is a list of (image, class) pairs. Pictures come from whatever the user's data gives: a batch,
a dataset, or the first samples behind a DataLoader, whose own state stays untouched.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_aop.types import Images

ProbeSource: TypeAlias = (
    int | Tensor | Sequence[Any] | Mapping[str, Any] | Dataset[Any] | Callable[[], Any]
)
TargetChoice: TypeAlias = Literal["label", "predicted"] | Sequence[int]

_IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")


@dataclass(frozen=True)
class Probe:
    """Pictures with the labels that the data gives them: [N] class indices or [N, K] multi-hot."""

    images: Images
    labels: Num[Tensor, "b *classes"] | None = None

    @classmethod
    def from_batch(cls, batch: Any, limit: int | None = None) -> "Probe":
        """Read images and labels out of a batch: a tensor, (images, labels, …) or a dictionary."""
        labels: Any = None
        if isinstance(batch, Mapping):
            images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
            labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
        elif isinstance(batch, (tuple, list)) and batch:
            images, labels = batch[0], batch[1] if len(batch) > 1 else None
        else:
            images = batch
        if not isinstance(images, Tensor) or images.ndim != 4:
            keys = f" with keys {list(batch)}" if isinstance(batch, Mapping) else ""
            shape = f" [{', '.join(map(str, images.shape))}]" if isinstance(images, Tensor) else ""
            raise ValueError(
                f"no image batch [B, C, H, W] found in a {type(batch).__name__}{keys}{shape}: pass "
                "probe=(images, labels), or a callable that returns them"
            )
        if not isinstance(labels, Tensor) or labels.ndim not in (1, 2):
            labels = None
        return cls(
            images[:limit].detach().clone().cpu(),
            None if labels is None else labels[:limit].detach().clone().cpu(),
        )

    def pairs(
        self,
        targets: TargetChoice,
        logits: Float[Tensor, "b k"],
        max_classes_per_image: int,
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """Return which image and which class each explanation is for.

        `logits` are the model's for `images`: they decide for "predicted".
        """
        if isinstance(targets, str) and targets == "predicted":
            return torch.arange(len(self.images)), logits.argmax(dim=1).cpu()
        if not isinstance(targets, str):
            rows = torch.arange(len(self.images)).repeat_interleave(len(targets))
            return rows, torch.tensor(list(targets)).repeat(len(self.images))
        if self.labels is None:
            raise ValueError(
                "targets='label' needs labels, an integer tensor [B] or a multi-hot one [B, K], and "
                "the probe has none: pass probe=(images, labels), or targets='predicted'"
            )
        if self.labels.ndim == 1:
            return torch.arange(len(self.labels)), self.labels.long()
        positive = self.labels > 0.5
        positive &= positive.cumsum(dim=1) <= max_classes_per_image
        rows, classes = positive.nonzero(as_tuple=True)
        if len(rows) == 0:
            raise ValueError(
                f"none of the probe's {len(self.labels)} images has a positive label: choose others "
                "with probe=…, or targets='predicted' or a list of classes"
            )
        return rows, classes

    @property
    def multilabel(self) -> bool:
        """Whether the labels are multi-hot."""
        return self.labels is not None and self.labels.ndim == 2


def collect(source: ProbeSource, loaders: Any) -> tuple[Any, int | None]:
    """Return a batch for the probe and how many of its samples to take (None for all).

    Args:
        source: a number of samples to take from the loaders; or a batch; or a dataset, used whole;
            or a function that returns a batch.
        loaders: a DataLoader, or several in a list, dictionary or CombinedLoader: the first counts.
    """
    if isinstance(source, int):
        return first_samples(_first_loader(loaders), source), source
    if isinstance(source, (Tensor, Mapping, tuple, list)):
        return source, None
    if callable(source):
        return source(), None
    if not isinstance(source, Sized):
        raise TypeError(
            f"probe must be a number, a batch, a dataset with a length or a callable, got "
            f"{type(source).__name__}"
        )
    dataset: Any = source
    return default_collate([dataset[index] for index in range(len(dataset))]), None


def first_samples(loader: Any, count: int) -> Any:
    """Return the first samples of the loader's dataset as one batch, without iterating the loader.

    Its workers, sampler and generator are not used, so that their state stays what it was. All
    samples are taken if there are fewer than `count`. An iterable dataset is read from a copy.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None:
        raise ValueError(
            f"a {type(loader).__name__} has no dataset to take {count} samples from: pass the probe "
            "itself, probe=(images, labels)"
        )
    collate = getattr(loader, "collate_fn", default_collate)
    samples: list[Any]
    if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        samples = [dataset[index] for index in range(min(count, len(dataset)))]
    else:
        stream: Iterable[Any] = copy.deepcopy(dataset)
        samples = list(itertools.islice(stream, count))
    if not samples:
        raise ValueError("the dataset is empty: pass the probe itself, probe=(images, labels)")
    if isinstance(loader, DataLoader) and loader.batch_sampler is None:
        return samples[0]  # The dataset makes its own batches.
    return collate(samples)


def _first_loader(loaders: Any) -> Any:
    loaders = getattr(loaders, "iterables", loaders)
    while isinstance(loaders, (list, tuple, Mapping)) and loaders:
        loaders = next(iter(loaders.values())) if isinstance(loaders, Mapping) else loaders[0]
    if loaders is None or isinstance(loaders, (list, tuple, Mapping)):
        raise ValueError(
            "there is no data loader to take the probe from: pass the probe itself, "
            "probe=(images, labels)"
        )
    return loaders


def class_names_of(loaders: Any) -> Sequence[str] | None:
    """Return the `classes` of the loader's dataset, as torchvision's datasets name them, or None."""
    try:
        dataset = getattr(_first_loader(loaders), "dataset", None)
    except ValueError:
        return None
    while dataset is not None and not hasattr(dataset, "classes"):
        dataset = getattr(dataset, "dataset", None)  # a Subset's
    return getattr(dataset, "classes", None)
