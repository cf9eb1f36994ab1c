"""What labels mean, in the forms in which loaders give them, and by the names people use."""

from argparse import Namespace
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallNet
from torch import Tensor, nn

from lightning_aop.model.adapter import Adapter, AdapterError, find_adapter
from lightning_aop.model.batches import BatchError
from lightning_aop.model.outputs import Expected
from lightning_aop.monitor.labels import Labels, Reading, read_batch
from lightning_aop.monitor.probe import Probe
from lightning_aop.scores import Score, sigmoid, softmax, value

IMAGES = torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([2, 0, 1, 2])
HOT = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]])
ONE_HOT = nn.functional.one_hot(CLASSES, 3)


def read(labels: Any) -> Labels | None:
    return read_batch((IMAGES, labels)).labels


def probe_of(labels: Any, module: nn.Module) -> tuple[Probe, Adapter]:
    reading = read_batch((IMAGES, labels))
    adapter = find_adapter(module, reading.inputs, reading.expected(module))
    return Probe.of(reading, adapter), adapter


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (CLASSES, "class"),
        (CLASSES[:, None], "class"),
        (CLASSES.float(), "class"),
        (CLASSES.numpy(), "class"),
        (CLASSES.tolist(), "class"),
        (list(CLASSES), "class"),
        (CLASSES > 0, "class"),
        (torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None], "class"),
        (CLASSES - 100, "class"),
        (torch.tensor([0, 1, torch.nan, 1]), "class"),
        (torch.tensor([0, 2.5, torch.nan, 1]), "value"),
        (HOT, "multi-hot"),
        (torch.where(HOT == 1, torch.nan, ONE_HOT), "multi-hot"),
        (torch.where(HOT == 1, torch.nan, 2.5 * ONE_HOT), "value"),
        (HOT.bool(), "multi-hot"),
        (HOT.float() * 0.9, "multi-hot"),
        (-HOT, "multi-hot"),
        (ONE_HOT, "one-hot"),
        (ONE_HOT.float(), "one-hot"),
        (0.7 * ONE_HOT + 0.1, "soft"),
        (CLASSES + 0.25, "value"),
        (CLASSES[:, None] + 0.25, "value"),
        (-CLASSES.float(), "value"),
        (HOT * 2.5, "value"),
        (torch.full((4, 8, 6), 255), "mask"),
        (torch.zeros(4, 1, 8, 6).long(), "mask"),
        (torch.ones(4, 1, 8, 6), "mask"),
        ((IMAGES > 0.5).float(), "mask"),
        (IMAGES[:, 0] > 0.5, "mask"),
        ([{"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}] * 4, "boxes"),
        ([[{"category_id": 2, "bbox": [0, 0, 1, 1]}]] * 4, "boxes"),
        ([{"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4)}] * 4, "boxes"),
        ((CLASSES, CLASSES.flip(0), 0.3), "class"),  # mixup
        ({"species": CLASSES, "label": CLASSES}, "class"),
        ({"species": CLASSES, "path": list("abcd")}, "class"),
        ({"species": CLASSES, "colour": CLASSES}, None),
        (CLASSES[:, None, None], "class"),
        (ONE_HOT[:, None], "one-hot"),
        (["a", "b", "c", "d"], None),
        (torch.rand(4, 3, 8, 6), None),
        (CLASSES[:3], None),
        (None, None),
    ],
)
def test_labels_are_taken_for_what_they_are(raw: Any, kind: str | None) -> None:
    labels = read(raw)
    assert (None if labels is None else labels.kind) == kind


@pytest.mark.parametrize(
    "names",
    [
        ("image", "label"),
        ("jpg", "cls"),
        ("pixel_values", "labels"),
        ("img", "fine_label"),
        ("images", "category_id"),
        ("image", "gt_label"),
        ("x", "y"),
        ("Image", "Label"),
    ],
)
def test_images_and_labels_by_name(names: tuple[str, str]) -> None:
    first, second = names
    for batch in (
        {"index": torch.arange(4), second: CLASSES, first: IMAGES, "path": list("abcd")},
        {"inputs": {first: IMAGES}, second: CLASSES},
        {"data": {first: IMAGES, second: CLASSES}},
        namedtuple("Batch", [second, first])(CLASSES, IMAGES),
        type("Batch", (), {})(),
    ):
        if not isinstance(batch, (dict, tuple)):
            vars(batch).update({first: IMAGES, second: CLASSES})
        reading = read_batch(batch)
        assert reading.inputs.images is IMAGES
        assert reading.labels is not None
        assert torch.equal(reading.labels.values, CLASSES)


@dataclass(frozen=True)
class Item:
    image: Tensor
    gt_label: Tensor
    names: list[str]


def test_a_dataclass_and_its_first_samples() -> None:
    reading = read_batch(Item(IMAGES, CLASSES, list("abcd")), limit=2)
    assert torch.equal(reading.inputs.images, IMAGES[:2])
    assert reading.labels is not None
    assert reading.labels.values.tolist() == [2, 0]
    assert reading.inputs.batch.names == ["a", "b"]


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, torch.arange(10, 14), CLASSES),
        (torch.arange(4), IMAGES, CLASSES),
        (IMAGES, CLASSES, torch.arange(4)),
        [IMAGES, CLASSES, list("abcd")],
        ((IMAGES, IMAGES + 1), CLASSES),
        ([IMAGES, CLASSES], 7),
        (IMAGES, torch.rand(4, 5), CLASSES),
    ],
)
def test_labels_by_their_place(batch: Any) -> None:
    reading = read_batch(batch)
    assert reading.inputs.images is IMAGES
    assert reading.labels is not None
    assert reading.labels.values.tolist() == CLASSES.tolist()


# --------------------------------------------------------------------------------------------------
# what they mean for a model


class TrainedByBce(SmallNet):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__(outputs)
        self.loss = nn.BCEWithLogitsLoss()


class TrainedBySteps(SmallNet):
    def __init__(self) -> None:
        super().__init__(3)

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


def test_one_hot_labels_are_classes_unless_each_is_trained_on_its_own() -> None:
    probe, adapter = probe_of(ONE_HOT, SmallNet(3))
    assert adapter.score is softmax
    assert probe.labels is not None
    assert probe.labels.tolist() == CLASSES.tolist()
    for module in (TrainedByBce(), TrainedBySteps()):
        probe, adapter = probe_of(ONE_HOT, module)
        assert adapter.score is sigmoid
        assert probe.labels is not None
        assert torch.equal(probe.labels, ONE_HOT)


def test_soft_labels_have_the_class_of_the_largest_share() -> None:
    probe, adapter = probe_of(0.7 * ONE_HOT + 0.1, SmallNet(3))
    assert adapter.score is softmax
    assert probe.labels is not None
    assert probe.labels.tolist() == CLASSES.tolist()


def test_values_to_predict_are_the_outputs() -> None:
    for labels in (CLASSES + 0.5, CLASSES, CLASSES[:, None].float()):
        probe, adapter = probe_of(labels, SmallNet(1))
        assert (adapter.score, adapter.classes) == (value, 2)
        assert probe.labels is not None
        assert probe.labels.tolist() == [[1, 1]] * 4  # what raises it, and what lowers it
        assert probe.note == ""
    probe, adapter = probe_of(HOT * 2.5, SmallNet(3))
    assert "predicts 3 values: the first is explained; name others by targets=[1, 4," in probe.note
    rows, targets = probe.pairs("label", torch.zeros(4, 6), 3)
    assert rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert targets.tolist() == [0, 3] * 4
    assert adapter.names is not None
    assert adapter.names[4] == "less of value 1"
    assert probe.false_positives(torch.full((4, 6), 9.0))[0].tolist() == []


def test_one_logit_has_two_classes() -> None:
    for labels in (CLASSES % 2, (CLASSES % 2).float(), (CLASSES % 2).float()[:, None]):
        probe, adapter = probe_of(labels, SmallNet(1))
        assert (adapter.score, adapter.classes) == (sigmoid, 2)
        assert probe.labels is not None
        assert probe.labels.tolist() == [0, 0, 1, 0]


def test_a_label_of_no_class_leaves_its_image_out() -> None:
    reading = read_batch((IMAGES, torch.tensor([2, -100, 1, 255])))
    expected = reading.expected(SmallNet(3), classes=3)
    adapter = find_adapter(SmallNet(3), reading.inputs, expected)
    probe = Probe.of(reading, adapter)
    assert probe.labels is not None
    assert probe.labels.tolist() == [2, -1, 1, -1]
    assert "2 of 4 images are not explained" in probe.note
    assert "[-100, 255], are none of the 3 classes" in probe.note
    rows, targets = probe.pairs("label", torch.zeros(4, 3), 3)
    assert (rows.tolist(), targets.tolist()) == ([0, 2], [2, 1])
    masked = probe.with_masks(lambda row, classes: torch.ones(len(classes), 8, 6))
    assert masked.mask_pairs is not None
    assert masked.mask_pairs.tolist() == [[0, 2], [2, 1]]


def test_labels_that_fit_nothing_are_refused() -> None:
    reading = read_batch((IMAGES, HOT[:, :2]))
    adapter = find_adapter(SmallNet(3), reading.inputs, reading.expected(SmallNet(3)))
    with pytest.raises(BatchError, match=r"2 columns, where the model gives 3 .*logits=fn"):
        Probe.of(reading, adapter)
    reading = read_batch((IMAGES, CLASSES - 100))
    with pytest.raises(BatchError, match=r"are all outside, such as -98, where .*logits=fn"):
        Probe.of(reading, adapter)


def test_a_segmentation_has_the_classes_of_its_pixels_and_their_masks() -> None:
    pixels = torch.zeros(4, 8, 6, dtype=torch.long)
    pixels[0, :3] = 2
    pixels[1, :, :] = 255
    reading = read_batch({"image": IMAGES, "mask": pixels})
    module = nn.Conv2d(3, 3, 1)
    probe = Probe.of(reading, find_adapter(module, reading.inputs, reading.expected(module)))
    assert probe.labels is not None
    assert probe.labels.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert probe.masks is not None
    assert torch.equal(probe.masks[1], pixels[0] == 2)


def test_masks_of_each_class_and_in_black_and_white() -> None:
    module = nn.Conv2d(3, 3, 1)
    masks = IMAGES > 0.5
    masks[0, 2] = False
    reading = read_batch({"image": IMAGES, "mask": masks.float()})
    probe = Probe.of(reading, find_adapter(module, reading.inputs, reading.expected(module)))
    assert probe.labels is not None
    assert probe.labels.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert probe.masks is not None
    assert torch.equal(probe.masks[:2], masks[0, :2])
    white = read(masks[:, 0].byte() * 255)
    assert white is not None
    assert torch.equal(white.values, masks[:, 0].long())


def test_text_is_a_class_by_the_names() -> None:
    text = ["okapi", "zebra", "okapi", "lion"]
    for batch in ((IMAGES, text), {"image": IMAGES, "label": text}):
        labels = read_batch(batch, names=["zebra", "okapi"]).labels
        assert labels is not None
        assert labels.values.tolist() == [1, 0, 1, -1]
        reading = read_batch(batch)
        assert reading.labels is None
        assert "the labels are text, such as 'okapi', and no class names" in reading.note
        assert Probe.of(reading).note == reading.note
    assert read_batch((IMAGES, ["a/1.jpg", "2.jpg", "3.jpg", "4.jpg"])).note == ""


def test_labels_of_minus_one_and_one_are_two_classes() -> None:
    probe, _ = probe_of(torch.tensor([-1, 1, 1, -1]), SmallNet(1))
    assert probe.labels is not None
    assert probe.labels.tolist() == [0, 1, 1, 0]


def test_a_soft_margin_of_one_output_has_two_classes() -> None:
    """Whatever the batch has of -1.0 and 1.0."""
    module = SmallNet(1)
    module.loss = nn.SoftMarginLoss()
    for labels in ([-1.0, 1.0, 1.0, -1.0], [-1.0] * 4):
        probe, adapter = probe_of(torch.tensor(labels), module)
        assert adapter.score is sigmoid
        assert probe.labels is not None
        assert probe.labels.tolist() == [max(int(label), 0) for label in labels]


@pytest.mark.parametrize(
    ("losses", "score"),
    [
        ([nn.functional.binary_cross_entropy_with_logits], sigmoid),
        ([partial(nn.functional.binary_cross_entropy_with_logits, reduction="sum")], sigmoid),
        ([partial(nn.functional.poisson_nll_loss, log_input=False)], value),
        ([nn.functional.mse_loss], value),
        ([nn.functional.cross_entropy, nn.MSELoss()], softmax),
    ],
)
def test_a_loss_may_be_a_function_that_the_module_holds(losses: list[Any], score: Score) -> None:
    module = SmallNet(3)
    module.loss, module.auxiliary = losses[0], losses[-1]
    reading = read_batch((IMAGES, {sigmoid: ONE_HOT, value: HOT}.get(score)))
    expected = reading.expected(module)
    assert find_adapter(module, reading.inputs, expected).score is score


def test_the_loss_says_whether_labels_are_values() -> None:
    labels = (CLASSES > 0).float()
    for loss, score in (
        (nn.MSELoss(), value),
        (nn.functional.l1_loss, value),
        (nn.BCEWithLogitsLoss(), sigmoid),
    ):
        module = SmallNet(1)
        module.loss = loss
        _, adapter = probe_of(labels, module)
        assert adapter.score is score
    probe, adapter = probe_of(labels * 0.8 + 0.1, module)  # smoothed
    assert adapter.score is sigmoid
    assert probe.labels is not None
    assert probe.labels.tolist() == labels.tolist()


def test_values_for_each_pixel_are_no_segmentation() -> None:
    depth = torch.rand(4, 1, 8, 6)
    for batch in ((IMAGES, depth), {"image": IMAGES, "depth": depth[:, 0]}):
        reading = read_batch(batch)
        assert reading.pixels
        with pytest.raises(ValueError, match="values for each pixel, such as depths"):
            find_adapter(Pixels(), reading.inputs, Expected(pixels=True, classes=3))
        with pytest.raises(ValueError, match="logits=lambda module, images"):
            find_adapter(Pixels(), reading.inputs, reading.expected(Pixels()))
    for other in ((IMAGES, CLASSES), (IMAGES, MASK), IMAGES, (IMAGES, depth, CLASSES)):
        assert not read_batch(other).pixels


def test_what_raises_a_value_is_explained_without_labels() -> None:
    reading = read_batch((IMAGES, torch.rand(4, 1, 8, 6)))
    module = Regression(2)
    probe = Probe.of(reading, find_adapter(module, reading.inputs, reading.expected(module)))
    assert probe.labels is not None
    assert probe.labels.tolist() == [[1, -1, 1, -1]] * 4


def test_what_nobody_has_labelled_is_no_label() -> None:
    some = torch.tensor([[0, 1, torch.nan], [torch.nan, 0, 1], [1, 1, 0], [0, 0, 0]])
    probe, adapter = probe_of(some, SmallNet(3))
    assert adapter.score is sigmoid
    assert [probe.classes_of(row) for row in range(4)] == [[1], [2], [0, 1], []]
    assert probe.false_positives(torch.full((4, 3), 0.9))[0].tolist() == [2, 3]
    probe, adapter = probe_of(torch.tensor([1, torch.nan, 1, 1]), SmallNet(1))
    assert adapter.score is sigmoid
    assert probe.labels is not None
    assert probe.labels.tolist() == [1, -1, 1, 1]


class Common(SmallNet):
    """Has its loss in a method that two steps share, by another."""

    def training_step(self, batch: Any) -> Tensor:
        return self._common_step(batch)

    def _common_step(self, batch: Any) -> Tensor:
        return self.compute_loss(self(batch[0]), batch[1])

    def compute_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, labels)

    def unused(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels)


class CommonBce(Common):
    def compute_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, labels)


class CommonFocal(Common):
    def compute_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        import torchvision

        return torchvision.ops.sigmoid_focal_loss(outputs, labels)


class AsymmetricLoss(nn.Module):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        found = torch.sigmoid(outputs)
        return -(labels * found.log() + (1 - labels) * (1 - found).log()).mean()


class HoldsALoss(Common):
    def __init__(self) -> None:
        super().__init__(3)
        self.criterion = AsymmetricLoss()

    def compute_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(outputs, labels)


def test_a_loss_counts_in_any_method_that_the_steps_use() -> None:
    for module, labels, score in (
        (Common(3), POINTS, value),
        (Common(1), (CLASSES > 0).float(), value),
        (CommonBce(3), ONE_HOT.float(), sigmoid),
        (CommonFocal(3), ONE_HOT.float(), sigmoid),
        (HoldsALoss(), ONE_HOT.float(), sigmoid),
        (SmallNet(3), ONE_HOT.float(), softmax),
    ):
        assert probe_of(labels, module)[1].score is score


def test_labels_of_several_numbers_are_shown_as_they_are() -> None:
    both = torch.stack([CLASSES, 3 * CLASSES], dim=1)
    for batch in ((IMAGES, both), {"image": IMAGES, "label": both}):
        reading = read_batch(batch)
        assert reading.labels is None
        probe = Probe.of(reading, find_adapter(SmallNet(3), reading.inputs))
        note = "the labels int64 [4, 2] are neither classes [4] nor zeros and ones"
        assert note in probe.note
        assert "read_batch=fn" in probe.note
        assert "and those of the batch are not: pass" in _refused(probe)
    assert "the probe has none" in _refused(Probe.of(read_batch(IMAGES)))


def _refused(probe: Probe) -> str:
    with pytest.raises(ValueError, match="needs labels") as caught:
        probe.pairs("label", torch.zeros(4, 3), 3)
    return str(caught.value)


def test_the_users_own_reading() -> None:
    odd = {"a": CLASSES, "b": {"c": IMAGES, "d": torch.rand(4, 3, 8, 6)}}
    reading = read_batch(odd, 3, lambda batch: (batch["b"]["d"], batch["a"]))
    assert torch.equal(reading.inputs.images, odd["b"]["d"][:3])
    assert reading.inputs.path == ("b", "d")
    assert reading.labels is not None
    assert reading.labels.values.tolist() == [2, 0, 1]
    made = read_batch(odd, None, lambda batch: (batch["b"]["c"] * 2, np.array([1, 0, 1, 1])))
    assert torch.equal(made.inputs.images, IMAGES * 2)
    assert read_batch(odd, None, lambda batch: (IMAGES, None)).labels is None
    with pytest.raises(BatchError, match=r"must return a pair .*got a Tensor"):
        read_batch(odd, None, lambda batch: IMAGES)  # type: ignore[arg-type, return-value]
    with pytest.raises(BatchError, match="a list, are no labels of 4 images"):
        read_batch(odd, None, lambda batch: (IMAGES, ["a"]))


def test_a_reading_survives_being_sent_to_another_process() -> None:
    import pickle

    reading: Reading = pickle.loads(pickle.dumps(read_batch({"image": IMAGES, "y": CLASSES})))
    assert torch.equal(reading.inputs.images, IMAGES)


def test_four_labels_make_four_grey_images_of_what_could_be_one() -> None:
    grey = torch.rand(4, 12, 9)
    assert read_batch((grey, CLASSES)).inputs.images.shape == (4, 1, 12, 9)
    with pytest.raises(BatchError, match="a single image"):
        read_batch((grey, 3))


class Heads(nn.Module):
    """Gives logits of colours and of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.colours, self.shapes = SmallNet(4), SmallNet(3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"colour": self.colours(x), "shape": self.shapes(x)}


MASK = (IMAGES[:, 0] > 0.5).long()
SITE = torch.tensor([70, 3, 12, 8])
WEIGHT = torch.tensor([0.5, 1.5, 0.7, 0.2])
POINTS = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
BOXES = [{"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4)}] * 4


class Pixels(nn.Module):
    """Gives logits of three classes for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Boxes(SmallNet):
    def forward(self, x: Tensor) -> Any:
        one = torch.tensor([1, 2])
        return [{"labels": one, "scores": z.sigmoid()[:2]} for z in super().forward(x)]


class Regression(SmallNet):
    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.loss = nn.MSELoss()


@pytest.mark.parametrize(
    ("batch", "module", "place"),
    [
        ((IMAGES, MASK, CLASSES), SmallNet(3), 2),
        ((IMAGES, MASK[:, None].float(), CLASSES), SmallNet(3), 2),
        ((IMAGES, MASK.byte() * 255, CLASSES), SmallNet(3), 2),
        ((IMAGES, CLASSES, MASK), SmallNet(3), 1),
        ((IMAGES, CLASSES, MASK), Pixels(), 2),
        ((IMAGES, torch.arange(4), MASK), Pixels(), 2),
        ((IMAGES, torch.arange(4), BOXES), Boxes(3), 2),
        ((IMAGES, SITE, CLASSES), SmallNet(3), 2),
        ((IMAGES, SITE, ONE_HOT), SmallNet(3), 2),
        ((IMAGES, WEIGHT, CLASSES), SmallNet(3), 2),
        ((IMAGES, WEIGHT, CLASSES > 0), TrainedByBce(1), 1),
        ((IMAGES, SITE, CLASSES > 0), TrainedByBce(1), 2),
        ((IMAGES, POINTS, CLASSES), SmallNet(3), 2),
        ((IMAGES, POINTS, CLASSES), Regression(3), 1),
        ((IMAGES, WEIGHT, CLASSES), Regression(1), 1),
        ((IMAGES, SITE, CLASSES), SmallNet(1), 1),  # as ages are
        ((IMAGES, (SITE, CLASSES)), SmallNet(3), (1, 1)),
        ((IMAGES, CLASSES, CLASSES.flip(0)), SmallNet(3), 1),
    ],
)
def test_of_what_may_be_labels_in_a_tuple_those_that_fit_the_outputs_count(
    batch: Any, module: nn.Module, place: Any
) -> None:
    reading = read_batch(batch)
    adapter = find_adapter(module, reading.inputs, reading.expected(module))
    path = place if isinstance(place, tuple) else (place,)
    assert reading.place_for(adapter) == path
    wanted = batch
    for key in path:
        wanted = wanted[key]
    found, given = reading.labels_for(adapter), read(wanted)
    assert found is not None
    assert given is not None
    assert found.kind == given.kind
    probe = Probe.of(reading, adapter)
    assert probe.labels is not None
    assert (probe.masks is not None) == isinstance(module, Pixels)
    written = "".join(f"[{key}]" for key in path)
    assert f"of the batch, {written} has the labels, not [" in adapter.description


@pytest.mark.parametrize("numbers", [[0, 1], [3, 9], [0, 2, 1, 3]])
def test_the_numbers_of_the_samples_are_no_labels(numbers: list[int]) -> None:
    count = len(numbers)
    batch = (IMAGES[:count], torch.tensor(numbers), CLASSES[:count])
    reading = read_batch(batch, count, numbers=numbers)
    adapter = find_adapter(SmallNet(4), reading.inputs, reading.expected(SmallNet(4)))
    assert reading.place_for(adapter) == (2,)
    # Labels that are the numbers by chance stay labels.
    reading = read_batch((batch[0], batch[1] % 4, MASK[:count]), count, numbers=range(count))
    adapter = find_adapter(SmallNet(4), reading.inputs, reading.expected(SmallNet(4)))
    assert reading.place_for(adapter) == (1,)


@pytest.mark.parametrize("inside", [False, True])
def test_an_output_has_the_labels_of_its_key(inside: bool) -> None:
    labels = {"shape": CLASSES, "weight": torch.rand(4), "index": torch.arange(4)}
    batch = {"image": IMAGES, "targets": labels} if inside else {"image": IMAGES, **labels}
    module, reading = Heads(), read_batch(batch, limit=3)
    adapter = find_adapter(module, reading.inputs, reading.expected(module))
    assert (adapter.head, adapter.classes) == ("shape", 3)
    probe = Probe.of(reading, adapter)
    assert probe.labels is not None
    assert probe.labels.tolist() == CLASSES[:3].tolist()


def test_a_label_of_255_among_lower_ones_is_one_to_ignore() -> None:
    labels = torch.tensor([2, 255, 1, 0])
    probe, adapter = probe_of(labels, SmallNet(3))
    assert adapter.classes == 3
    assert probe.labels is not None
    assert probe.labels.tolist() == [2, -1, 1, 0]
    assert "1 of 4 images" in probe.note
    with pytest.raises(ValueError, match="labels go up to class 255"):
        probe_of(torch.tensor([2, 255, 200, 0]), SmallNet(3))


class ByKey(nn.Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"], batch["age"]), batch["breed"])


class ByVariable(nn.Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, breed = batch["image"], batch["breed"].long()
        return self.shared(images, breed, batch.get("age"))

    def shared(self, images: Tensor, breed: Tensor, age: Tensor) -> Tensor:
        return self.criterion(self(images), breed)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        y = batch["breed"]
        self.loss_fn(input=self.net(batch["image"], batch["age"]), target=y)


class Weighted(nn.Module):
    def training_step(me, batch: Any, batch_idx: int) -> Tensor:  # noqa: N805
        losses = nn.functional.cross_entropy(
            me.run(batch["image"], batch["age"]), batch["breed"], reduction="none"
        )
        return (losses * batch["score"]).mean()


BREED = "breed"


class ByConstant(nn.Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch[BREED])


class BySetting(nn.Module):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.hparams = Namespace(image="image", label=key)
        self.keys = {"labels": key}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[self.hparams.image]), batch[self.hparams.label])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch[self.keys["labels"]]
        return self.loss(self(batch["image"]), labels)


class OfTwo(nn.Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, b = self(batch["image"])
        return self.ce(a, batch["breed"]) + self.ce(b, batch["label"])


def dictionary(**columns: Any) -> dict[str, Any]:
    return {"image": IMAGES, "age": CLASSES.flip(0), **columns, "breed": CLASSES}


@pytest.mark.parametrize(
    "module", [ByKey(), ByVariable(), Weighted(), ByConstant(), BySetting("breed")]
)
@pytest.mark.parametrize("other", ["score", "category", "label", "attributes", "sex"])
def test_the_labels_are_what_the_losses_of_the_steps_are_given(
    module: nn.Module, other: str
) -> None:
    batch = dictionary(**{other: HOT if other == "attributes" else torch.rand(4)})
    reading = read_batch(batch).used_by(module)
    assert reading.labels is not None
    assert torch.equal(reading.labels.values, CLASSES)
    assert reading.place == ("breed",)
    assert [*reading.heads] == ["breed"]


class ArcFaceLoss(nn.Module):
    """Has a vector for each class, or is given the cosines with them."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss()
        if own:
            self.weight = nn.Parameter(torch.randn(8, 3))


class Metric(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.net = SmallNet(8)
        self.loss = ArcFaceLoss(own)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]


def test_embeddings_whose_loss_has_the_classes_are_no_classes() -> None:
    reading = read_batch((IMAGES, CLASSES))
    with pytest.raises(AdapterError, match=r"an embedding, which has no class.*cosine_similarity"):
        find_adapter(Metric(own=True), reading.inputs, reading.expected(Metric(own=True)))
    module = Metric(own=False)
    assert find_adapter(module, reading.inputs, reading.expected(module)).classes == 8


def test_of_several_that_losses_are_given_a_known_name_counts() -> None:
    labels = CLASSES.roll(1)
    reading = read_batch(dictionary(label=labels)).used_by(OfTwo())
    assert reading.labels is not None
    assert torch.equal(reading.labels.values, labels)


def test_a_single_column_has_the_labels_whatever_its_name() -> None:
    batch = {"image": IMAGES, "image_id": torch.tensor([7, 3, 9, 1]), "diagnosis": CLASSES}
    reading = read_batch(batch).used_by(nn.Linear(2, 2))
    assert reading.labels is not None
    assert torch.equal(reading.labels.values, CLASSES)


def test_several_columns_are_named_with_what_chooses_one() -> None:
    reading = read_batch({"scan": IMAGES, "subject": CLASSES, "emotion": CLASSES})
    reading = reading.used_by(nn.Linear(2, 2))
    assert reading.labels is None
    assert reading.note.startswith("which of subject, emotion has the labels isn't known")
    read = eval(reading.note.partition("read_batch=")[2])
    assert read({"scan": 1, "subject": 2}) == (1, 2)
