"""What stands beside the network: operations beyond the model's own, and values that the host asks for.

A limit may only fall. What is counted on a CPU is what a GPU would be told, with all trials of I-GOS's
line search in one pass, as there.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torchvision
from counting import Counts, operations
from torch import Tensor, nn

from lightning_aop import AOP, EMP, IGOS, RISE, XRAI, GradCAM, WGradCAM, fast_sigcam
from lightning_aop.methods.igos import ArmijoSearch
from lightning_aop.metrics import infidelity, judges, road
from lightning_aop.metrics.functional import deletion_insertion_curves
from lightning_aop.model.isolation import undisturbed
from lightning_aop.ops import GaussianBlur

IMAGES, SIDE = 4, 32


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


class Work(NamedTuple):
    """Something that is done `rounds` times, in which the model has `passes` passes a round."""

    do: Callable[[nn.Module, Tensor, Tensor, int], object]
    passes: int
    operations: int
    waits: int = 0


def igos(iterations: int, search: ArmijoSearch) -> AOP:
    second = IGOS(iterations=iterations, search=search, eval_batch_size=128)
    return AOP(WGradCAM("layer4"), second)


def curves(model: nn.Module, images: Tensor, targets: Tensor, rounds: int) -> object:
    maps = torch.rand(len(images), SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return deletion_insertion_curves(
        model, images, maps, targets, steps=16 * rounds, eval_batch_size=32
    )


def emp(model: nn.Module, images: Tensor, targets: Tensor, rounds: int) -> object:
    start = torch.zeros(len(images), 7, 7)
    return EMP(iterations=rounds, eval_batch_size=4).refine(model, images, targets, start)


def xrai(model: nn.Module, images: Tensor, targets: Tensor, rounds: int) -> object:
    # 2 S - 1 points on the two paths of an image, 4 more for each round of 16 images.
    method = XRAI(steps=2 * rounds + 1, segments=(9,), eval_batch_size=16)
    return method.explain(model, images, targets)


def roads(model: nn.Module, images: Tensor, targets: Tensor, rounds: int) -> object:
    maps = torch.rand(len(images), SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return road(model, images, maps, targets, shares=(0.5,) * rounds, eval_batch_size=8)


def infidelities(model: nn.Module, images: Tensor, targets: Tensor, rounds: int) -> object:
    maps = torch.rand(len(images), SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return infidelity(model, images, maps, targets, samples=4 * rounds - 1, eval_batch_size=16)


LEVELS = 3  # of 32, 16 and 8 pixels, for which ROAD solves one after the other

ROUNDS = {
    "fast_sigcam": Work(
        lambda m, x, t, n: fast_sigcam("layer4", iterations=n, eval_batch_size=8).explain(m, x, t),
        passes=1,
        operations=66,
    ),
    "I-GOS": Work(
        lambda m, x, t, n: igos(n, ArmijoSearch(at_once=20)).explain(m, x, t),
        passes=2,
        operations=128,
    ),
    "curves": Work(curves, passes=4, operations=32),
    "RISE": Work(
        lambda m, x, t, n: RISE(masks=8 * n, eval_batch_size=32).explain(m, x, t),
        passes=1,
        operations=20,
    ),
    # Adam counts its steps in a tensor on the host.
    "EMP": Work(emp, passes=1, operations=81, waits=1),
    "XRAI": Work(xrai, passes=1, operations=32),
    # On each level one look before it starts, and one after 32 iterations or 64.
    "ROAD": Work(roads, passes=1, operations=1440, waits=2 * LEVELS),
    "infidelity": Work(infidelities, passes=1, operations=13),
}


def counts(work: Work, model: nn.Module, rounds: int) -> Counts:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator)
    targets = torch.arange(IMAGES)
    return operations(model, lambda: work.do(model, images, targets, rounds))


def test_to_leave_no_trace_takes_few_operations(network: nn.Module) -> None:
    def nothing() -> None:
        with undisturbed(network):
            pass

    found = operations(network, nothing)
    state = len([*network.parameters(), *network.buffers()])
    assert state > 100
    # A lazy clone for each large tensor; the small ones are copied, and compared, by their dtype.
    assert found.total <= 26
    assert sum(found.waits.values()) <= 2


def test_gradcam(network: nn.Module) -> None:
    work = Work(lambda m, x, t, n: GradCAM("layer4").explain(m, x, t), 1, 57)
    found = counts(work, network, 1)
    assert found.passes == 1
    assert found.total <= work.operations
    # Twice the state, the targets, and whether the logits are finite.
    assert sum(found.waits.values()) <= 5


@pytest.mark.parametrize("name", ROUNDS)
def test_each_round_takes_few_operations_and_waits_for_nothing(
    name: str, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "XRAI":
        pytest.importorskip("skimage")
    monkeypatch.setattr(judges, "_ASKED", {})  # as there
    work = ROUNDS[name]
    # As I-GOS does something else halfway, rounds are compared of which as many are of each kind.
    few, many = counts(work, network, 2), counts(work, network, 4)
    assert many.passes - few.passes == 2 * work.passes
    assert many.total - few.total <= 2 * work.operations
    if work.waits:
        assert sum(many.waits.values()) - sum(few.waits.values()) <= 2 * work.waits
    else:
        assert many.waits == few.waits


def test_the_line_search_on_a_cpu_looks_once_a_trial_and_tries_no_more(network: nn.Module) -> None:
    one, all_ = (
        counts(
            Work(lambda m, x, t, n, k=k: igos(n, ArmijoSearch(at_once=k)).explain(m, x, t), 0, 0),
            network,
            2,
        )
        for k in (None, 20)
    )
    # A look at the layer's map, and one at the first score, come before the iterations.
    trials = one.passes - 2 - 2
    assert one.waits["index by mask"] <= trials
    assert all_.waits["index by mask"] == 0
    assert all_.passes == 2 + 2 * 2


@pytest.mark.parametrize("blur", [GaussianBlur(), GaussianBlur(31, 30.0)])
def test_a_blur_takes_its_matrices_to_the_device_once(blur: GaussianBlur) -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    found = operations(nn.Identity(), lambda: blur(images))
    launched = {name for name, count in found.operations.items() if count}
    assert launched <= {"mm", "bmm", "_unsafe_view", "clone"}
    with torch.inference_mode():
        GaussianBlur(kernel=blur.kernel + 2)(images)
    leaf = images.clone().requires_grad_()
    GaussianBlur(kernel=blur.kernel + 2)(leaf).sum().backward()
    assert leaf.grad is not None
