"""The contrast of a class with the likeliest others, for any method."""

import pickle
from typing import Any

import pytest
import torch
from conftest import SmallNet
from torch import Tensor, nn

from lightning_aop import (
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    WGradCAM,
    fast_sigcam,
    sigcam,
)
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import min_max
from lightning_aop.scores import contrast, logit, softmax


def test_contrast_is_the_slow_loop() -> None:
    logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    for gamma, references in ((0.6, 3), (1.0, 1), (0.0, 2), (0.5, 9)):
        found = contrast(gamma, references)(logits, targets)
        for row, target in enumerate(targets.tolist()):
            others = sorted(
                (float(z) for k, z in enumerate(logits[row]) if k != target), reverse=True
            )
            likeliest = others[:references]
            expected = float(logits[row, target]) - gamma * sum(likeliest) / len(likeliest)
            assert float(found[row]) == pytest.approx(expected, abs=1e-6)
    assert contrast(0.0)(logits, targets).tolist() == logit(logits, targets).tolist()


def test_its_slope_is_known() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]], requires_grad=True)
    contrast(0.6, 2)(logits, torch.tensor([1])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.3, 1.0, -0.3, 0.0]]))


def test_maps_are_those_of_finer_cam(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM as Theirs
    from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget

    images, targets = batch
    net.head.weight.data *= 100  # theirs adds 1e-7 to what it divides by
    net.features[4].inplace = False  # theirs would see what it leaves
    with torch.no_grad():
        logits = net(images)
    # Theirs weighs the references by their probabilities: of one alone the weight cancels, and the mean
    # of such targets is ours for several.
    for references in (1, 3):
        finer = []
        for row, target in enumerate(targets.tolist()):
            order = [k for k in logits[row].argsort(descending=True).tolist() if k != target]
            parts = [FinerWeightedTarget(target, [k], 0.6) for k in order[:references]]
            finer.append(lambda output, parts=parts: sum(p(output) for p in parts) / len(parts))
        with Theirs(net, [net.features[3]]) as cam:
            theirs = min_max(torch.from_numpy(cam(images, finer)))
        ours = GradCAM("features.3", score=contrast(0.6, references)).explain(net, images, targets)
        plain = GradCAM("features.3").explain(net, images, targets)
        assert (ours - plain).abs().amax() > 0.05, "the test needs a contrast that counts"
        torch.testing.assert_close(min_max(ours), theirs, atol=1e-3, rtol=0)


METHODS: list[Any] = [
    lambda score: GradCAM(score=score),
    lambda score: WGradCAM(score=score),
    lambda score: GradCAMPlusPlus(score=score),
    lambda score: HiResCAM(score=score),
    lambda score: LayerCAM(score=score),
    lambda score: fast_sigcam(iterations=2, score=score),
    lambda score: sigcam(score=score),
]


@pytest.mark.parametrize("make", METHODS)
def test_any_method_takes_it_at_no_further_cost(make: Any, batch: tuple[Tensor, Tensor]) -> None:
    images, targets = batch
    torch.manual_seed(3)
    model = SmallNet().eval()
    model.head.weight.data *= 5
    costs, maps = [], []
    for score in (logit, contrast()):
        method = make(score)
        method.explain(model, images, targets)  # finds the layer
        with count_evaluations(model) as count:
            maps.append(method.explain(model, images, targets))
        costs.append(count.total)
    assert costs[0] == costs[1] or "IGOS" in repr(method)  # whose line search looks at the score
    assert maps[1].isfinite().all()
    assert maps[1].amax() <= 1
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)


def test_it_is_named_compared_and_pickled_by_its_settings() -> None:
    score = contrast(0.5, 2)
    assert repr(score) == "contrast(gamma=0.5, references=2)"
    assert pickle.loads(pickle.dumps(score)) == score != contrast()


def test_what_can_not_be_contrasted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma=-1 and\s+references=3: take scores.logit"):
        contrast(-1)
    with pytest.raises(ValueError, match="references=0"):
        contrast(references=0)
    with pytest.raises(ValueError, match="the model has one: take scores"):
        contrast()(torch.ones(2, 1), torch.tensor([0, 0]))
    assert float(softmax(torch.ones(1, 1), torch.tensor([0]))) == 1
