"""Names of classes and normalisation, as datasets, datamodules and models say them, or seem to."""

from collections import deque
from enum import Enum
from functools import reduce
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_aop.model.adapter import Adapter
from lightning_aop.monitor.facts import Look, class_count, class_names, found_look, normalisation
from lightning_aop.scores import softmax

NAMES = ["zebra", "okapi", "quagga"]


class Has(Dataset[Any]):
    """A dataset with attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("nothing is read")


class Method(Has):
    def classes(self) -> list[str]:
        return NAMES

    @property
    def class_names(self) -> list[str]:
        raise RuntimeError("not set up yet")


@pytest.mark.parametrize(
    "source",
    [
        Has(classes=NAMES),
        Has(classes=tuple(NAMES)),
        Has(classes=np.array(NAMES)),
        Has(classes=[(name, "animal") for name in NAMES]),
        Has(classes={name: i for i, name in enumerate(NAMES)}),
        Has(classes=dict(enumerate(NAMES))),
        Has(class_to_idx={name: i for i, name in enumerate(NAMES)}),
        Has(categories=[{"id": 7, "name": name} for name in NAMES]),
        Method(),
        Has(classes=dict.fromkeys(NAMES).keys()),
        Has(classes=Enum("Animal", NAMES, start=0)),
        Has(label_encoder=SimpleNamespace(classes_=np.array(NAMES))),
        Has(features={"image": None, "label": SimpleNamespace(names=NAMES)}),
        Subset(Has(classes=NAMES), [0]),
        ConcatDataset([Subset(Has(classes=NAMES), [0]), Has()]),
        SimpleNamespace(config=SimpleNamespace(id2label={str(i): n for i, n in enumerate(NAMES)})),
        SimpleNamespace(hparams={"class_names": NAMES}),
        Has(classes=deque(NAMES)),
        Has(classes=np.array([name.encode() for name in NAMES])),
        Has(classes=list(enumerate(NAMES))),
        Has(classes={name: np.int64(i) for i, name in enumerate(NAMES)}),
        Has(classes=list(Enum("Animal", NAMES, start=0))),
        Has(classes=[SimpleNamespace(name=name) for name in NAMES]),
        Has(idx2label=dict(enumerate(NAMES))),
        Has(label_map={name: torch.tensor(i) for i, name in enumerate(NAMES)}),
        Has(target_names=np.array(NAMES)),
        Has(ds=Has(classnames=NAMES)),
    ],
)
def test_names_in_any_form(source: Any) -> None:
    found = class_names([None, source], 3)
    assert (found.value, found.note) == (NAMES, "")
    assert class_count([source]) == 3


@pytest.mark.parametrize("classes", [set(NAMES), 3, "zebra", {"a": 1, "b": 5}, object(), [[]]])
def test_what_names_no_classes_is_left_alone(classes: Any) -> None:
    found = class_names([Has(classes=classes)], 3)
    assert (found.value, found.note) == (None, "")


def test_names_that_do_not_fit_are_left_out_and_said() -> None:
    found = class_names([Has(classes=NAMES[:2])], 3)
    assert found.value is None
    assert found.note.startswith("Has.classes has 2 names, where the model has 3 classes")
    assert class_names([Has(classes=NAMES[:2]), Has(classes=NAMES)], 3).value == NAMES
    assert class_names([Has(label_map={"a": 0, "b": 1})], 3).note == ""
    assert class_count([Has(classes=7)]) == 7
    assert class_count([Has(), SimpleNamespace(hparams=SimpleNamespace(num_classes=4))]) == 4
    assert class_count([Has()]) is None


HALF = ([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
NORMALISE = transforms.Normalize([0.5], [0.25])
OTHER_TRANSFORMS = ("tfms", "_transform", "image_transform", "augmentations", "aug", "normalize")


@pytest.mark.parametrize(
    "source",
    [
        Has(transform=transforms.Normalize([0.5], [0.25])),
        Has(transform=transforms.Normalize([0.5] * 3, [0.25] * 3)),
        Has(transform=transforms.Compose([transforms.Normalize(0.5, 0.25)])),
        Has(
            transforms=transforms.Compose(
                [transforms.Compose([transforms.Normalize(torch.tensor([0.5]), np.array([0.25]))])]
            )
        ),
        ConcatDataset([Subset(Has(transform=transforms.Normalize([0.5], [0.25])), [0])]),
        SimpleNamespace(mean=0.5, std=[0.25]),
        SimpleNamespace(image_mean=(0.5,), image_std=(0.25,)),
        SimpleNamespace(transform={"val": transforms.Normalize([0.5], [0.25])}),
        Has(transform=nn.Sequential(transforms.Resize(8), transforms.Normalize([0.5], [0.25]))),
        Has(transform=[transforms.ToTensor(), transforms.Normalize([0.5], [0.25])]),
        Has(transform=reduce(lambda inner, _: transforms.Compose([inner]), range(5), NORMALISE)),
        *(Has(**{name: transforms.Compose([NORMALISE])}) for name in OTHER_TRANSFORMS),
    ],
)
def test_normalisation_in_any_form(source: Any) -> None:
    found = normalisation([source], 3)
    assert found.value is not None
    assert tuple(map(list, found.value)) == HALF
    assert found.note == ""


def test_a_model_that_normalises_says_nothing_of_images_it_has_yet_to_normalise() -> None:
    model = nn.Conv2d(3, 2, 3)
    model.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
    model.register_buffer("std", torch.full((1, 3, 1, 1), 0.25))
    adapter = Adapter(lambda module, images: images.mean(dim=(2, 3)), "", softmax, 3)
    images = torch.rand(2, 3, 4, 4)
    says = Has(transform=transforms.Normalize([0.5] * 3, [0.25] * 3))
    for sources, shown, wanted in (
        ([model], images, None),
        ([model], (images - 0.5) / 0.25, HALF[0]),  # as a hook for batches has done
        ([says, model], images, HALF[0]),
        ([model], None, None),
    ):
        look, notes = found_look(Look(), sources, adapter, shown)
        assert (look.mean and list(look.mean)) == wanted
        assert notes == []


@pytest.mark.parametrize(
    ("ids", "names"), [((2, 0, 1), ["b", "c", "a"]), ((7, 3, 5), ["b", "c", "a"])]
)
def test_categories_are_in_the_order_of_their_ids(ids: Any, names: list[str]) -> None:
    entries = [{"id": n, "name": name} for n, name in zip(ids, "abc", strict=True)]
    assert class_names([Has(categories=entries)], 3).value == names


@pytest.mark.parametrize("name", ["label_list", "labels_list", "cls_names", "cat_names", "LABELS"])
def test_names_of_classes_under_other_names(name: str) -> None:
    assert class_names([Has(**{name: ["ant", "bee"]})], 2).value == ["ant", "bee"]


def test_normalisation_that_does_not_fit_is_left_out_and_said() -> None:
    found = normalisation([Has(transform=transforms.Normalize([0.5] * 3, [0.25] * 3))], 1)
    assert found.value is None
    assert found.note.startswith("Normalize has mean [0.5, 0.5, 0.5]")
    undoes = {"inv_normalize": NORMALISE, "denormalize": NORMALISE, "target_transform": NORMALISE}
    for nothing in (
        Has(),
        Has(**undoes),
        Has(transform=lambda x: x),
        SimpleNamespace(mean=torch.mean, std="a"),
    ):
        assert normalisation([nothing], 3) == normalisation([], 3)


def test_a_mean_and_std_that_are_not_of_the_images_are_not_undone() -> None:
    adapter = Adapter(lambda module, images: images.mean(dim=(2, 3)), "", softmax, 3)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normalised = (images - 0.5) / 0.25
    of_bytes = Has(mean=[127.5] * 3, std=[63.75] * 3)
    look, notes = found_look(Look(), [of_bytes], adapter, (images * 255 - 127.5) / 63.75)
    assert notes == []
    assert look.mean == pytest.approx(HALF[0])
    assert look.std == pytest.approx(HALF[1])
    # The model's to do, or of the labels: the images have no value below 0.
    for source in (Has(mean=[0.5] * 3, std=[0.25] * 3), Has(mean=41.0, std=12.0)):
        look, notes = found_look(Look(), [source], adapter, images)
        assert (look.mean, look.std, notes) == (None, None, [])
    look, (note,) = found_look(Look(), [Has(mean=410.0, std=120.0)], adapter, normalised)
    assert look.mean is None
    assert note.startswith("undoing the mean [410.0, 410.0, 410.0] and std [120.0, 120.0, 120.0]")


def test_widths_and_columns_are_no_names_of_classes() -> None:
    for features in ((8, 16, 24), ["age", "sex", "bmi"]):
        assert class_names([Has(features=features)], 3).value is None

    class Labelled:
        label_to_name: ClassVar = {0: "cat", 1: "dog", 2: "ape"}

    assert class_names([Labelled()], 3).value == ["cat", "dog", "ape"]
