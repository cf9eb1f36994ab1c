import copy
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torchvision
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn

from lightning_aop.errors import NonFiniteScoreError
from lightning_aop.methods.regional_multiscale import RegionalMultiscale
from lightning_aop.methods.rise import RISE
from lightning_aop.methods.superpixels import superpixels
from lightning_aop.methods.xrai import XRAI, merge_segments
from lightning_aop.model.adapter import explaining
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import min_max
from lightning_aop.scores import logit, sigmoid, value

# In pictures of 40 × 32 a minimum of 784 at 224 × 224 is one of 20 pixels.
SMALL: dict[str, Any] = {"steps": 6, "segments": (8, 15, 40), "min_area": 784}
REGIONAL = RegionalMultiscale(segments=(8, 20), fills=3)
METHODS = [XRAI(**SMALL), XRAI(**SMALL, fast=True), RISE(masks=30, cells=4), REGIONAL]


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    return patchwork(4, 3, 40, 32).double(), torch.tensor([0, 3, 1, 4])


def patchwork(count: int, channels: int, height: int, width: int) -> Tensor:
    """Images with smooth patches; plain noise has no superpixels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, channels, 5, 4, generator=generator) * 4 - 2
    noise = torch.rand(count, channels, height, width, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic") + 0.2 * noise


def chelsea() -> np.ndarray:
    """A cat's face, 224 × 224 × 3 in [0, 1]."""
    data = pytest.importorskip("skimage.data")
    picture: np.ndarray = data.chelsea()[38:262, 100:324] / 255
    return picture


def published(
    attribution: np.ndarray, labels: list[np.ndarray], min_area: int, fast: bool
) -> np.ndarray:
    """The merging of the package `saliency`."""
    xrai = pytest.importorskip("saliency.core.xrai")
    parameters = xrai.XRAIParameters(algorithm="fast" if fast else "full")
    parameters.experimental_params["min_pixel_diff"] = min_area
    merged: np.ndarray = xrai.XRAI().GetMask(
        attribution,
        None,
        segments=[runs == label for runs in labels for label in np.unique(runs)],
        base_attribution=attribution,
        extra_parameters=parameters,
    )
    return merged


# Not a list that hangs on a model or its hooks: what a forward does to that is put back.
SIZES: list[int] = []
WITH_GRAPH: list[bool] = []


@contextmanager
def passes(model: nn.Module) -> Iterator[list[int]]:
    """The number of images in each forward."""
    SIZES.clear()
    handle = model.register_forward_hook(lambda m, a, output: SIZES.append(len(output)))
    try:
        yield SIZES
    finally:
        handle.remove()


class Patch(nn.Module):
    """One class likes light in a patch of 10 × 10 pixels, the other dislikes it."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        lit = images[:, 0, 30:40, 10:20].mean(dim=(1, 2)).sin()
        WITH_GRAPH.append(torch.is_grad_enabled())
        return torch.stack([lit, 1 - lit], dim=1)


# --------------------------------------------------------------------------------------------------
# merging


def test_merging_by_hand() -> None:
    attribution = np.array([[9.0, 8, 1, 1, 2, 0], [9, 4, 1, 5, 2, 0]])
    halves = np.array([[4, 4, 4, 7, 7, 7]] * 2)
    columns = np.array([[0, 1, 2, 2, 3, 3]] * 2)
    # The columns have 9, 6, 2 and 1, the halves 16/3 and 5/3. After the 9 and the 6, the left half's
    # rest has 1, less than the third column's 2; then the last column and the right half's rest
    # are the same.
    merged = merge_segments(attribution, [halves, columns], min_area=2)
    np.testing.assert_allclose(merged, [[9, 6, 2, 2, 1, 1]] * 2)
    # By whole segments, the left half comes third, and leaves 3 to the third column.
    merged = merge_segments(attribution, [halves, columns], min_area=2, fast=True)
    np.testing.assert_allclose(merged, [[9, 6, 1, 3, 1, 1]] * 2)
    for fast in (False, True):
        # With four pixels asked for, the first two columns are too small, and the third is once the
        # left half has half of it.
        merged = merge_segments(attribution, [halves, columns], min_area=4, fast=fast)
        np.testing.assert_allclose(merged, [[16 / 3] * 3 + [5 / 3] * 3] * 2)
        # With seven, nothing is merged, and all that is left over has one mean.
        merged = merge_segments(attribution, [halves, columns], min_area=7, fast=fast)
        np.testing.assert_allclose(merged, np.full((2, 6), 3.5))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("min_area", [1, 12, 50])
def test_merging_is_the_published_package_to_the_last_bit(min_area: int, fast: bool) -> None:
    picture = chelsea()[60:124, 40:96]
    labels = [runs - 3 for runs in superpixels(picture, (6, 14, 30, 70))]
    noise = np.random.default_rng(0).standard_normal((8, *picture.shape[:2]))
    smooth = torch.nn.functional.avg_pool2d(torch.from_numpy(noise), 9, 1, 4).numpy()
    attributions = [
        *noise[:3],
        *smooth[:3],
        # Many equal means, which sums kept up to date don't give exactly.
        np.full_like(noise[0], 0.1),
        *(np.round(smooth[3:6] * 10) / 10),
        np.where(smooth[6] > 0, 0.1, 0.3),
        np.maximum(smooth[7], 0),
        # Sums that cancel, of numbers of very different sizes.
        noise[3] * 10.0 ** np.round(20 * smooth[3]),
    ]
    for attribution in attributions:
        expected = published(attribution, labels, min_area, fast)
        assert np.array_equal(
            merge_segments(attribution, labels, min_area=min_area, fast=fast), expected
        )


@pytest.mark.slow
def test_merging_a_real_networks_attribution_is_the_package_and_20_times_faster() -> None:
    picture = chelsea()
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None)
    images = torch.from_numpy(picture).float().movedim(-1, 0)[None] * 4 - 2
    method = XRAI(steps=3)
    with explaining(network, images, torch.tensor([281])) as (classifier, x, t):
        gradients = method._integrated_gradients(classifier, x, t)
    attribution = gradients.amax(dim=1)[0].double().numpy()
    labels = superpixels(picture, method.segments)
    started = time.process_time()
    expected = published(attribution, labels, 50, fast=False)
    theirs = time.process_time() - started
    mine = []
    for _ in range(5):
        started = time.process_time()
        merged = merge_segments(attribution, labels)
        mine.append(time.process_time() - started)
    assert np.array_equal(merged, expected)
    assert theirs >= 20 * statistics.median(mine)
    assert len(np.unique(merged)) > 100


def test_merging_takes_any_dtype_and_changes_nothing() -> None:
    attribution = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    labels = [np.arange(600, dtype=np.uint8).reshape(30, 20) // 10]
    given = attribution.copy(), labels[0].copy()
    merged = merge_segments(attribution, labels, min_area=10)
    assert merged.dtype == np.float64
    assert np.array_equal(
        merged, merge_segments(attribution.astype(np.float64), labels, min_area=10)
    )
    assert np.array_equal(attribution, given[0])
    assert np.array_equal(labels[0], given[1])


def test_merging_refuses_what_it_cannot_merge(unchecked: None) -> None:
    attribution = np.zeros((4, 4))
    with pytest.raises(ValueError, match="merge_segments: min_area must be above 0, got 0"):
        merge_segments(attribution, [], min_area=0)
    with pytest.raises(ValueError, match="labels must hold at least one label map"):
        merge_segments(attribution, [])
    with pytest.raises(ValueError, match=r"labels must have the attribution's shape \(4, 4\), got"):
        merge_segments(attribution, [np.zeros((4, 3), dtype=int)])
    attribution[1, 1] = math.nan
    with pytest.raises(ValueError, match="attribution holds NaN or infinity"):
        merge_segments(attribution, [np.zeros((4, 4), dtype=int)])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_superpixels_follow_an_edge_whatever_the_channels(channels: int) -> None:
    rows, columns = np.mgrid[:60, :48]
    inside = (rows - 25) ** 2 + (columns - 20) ** 2 < 14**2
    image = np.where(inside, 1.3, -0.9)[:, :, None] * np.ones(channels) + 0.2 * np.arange(channels)
    for runs, count in zip(superpixels(image, (12, 40)), (12, 40), strict=True):
        assert runs.shape == (60, 48)
        assert count / 2 <= len(np.unique(runs)) <= count * 1.3
        strays = sum(
            min(inside[runs == label].sum(), (~inside[runs == label]).sum())
            for label in np.unique(runs)
        )
        assert strays <= 0.01 * runs.size


# --------------------------------------------------------------------------------------------------
# XRAI


@pytest.mark.parametrize("fast", [False, True])
def test_xrai_is_the_published_package(
    double: nn.Module, pictures: tuple[Tensor, Tensor], fast: bool
) -> None:
    xrai = pytest.importorskip("saliency.core.xrai")
    images, targets = pictures
    method = XRAI(**SMALL, fast=fast, eval_batch_size=5)
    with explaining(double, images, targets) as (classifier, x, t):
        gradients = method._integrated_gradients(classifier, x, t)
    maps = method.explain(double, images, targets)
    for image, target, gradient, found in zip(images, targets, gradients, maps, strict=True):

        def call(points: np.ndarray, target: int = int(target), **_: Any) -> dict[str, Any]:
            inputs = torch.from_numpy(points).movedim(-1, 1).requires_grad_()
            score = torch.softmax(double(inputs), dim=1)[:, target].sum()
            (gradients,) = torch.autograd.grad(score, inputs)
            return {"INPUT_OUTPUT_GRADIENTS": gradients.movedim(1, -1).numpy()}

        parameters = xrai.XRAIParameters(
            steps=6, return_ig_attributions=True, algorithm="fast" if fast else "full"
        )
        parameters.experimental_params["min_pixel_diff"] = 20
        pixels = image.movedim(0, -1).numpy()
        runs = superpixels(pixels, method.segments)
        theirs = xrai.XRAI().GetMaskWithDetails(
            pixels,
            call,
            segments=[labels == label for labels in runs for label in np.unique(labels)],
            extra_parameters=parameters,
        )
        # The package adds gradients up in float32.
        expected = torch.from_numpy(np.mean(theirs.ig_attribution, axis=0)).movedim(-1, 0)
        allowed = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, atol=allowed, rtol=0)
        expected = min_max(torch.from_numpy(theirs.attribution_mask)[None])[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert len(found.unique()) > 5


def test_xrai_of_a_linear_model_has_a_closed_form() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 30, 2)).double()
    weight = model[1].weight.detach()[1].view(3, 20, 30)
    image = torch.randn(1, 3, 20, 30, dtype=torch.float64)
    middle = (image.min() + image.max()) / 2
    attribution = (weight * (image[0] - middle)).amax(dim=0)
    labels = superpixels(image[0].movedim(0, -1).numpy(), SMALL["segments"])
    expected = torch.from_numpy(merge_segments(attribution.numpy(), labels, min_area=9))
    found = XRAI(**SMALL, score=logit).explain(model, image, torch.tensor([1]))
    torch.testing.assert_close(found, min_max(expected[None]), atol=1e-10, rtol=0)


def test_a_small_picture_keeps_its_regions(net: nn.Module) -> None:
    images = patchwork(2, 3, 32, 32)
    maps = XRAI(steps=4).explain(net, images, torch.tensor([0, 3]))
    assert all(len(found.unique()) > 5 for found in maps)


def test_a_constant_image_has_no_regions(double: nn.Module, pictures: Any) -> None:
    images, targets = pictures
    images[1] = 0.7
    for fast in (False, True):
        maps = XRAI(**SMALL, fast=fast).explain(double, images, targets)
        assert not maps[1].any()
        assert maps[[0, 2, 3]].amax(dim=(1, 2)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("method", [XRAI(), RegionalMultiscale()])
def test_without_scikit_image(
    method: Any, net: nn.Module, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with (
        count_evaluations(net) as count,
        pytest.raises(
            ImportError, match=r'superpixels need .*pip install "lightning-aop\[methods\]"'
        ),
    ):
        method.explain(net, *batch)
    assert count.total == 0


# --------------------------------------------------------------------------------------------------
# RISE


@pytest.mark.parametrize("cells", [3, 7])
def test_rise_is_the_slow_float64_loop(
    double: nn.Module, pictures: tuple[Tensor, Tensor], cells: int
) -> None:
    images, targets = pictures
    method = RISE(masks=25, cells=cells, probability=0.3, seed=8, eval_batch_size=7)
    maps = method.explain(double, images, targets)
    generator = torch.Generator().manual_seed(8)
    grids = torch.rand(25, cells, cells, generator=generator) < 0.3
    tops = torch.randint(math.ceil(40 / cells), (25,), generator=generator).tolist()
    lefts = torch.randint(math.ceil(32 / cells), (25,), generator=generator).tolist()
    for i in range(4):
        expected = oracles.rise(
            double,
            images[i],
            int(targets[i]),
            list(grids),
            list(zip(tops, lefts, strict=True)),
            0.3,
        )
        expected = min_max(expected[None])[0]
        torch.testing.assert_close(maps[i], expected, atol=1e-12, rtol=0)


def test_rise_finds_the_patch_that_the_score_depends_on() -> None:
    found = RISE(masks=1500, score=logit).explain(
        Patch(), torch.ones(2, 1, 56, 42), torch.tensor([0, 1])
    )
    patch, far = found[:, 30:40, 10:20], found[:, :20, 26:]
    assert patch[0].max() == 1
    assert patch[1].min() == 0
    assert patch[0].mean() > 0.75
    assert far[0].mean() < 0.4
    # The other class loses by the patch, and all the rest is worth the same to it.
    assert patch[1].mean() < 0.25
    assert far[1].mean() > 0.6


def test_rise_draws_the_same_masks_whatever_the_precision(double: nn.Module, pictures: Any) -> None:
    images, targets = pictures
    method = RISE(masks=40)
    wide = method.explain(double, images, targets)
    narrow = method.explain(copy.deepcopy(double).float(), images.float(), targets)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, atol=1e-4, rtol=0)
    assert not torch.equal(RISE(masks=40, seed=1).explain(double, images, targets), wide)


# --------------------------------------------------------------------------------------------------
# regional multi-scale


def fills_of(method: RegionalMultiscale, like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(method.seed)
    return list(torch.randn(method.fills, *like.shape, generator=generator).to(like))


@pytest.mark.parametrize("examples", [20, 100_000])
def test_regional_multiscale_is_the_slow_float64_loop(
    double: nn.Module, pictures: tuple[Tensor, Tensor], examples: int
) -> None:
    images, targets = pictures
    method = dataclasses.replace(REGIONAL, seed=3, examples=examples, eval_batch_size=7)
    maps = method.explain(double, images, targets)
    for image, target, found in zip(images, targets, maps, strict=True):
        expected = oracles.regional_multiscale(
            double,
            image,
            int(target),
            [torch.from_numpy(m) for m in superpixels(image.movedim(0, -1).numpy(), (8, 20))],
            fills_of(method, image),
            examples,
        )
        assert expected.min() < 0  # of which the map knows nothing
        expected = min_max(expected.clamp_min(0)[None])[0]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert sum(len(found.unique()) > 5 for found in maps) >= 3


def test_regional_multiscale_finds_the_patch_that_the_score_depends_on() -> None:
    images = patchwork(2, 1, 56, 42)
    images[:, :, 30:40, 10:20] = 1.5
    found = RegionalMultiscale(segments=(20, 50)).explain(Patch(), images, torch.tensor([0, 1]))
    # Without the patch the one class falls from its highest score, and the other rises.
    assert found[0, 31:39, 11:19].mean() > 0.9
    assert found[0, :20, 26:].max() < 0.1
    assert not found[1, 31:39, 11:19].any()


def test_the_draws_are_the_seeds_whatever_the_precision(double: nn.Module, pictures: Any) -> None:
    images, targets = pictures
    wide = REGIONAL.explain(double, images, targets)
    narrow = REGIONAL.explain(copy.deepcopy(double).float(), images.float(), targets)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, atol=1e-3, rtol=0)
    assert not torch.equal(
        dataclasses.replace(REGIONAL, seed=1).explain(double, images, targets), wide
    )


def test_what_the_fills_leave_as_it_is_has_no_relevance(double: nn.Module, pictures: Any) -> None:
    images, targets = pictures
    images[1] = torch.tensor([0.7, -0.3, 0.1])[:, None, None]
    # A frame of one colour is filled with that colour: only what lies inside can be missed.
    images[2] = 0.3
    images[2, :, 14:26, 12:20] = patchwork(1, 3, 12, 8)[0].double()

    class Uneven(nn.Module):
        """What networks do by rounding: an image's score hangs on how many are in the pass."""

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = double(images)
            return logits + 1e-6 * len(images) * torch.arange(5)

    method = dataclasses.replace(REGIONAL, segments=(40, 80))
    maps = method.explain(Uneven(), images, targets)
    assert not maps[1].any()
    frame, pixels = np.ones((40, 32), dtype=bool), images[2].movedim(0, -1).numpy()
    for runs in superpixels(pixels, method.segments):
        within = np.unique(runs[(pixels != 0.3).any(axis=2)])
        frame &= ~np.isin(runs, within)
    assert frame.sum() > 100
    assert maps[2].any()
    assert not maps[2, torch.from_numpy(frame)].any()


@pytest.mark.parametrize("score", [logit, value])
def test_a_score_that_is_no_probability_is_compared_as_it_is(score: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 30, 4)).double()
    weight = model[1].weight.detach()[1].view(3, 20, 30)
    image = patchwork(1, 3, 20, 30).double()
    border = torch.ones(20, 30, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    mean, spread = (of(image[0, :, border], dim=1) for of in (torch.mean, torch.std))
    spread = spread * ((border.sum() - 1) / border.sum()).sqrt()
    noise = torch.stack(fills_of(REGIONAL, image[0])).mean(dim=0)
    lost = weight * (image[0] - mean[:, None, None] - spread[:, None, None] * noise)
    expected = torch.zeros(20, 30, dtype=torch.float64)
    for runs in superpixels(image[0].movedim(0, -1).numpy(), REGIONAL.segments):
        for label in np.unique(runs):
            inside = torch.from_numpy(runs == label)
            expected[inside] += lost[:, inside].sum()
    method = dataclasses.replace(REGIONAL, score=score)
    found = method.explain(model, image, torch.tensor([1]))
    torch.testing.assert_close(found, min_max(expected.clamp_min(0)[None]), atol=1e-9, rtol=0)


def test_a_multilabel_model_has_two_outcomes_for_each_class(
    double: nn.Module, pictures: Any
) -> None:
    """A class and all others: the odds of sigmoid are those of softmax over two logits, z and 0."""
    images, targets = pictures

    class Two(nn.Module):
        def __init__(self, column: int) -> None:
            super().__init__()
            self.network, self.column = double, column

        def forward(self, images: Tensor) -> Tensor:
            z = self.network(images)[:, self.column]
            return torch.stack([z, torch.zeros_like(z)], dim=1)

    found = dataclasses.replace(REGIONAL, score=sigmoid).explain(double, images, targets)
    for i, target in enumerate(targets.tolist()):
        own = REGIONAL.explain(Two(target), images[i : i + 1], torch.tensor([0]))
        torch.testing.assert_close(found[i : i + 1], own, atol=1e-9, rtol=0)


def test_the_cost_of_regional_multiscale_is_that_of_its_regions(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    regions = sum(
        len(np.unique(runs))
        for image in images
        for runs in superpixels(image.movedim(0, -1).numpy(), REGIONAL.segments)
    )
    with count_evaluations(net) as count, passes(net) as sizes:
        dataclasses.replace(REGIONAL, eval_batch_size=7).explain(net, images, targets)
    assert (count.forward, count.backward) == (4 + 3 * regions, 0)
    assert sizes[0] == 4
    assert set(sizes[1:-1]) == {7}
    assert RegionalMultiscale(segments=(10, 20), fills=5).evaluations == 121


# --------------------------------------------------------------------------------------------------
# all of them


@pytest.mark.parametrize("method", METHODS)
def test_nothing_depends_on_the_batch_or_the_chunks(
    method: Any, double: nn.Module, pictures: tuple[Tensor, Tensor]
) -> None:
    images, targets = pictures
    together = method.explain(double, images, targets)
    assert together.shape == images[:, 0].shape
    assert together.amin(dim=(1, 2)).tolist() == [0] * 4
    assert together.amax(dim=(1, 2)).tolist() == [1] * 4
    assert torch.equal(method.explain(double, images, targets), together)
    single = torch.cat(
        [method.explain(double, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    )
    torch.testing.assert_close(single, together, atol=1e-9, rtol=0)
    for size in (3, 7, 1000):
        chunked = dataclasses.replace(method, eval_batch_size=size)
        torch.testing.assert_close(
            chunked.explain(double, images, targets), together, atol=1e-9, rtol=0
        )


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        (XRAI(**SMALL, eval_batch_size=7), 2 * 6 - 1, 2 * 6 - 1),
        (XRAI(steps=2, eval_batch_size=7), 3, 3),
        (RISE(masks=31, eval_batch_size=7), 31, 0),
    ],
)
def test_the_cost_is_as_stated_and_every_pass_is_full(
    method: Any, forward: int, backward: int, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    with count_evaluations(net) as count, passes(net) as sizes:
        method.explain(net, *batch)
    assert (count.forward, count.backward) == (4 * forward, 4 * backward)
    assert set(sizes[:-1]) == {7}
    assert sizes[-1] <= 7


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_undisturbed(method: Any, net: nn.Module, batch: Any) -> None:
    images, targets = batch
    net.train()
    next(net.parameters()).requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    given = images.clone(), targets.clone()
    before = snapshot(net)
    found = method.explain(net, images, targets)
    assert_same(before, snapshot(net))
    assert not found.requires_grad
    assert_same(given, (images, targets))
    with torch.inference_mode():
        again = method.explain(net, images.clone(), targets.clone())
    with torch.no_grad():
        assert torch.equal(method.explain(net, images, targets), again)
    assert torch.equal(again, found)
    net.head.bias.data[:] = math.nan
    before = snapshot(net)
    with pytest.raises(
        NonFiniteScoreError, match=r"score is NaN or infinite for image\(s\) \[0, 1"
    ):
        method.explain(net, images, targets)
    with pytest.raises(ValueError, match=r"lie in 0\.\.4"):
        method.explain(net, images, targets + 2)
    assert len(before["buffers"]) == len(snapshot(net)["buffers"])
    assert before["modes"] == snapshot(net)["modes"]
    assert before["hooks"] == snapshot(net)["hooks"]
    assert_same(before["rng"], snapshot(net)["rng"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_number_of_channels_in_half_precision(method: Any, channels: int) -> None:
    torch.manual_seed(0)
    network = SmallNet(channels=channels).eval().bfloat16()
    images = patchwork(2, channels, 36, 50)
    for given in (images, images.bfloat16()):
        maps = method.explain(network, given, torch.tensor([2, 0]))
        assert maps.shape == (2, 36, 50)
        assert maps.dtype == torch.float32
        assert maps.isfinite().all()
        assert maps.amin(dim=(1, 2)).tolist() == [0, 0]
        assert maps.amax(dim=(1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing_but_the_model(method: Any) -> None:
    model, images, targets = Patch(), patchwork(2, 3, 48, 36), torch.tensor([0, 1])
    WITH_GRAPH.clear()
    plain = method.explain(model, images, targets)
    assert set(WITH_GRAPH) == {isinstance(method, XRAI)}
    # Nothing in this model is computed in half precision under autocast.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.explain(model, images, targets), plain)
    assert plain.any()


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_score_with_a_finite_gradient_is_refused(
    method: Any, net: nn.Module, batch: Any
) -> None:
    head: Any = net.head
    head.bias.data[3] = math.inf  # of the second image's class
    with pytest.raises(NonFiniteScoreError, match=r"class score is .* image\(s\) \[1\] "):
        dataclasses.replace(method, score=logit).explain(net, *batch)


def test_multilabel_score(double: nn.Module, pictures: tuple[Tensor, Tensor]) -> None:
    for method in (XRAI(**SMALL), RISE(masks=20), REGIONAL):
        one = method.explain(double, *pictures)
        other = dataclasses.replace(method, score=sigmoid).explain(double, *pictures)
        assert not torch.allclose(one, other, atol=1e-3)


def test_settings_are_refused_by_name() -> None:
    for refused, message in (
        (lambda: XRAI(steps=1), "XRAI: steps must be 2 or more, the ends of the path, got 1"),
        (lambda: XRAI(segments=()), r"XRAI: segments must be .* got \(\)"),
        (lambda: XRAI(segments=(50, 0)), r"XRAI: segments must be .* got \(50, 0\)"),
        (lambda: XRAI(min_area=0), "XRAI: min_area must be above 0, got 0"),
        (lambda: XRAI(eval_batch_size=0), "XRAI: eval_batch_size must be above 0, got 0"),
        (
            lambda: RegionalMultiscale(segments=(50, -1)),
            r"RegionalMultiscale: segments must be .* got \(50, -1\)",
        ),
        (
            lambda: RegionalMultiscale(fills=0),
            "RegionalMultiscale: fills must be above 0, got 0",
        ),
        (
            lambda: RegionalMultiscale(examples=-1),
            "RegionalMultiscale: examples must be above 0, got -1",
        ),
        (
            lambda: RegionalMultiscale(eval_batch_size=0),
            "RegionalMultiscale: eval_batch_size must be above 0, got 0",
        ),
        (lambda: RISE(masks=0), "RISE: masks must be above 0, got 0"),
        (lambda: RISE(cells=-7), "RISE: cells must be above 0, got -7"),
        (lambda: RISE(eval_batch_size=0), "RISE: eval_batch_size must be above 0, got 0"),
        (lambda: RISE(probability=0.0), "RISE: probability must lie between 0 and 1, got 0.0"),
        (lambda: RISE(probability=1.0), "RISE: probability must lie between 0 and 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_the_defaults_are_the_papers() -> None:
    assert (XRAI().steps, XRAI().segments) == (100, (50, 100, 150, 250, 500))
    assert (XRAI().min_area, XRAI().fast) == (50, False)
    assert (RISE().masks, RISE().cells, RISE().probability) == (4000, 7, 0.5)
