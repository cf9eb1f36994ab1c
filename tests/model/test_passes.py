"""How many images go through at once, by device and memory; a fake accelerator says what is free."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_aop import GradCAM, fast_sigcam
from lightning_aop.model import adapter, passes
from lightning_aop.model.adapter import explaining, find_adapter, predict
from lightning_aop.model.passes import Passes, count_evaluations, kept_bytes, pass_size, slices

GIB = 2**30


def size(
    monkeypatch: pytest.MonkeyPatch, free: int, cost: int, side: int = 224, rows: int = 10_000
) -> int:
    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: free)
    return pass_size(None, rows, torch.zeros(1, 3, side, side), lambda: cost)


@pytest.mark.parametrize(
    ("side", "with_backward", "without"), [(224, 8, 20), (448, 4, 5), (160, 15, 32), (32, 32, 32)]
)
def test_on_a_cpu_passes_are_small_and_smaller_with_a_backward(
    side: int, with_backward: int, without: int
) -> None:
    images = torch.zeros(1, 3, side, side)

    def unasked() -> int:
        raise AssertionError("a CPU needs no look at the memory")

    assert pass_size(None, 10_000, images, unasked) == with_backward
    with torch.no_grad():
        assert pass_size(None, 10_000, images, unasked) == without
        assert pass_size(5, 10_000, images, unasked) == 5
    assert pass_size(None) == 32


@pytest.mark.parametrize(
    ("free", "cost", "side", "expected"),
    [
        (70 * GIB, 100 * 2**20, 224, 128),  # as many as make it faster
        (16 * GIB, 100 * 2**20, 224, 32),  # half of it, an image at 1.5 times its cost: 54
        (2 * GIB, 100 * 2**20, 224, 4),
        (GIB // 8, 100 * 2**20, 224, 1),
        (70 * GIB, 100 * 2**20, 448, 32),
        (70 * GIB, 10 * 2**20, 112, 512),
        (70 * GIB, 2**20, 32, 1024),
    ],
)
def test_on_an_accelerator_memory_and_the_size_of_the_images_decide(
    monkeypatch: pytest.MonkeyPatch, free: int, cost: int, side: int, expected: int
) -> None:
    assert size(monkeypatch, free, cost, side) == expected


def test_more_memory_never_means_smaller_passes_and_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost = 90 * 2**20
    found = [size(monkeypatch, free * GIB, cost) for free in range(1, 80)]
    assert found == sorted(found)
    assert all(n == 1 or n * cost * 1.5 <= free * GIB / 2 for free, n in enumerate(found, 1))


def test_the_usual_number_goes_through_without_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: 1 / 0)  # type: ignore[arg-type, return-value]
    assert pass_size(None, 32, torch.zeros(1, 3, 8, 8), lambda: 1) == 32


def test_the_usual_number_goes_through_where_processes_must_do_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: 70 * GIB)
    assert pass_size(None, 10_000, torch.zeros(1, 3, 224, 224), lambda: None) == 32


def test_what_is_asked_for_counts_more_and_a_lack_of_memory_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert size(monkeypatch, 70 * GIB, 2**20, 224) == 128
    active, tried = Passes(), []

    def work() -> int:
        tried.append(size(monkeypatch, 70 * GIB, 2**20, 224))
        if tried[-1] > 20:
            raise torch.OutOfMemoryError
        return tried[-1]

    assert active.within_memory(work, 500) == (16, True)
    assert tried == [128, 64, 32, 16]
    asked = Passes(usual=12).within_memory(lambda: size(monkeypatch, 70 * GIB, 2**20), 500)
    assert asked == (12, False)


def test_the_bytes_of_an_image_are_those_that_its_graph_keeps() -> None:
    # A frozen convolution keeps its input, a sigmoid its output; the weights are nobody's cost.
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Sigmoid()).requires_grad_(False)
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 8, 8, requires_grad=True)
        assert kept_bytes(lambda images=images: model(images), model) == count * (3 + 4) * 64 * 4


def test_one_probe_for_each_model_and_size_which_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module
) -> None:
    images, targets = torch.rand(40, 3, 16, 16), torch.zeros(40, dtype=torch.long)
    with explaining(net, images, targets) as (classifier, x, _):
        leaf = x[:8].requires_grad_()
        each = kept_bytes(lambda: classifier.logits(leaf), net) // 8
    # Room for 10 images: passes of 8.
    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: 30 * each)
    expected = GradCAM("features.4", 40).explain(net, images, targets)
    probes = seen(monkeypatch)
    with count_evaluations(net) as count:
        maps = GradCAM("features.4").explain(net, images, targets)
    torch.testing.assert_close(maps, expected)
    assert count.total == 2 * 40
    assert len(probes) == 2
    GradCAM("features.4").explain(net, images, targets)
    assert len(probes) == 2


def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the bytes of each piece of work that is looked at from now on."""
    found: list[int] = []

    def looked_at(work: Callable[[], object], model: nn.Module) -> int:
        found.append(kept_bytes(work, model))
        return found[-1]

    monkeypatch.setattr(adapter, "kept_bytes", looked_at)
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_what_autocast_keeps_of_the_weights_is_no_images_cost(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: GIB)
    found: list[int | None] = []
    suiting = passes._suiting

    def noted(rows: int, images: Tensor, cost: Callable[[], int | None], rounds: int) -> int:
        found.append(cost())
        return suiting(rows, images, cost, rounds)

    monkeypatch.setattr(passes, "_suiting", noted)
    # A layer of a thousand times as many weights as an image has values.
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4096), nn.Tanh(), nn.Linear(4096, 10))
    model.requires_grad_(False)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        predict(model, torch.rand(40, 3, 4, 4))
        leaf = [torch.rand(n, 3, 4, 4, requires_grad=True) for n in (4, 12)]
        few, many = (kept_bytes(lambda x=x: model(x), model) for x in leaf)
    assert found == [pytest.approx((many - few) / 8, rel=0.1, abs=1024)]
    assert found[0] is not None
    assert found[0] < 2**16


def test_the_module_behind_an_adapter_is_probed_once(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            logits: Tensor = self.net(batch["image"])
            return logits

    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: GIB)
    module, probes = Wrapped(), seen(monkeypatch)
    batch = {"image": torch.rand(40, 3, 16, 16)}
    predict(find_adapter(module, batch).model(module), batch["image"])
    first = len(probes)
    assert first > 0
    predict(find_adapter(module, batch).model(module), batch["image"])
    assert len(probes) == first


def test_a_few_images_in_many_rounds_are_looked_at_too(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module
) -> None:
    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: GIB)
    images, targets = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    probes = seen(monkeypatch)
    fast_sigcam("features.4", iterations=5).explain(net, images, targets)
    assert probes == []  # 2 x 3 images, 5 times
    fast_sigcam("features.4", iterations=6).explain(net, images, targets)
    assert len(probes) == 2


@pytest.mark.parametrize("rows", [8, 10_000])
def test_of_other_devices_passes_have_the_usual_number(rows: int) -> None:
    images = torch.zeros(1, 3, 448, 448, device="meta")
    assert pass_size(None, rows, images, lambda: 1) == 32


class Watching(nn.Module):
    """Notes how its images lie in memory; a view refuses features with their channels last."""

    def __init__(self, by_view: bool) -> None:
        super().__init__()
        self.layer, self.by_view = nn.Conv2d(3, 4, 3), by_view

    def forward(self, images: Tensor) -> Tensor:
        ORDERS.append(images.is_contiguous(memory_format=torch.channels_last))
        features = self.layer(images)
        if self.by_view:
            return features.view(len(images), -1)[:, :4]
        return features.mean(dim=(2, 3))


ORDERS: list[bool] = []  # of passes; what hangs on the model is put back


@pytest.mark.parametrize(
    ("half", "faster", "by_view", "expected"),
    [
        (True, True, False, True),
        (True, False, False, False),
        (False, True, False, False),
        (True, True, True, False),
    ],
)
def test_channels_go_last_in_half_precision_where_a_timed_pass_says_so(
    half: bool, faster: bool, by_view: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(passes.FREE_MEMORY, "cpu", lambda device: GIB)
    model, times = Watching(by_view), iter([1.0, 0.5 if faster else 1.0])

    def timed(work: Callable[[], object], device: torch.device) -> float:
        work()
        return next(times)

    monkeypatch.setattr(adapter, "seconds", timed)
    order = model.layer.weight.stride()
    ORDERS.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = predict(model, torch.rand(40, 3, 8, 8))
    assert ORDERS[-1] is expected
    assert logits.isfinite().all()
    assert model.layer.weight.stride() == order


def test_the_time_of_some_work_is_that_of_its_second_run() -> None:
    naps = [0.2, 0.05]
    found = passes.seconds(lambda: time.sleep(naps.pop(0)), torch.device("cpu"))
    assert 0.05 <= found < 0.2


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (9, 1)])
def test_slices_are_all_rows_once(count: int, size: int) -> None:
    rows = list(range(count))
    parts = [rows[part] for part in slices(count, size)]
    assert [row for part in parts for row in part] == rows
    assert all(0 < len(part) <= size for part in parts)
    assert sum(len(part) < size for part in parts) <= 1
