"""ROAD and infidelity against the published code: grad-cam's, captum's, and slow loops."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from lightning_aop import GradCAM
from lightning_aop.data.images import Preprocess, read_image
from lightning_aop.metrics import ROAD, Infidelity, infidelity, road
from lightning_aop.metrics.judges import impute, random_squares
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import Constant, GaussianBlur
from lightning_aop.scores import logit, sigmoid, softmax


def slow_imputation(image: Tensor, missing: Tensor) -> Tensor:
    """Solve the equations of the missing pixels as one dense system."""
    height, width = missing.shape
    places = [(y, x) for y in range(height) for x in range(width) if missing[y, x]]
    number = {place: n for n, place in enumerate(places)}
    matrix = np.zeros((len(places), len(places)))
    right = np.zeros((len(places), len(image)))
    for n, (y, x) in enumerate(places):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near = (y + dy, x + dx)
                inside = 0 <= near[0] < height and 0 <= near[1] < width
                if (dy, dx) == (0, 0) or not inside:
                    continue
                weight = 1 / 12 if dy and dx else 1 / 6
                matrix[n, n] += weight
                if near in number:
                    matrix[n, number[near]] -= weight
                else:
                    right[n] += weight * image[:, near[0], near[1]].numpy()
    found = image.clone()
    for place, values in zip(places, np.linalg.solve(matrix, right), strict=True):
        found[:, place[0], place[1]] = torch.from_numpy(values).float()
    return found


def test_imputation_is_the_dense_solution() -> None:
    images = torch.randn(3, 2, 9, 7)
    missing = torch.rand(3, 9, 7) > 0.3
    missing[1, :5] = True
    missing[2] = False
    found = impute(images, missing)
    for image, holes, each in zip(images[:2], missing[:2], found[:2], strict=True):
        torch.testing.assert_close(each, slow_imputation(image, holes), atol=2e-3, rtol=0)
    assert torch.equal(found[2], images[2])
    with pytest.raises(ValueError, match="nothing is left of an image"):
        impute(images, torch.ones_like(missing))


def grad_cam_road(model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor) -> Tensor:
    from pytorch_grad_cam.metrics import perturbation_confidence as their
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    chosen = [ClassifierOutputSoftmaxTarget(int(t)) for t in targets]
    total = np.zeros(len(images), dtype=np.float64)
    for percentile in range(10, 100, 10):
        for sign, kind in (
            (1, their.RemoveLeastRelevantFirst),
            (-1, their.RemoveMostRelevantFirst),
        ):
            removal = kind(percentile, NoisyLinearImputer(noise=0))
            judge = their.PerturbationConfidenceMetric(removal)
            total += sign * judge(images, maps.double().numpy(), chosen, model)
    return torch.from_numpy(total / 18).float()


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # theirs, of NumPy 2
def test_road_is_grad_cams(net: nn.Module) -> None:
    pytest.importorskip("pytorch_grad_cam")
    net.head.weight.data *= 20  # type: ignore[operator, union-attr]
    images = torch.rand(4, 3, 20, 16)
    images[:, :, 5:12, 4:11] += 3
    maps, targets = images.mean(dim=1), torch.tensor([0, 3, 1, 4])
    found = road(net, images, maps, targets, noise=0)
    theirs = grad_cam_road(net, images, maps, targets)
    torch.testing.assert_close(found, theirs, atol=1e-3, rtol=0)
    assert found.abs().amax() > 0.015
    opposite = road(net, images, -maps, targets, noise=0)
    torch.testing.assert_close(found, -opposite, atol=1e-4, rtol=0)
    noisy = road(net, images, maps, targets, noise=0.05)
    assert not torch.equal(noisy, found)
    alone = road(net, images[1:2], maps[1:2], targets[1:2], noise=0.05)
    torch.testing.assert_close(noisy[1:2], alone, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_road_of_20_photos_is_grad_cams(real_data: Path) -> None:
    pytest.importorskip("pytorch_grad_cam")
    model = squeezenet1_1()
    state = torch.load(real_data / "weights" / "squeezenet1_1.pth", weights_only=True)
    model.load_state_dict(state)
    model.eval()
    with (real_data / "photos" / "labels.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)][:20]
    preprocess = Preprocess(size=96)
    photos = real_data / "photos"
    images = torch.stack([preprocess(read_image(photos / row["file"])) for row in rows])
    targets = torch.tensor([int(row["class_index"]) for row in rows])
    # Without ties, which the two break in different ways.
    maps = GradCAM().explain(model, images, targets)
    maps += 1e-4 * torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    found = road(model, images, maps, targets, noise=0)
    theirs = grad_cam_road(model, images, maps, targets)
    torch.testing.assert_close(found, theirs, atol=5e-3, rtol=0)
    assert found.mean() > 0.02


def slow_infidelity(
    model: nn.Module, image: Tensor, map_: Tensor, target: int, score: Any, squares: Tensor
) -> float:
    blurred = GaussianBlur()(image[None])[0]

    def value(picture: Tensor) -> float:
        with torch.no_grad():
            return float(score(model(picture[None]), torch.tensor([target])))

    heats = [float(map_[square].sum()) for square in squares]
    falls = [value(image) - value(torch.where(s, blurred, image)) for s in squares]
    products = sum(h * f for h, f in zip(heats, falls, strict=True))
    best = max(products / sum(h * h for h in heats), 0.0)
    return sum((best * h - f) ** 2 for h, f in zip(heats, falls, strict=True)) / len(falls)


@pytest.mark.parametrize("score", [softmax, sigmoid, logit])
def test_infidelity_is_the_slow_loop(net: nn.Module, batch: Any, score: Any) -> None:
    images, targets = batch
    maps = torch.rand(4, 40, 32)
    squares = random_squares((40, 32), 12, 5)
    found = infidelity(net, images, maps, targets, score=score, samples=12, seed=5)
    for i in range(4):
        expected = slow_infidelity(net, images[i], maps[i], int(targets[i]), score, squares)
        assert float(found[i]) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_infidelity_is_captums(net: nn.Module, batch: Any) -> None:
    metrics = pytest.importorskip("captum.metrics")
    images, targets = batch
    maps = images.mean(dim=1)
    net.head.weight.data *= 20  # type: ignore[operator, union-attr]
    squares = random_squares((40, 32), 20, 0)
    kwargs: dict[str, Any] = {"samples": 20, "baseline": Constant(0.0)}
    found = infidelity(net, images, maps, targets, **kwargs)
    for i in range(4):
        drawn = iter(squares)

        def perturb(inputs: Tensor, drawn: Any = drawn) -> tuple[Tensor, Tensor]:
            chosen = torch.stack([next(drawn) for _ in range(len(inputs))])[:, None]
            # Each channel has a third of the map, so that a square has the sum of the map.
            return chosen.expand_as(inputs).float(), torch.where(chosen, 0.0, inputs)

        theirs = metrics.infidelity(
            lambda x: net(x).softmax(dim=1),
            perturb,
            images[i : i + 1],
            (maps[i : i + 1, None] / 3).expand(1, 3, -1, -1),
            target=int(targets[i]),
            n_perturb_samples=20,
            normalize=True,
        )
        heats = (squares.float().flatten(1) @ maps[i].flatten()).tolist()
        assert all(heats)
        # Theirs lets a scale be negative, for maps that are turned round.
        turned = infidelity(net, images[i : i + 1], -maps[i : i + 1], targets[i : i + 1], **kwargs)
        best = torch.minimum(found[i : i + 1], turned)
        torch.testing.assert_close(best, theirs.detach(), atol=1e-6, rtol=1e-3)


def test_what_makes_the_score_fall_is_the_best_map_and_a_blank_one_explains_nothing() -> None:
    class Weighed(nn.Module):
        """Its logit is a weighted sum of the pixels, so that the fall of a region is a sum."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.rand(16, 16))

        def forward(self, images: Tensor) -> Tensor:
            total = (images.mean(dim=1) * self.weights).sum(dim=(1, 2))
            return torch.stack([total, torch.zeros_like(total)], dim=1)

    model, images = Weighed(), torch.ones(1, 3, 16, 16)
    kwargs: dict[str, Any] = {"score": logit, "baseline": Constant(0.0)}
    zero = torch.tensor([0])
    exact = infidelity(model, images, model.weights.detach()[None], zero, **kwargs)
    scaled = infidelity(model, images, 0.01 * model.weights.detach()[None], zero, **kwargs)
    blank = infidelity(model, images, torch.zeros(1, 16, 16), zero, **kwargs)
    squares = random_squares((16, 16), 64, 0)
    falls = torch.stack([model.weights.detach()[square].sum() for square in squares])
    torch.testing.assert_close(blank, falls.square().mean()[None], atol=1e-3, rtol=1e-4)
    assert exact < 1e-6 * blank
    assert scaled < 1e-6 * blank


def test_costs_and_refusals(net: nn.Module, batch: Any, unchecked: None) -> None:
    images, targets = batch
    maps = torch.rand(4, 40, 32)
    for metric in (ROAD(shares=(0.2, 0.5)), Infidelity(samples=7)):
        with count_evaluations(net) as count:
            metric.update(net, images, maps, targets)
        assert count.total == 4 * metric.evaluations_per_image
    for shares in ((), (0.0,), (0.5, 1.0)):
        with pytest.raises(ValueError, match="shares must lie between 0 and 1"):
            road(net, images, maps, targets, shares=shares)
    wrong: dict[str, Any]
    for wrong in ({"shares": (0, 0.5)}, {"shares": ()}, {"noise": -1.0}, {"eval_batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ROAD(**wrong)
    with pytest.raises(TypeError, match="samples must be a whole number"):
        Infidelity(samples=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples must be above 0"):
        infidelity(net, images, maps, targets, samples=0)


JUDGES = [road, infidelity]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("shape", [(4, 20, 16), (4, 1, 40, 32), (2, 40, 32), (1, 40, 32)])
def test_maps_of_another_shape_are_refused(
    judge: Any, shape: tuple[int, ...], net: nn.Module, batch: Any, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=r"maps must be one \[H, W\] map for each image"):
        judge(net, batch[0], torch.rand(shape), batch[1])


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_maps_without_values_or_order_are_refused(
    judge: Any, value: float, net: nn.Module, batch: Any, unchecked: None
) -> None:
    maps = torch.rand(4, 40, 32)
    maps[2, 3, 3] = value
    if judge is road and value == torch.inf:  # which comes first
        assert road(net, batch[0], maps, batch[1], shares=(0.5,)).isfinite().all()
        return
    with pytest.raises(ValueError, match="maps hold NaN"):
        judge(net, batch[0], maps, batch[1])
    with pytest.raises(TypeError, match=r"maps must be a torch\.Tensor, got ndarray"):
        judge(net, batch[0], maps.numpy(), batch[1])


@pytest.mark.sample(5)
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("of_model", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_maps", [torch.float16, torch.float32, torch.float64])
def test_maps_and_models_of_any_precision_are_judged_alike(
    judge: Any, of_model: torch.dtype, of_maps: torch.dtype, net: nn.Module, batch: Any
) -> None:
    net.head.weight.data *= 20  # type: ignore[operator, union-attr]
    images, targets = batch
    # Values that float16 holds, too, without ties.
    maps = torch.stack([torch.randperm(40 * 32).view(40, 32) for _ in range(4)]) / 1024
    expected = judge(net, images, maps, targets)
    found = judge(net.to(of_model), images.to(of_model), maps.to(of_maps), targets)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_heat_of_a_square_alone(dtype: torch.dtype) -> None:
    class Weighed(nn.Module):
        """Its logit is a sum of the pixels, which no autocast touches."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.rand(16, 16))

        def forward(self, images: Tensor) -> Tensor:
            total = (images[:, 0] * self.weights).sum(dim=(1, 2))
            return torch.stack([total, torch.zeros_like(total)], dim=1)

    model, images, zero = Weighed(), torch.ones(1, 3, 16, 16), torch.tensor([0])
    maps = model.weights.detach()[None]
    with torch.autocast("cpu", dtype):
        found = infidelity(model, images, maps, zero, score=logit, baseline=Constant(0.0))
    assert found < 1e-8
