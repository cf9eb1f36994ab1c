import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection

from lightning_aop.metrics import (
    EnergyPointingGame,
    PointingGame,
    energy_in_mask,
    pointing_hits,
)

Game = PointingGame | EnergyPointingGame


def slow_hit(heat: np.ndarray, mask: np.ndarray, tolerance: float) -> float:
    """TorchRay's rule at every maximum, with nothing but the pixel itself below a radius of 1."""
    verdicts = []
    for v0, u0 in zip(*np.where(heat == heat.max()), strict=True):
        v, u = np.meshgrid(np.arange(mask.shape[0]), np.arange(mask.shape[1]), indexing="ij")
        accept = (u - u0) ** 2 + (v - v0) ** 2 < max(tolerance, 1) ** 2
        verdicts.append(float((mask & accept).any()))
    return float(np.mean(verdicts))


def slow_energy(heat: np.ndarray, mask: np.ndarray) -> float:
    inside = total = 0.0
    for value, is_in in zip(heat.ravel().tolist(), mask.ravel().tolist(), strict=True):
        total += value
        inside += value if is_in else 0.0
    return inside / total if total else 0.0


def some_pairs(seed: int, count: int = 24, size: tuple[int, int] = (40, 32)) -> tuple[Any, Any]:
    """Maps of few values, so that maxima tie, and masks: sparse, boxes, at the border, empty, full."""
    random = np.random.default_rng(seed)
    maps = random.integers(0, 201, (count, *size)) / 200
    maps[count // 2 :] = random.random((count - count // 2, *size))  # one maximum
    masks = random.random((count, *size)) < 0.001
    for i in range(0, count, 3):
        top, left = random.integers(0, size[0]), random.integers(0, size[1])
        masks[i, top : top + 9, left : left + 7] = True
    masks[1], masks[2] = False, True
    masks[4], masks[5] = False, False
    masks[4, -1, :], masks[5, 0, 0] = True, True
    maps[6] = 0.25
    return torch.from_numpy(maps), torch.from_numpy(masks)


@pytest.mark.parametrize("tolerance", [0, 0.5, 1, 1.25, 1.5, 2, 2.5, 5, 15, 30.5, 31, 1000])
def test_hits_are_torchrays_rule_at_every_maximum(tolerance: float) -> None:
    # 31 and 30.5 reach past the width but not the height, 1000 past everything.
    for seed, size in ((0, (40, 32)), (1, (7, 50)), (2, (1, 9)), (3, (9, 1))):
        maps, masks = some_pairs(seed, size=size)
        expected = [slow_hit(*p, tolerance) for p in zip(maps.numpy(), masks.numpy(), strict=True)]
        got = pointing_hits(maps, masks, tolerance)
        torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=1e-6, rtol=0)
        assert got[1] == 0  # an empty mask
        assert got[2] == 1  # a full one
    if tolerance == 15:  # the pairs must tell tolerances apart
        assert not torch.equal(got, pointing_hits(maps, masks, 0))


def test_the_tolerance_is_open_and_exact() -> None:
    maps, masks = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.bool)
    maps[0, 1, 1], masks[0, 5, 4] = 1, True  # 5 pixels away, as 4 down and 3 across
    assert pointing_hits(maps, masks, 5) == 0
    assert pointing_hits(maps, masks, np.nextafter(5, 6)) == 1
    masks[0, 1, 2] = True  # 1 away
    assert pointing_hits(maps, masks, 1) == 0
    assert pointing_hits(maps, masks, np.nextafter(1, 2)) == 1


def test_equal_maxima_count_by_their_share() -> None:
    maps = torch.tensor([[[0.0, 2.0, 2.0], [2.0, 1.0, 2.0]]])
    masks = torch.tensor([[[True, True, False], [False, True, False]]])
    assert pointing_hits(maps, masks) == 0.25
    assert pointing_hits(maps, masks, 1.1) == 1  # each of the others has a neighbour in the mask
    constant = torch.full((1, 2, 3), 0.7)
    assert pointing_hits(constant, masks) == 0.5  # the mask's area
    assert pointing_hits(-constant / 0, masks) == 0.5  # as for a map of −inf


def test_energy_is_the_slow_loop() -> None:
    maps, masks = some_pairs(4)
    maps[7] = 0
    expected = [slow_energy(*pair) for pair in zip(maps.numpy(), masks.numpy(), strict=True)]
    torch.testing.assert_close(energy_in_mask(maps, masks), torch.tensor(expected).double())
    # In float32 too no rounding leads out of [0, 1].
    shares = energy_in_mask(maps.float(), masks)
    torch.testing.assert_close(shares, torch.tensor(expected), atol=1e-6, rtol=0)
    assert shares[1] == 0
    assert shares[2] == 1
    assert shares[7] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision(dtype: torch.dtype) -> None:
    maps, masks = some_pairs(5, size=(300, 300))
    halves = maps.to(dtype)
    assert torch.equal(pointing_hits(halves, masks, 3), pointing_hits(halves.double(), masks, 3))
    # Its sum, about 45 000, would leave float16's precision far behind.
    close: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}
    exact = energy_in_mask(halves.double(), masks).float()
    torch.testing.assert_close(energy_in_mask(halves, masks), exact, **close)


def pairs_of_known_hits(hits: list[float]) -> tuple[Tensor, Tensor]:
    """One-row maps of four equal maxima, of which the mask holds a share; for both games the same."""
    maps = torch.ones(len(hits), 1, 4)
    masks = torch.arange(4) < 4 * torch.tensor(hits)[:, None, None]
    return maps, masks


@pytest.mark.parametrize("kind", [PointingGame, EnergyPointingGame])
def test_means_by_hand(kind: type[Game]) -> None:
    targets = torch.tensor([0, 0, 0, 0, 2, 2, 3])
    maps, masks = pairs_of_known_hits([1, 1, 0, 0.5, 0.25, 0, 1])
    scores = torch.tensor([0.9, 0.6, 0.51, 1.0, 0.7, 0.8, 0.5])  # 0.5 is not above 0.5
    metric = kind(5)
    metric.update(maps, masks, targets, scores)
    got, nan = metric.compute(), torch.nan
    expected = {
        "mean": (2.5 / 4 + 0.25 / 2) / 2,
        "pooled": 2.75 / 6,
        "per_class": [2.5 / 4, nan, 0.25 / 2, nan, nan],
        "hits": [2.5, 0, 0.25, 0, 0],
        "misses": [1.5, 0, 1.75, 0, 0],
    }
    assert set(got) == {*expected, "tested", "tested_classes"}
    for key, value in expected.items():
        wanted = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(got[key], wanted, equal_nan=True)
    assert got["tested"].tolist() == [4, 0, 2, 0, 0]
    assert got["tested_classes"] == 2

    as_torchray = kind(5, untested_as_zero=True)
    as_torchray.update(maps, masks, targets, scores)
    assert as_torchray.compute()["mean"] == (2.5 / 4 + 0.25 / 2) / 5
    assert as_torchray.compute()["per_class"][1].isnan()


@pytest.mark.parametrize("kind", [PointingGame, EnergyPointingGame])
def test_which_pairs_are_tested(kind: type[Game]) -> None:
    maps, masks = pairs_of_known_hits([1, 1, 1])
    targets, scores = torch.tensor([0, 1, 2]), torch.tensor([0.3, 0.5, 0.500001])
    options: Any
    for options, given, tested in (
        ({}, scores, [0, 0, 1]),
        ({}, None, [1, 1, 1]),
        ({"score_threshold": None}, scores, [1, 1, 1]),
        ({"score_threshold": None}, scores * 40, [1, 1, 1]),  # logits, which nobody reads
        ({"score_threshold": 0}, scores * 0, [0, 0, 0]),
        ({"score_threshold": 0.3}, scores, [0, 1, 1]),
        ({"score_threshold": 0.3}, scores.half(), [0, 1, 1]),
    ):
        metric = kind(3, **options)
        metric.update(maps, masks, targets, given)
        assert metric.compute()["tested"].tolist() == tested
    nothing = kind(3)
    nothing.update(maps, masks, targets, torch.zeros(3))
    assert nothing.compute()["mean"].isnan()
    assert nothing.compute()["pooled"].isnan()
    assert nothing.compute()["tested_classes"] == 0


def test_pointing_game_passes_its_tolerance_on() -> None:
    maps, masks = some_pairs(6)
    metric = PointingGame(1, tolerance=15)
    metric.update(maps, masks, torch.zeros(24, dtype=torch.long))
    expected = pointing_hits(maps, masks, 15).double()
    torch.testing.assert_close(metric.compute()["mean"], expected.mean())
    assert pointing_hits(maps, masks).mean() < expected.mean()


@pytest.mark.parametrize("kind", [PointingGame, EnergyPointingGame])
def test_how_the_pairs_are_batched_does_not_count(kind: type[Game]) -> None:
    maps, masks = some_pairs(7)
    targets, scores = torch.arange(24) % 5, torch.rand(24)
    results = []
    for sizes in ([24], [1] * 24, [10, 0, 13, 1]):
        metric = kind(6)
        for batch in zip(*(x.split(sizes) for x in (maps, masks, targets, scores)), strict=True):
            metric.update(*batch)
        results.append(metric.compute())
    torch.testing.assert_close(results[0], results[1], equal_nan=True)
    torch.testing.assert_close(results[0], results[2], equal_nan=True)
    step = kind(6)
    of_the_batch = step(maps[:5], masks[:5], targets[:5])  # forward, as self.log calls it
    assert of_the_batch["tested"].sum() == 5
    step(maps[5:], masks[5:], targets[5:])
    alone = kind(6)
    alone.update(maps, masks, targets)
    torch.testing.assert_close(step.compute(), alone.compute(), equal_nan=True)


def test_games_of_a_collection_stay_apart() -> None:
    maps, masks = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.bool)
    maps[0, 4, 4], masks[0, 4, 5:] = 1, True
    kinds: dict[str, Any] = {
        "exact": PointingGame(1),
        "near": PointingGame(1, tolerance=2),
        "all": PointingGame(1, score_threshold=None),
        "energy": EnergyPointingGame(1),
    }
    games = MetricCollection(kinds)
    target = torch.tensor([0])
    games.update(maps, ~masks & False, target, torch.tensor([0.9]))  # a miss in all of them
    games.update(maps, masks, target, torch.tensor([0.2]))
    games.update(maps, masks, target, torch.tensor([0.9]))
    hits = {name: (float(g.hits), float(g.misses)) for name, g in games.items(keep_base=True)}
    assert hits == {"exact": (0, 2), "near": (1, 1), "all": (0, 3), "energy": (0, 2)}


def test_update_in_inference_mode_and_with_gradients() -> None:
    maps, masks = some_pairs(8)
    targets = torch.zeros(24, dtype=torch.int32)
    metric = EnergyPointingGame(1)
    with torch.inference_mode():
        metric.update(maps, masks, targets)
        metric.reset()
        metric.update(maps, masks, targets)
    of_the_batch = metric(maps.requires_grad_(), masks, targets)
    assert not of_the_batch["mean"].requires_grad
    assert not metric.hits.requires_grad
    assert metric.compute()["tested"] == 48


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [PointingGame, EnergyPointingGame])
def test_one_copy_to_the_host_an_update(kind: type[Game]) -> None:
    maps, masks = some_pairs(9)
    with Waits() as waits:
        kind(3).update(maps, masks, torch.arange(24) % 3, torch.rand(24))
    assert waits.count == 1


@pytest.mark.parametrize("kind", [PointingGame, EnergyPointingGame])
def test_games_on_a_gpu(kind: type[Game]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    maps, masks = some_pairs(9)
    targets, scores = torch.arange(24) % 3, torch.rand(24)
    here, there = kind(3), kind(3).cuda()
    here.update(maps, masks, targets, scores)
    there.update(maps.cuda(), masks, targets.cuda(), scores)  # the maps say where it is done
    result = {key: value.cpu() for key, value in there.compute().items()}
    torch.testing.assert_close(result, here.compute(), equal_nan=True)


def _worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    maps, masks = some_pairs(10)
    targets = torch.arange(24) % 7
    scores = torch.rand(24, generator=torch.Generator().manual_seed(0))
    mine = slice(0, 9) if rank == 0 else slice(9, 24)
    results = []
    for make in (lambda **k: PointingGame(9, 4, **k), lambda **k: EnergyPointingGame(9, **k)):
        metric, alone = make(), make(sync_on_compute=False)
        metric.update(maps[mine], masks[mine], targets[mine], scores[mine])
        alone.update(maps, masks, targets, scores)
        results.append((metric.compute(), alone.compute()))
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_games_are_synchronised_across_processes(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        for synchronised, alone in torch.load(tmp_path / f"{rank}.pt"):
            assert 0 < alone["tested"].sum() < 24
            torch.testing.assert_close(synchronised, alone, equal_nan=True)


@pytest.mark.parametrize("kind", [PointingGame, EnergyPointingGame])
def test_plot_draws_the_tested_classes_best_first(kind: type[Game]) -> None:
    mpl.use("agg")
    maps, masks = pairs_of_known_hits([0.5, 0, 1, 0.25])
    metric = kind(6, class_names=["ant", "bee", "cat", "dog", "eel", "fox"])
    metric.update(maps, masks, torch.tensor([0, 0, 4, 2]))
    figure, axes = metric.plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["eel", "ant", "cat"]
    assert [bar.get_width() for bar in axes.patches] == [1, 0.25, 0.25]
    assert axes.get_lines()[0].get_xdata()[0] == 0.5
    counts = ["1 of 1", "0.5 of 2", "0.2 of 1"]
    if kind is EnergyPointingGame:
        counts = ["1 pair", "2 pairs", "1 pair"]
    texts = [text.get_text() for text in axes.texts]
    assert texts == [
        *(f"{v}  {c}" for v, c in zip(["1.00", "0.25", "0.25"], counts, strict=True)),
        "mean 0.50",
    ]
    assert axes.get_xlabel().endswith("\n3 of 6 classes not tested")
    figure.draw_without_rendering()
    same, _ = metric.plot(metric.compute(), axes)
    assert same is figure
    empty = kind(2)
    empty.update(maps, masks, torch.tensor([0, 0, 1, 1]), torch.zeros(4))
    assert [text.get_text() for text in empty.plot()[1].texts] == ["no pair was tested"]
    one = kind(1)
    one.update(maps, masks, torch.zeros(4, dtype=torch.long))
    assert one.plot()[1].patches[0].get_width() == 1.75 / 4
    mpl.pyplot.close("all")


def test_a_dollar_in_the_name_of_a_class_is_drawn() -> None:
    mpl.use("agg")
    metric = PointingGame(2, class_names=["$10_$", "cat"])
    metric.update(*pairs_of_known_hits([1, 1]), torch.tensor([0, 1]))
    figure, axes = metric.plot()
    figure.draw_without_rendering()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["$10_$", "cat"]
    # Also where the labels of another figure were drawn before.
    other, axes = mpl.pyplot.subplots()
    other.draw_without_rendering()
    metric.plot(ax=axes)
    other.draw_without_rendering()
    mpl.pyplot.close("all")


def test_bad_input_is_refused(unchecked: None) -> None:
    maps, masks = torch.rand(3, 4, 5), torch.zeros(3, 4, 5, dtype=torch.bool)
    targets, scores = torch.tensor([0, 1, 2]), torch.rand(3)
    spoilt = maps.clone()
    spoilt[1:, 0, 0] = torch.nan
    for function in (pointing_hits, energy_in_mask):
        with pytest.raises(ValueError, match=r"\[3, 4, 5\], got \[3, 5, 4\]: bring both"):
            function(maps, masks.transpose(1, 2))
        with pytest.raises(ValueError, match=r"\[B, H, W\], got \[4, 5\]: give one map"):
            function(maps[0], masks[0])
        with pytest.raises(TypeError, match=r"bool, got torch.uint8: compare"):
            function(maps, masks.byte())
        with pytest.raises(ValueError, match=r"maps hold NaN.* in row\(s\) \[1, 2\]"):
            function(spoilt, masks)
    for value in (-1.0, torch.inf):
        spoilt = maps.clone()
        spoilt[2, 3, 4] = value
        with pytest.raises(ValueError, match=r"negative values in row\(s\) \[2\]: .*maps.relu\(\)"):
            energy_in_mask(spoilt, masks)
        pointing_hits(spoilt, masks)
    for tolerance in (-1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=rf"0 or more, got {tolerance}: give 0"):
            pointing_hits(maps, masks, tolerance)
    with pytest.raises(ValueError, match="0 or more, got -2: give 0"):
        PointingGame(3, -2)
    for nothing in (None, "2"):
        with pytest.raises(TypeError, match=rf"of pixels, 0 or more, got {nothing!r}: give 0"):
            PointingGame(3, nothing)  # type: ignore[arg-type]
    wrong: Any
    for kind in (PointingGame, EnergyPointingGame):
        with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
            kind(0)
        for wrong in ("5", 5.0, None):
            with pytest.raises(TypeError, match=f"whole number, got {wrong!r}: give the number"):
                kind(wrong)
        wrong = "a"
        with pytest.raises(TypeError, match=r"\[0, 1\], got 'a': give None"):
            kind(3, score_threshold=wrong)
        with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5: give None"):
            kind(3, score_threshold=1.5)
        with pytest.raises(ValueError, match="each of the 3 classes, got 2 names"):
            kind(3, class_names=["a", "b"])
        metric = kind(3)
        with pytest.raises(ValueError, match=r"targets must have shape \[3\], got \[2\]"):
            metric.update(maps, masks, targets[:2])
        with pytest.raises(ValueError, match=r"indices, got torch\.float32: give one integer"):
            metric.update(maps, masks, scores)
        with pytest.raises(ValueError, match=r"scores must have shape \[3\], got \[3, 1\]"):
            metric.update(maps, masks, targets, scores[:, None])
        with pytest.raises(ValueError, match=r"0..2, got \[-1, 3\] in row\(s\) \[1, 2\]: give"):
            metric.update(maps, masks, torch.tensor([0, -1, 3]))
        with pytest.raises(ValueError, match=r"\[0, 1\], got \[4.0, nan\] in row\(s\) \[0, 2\]"):
            metric.update(maps, masks, targets, torch.tensor([4, 0.3, torch.nan]))
        with pytest.raises(ValueError, match=r"maps hold NaN.* in row\(s\) \[0, 1, 2\]"):
            metric.update(maps * torch.nan, masks, targets)
        assert metric.hits.sum() + metric.misses.sum() == 0  # what is refused leaves no trace


def test_what_holds_for_any_pair() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st: Any = pytest.importorskip("hypothesis.strategies")

    @hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        height=st.integers(1, 12),
        width=st.integers(1, 12),
        levels=st.integers(1, 6),
        density=st.floats(0, 1),
        tolerances=st.tuples(st.floats(0, 20), st.floats(0, 20)),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(
        height: int,
        width: int,
        levels: int,
        density: float,
        tolerances: tuple[float, float],
        seed: int,
    ) -> None:
        random = np.random.default_rng(seed)
        maps = torch.from_numpy(random.integers(0, levels, (2, height, width)) / levels)
        masks = torch.from_numpy(random.random((2, height, width)) < density)
        low, high = sorted(tolerances)
        hits = pointing_hits(maps, masks, low)
        shares = energy_in_mask(maps, masks)
        for values in (hits, shares):
            assert ((values >= 0) & (values <= 1)).all()
        assert (hits <= pointing_hits(maps, masks, high)).all()
        assert (hits <= pointing_hits(maps, masks | masks.flip(1), low)).all()
        for turn in (lambda x: x.flip(1), lambda x: x.flip(2), lambda x: x.transpose(1, 2)):
            assert torch.equal(hits, pointing_hits(turn(maps), turn(masks), low))
            torch.testing.assert_close(shares, energy_in_mask(turn(maps), turn(masks)))
        # Only the order counts for the maximum, and only proportions for the energy.
        assert torch.equal(hits, pointing_hits(maps * 2 - 1, masks, low))
        torch.testing.assert_close(shares, energy_in_mask(maps * 4, masks))
        torch.testing.assert_close(
            shares + energy_in_mask(maps, ~masks), (maps.amax((1, 2)) > 0).double()
        )

    check()
