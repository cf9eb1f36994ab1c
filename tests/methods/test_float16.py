"""float16 holds nothing below 6e-8, where gradients of a faint class lie: maps are those of float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_aop import EMP, IGOS, XRAI, GradCAM, GradCAMPlusPlus, WGradCAM, fast_sigcam
from lightning_aop.methods.captum import CaptumAttribution
from lightning_aop.methods.igos import ArmijoSearch
from lightning_aop.metrics.similarity import rank_correlation
from lightning_aop.model.adapter import explaining
from lightning_aop.model.batches import find_inputs
from lightning_aop.scores import softmax

LAYER = "features.2"


class Faint(nn.Module):
    """Its last class has a probability of about `probability`, whatever the image."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()),
        )
        self.head = nn.Linear(8, 5)
        nn.init.constant_(self.head.bias, 0.0)
        with torch.no_grad():
            self.head.weight *= 10  # so that what is hidden counts for more than rounding does
            self.head.bias[4] = torch.log(torch.tensor(4 * probability))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(3, 3, 6, 6, generator=generator)
    images = nn.functional.interpolate(coarse, (24, 24), mode="bilinear")
    return 4 * images - 2, torch.full((3,), 4)


def refined(method: Any) -> Any:
    class Refined:
        def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            start = torch.full((len(images), 12, 12), 0.5)
            found: Tensor = method.refine(model, images, targets, start)
            return found

    return Refined()


LONG = ArmijoSearch(first=1e6)  # as far as a faint class asks for
METHODS = {
    "fast_sigcam": fast_sigcam(LAYER),
    "I-GOS": refined(IGOS(iterations=2, samples=4, mask_size=12, l1=0.0, tv=0.0, search=LONG)),
    "EMP": refined(EMP(iterations=3, mask_size=12, lr=0.02, l1=0.0, tv=0.0)),
    "XRAI": XRAI(steps=4, segments=(40,), min_area=1),
    "GradCAM": GradCAM(LAYER, score=softmax),
    "WGradCAM": WGradCAM(LAYER, score=softmax),
    "GradCAM++": GradCAMPlusPlus(LAYER, score=softmax),
    "gradient": CaptumAttribution("Saliency", {"abs": False}, score=softmax),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("probability", [5e-3, 1e-6])
@pytest.mark.filterwarnings("ignore:the feature map")
def test_a_faint_class_has_the_map_that_it_has_in_float32(
    name: str, probability: float, batch: Any
) -> None:
    if name == "XRAI":
        pytest.importorskip("skimage")
    if name == "gradient":
        pytest.importorskip("captum")
    model, method = Faint(probability).eval(), METHODS[name]
    expected = method.explain(model, *batch)
    with torch.autocast("cpu", torch.float16):
        found = method.explain(model, *batch)
    assert found.dtype == torch.float32
    constant = (expected.flatten(1).amax(dim=1) == expected.flatten(1).amin(dim=1)).any()
    assert not constant
    assert (rank_correlation(found, expected) > 0.95).all()
    torch.testing.assert_close(
        found.amax(dim=(1, 2)), expected.amax(dim=(1, 2)), rtol=0.1, atol=1e-8
    )


@pytest.mark.parametrize("probability", [0.9, 5e-3, 1e-7, 1e-12])
@pytest.mark.parametrize("cast", [True, False])
def test_gradients_are_those_of_float32(probability: float, cast: bool, batch: Any) -> None:
    images, targets = batch
    model = Faint(probability).eval()
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(softmax(model(leaf), targets).sum(), leaf)
    model = model if cast else model.half()
    with (
        torch.autocast("cpu", torch.float16, enabled=cast),
        explaining(model, images, targets) as (classifier, x, t),
    ):
        leaf = x.requires_grad_()
        (found,) = torch.autograd.grad(classifier.scores(leaf, t, softmax).sum(), leaf)
    error = (found - expected).flatten(1).norm(dim=1)
    assert (error < 0.02 * expected.flatten(1).norm(dim=1)).all()


def test_a_batch_finds_the_rows_of_its_images_whatever_the_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(1, 3, 16, 16, generator=generator)
    images = one + 0.02 * torch.rand(6, 3, 16, 16, generator=generator)
    order = torch.tensor([3, 0, 5, 1])
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(find_inputs(images).rows(images[order]), order)


def test_a_model_may_write_into_its_images(batch: Any) -> None:
    class InPlace(Faint):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mul_(1.0))

    images, targets = batch
    found = []
    for kind in (Faint, InPlace):
        model = kind(1e-6).eval()
        with (
            torch.autocast("cpu", torch.float16),
            explaining(model, images, targets) as (classifier, x, t),
        ):
            leaf = x.requires_grad_()
            scores = classifier.scores(leaf.clone(), t, softmax)
            found += torch.autograd.grad(scores.sum(), leaf)
    torch.testing.assert_close(found[0], found[1])
