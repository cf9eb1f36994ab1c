"""Curves relative to the scores of the whole and of the blurred image, which sureness can't inflate."""

from typing import Any

import matplotlib as mpl
import oracles
import pytest
import torch
from conftest import SmallNet
from torch import Tensor, nn

from lightning_aop import GradCAM, LayerCAM, WGradCAM
from lightning_aop.methods.controls import CentreGaussian, EdgeDetector, RandomMap
from lightning_aop.metrics import (
    DeletionAUC,
    Faithfulness,
    InsertionAUC,
    OverallAUC,
    auc,
    deletion_curve,
    deletion_insertion_curves,
    estimate_curves,
    insertion_curve,
)
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import Constant, GaussianBlur
from lightning_aop.scores import Score, logit, sigmoid, softmax


class Scaled(nn.Module):
    """The same network, surer of itself or less so."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.net(images)
        return logits


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return logit(logits, targets) - others.amax(dim=1)


@pytest.fixture
def keen() -> nn.Module:
    """A network whose scores differ from image to image."""
    torch.manual_seed(1)
    net = SmallNet().eval()
    net.head.weight.data *= 30
    return net


@pytest.fixture
def seen(keen: nn.Module) -> tuple[Tensor, Tensor]:
    """Images, each with the class that it has more of than when it is blurred."""
    images = torch.rand(12, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gained = keen(images) - keen(GaussianBlur()(images))
    return images, gained.argmax(dim=1)


def slow_normalised(curve: list[float], whole: float, blurred: float) -> list[float]:
    if whole - blurred <= 0.01:
        return [float("nan")] * len(curve)
    return [min(max((value - blurred) / (whole - blurred), 0.0), 1.0) for value in curve]


@pytest.mark.parametrize("score", [softmax, sigmoid, logit])
def test_normalised_curves_are_the_slow_loop(
    keen: nn.Module, seen: tuple[Tensor, Tensor], score: Score
) -> None:
    images, targets = seen
    targets = targets.clone()
    targets[:4] = (
        targets[:4] + 1
    ) % 5  # some of which have no more of that class than when blurred
    maps, baseline = torch.rand(12, 32, 40), GaussianBlur()
    kwargs: dict[str, Any] = {"score": score, "pixels_per_step": 200}
    found = deletion_insertion_curves(keen, images, maps, targets, normalise=True, **kwargs)
    alone = (
        deletion_curve(keen, images, maps, targets, normalise=True, **kwargs),
        insertion_curve(keen, images, maps, targets, normalise=True, **kwargs),
    )
    undefined = 0
    for i in range(12):

        def value(picture: Tensor, i: int = i) -> float:
            with torch.no_grad():
                return float(score(keen(picture[None]), targets[i : i + 1]))

        filled = baseline(images[i : i + 1])[0]
        ends = value(images[i]), value(filled)
        undefined += ends[0] - ends[1] <= 0.01
        for one, both, start, end in (
            (alone[0], found[0], images[i], filled),
            (alone[1], found[1], filled, images[i]),
        ):
            curve = oracles.moving_curve(value, maps[i], start, end, 200)
            expected = torch.tensor(slow_normalised(curve, *ends))
            for curve_found in (one, both):
                torch.testing.assert_close(
                    curve_found[i], expected, atol=2e-4, rtol=0, equal_nan=True
                )
    assert 0 < undefined < 12, "the test needs images of both kinds"


def test_ends_and_a_closed_form() -> None:
    class Power(nn.Module):
        """Its logit is 3 + 2 s², s the share of the pixels, all 1, that is left."""

        def forward(self, images: Tensor) -> Tensor:
            share = images.mean(dim=(1, 2, 3))
            return torch.stack([3 + 2 * share.square(), torch.zeros_like(share)], dim=1)

    images, maps, targets = torch.ones(1, 3, 40, 28), torch.rand(1, 40, 28), torch.tensor([0])
    kwargs: dict[str, Any] = {"score": logit, "baseline": Constant(0.0), "normalise": True}
    deleted, inserted = deletion_insertion_curves(Power(), images, maps, targets, **kwargs)
    share = torch.linspace(1, 0, 113)[None]
    torch.testing.assert_close(deleted, share.square(), atol=1e-5, rtol=0)
    torch.testing.assert_close(inserted, share.square().flip(1), atol=1e-5, rtol=0)


METHODS = (GradCAM(), WGradCAM(), LayerCAM(), CentreGaussian(), EdgeDetector(), RandomMap())


def overall(net: nn.Module, seen: tuple[Tensor, Tensor], score: Score, normalise: bool) -> Tensor:
    """Return the overall AUC [methods, images] of the same maps."""
    images, targets = seen
    rows = []
    for method in METHODS:
        maps = method.explain(net, images, targets)
        deleted, inserted = deletion_insertion_curves(
            net, images, maps, targets, score=score, steps=20, normalise=normalise
        )
        rows.append(auc(inserted) - auc(deleted))
    return torch.stack(rows)


@pytest.mark.parametrize("score", [logit, margin])
def test_a_surer_model_has_another_auc_but_the_same_normalised_one(
    keen: nn.Module, seen: tuple[Tensor, Tensor], score: Score
) -> None:
    factors = (0.5, 1.0, 2.0)
    plain = [overall(Scaled(keen, a), seen, score, False) for a in factors]
    relative = [overall(Scaled(keen, a), seen, score, True) for a in factors]
    assert relative[0].isfinite().all()
    for a, raw, found in zip(factors, plain, relative, strict=True):
        torch.testing.assert_close(raw, a * plain[1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found, relative[1], atol=1e-4, rtol=0)
        assert torch.equal(found.mean(dim=1).argsort(), relative[1].mean(dim=1).argsort())


def test_of_probabilities_the_plain_auc_moves_most(
    keen: nn.Module, seen: tuple[Tensor, Tensor]
) -> None:
    # A softmax bends the curve between its ends, which is far less than what the ends make up.
    plain, relative = (
        torch.stack([overall(Scaled(keen, a), seen, softmax, n) for a in (0.5, 1, 2)])
        for n in (False, True)
    )
    defined = relative.isfinite().all(dim=1).all(dim=0)
    assert defined.sum() >= 8
    plain, relative = (each[..., defined].mean(dim=2) for each in (plain, relative))
    best = plain[1].argmax()
    assert plain[2, best] > 1.5 * plain[0, best]
    moved = [(each[2, best] / each[0, best]).log().abs() for each in (plain, relative)]
    assert moved[1] < moved[0] / 4
    for row in relative:
        assert torch.equal(row.argsort(), relative[1].argsort())


def test_it_takes_no_further_evaluations(keen: nn.Module, seen: tuple[Tensor, Tensor]) -> None:
    images, targets = seen
    metric = Faithfulness(steps=10, normalise=True)
    with count_evaluations(keen) as count:
        metric.update(keen, images, torch.rand(12, 32, 40), targets)
    assert count.total == 12 * 20


def test_metrics_leave_out_and_count_what_is_undefined(
    keen: nn.Module, seen: tuple[Tensor, Tensor]
) -> None:
    mpl.use("agg")
    images, targets = seen
    targets = targets.clone()
    targets[:4] = (targets[:4] + 1) % 5
    maps, kwargs = torch.rand(12, 32, 40), {"steps": 20}
    batch = (keen, images, maps, targets)
    deleted, inserted = deletion_insertion_curves(*batch, normalise=True, **kwargs)
    d, n = auc(deleted), auc(inserted)
    assert 0 < int(d.isnan().sum()) < 12
    expected = {
        DeletionAUC: d.nanmean(),
        InsertionAUC: n.nanmean(),
        OverallAUC: (n - d).nanmean(),
    }
    for kind, value in expected.items():
        metric = kind(normalise=True, **kwargs)
        for part in (slice(0, 5), slice(5, 12)):
            metric.update(keen, images[part], maps[part], targets[part])
        torch.testing.assert_close(metric.compute(), value)
        assert metric.undefined == d.isnan().sum()
        axes = metric.plot()[1]
        drawn = torch.tensor(axes.get_lines()[0].get_ydata()).float()
        mean = (inserted if kind is InsertionAUC else deleted).nanmean(dim=0)
        torch.testing.assert_close(drawn[::5], mean, atol=1e-5, rtol=0)
        assert "normalised" in axes.get_ylabel()
    mpl.pyplot.close("all")
    together, plain = Faithfulness(normalise=True, **kwargs), Faithfulness(**kwargs)
    together.update(*batch)
    plain.update(*batch)
    values = together.compute()
    torch.testing.assert_close(values.pop("overall_auc_normalised"), (n - d).nanmean())
    assert values.pop("overall_auc_undefined") == d.isnan().sum()
    torch.testing.assert_close(values, plain.compute())
    nothing = OverallAUC(normalise=True, **kwargs)
    nothing.update(keen, torch.zeros(2, 3, 32, 40), maps[:2], targets[:2])
    assert nothing.compute().isnan()
    assert nothing.undefined == 2


def test_an_estimate_is_normalised_with_its_error(
    keen: nn.Module, seen: tuple[Tensor, Tensor]
) -> None:
    images, targets = seen
    maps = torch.rand(12, 32, 40)
    batch = (keen, images, maps, targets, 40)
    plain = estimate_curves(*batch, steps=60)
    relative = estimate_curves(*batch, steps=60, normalise=True)
    with torch.no_grad():
        whole = softmax(keen(images), targets)
        blurred = softmax(keen(GaussianBlur()(images)), targets)
    for game, each in relative.items():
        assert torch.equal(each.evaluated, plain[game].evaluated)
        torch.testing.assert_close(each.error, plain[game].error / (whole - blurred))
        expected = (plain[game].curve - blurred[:, None]) / (whole - blurred)[:, None]
        torch.testing.assert_close(each.curve, expected.clamp(0, 1), atol=1e-4, rtol=0)
    metric = OverallAUC(steps=60, evaluations=40, normalise=True)
    metric.update(*batch[:4])
    errors = torch.stack([relative[g].error for g in ("deletion", "insertion")])
    torch.testing.assert_close(
        metric.auc_errors()["overall_auc_normalised_error"], errors.square().sum().sqrt() / 12
    )
