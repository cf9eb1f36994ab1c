import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import slow
import torch
import torch.multiprocessing as mp
from conftest import SmallNet
from torch import Tensor, nn

from lightning_aop.metrics import (
    RISE_BLUR,
    DeletionAUC,
    Faithfulness,
    InsertionAUC,
    OverallAUC,
    auc,
    deletion_curve,
    deletion_insertion_curves,
    insertion_curve,
)
from lightning_aop.ops import Constant, Fill, GaussianBlur
from lightning_aop.probing import count_evaluations
from lightning_aop.scores import Score, logit, sigmoid, softmax


@pytest.fixture
def maps() -> Tensor:
    """Maps with many ties, as ReLU leaves them."""
    return (torch.rand(4, 40, 32, generator=torch.Generator().manual_seed(2)) - 0.6).relu()


@pytest.mark.parametrize("score", [softmax, sigmoid, logit])
@pytest.mark.parametrize("fill", [GaussianBlur(), Constant(0.0), RISE_BLUR])
@pytest.mark.parametrize("pixels_per_step", [100, 640])
def test_curves_are_the_slow_loop(
    net: nn.Module, batch: Any, maps: Tensor, score: Score, fill: Fill, pixels_per_step: int
) -> None:
    images, targets = batch
    settings: dict[str, Any] = {
        "score": score,
        "fill": fill,
        "pixels_per_step": pixels_per_step,
        "eval_batch_size": 5,
    }
    deleted = deletion_curve(net, images, maps, targets, **settings)
    inserted = insertion_curve(net, images, maps, targets, **settings)
    steps = -(-40 * 32 // pixels_per_step)
    assert deleted.shape == inserted.shape == (4, steps + 1)
    for i in range(4):

        def value(picture: Tensor, i: int = i) -> float:
            with torch.no_grad():
                return float(score(net(picture[None]), targets[i : i + 1]))

        filled = fill(images[i : i + 1])[0]
        d = slow.moving_curve(value, maps[i], images[i], filled, pixels_per_step)
        n = slow.moving_curve(value, maps[i], filled, images[i], pixels_per_step)
        torch.testing.assert_close(deleted[i], torch.tensor(d), atol=1e-5, rtol=0)
        torch.testing.assert_close(inserted[i], torch.tensor(n), atol=1e-5, rtol=0)
        assert abs(float(auc(deleted)[i]) - slow.rise_auc(d)) < 1e-5


def test_what_holds_for_any_network(net: nn.Module, batch: Any) -> None:
    images, targets = batch
    maps = torch.rand(4, 40, 32)  # without ties, so that turning them round turns the order round
    deleted = deletion_curve(net, images, maps, targets, steps=16)
    inserted = insertion_curve(net, images, maps, targets, steps=16)
    turned = insertion_curve(net, images, -maps, targets, steps=16)
    torch.testing.assert_close(deleted[:, 0], inserted[:, -1])
    torch.testing.assert_close(deleted[:, -1], inserted[:, 0])
    torch.testing.assert_close(deleted, turned.flip(1))
    torch.testing.assert_close(auc(deleted), auc(turned))
    both = deletion_insertion_curves(net, images, maps, targets, steps=16)
    torch.testing.assert_close(both, (deleted, inserted))


def test_area_of_known_curves() -> None:
    line = torch.linspace(1, 0, 11)[None]
    step = torch.tensor([[1.0, 1.0, 0.0]])
    torch.testing.assert_close(auc(line), torch.tensor([0.5]))
    torch.testing.assert_close(auc(step), torch.tensor([0.75]))


def test_the_protocols_step_and_the_cost() -> None:
    class Brightness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.mean(dim=(1, 2, 3)), torch.zeros(len(images))], dim=1)

    model, images = Brightness(), torch.ones(1, 3, 224, 224)
    maps, targets = torch.rand(1, 224, 224), torch.tensor([0])
    with count_evaluations(model) as count:
        curve = deletion_curve(model, images, maps, targets, score=logit, fill=Constant(0.0))
    # 448 pixels a step, 112 steps; with this model the score is the share that is left.
    assert count.total == 113
    torch.testing.assert_close(curve, torch.linspace(1, 0, 113)[None], atol=1e-5, rtol=0)
    with count_evaluations(model) as count:
        deletion_insertion_curves(model, images, maps, targets, steps=28)
    assert count.total == 56


def test_metrics_average_over_updates_of_any_size(net: nn.Module, batch: Any, maps: Tensor) -> None:
    images, targets = batch
    kwargs: dict[str, Any] = {"steps": 9, "score": sigmoid}
    d = auc(deletion_curve(net, images, maps, targets, **kwargs))
    n = auc(insertion_curve(net, images, maps, targets, **kwargs))
    expected = {
        DeletionAUC: d.mean(),
        InsertionAUC: n.mean(),
        OverallAUC: (n - d).mean(),
    }
    for kind, value in expected.items():
        metric = kind(**kwargs)
        metric.update(net, images[:3], maps[:3], targets[:3])
        metric.update(net, images[3:], maps[3:], targets[3:])
        torch.testing.assert_close(metric.compute(), value)
        assert metric.higher_is_better == (kind is not DeletionAUC)
        metric.reset()
        metric.update(net, images[:1], maps[:1], targets[:1])
        assert metric.total == 1
    together = Faithfulness(**kwargs)
    together.update(net, images, maps, targets)
    torch.testing.assert_close(
        together.compute(),
        {
            "deletion_auc": d.mean(),
            "insertion_auc": n.mean(),
            "overall_auc": (n - d).mean(),
        },
    )


def test_plot_draws_the_mean_curves(net: nn.Module, batch: Any, maps: Tensor) -> None:
    mpl.use("agg")
    images, targets = batch
    metric = OverallAUC(steps=10)
    metric.update(net, images, maps, targets)
    _, axes = metric.plot()
    curves = deletion_insertion_curves(net, images, maps, targets, steps=10)
    for line, curve in zip(axes.get_lines(), curves, strict=True):
        drawn = torch.tensor(line.get_ydata()).float()
        torch.testing.assert_close(drawn[::10], curve.mean(dim=0), atol=1e-5, rtol=0)
    mpl.pyplot.close("all")


def _worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    net, images, maps = SmallNet().eval(), torch.rand(5, 3, 24, 24), torch.rand(5, 24, 24)
    targets = torch.tensor([0, 1, 2, 3, 4])
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    metric = OverallAUC(steps=6)
    metric.update(net, images[mine], maps[mine], targets[mine])
    synchronised = metric.compute()
    alone = OverallAUC(steps=6, sync_on_compute=False)
    alone.update(net, images, maps, targets)
    torch.save((synchronised, alone.compute()), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metrics_are_synchronised_across_processes(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        synchronised, alone = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(synchronised, alone)


def test_bad_input_is_refused(net: nn.Module, batch: Any, maps: Tensor, unchecked: None) -> None:
    images, targets = batch
    with pytest.raises(ValueError, match=r"\[4, 40, 32\], got \[4, 7, 7\]: enlarge them"):
        deletion_curve(net, images, torch.zeros(4, 7, 7), targets)
    with pytest.raises(ValueError, match="maps hold NaN"):
        insertion_curve(net, images, maps * torch.nan, targets)
    with pytest.raises(ValueError, match="steps must be above 0, got 0"):
        OverallAUC(steps=0).update(net, images, maps, targets)
    net.head.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite for image\(s\) \[0, 1, 2, 3\]"):
        deletion_curve(net, images, maps, targets)
