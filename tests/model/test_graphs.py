"""Passes that are replayed as graphs: when they are, that they give the same, and when they aren't.

CUDA's graphs need a GPU. `make_fx` records what a function dispatches, and replays it with other tensors
and the same constants, as they do: the decisions and the methods are tested with it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_aop import EMP, IGOS, RISE, XRAI, fast_sigcam
from lightning_aop.methods.igos import ArmijoSearch
from lightning_aop.metrics.functional import deletion_insertion_curves
from lightning_aop.model import graphs
from lightning_aop.model.graphs import Graphs, Work
from lightning_aop.model.passes import Passes, count_evaluations


class Recording:
    """Captures by `make_fx`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.captured = 0
        self.replayed = 0
        self.open = True

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        self.open = False

    def __call__(self, work: Work, tensors: Sequence[Tensor]) -> Work:
        self.captured += 1
        recorded = make_fx(lambda *given: work(*given), tracing_mode="real")(*tensors)

        def replay(*others: Tensor) -> tuple[Tensor, ...]:
            self.replayed += 1
            return tuple(recorded(*others))

        return replay


def numbers(count: int, size: int = 3) -> list[Tensor]:
    return [torch.arange(size) + float(n) for n in range(count)]


def test_two_calls_of_a_shape_are_eager_and_the_rest_are_replayed() -> None:
    recording, calls = Recording(), []

    def work(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(x))
        return (x * x,)

    repeated = Graphs(recording).repeated(work, 10)
    for x in [*numbers(5), *numbers(1, size=4), *numbers(5)]:
        assert torch.equal(repeated(x)[0], x * x)
    assert (recording.captured, recording.replayed) == (1, 1 + 3 + 5)  # one to be checked
    assert calls == [3, 3, 3, 4]  # the third when it was recorded


@pytest.mark.parametrize("times", [1, 5])
def test_few_passes_stay_eager(times: int) -> None:
    def work(x: Tensor) -> tuple[Tensor, ...]:
        return (x + 1,)

    assert Graphs(Recording()).repeated(work, times) is work
    assert Graphs().repeated(work, 100) is work


def asks(x: Tensor) -> Tensor:
    return x * x.sum().item()


def branches(x: Tensor) -> Tensor:
    return -x if x.sum() > 4 else x


def masks(x: Tensor) -> Tensor:
    return x * x[x > 1].sum()


def counts(x: Tensor) -> Tensor:
    return x * len(torch.nonzero(x))


def assigns(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 1] = 0
    return y


@pytest.mark.parametrize("forward", [asks, branches, masks, counts, assigns])
def test_what_hangs_on_values_is_not_captured(forward: Callable[[Tensor], Tensor]) -> None:
    recording = Recording()
    repeated = Graphs(recording).repeated(lambda x: (forward(x),), 10)
    for x in numbers(6):
        assert torch.equal(repeated(x)[0], forward(x))
    assert recording.captured == 0


def test_rows_taken_by_their_numbers_are_captured() -> None:
    recording, rows = Recording(), torch.tensor([2, 0])
    repeated = Graphs(recording).repeated(lambda x: (x[rows],), 10)
    for x in numbers(6):
        assert torch.equal(repeated(x)[0], x[rows])
    assert recording.replayed == 1 + 4


def test_what_comes_out_otherwise_stays_eager() -> None:
    recording, drawn = Recording(), torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> tuple[Tensor, ...]:
        return (x + torch.rand((), generator=drawn),)

    repeated = Graphs(recording).repeated(noisy, 10)
    for x in numbers(6):
        repeated(x)
    assert (recording.captured, recording.replayed) == (1, 1)


def test_a_capture_that_fails_costs_nothing() -> None:
    class Fails(Recording):
        def __call__(self, work: Work, tensors: Sequence[Tensor]) -> Work:
            torch.rand(())
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    repeated = Graphs(Fails()).repeated(lambda x: (x * 2,), 10)
    before = torch.get_rng_state()
    for x in numbers(6):
        assert torch.equal(repeated(x)[0], 2 * x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    made: list[Recording] = []

    def make(device: torch.device) -> Recording:
        made.append(Recording(device))
        return made[-1]

    monkeypatch.setitem(graphs.CAPTURES, "cpu", make)
    return made


METHODS = {
    "fast_sigcam": fast_sigcam(),
    "I-GOS": IGOS(iterations=8, samples=4, search=ArmijoSearch(at_once=20)),
    "EMP": EMP(iterations=8, eval_batch_size=3),
    "RISE": RISE(masks=20, eval_batch_size=8),
    "XRAI": XRAI(steps=8, segments=(9,), eval_batch_size=7),
}


def explained(name: str, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, targets = batch
    if name == "curves":
        maps = torch.rand(
            len(images), *images.shape[2:], generator=torch.Generator().manual_seed(0)
        )
        return torch.stack(deletion_insertion_curves(net, images, maps, targets, eval_batch_size=8))
    if name in ("I-GOS", "EMP"):
        return METHODS[name].refine(net, images, targets, torch.zeros(len(images), 28, 28))
    return METHODS[name].explain(net, images, targets)


@pytest.mark.parametrize("name", [*METHODS, "curves"])
def test_maps_and_curves_are_those_of_eager_passes(
    name: str, net: nn.Module, batch: Any, recordings: list[Recording]
) -> None:
    if name == "XRAI":
        pytest.importorskip("skimage")
    explained(name, net, batch)  # finds the layer
    recordings.clear()
    with count_evaluations(net) as eager:
        expected, _ = Passes(graphs=False).within_memory(lambda: explained(name, net, batch), 4)
    assert [each for each in recordings if each.captured] == []
    before = snapshot(net)
    seen: list[int] = []
    with count_evaluations(net, lambda count: seen.append(count.forward)) as count:
        found, _ = Passes(graphs="auto").within_memory(lambda: explained(name, net, batch), 4)
    assert torch.equal(found, expected)
    assert sum(each.replayed for each in recordings) > 0
    assert not any(each.open for each in recordings)
    # What a replay evaluates counts, and what is done to capture it does not.
    assert count == eager
    assert seen == sorted(set(seen))
    assert_same(before, snapshot(net))


class Asking(SmallNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * float(images.abs().max() > 0))


def test_a_model_that_asks_for_values_is_explained_eagerly(
    batch: Any, recordings: list[Recording]
) -> None:
    torch.manual_seed(0)
    model = Asking().eval()
    found = fast_sigcam().explain(model, *batch)
    assert sum(each.captured for each in recordings) == 0
    plain = SmallNet().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(found, fast_sigcam().explain(plain, *batch))
