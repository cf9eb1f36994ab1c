import dataclasses
import math
from typing import Any

import oracles
import pytest
import torch
from conftest import assert_same, snapshot
from torch import Tensor, nn

from lightning_aop import GreedyRanking, RandomMap
from lightning_aop.errors import NonFiniteScoreError
from lightning_aop.metrics import auc, deletion_insertion_curves
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import Constant, GaussianBlur
from lightning_aop.scores import logit, sigmoid

BLUR = GaussianBlur(9, 5.0)
METHOD = GreedyRanking(cells=3, baseline=BLUR)


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    """Sides that three does not divide."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(4, 3, 5, 4, generator=generator).double() * 4 - 2
    images = nn.functional.interpolate(coarse, (40, 32), mode="bicubic")
    return images, torch.tensor([0, 3, 1, 4])


def test_it_is_the_slow_float64_loop(double: nn.Module, pictures: tuple[Tensor, Tensor]) -> None:
    images, targets = pictures
    for cells, size in ((2, None), (3, 7), (4, 1000)):
        method = dataclasses.replace(METHOD, cells=cells, eval_batch_size=size)
        maps = method.explain(double, images, targets)
        for image, blurred, target, found in zip(images, BLUR(images), targets, maps, strict=True):
            expected = oracles.greedy_ranking(double, image, blurred, int(target), cells)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_patches_that_add_up_are_sorted_by_what_they_add() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 14 * 21, 2)).double()
    weight = model[1].weight.detach()[1].view(3, 14, 21)
    image = torch.randn(1, 3, 14, 21, dtype=torch.float64)
    found = GreedyRanking(score=logit, baseline=Constant(0.5)).explain(
        model, image, torch.tensor([1])
    )
    # Patches of 2 x 3 pixels.
    added = (weight * (image[0] - 0.5)).sum(dim=0).unfold(0, 2, 2).unfold(1, 3, 3).sum(dim=(2, 3))
    ranks = added.flatten().argsort().argsort().view(7, 7).double() / 48
    expected = ranks.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)


def test_equal_patches_come_row_by_row() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 2))
    found = GreedyRanking(cells=2).explain(model, torch.ones(1, 3, 6, 6), torch.tensor([0]))
    corners = found[0, ::3, ::3].flatten()
    assert corners.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_it_plays_the_metric_better_than_chance(
    double: nn.Module, pictures: tuple[Tensor, Tensor]
) -> None:
    images, targets = pictures
    overall = []
    for method in (dataclasses.replace(METHOD, cells=4), RandomMap()):
        maps = method.explain(double, images, targets).to(images)
        curves = deletion_insertion_curves(double, images, maps, targets, baseline=BLUR, steps=16)
        deletion, insertion = (auc(curve) for curve in curves)
        overall.append(insertion - deletion)
    assert (overall[0] > overall[1].abs()).all()


@pytest.mark.parametrize("cells", [2, 3, 5])
def test_the_cost_is_as_stated(cells: int, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    n = cells**2
    method = dataclasses.replace(METHOD, cells=cells, eval_batch_size=8)
    with count_evaluations(net) as count:
        method.explain(net, *batch)
    assert (count.forward, count.backward) == (4 * method.evaluations, 0)
    assert method.evaluations == sum(2 * left for left in range(2, n + 1))
    assert GreedyRanking().evaluations == 2448


def test_nothing_depends_on_the_batch(double: nn.Module, pictures: tuple[Tensor, Tensor]) -> None:
    images, targets = pictures
    together = METHOD.explain(double, images, targets)
    single = [METHOD.explain(double, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(single), together, atol=1e-12, rtol=0)
    assert together.amin(dim=(1, 2)).tolist() == [0] * 4
    assert together.amax(dim=(1, 2)).tolist() == [1] * 4
    other = dataclasses.replace(METHOD, score=sigmoid).explain(double, images, targets)
    assert not torch.equal(other, together)


def test_the_model_is_undisturbed_and_what_is_wrong_is_said(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    net.train()
    before = snapshot(net)
    with torch.inference_mode():
        found = METHOD.explain(net, images, targets)
    assert_same(before, snapshot(net))
    assert not found.requires_grad
    with pytest.raises(ValueError, match=r"images of 2 x \d+ pixels can't be cut into 3 x 3"):
        METHOD.explain(net, images[:, :, :2], targets)
    with pytest.raises(ValueError, match="GreedyRanking: cells must be 2 or more, got 1"):
        GreedyRanking(cells=1)
    with pytest.raises(ValueError, match="eval_batch_size must be above 0, got 0"):
        GreedyRanking(eval_batch_size=0)
    head: Any = net.head
    head.bias.data[:] = math.nan
    with pytest.raises(
        NonFiniteScoreError, match=r"score is NaN or infinite for image\(s\) \[0, 1"
    ):
        METHOD.explain(net, images, targets)
