import copy
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
import torchvision
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from conftest import SmallNet, assert_same, snapshot
from skimage import data
from skimage.segmentation import slic
from torch import Tensor, nn

from lightning_aop.errors import NonFiniteScoreError
from lightning_aop.methods.captum import (
    CaptumAttribution,
    deeplift,
    gradient,
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
    lime,
    smoothgrad,
    vargrad,
)
from lightning_aop.model.adapter import explaining
from lightning_aop.model.layers import TargetLayerError, separate_activations
from lightning_aop.model.passes import count_evaluations
from lightning_aop.scores import softmax

FUNCTIONS: dict[str, Callable[..., CaptumAttribution]] = {
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": lambda **k: integrated_gradients(10, **k),
    "smoothgrad": lambda **k: smoothgrad(6, **k),
    "vargrad": lambda **k: vargrad(6, **k),
    "guided_backprop": guided_backprop,
    "deeplift": deeplift,
    "lime": lambda **k: lime(40, 12, **k),
}
# Forwards and backwards for 4 images.
COSTS = {
    "gradient": (4, 4),
    "input_x_gradient": (4, 4),
    "integrated_gradients": (40, 40),
    "smoothgrad": (24, 24),
    "vargrad": (24, 24),
    "guided_backprop": (4 + 1, 4),
    "deeplift": (8 + 1, 8),
    "lime": (160, 0),
}


class Steep(SmallNet):
    """Scores that move with the picture, without in-place layers, so that captum can do it alone."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        nn.init.normal_(self.head.weight, std=4.0)


@pytest.fixture
def steep() -> nn.Module:
    torch.manual_seed(2)
    return Steep().eval()


@pytest.fixture
def photos() -> tuple[Tensor, Tensor]:
    """Four crops of a photo, 48 × 40."""
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    small = nn.functional.interpolate(cat, (96, 120), mode="area")
    crops = [small[:, :, 10 * i : 10 * i + 48, 20 * i : 20 * i + 40] for i in range(4)]
    return torch.cat(crops) * 2 - 1, torch.tensor([0, 3, 1, 4])


def shown(attribution: Tensor, sign: str = "absolute") -> Tensor:
    values = attribution.detach().abs() if sign == "absolute" else attribution.detach()
    maps = values.max(dim=1).values.clamp(min=0)
    low, high = maps.flatten(1).min(dim=1).values, maps.flatten(1).max(dim=1).values
    span = (high - low).where(high > low, torch.ones(()))
    return (maps - low[:, None, None]) / span[:, None, None]


def direct(name: str, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """What captum gives when called by hand, one image at a time where it draws."""
    attr = captum.attr
    if name == "gradient":
        return shown(attr.Saliency(network).attribute(x, target=t, abs=False))
    if name == "input_x_gradient":
        return shown(attr.InputXGradient(network).attribute(x, target=t))
    if name == "integrated_gradients":
        return shown(attr.IntegratedGradients(network).attribute(x, target=t, n_steps=10))
    if name in ("smoothgrad", "vargrad"):
        tunnel, maps = attr.NoiseTunnel(attr.Saliency(network)), []
        for i in range(len(x)):
            torch.manual_seed(0)
            one = x[i : i + 1]
            stdevs = 0.15 * float(one.max() - one.min())
            more = {"nt_type": name, "nt_samples": 6, "stdevs": stdevs, "abs": False}
            maps.append(tunnel.attribute(one, target=t[i : i + 1], **more))
        return shown(torch.cat(maps))
    if name == "guided_backprop":
        return shown(attr.GuidedBackprop(network).attribute(x, target=t))
    if name == "deeplift":
        return shown(attr.DeepLift(network).attribute(x, target=t))
    similarity = get_exp_kernel_similarity_function("cosine", kernel_width=0.25)
    maps = []
    for i in range(len(x)):
        torch.manual_seed(0)
        labels = slic(x[i].permute(1, 2, 0).double().numpy(), n_segments=12, start_label=0)
        maps.append(
            attr.Lime(
                lambda images: network(images).softmax(dim=1),
                interpretable_model=SkLearnRidge(alpha=1.0),
                similarity_func=similarity,
            ).attribute(
                x[i : i + 1],
                target=t[i : i + 1],
                n_samples=40,
                feature_mask=torch.from_numpy(labels)[None, None],
            )
        )
    return shown(torch.cat(maps), "positive")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:Setting", "ignore:Input Tensor")
def test_presets_are_captum_called_by_hand(name: str, steep: nn.Module, photos: Any) -> None:
    images, targets = photos
    expected = direct(name, copy.deepcopy(steep), images.clone(), targets)
    found = FUNCTIONS[name](eval_batch_size=5).explain(steep, images, targets)
    assert (expected.flatten(1).std(dim=1) > 0.01).sum() >= 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("architecture", ["alexnet", "vgg11", "googlenet"])
@pytest.mark.filterwarnings("ignore:Setting", "ignore:Input Tensor")
def test_architectures_agree_with_captum_called_by_hand(architecture: str) -> None:
    torch.manual_seed(0)
    extra: dict[str, Any] = {"init_weights": False} if architecture == "googlenet" else {}
    network = torchvision.models.get_model(architecture, weights=None, **extra).eval()
    alone = copy.deepcopy(network)
    for module in alone.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    images, targets = torch.randn(2, 3, 80, 80), torch.tensor([3, 700])
    for name in ("gradient", "integrated_gradients", "guided_backprop", "deeplift"):
        if (architecture, name) == ("googlenet", "guided_backprop"):
            continue  # its ReLUs are functions
        expected = direct(name, alone, images.clone(), targets)
        found = FUNCTIONS[name]().explain(network, images, targets)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_chunk_cost_and_no_trace(name: str, photos: Any) -> None:
    images, targets = photos
    torch.manual_seed(2)
    network = SmallNet().train()  # with in-place layers
    network.features[0].weight.requires_grad_(False)
    method = FUNCTIONS[name]()
    before, given = snapshot(network), images.clone()
    with torch.inference_mode(), count_evaluations(network) as count:
        together = method.explain(network, images, targets)
    assert (count.forward, count.backward) == COSTS[name]
    assert_same(before, snapshot(network))
    assert torch.equal(images, given)
    assert together.shape == (4, 48, 40)
    assert together.amin() >= 0
    assert together.amax() <= 1
    assert together.flatten(1).any(dim=1).sum() >= 3
    assert torch.equal(method.explain(network, images, targets), together)
    # A regression makes much of how float32 rounds, which hangs on the size of a pass and on the CPU.
    precise, images = network.double(), images.double()
    together = method.explain(precise, images, targets)
    for size in (1, 3, 7):
        chunked = FUNCTIONS[name](eval_batch_size=size).explain(precise, images, targets)
        torch.testing.assert_close(chunked, together, atol=1e-5, rtol=0)
    single = [method.explain(network, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(single), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["guided_backprop", "deeplift", "smoothgrad"])
def test_nothing_is_left_behind_by_an_error(name: str, photos: Any) -> None:
    network = SmallNet().train()
    calls = []

    def fail(module: nn.Module, args: object) -> None:
        calls.append(1)
        if len(calls) == (1 if name == "smoothgrad" else 2):
            raise KeyboardInterrupt

    network.features[3].register_forward_pre_hook(fail)
    before = snapshot(network)
    with pytest.raises(KeyboardInterrupt):
        FUNCTIONS[name]().explain(network, *photos)
    assert_same(before, snapshot(network))


class Residual(nn.Module):
    """One in-place ReLU for all places of a block, or one for each."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        relu = nn.ReLU(inplace=shared)
        self.relus = nn.ModuleList(relu if shared else nn.ReLU() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.relus[0](self.first(images))
        y = self.relus[1](self.second(x) - 0.1)
        pooled = self.relus[2](x + y - 0.1).mean(dim=(2, 3))
        return self.head(pooled)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["guided_backprop", "deeplift"])
@pytest.mark.filterwarnings("ignore:Setting", "ignore:Input Tensor")
def test_a_relu_that_is_called_several_times_is_told_apart(name: str, photos: Any) -> None:
    images, targets = photos
    network = Residual(shared=True)
    before = snapshot(network)
    found = FUNCTIONS[name]().explain(network, images, targets)
    assert_same(before, snapshot(network))
    assert network.relus[0] is network.relus[2]
    expected = direct(name, Residual(shared=False).eval(), images.clone(), targets)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_deeplift_adds_up_on_a_resnet() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    x, t = torch.randn(2, 3, 64, 64), torch.tensor([1, 700])
    with explaining(network, x, t) as (classifier, inner, classes):
        separate_activations(classifier.model, inner)
        attribute, _ = deeplift()._prepared(classifier)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            total = attribute(inner, classes).sum(dim=(1, 2, 3))
    with torch.no_grad():
        rise = network(x) - network(torch.zeros_like(x))
    torch.testing.assert_close(total, rise[torch.arange(2), t], rtol=1e-3, atol=1e-5)


OTHERS = [
    CaptumAttribution("Occlusion", {"sliding_window_shapes": [3, 8, 8], "strides": [3, 4, 4]}),
    CaptumAttribution("LayerGradCam", layer="features.3", sign="positive"),
    CaptumAttribution("GuidedGradCam", layer="features.3"),
    CaptumAttribution("FeatureAblation", superpixels=12),
    CaptumAttribution("KernelShap", {"n_samples": 60}, superpixels=12, score=softmax),
    CaptumAttribution("ShapleyValueSampling", {"n_samples": 3}, superpixels=12),
    CaptumAttribution("GradientShap", {"baselines": torch.zeros(2, 3, 48, 40)}),
    CaptumAttribution("DeepLiftShap", {"baselines": torch.zeros(2, 3, 48, 40)}),
    CaptumAttribution("IntegratedGradients", {"n_steps": 4}, {"multiply_by_inputs": False}),
    CaptumAttribution("Deconvolution", noise_tunnel={"nt_samples": 3, "stdevs": 0.1}),
]


@pytest.mark.parametrize("method", OTHERS, ids=lambda m: m.method)
def test_any_method_of_captum(method: CaptumAttribution, photos: Any) -> None:
    images, targets = photos
    network = Steep()
    before = snapshot(network)
    maps = method.explain(network, images, targets)
    assert_same(before, snapshot(network))
    assert maps.shape == (4, 48, 40)
    assert maps.flatten(1).any(dim=1).sum() >= 3
    single = [method.explain(network, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(single), maps, atol=1e-5, rtol=0)


def test_occlusion_is_a_plain_loop(steep: nn.Module, photos: Any) -> None:
    images, targets = photos[0][:1], photos[1][:1]
    method = CaptumAttribution(
        "Occlusion", {"sliding_window_shapes": [3, 8, 8], "strides": [3, 8, 8]}, sign="positive"
    )
    falls = torch.zeros(1, 48, 40)
    with torch.no_grad():
        for i in range(0, 48, 8):
            for j in range(0, 40, 8):
                without = images.clone()
                without[:, :, i : i + 8, j : j + 8] = 0
                fall = (steep(images) - steep(without))[0, targets[0]]
                falls[0, i : i + 8, j : j + 8] = fall
    expected = shown(falls[:, None], "positive")
    torch.testing.assert_close(method.explain(steep, images, targets), expected, atol=1e-4, rtol=0)


def test_half_precision(photos: Any) -> None:
    network = SmallNet().to(torch.bfloat16)
    for name in ("gradient", "deeplift", "smoothgrad"):
        maps = FUNCTIONS[name]().explain(network, *photos)
        assert maps.dtype == torch.float32
        assert maps.isfinite().all()


def test_a_network_without_relu_modules_is_named(photos: Any) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.warns(UserWarning, match=r"Sequential has no nn\.ReLU module.*plain gradient"):
        maps = guided_backprop().explain(network, photos[0], photos[1] % 4)
    torch.testing.assert_close(maps, gradient().explain(network, photos[0], photos[1] % 4))


def test_what_cannot_be_done_is_said(photos: Any, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"captum has no method 'GradCAM'; it has .*LayerGradCam"):
        CaptumAttribution("GradCAM")
    with pytest.raises(ValueError, match=r"Saliency.attribute\(\) takes no argument 'steps'"):
        CaptumAttribution("Saliency", {"steps": 3})
    with pytest.raises(ValueError, match=r"Saliency has no features to switch off.*got 50"):
        CaptumAttribution("Saliency", superpixels=50)
    with pytest.raises(ValueError, match="sign must be 'absolute' or 'positive', got 'negative'"):
        CaptumAttribution("Saliency", sign="negative")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smoothgrad: samples must be above 0, got 0"):
        smoothgrad(0)
    with pytest.raises(TargetLayerError, match="SmallNet has no layer 'layer4'"):
        CaptumAttribution("LayerGradCam", layer="layer4").explain(SmallNet(), *photos)
    with pytest.raises(
        NonFiniteScoreError, match=r"the image is NaN or infinite for image\(s\) \[1\]"
    ):
        gradient().explain(
            SmallNet(), photos[0].index_fill(0, torch.tensor([1]), torch.nan), photos[1]
        )
    broken = SmallNet()
    nn.init.constant_(broken.head.weight, torch.nan)
    with pytest.raises(NonFiniteScoreError, match="the attribution of Saliency is NaN"):
        gradient().explain(broken, *photos)


def test_deeplift_under_autocast_is_that_without(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    wanted = deeplift().explain(net, *batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = deeplift().explain(net, *batch)
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(found, wanted)
