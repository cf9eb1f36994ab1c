"""What only a GPU can show: graphs that are captured for real, the memory that passes take.

make test-gpu
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from conftest import assert_same, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import IGOS, ExplanationMonitor, GradCAM, fast_sigcam
from lightning_aop.metrics.functional import deletion_insertion_curves
from lightning_aop.metrics.similarity import rank_correlation
from lightning_aop.model import graphs
from lightning_aop.model.adapter import explaining, predict
from lightning_aop.model.graphs import CudaGraphs
from lightning_aop.model.passes import Passes, count_evaluations, kept_bytes
from lightning_aop.monitor.failures import Failures
from lightning_aop.scores import logit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    with torch.no_grad():
        network.fc.weight *= 20  # or what is hidden would hardly count
    return network.cuda().eval()


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 96, 96, generator=generator).cuda(), torch.arange(8).cuda()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many graphs each explanation has captured."""
    found: list[int] = []

    class Counting(CudaGraphs):
        def close(self) -> None:
            found.append(len(self._graphs))
            super().close()

    monkeypatch.setitem(graphs.CAPTURES, "cuda", Counting)
    return found


def explained(name: str, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    if name == "curves":
        maps = torch.rand(len(images), 96, 96, generator=torch.Generator().manual_seed(0))
        both = deletion_insertion_curves(
            model, images, maps, targets, score=logit, eval_batch_size=64
        )
        return torch.stack(both)
    if name == "I-GOS":
        start = torch.zeros(len(images), 28, 28)
        return IGOS(iterations=8, samples=8, score=logit).refine(model, images, targets, start)
    return fast_sigcam("layer4", score=logit).explain(model, images, targets)


@pytest.mark.parametrize("name", ["fast_sigcam", "I-GOS", "curves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_what_eager_passes_give_and_leave_no_trace(
    name: str, dtype: torch.dtype, model: nn.Module, pictures: Any, captured: list[int]
) -> None:
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        work = lambda: explained(name, model, *pictures)  # noqa: E731
        with count_evaluations(model) as eager:
            expected, _ = Passes(graphs=False).within_memory(work, 8)
        before, random = snapshot(model), torch.cuda.get_rng_state()
        with count_evaluations(model) as count:
            found, _ = Passes(graphs="auto").within_memory(work, 8)
    assert sum(captured) > 0
    assert count == eager
    span = (expected.amax() - expected.amin()).item()
    assert span > 0.1
    if name == "curves":
        allowed = (2e-2 if dtype == torch.bfloat16 else 1e-3) * span
        torch.testing.assert_close(found, expected, atol=allowed, rtol=0)
    else:
        # A line search may take another step where a sum is rounded otherwise.
        least = 0.9 if dtype == torch.bfloat16 else 0.99
        assert (rank_correlation(found, expected) > least).all()
        assert (found.amax() - found.amin()).item() == pytest.approx(span, rel=0.2)
    assert_same(before, snapshot(model))
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_nothing_is_waited_for_where_nothing_was_captured(
    model: nn.Module, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", waited.append)
    Passes(graphs="auto").within_memory(lambda: predict(model, pictures[0]), 8)
    assert waited == []


def test_the_graphs_memory_is_given_back(
    model: nn.Module, pictures: Any, captured: list[int]
) -> None:
    held = []
    for _ in range(4):
        Passes(graphs="auto").within_memory(lambda: explained("fast_sigcam", model, *pictures), 8)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert max(captured) > 0
    assert held[1] == held[2] == held[3]


class Asking(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits * float(logits.abs().max() > 0)


def test_a_model_that_waits_for_values_is_explained_eagerly_and_the_device_goes_on(
    model: nn.Module, pictures: Any, captured: list[int]
) -> None:
    expected, _ = Passes(graphs=False).within_memory(
        lambda: explained("fast_sigcam", model, *pictures), 8
    )
    found, _ = Passes(graphs="auto").within_memory(
        lambda: fast_sigcam("net.layer4", score=logit).explain(Asking(model), *pictures), 8
    )
    assert sum(captured) == 0
    assert expected.amax() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-3 * expected.amax().item(), rtol=0)
    assert torch.rand(3, device="cuda").isfinite().all()


def test_training_goes_on_after_graphs_as_without(pictures: Any) -> None:
    def trained(explains: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = torchvision.models.resnet18().cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            images = pictures[0] + torch.randn_like(pictures[0])
            nn.functional.cross_entropy(model(images), pictures[1]).backward()
            optimizer.step()
            if explains:
                explain = functools.partial(fast_sigcam("layer4").explain, model, *pictures)
                Passes(graphs="auto").within_memory(explain, 8)
        return model.state_dict()

    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        assert_same(trained(False), trained(True))
    finally:
        torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("size", [16, 64])
def test_a_pass_takes_the_memory_that_its_formula_says(size: int, model: nn.Module) -> None:
    images = torch.randn(size, 3, 128, 128, device="cuda")
    with explaining(model, images, torch.zeros(size, dtype=torch.long)) as (classifier, x, _):
        two = x[:2].clone().requires_grad_()
        each = kept_bytes(lambda: classifier.logits(two), model) // 2
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(classifier.logits(leaf).sum(), leaf)  # libraries take their memory
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(classifier.logits(leaf).sum(), leaf)
        taken = torch.cuda.max_memory_allocated() - before
    assert 0.5 * size * each < taken < 1.5 * size * each + 2**26


def test_more_images_than_the_usual_number_go_through_in_large_passes(model: nn.Module) -> None:
    images = torch.randn(300, 3, 96, 96, device="cuda")
    sizes: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: sizes.append(len(output)) if module is model else None
    )
    try:
        predict(model, images)
    finally:
        handle.remove()
    assert max(sizes) > 32


class Followed(pl.LightningModule):
    """Validates without a wait for the device."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])


def test_failures_are_those_of_the_cpu_and_no_batch_waits_for_them(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 1000, (40,), generator=generator)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    see, found = Failures.see, {}

    def without_waiting(self: Failures, *arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            see(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Failures, "see", without_waiting)
    for device in ("cpu", "gpu"):
        monitor = ExplanationMonitor(GradCAM(), failures=4, metrics=False, controls=False)
        run = pl.Trainer(
            accelerator=device,
            devices=1,
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
            callbacks=[monitor],
        )
        run.validate(Followed(model), loader, verbose=False)
        found[device] = monitor._state.failures.now
    assert [each.place for each in found["cpu"]] == [each.place for each in found["gpu"]]
    for one, other in zip(found["cpu"], found["gpu"], strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.image, images[one.place[1]])
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
