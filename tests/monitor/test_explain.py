"""Explaining without a Trainer: `lightning_aop.explain` and `monitor.explain`."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallNet, assert_same, snapshot
from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import Compose, Normalize

from lightning_aop import ExplanationMonitor, GradCAM, explain, fast_sigcam
from lightning_aop.metrics import deletion_insertion_curves
from lightning_aop.metrics.functional import auc
from lightning_aop.scores import contrast, sigmoid, softmax

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 1, 4])


@pytest.fixture
def model() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().train()


def test_a_batch_is_explained_as_the_method_and_the_metric_do(model: SmallNet) -> None:
    before = snapshot(model)
    found = explain(model, (IMAGES, LABELS))
    after = snapshot(model)
    for each in (before, after):
        del each["rng"][1:]  # what checks types here draws from Python's and NumPy's
    assert_same(before, after)
    assert found.targets.tolist() == LABELS.tolist()
    maps = fast_sigcam().explain(model, IMAGES, LABELS)
    torch.testing.assert_close(found.maps, maps)
    curves = deletion_insertion_curves(model, IMAGES, maps, LABELS, steps=28)
    deletion, insertion = (auc(curve).mean().item() for curve in curves)
    assert found.values["overall_auc"] == pytest.approx(insertion - deletion, abs=1e-5)
    scores = softmax(model.eval()(IMAGES), LABELS)
    torch.testing.assert_close(found.scores, scores.detach())
    right = (model(IMAGES).argmax(dim=1) == LABELS).tolist()
    assert found.verdicts == ["right" if each else "wrong" for each in right]


def test_images_alone_are_explained_by_the_predicted_class(model: SmallNet) -> None:
    found = explain(model, IMAGES, method=GradCAM(), metrics=False)
    assert found.targets.tolist() == model.eval()(IMAGES).argmax(dim=1).tolist()
    assert found.verdicts == [None] * 4
    assert math.isnan(found.aucs[0, 0])


def test_every_positive_class_is_explained_by_its_own_score(model: SmallNet) -> None:
    labels = torch.zeros(4, 5)
    labels[0, [1, 2]] = labels[2, 0] = 1
    found = explain(model, (IMAGES, labels), method=GradCAM(), metrics=False)
    assert {(0, 1), (0, 2), (2, 0)} <= set(found.pairs)
    scores = sigmoid(model.eval()(IMAGES[found.rows]), found.targets)
    torch.testing.assert_close(found.scores, scores.detach())


def test_graphs_are_wanted_or_not(model: SmallNet, unchecked: None) -> None:
    with pytest.raises(ValueError, match='graphs=True must be "auto" or False'):
        explain(model, IMAGES, method=GradCAM(), graphs=True)  # type: ignore[arg-type]


def test_a_notebook_shows_images_and_maps(model: SmallNet, tmp_path: Path) -> None:
    found = explain(
        model, (IMAGES, LABELS), class_names=["ant", "bee", "cat", "dog", "emu"], metrics=False
    )
    shown = Image.open(io.BytesIO(found._repr_png_()))
    written = Image.open(found.save(tmp_path / "maps.png"))
    (picture,) = found.pictures()
    assert np.array_equal(np.asarray(shown), picture.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(shown), np.asarray(written))
    # Each image stands in the picture beside its map, in its own pixels or larger ones.
    assert shown.width > 4 * 32
    named = explain(model, (IMAGES, LABELS), metrics=False)._repr_png_()
    assert named != found._repr_png_()  # by class index


class Photos(Dataset[Any]):
    """Names its classes and its normalisation."""

    classes = ("ant", "bee", "cat", "dog", "emu")
    transform = Compose([Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])])

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(IMAGES[index]), int(LABELS[index])


def test_a_dataset_says_how_its_images_are_shown(model: SmallNet) -> None:
    found = explain(model, Photos(), metrics=False)
    assert found.look.names == list(Photos.classes)
    assert found.look.mean == [0.5, 0.4, 0.3]
    assert found.look.std == pytest.approx([0.2, 0.3, 0.4])
    assert len(found.probe.images) == len(IMAGES)


def test_a_monitor_explains_with_its_settings(model: SmallNet) -> None:
    monitor = ExplanationMonitor(GradCAM("features.2"), targets=[2], metrics=False)
    found = monitor.explain(model, IMAGES)
    assert found.targets.tolist() == [2] * 4
    expected = GradCAM("features.2").explain(model, IMAGES, torch.tensor([2] * 4))
    torch.testing.assert_close(found.maps, expected)
    with pytest.raises(ValueError, match=r"panels=.* must be a list of some of"):
        ExplanationMonitor(panels=()).explain(model, IMAGES)


def test_what_is_not_found_is_given(model: SmallNet) -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.last = model.features, model.head

        def embed(self, images: Tensor) -> Tensor:
            return self.trunk(images).mean(dim=(2, 3))  # type: ignore[no-any-return]

    headless = Headless().eval()
    with pytest.raises(ValueError, match="Set logits=fn"):
        explain(headless, (IMAGES, LABELS))
    found = explain(
        headless,
        {"a": LABELS, "b": IMAGES.numpy()},
        logits=lambda module, images: module.last(module.embed(images)),
        read_batch=lambda batch: (torch.from_numpy(batch["b"]), batch["a"]),
        metrics=False,
    )
    expected = explain(model, (IMAGES, LABELS), metrics=False)
    torch.testing.assert_close(found.maps, expected.maps)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_in_a_loop_of_fabric(precision: Any, model: SmallNet) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(IMAGES, LABELS), 4))

    def step() -> list[Tensor]:
        for images, labels in loader:
            wrapped_optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(wrapped(images), labels))
            wrapped_optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    without = step()
    model.load_state_dict(state)
    before = snapshot(model)
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    found = explain(wrapped, (IMAGES, LABELS))
    assert torch.equal(random_state, torch.get_rng_state())
    before["rng"] = snapshot(model)["rng"]
    assert_same(before, snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(without, step(), strict=True))
    assert not found.blank.any()
    # What the loop itself computes, in its precision.
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        scores = softmax(wrapped(IMAGES).float(), LABELS)
    torch.testing.assert_close(found.scores, scores)
    maps = GradCAM().explain(wrapped, IMAGES, LABELS)
    assert maps.shape == (4, 32, 32)


def test_a_configuration_names_functions() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ExplanationMonitor, "monitor")
    text = "monitor: {logits: test_explain.by_name, read_batch: test_explain.of_batch}"
    monitor = parser.instantiate(parser.parse_string(text)).monitor
    assert (monitor.logits, monitor.read_batch) == (by_name, of_batch)


def by_name(module: nn.Module, images: Tensor) -> Tensor:
    return module(images)  # type: ignore[no-any-return]


def of_batch(batch: dict[str, Any]) -> tuple[Any, Any]:
    return batch["images"], batch["labels"]


def test_a_contrast_of_classes_is_refused_where_an_image_has_several() -> None:
    torch.manual_seed(0)
    net, images = SmallNet(), torch.rand(2, 3, 24, 24)
    hot = torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 0, 1]])
    probable = nn.Sequential(net, nn.Sigmoid())
    for method in (None, GradCAM("features", score=contrast()), fast_sigcam(score=contrast())):
        score = contrast() if method is None else None
        with pytest.raises(
            ValueError, match=r"here an image may have several classes: take scores.si"
        ):
            explain(net, (images, hot), method=method, score=score, metrics=False)
    with pytest.raises(ValueError, match="here an image may have several classes"):
        explain(probable, images, method=GradCAM("0.features"), score=contrast(), metrics=False)
    # Of two classes that exclude each other one is compared with the other.
    binary = nn.Sequential(net, nn.Linear(5, 1))
    labels = torch.tensor([0, 1])
    for model, classes in ((net, labels), (binary, labels)):
        found = explain(model, (images, classes), score=contrast(), metrics=False)
        assert found.targets.tolist() == [0, 1]
