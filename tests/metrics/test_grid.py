"""Grid pointing against a slow loop, and for a network of which it is known what it sees."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_aop import CentreGaussian, GradCAM, HiResCAM
from lightning_aop.metrics import GridPointing, grid_pointing, tiled
from lightning_aop.metrics.grid import choose_fours
from lightning_aop.scores import logit, softmax


def slow_share(map_: Tensor, quarter: int) -> float:
    height, width = map_.shape
    inside = total = 0.0
    for y in range(height):
        for x in range(width):
            total += float(map_[y, x])
            if (y >= height // 2) == (quarter >= 2) and (x >= width // 2) == bool(quarter % 2):
                inside += float(map_[y, x])
    return inside / total if total else 0.0


def test_shares_are_those_of_the_slow_loop() -> None:
    maps = torch.rand(6, 8, 12)
    maps[5] = 0
    quarters = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = [slow_share(m, q) for m, q in zip(maps, quarters.tolist(), strict=True)]
    torch.testing.assert_close(grid_pointing(maps, quarters), torch.tensor(expected))
    flat = grid_pointing(torch.ones(4, 8, 12), torch.arange(4))
    assert flat.tolist() == [0.25] * 4
    assert grid_pointing(maps[5:], quarters[5:]).tolist() == [0]


def test_images_lie_in_row_major_order() -> None:
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 4)
    grid = tiled(images, torch.tensor([[4, 0, 2, 1]]))[0, 0]
    assert grid.shape == (4, 8)
    assert grid[:2, :4].unique().tolist() == [4]
    assert grid[:2, 4:].unique().tolist() == [0]
    assert grid[2:, :4].unique().tolist() == [2]
    assert grid[2:, 4:].unique().tolist() == [1]


def test_four_of_different_classes_and_the_surest_first() -> None:
    targets = [0, 0, 1, 2, 3, 3, 1, 2, 0, 4]
    scores = [0.6, 0.9, 0.8, 0.7, 0.55, 0.95, 0.7, 0.6, 0.4, 0.3]
    assert choose_fours(targets, scores, 0.5).tolist() == [[5, 1, 2, 3], [6, 0, 7, 4]]
    assert choose_fours(targets[:4], scores[:4], 0.5).shape == (0, 4)
    assert choose_fours(targets, scores, 0.75).shape == (0, 4)


class Colours(nn.Module):
    """The logit of a class is the mean of a channel: a pixel is all that each cell sees."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.seen = nn.Conv2d(classes, classes, 1, bias=False)
        self.seen.weight.data = 40 * torch.eye(classes)[:, :, None, None]

    def forward(self, images: Tensor) -> Tensor:
        return self.seen(images).mean(dim=(2, 3))


def test_a_network_that_sees_single_pixels_has_a_closed_form() -> None:
    # The heat of class c is channel c, so the share is that of the channel's sum in its own image.
    amounts = torch.tensor(
        [[1.0, 0.1, 0.2, 0.0], [0.3, 1.0, 0.0, 0.1], [0.0, 0.2, 0.9, 0.1], [0.2, 0.1, 0.1, 0.8]]
    )
    images = amounts[:, :, None, None] * torch.rand(4, 1, 6, 10) * 2
    images[:, :, 0, 0] = 0  # which the map's min-max keeps
    sums = images.sum(dim=(2, 3))
    images = (
        images * (amounts / sums.clamp_min(1e-9))[:, :, None, None] * 60
    )  # of these means exactly
    expected = (amounts.diag() / amounts.sum(dim=0)).mean()
    metric = GridPointing(HiResCAM("seen"), least=0.5)
    metric.update(Colours(), images, torch.arange(4))
    assert metric.total == 4
    torch.testing.assert_close(metric.compute(), expected)


def test_updates_are_the_slow_loop_over_all_fours() -> None:
    model = Colours(5)
    images = torch.rand(24, 5, 16, 12) * torch.rand(24, 5, 1, 1)
    with torch.no_grad():
        logits = model(images)
        targets = logits.argmax(dim=1)
        scores = softmax(logits, targets)
    assert len(targets.unique()) >= 4, "the test needs four classes"
    method, shares = GradCAM("seen"), []
    left = sorted(range(24), key=lambda row: -float(scores[row]))
    left = [row for row in left if scores[row] > 0.5]
    while True:
        four: list[int] = []
        for row in left:
            if len(four) < 4 and all(targets[row] != targets[other] for other in four):
                four.append(row)
        if len(four) < 4:
            break
        left = [row for row in left if row not in four]
        a, b, c, d = (images[row] for row in four)
        grid = torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1)
        for quarter, row in enumerate(four):
            map_ = method.explain(model, grid[None], targets[row : row + 1])[0]
            shares.append(slow_share(map_, quarter))
    metric = GridPointing(method)
    metric.update(model, images, targets)
    assert metric.total == len(shares) >= 4
    assert float(metric.compute()) == pytest.approx(sum(shares) / len(shares), abs=1e-4)
    blind = GridPointing(CentreGaussian())
    blind.update(model, images, targets)
    assert float(blind.compute()) == pytest.approx(0.25, abs=1e-4)


def test_nothing_is_tiled_without_four_sure_classes() -> None:
    metric = GridPointing(GradCAM())
    metric.update(Colours(), torch.zeros(4, 4, 8, 8), torch.arange(4))
    assert metric.compute().isnan()
    low = GridPointing(HiResCAM("seen"), score=logit, least=-1)
    low.update(Colours(), torch.zeros(4, 4, 8, 8), torch.arange(4))
    assert low.total == 4


def test_what_is_no_grid_is_refused(unchecked: Any) -> None:
    with pytest.raises(ValueError, match="even sides"):
        grid_pointing(torch.rand(1, 5, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"quarters lie in 0\.\.3"):
        grid_pointing(torch.rand(1, 4, 4), torch.tensor([4]))
    numbers: Any = [0]
    with pytest.raises(TypeError, match=r"quarters must be a torch\.Tensor, got list: convert it"):
        grid_pointing(torch.rand(1, 4, 4), numbers)
    with pytest.raises(ValueError, match=r"maps must have shape \[B, H, W\].* \[1, 1, 4, 4\]"):
        grid_pointing(torch.rand(1, 1, 4, 4), torch.tensor([0]))


def test_a_batch_that_fits_no_model_is_refused(unchecked: Any) -> None:
    metric, images, targets = GridPointing(GradCAM()), torch.zeros(4, 4, 8, 8), torch.arange(4)
    wrong: Any
    for wrong in (targets.tolist(), targets.numpy(), None):
        with pytest.raises(TypeError, match=r"targets must be a torch\.Tensor, got"):
            metric.update(Colours(), images, wrong)
    wrong = images.numpy()
    with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got ndarray"):
        metric.update(Colours(), wrong, targets)
    with pytest.raises(ValueError, match="same length, got 4 images and 3 targets"):
        metric.update(Colours(), images, targets[:3])
    for shift, shown in ((-2, r"\[-2, -1\]"), (1, r"\[4\]")):
        with pytest.raises(ValueError, match=rf"0\.\.3, the classes of the model, got {shown}"):
            metric.update(Colours(), images, targets + shift)
    wrong = "softmax"
    with pytest.raises(TypeError, match=r"score must be .*scores\.softmax, got 'softmax'"):
        GridPointing(GradCAM(), score=wrong).update(Colours(), images, targets)
    assert metric.total == 0
