"""What holds for every method that the command line knows by name."""

from typing import Any

import pytest
import torch
from conftest import SmallNet, assert_same, snapshot
from jsonargparse import ArgumentParser
from skimage import data
from torch import Tensor, nn

import lightning_aop
from lightning_aop import AOP, EMP, RISE, XRAI, EdgeDetector, HiResCAM
from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.captum import integrated_gradients, smoothgrad
from lightning_aop.methods.names import FIGURE_5, METHODS, Row, coco_method, make_method
from lightning_aop.model.passes import count_evaluations
from lightning_aop.scores import sigmoid
from lightning_aop.types import SaliencyMethod

# Evaluations of an image: forwards and backwards, and once for the whole batch. I-GOS's line search
# takes 1 to 12 trials in each of its 15 iterations.
IGOS_FORWARDS = range(15 * (20 + 1) + 1, 15 * (20 + 12) + 2)
COSTS: dict[str, tuple[Any, int, int]] = {
    "sigcam": (range(IGOS_FORWARDS[0] + 2, IGOS_FORWARDS[-1] + 3), 1 + 300, 0),
    "fast_sigcam": (1 + 1 + 18, 1 + 18, 0),
    "gradcam+igos": (range(IGOS_FORWARDS[0] + 1, IGOS_FORWARDS[-1] + 2), 1 + 300, 0),
    "gradcam+emp": (1 + 500, 1 + 500, 0),
    "igos": (IGOS_FORWARDS, 300, 0),
    "emp": (500, 500, 0),
    "cam": (1, 0, 0),
    **dict.fromkeys(("gradcam", "wgradcam", "gradcam++", "xgradcam"), (1, 1, 0)),
    **dict.fromkeys(("hirescam", "layercam", "excitation_backprop"), (1, 1, 0)),
    **dict.fromkeys(("gradient", "input_x_gradient"), (1, 1, 0)),
    **dict.fromkeys(("integrated_gradients", "smoothgrad", "vargrad"), (50, 50, 0)),
    "guided_backprop": (1, 1, 1),
    "deeplift": (2, 2, 1),
    "lime": (1000, 0, 0),
    **dict.fromkeys(("xrai", "fast_xrai"), (199, 199, 0)),
    # A photo has about four fifths of the regions that are asked for.
    "regional_multiscale": (range(4 * 700, 4 * 1050), 0, 0),
    "rise": (4000, 0, 0),
    "greedy_ranking": (49 * 50 - 2, 0, 0),
    **dict.fromkeys(("random", "centre", "edges"), (0, 0, 0)),
}
BATCH = 8


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """In float64, where no rounding flips a decision; with scores that move with the picture."""
    torch.manual_seed(2)
    network = SmallNet().double().train()
    nn.init.normal_(network.head.weight, std=12.0)
    return network


@pytest.fixture(scope="module")
def photos() -> tuple[Tensor, Tensor]:
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].double() / 255
    small = nn.functional.interpolate(cat, (80, 120), mode="area")
    crops = [small[:, :, 2 * i : 2 * i + 64, 8 * i : 8 * i + 56] for i in range(BATCH)]
    return torch.cat(crops) * 2 - 1, torch.arange(BATCH) % 5


# What the paper surveys as related work, by its four families.
SURVEYED = {"smoothgrad", "vargrad", "integrated_gradients", "guided_backprop", "deeplift"}
SURVEYED |= {"excitation_backprop", "cam", "gradcam", "gradcam++", "rise", "regional_multiscale"}
SURVEYED |= {"xrai", "lime", "emp", "igos"}


def test_every_method_is_here() -> None:
    assert set(COSTS) <= set(METHODS)
    assert set(FIGURE_5) <= set(METHODS)
    assert set(METHODS) >= SURVEYED


def evaluations(name: str) -> int:
    return int(METHODS[name].evaluations.removeprefix("about ").replace(",", ""))


@pytest.mark.sample(9)
@pytest.mark.parametrize("name", METHODS)
def test_cost_no_trace_and_no_image_depends_on_its_batch(
    name: str, network: nn.Module, photos: tuple[Tensor, Tensor]
) -> None:
    about, told = "about" in METHODS[name].evaluations, evaluations(name)
    # Of the activation maps several are blank; what takes long has something on each.
    many = 3 if told > 100 else BATCH
    images, targets = (of[:many] for of in photos)
    method, before, given = make_method(name, "features"), snapshot(network), images.clone()
    with torch.inference_mode(), count_evaluations(network) as count:
        together = method.explain(network, images, targets)
    assert_same(before, snapshot(network))
    assert torch.equal(images, given)
    assert together.shape == images[:, 0].shape
    assert together.amin() >= 0
    assert together.amax() <= 1
    assert together.flatten(1).any(dim=1).sum() >= 3
    assert (
        count.total / many == pytest.approx(told, rel=0.15)
        if about
        else count.total // many == told
    )
    if (declared := getattr(method, "evaluations", None)) is not None:
        assert declared == pytest.approx(told, rel=0.02 if about else 0)
    if name in COSTS:
        forwards, backwards, once = COSTS[name]
        if isinstance(forwards, range):
            assert forwards[0] <= count.forward / many <= forwards[-1]
        else:
            assert count.forward == many * forwards + once
        assert count.backward == many * backwards
    alone = range(many) if many == BATCH else [1]
    single = [method.explain(network, images[i : i + 1], targets[i : i + 1]) for i in alone]
    torch.testing.assert_close(torch.cat(single), together[list(alone)], atol=1e-6, rtol=0)


NESTED: dict[str, Any] = {
    "lightning_aop.HiResCAM": HiResCAM(),
    "{class_path: lightning_aop.CaptumAttribution, init_args: {method: IntegratedGradients, "
    "arguments: {n_steps: 4}}}": integrated_gradients(4),
    "{class_path: lightning_aop.methods.smoothgrad, init_args: {samples: 3}}": smoothgrad(3),
    "{class_path: lightning_aop.CaptumAttribution, init_args: {method: Saliency, arguments: "
    "{abs: false}, noise_tunnel: {nt_type: smoothgrad, nt_samples: 3, stdevs: 0.15}}}": smoothgrad(
        3
    ),
    "{class_path: lightning_aop.XRAI, init_args: {steps: 4, segments: [10, 20]}}": XRAI(
        steps=4, segments=(10, 20)
    ),
    "{class_path: lightning_aop.RISE, init_args: {score: lightning_aop.scores.sigmoid}}": RISE(
        score=sigmoid
    ),
    "lightning_aop.EdgeDetector": EdgeDetector(),
}
ACTIVATIONS = ["CAM", "GradCAM", "WGradCAM", "GradCAMPlusPlus", "XGradCAM", "HiResCAM", "LayerCAM"]
ACTIVATIONS += ["ExcitationBackprop", "Blank", "RandomMap"]
PERTURBATIONS = ["EMP", "IGOS", "RankedMask"]


def from_yaml(text: str) -> SaliencyMethod:
    parser = ArgumentParser()
    parser.add_argument("--method", type=SaliencyMethod)
    method = parser.instantiate(parser.parse_args(["--method", text])).method
    assert isinstance(method, SaliencyMethod)
    return method


@pytest.mark.parametrize("text", NESTED)
def test_methods_come_from_yaml(text: str) -> None:
    assert from_yaml(text) == NESTED[text]


@pytest.mark.sample(12)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_activation_goes_with_any_perturbation(
    activation: str, perturbation: str, network: nn.Module, photos: tuple[Tensor, Tensor]
) -> None:
    second = f"{{class_path: lightning_aop.{perturbation}, init_args: {{iterations: 2}}}}"
    stages = f"activation: lightning_aop.{activation}, perturbation: {second}"
    text = f"{{class_path: lightning_aop.AOP, init_args: {{{stages}}}}}"
    composed: Any = from_yaml(text)
    first, then = getattr(lightning_aop, activation), getattr(lightning_aop, perturbation)
    assert composed == AOP(first(), then(iterations=2))
    maps = composed.explain(network, photos[0][:2], photos[1][:2])
    assert maps.shape == (2, 64, 56)
    assert maps.isfinite().all()


def test_the_settings_for_coco_hold_wherever_an_activation_map_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = Row("18", lambda layer, score: AOP(HiResCAM(layer), EMP(4, score=score)))
    monkeypatch.setitem(METHODS, "hirescam+emp", new)
    for name in ("sigcam", "gradcam+igos", "gradcam+emp", "hirescam+emp"):
        method: Any = coco_method(name)
        assert (method.threshold, method.scale) == (0.6, 0.25)
        assert method.perturbation.score is sigmoid
    for name in ("fast_sigcam", "igos", "emp", "gradcam"):
        assert coco_method(name) == make_method(name, score=sigmoid)


def test_a_mistyped_name_gets_the_nearest() -> None:
    with pytest.raises(
        InvalidValueError, match=r"gradcan: .* did you mean gradcam .*there are sigcam"
    ):
        make_method("gradcan")
