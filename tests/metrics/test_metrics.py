import os
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import oracles
import pytest
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
    PointingGame,
    auc,
    deletion_curve,
    deletion_insertion_curves,
    estimate_curves,
    insertion_curve,
)
from lightning_aop.metrics.functional import GameName
from lightning_aop.metrics.similarity import rank_correlation
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import Baseline, Constant, GaussianBlur
from lightning_aop.scores import Score, logit, sigmoid, softmax


@pytest.fixture
def maps() -> Tensor:
    """Maps with many ties, as ReLU leaves them."""
    return (torch.rand(4, 40, 32, generator=torch.Generator().manual_seed(2)) - 0.6).relu()


@pytest.mark.sample(9)
@pytest.mark.parametrize("score", [softmax, sigmoid, logit])
@pytest.mark.parametrize("baseline", [GaussianBlur(), Constant(0.0), RISE_BLUR])
@pytest.mark.parametrize("pixels_per_step", [100, 640])
def test_curves_are_the_slow_loop(
    net: nn.Module, batch: Any, maps: Tensor, score: Score, baseline: Baseline, pixels_per_step: int
) -> None:
    images, targets = batch
    settings: dict[str, Any] = {
        "score": score,
        "baseline": baseline,
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

        filled = baseline(images[i : i + 1])[0]
        d = oracles.moving_curve(value, maps[i], images[i], filled, pixels_per_step)
        n = oracles.moving_curve(value, maps[i], filled, images[i], pixels_per_step)
        torch.testing.assert_close(deleted[i], torch.tensor(d), atol=1e-5, rtol=0)
        torch.testing.assert_close(inserted[i], torch.tensor(n), atol=1e-5, rtol=0)
        assert abs(float(auc(deleted)[i]) - oracles.rise_auc(d)) < 1e-5


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
        curve = deletion_curve(model, images, maps, targets, score=logit, baseline=Constant(0.0))
    # 448 pixels a step, 112 steps; with this model the score is the share that is left.
    assert count.total == 113
    torch.testing.assert_close(curve, torch.linspace(1, 0, 113)[None], atol=1e-5, rtol=0)
    with count_evaluations(model) as count:
        deletion_insertion_curves(model, images, maps, targets, steps=28)
    assert count.total == 56


BOTH: tuple[GameName, ...] = ("deletion", "insertion")


@pytest.mark.sample(6)
@pytest.mark.parametrize("games", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize(("steps", "evaluations"), [(1280, 60), (40, 24), (40, 37), (40, 40)])
def test_coarse_to_fine_is_the_slow_loop_over_the_full_curves(
    net: nn.Module,
    batch: Any,
    maps: Tensor,
    games: tuple[GameName, ...],
    steps: int,
    evaluations: int,
) -> None:
    images, targets = batch
    rough = images + torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    full = dict(
        zip(BOTH, deletion_insertion_curves(net, rough, maps, targets, steps=steps), strict=True)
    )
    if len(games) == 2 and evaluations > 24:
        evaluations *= 2  # 74 and 80 of 80: the last rounds have fewer steps to halve than to spend
    with count_evaluations(net) as count:
        found = estimate_curves(net, rough, maps, targets, evaluations, games=games, steps=steps)
    assert count.total == evaluations * len(images)
    assert tuple(found) == games
    for i in range(len(images)):
        curves = [full[game][i].tolist() for game in games]
        slow_points = oracles.coarse_to_fine(curves, evaluations)
        for game, (points, error), curve in zip(games, slow_points, curves, strict=True):
            estimate = found[game]
            assert estimate.evaluated[i].nonzero()[:, 0].tolist() == points
            lines = np.interp(np.arange(len(curve)), points, [curve[p] for p in points])
            torch.testing.assert_close(
                estimate.curve[i], torch.tensor(lines).float(), atol=1e-6, rtol=0
            )
            assert float(estimate.error[i]) == pytest.approx(error, rel=1e-3, abs=1e-12)


def test_all_evaluations_give_the_full_curves_bit_for_bit(
    net: nn.Module, batch: Any, maps: Tensor
) -> None:
    images, targets = batch
    kwargs: dict[str, Any] = {"steps": 20, "eval_batch_size": 7}
    for evaluations in (40, 1000):
        with count_evaluations(net) as count:
            found = estimate_curves(net, images, maps, targets, evaluations, **kwargs)
        assert count.total == 4 * 40
        full = deletion_insertion_curves(net, images, maps, targets, **kwargs)
        for estimate, curve in zip(found.values(), full, strict=True):
            assert torch.equal(estimate.curve, curve)
            assert estimate.evaluated.all()
            assert not estimate.error.any()
    for game, play in (("deletion", deletion_curve), ("insertion", insertion_curve)):
        one = estimate_curves(net, images, maps, targets, 21, games=(game,), **kwargs)  # type: ignore[arg-type]
        assert torch.equal(
            next(iter(one.values())).curve, play(net, images, maps, targets, **kwargs)
        )


def test_an_estimate_depends_on_nothing_but_its_image(
    net: nn.Module, batch: Any, maps: Tensor
) -> None:
    images, targets = batch
    together = estimate_curves(net, images, maps, targets, 40, steps=60, eval_batch_size=32)
    small = estimate_curves(net, images, maps, targets, 40, steps=60, eval_batch_size=3)
    for game in BOTH:
        assert torch.equal(together[game].evaluated, small[game].evaluated)
        torch.testing.assert_close(together[game].curve, small[game].curve)
    for rows in ([2], [3, 0]):
        part = estimate_curves(net, images[rows], maps[rows], targets[rows], 40, steps=60)
        for game in BOTH:
            assert torch.equal(part[game].evaluated, together[game].evaluated[rows])
            torch.testing.assert_close(part[game].curve, together[game].curve[rows])
            torch.testing.assert_close(part[game].error, together[game].error[rows])


class Power(nn.Module):
    """Its logit is a power of the share of the pixels, all 1, that is left."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, images: Tensor) -> Tensor:
        share = images.mean(dim=(1, 2, 3))
        return torch.stack([share**self.power, torch.zeros_like(share)], dim=1)


def test_points_go_where_a_known_curve_moves() -> None:
    images, maps, targets = torch.ones(1, 3, 40, 28), torch.rand(1, 40, 28), torch.tensor([0])
    batch = (images, maps, targets, 29)
    kwargs: dict[str, Any] = {"games": ("deletion",), "score": logit, "baseline": Constant(0.0)}
    share = 1 - np.arange(113) / 112
    steep = estimate_curves(Power(20.0), *batch, **kwargs)["deletion"]
    area = float(np.trapezoid(share**20) / 112)
    equal = float(np.trapezoid(share[::4] ** 20) / 28)
    assert steep.evaluated[0, :17].sum() > 12  # of 29 points, the first seventh got half
    assert abs(float(auc(steep.curve)) - area) < abs(equal - area) / 5
    assert abs(float(auc(steep.curve)) - area) < float(steep.error)
    line = estimate_curves(Power(1.0), *batch, **kwargs)["deletion"]
    torch.testing.assert_close(line.curve[0], torch.tensor(share).float(), atol=1e-5, rtol=0)
    # All steps of a score that does not move look alike: the widest is halved first.
    flat = estimate_curves(Power(0.0), *batch, **kwargs)["deletion"]
    assert flat.evaluated[0].nonzero()[:, 0].diff().max() == 4
    assert float(flat.error) < 1e-12


def test_metrics_tell_what_an_estimate_left_out(net: nn.Module, batch: Any, maps: Tensor) -> None:
    images, targets = batch
    kwargs: dict[str, Any] = {"steps": 60, "score": sigmoid}
    found = estimate_curves(net, images, maps, targets, 40, **kwargs)
    metric = Faithfulness(evaluations=40, **kwargs)
    metric.update(net, images[:1], maps[:1], targets[:1])
    metric.update(net, images[1:], maps[1:], targets[1:])
    values = metric.compute()
    errors = {
        game: found[game].error.double().square().sum().sqrt().float() / 4  # of a mean of 4
        for game in BOTH
    }
    expected = {f"{game}_auc": auc(found[game].curve).mean() for game in BOTH}
    expected["overall_auc"] = expected["insertion_auc"] - expected["deletion_auc"]
    expected |= {f"{game}_auc_error": error for game, error in errors.items()}
    expected["overall_auc_error"] = torch.stack(list(errors.values())).norm()
    expected["evaluations"] = torch.tensor(40.0)
    torch.testing.assert_close(dict(sorted(values.items())), dict(sorted(expected.items())))
    for game in BOTH:
        assert torch.equal(metric.last_evaluated[game], found[game].evaluated[1:])
        torch.testing.assert_close(metric.last_errors[game], found[game].error[1:])
        torch.testing.assert_close(metric.last_curves[game], found[game].curve[1:])
    metric.reset()
    assert metric.last_evaluated == metric.last_errors == {}
    whole = Faithfulness(evaluations=120, **kwargs)
    whole.update(net, images, maps, targets)
    assert whole.compute()["evaluations"] == 118  # 59 steps of 22 pixels
    assert whole.compute()["overall_auc_error"] == 0
    one = InsertionAUC(evaluations=20, **kwargs)
    with count_evaluations(net) as count:
        one.update(net, images, maps, targets)
    assert count.total == 80
    alone = estimate_curves(net, images, maps, targets, 20, games=("insertion",), **kwargs)
    torch.testing.assert_close(one.compute(), auc(alone["insertion"].curve).mean())
    assert set(one.auc_errors()) == {"insertion_auc_error"}
    assert OverallAUC(**kwargs).auc_errors() == {}


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
    coarse = Faithfulness(steps=40, evaluations=24)
    coarse.update(net, images[mine], maps[mine], targets[mine])
    coarse_alone = Faithfulness(steps=40, evaluations=24, sync_on_compute=False)
    coarse_alone.update(net, images, maps, targets)
    found = (synchronised, coarse.compute()), (alone.compute(), coarse_alone.compute())
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metrics_are_synchronised_across_processes(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        synchronised, alone = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(synchronised, alone)


@pytest.mark.parametrize(
    ("name", "change", "remedy"),
    [
        ("maps", list, "torch.stack(maps)"),
        ("maps", lambda v: v.numpy()[:, ::-1], "torch.as_tensor(maps.copy())"),
        ("maps", lambda v: v.numpy(), "torch.as_tensor(maps)"),
        ("maps", lambda v: v[:, None], "maps[:, 0]"),
        ("targets", lambda v: v.tolist(), "torch.as_tensor(targets)"),
        ("targets", lambda v: v[:, None], "targets[:, 0]"),
        ("targets", lambda v: v[:, None].float(), "targets[:, 0].long()"),
        ("targets", lambda v: nn.functional.one_hot(v, 5), "targets.argmax(dim=1)"),
        ("images", lambda v: v.permute(0, 2, 3, 1), "images.permute(0, 3, 1, 2)"),
    ],
)
def test_the_remedy_for_bad_input_is_one(
    name: str, change: Any, remedy: str, net: nn.Module, batch: Any, maps: Tensor, unchecked: None
) -> None:
    given = {"images": batch[0], "maps": maps, "targets": batch[1]}
    given[name] = change(given[name])

    def curve() -> Tensor:
        return deletion_curve(net, given["images"], given["maps"], given["targets"], steps=4)

    with pytest.raises((TypeError, ValueError), match=re.escape(remedy)):
        curve()
    given[name] = eval(remedy, {"torch": torch, **given})
    assert curve().isfinite().all()


def test_one_number_for_all_images_is_refused_with_what_to_give(
    net: nn.Module, batch: Any, maps: Tensor, unchecked: None
) -> None:
    with pytest.raises(TypeError, match=r"give one for each image, such as torch.tensor\(\[2\]\)"):
        deletion_curve(net, batch[0], maps, 2)  # type: ignore[arg-type]


def test_bad_input_is_refused(net: nn.Module, batch: Any, maps: Tensor, unchecked: None) -> None:
    images, targets = batch
    with pytest.raises(ValueError, match=r"\[4, 40, 32\], got \[4, 7, 7\]: upsample them"):
        deletion_curve(net, images, torch.zeros(4, 7, 7), targets)
    with pytest.raises(ValueError, match="maps hold NaN"):
        insertion_curve(net, images, maps * torch.nan, targets)
    with pytest.raises(ValueError, match="steps must be above 0, got 0"):
        deletion_curve(net, images, maps, targets, steps=0)
    # A metric of a training run refuses them where it is made.
    with pytest.raises(ValueError, match="OverallAUC: steps must be above 0, got 0"):
        OverallAUC(steps=0)
    settings: dict[str, Any]
    for settings in ({"steps": "8"}, {"pixels_per_step": 2.5}, {"evaluations": 1e3}):
        with pytest.raises(TypeError, match=f"{next(iter(settings))} must be a whole number"):
            OverallAUC(**settings)
    with pytest.raises(ValueError, match="where pixels_per_step is None, got None"):
        OverallAUC(steps=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="OverallAUC: eval_batch_size must be above 0"):
        OverallAUC(eval_batch_size=-1)
    with pytest.raises(ValueError, match="16 for deletion and insertion, got 15"):
        OverallAUC(evaluations=15)
    assert estimate_curves(net, images, maps, targets, 16)["deletion"].evaluated.any()
    with pytest.raises(ValueError, match=r"games must be .*, got \('rise',\)"):
        estimate_curves(net, images, maps, targets, 56, games=("rise",))  # type: ignore[arg-type]
    net.head.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite for image\(s\) \[0, 1, 2, 3\]"):
        deletion_curve(net, images, maps, targets)
    with pytest.raises(ValueError, match=r"NaN or infinite for image\(s\) \[0, 1, 2, 3\]"):
        estimate_curves(net, images, maps, targets, 56)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["images", "maps", "targets"])
@pytest.mark.parametrize("form", ["array", "list", "None"])
def test_what_is_no_tensor_is_refused_by_name(
    name: str, form: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    given: dict[str, Any] = {"images": images, "maps": images[:, 0], "targets": targets}
    value = given[name]
    given[name] = {"array": value.numpy(), "list": value.tolist(), "None": None}[form]
    kind = {"array": "ndarray", "list": "list", "None": "None"}[form]
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got {kind}: "):
        deletion_curve(net, **given)


@pytest.mark.usefixtures("unchecked")
def test_the_pointing_game_and_similarity_name_what_is_no_tensor() -> None:
    maps = torch.rand(2, 12, 12)
    arguments: dict[str, Any] = {"maps": maps, "masks": maps > 0.5, "targets": torch.tensor([0, 1])}
    arguments["scores"] = torch.ones(2)
    for name, value in arguments.items():
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got ndarray"):
            PointingGame(2).update(**(arguments | {name: value.numpy()}))
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor, got list"):
        rank_correlation(maps, maps.tolist())


def test_an_image_of_one_pixel_is_refused_and_one_step_is_a_curve_of_two_points(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    pixel = images[:, :, :1, :1]
    with pytest.raises(ValueError, match="images must have 2 pixels or more"):
        deletion_insertion_curves(net, pixel, pixel[:, 0], targets)
    deletion, insertion = deletion_insertion_curves(net, images, images[:, 0], targets, steps=1)
    assert deletion.shape == (len(images), 2)
    torch.testing.assert_close(
        deletion, deletion_curve(net, images, images[:, 0], targets, steps=1)
    )
    torch.testing.assert_close(insertion, deletion.flip(1))


def test_a_model_that_ends_in_a_softmax_has_the_curves_of_its_logits(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    curves = [
        deletion_curve(each, images, images[:, 0], targets, steps=9)
        for each in (net, nn.Sequential(net, nn.Softmax(dim=1)))
    ]
    assert curves[0].amax() > 1.01 * curves[0].amin(), "the test needs scores that move"
    torch.testing.assert_close(curves[1], curves[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("images", "chunk"), [(8, 15), (8, 20), (8, 12), (16, 9), (3, 64), (1, 7), (5, 1), (9, 4)]
)
def test_the_passes_of_curves_are_full(images: int, chunk: int, net: nn.Module) -> None:
    pictures, maps = torch.rand(images, 3, 24, 24), torch.rand(images, 24, 24)
    targets, sizes = torch.arange(images) % 5, []
    # Not on the network, with which it would be put back.
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: sizes.append(len(output)) if module is net else None
    )
    with handle:
        found = deletion_insertion_curves(
            net, pictures, maps, targets, steps=28, eval_batch_size=chunk
        )
    assert sum(sizes) == images * 56
    assert max(sizes) <= chunk
    assert len(sizes) <= 1.06 * -(-images * 56 // chunk)
    alone = deletion_insertion_curves(net, pictures[-1:], maps[-1:], targets[-1:], steps=28)
    torch.testing.assert_close(torch.cat(alone), torch.stack(found)[:, -1])
