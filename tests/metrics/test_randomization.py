import copy
import itertools
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import scipy.stats
import skimage.metrics
import torch
import torch.nn.functional as F
import torchvision
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import CAM, GradCAM, fast_sigcam
from lightning_aop.metrics.randomization import (
    _layer_seed,
    parameter_randomization,
    weighted_layers,
)
from lightning_aop.metrics.similarity import rank_correlation, ssim
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import min_max

# --------------------------------------------------------------------------------------------------
# how alike two maps are


def kinds(height: int, width: int, seed: int) -> dict[str, Tensor]:
    """Maps of several kinds, in float64: smooth, with many ties, with two values, nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, height, width, generator=generator, dtype=torch.float64)
    coarse = torch.randn(3, 1, 5, 4, generator=generator, dtype=torch.float64)
    cam = F.interpolate(coarse.relu(), (height, width), mode="bilinear")[:, 0]
    return {
        "noise": min_max(noise),
        "cam": min_max(cam),
        "relu": min_max((noise - 1).relu()),
        "levels": (noise * 2).round().clamp(-1, 2).add(1).div(3),
        "binary": (noise > 1).double(),
        "nearly constant": 0.999 + 1e-3 * min_max(noise),
    }


def pairs(height: int, width: int) -> Any:
    one, other = kinds(height, width, 0), kinds(height, width, 1)
    for a, b in itertools.product(one, other):
        yield f"{a}, {b}", one[a], other[b]
    for a in one:
        yield f"{a}, itself", one[a], one[a].clone()
        yield f"{a}, turned", one[a], 1 - one[a]


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (57, 33)])
def test_rank_correlation_is_scipys(size: tuple[int, int]) -> None:
    for what, a, b in pairs(*size):
        expected = [
            scipy.stats.spearmanr(x.numpy().ravel(), y.numpy().ravel()).statistic
            for x, y in zip(a, b, strict=True)
        ]
        mine = rank_correlation(a, b)
        np.testing.assert_allclose(mine.numpy(), expected, atol=1e-12, rtol=0, err_msg=what)
        if what.endswith("itself"):
            assert torch.equal(rank_correlation(a.float(), b.float()), torch.ones(3))


def test_rank_correlation_takes_any_increasing_view_of_a_map() -> None:
    a, b = kinds(30, 30, 0)["noise"], kinds(30, 30, 1)["levels"]
    torch.testing.assert_close(rank_correlation(a.exp() * 7, b**3), rank_correlation(a, b))
    torch.testing.assert_close(
        rank_correlation(a[:, :, ::2], b.mT[:, ::2].mT),
        rank_correlation(a[:, :, ::2].clone(), b[:, :, ::2].clone()),
    )
    halves = a.to(torch.bfloat16)
    assert rank_correlation(halves, b).dtype == torch.float32
    torch.testing.assert_close(
        rank_correlation(halves, b.float()), rank_correlation(halves.float(), b.float())
    )


def test_a_constant_map_ranks_nothing() -> None:
    some, blank, white = torch.rand(2, 12, 12), torch.zeros(2, 12, 12), torch.ones(2, 12, 12)
    assert not rank_correlation(some, blank).any()
    assert not rank_correlation(white, some).any()
    assert rank_correlation(blank, blank.clone()).tolist() == [1, 1]
    assert rank_correlation(blank, white).tolist() == [1, 1]
    some[1, 3, 3] = torch.nan
    assert rank_correlation(some, some).isnan().tolist() == [False, True]


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (57, 33), (96, 96)])
def test_ssim_is_scikit_images(size: tuple[int, int]) -> None:
    for what, a, b in pairs(*size):
        expected = [
            skimage.metrics.structural_similarity(
                x.numpy(),
                y.numpy(),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1,
            )
            for x, y in zip(a, b, strict=True)
        ]
        np.testing.assert_allclose(ssim(a, b).numpy(), expected, atol=1e-10, rtol=0, err_msg=what)
        np.testing.assert_allclose(
            ssim(a.float(), b.float()).numpy(), expected, atol=2e-5, rtol=0, err_msg=what
        )
        torch.testing.assert_close(ssim(a[1:2], b[1:2]), ssim(a, b)[1:2])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ssim(a.float(), b.float()), ssim(a.float(), b.float()))
    assert ssim(a.float(), a.float()).tolist() == [1, 1, 1]


@pytest.mark.usefixtures("unchecked")
def test_maps_that_can_not_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape .*\[2, 20, 20\] and \[2, 20, 21\]"):
        rank_correlation(torch.rand(2, 20, 20), torch.rand(2, 20, 21))
    with pytest.raises(ValueError, match=r"same shape .*\[2, 20, 20\] and \[1, 20, 20\]"):
        ssim(torch.rand(2, 20, 20), torch.rand(1, 20, 20))
    with pytest.raises(ValueError, match="11 by 11 pixels or more, its window, got 10 by 20"):
        ssim(torch.rand(2, 10, 20), torch.rand(2, 10, 20))


# --------------------------------------------------------------------------------------------------
# the finding


class Edges:
    """An edge detector: it asks the model nothing."""

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        grey = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        rows = grey[:, 0, 2:, 1:-1] - grey[:, 0, :-2, 1:-1]
        columns = grey[:, 0, 1:-1, 2:] - grey[:, 0, 1:-1, :-2]
        return min_max((rows.square() + columns.square()).sqrt())


class Weights:
    """A method that keeps what the weights are while it runs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.requires_grad: list[list[bool]] = []

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        self.requires_grad.append([p.requires_grad for p in model.parameters()])
        self.seen.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        return images.mean(dim=1).abs().clamp(max=1)


def patches(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one striped patch somewhere; the stripes' width and direction are the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 40, 40, generator=generator)
    targets = torch.randint(0, 4, (count,), generator=generator)
    rows, columns = torch.randint(0, 28, (2, count), generator=generator)
    broad = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0]).repeat(2).expand(12, 12)
    fine = torch.tensor([2.0, -2.0]).repeat(6).expand(12, 12)
    stripes = torch.stack([broad, broad.T, fine, fine.T])
    for image, target, i, j in zip(images, targets, rows, columns, strict=True):
        image[:, i : i + 12, j : j + 12] = stripes[target]
    return images, targets


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    network = SmallNet(classes=4)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(200):
        images, targets = patches(32, 100 + step)
        optimizer.zero_grad()
        F.cross_entropy(network(images), targets).backward()
        optimizer.step()
    network.eval()
    images, targets = patches(200, 7)
    assert (network(images).argmax(dim=1) == targets).float().mean() > 0.95
    return network


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_gradcam_looks_at_the_model_and_an_edge_detector_does_not(
    trained: nn.Module, mode: Any
) -> None:
    images, targets = patches(24, 8)
    method = GradCAM("features")
    steps = list(parameter_randomization(trained, images, targets, method, mode=mode))
    assert [step.layer for step in steps] == ["head", "features.3", "features.0"]
    expected = method.explain(trained, images, targets)
    for step in steps:
        assert torch.equal(step.original, expected)
        torch.testing.assert_close(
            step.rank_correlation, rank_correlation(expected, step.maps), atol=0, rtol=0
        )
        torch.testing.assert_close(step.ssim, ssim(expected, step.maps), atol=0, rtol=0)
        assert step.rank_correlation.mean() < 0.6, step.layer
        assert step.ssim.mean() < 0.8, step.layer
    unmoved = list(parameter_randomization(trained, images, targets, Edges(), mode=mode))
    for step in unmoved:
        assert step.rank_correlation.tolist() == [1] * 24
        assert step.ssim.tolist() == [1] * 24


# --------------------------------------------------------------------------------------------------
# what is randomised


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


HEAD = {"head.weight", "head.bias"}
SECOND = {"features.3.weight", "features.3.bias"}
FIRST = {"features.0.weight", "features.0.bias"}


def test_which_weights_change(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, targets = batch
    net.get_parameter("features.3.weight").requires_grad_(False)
    cascade, alone, subset, again, other = Weights(), Weights(), Weights(), Weights(), Weights()
    list(parameter_randomization(net, images, targets, cascade))
    list(parameter_randomization(net, images, targets, alone, mode="independent"))
    list(parameter_randomization(net, images, targets, subset, layers=["features.0", "head"]))
    torch.manual_seed(77)
    list(parameter_randomization(net, images, targets, again))
    list(parameter_randomization(net, images, targets, other, seed=1))
    original = dict(net.state_dict())
    for method, expected in [
        (cascade, [set(), HEAD, HEAD | SECOND, HEAD | SECOND | FIRST]),
        (alone, [set(), HEAD, SECOND, FIRST]),
        (subset, [set(), FIRST, FIRST | HEAD]),
    ]:
        assert [changed(original, seen) for seen in method.seen] == expected
        for seen in method.seen:
            for name in changed(original, seen):
                # One draw for each layer, however it came to its turn.
                assert torch.equal(seen[name], cascade.seen[-1][name]), name
    assert_same(cascade.seen, again.seen)
    assert cascade.requires_grad == [[p.requires_grad for p in net.parameters()]] * 4
    assert changed(cascade.seen[-1], other.seen[-1]) == HEAD | SECOND | FIRST


class Mixer(nn.Module):
    """Weights without an initialisation of their own, and vectors beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(3 + 0.5 * torch.randn(60, 50))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.ones(60))

    def forward(self, rows: Tensor) -> Tensor:
        return self.scale * F.linear(rows, self.weight, self.bias)


def test_the_weights_are_drawn_as_the_layer_draws_them() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 50, 5),
        nn.LayerNorm([50, 8, 8]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Mixer(),
        nn.Linear(60, 40),
    )
    for parameter in network[5].parameters():
        nn.init.normal_(parameter, std=30.0)
    method = Weights()
    images, targets = torch.rand(1, 3, 12, 12), torch.tensor([0])
    list(parameter_randomization(network, images, targets, method))
    last = method.seen[-1]
    for name, fan_in in [("0", 75), ("5", 60)]:
        bound = fan_in**-0.5
        for kind in ("weight", "bias"):
            assert 0.9 * bound < last[f"{name}.{kind}"].abs().max() <= bound
        spread = last[f"{name}.weight"].std().item()
        torch.testing.assert_close(spread, bound / 3**0.5, rtol=0.05, atol=0)
    assert abs(last["4.weight"].mean()) < 0.05
    torch.testing.assert_close(last["4.weight"].std().item(), 0.5, rtol=0.05, atol=0)
    assert changed(dict(network.state_dict()), last) == {
        "0.weight", "0.bias", "4.weight", "5.weight", "5.bias"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_the_same_weights_rounded(
    net: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    images, targets = batch
    whole, half = Weights(), Weights()
    list(parameter_randomization(net, images, targets, whole))
    network = copy.deepcopy(net).to(dtype)
    list(parameter_randomization(network, images, targets, half))
    for name in HEAD | SECOND | FIRST:
        assert torch.equal(half.seen[-1][name], whole.seen[-1][name].to(dtype)), name
    (step,) = parameter_randomization(network, images, targets, GradCAM(), layers=["head"])
    assert step.rank_correlation.dtype == torch.float32
    assert step.maps.isfinite().all()


class Recurrent(nn.Module):
    """Rows of the image through an LSTM, which keeps a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(images.mean(dim=1))[0][:, -1])
        return logits


class Scores:
    """A method whose map is the class logit everywhere."""

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(images).gather(1, targets[:, None])
        return logits.sigmoid()[:, :, None].expand(-1, *images.shape[2:])


def weight_norm() -> nn.Module:
    """weight_norm computes the weight of the first layer before every forward."""
    with pytest.warns(FutureWarning):
        first = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    return nn.Sequential(first, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def parametrized() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    return nn.Sequential(first, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "layer", "names"),
    [
        (Recurrent, "lstm", "weight_ih_l0 weight_hh_l0 bias_ih_l0 bias_hh_l0"),
        (weight_norm, "0", "weight_v bias"),
        (parametrized, "0.parametrizations.weight", "original1"),
    ],
)
def test_weights_that_are_kept_elsewhere_are_randomised(make: Any, layer: str, names: str) -> None:
    network, images, targets = make(), torch.rand(2, 3, 12, 12), torch.tensor([1, 2])
    logits = network(images)
    before = snapshot(network)
    assert weighted_layers(network, images)[-1] == layer
    method = Weights()
    list(parameter_randomization(network, images, targets, method, layers=[layer]))
    assert changed(*method.seen) == {f"{layer}.{name}" for name in names.split()}
    assert_same(before, snapshot(network))
    if isinstance(network, Recurrent):
        kept: Any = network.lstm._flat_weights
        assert all(one is two for one, two in zip(kept, network.lstm.parameters(), strict=True))
    logits.sum().backward()  # what the graph has kept was not written to
    (step,) = parameter_randomization(network, images, targets, Scores(), layers=[layer])
    assert ((step.maps - step.original).abs() > 1e-4).all()
    assert torch.equal(logits, network(images))


@pytest.mark.usefixtures("unchecked")
def test_an_initialisation_that_goes_on_to_the_submodules_keeps_to_its_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 3))
            self.inner = nn.Linear(3, 4)

        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight)
            self.inner.reset_parameters()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images.mean(dim=(2, 3)) @ self.weight)
            return logits

    network, method = Block(), Weights()
    images, targets = torch.rand(1, 3, 12, 12), torch.tensor([0])
    before = snapshot(network)
    list(parameter_randomization(network, images, targets, method))
    assert weighted_layers(network, images) == ["inner", ""]
    inner = {"inner.weight", "inner.bias"}
    original = dict(network.state_dict())
    assert [changed(original, s) for s in method.seen] == [set(), inner, inner | {"weight"}]
    assert torch.equal(method.seen[1]["inner.weight"], method.seen[2]["inner.weight"])
    assert_same(before, snapshot(network))


# --------------------------------------------------------------------------------------------------
# which layers there are


class Late(nn.Module):
    """Registered in another order than it runs: one module unused, one twice, one weight shared."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.stem = nn.Conv2d(3, 8, 3)
        self.middle = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.middle.weight
        self.partly = nn.RNN(8, 8, batch_first=True)
        self.partly.weight_hh_l0 = self.middle.weight

    def forward(self, images: Tensor) -> Tensor:
        rows = self.twice(self.twice(self.stem(images)).relu()).mean(dim=2).mT
        pooled = self.partly(rows)[0].mean(dim=1)
        logits: Tensor = self.head(self.tied(self.middle(pooled).relu()).relu())
        return logits


def test_layers_go_by_the_order_in_which_they_run() -> None:
    network, images, targets = Late(), torch.rand(1, 3, 12, 12), torch.tensor([0])
    assert weighted_layers(network, images) == ["head", "tied", "partly", "twice", "stem"]
    method = Weights()
    list(parameter_randomization(network, images, targets, method))
    shared = {"tied.weight", "middle.weight", "partly.weight_hh_l0"}
    steps = [changed(one, two) for one, two in itertools.pairwise(method.seen)]
    assert steps == [
        {"head.weight", "head.bias"},
        {"tied.bias"} | shared,
        {"partly.weight_ih_l0", "partly.bias_ih_l0", "partly.bias_hh_l0"},
        {"twice.weight", "twice.bias"},
        {"stem.weight", "stem.bias"},
    ]
    drawn = method.seen[-1]
    assert torch.equal(drawn["tied.weight"], drawn["middle.weight"])
    # Two layers of the same shape have weights of their own.
    assert not torch.equal(drawn["tied.weight"], drawn["head.weight"])


def test_a_layers_seed_is_the_same_in_every_process() -> None:
    # printf 3:head | sha256sum, the first 8 bytes
    assert _layer_seed(3, "head") == 0xAA3DA5F30466C52A >> 1


def test_the_layers_of_a_vision_transformer() -> None:
    network = torchvision.models.VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=3,
    ).eval()
    layers = ["heads.head"]
    for block in ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0"):
        layers += [f"{block}.mlp.3", f"{block}.mlp.0"]
        layers += [f"{block}.self_attention.out_proj", f"{block}.self_attention"]
    # The encoder owns the position embedding; the class token is one vector.
    layers += ["encoder", "conv_proj"]
    images, targets = torch.rand(2, 3, 16, 16), torch.tensor([0, 2])
    assert weighted_layers(network, images) == layers
    nn.init.normal_(network.heads.head.weight)
    method = Weights()
    for step in parameter_randomization(network, images, targets, method):
        new = changed(method.seen[-2], method.seen[-1])
        assert new, step.layer
        assert {name.rpartition(".")[0] for name in new} == {step.layer}
    attention = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    bound = (6 / (8 + 24)) ** 0.5  # as torch's attention draws it
    assert 0.9 * bound < method.seen[-1][attention].abs().max() <= bound


def test_weights_seen_by_a_function_of_the_users_own_and_without_a_graph() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return rows @ weight.T

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return gradients[0] @ ctx.saved_tensors[0], None

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 5)

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                rows = self.body(images).mean(dim=(2, 3))
            return Product.apply(rows, self.head.weight) + self.head.bias

    network, images = Frozen(), torch.rand(1, 3, 12, 12)
    assert weighted_layers(network, images) == ["head", "body"]


def test_wrapped_models_and_a_target_layer_given_as_a_module(
    net: Any, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    plain = list(parameter_randomization(net, images, targets, GradCAM("features.3")))
    by_module = GradCAM(net.features[3])
    wrapped = [
        net,
        nn.DataParallel(net, device_ids=[]),
        torch.compile(net, backend="eager"),
    ]
    for model in wrapped:
        steps = list(parameter_randomization(model, images, targets, by_module))
        assert (
            [s.layer for s in steps] == [s.layer for s in plain] == weighted_layers(model, images)
        )
        for one, other in zip(steps, plain, strict=True):
            assert torch.equal(one.maps, other.maps)


# --------------------------------------------------------------------------------------------------
# what it costs and leaves


def test_the_cost_is_that_of_the_method_for_each_layer(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    with count_evaluations(net) as count:
        weighted_layers(net, images)
    assert (count.forward, count.backward) == (1, 0)
    for method, each in [
        (GradCAM("features"), 4 * 2),
        (fast_sigcam("features", iterations=2), None),
        (Edges(), 0),
    ]:
        if each is None:
            with count_evaluations(net) as count:
                method.explain(net, images, targets)
            each = count.total
            assert each > 0
        with count_evaluations(net) as count:
            steps = parameter_randomization(net, images, targets, method)
            assert count.total == 1
            for done, _ in enumerate(steps, start=2):
                assert count.total == 1 + done * each
        assert count.total == 1 + 4 * each


def randomize(model: nn.Module, images: Tensor, targets: Tensor, how: str) -> None:
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    steps = parameter_randomization(model, images, targets, GradCAM())
    if how == "all":
        for step in steps:
            assert not step.rank_correlation.isnan().any()
            assert_same(expected, dict(model.state_dict()))  # also between the steps
    elif how == "stopped":
        next(steps)
        next(steps)
        steps.close()
    else:
        with pytest.raises(ValueError, match=r"targets must lie in 0\.\.4"):
            list(parameter_randomization(model, images, targets + 5, GradCAM()))

        class Broken:
            calls = 0

            def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
                self.calls += 1
                if self.calls == 3:
                    raise RuntimeError("no more")
                return Edges().explain(model, images, targets)

        broken = parameter_randomization(model, images, targets, Broken())
        assert next(broken).layer == "head"
        with pytest.raises(RuntimeError, match="no more"):
            next(broken)


@pytest.mark.usefixtures("unchecked")  # the checker looks at random items of a list
@pytest.mark.parametrize("how", ["all", "stopped", "failed"])
@pytest.mark.parametrize("train", [True, False])
def test_nothing_is_disturbed(
    net: nn.Module, batch: tuple[Tensor, Tensor], how: str, train: bool
) -> None:
    images, targets = batch
    net.train(train)
    next(net.parameters()).requires_grad_(False)
    net(images).sum().backward()
    kept = images.clone(), targets.clone()
    before, identity = snapshot(net), [(id(p), p._version) for p in net.parameters()]
    randomize(net, images, targets, how)
    assert_same(before, snapshot(net))
    assert_same(kept, (images, targets))
    assert identity == [(id(p), p._version) for p in net.parameters()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(net: nn.Module, batch: tuple[Tensor, Tensor], mode: Any) -> None:
    expected = list(parameter_randomization(net, *batch, GradCAM()))
    with mode():
        steps = list(parameter_randomization(net, *(b.clone() for b in batch), GradCAM()))
    for one, two in zip(expected, steps, strict=True):
        assert torch.equal(one.maps, two.maps)
        assert torch.equal(one.ssim, two.ssim)


class Lit(pl.LightningModule):
    """Keeps a tensor with a graph, which can't be copied, and is checked in the middle of a step."""

    def __init__(self, check: bool) -> None:
        super().__init__()
        self.net = SmallNet(classes=4)
        self.check = check
        self.figures: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, targets = batch
        self.kept = self(images)
        loss = F.cross_entropy(self.kept, targets)
        if self.check:
            with pytest.raises(RuntimeError, match="deepcopy"):
                copy.deepcopy(self)
            for step in parameter_randomization(self, images, targets, CAM("net.features")):
                self.figures += step.rank_correlation.tolist()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_a_training_goes_on_as_if_nothing_had_been_checked() -> None:
    images, targets = patches(8, 3)
    modules = []
    for check in (True, False):
        pl.seed_everything(3)
        module = Lit(check)
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(images, targets), batch_size=4))
        modules.append(module)
    assert len(modules[0].figures) == 2 * 2 * 3 * 4
    assert np.mean(modules[0].figures) < 0.9
    assert_same(dict(modules[0].state_dict()), dict(modules[1].state_dict()))


def test_settings_are_refused_at_once(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, targets = batch
    method = GradCAM()
    with pytest.raises(ValueError, match=r"layers names 'features.1', .* are head, features.3, f"):
        parameter_randomization(net, images, targets, method, layers=["features.1"])
    with pytest.raises(ValueError, match=r"layers names a layer twice, got \['head', 'head'\]"):
        parameter_randomization(net, images, targets, method, layers=["head", "head"])
    with pytest.raises(ValueError, match="11 by 11 pixels or more, its window, got 10 by 30"):
        parameter_randomization(net, torch.rand(4, 3, 10, 30), targets, method)
    assert list(parameter_randomization(net, images, targets, method, layers=[])) == []


@pytest.mark.usefixtures("unchecked")
def test_wrong_kinds_are_refused_at_once(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, targets = batch
    wrong: Any = "random"
    with pytest.raises(ValueError, match="mode must be 'cascading' or 'independent', got 'random'"):
        parameter_randomization(net, images, targets, Edges(), mode=wrong)
    with pytest.raises(ValueError, match="same length, got 4 images and 3 targets"):
        parameter_randomization(net, images, targets[:3], Edges())


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_steps_that_are_known_are_skipped(
    mode: Any, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    method = GradCAM("features")
    everything = list(parameter_randomization(net, *batch, method, mode=mode))
    layers = [step.layer for step in everything]
    assert len(layers) == 3
    with count_evaluations(net) as count:
        (last,) = parameter_randomization(net, *batch, method, mode=mode, skip=layers[:2])
    assert count.total == 1 + 2 * 2 * len(batch[0])
    assert last.layer == layers[2]
    assert torch.equal(last.maps, everything[2].maps)
    assert torch.equal(last.rank_correlation, everything[2].rank_correlation)
    with count_evaluations(net) as count:
        assert list(parameter_randomization(net, *batch, method, mode=mode, skip=layers)) == []
    assert count.total == 1
