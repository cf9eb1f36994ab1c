from typing import Any

import pytest
import torch
import torchvision
from captum.attr import LayerGradCam
from torch import nn

from lightning_aop import GradCAM, GradCAMPlusPlus, WGradCAM
from lightning_aop.ops import min_max
from lightning_aop.probing import capture, count_evaluations, explaining
from lightning_aop.scores import logit

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


@pytest.mark.parametrize("architecture", ["resnet50", "vgg11_bn"])
def test_gradcam_agrees_with_grad_cam(architecture: str) -> None:
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM as Peer
    from pytorch_grad_cam import GradCAMPlusPlus as PeerPlusPlus
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = random_network(architecture)
    name = ARCHITECTURES[architecture]
    images, targets = torch.randn(2, 3, 96, 96), torch.tensor([3, 700])
    chosen = [ClassifierOutputTarget(int(t)) for t in targets]
    # It adds 1e-6 to the denominator of GradCAM++, which must be small beside the gradients' square.
    (network.fc if architecture == "resnet50" else network.classifier[-1]).weight.data *= 1e4
    for peer, mine in ((Peer, GradCAM(name)), (PeerPlusPlus, GradCAMPlusPlus(name))):
        with peer(network, [dict(network.named_modules())[name]]) as theirs:
            expected = theirs(input_tensor=images, targets=chosen)
        found = mine.explain(network, images, targets)
        torch.testing.assert_close(
            min_max(found), min_max(torch.from_numpy(expected)), atol=2e-3, rtol=0
        )


def test_identities_of_global_pooling_and_a_linear_head(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    with (
        explaining(net, images, targets) as (classifier, x, t),
        capture(classifier.model, "features") as captured,
    ):
        logits = classifier.scores(x, t, logit)
        a, g = captured.activation_and_gradient(logits)
    head: Any = net.head
    weight, bias, size = head.weight[targets].detach(), head.bias[targets], a[0, 0].numel()
    torch.testing.assert_close(g, (weight / size)[:, :, None, None].expand_as(g))
    w = GradCAM().weights(a, g)
    total = (w[:, :, None, None] * a).sum(dim=(1, 2, 3))
    torch.testing.assert_close(total, (logits - bias).detach())
    torch.testing.assert_close(WGradCAM().weights(a, g), weight / size * a.mean(dim=(2, 3)))
    torch.testing.assert_close(
        GradCAMPlusPlus().weights(a, g), weight.relu() / (2 + weight * a.mean(dim=(2, 3)))
    )
    # For any network, and its value for a head without bias.
    z = size * WGradCAM().weights(a, g).sum(dim=1)
    torch.testing.assert_close(z, (g * a).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(z, (logits - bias).detach())


def test_gradcam_plus_plus_is_the_published_formula(net: nn.Module) -> None:
    a, g = torch.rand(2, 6, 5, 4).double(), torch.randn(2, 6, 5, 4).double()
    g[0, 0, 0, 0] = 0.0
    expected = torch.zeros(2, 6).double()
    for b in range(2):
        for k in range(6):
            for value in g[b, k].flatten():
                denominator = 2 * value**2 + a[b, k].sum() * value**3
                if denominator != 0:
                    expected[b, k] += value.relu() * value**2 / denominator
    torch.testing.assert_close(GradCAMPlusPlus().weights(a, g), expected)


def test_a_map_without_evidence_is_zero(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    nn.init.constant_(net.head.weight, -1.0)
    for method in (GradCAM(), GradCAMPlusPlus()):
        assert not method.explain(net, images, targets).any()


@pytest.mark.parametrize("method", [GradCAM, WGradCAM, GradCAMPlusPlus])
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
    assert (count.forward, count.backward) == (4, 4)
