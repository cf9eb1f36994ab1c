import copy
import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn

from lightning_aop import GradCAM, fast_sigcam, sigcam
from lightning_aop.metrics import OverallAUC
from lightning_aop.model.adapter import explaining, predict
from lightning_aop.model.isolation import isolated_rng
from lightning_aop.model.layers import TargetLayerError, _as_maps, capture, find_target_layer
from lightning_aop.model.passes import count_evaluations
from lightning_aop.scores import logit
from lightning_aop.types import SaliencyMethod

METHODS: list[SaliencyMethod] = [GradCAM(), fast_sigcam(iterations=2)]


class Restless(SmallNet):
    """Everything that an explanation could disturb: counters, frozen parts, noise in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.seen: Tensor
        self.replaced: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        self.replaced = self.replaced + 1
        random.random()
        np.random.rand()
        return super().forward(images + 0.01 * torch.randn_like(images))


def trained_somewhat() -> Restless:
    torch.manual_seed(0)
    model = Restless()
    model.train()
    model.features[1].eval()
    for parameter in model.features[0].parameters():
        parameter.requires_grad_(False)
    model(torch.rand(4, 3, 40, 32)).sum().backward()
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_nothing_is_disturbed(method: SaliencyMethod, mode: str, batch: Any) -> None:
    model = trained_somewhat()
    context = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }[mode]
    with context():
        images, targets = batch[0].clone(), batch[1].clone()
        before, given = snapshot(model), images.clone()
        maps = method.explain(model, images, targets)
        OverallAUC(steps=4).update(model, images, maps, targets)
        predict(model, images)
        assert_same(before, snapshot(model))
        assert torch.equal(images, given)
    assert maps.shape == (4, 40, 32)
    assert torch.equal(maps, method.explain(model, *batch))


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_disturbed_by_an_error(failure: type[BaseException], batch: Any) -> None:
    model = trained_somewhat()

    def fail(module: nn.Module, args: object) -> None:
        if torch.is_grad_enabled():
            raise failure("in the head")

    model.head.register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(failure, match="in the head"):
        fast_sigcam().explain(model, *batch)
    assert_same(before, snapshot(model))


def test_a_pending_backward_still_works(batch: Any) -> None:
    model = SmallNet().train()
    loss = model(batch[0]).square().sum()
    GradCAM().explain(model, *batch)
    loss.backward()  # would raise if a saved tensor had been written to
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_and_trainable_models_give_the_same_maps(net: nn.Module, batch: Any) -> None:
    expected = fast_sigcam().explain(net, *batch)
    frozen = copy.deepcopy(net).requires_grad_(False).train()
    assert torch.equal(fast_sigcam().explain(frozen, *batch), expected)


def test_compiled_models_are_heard(net: nn.Module, batch: Any) -> None:
    expected = GradCAM("features").explain(net, *batch)
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    compiled(batch[0])
    torch.testing.assert_close(GradCAM("features").explain(compiled, *batch), expected)
    inside = nn.Sequential(torch.compile(copy.deepcopy(net), backend="eager"))
    inside(batch[0])
    torch.testing.assert_close(GradCAM().explain(inside, *batch), expected)
    in_place = copy.deepcopy(net)
    in_place.compile(backend="eager")
    in_place(batch[0])
    torch.testing.assert_close(GradCAM().explain(in_place, *batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, net: nn.Module, batch: Any) -> None:
    expected = GradCAM().explain(net, *batch)
    maps = GradCAM().explain(copy.deepcopy(net).to(dtype), *batch)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, expected, atol=0.05, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(GradCAM().explain(net, *batch), expected, atol=0.05, rtol=0)
    half = copy.deepcopy(net).to(dtype)
    for method in (fast_sigcam(), sigcam()):
        assert method.explain(half, *batch).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda(dtype: torch.dtype, net: nn.Module, batch: Any) -> None:
    model = copy.deepcopy(net).to("cuda", dtype)
    before = torch.cuda.get_rng_state()
    for method in (GradCAM(), fast_sigcam(), sigcam()):
        maps = method.explain(model, *batch)
        assert maps.device.type == "cuda"
        expected = method.explain(net, *batch)
        if isinstance(method, GradCAM):
            torch.testing.assert_close(maps.cpu(), expected, atol=0.05, rtol=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_isolated_rng_gives_back_every_stream() -> None:
    before = snapshot(nn.Identity())["rng"]
    with isolated_rng(seed=7):
        first = torch.rand(3)
        random.random()
        np.random.rand()
    assert_same(before, snapshot(nn.Identity())["rng"])
    with isolated_rng(seed=7):
        assert torch.equal(torch.rand(3), first)


LAYERS = {
    "resnet50": "layer4.2",
    "densenet201": "features.norm5",
    "inception_v3": "Mixed_7c",
    "vgg19": "features.36",
    "efficientnet_b0": "features.8.2",
    "mobilenet_v2": "features.18.2",
    "mobilenet_v3_small": "features.12.2",
    "convnext_tiny": "features.7.2",
    "squeezenet1_1": "features.12",
    "swin_t": "permute",
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", LAYERS)
def test_the_target_layer_of_torchvision_models(name: str) -> None:
    extra: dict[str, Any] = {"init_weights": False} if name == "inception_v3" else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    assert find_target_layer(model, torch.rand(1, 3, 224, 224)) == LAYERS[name]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 512), ("efficientnet_b0", 1280), ("convnext_atto", 320), ("densenet121", 1024)],
)
def test_the_target_layer_of_timm_models(name: str, channels: int) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=7)
    images, targets = torch.rand(1, 3, 96, 96), torch.tensor([2])
    layer = find_target_layer(model, images)
    with (
        explaining(model, images, targets) as (classifier, x, _),
        capture(classifier.model, layer, (96, 96)) as captured,
    ):
        activation, gradient = captured.activation_and_gradient(classifier.logits(x)[:, 2])
    assert activation.shape == gradient.shape == (1, channels, 3, 3)
    assert gradient.abs().sum() > 0


TRANSFORMERS = {
    "vit_tiny_patch16_224": "blocks.11.norm1",
    "deit_tiny_distilled_patch16_224": "blocks.11.norm1",
    "vit_little_patch16_reg1_gap_256": "blocks.13",  # no class token: all patches are pooled
    "swin_tiny_patch4_window7_224": "norm",
    "torchvision/vit_b_16": "encoder.layers.encoder_layer_11.ln_1",
    "torchvision/swin_v2_t": "permute",
}


def transformer(name: str) -> nn.Module:
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None).eval()
    return timm.create_model(name, pretrained=False).eval()


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_target_layer_of_transformers(name: str) -> None:
    model, side = transformer(name), 256 if "256" in name else 224
    images, targets = torch.rand(2, 3, side, side), torch.tensor([3, 7])
    with count_evaluations(model) as count:
        assert find_target_layer(model, images) == TRANSFORMERS[name]
    assert count.forward == 5
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.normal_(head.weight)  # torchvision's start at zero
    before = snapshot(model)
    with (
        explaining(model, images, targets) as (classifier, x, t),
        capture(classifier.model, TRANSFORMERS[name], (side, side)) as captured,
    ):
        a, g = captured.activation_and_gradient(classifier.scores(x, t, logit))
    assert_same(before, snapshot(model))
    assert a.shape == g.shape
    assert a.shape[2:] == ((7, 7) if "swin" in name else (side // 16, side // 16))
    assert g.flatten(1).any(dim=1).all()


def test_the_target_layer_of_a_transformer_with_an_empty_head() -> None:
    model = transformer("vit_tiny_patch16_224")
    nn.init.zeros_(model.head.weight)  # type: ignore[union-attr, arg-type]
    assert find_target_layer(model, torch.rand(1, 3, 224, 224)) == "blocks.11.norm1"


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (100, 230)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_are_laid_out_as_patches(size: tuple[int, int], prefix: int) -> None:
    h, w = size[0] // 16, size[1] // 16
    expected = torch.randn(2, 6, h, w)
    tokens = expected.flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.randn(2, prefix, 6), tokens], dim=1)
    assert torch.equal(_as_maps(tokens, 2, size), expected)
    assert torch.equal(_as_maps(tokens.transpose(0, 1), 2, size), expected)
    assert torch.equal(_as_maps(expected.permute(0, 2, 3, 1), 2, size), expected)
    assert torch.equal(_as_maps(expected, 2, size), expected)


def test_tokens_that_fit_no_grid_need_reshape(batch: Any) -> None:
    class Odd(nn.Module):
        """Seven tokens for whatever picture."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Conv2d(3, 7, 8)
            self.norm = nn.Linear(4, 4)
            self.head = nn.Linear(4, 5)

        def forward(self, images: Tensor) -> Tensor:
            tokens = nn.functional.adaptive_avg_pool2d(self.tokens(images), 2).flatten(2)
            return self.head(self.norm(tokens).mean(1))  # type: ignore[no-any-return]

    images, targets = batch[0][:, :, :32], batch[1]
    with pytest.raises(TargetLayerError, match=r"'norm' gives \[4, 7, 4\].*give reshape"):
        GradCAM("norm").explain(Odd(), images, targets)
    maps = GradCAM("norm", reshape=lambda t: t.transpose(1, 2)[..., None]).activation_map(
        Odd(), images, targets
    )
    assert maps.shape == (4, 7, 1)


def test_a_model_without_convolution_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(TargetLayerError, match=r"Sequential has no layer .* of 4 x 4 .*RISE, LIME"):
        GradCAM().explain(model, torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))


def test_a_network_of_one_convolution_has_its_own_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find_target_layer(model, torch.rand(1, 3, 8, 8)) == "0"


def test_the_layer_is_traced_once_and_again_for_a_changed_model(batch: Any) -> None:
    model = SmallNet()
    with count_evaluations(model) as count:
        GradCAM().explain(model, *batch)
        GradCAM().explain(model, *batch)
    assert count.forward == 4 + 4 + 5
    model.features.append(nn.Conv2d(12, 12, 1))
    assert find_target_layer(model, batch[0]) == "features.5"


def test_layers_are_refused_by_name(net: nn.Module, batch: Any) -> None:
    with pytest.raises(TargetLayerError, match=r"no layer 'layer4'; its last conv.*features\.3"):
        GradCAM("layer4").explain(net, *batch)
    with pytest.raises(TargetLayerError, match="a Conv2d, is no submodule of SmallNet"):
        GradCAM(nn.Conv2d(1, 1, 1)).explain(net, *batch)
    with pytest.raises(TargetLayerError, match=r"'head' gives \[4, 5\], not a feature map"):
        GradCAM("head").explain(net, *batch)
    net.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(TargetLayerError, match="'unused' did not run"):
        GradCAM("unused").explain(net, *batch)
    assert not net.unused._forward_hooks
    given_as_module = GradCAM(net.features).explain(net, *batch)
    assert torch.equal(given_as_module, GradCAM("features").explain(net, *batch))


def test_counting(net: nn.Module, batch: Any) -> None:
    changes: list[int] = []
    with count_evaluations(net, lambda count: changes.append(count.total)) as count:
        net(batch[0]).sum().backward()
        with torch.no_grad():
            net(batch[0][:1])
    assert (count.forward, count.backward, count.total) == (5, 4, 9)
    assert changes == [4, 9]


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (torch.rand(3, 8, 8), torch.tensor([0]), r"\[B, C, H, W\], got \[3, 8, 8\]; add a batch"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), "got torch.uint8: scale"),
        (torch.rand(2, 3, 8, 8), torch.tensor([0]), "2 images and 1 targets"),
        (torch.rand(1, 3, 8, 8), torch.tensor([0.0]), "integer tensor of shape"),
        (torch.rand(1, 3, 8, 8), torch.tensor([[0, 1]]), r"of shape \[1, 2\]; for multilabel"),
        (torch.rand(1, 3, 8, 8), torch.tensor([5]), r"must lie in 0\.\.4.*got 5"),
        (torch.rand(1, 3, 8, 8), torch.tensor([-1]), "0 or more, got -1"),
        (torch.rand(0, 3, 8, 8), torch.tensor([], dtype=torch.long), "the batch is empty"),
    ],
)
@pytest.mark.parametrize("method", [*METHODS, sigcam()])
def test_bad_batches_are_refused(
    method: SaliencyMethod,
    images: Tensor,
    targets: Tensor,
    message: str,
    net: nn.Module,
    unchecked: None,
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        method.explain(net, images, targets)


def test_a_nan_score_is_named(net: nn.Module, batch: Any) -> None:
    net.head.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"logit is NaN or infinite for image\(s\) \[1\]"):
        GradCAM().explain(net, *batch)
    net.head.bias.data[:] = torch.nan
    for second in (fast_sigcam(), sigcam()):
        with pytest.raises(ValueError, match="class score is NaN"):
            second.perturbation.refine(net, *batch, torch.zeros(4, 7, 7))


def test_a_model_that_gives_no_logits_is_told_what_to_do(batch: Any) -> None:
    class Pair(SmallNet):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images), None

    with pytest.raises(ValueError, match=r"must map images .* got tuple for 5 images: wrap it"):
        GradCAM().explain(Pair(), *batch)


def test_something_else_than_a_model_is_refused(batch: Any, unchecked: None) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        GradCAM("x").explain(lambda x: x, *batch)
