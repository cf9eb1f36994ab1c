"""Tensors too large to copy for nothing: who writes to one gets a copy, and the tensor has its bits."""

import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallNet
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_aop import GradCAM, fast_sigcam
from lightning_aop.model import isolated, undisturbed
from lightning_aop.model.state import Saved

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([1, 4])


class Large(SmallNet):
    """A table of 1 MiB that the logits depend on, and that `write` changes in a forward."""

    def __init__(self, write: Callable[[Any], Any], buffer: bool = False) -> None:
        super().__init__()
        table = torch.rand(5, 50_000)
        if buffer:
            self.register_buffer("table", table)
        else:
            self.table = nn.Parameter(table)
        self.write = write
        self.forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        self.write(self)
        return super().forward(images) @ self.table[:, :5]  # type: ignore[no-any-return]


def nothing(model: Any) -> None:
    pass


@torch.no_grad()
def in_place(model: Any) -> None:
    model.table.mul_(1.5)


def through_data(model: Any) -> None:
    model.table.data[1:3].add_(1)


def through_numpy(model: Any) -> None:
    model.table.detach().numpy()[...] += 1


def through_dlpack(model: Any) -> None:
    np.from_dlpack(model.table.detach()).fill(3)


def through_storage(model: Any) -> None:
    model.table.untyped_storage().fill_(1)


def through_out(model: Any) -> None:
    torch.mul(model.table.detach(), 2, out=model.table.data)


def set_data(model: Any) -> None:
    model.table.data = model.table.data * 2


@torch.no_grad()
def set_storage(model: Any) -> None:
    model.table.set_(torch.ones(5, 60_000))


def smaller(model: Any) -> None:
    model.table.data = model.table.data[:, :100]


def other_dtype(model: Any) -> None:
    model.table.data = model.table.data.double().mul_(2).float()


def by_foreach(model: Any) -> None:
    torch._foreach_mul_([model.table.data, model.head.weight.data], 1.1)


def by_optimizer(model: Any) -> None:
    torch.optim.SGD([model.table], lr=1.0).zero_grad()
    model.table.grad = torch.ones_like(model.table)
    torch.optim.AdamW([model.table], lr=0.1, fused=True).step()


scripted = torch.jit.CompilationUnit("def add(table: Tensor) -> Tensor:\n  return table.add_(2)\n")


def by_script(model: Any) -> None:
    scripted.add(model.table.data)


def by_observer(model: Any) -> None:
    """Write by a fused kernel, as quantisation-aware training does."""
    count = model.table.numel()
    torch.fused_moving_avg_obs_fake_quant(
        torch.rand(count, 2),
        torch.tensor([1]),
        torch.tensor([1]),
        model.table.data.view(-1),
        torch.zeros(count),
        torch.ones(count),
        torch.zeros(count, dtype=torch.int32),
        0.1,
        0,
        255,
        0,
        per_row_fake_quant=True,
    )


def normalised(model: Any) -> None:
    F.normalize(model.table.data, dim=0, out=model.table.data)


def seldom(model: Any) -> None:
    """Write in one forward of many: none has shown it before."""
    if model.forwards % 7 == 0:
        in_place(model)


WRITES = [
    *(nothing, in_place, through_data, through_numpy, through_dlpack, through_storage),
    *(through_out, set_data, set_storage, smaller, other_dtype, by_foreach, by_optimizer),
    *(by_script, by_observer, normalised, seldom),
]


def bits(tensor: Tensor) -> tuple[bytes, int, torch.Size, int]:
    values = tensor.detach().clone().numpy().tobytes()
    return values, tensor.data_ptr(), tensor.shape, tensor._version


@pytest.mark.sample(16)
@pytest.mark.parametrize("buffer", [False, True], ids=["parameter", "buffer"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_whoever_writes(write: Callable[[Any], Any], buffer: bool) -> None:
    model = Large(write, buffer)
    before = bits(model.table)
    for _ in range(3):
        with isolated(model):
            for _ in range(3):
                model(IMAGES)
            if write not in (nothing, seldom):
                with torch.no_grad():  # or the case itself is broken
                    assert model.table.numpy().tobytes() != before[0]
        model.forwards += 3  # as training would
        assert bits(model.table) == before
    if write not in (smaller,):
        fast_sigcam(iterations=1).explain(model, IMAGES, TARGETS)
    assert bits(model.table) == before
    assert not torch._C._is_cow_tensor(model.table)
    with torch.no_grad():
        model.table.add_(1)  # and training goes on, on the same memory
    assert model.table.data_ptr() == before[1]
    assert model.table.sum() > 250_000


def numpy_view(model: Any) -> Any:
    return model.table.detach().numpy()


def view(model: Any) -> Any:
    return model.table.detach()[2:]


def storage(model: Any) -> Any:
    return model.table.untyped_storage()


def graph(model: Any) -> Any:
    return (torch.rand(3, 5, requires_grad=True) @ model.table).sum()


OTHERS = {
    "NumPy": (numpy_view, lambda v: v.__iadd__(1)),
    "view": (view, lambda v: v.add_(1)),
    "storage": (storage, lambda v: v.fill_(1)),
    "DLPack": (lambda m: np.from_dlpack(m.table.detach()), lambda v: v.__iadd__(1)),
    "graph": (graph, lambda loss: loss.backward(retain_graph=True)),
}


@pytest.mark.parametrize("place", ["on the module", "elsewhere"])
@pytest.mark.parametrize("kind", OTHERS)
def test_somebody_else_holds_its_memory(kind: str, place: str) -> None:
    """What was made of it before can write to it without asking: then it is copied."""
    make, change = OTHERS[kind]
    if (kind, place) == ("storage", "elsewhere"):
        pytest.skip("a storage that nothing else refers to is not told from the tensor's own")
    model = Large(lambda model: change(held[0]))
    held = [make(model)] if place == "elsewhere" else []
    if place == "on the module":
        model.other = make(model)
        held = [model.other]
    before = bits(model.table)
    with isolated(model):
        model(IMAGES)
    assert bits(model.table) == before
    if kind in ("NumPy", "view", "DLPack"):
        change(held[0])  # and it still is the same memory
        assert not np.array_equal(np.frombuffer(before[0], np.float32), numpy_view(model).ravel())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.from_numpy(np.random.default_rng(0).random((5, 50_000), dtype=np.float32)),
        lambda: torch.rand(5, 50_000).share_memory_(),
        lambda: torch.rand(50_000, 5).t(),
        lambda: torch.rand(6, 50_000)[1:],
        lambda: torch._lazy_clone(torch.rand(5, 50_000)),
    ],
    ids=["NumPy", "shared", "transposed", "part", "lazily cloned"],
)
def test_memory_from_elsewhere(make: Callable[[], Tensor]) -> None:
    model = Large(in_place)
    model.table = nn.Parameter(make())
    before = bits(model.table)
    GradCAM().explain(model, IMAGES, TARGETS)
    assert bits(model.table) == before


def test_tied_weights() -> None:
    model = Large(in_place)
    model.tied = nn.ParameterList([model.table])
    model.part = nn.Parameter(model.table.data[:1])
    before = bits(model.table)
    with undisturbed(model):
        model(IMAGES)
        assert torch.equal(model.part, model.table[:1])
    assert bits(model.table) == before
    assert model.part.data_ptr() == model.table.data_ptr()


def test_a_pending_backward_of_a_large_weight() -> None:
    model, twin = Large(in_place).eval(), Large(in_place).eval()
    twin.load_state_dict(model.state_dict())
    losses = [each(IMAGES).square().sum() for each in (model, twin)]
    GradCAM().explain(model, IMAGES, TARGETS)
    for loss in losses:
        loss.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_graph_that_outlives_the_explanation() -> None:
    """Such as one that an error holds: the values are right, and training may write."""
    model = Large(nothing)
    before = bits(model.table)[0]
    kept = []
    with isolated(model):
        kept.append(model(IMAGES))
    assert model.table.detach().numpy().tobytes() == before
    with torch.no_grad():
        model.table.zero_()
    assert not model.table.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].sum().backward()  # as PyTorch says of any graph


def test_nothing_large_is_copied() -> None:
    model = Large(nothing)
    model.more = nn.Linear(1000, 1000)
    saved = Saved(model)
    saved.hold()
    model(IMAGES)
    copied = sum(piece._copy.nbytes for piece in saved._pieces)
    own = sum(p.nbytes for p in model.parameters() if p.nbytes < 2**16)
    buffers = sum(b.nbytes for b in model.buffers())
    assert copied == own + buffers
    assert torch._C._is_cow_tensor(model.table)
    saved.restore()
    assert not torch._C._is_cow_tensor(model.table)


def test_an_object_that_refuses_costs_no_weights() -> None:
    class Refusing(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            if self[0]:
                raise RuntimeError("not now")
            return super().__iter__()

    def write(model: Any) -> None:
        model.other[0] = 1
        in_place(model)

    model = Large(write)
    model.other = Refusing([0])
    before = bits(model.table)
    with pytest.raises(RuntimeError, match="not now"), isolated(model):
        model(IMAGES)
    assert bits(model.table) == before


def test_nothing_is_kept_after_an_error() -> None:
    model = Large(lambda model: 1 / 0)
    pointer = model.table.data_ptr()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), undisturbed(model):
            model(IMAGES)
    gc.collect()
    with torch.no_grad():
        model.table.add_(1)
    assert model.table.data_ptr() == pointer


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_memory_of_100_million_parameters() -> None:
    model = SmallNet()
    model.more = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(25)))

    def peak() -> int:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    def explained(write: bool) -> int:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, started = peak(), time.perf_counter()
        with undisturbed(model), torch.no_grad():
            model.more(model.head(torch.rand(2, 12)).sum() * torch.ones(2, 2000))
            if write:
                for parameter in model.more.parameters():
                    parameter.data.add_(1)
        print(f"{write=}: {time.perf_counter() - started:.3f} s, {peak() - before} kB")
        return peak() - before

    explained(False)
    assert explained(False) < 20 * 1024
    assert 370 * 1024 < explained(True) < 420 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("write", [nothing, in_place, through_data, by_foreach, by_optimizer])
def test_on_a_gpu(write: Callable[[Any], Any]) -> None:
    model = Large(write).cuda()
    before, pointer = model.table.detach().clone(), model.table.data_ptr()
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
            GradCAM().explain(model, IMAGES.cuda(), TARGETS.cuda())
            assert torch.equal(model.table, before)
            assert model.table.data_ptr() == pointer
