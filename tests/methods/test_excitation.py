import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn

from lightning_aop import AOP, IGOS, GradCAM
from lightning_aop.errors import NonFiniteScoreError
from lightning_aop.methods.excitation import ExcitationBackprop, _Rules
from lightning_aop.model.adapter import explaining
from lightning_aop.model.layers import TargetLayerError, capture
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import resize
from lightning_aop.types import ActivationMethod


def random_network(name: str) -> nn.Module:
    """A network of torchvision in float64, whose activations are alive in all layers."""
    torch.manual_seed(0)
    if name == "vgg11_bn":
        # The published classifier has 120 million weights.
        from torchvision.models.vgg import cfgs, make_layers

        network: Any = nn.Module()
        network.features = make_layers(cfgs["A"], batch_norm=True)
        network.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        network.classifier = nn.Sequential(
            nn.Linear(512 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 30)
        )
        network.forward = functools.partial(torchvision.models.VGG.forward, network)
    else:
        network = torchvision.models.get_model(name, weights=None, num_classes=30)
    return randomised(network)


def randomised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.4)
            nn.init.uniform_(module.bias, -0.2, 0.4)
            module.momentum = None
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.1, 0.1)
    network.double().train()
    with torch.no_grad():  # sets the statistics
        network(torch.randn(4, 3, 64, 72, dtype=torch.float64))
    return network.eval()


def published(network: nn.Module, image: Tensor, target: int, before: Any, after: Any) -> Tensor:
    """The map of one image by the slow loop, at the end of the modules `before`."""
    with torch.no_grad():
        activations = nn.Sequential(*before)(image[None])[0].clone()
        logits, back = oracles.excitation(nn.Sequential(*after), activations)
        torch.testing.assert_close(logits, network(image[None])[0])
        signal = back(F.one_hot(torch.tensor(target), len(logits)).to(logits))
    saliency = signal.sum(dim=0).clamp(min=0)
    assert saliency.min() < saliency.max()
    return (saliency - saliency.min()) / (saliency.max() - saliency.min())


def signal_at(network: nn.Module, layer: str, images: Tensor, targets: Tensor) -> Tensor:
    """Our signal, summed over the channels, before it is scaled."""
    with (
        explaining(network, images, targets) as (classifier, x, t),
        capture(classifier.model, layer, (images.shape[2], images.shape[3])) as captured,
    ):
        return ExcitationBackprop()._evidence(classifier, captured, x, t)[0]


def stages(network: Any, name: str) -> list[nn.Module]:
    """The modules of a network of torchvision, one after the other."""
    if name == "resnet18":
        stem = [network.conv1, network.bn1, network.relu, network.maxpool]
        layers = [block for i in range(1, 5) for block in getattr(network, f"layer{i}")]
        return [*stem, *layers, network.avgpool, nn.Flatten(), network.fc]
    if name == "mobilenet_v2":
        return [*network.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *network.classifier]
    if name == "squeezenet1_1":
        return [*network.features, *network.classifier, nn.Flatten()]
    return [*network.features, network.avgpool, nn.Flatten(), *network.classifier]


# The layer's name, and the number of modules that lead up to its output.
ARCHITECTURES = {
    "resnet18": [("layer2.0", 7), (None, 12)],
    "vgg11_bn": [("features.17", 18), (None, 29)],
    "squeezenet1_1": [("features.6", 7), (None, 13)],
    "mobilenet_v2": [("features.14", 15), (None, 19)],
}


@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore:the feature map of .* hardly says where")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_networks_are_the_published_algorithm(architecture: str) -> None:
    network = random_network(architecture)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 64, 72, generator=generator, dtype=torch.float64)
    targets, modules = torch.tensor([3, 17]), stages(network, architecture)
    for layer, depth in ARCHITECTURES[architecture]:
        method = ExcitationBackprop(layer)
        maps = method.activation_map(network, images, targets)
        for i in range(2):
            expected = published(
                network, images[i], int(targets[i]), modules[:depth], modules[depth:]
            )
            torch.testing.assert_close(maps[i], expected, atol=1e-9, rtol=0)
        enlarged = method.explain(network, images, targets)
        torch.testing.assert_close(enlarged, resize(maps, (64, 72)))


def test_trained_networks_are_the_published_algorithm(real_data: Path) -> None:
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(3)).double()
    for name, layer, depth in (("squeezenet1_1", "features.7", 8), ("mobilenet_v2", None, 19)):
        network: Any = torchvision.models.get_model(name, weights=None)
        network.load_state_dict(torch.load(real_data / "weights" / f"{name}.pth"))
        network = network.double().eval()
        target, modules = int(network(images).argmax()), stages(network, name)
        maps = ExcitationBackprop(layer).activation_map(network, images, torch.tensor([target]))
        expected = published(network, images[0], target, modules[:depth], modules[depth:])
        torch.testing.assert_close(maps[0], expected, atol=1e-9, rtol=0)


def small_modules() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.AvgPool2d(2, stride=1, padding=1),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.Flatten(),
        nn.Linear(36, 5),
    ]


class Functional(nn.Module):
    """The same from functions, with arguments by name."""

    def __init__(self, modules: list[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.here = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self.parts
        x = self.here(F.relu(part[0](x)))
        x = F.conv2d(
            weight=part[2].weight, input=x, bias=part[2].bias, stride=2, padding=1, groups=2
        )
        norm = part[3]
        statistics = (norm.running_mean, norm.running_var)
        x = torch.batch_norm(x, norm.weight, norm.bias, *statistics, False, 0.1, norm.eps, True)
        x = x.relu_()
        x = F.max_pool2d(x, 3, 2, padding=1)
        x = torch.conv2d(x, part[6].weight, part[6].bias).clamp(min=0)
        x = F.avg_pool2d(input=x, kernel_size=2, stride=1, padding=1)
        x = F.adaptive_avg_pool2d(x, output_size=(3, 2)).reshape(len(x), -1)
        return F.linear(x, weight=part[11].weight, bias=part[11].bias)


def test_functions_have_the_rules_of_their_modules(batch: tuple[Tensor, Tensor]) -> None:
    modules = small_modules()
    network, (images, targets) = randomised(nn.Sequential(*modules)), batch
    images = images.double() * 2 - 1
    functional = Functional(modules).eval()
    torch.testing.assert_close(functional(images), network(images))
    maps = ExcitationBackprop("1").activation_map(network, images, targets)
    again = ExcitationBackprop("here").activation_map(functional, images, targets)
    for i in range(4):
        expected = published(network, images[i], int(targets[i]), modules[:2], modules[2:])
        torch.testing.assert_close(maps[i], expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(again[i], expected, atol=1e-10, rtol=0)


def test_the_sum_of_the_signal_is_one_where_nothing_is_negative() -> None:
    network: Any = torchvision.models.resnet18(num_classes=7).double().eval()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.data.abs_()
            weight /= weight.flatten(1).sum(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    targets = torch.tensor([1, 6])

    def total(layer: str) -> Tensor:
        signal = signal_at(network, layer, images, targets)
        assert signal.min() >= 0
        return signal.sum(dim=(1, 2))

    one = torch.ones(2, dtype=torch.float64)
    for layer in ("conv1", "maxpool", "layer1.0", "layer2", "layer3", "layer4.1"):
        torch.testing.assert_close(total(layer), one)
    # The layer on one side of a sum gets its share only.
    branch, beside = total("layer2.0.bn2"), total("layer2.0.downsample")
    assert 0.05 < branch.min() < branch.max() < 0.95
    torch.testing.assert_close(branch + beside, one)


class Head(nn.Module):
    """Two activations of an image, put together in a way of one's own, pooled and weighed."""

    def __init__(self, combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.combine = combine
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
        self.register_buffer("constant", torch.rand(1, 4, 6, 5))
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1  # as networks do that normalise their images themselves
        x = F.relu(self.stem(x))
        x = self.combine(F.relu(self.first(x)), F.relu(self.second(x)), self.constant)
        return self.linear(F.relu(x).mean((2, 3)))


def written_twice(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    total = x.clone().add_(y)
    total += x
    return total


def overwritten(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    x, y = x * 1, y * 1
    total = x + y
    x.zero_()
    y.mul_(3)
    return total


def pooled_and_overwritten(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    x = x * 1
    pooled = x.mean((2, 3), keepdim=True) + F.adaptive_avg_pool2d(x, 1)
    x.zero_()
    return pooled + y


def without_the_result(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    total = x * 1
    seen = [total]
    total.add_(y)
    return seen[0]


def into_a_part(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    x = x * 1
    x[:, 1:3] += y[:, 1:3]
    return x


# Ways to write a sum, and one that is the same to excitation backprop.
SUMS: dict[str, tuple[Any, Any]] = {
    "operator": (lambda x, y, c: x + y, lambda x, y, c: torch.add(x, y)),
    "method": (lambda x, y, c: x.add(other=y), lambda x, y, c: torch.add(x, y)),
    "in place": (without_the_result, lambda x, y, c: x + y),
    "overwritten later": (overwritten, lambda x, y, c: x + y),
    "pooled, overwritten later": (
        pooled_and_overwritten,
        lambda x, y, c: (F.adaptive_avg_pool2d(x, 1) + torch.mean(x, (2, 3), True)) + y,
    ),
    "twice": (written_twice, lambda x, y, c: (x + y) + x),
    "itself": (lambda x, y, c: (x * 1).add_(x) + y, lambda x, y, c: torch.add(y, x, alpha=2)),
    "of a view": (
        into_a_part,
        lambda x, y, c: torch.cat([x[:, :1], x[:, 1:3] + y[:, 1:3], x[:, 3:]], dim=1),
    ),
    "python's": (lambda x, y, c: sum([x, y]), lambda x, y, c: y + x),
    "alpha": (
        lambda x, y, c: torch.add(x, y, alpha=0.25),
        # A convolution with weights that are nowhere negative takes the shares as a sum does.
        lambda x, y, c: F.conv2d(
            torch.cat([x, y], dim=1),
            torch.cat([torch.eye(4), 0.25 * torch.eye(4)], dim=1)[:, :, None, None].to(x),
        ),
    ),
    "a number": (lambda x, y, c: 1 + (x + y) + 2, lambda x, y, c: torch.sub(x + y, -3)),
    "a constant": (lambda x, y, c: (x + y) + c, lambda x, y, c: torch.sub(x + y, -c)),
    "broadcast": (
        lambda x, y, c: x + y.amax((2, 3), keepdim=True),
        lambda x, y, c: x + y.amax((2, 3), keepdim=True).expand_as(x),
    ),
}


@pytest.mark.parametrize("way", SUMS)
def test_sums_of_activations_take_their_shares_however_they_are_written(way: str) -> None:
    torch.manual_seed(1)
    network = Head(SUMS[way][0]).double()
    images, targets = torch.randn(3, 3, 8, 7, dtype=torch.float64), torch.tensor([2, 0, 4])
    same = copy.deepcopy(network)
    same.combine = SUMS[way][1]  # type: ignore[assignment]
    found = signal_at(network, "stem", images, targets)
    expected = signal_at(same, "stem", images, targets)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert found.std() > 1e-4
    # An image alone: what is added of its own shape is not taken for an activation.
    alone = signal_at(network, "stem", images[1:2], targets[1:2])
    torch.testing.assert_close(alone, found[1:2], atol=1e-12, rtol=0)
    # Inside one branch too.
    found = signal_at(network, "second", images, targets)
    torch.testing.assert_close(found, signal_at(same, "second", images, targets))


def test_a_sum_of_nothing_hands_nothing_on() -> None:
    network = Head(lambda x, y, c: (x * 0) + (y * 0) + c).double()
    images, targets = torch.randn(2, 3, 8, 7, dtype=torch.float64), torch.tensor([2, 0])
    assert not signal_at(network, "stem", images, targets).any()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "densenet121", "mobilenet_v3_small"])
def test_the_rules_change_no_logit(architecture: str) -> None:
    network = random_network(architecture).float()
    images = torch.randn(2, 3, 64, 64)
    expected = network(images)
    with _Rules():
        found = network(images.clone().requires_grad_().clone())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_layers_of_other_dimensions_have_the_same_rules(dimensions: int) -> None:
    # With nothing negative they hand on all of the signal, which plain derivatives don't.
    of: Any = {1: (nn.Conv1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.ConvTranspose1d)}
    of[3] = (nn.Conv3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.ConvTranspose3d)
    conv, average, adaptive, transposed = of[dimensions]
    network = nn.Sequential(
        transposed(2, 3, 2, stride=2), conv(3, 4, 3), average(2), conv(4, 6, 1), adaptive(1)
    )
    for parameter in network.parameters():
        parameter.data.abs_()
        parameter.requires_grad_(False)
    x = torch.rand(2, 2, *[6] * dimensions).requires_grad_()
    with _Rules():
        y = network(x)
    (signal,) = torch.autograd.grad(y[:, 3].sum(), x)
    torch.testing.assert_close(signal.flatten(1).sum(dim=1), torch.ones(2))


def test_a_transposed_convolution_has_the_published_rule() -> None:
    torch.manual_seed(4)
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1).double().requires_grad_(False)
    x = torch.rand(1, 3, 4, 5, dtype=torch.float64).requires_grad_()
    with _Rules():
        y = layer(x)
    p = torch.rand_like(y)
    (found,) = torch.autograd.grad(y, x, p)
    positive, expected = layer.weight.clamp(min=0), torch.zeros_like(found)
    share = F.conv_transpose2d(x.detach(), positive, stride=2, padding=1)
    for row in range(4):
        for column in range(5):
            for i in range(3):
                for j in range(3):
                    to = (row * 2 + i - 1, column * 2 + j - 1)
                    if 0 <= to[0] < y.shape[2] and 0 <= to[1] < y.shape[3]:
                        arriving = (p / share)[0, :, to[0], to[1]]
                        expected[0, :, row, column] += positive[:, :, i, j] @ arriving
    torch.testing.assert_close(found, expected * x.detach())


def test_costs_one_forward_and_one_backward(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    ExcitationBackprop().explain(net, images, targets)
    for method in (ExcitationBackprop(), ExcitationBackprop("features.2", eval_batch_size=3)):
        with count_evaluations(net) as count:
            method.explain(net, images, targets)
        assert (count.forward, count.backward) == (4, 4)


def test_no_map_depends_on_its_batch(net: nn.Module) -> None:
    images, targets = torch.rand(8, 3, 40, 32) * 2 - 1, torch.arange(8) % 5
    method = ExcitationBackprop("features.2")
    maps = method.activation_map(net, images, targets)
    assert (maps.amin(dim=(1, 2)) == 0).all()
    assert (maps.amax(dim=(1, 2)) == 1).all()
    assert len(maps.unique(dim=0)) == 8
    one = [method.activation_map(net, images[i : i + 1], targets[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(torch.cat(one), maps, atol=1e-5, rtol=0)
    for size in (3, 7, 32):
        same = ExcitationBackprop("features.2", eval_batch_size=size)
        counts: list[int] = [0]
        with count_evaluations(net, lambda count, seen=counts: seen.append(count.forward)):
            found = same.activation_map(net, images, targets)
        passes = [after - before for before, after in itertools.pairwise(counts)]
        assert passes == [*[size] * (8 // size), *[8 % size] * (8 % size > 0)]
        torch.testing.assert_close(found, maps, atol=1e-5, rtol=0)


def functions_seen() -> int:
    count: int = torch._C._len_torch_function_stack()
    return count


class Broken(SmallNet):
    """Fails in the middle of a forward."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError(
            f"broken under {functions_seen()} rules after {self.features(images).ndim}"
        )


def test_nothing_is_left_behind(batch: Any) -> None:
    images, targets = batch
    given = images.clone()
    for network, fails in ((SmallNet().train(), False), (Broken().train(), True)):
        network.features[0].weight.requires_grad_(False)
        before, depth = snapshot(network), functions_seen()
        if fails:
            with pytest.raises(RuntimeError, match=f"under {depth + 1} rules"):
                ExcitationBackprop("features").explain(network, images, targets)
        else:
            ExcitationBackprop().explain(network, images, targets)
        assert_same(before, snapshot(network))
        assert functions_seen() == depth
        assert torch.equal(images, given)
        assert not images.requires_grad


def test_it_starts_a_perturbation(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    method = ExcitationBackprop("features.2")
    assert isinstance(method, ActivationMethod)
    start = method.activation_map(net, images, targets)
    assert start.shape == (4, 20, 16)
    igos = IGOS(iterations=2, samples=2)
    maps = AOP(method, igos, stretch=False).explain(net, images, targets)
    other = AOP(GradCAM("features.2"), igos, stretch=False).explain(net, images, targets)
    assert maps.shape == (4, 40, 32)
    assert not torch.equal(maps, other)


def test_callers_without_gradients(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    expected = ExcitationBackprop().explain(net, images, targets)
    assert expected.any()
    frozen = copy.deepcopy(net).requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(ExcitationBackprop().explain(net, images + 0, targets + 0), expected)
    with torch.no_grad():
        assert torch.equal(ExcitationBackprop().explain(frozen, images, targets), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(net: nn.Module, batch: Any, dtype: torch.dtype) -> None:
    images, targets = batch
    method = ExcitationBackprop("features.2")
    expected = method.explain(net, images, targets)
    half = method.explain(copy.deepcopy(net).to(dtype), images, targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0)
    with torch.autocast("cpu", dtype):
        cast = method.explain(net, images, targets)
    torch.testing.assert_close(cast, expected, atol=0.05, rtol=0)


def test_shares_are_computed_in_full_precision() -> None:
    def handed_on(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in given]
        with _Rules():
            output = function(*inputs)
        signals = torch.autograd.grad(output.sum(), inputs)
        return tuple(signal.double() for signal in signals)

    def expected(x: Tensor, layer: nn.Linear) -> Tensor:
        x, positive = x.double(), layer.weight.double().clamp(min=0)
        return x * ((1 / (x @ positive.T)) @ positive)

    x, layer = torch.rand(2, 50, 20), nn.Linear(20, 10).requires_grad_(False)
    half, halved = x.bfloat16(), copy.deepcopy(layer).bfloat16()
    rounded_once = 2**-8 * 1.001
    (found,) = handed_on(halved, half)
    torch.testing.assert_close(found, expected(half, halved), atol=0, rtol=rounded_once)
    total = half.double().sum(dim=0)
    for found, term in zip(handed_on(torch.add, *half), half.double(), strict=True):
        torch.testing.assert_close(found, term / total, atol=0, rtol=rounded_once)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = handed_on(layer, x)
    torch.testing.assert_close(found, expected(x, layer), atol=0, rtol=1e-5)


def test_half_precision_where_nothing_arrives(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    layers: Any = net.features
    nn.init.constant_(layers[1].bias, -2.0)  # leaves few activations
    nn.init.constant_(layers[3].bias, 1.0)  # and has every output on all the same
    expected = ExcitationBackprop("features.2").explain(net, images * 4, targets)
    assert (expected == 0).float().mean() > 0.3
    assert expected.any()
    half = ExcitationBackprop("features.2").explain(net.half(), images * 4, targets)
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0)


def test_it_needs_a_layer_that_the_class_depends_on(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    with pytest.raises(TargetLayerError, match="SmallNet has no layer 'nowhere'"):
        ExcitationBackprop("nowhere").explain(net, images, targets)
    with pytest.raises(TargetLayerError, match=r"'head' gives \[4, 5\], not a feature map"):
        ExcitationBackprop("head").explain(net, images, targets)

    class Beside(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            self.beside(images)
            return super().forward(images)

    network = Beside()
    network.beside = nn.Conv2d(3, 3, 3)
    with pytest.raises(TargetLayerError, match="does not depend on target layer 'beside'"):
        ExcitationBackprop("beside").explain(network, images, targets)
    with pytest.raises(ValueError, match="ExcitationBackprop: eval_batch_size must be above 0"):
        ExcitationBackprop(eval_batch_size=0)


def test_nothing_infinite_is_drawn() -> None:
    def cancelling(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        for _ in range(3):
            x = (x + x * (2**-23 - 1)) * 2**23
        return x

    network: Any = Head(cancelling)
    images, targets = torch.rand(2, 3, 8, 7), torch.tensor([2, 0])
    with pytest.raises(NonFiniteScoreError, match="the excitation signal"):
        ExcitationBackprop("stem").explain(network, images, targets)
    network.linear.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteScoreError, match=r"the logit .* image\(s\) \[1\]"):
        ExcitationBackprop("stem").explain(network, images, targets)
