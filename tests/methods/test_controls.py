from typing import Any

import numpy as np
import pytest
import torch
from skimage.filters import sobel_h, sobel_v
from torch import nn

from lightning_aop import CentreGaussian, EdgeDetector, GradCAM, RandomMap, fast_sigcam
from lightning_aop.methods import RISE
from lightning_aop.model.passes import count_evaluations
from lightning_aop.types import SaliencyMethod


@pytest.mark.parametrize("method", [RandomMap(), CentreGaussian(), EdgeDetector()])
def test_controls_are_maps_that_cost_nothing(
    method: SaliencyMethod, net: nn.Module, batch: Any
) -> None:
    images, targets = batch
    with count_evaluations(net) as count, torch.inference_mode():
        together = method.explain(net, images, targets)
    assert count.total == 0
    assert together.shape == (4, 40, 32)
    assert together.amin() >= 0
    assert together.amax() <= 1
    assert together.amax(dim=(1, 2)).min() > 0.99
    single = [method.explain(net, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(single), together)


@pytest.mark.parametrize(
    "method", [RandomMap(), CentreGaussian(), GradCAM(), fast_sigcam(), RISE()]
)
def test_what_is_no_tensor_is_refused(
    method: SaliencyMethod, net: nn.Module, batch: Any, unchecked: None
) -> None:
    images, targets = batch
    for wrong in (targets.tolist(), targets.numpy(), 1, None):
        with pytest.raises(
            TypeError, match=r"targets must be a torch\.Tensor, got \w+: (conv|give)"
        ):
            method.explain(net, images, wrong)
    with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got ndarray: convert it"):
        method.explain(net, images.numpy(), targets)


def test_random_maps_are_uniform_and_seeded(net: nn.Module, batch: Any) -> None:
    state = torch.get_rng_state()
    first = RandomMap(3).explain(net, *batch)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, RandomMap(3).explain(net, *batch)[0])
    assert not torch.equal(first, RandomMap(4).explain(net, *batch)[0])
    assert abs(first.mean().item() - 0.5) < 0.03
    assert abs(first.std().item() - 12**-0.5) < 0.02


def test_the_gaussian_is_in_the_middle_and_as_wide_as_said(net: nn.Module) -> None:
    images = torch.zeros(1, 3, 41, 61)
    found = CentreGaussian(0.2).explain(net, images, torch.tensor([0]))[0]
    assert found.argmax() == 20 * 61 + 30
    torch.testing.assert_close(found, found.flip(0))
    torch.testing.assert_close(found, found.flip(1))
    y, x = np.mgrid[:41, :61]
    expected = np.exp(-(((y - 20) / 41) ** 2 + ((x - 30) / 61) ** 2) / (2 * 0.2**2))
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_edges_are_those_of_scikit_image(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    found = EdgeDetector().explain(net, images, targets)
    for image, edges in zip(images, found, strict=True):
        grey = np.pad(image.mean(dim=0).numpy().astype(float), 1, mode="edge")
        size = np.hypot(sobel_h(grey), sobel_v(grey))[1:-1, 1:-1]
        expected = (size - size.min()) / (size.max() - size.min())
        np.testing.assert_allclose(edges.numpy(), expected, atol=1e-5)
    assert not EdgeDetector().explain(net, torch.ones_like(images), targets).any()


def test_a_width_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="CentreGaussian: sigma must be above 0, got 0"):
        CentreGaussian(0)
