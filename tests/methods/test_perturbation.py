from typing import Any, Literal

import oracles
import pytest
import torch
from torch import Tensor, nn

from lightning_aop import (
    AOP,
    EMP,
    IGOS,
    RISE,
    Blank,
    RankedMask,
    SaliencyMethod,
    WGradCAM,
    fast_sigcam,
    sigcam,
)
from lightning_aop.errors import NonFiniteScoreError
from lightning_aop.methods import RegionalMultiscale
from lightning_aop.methods.igos import ArmijoSearch
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import GaussianBlur, resize
from lightning_aop.scores import sigmoid


@pytest.fixture
def pictures(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].double() * 4 - 2, batch[1]


def starts(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, size, size, generator=generator, dtype=torch.float64) * 0.3


@pytest.mark.parametrize(
    ("warmup", "noise"), [(0, 0.012), (2, 0.012), (0, "port"), (0, 0), (0, 0.3)]
)
def test_igos_is_the_slow_float64_loop(
    double: nn.Module,
    pictures: tuple[Tensor, Tensor],
    warmup: int,
    noise: float | Literal["port"],
) -> None:
    images, targets = pictures
    images = images * torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)[:, None, None]
    method = IGOS(
        iterations=6,
        samples=4,
        mask_size=9,
        noise=noise,
        warmup=warmup,
        eval_batch_size=7,
        seed=11,
    )
    start = starts(4, 9)
    with count_evaluations(double) as count:
        maps = method.refine(double, images, targets, start)
    generator = torch.Generator().manual_seed(11)
    draws = [torch.randn(4, 3, 40, 32, generator=generator, dtype=torch.float64) for _ in range(6)]
    light, full = GaussianBlur(31, 30.0)(images), GaussianBlur()(images)
    trials = 0
    for i in range(4):
        mask, _, tried = oracles.igos(
            double,
            images[i],
            int(targets[i]),
            1 - start[i],
            lambda iteration, i=i: (light if iteration < warmup else full)[i],
            [list(d) for d in draws],
            l1=1.0,
            tv=20.0,
            samples=4,
            share=None if noise == "port" else noise,
        )
        trials += tried
        torch.testing.assert_close(maps[i], 1 - oracles.enlarge(mask, 40, 32), atol=1e-9, rtol=0)
    # 2S a iteration for the gradient, the trials, the first score, and one more at the switch.
    assert count.backward == 4 * 6 * 4
    assert count.forward == 4 * 6 * 4 + trials + 4 * (2 if warmup else 1)
    assert 4 * 6 <= trials <= 4 * 6 * 12


class Normalised(nn.Module):
    """Takes the pictures in other units than the network."""

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean[:, None, None], std[:, None, None]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * self.std + self.mean)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "method",
    [
        sigcam(),
        fast_sigcam(),
        AOP(Blank(), IGOS()),
        # After hundreds of Adam's steps two such runs are apart by more than rounding.
        AOP(Blank(), EMP(iterations=20)),
    ],
    ids=["SIGCAM", "fast_sigcam()", "I-GOS", "EMP"],
)
def test_a_map_does_not_depend_on_the_units_of_the_images(
    double: nn.Module, pictures: tuple[Tensor, Tensor], method: SaliencyMethod
) -> None:
    images, targets = pictures
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.21, 0.33]], dtype=torch.float64)
    other = (images - mean[:, None, None]) / std[:, None, None]
    one = method.explain(double, images, targets)
    two = method.explain(Normalised(double, mean, std), other, targets)
    assert one.std() > 0
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_the_noise_of_an_image_of_one_colour(double: nn.Module) -> None:
    images = torch.full((1, 3, 40, 32), 0.7, dtype=torch.float64)
    for noise in (0.012, "port"):
        method = IGOS(iterations=1, samples=2, noise=noise)  # type: ignore[arg-type]
        maps = method.refine(double, images, torch.tensor([1]), torch.zeros(1, 28, 28))
        assert maps.isfinite().all()


def test_igos_relaxes_the_area_where_the_score_does_not_move(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    l1 = torch.ones(3)
    moved = torch.tensor([0.0, 5e-3, 0.5])
    method = IGOS(iterations=15)
    assert method._relaxed(l1, 0, moved).tolist() == [1, 1, 1]
    torch.testing.assert_close(method._relaxed(l1, 7, moved), torch.tensor([0.1, 1, 1]))
    torch.testing.assert_close(method._relaxed(l1, 12, moved), torch.tensor([0.2, 0.2, 1]))
    assert method._relaxed(l1, 8, moved).tolist() == [1, 1, 1]


def test_ranked_mask_is_the_slow_float64_loop(
    double: nn.Module, pictures: tuple[Tensor, Tensor]
) -> None:
    images, targets = pictures
    start = starts(4, 9)
    method = RankedMask(iterations=5, mask_size=9, eval_batch_size=3, seed=4)
    with count_evaluations(double) as count:
        maps = method.refine(double, images, targets, start)
    assert count.total == 4 * (4 * 5 + 1)
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randperm(5, generator=generator).tolist() for _ in range(2))
    shares = [
        (((a + 0.5) / 5) ** method.focus, ((b + 0.5) / 5) ** method.focus)
        for a, b in zip(first, second, strict=True)
    ]
    baseline = GaussianBlur()(images)
    strengths = []
    for i in range(4):
        ranking, gain = oracles.ranked_mask(
            double,
            images[i],
            baseline[i],
            int(targets[i]),
            start[i],
            shares,
            method.lr,
            method.momentum,
            method.temperature,
            method.smoothing,
            method.balance,
            method.prior,
        )
        with torch.no_grad():
            whole = float(double(images[i : i + 1]).softmax(dim=1)[0, targets[i]])
        strengths.append(min(max(2 * gain / max(whole, 0.05), 0), 1))
        stretched = (ranking - ranking.min()) / (ranking.max() - ranking.min())
        expected = strengths[i] * oracles.enlarge(stretched, 40, 32) ** 3
        torch.testing.assert_close(maps[i], expected, atol=1e-9, rtol=0)
    assert any(0 < strength < 1 for strength in strengths), strengths


def test_armijo_search_takes_the_known_step_on_a_parabola() -> None:
    # L = ½ c m², direction c m: enough fall when step·c ≤ 2(1 − 1e-4); steps are 200·0.2^k.
    curvature = torch.tensor([1.0, 40.0])
    masks = torch.full((2, 1, 1), 0.9)
    calls: list[list[int]] = []

    def objective(trial: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(rows.tolist())
        loss = curvature[rows] * trial[:, 0, 0].square() / 2
        return loss, loss

    direction = curvature[:, None, None] * masks
    found, _ = ArmijoSearch()(objective, masks, direction, objective(masks, torch.arange(2))[0])
    # Clamped to 0, every trial is at the minimum; the fall of 16.2 is below the 25.9 that a step
    # of 200 asks of the second, and enough for one of 40.
    assert not found.any()
    assert calls[1:] == [[0, 1], [1]]
    calls.clear()
    uphill, _ = ArmijoSearch()(objective, masks, -direction, torch.zeros(2))
    assert len(calls) == 12
    smallest = 200 * 0.2**11
    torch.testing.assert_close(uphill, (masks + smallest * direction).clamp(0, 1))


def test_emp_is_the_slow_float64_loop(double: nn.Module, pictures: tuple[Tensor, Tensor]) -> None:
    images, targets = pictures
    start = starts(4, 9)
    method = EMP(iterations=12, mask_size=9, l1=0.05, tv=5.0, eval_batch_size=3)
    with count_evaluations(double) as count:
        maps = method.refine(double, images, targets, start)
    assert (count.forward, count.backward) == (4 * 12, 4 * 12)
    baseline, inside = GaussianBlur()(images), 0
    for i in range(4):
        mask = oracles.emp(
            double, images[i], baseline[i], int(targets[i]), 1 - start[i], 12, l1=0.05, tv=5.0
        )
        torch.testing.assert_close(maps[i], 1 - oracles.enlarge(mask, 40, 32), atol=1e-6, rtol=0)
        inside += int(((mask > 0.05) & (mask < 0.95)).sum())
    assert inside > 20, "else little more than the clamp is tested"


@pytest.mark.parametrize(
    "method",
    [
        AOP(WGradCAM(), EMP(iterations=4, eval_batch_size=3)),
        AOP(WGradCAM(), IGOS(iterations=3, samples=3, eval_batch_size=5)),
        fast_sigcam(iterations=4, eval_batch_size=3),
    ],
)
def test_batch_chunk_and_seed(
    method: AOP, double: nn.Module, pictures: tuple[Tensor, Tensor]
) -> None:
    images, targets = pictures
    together = method.explain(double, images, targets)
    assert torch.equal(method.explain(double, images, targets), together)
    single = torch.cat(
        [method.explain(double, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    )
    torch.testing.assert_close(single, together, atol=1e-7, rtol=0)
    assert together.min() >= 0
    assert together.max() <= 1


def test_the_start_is_filtered_scaled_and_turned(net: nn.Module) -> None:
    maps = torch.tensor([[[0.0, 0.69], [0.7, 1.0]]])
    torch.testing.assert_close(
        AOP(Blank(), IGOS())._filtered(maps), torch.tensor([[[0, 0], [0.105, 0.15]]])
    )
    share = AOP(Blank(), IGOS(), threshold=0.5, scale=1.0, percentile=True)
    torch.testing.assert_close(share._filtered(maps), torch.tensor([[[0, 0], [0.7, 1.0]]]))


def test_aop_starts_the_second_stage_from_the_layers_own_resolution(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch
    seen: list[Tensor] = []

    class Keep:
        def refine(
            self, model: nn.Module, images: Tensor, targets: Tensor, start: Tensor
        ) -> Tensor:
            seen.append(start)
            return resize(start, (40, 32))

    AOP(WGradCAM("features"), Keep()).explain(net, images, targets)
    AOP(Blank(), Keep()).explain(net, images, targets)
    assert seen[0].shape == (4, 10, 8)
    assert not seen[1].any()


def test_sigcam_has_the_papers_constants() -> None:
    method = sigcam()
    assert isinstance(method.perturbation, IGOS)
    assert (method.threshold, method.scale) == (0.7, 0.15)
    assert method.perturbation.iterations == 15
    assert method.perturbation.warmup == 5
    assert method.perturbation.samples == 20
    assert method.perturbation.mask_size == 28
    assert (method.perturbation.l1, method.perturbation.tv) == (1.0, 20.0)
    assert method.perturbation.baseline == GaussianBlur(51, 50.0)


def test_multilabel_score(double: nn.Module, pictures: tuple[Tensor, Tensor]) -> None:
    images, targets = pictures
    one = fast_sigcam(iterations=2).explain(double, images, targets)
    other = fast_sigcam(iterations=2, score=sigmoid).explain(double, images, targets)
    assert not torch.equal(one, other)


@pytest.mark.usefixtures("unchecked")
def test_settings_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="IGOS: iterations must be a whole number"):
        IGOS(iterations=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RankedMask: lr must be above 0, got nan"):
        RankedMask(lr=float("nan"))
    with pytest.raises(ValueError, match="RankedMask: prior must be 0 or more, got -1"):
        RankedMask(prior=-1)
    with pytest.raises(ValueError, match="IGOS: samples must be above 0, got 0"):
        IGOS(samples=0)
    with pytest.raises(ValueError, match=r"IGOS: noise must be a share .*, got -0.1"):
        IGOS(noise=-0.1)
    with pytest.raises(ValueError, match="EMP: lr must be above 0, got 0"):
        EMP(lr=0)
    with pytest.raises(ValueError, match="RankedMask: iterations must be above 0, got -1"):
        RankedMask(iterations=-1)
    with pytest.raises(ValueError, match=r"AOP: threshold must lie in \[0, 1\], got 70"):
        AOP(Blank(), IGOS(), threshold=70)
    with pytest.raises(ValueError, match="ArmijoSearch: decay must lie between 0 and 1, got 2"):
        ArmijoSearch(decay=2.0)


def test_a_start_of_another_length_is_refused(
    net: nn.Module, batch: tuple[Tensor, Tensor], unchecked: None
) -> None:
    images, targets = batch
    with pytest.raises(ValueError, match=r"one map \[h, w\] for each of the 4 images"):
        IGOS().refine(net, images, targets, torch.zeros(3, 7, 7))


@pytest.mark.parametrize(
    "method", [EMP(iterations=1), IGOS(iterations=1), RankedMask(iterations=1)]
)
def test_a_score_that_is_not_a_number_names_its_image(
    method: EMP | IGOS | RankedMask, double: nn.Module, pictures: tuple[Tensor, Tensor]
) -> None:
    images = pictures[0].clone()
    images[2, 0, 5, 5] = float("nan")
    with pytest.raises(NonFiniteScoreError, match=r"the class score is .* image\(s\) \[2\] "):
        method.refine(double, images, pictures[1], starts(4, 9))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            (WGradCAM, IGOS()),
            r"activation must have explain.*got the class WGradCAM, not WGradCAM\(\)",
        ),
        ((WGradCAM(), IGOS), r"perturbation must have refine.*got the class IGOS, not IGOS\(\)"),
        (("wgradcam", IGOS()), "activation must have explain.*got 'wgradcam'"),
        ((IGOS(), WGradCAM()), "activation must have explain.*got IGOS"),
    ],
)
def test_stages_that_are_none_are_refused(stages: Any, message: str, unchecked: None) -> None:
    with pytest.raises(TypeError, match=message):
        AOP(*stages)


@pytest.mark.parametrize("method", [RISE, WGradCAM, RegionalMultiscale])
def test_a_score_that_is_no_function_is_refused(
    method: Any, net: nn.Module, batch: Any, unchecked: None
) -> None:
    with pytest.raises(TypeError, match=r"score must be .*scores\.softmax, got 'softmax'"):
        method(score="softmax").explain(net, *batch)
