"""What a probe is read from, apart from any Trainer: the kinds of batch, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_aop.monitor.probe import Probe, collect, source_of

IMAGES = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1])


def test_a_tensor_is_a_batch_without_labels() -> None:
    probe = Probe.from_batch(IMAGES, limit=2)
    assert torch.equal(probe.images, IMAGES[:2])
    assert probe.labels is None
    assert probe.with_masks(lambda row, classes: pytest.fail("nothing to ask for")) is probe


def test_masks_of_one_class_and_of_each() -> None:
    of_the_label = torch.rand(3, 6, 5) > 0.5
    probe = Probe.from_batch({"image": IMAGES, "label": LABELS, "masks": of_the_label})
    assert probe.masks is not None
    assert probe.mask_pairs is not None
    assert torch.equal(probe.masks, of_the_label)
    assert probe.mask_pairs.tolist() == [[0, 2], [1, 0], [2, 1]]
    hot = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    of_each = torch.rand(3, 3, 6, 5) > 0.5
    probe = Probe.from_batch((IMAGES, hot, of_each))
    assert probe.masks is not None
    assert probe.mask_pairs is not None
    assert probe.mask_pairs.tolist() == [[0, 0], [0, 2], [2, 1]]
    assert torch.equal(probe.masks, torch.stack([of_each[0, 0], of_each[0, 2], of_each[2, 1]]))
    nothing = Probe.from_batch((IMAGES, torch.zeros_like(hot), of_each))
    assert nothing.masks is None


def test_masks_of_another_shape_are_said_to_be_left_out() -> None:
    other = torch.zeros(3, 4, 4, dtype=torch.bool)
    with pytest.warns(UserWarning, match=r"masks have shape \[3, 4, 4\], where \[3, 6, 5\]"):
        probe = Probe.from_batch({"image": IMAGES, "label": LABELS, "masks": other})
    assert probe.masks is None
    assert Probe.from_batch((IMAGES, LABELS, other)).masks is None  # may be anything


class Features(Dataset[Any]):
    """Samples that are no pictures, with the pictures beside them."""

    image_dataset = TensorDataset(IMAGES, LABELS)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(7), LABELS[index]


def test_pictures_are_found_below_subsets_of_features() -> None:
    nested = Subset(Subset(Features(), [2, 0, 1]), [1, 2])
    for source in (collect(nested, None), collect(5, DataLoader(nested, batch_size=2))):
        assert torch.equal(source.batch[0], IMAGES[[0, 1]])
        assert source.batch[1].tolist() == [2, 0]


class Ready(Dataset[Any]):
    """Each of its samples is a batch."""

    def __getitem__(self, index: int) -> Any:
        return IMAGES + index, LABELS

    def __len__(self) -> int:
        return 2


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield IMAGES[0]


def test_a_dataset_that_makes_its_own_batches() -> None:
    loader: Any = DataLoader(Ready(), batch_size=None)
    assert torch.equal(collect(2, loader).batch[0], IMAGES)


def test_what_cannot_be_a_probe_is_refused() -> None:
    with pytest.raises(TypeError, match="a dataset with a length or a callable, got Endless"):
        collect(Endless(), None)
    with pytest.raises(ValueError, match="the dataset is empty: pass the probe itself"):
        collect(2, DataLoader(TensorDataset(IMAGES[:0])))
    with pytest.raises(ValueError, match="a Tensor has no dataset to take 2 samples from"):
        collect(2, IMAGES)
    with pytest.raises(ValueError, match="no data loader to take the probe from"):
        collect(2, [])
    assert source_of(2, []) is None
