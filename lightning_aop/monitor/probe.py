"""The probe: which pictures, and which of their classes, are explained over and over.

A probe is a list of (image, class) pairs. Pictures come from whatever the user's data gives: a batch,
a dataset, or the first samples behind a DataLoader, whose own state stays untouched. What a dataset
may offer beside its samples is found by name, also under wrappers with a `dataset` (a `Subset`):

- `classes`: the names of the classes;
- `input_masks(index, classes)`: where each of these classes is, bool [len(classes), H, W] at the size
  of the sample's image;
- `transform` with `mean` and `std`: what images were normalised with;
- `image_dataset`: the images, in the same order, where its own samples are something else, such as
  features that were computed before.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from lightning_aop.checks import require_positive
from lightning_aop.errors import InvalidTypeError, InvalidValueError
from lightning_aop.model.adapter import Adapter
from lightning_aop.monitor.facts import Fact, class_names
from lightning_aop.monitor.labels import Reading, fit_labels, read_batch
from lightning_aop.monitor.reading import Collate, Stream, loaders_in, read_samples
from lightning_aop.types import Images


@dataclass(frozen=True)
class Stratified:
    """A probe with as many samples of each class: the first ones of the dataset.

    The labels are read from the dataset's `targets` or `labels` (class indices, text or multi-hot), or
    from the second tensor of a `TensorDataset`; no sample is read for it.

    Attributes:
        per_class: how many; all of a class that has fewer. An image of several classes counts for each.
    """

    per_class: int = 2

    def __post_init__(self) -> None:
        require_positive("Stratified", per_class=self.per_class)

    def indices(self, dataset: Any) -> list[int]:
        """Return which samples of a dataset are taken.

        Raises:
            ValueError: the dataset doesn't say its labels.
        """
        labels = _labels_of(dataset)
        if labels is None:
            raise InvalidValueError(
                f"Stratified needs the labels of all samples, and {type(dataset).__name__} has neither "
                "targets nor labels that say them: name the samples, probe=[12, 97, …]"
            )
        if labels.ndim == 1:
            classes = [labels == index for index in labels.unique() if index >= 0]
        else:
            classes = [*(labels > 0.5).T]
        chosen = {i for each in classes for i in each.nonzero()[: self.per_class, 0].tolist()}
        return sorted(chosen)


ProbeSource: TypeAlias = (
    int
    | Stratified
    | Tensor
    | np.int64
    | NDArray[np.int64]
    | Sequence[Any]
    | Mapping[str, Any]
    | Dataset[Any]
    | Callable[[], Any]
)
TargetChoice: TypeAlias = Literal["label", "predicted", "confused"] | Sequence[int]

MaskReader: TypeAlias = Callable[[int, Sequence[int]], Tensor]
"""From the number of a sample, and some classes, to their masks [classes, H, W]."""


@dataclass(frozen=True)
class Probe:
    """Pictures with what the data says of them.

    Attributes:
        images: the pictures as the model takes them.
        labels: [N] class indices, -1 where there is none of the model's, or [N, K] multi-hot.
        masks: where a class is in a picture.
        mask_pairs: [M, 2], which picture and which class each mask is of.
        note: what there is to say of the labels, empty if nothing.
    """

    images: Images
    labels: Num[Tensor, "b *classes"] | None = None
    masks: Bool[Tensor, "m h w"] | None = None
    mask_pairs: Int[Tensor, "m 2"] | None = None
    note: str = ""

    @classmethod
    def from_batch(
        cls, batch: Any, limit: int | None = None, numbers: Sequence[int] | None = None
    ) -> "Probe":
        """Read images and labels out of a batch: a tensor, (images, labels, …) or a dictionary.

        Labels mean what they say by themselves; `of` asks the model as well.
        """
        return cls.of(read_batch(batch, limit, numbers=numbers))

    @classmethod
    def of(cls, reading: Reading, adapter: Adapter | None = None) -> "Probe":
        """Return the probe of what was read from a batch, with labels that fit the model's outputs.

        Raises:
            BatchError: no label fits the model's outputs.
        """
        given = reading.labels_for(adapter)
        fitted = fit_labels(given, adapter)
        labels = None if fitted is None else fitted.labels
        # A subclass of tensors may refuse to be cut and joined, as MONAI's does.
        images = reading.inputs.images.detach().as_subclass(Tensor).clone().cpu()
        probe = cls(
            images,
            None if labels is None else labels.clone(),
            note=reading.note if fitted is None else fitted.note,
        )
        if given is None or labels is None:
            return probe
        if given.kind == "mask":
            pixels = given.values
            return probe.with_masks(
                lambda row, classes: torch.stack(
                    [
                        pixels[row] == index if pixels.ndim == 3 else pixels[row, index] == 1
                        for index in classes
                    ]
                )
            )
        if reading.masks is None:
            return probe
        masks = reading.masks.detach().cpu()
        if masks.shape != (len(images), *labels.shape[1:], *images.shape[2:]):
            # A batch may hold other things; only what is called masks is missed.
            if reading.masks_named:
                warnings.warn(
                    f"ExplanationMonitor: the batch's masks have shape {list(masks.shape)}, where "
                    f"{[len(images), *labels.shape[1:], *images.shape[2:]]} was expected: none is drawn",
                    stacklevel=3,
                )
            return probe
        return probe.with_masks(
            # [B, H, W] is where the class of the label is, [B, K, H, W] where each class is.
            lambda row, classes: masks[row][classes] if masks.ndim == 4 else masks[row][None]
        )

    def with_masks(self, read: MaskReader) -> "Probe":
        """Return the probe with the masks of every class that a picture is labelled with.

        Raises:
            ValueError: the masks have another size than the images.
        """
        if self.labels is None:
            return self
        pairs, masks = [], []
        for row in range(len(self.images)):
            if classes := self.classes_of(row):
                pairs += [(row, index) for index in classes]
                masks.append(read(row, classes).as_subclass(Tensor).bool().cpu())
        if not masks:
            return self
        found = torch.cat(masks)
        if found.shape[1:] != self.images.shape[2:] or len(found) != len(pairs):
            raise InvalidValueError(
                f"the masks must have the size of the images, {list(self.images.shape[2:])}, one for "
                f"each class, got {list(found.shape)}: let them take the way of the images, resizing "
                "by nearest neighbour"
            )
        return replace(self, masks=found, mask_pairs=torch.tensor(pairs))

    def classes_of(self, row: int) -> list[int]:
        """Return the classes that an image is labelled with."""
        if self.labels is None:
            return []
        if self.labels.ndim == 2:
            return (self.labels[row] > 0.5).nonzero()[:, 0].tolist()
        index = int(self.labels[row])
        return [index] if index >= 0 else []  # below 0 is no label

    def masks_of(
        self, rows: Int[Tensor, " p"], targets: Int[Tensor, " p"]
    ) -> tuple[Bool[Tensor, "p h w"], Bool[Tensor, " p"]]:
        """Return the mask of each pair, and whether the data has one; otherwise it is empty."""
        height, width = self.images.shape[2:]
        if self.masks is None or self.mask_pairs is None:
            return torch.zeros(len(rows), height, width).bool(), torch.zeros(len(rows)).bool()
        wanted = torch.stack([rows, targets], dim=1).cpu()
        same = (wanted[:, None] == self.mask_pairs[None]).all(dim=2)
        known = same.any(dim=1)
        return self.masks[same.int().argmax(dim=1)] & known[:, None, None], known

    def pairs(
        self,
        targets: TargetChoice,
        logits: Float[Tensor, "b k"],
        max_classes_per_image: int,
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """Return which image and which class each explanation is for.

        `logits` are the model's for `images`: they decide for "predicted" and "confused".
        """
        predicted = logits.argmax(dim=1).cpu()
        if isinstance(targets, str) and targets == "predicted":
            return torch.arange(len(self.images)), predicted
        if not isinstance(targets, str):
            rows = torch.arange(len(self.images)).repeat_interleave(len(targets))
            return rows, torch.tensor(list(targets)).repeat(len(self.images))
        if self.labels is None:
            raise InvalidValueError(
                f"targets={targets!r} needs labels, an integer tensor [B] or a multi-hot one [B, K], "
                f"and {'those of the batch are not' if self.note else 'the probe has none'}: pass "
                "probe=(images, labels), or read_batch=fn, or targets='predicted'"
            )
        if self.labels.ndim == 1:
            rows = (self.labels >= 0).nonzero()[:, 0]
            classes = self.labels[rows].long()
            if targets == "label":
                return rows, classes
            # The label, and where it is another what the model says instead.
            both = torch.stack([classes, predicted[rows]], dim=1)
            kept = torch.stack([torch.ones_like(rows).bool(), both[:, 0] != both[:, 1]], dim=1)
            return rows[:, None].expand(-1, 2)[kept], both[kept]
        positive = self.labels > 0.5
        positive &= positive.cumsum(dim=1) <= max_classes_per_image
        rows, classes = positive.nonzero(as_tuple=True)
        if len(rows) == 0:
            raise InvalidValueError(
                f"none of the probe's {len(self.labels)} images has a positive label: choose others "
                "with probe=…, or targets='predicted' or a list of classes"
            )
        return rows, classes

    def false_positives(
        self, scores: Float[Tensor, "b k"]
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """Return for each multilabel picture the strongest class with a score above 0.5 but no label.

        Pictures without one are left out.
        """
        assert self.labels is not None
        value, index = scores.masked_fill(self.labels > 0.5, 0.0).max(dim=1)
        # Labels below 0 mark a picture that doesn't count.
        rows = ((value > 0.5) & (self.labels >= 0).all(dim=1)).nonzero()[:, 0]
        return rows, index[rows]

    @property
    def fingerprint(self) -> str:
        """A hash of the pictures and their labels."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors and text.

        Pictures come from 8 bits a channel as a rule, and take no more here: each channel is a table of
        its values and an index a pixel, without loss. Others are held as they are.
        """
        state: dict[str, Any] = {"fingerprint": self.fingerprint, "images": self.images}
        tables = [self.images[:, channel].unique() for channel in range(self.images.shape[1])]
        if all(len(table) <= 256 for table in tables) and self.images.isfinite().all():
            state["images"] = torch.stack(
                [
                    torch.searchsorted(t, self.images[:, c].contiguous())
                    for c, t in enumerate(tables)
                ],
                dim=1,
            ).to(torch.uint8)
            state["tables"] = tables
        for name in ("labels", "masks", "mask_pairs"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Probe":
        """Return the probe of a checkpoint."""
        images = state["images"]
        if "tables" in state:
            channels = [t[images[:, c].long()] for c, t in enumerate(state["tables"])]
            images = torch.stack(channels, dim=1)
        rest: dict[str, Any] = {name: state.get(name) for name in ("labels", "masks", "mask_pairs")}
        return cls(images, **rest)

    @property
    def note_of_pixels(self) -> str:
        """What there is to say of the pixels, empty if nothing."""
        without = int((~self.images.flatten(1).isfinite().all(dim=1)).sum())
        return bool(without) * (
            f"{without} of {len(self.images)} images have pixels that are NaN or infinite, which spread "
            "where images are blurred or mixed, so that maps are blank and not judged: give such pixels "
            "a number in the dataset, as torch.nan_to_num does"
        )

    @property
    def multilabel(self) -> bool:
        """Whether the labels are multi-hot."""
        return self.labels is not None and self.labels.ndim == 2


@dataclass(frozen=True)
class Drawn:
    """What the probe is made of.

    Attributes:
        reading: the images and labels, in the batch that they are from.
        classes: the number of classes, None where the data doesn't say.
        limit: how many samples were asked for, None for all.
        read_masks: what gives the masks of a class, where the dataset has masks.
        named: the user's own names of the classes, which have to fit the model.
        names: of the classes, for labels that are text.
        origin: what all the samples are of, in words.
    """

    reading: Reading
    classes: int | None
    limit: int | None
    read_masks: MaskReader | None
    named: Sequence[Any] = ()
    names: Sequence[str] | None = None
    origin: str = "the data"

    def probe(self, adapter: Adapter, warn: Callable[[str], None]) -> Probe:
        """Return the probe, with labels that fit the model's outputs."""
        probe, count = Probe.of(self.reading, adapter), self.limit
        names = Fact[list[str]]() if adapter.names else class_names(self.named, adapter.classes)
        for note in (probe.note, probe.note_of_pixels, names.note):
            if note:
                warn(note)
        if self.read_masks is not None and probe.masks is None:
            try:
                probe = probe.with_masks(self.read_masks)
            except Exception as error:
                warn(
                    "no outlines and no pointing game, for the masks of the probe could not be "
                    f"read. {type(error).__name__}: {error}"
                )
        if count is not None and len(probe.images) < count:
            warn(
                f"probe={count} samples asked for, but {self.origin} has {len(probe.images)}: all of "
                "them are explained; lower probe to silence this"
            )
        return probe


@dataclass(frozen=True)
class Collected:
    """A batch for the probe.

    Attributes:
        batch: as a loader gives it.
        limit: how many of its samples to take, None for all.
        read_masks: what gives their masks.
        origin: what all the samples are of, in words.
        numbers: those of the samples in their dataset, where they are known.
    """

    batch: Any
    limit: int | None = None
    read_masks: MaskReader | None = None
    origin: str = "the data"
    numbers: Sequence[int] | None = None


def collect(source: ProbeSource, loaders: Any) -> Collected:
    """Return a batch for the probe. Datasets and random states are left as they were.

    Args:
        source: a number of samples to take from the loaders, or which, by their indices or as
            `Stratified`; or a batch; or a dataset, used whole; or a function that returns a batch.
        loaders: a DataLoader, or several in a list, dictionary or CombinedLoader: the first counts.
    """
    if (samples := from_loader(source)) is not None:
        return first_samples(_first_loader(loaders), samples)
    if isinstance(source, (Tensor, Mapping, tuple, list)):
        return Collected(source)
    if callable(source):
        return Collected(source())
    if not isinstance(source, Sized) or not hasattr(source, "__getitem__"):
        loader = ": of a loader take its dataset, probe=loader.dataset, or next(iter(loader))"
        raise InvalidTypeError(
            f"probe must be a number, a batch, a dataset with a length or a callable, got "
            f"{type(source).__name__}{loader * hasattr(source, 'dataset')}"
        )
    return replace(_read(_pictures(source), len(source), default_collate), limit=None)


def from_loader(source: Any) -> int | Stratified | list[int] | None:
    """Return which samples of the loader are meant, None if the source is no number of any."""
    if isinstance(source, Stratified):
        return source
    if isinstance(source, (np.ndarray, Tensor)):
        whole = source.dtype.kind in "iu" if isinstance(source, np.ndarray) else _is_whole(source)
        if not whole or source.ndim > 1:
            return None
        source = source.tolist()
    if isinstance(source, (int, np.integer)):
        return int(source)
    listed = isinstance(source, (list, tuple, range)) and len(source) > 0
    integers = (int, np.integer)
    if not listed or any(isinstance(v, bool) or not isinstance(v, integers) for v in source):
        return None
    return [int(each) for each in source]


def _is_whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _labels_of(dataset: Any) -> Tensor | None:
    """Return the labels of all samples where a dataset, or one that it wraps, has them."""
    for layer, subsets in _layers(dataset):
        tensors = layer.tensors[1:2] if isinstance(layer, TensorDataset) else ()
        for found in (getattr(layer, "targets", None), getattr(layer, "labels", None), *tensors):
            try:
                labels = torch.as_tensor(_numbered(found))
            except (TypeError, ValueError, RuntimeError):
                continue
            if labels.ndim == 2 and labels.shape[1] == 1:
                labels = labels[:, 0]
            if labels.is_floating_point() and labels.ndim == 1 and bool((labels % 1 != 0).any()):
                continue  # values, which make no classes
            if labels.ndim in (1, 2) and len(labels) == len(layer):
                for indices in reversed([*subsets]):
                    labels = labels[torch.as_tensor(list(indices))]
                return labels if len(labels) == len(dataset) else None
    return None


def _numbered(labels: Any) -> Any:
    """Return labels that are text as numbers."""
    text = isinstance(labels, (list, tuple)) and all(isinstance(each, str) for each in labels)
    if text or getattr(getattr(labels, "dtype", None), "kind", "") == "U":
        return np.unique(labels, return_inverse=True)[1].reshape(np.shape(labels))
    return labels


def _layers(dataset: Any) -> Iterator[tuple[Any, list[Sequence[int]]]]:
    """Go down from a dataset to those that it wraps, each with the indices of the Subsets above it."""
    subsets: list[Sequence[int]] = []
    while dataset is not None:
        yield dataset, [*subsets]
        if isinstance(dataset, Subset):
            subsets.append(dataset.indices)
        dataset = getattr(dataset, "dataset", None)


def _pictures(dataset: Any) -> Any:
    """Return the dataset whose samples have the images, in the order of the dataset given."""
    for layer, subsets in _layers(dataset):
        if hasattr(layer, "image_dataset"):
            pictures: Any = layer.image_dataset
            for indices in reversed(subsets):
                pictures = Subset(pictures, indices)
            return pictures
    return dataset


def _mask_reader(dataset: Any) -> MaskReader | None:
    """Return what reads the masks of a dataset's samples, None if they have none."""
    for layer, subsets in _layers(_pictures(dataset)):
        if callable(read := getattr(layer, "input_masks", None)):
            return partial(_masks_below, read, subsets)
    return None


def _masks_below(
    read: MaskReader, subsets: Sequence[Sequence[int]], index: int, classes: Sequence[int]
) -> Tensor:
    """Read the masks of a sample that is counted as above the Subsets."""
    for indices in subsets:
        index = indices[index]
    return read(index, classes)


def first_samples(loader: Any, count: int | Stratified | Sequence[int]) -> Collected:
    """Return the first samples of the loader's dataset as one batch, without iterating the loader.

    Or those that are named by their indices, or `Stratified`.

    Its workers, sampler and generator are not used, so that their state stays what it was. All
    samples are taken if there are fewer than `count`. A loader with an `__iter__` of its own, which
    may change batches, makes this batch itself, where that leaves no mark. Of a loader without a
    dataset, or with one that only its sampler can read, it is the first batch.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None:
        if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
            raise InvalidValueError(
                f"a {type(loader).__name__} has no dataset to take {count} samples from: pass the "
                "probe itself, probe=(images, labels)"
            )
        if not isinstance(count, int):
            raise InvalidValueError(
                f"a {type(loader).__name__} has no dataset with indices: pass a number as probe"
            )
        return _read(Stream(loader), count, _as_it_is, ready=True)
    pictures = _pictures(dataset)
    if isinstance(count, Stratified):
        count = count.indices(dataset)
    if not isinstance(count, int):
        count = [int(index) for index in count]
        size = len(pictures) if isinstance(pictures, Sized) else 0
        if outside := [index for index in count if not 0 <= index < size]:
            raise InvalidValueError(
                f"probe must name samples in 0..{size - 1}, got {outside}: those of the validation "
                "dataset count from 0, and have to be found by their index"
            )
    collate = default_collate
    if pictures is dataset:
        collate = getattr(loader, "collate_fn", None) or default_collate
    # The dataset may make its own batches.
    ready = isinstance(loader, DataLoader) and loader.batch_sampler is None
    read = partial(_read, pictures, count, collate, loader, ready)
    first_batch = partial(_read, Stream(loader), count, _as_it_is, loader, ready=True)
    if pictures is not dataset:
        return read()
    if getattr(type(loader), "__iter__", DataLoader.__iter__) is not DataLoader.__iter__:
        if any(each.batch_sampler is not None for each in loaders_in(loader)):
            stream = Stream(loader, _indices(dataset, count))
            read = partial(_read, stream, count, _as_it_is, loader, ready=True, origin=dataset)
        elif isinstance(count, int):
            read = first_batch
    try:
        return read()
    except Exception:
        # Samplers may give keys, sizes, or only such samples together as make a batch.
        if isinstance(count, int):
            with suppress(Exception):
                return first_batch()
        raise


def _indices(dataset: Any, count: int | Sequence[int]) -> Sequence[int]:
    """Return the samples that are meant, of those that there are."""
    if not isinstance(count, int):
        return count
    listed = isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)
    return range(min(count, len(dataset)) if listed else count)


def _read(
    dataset: Any,
    count: int | Sequence[int],
    collate: Collate,
    loader: Any = None,
    ready: bool = False,
    origin: Any = None,
) -> Collected:
    """Read a batch and its masks where that leaves no mark.

    `origin` is the dataset whose samples are the rows of the batch, where that is another.
    """
    whole = "the loader's first batch" if ready and origin is None else "the data"
    note = partial(_masks_of_batch, _mask_reader(dataset if origin is None else origin), count)
    batch, masks = read_samples(
        dataset, count, collate=collate, loader=loader, ready=ready, note=note
    )
    numbers = range(count) if isinstance(count, int) else count
    known = None if masks is None else _KnownMasks(masks)
    return Collected(batch, len(numbers), known, whole, numbers)


def _as_it_is(batch: Any) -> Any:
    return batch


_Masks: TypeAlias = dict[tuple[int, tuple[int, ...]], Tensor]


def _masks_of_batch(
    read: MaskReader | None, count: int | Sequence[int], batch: Any
) -> _Masks | str | None:
    """Return the masks of what a batch is labelled with, or why they could not be read."""
    if read is None:
        return None
    places = range(count) if isinstance(count, int) else count
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is all said again where the batch has arrived
            probe = Probe.from_batch(batch, len(places), places)
    except Exception:
        return None
    if probe.masks is not None:
        return None
    labelled = [(row, probe.classes_of(row)) for row in range(len(probe.images))]
    try:
        return {(row, tuple(some)): read(places[row], some) for row, some in labelled if some}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _KnownMasks:
    """Gives masks that were read before, or says why there are none."""

    masks: _Masks | str

    def __call__(self, row: int, classes: Sequence[int]) -> Tensor:
        if isinstance(self.masks, str):
            raise RuntimeError(self.masks)
        return self.masks[row, tuple(classes)]


def _first_loader(loaders: Any) -> Any:
    loaders = getattr(loaders, "iterables", loaders)
    while isinstance(loaders, (list, tuple, Mapping)) and loaders:
        loaders = next(iter(loaders.values())) if isinstance(loaders, Mapping) else loaders[0]
    if loaders is None or isinstance(loaders, (list, tuple, Mapping)):
        raise InvalidValueError(
            "there is no data loader to take the probe from: pass the probe itself, "
            "probe=(images, labels)"
        )
    return loaders


def source_of(probe: ProbeSource, loaders: Any) -> Any:
    """Return the dataset that the probe comes from, None for a batch of the user's own."""
    if from_loader(probe) is None:
        return probe if isinstance(probe, Dataset) else None
    try:
        return getattr(_first_loader(loaders), "dataset", None)
    except ValueError:
        return None
