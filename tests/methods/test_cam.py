from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam
from torch import Tensor, nn

from lightning_aop import CAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, WGradCAM, XGradCAM
from lightning_aop.model.adapter import explaining
from lightning_aop.model.layers import TargetLayerError, capture
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import min_max
from lightning_aop.scores import logit

ALL = [CAM, GradCAM, WGradCAM, GradCAMPlusPlus, XGradCAM, HiResCAM, LayerCAM]
ARCHITECTURES = {
    "resnet50": "layer4.2",
    "densenet201": "features.norm5",
    "inception_v3": "Mixed_7c",
    "vgg11_bn": "features.28",
}


def random_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    extra: dict[str, Any] = {"init_weights": False} if name == "inception_v3" else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **extra)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Default statistics let a random deep network's activations vanish.
            nn.init.uniform_(module.weight, 0.8, 1.4)
            nn.init.uniform_(module.bias, -0.2, 0.4)
    return network.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradcam_agrees_with_captum(architecture: str) -> None:
    network = random_network(architecture)
    layer = dict(network.named_modules())[ARCHITECTURES[architecture]]
    images, targets = torch.randn(2, 3, 96, 96), torch.tensor([3, 700])
    reference = network
    if architecture == "densenet201":
        # The forward overwrites the layer's output by an in-place ReLU, and the map is that of what
        # the head really gets. The same network, with that ReLU as a layer captum can be given:
        layer = nn.ReLU()
        reference = nn.Sequential(
            network.features, layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.classifier
        )
    attribution = LayerGradCam(reference, layer).attribute(images, targets, relu_attributions=True)
    expected = min_max(attribution[:, 0].detach())
    mine = GradCAM(ARCHITECTURES[architecture]).activation_map(network, images, targets)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)


PEERS = {
    "GradCAM": GradCAM,
    "GradCAMPlusPlus": GradCAMPlusPlus,
    "HiResCAM": HiResCAM,
    "XGradCAM": XGradCAM,
    "LayerCAM": LayerCAM,
}


def agrees_with_grad_cam(
    network: nn.Module, layer: str, images: Tensor, targets: Tensor, reshape: Any = None
) -> dict[str, float]:
    """Return the worst difference of each method's maps."""
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
    targets_of = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

    chosen = [targets_of.ClassifierOutputTarget(int(t)) for t in targets]
    module, worst = dict(network.named_modules())[layer], {}
    for name, mine in PEERS.items():
        with getattr(pytorch_grad_cam, name)(network, [module], reshape_transform=reshape) as peer:
            expected = min_max(torch.from_numpy(peer(input_tensor=images, targets=chosen)))
        found = min_max(mine(layer).explain(network, images, targets))
        assert found.any()
        worst[name] = (found - expected).abs().max().item()
    return worst


# grad-cam adds 1e-6 to the denominator of GradCAM++, 1e-7 to that of XGradCAM and of the min-max, and
# enlarges by OpenCV. The heads are enlarged, for gradients whose squares are large beside that.
TOLERANCE = 1e-4


@pytest.mark.sample(1)
@pytest.mark.parametrize("architecture", ["resnet50", "vgg11_bn", "inception_v3"])
def test_activation_maps_agree_with_grad_cam(architecture: str) -> None:
    network = random_network(architecture)
    images = torch.randn(2, 3, 160, 128)
    head: Any = network.classifier[-1] if architecture == "vgg11_bn" else network.fc
    head.weight.data *= 1e4
    targets = network(images).argmax(dim=1)
    worst = agrees_with_grad_cam(network, ARCHITECTURES[architecture], images, targets)
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.wide
def test_maps_of_a_vision_transformer_agree_with_grad_cam() -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10).eval()
    nn.init.normal_(network.head.weight, std=1e3)

    def patches(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].reshape(len(tokens), 14, 14, -1).permute(0, 3, 1, 2)

    images, targets = torch.randn(2, 3, 224, 224), torch.tensor([3, 7])
    worst = agrees_with_grad_cam(network, "blocks.11.norm1", images, targets, patches)
    # Of activations with both signs GradCAM++ and XGradCAM divide by sums near zero.
    assert max(worst[name] for name in ("GradCAM", "HiResCAM", "LayerCAM")) <= TOLERANCE
    given = GradCAM("blocks.11.norm1", reshape=patches).explain(network, images, targets)
    assert torch.equal(given, GradCAM().explain(network, images, targets))


class ChannelsLast(nn.Module):
    """Its last feature maps are [B, h, w, C], as Swin's are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 256, 4, stride=4)
        self.turned = nn.Identity()
        self.head = nn.Linear(256, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.turned(self.first(images).permute(0, 2, 3, 1)).mean((1, 2)))
        return logits


def test_channels_last_are_known_by_the_proportions_of_the_picture() -> None:
    network, targets = ChannelsLast().eval(), torch.tensor([1, 4])
    for height, width in ((96, 24), (24, 96)):
        images = torch.rand(2, 3, height, width)
        turned = GradCAM("turned").activation_map(network, images, targets)
        assert turned.shape == (2, height // 4, width // 4)
        torch.testing.assert_close(
            turned, GradCAM("first").activation_map(network, images, targets)
        )


def test_trained_networks_agree_with_grad_cam(real_data: Path) -> None:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    for name, layer in (("squeezenet1_1", "features.12"), ("mobilenet_v2", "features.18")):
        network: Any = torchvision.models.get_model(name, weights=None).eval()
        network.load_state_dict(torch.load(real_data / "weights" / f"{name}.pth"))
        network.classifier[1].weight.data *= 1e4
        targets = network(images).argmax(dim=1)
        worst = agrees_with_grad_cam(network, layer, images, targets)
        assert max(worst.values()) <= TOLERANCE, worst


def test_identities_of_global_pooling_and_a_linear_head(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    with (
        explaining(net, images, targets) as (classifier, x, t),
        capture(classifier.model, "features", (40, 32)) as captured,
    ):
        logits = classifier.scores(x, t, logit)
        a, g = captured.activation_and_gradient(logits)
    head: Any = net.head
    weight, bias, size = head.weight[targets].detach(), head.bias[targets], a[0, 0].numel()
    torch.testing.assert_close(g, (weight / size)[:, :, None, None].expand_as(g))
    w = GradCAM().weights(a, g)
    total = (w * a).sum(dim=(1, 2, 3))
    torch.testing.assert_close(total, (logits - bias).detach())
    w_of_wgradcam = WGradCAM().weights(a, g)[:, :, 0, 0]
    torch.testing.assert_close(w_of_wgradcam, weight / size * a.mean(dim=(2, 3)))
    w = GradCAMPlusPlus().weights(a, g)[:, :, 0, 0]
    torch.testing.assert_close(w, weight.relu() / (2 + weight * a.mean(dim=(2, 3))))
    # With gradients that are the same everywhere, these three are GradCAM.
    for same in (XGradCAM(), HiResCAM()):
        torch.testing.assert_close(
            (same.weights(a, g) * a).sum(dim=1), size * 0 + (GradCAM().weights(a, g) * a).sum(dim=1)
        )
    torch.testing.assert_close(
        CAM("features").activation_map(net, images, targets),
        GradCAM("features").activation_map(net, images, targets),
    )
    # For any network, and its value for a head without bias.
    z = size * w_of_wgradcam.sum(dim=1)
    torch.testing.assert_close(z, (g * a).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(z, (logits - bias).detach())


def test_gradcam_plus_plus_is_the_published_formula(net: nn.Module) -> None:
    a, g = torch.rand(2, 6, 5, 4).double(), torch.randn(2, 6, 5, 4).double()
    g[0, 0, 0, 0] = 0.0
    # A negative sum, -2, with which the denominator is 0 for a gradient of 1 and not for one of ½.
    a[1, 0], g[1, 0, 0, 0], g[1, 0, 0, 1] = -0.1, 1.0, 0.5
    expected = torch.zeros(2, 6).double()
    for b in range(2):
        for k in range(6):
            for value in g[b, k].flatten():
                denominator = 2 * value**2 + a[b, k].sum() * value**3
                if denominator != 0:
                    expected[b, k] += value.relu() * value**2 / denominator
    torch.testing.assert_close(GradCAMPlusPlus().weights(a, g)[:, :, 0, 0], expected)


def test_a_map_without_evidence_is_zero(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    nn.init.constant_(net.head.weight, -1.0)
    for method in (GradCAM(), GradCAMPlusPlus()):
        assert not method.explain(net, images, targets).any()


def test_layer_and_hires_weights_are_the_published_formulas() -> None:
    a, g = torch.rand(2, 6, 5, 4).double(), torch.randn(2, 6, 5, 4).double()
    a[0, 2] = 0.0
    assert torch.equal(HiResCAM().weights(a, g), g)
    assert torch.equal(LayerCAM().weights(a, g), torch.where(g > 0, g, 0.0))
    expected = torch.stack(
        [
            torch.stack([(g[b, k] * a[b, k] / a[b, k].sum()).sum() for k in range(6)])
            for b in range(2)
        ]
    )
    expected[0, 2] = 0.0
    torch.testing.assert_close(XGradCAM().weights(a, g)[:, :, 0, 0], expected)


def test_cam_is_gradcam_of_a_resnet_for_half_the_cost() -> None:
    network, images, targets = random_network("resnet50"), torch.randn(2, 3, 96, 96), [3, 700]
    with count_evaluations(network) as count:
        found = CAM("layer4.2").activation_map(network, images, torch.tensor(targets))
    assert (count.forward, count.backward) == (2, 0)
    expected = GradCAM("layer4.2").activation_map(network, images, torch.tensor(targets))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_cam_refuses_a_network_that_it_does_not_fit(net: nn.Module, batch: Any) -> None:
    with pytest.raises(TargetLayerError, match=r"CAM needs global average pooling .*'features\.2'"):
        CAM("features.2").explain(net, *batch)
    network = random_network("vgg11_bn")
    with pytest.raises(TargetLayerError, match="VGG does something else there: use GradCAM"):
        CAM().explain(network, torch.randn(1, 3, 64, 64), torch.tensor([1]))


@pytest.mark.parametrize("method", ALL)
def test_batches_chunks_and_cost(method: Any, net: nn.Module, batch: Any) -> None:
    images, targets = batch
    together = method("features").explain(net, images, targets)
    assert together.shape == images[:, 0].shape
    assert together.min() >= 0
    assert together.max() <= 1
    single = torch.cat(
        [method("features").explain(net, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    )
    torch.testing.assert_close(single, together)
    with count_evaluations(net) as count:
        chunked = method("features", eval_batch_size=3).explain(net, images, targets)
    torch.testing.assert_close(chunked, together)
    assert (count.forward, count.backward) == (4, 0 if method is CAM else 4)
