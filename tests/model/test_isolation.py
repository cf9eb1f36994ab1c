"""A forward may change whatever hangs on its modules; an explanation leaves all of it as it was."""

import collections
import copy
import fractions
import functools
import io
import itertools
import multiprocessing
import queue
import random
import tempfile
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import kiwisolver
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SmallNet, assert_same, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import MeanMetric

import lightning_aop
from lightning_aop import GradCAM, fast_sigcam
from lightning_aop.model import foreign_state, isolated, undisturbed

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([1, 4])


# --------------------------------------------------------------------------------------------------
# kinds of state: how it is made, how a forward changes it, and what it holds


@dataclass(slots=True)
class Slotted:
    count: int = 0


@dataclass(frozen=True)
class Kind:
    make: Callable[[], Any]
    change: Callable[[nn.Module, str], Any]
    read: Callable[[Any], Any] = copy.deepcopy
    register: bool = False  # as a buffer


def on(change: Callable[[Any], Any]) -> Callable[[nn.Module, str], Any]:
    return lambda module, name: change(getattr(module, name))


def set_data(tensor: Tensor) -> None:
    tensor.data = tensor.data + 1


def move_storage(tensor: Tensor) -> None:
    tensor.data = torch.ones(7)


def through_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] += 1


def reordered(table: Any) -> None:
    table.move_to_end("a")
    table["c"] = 3


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3))


def counted() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def mapped() -> Any:
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, "float32", "w+", shape=(4, 3))


def nested() -> Any:
    inner: dict[str, Any] = {"list": [torch.zeros(2)], "tuple": (np.zeros(2), [1])}
    inner["itself"] = inner
    return SimpleNamespace(inner=inner)


def change_nested(thing: Any) -> None:
    thing.inner["list"][0].add_(1)
    thing.inner["list"].append(2)
    thing.inner["tuple"][0][:] = 5
    thing.inner["tuple"][1].clear()
    thing.inner["more"] = thing


def read_nested(thing: Any) -> Any:
    inner = thing.inner
    return [sorted(inner), repr(inner["list"]), repr(inner["tuple"])]


zeros = functools.partial(torch.zeros, 3)
KINDS = {
    "buffer": Kind(zeros, on(lambda t: t.add_(1)), Tensor.clone, True),
    "buffer through .data": Kind(zeros, on(lambda t: t.data.add_(1)), Tensor.clone, True),
    "buffer through NumPy": Kind(zeros, on(through_numpy), Tensor.clone, True),
    "buffer whose .data is set": Kind(zeros, on(set_data), Tensor.clone, True),
    "buffer that is moved": Kind(zeros, on(move_storage), Tensor.clone, True),
    "buffer that is replaced": Kind(
        zeros, lambda m, n: setattr(m, n, getattr(m, n) + 1), Tensor.clone, True
    ),
    "NaN with other bits": Kind(
        lambda: torch.full((2,), torch.nan),
        on(lambda t: t.data.view(torch.int32).add_(1)),
        lambda t: t.clone().view(torch.int32),
    ),
    "bytes": Kind(lambda: torch.zeros(3, dtype=torch.uint8), on(lambda t: t.add_(1)), Tensor.clone),
    "complex": Kind(
        lambda: torch.zeros(2, dtype=torch.complex64), on(lambda t: t.add_(1j)), Tensor.clone
    ),
    "view": Kind(lambda: torch.zeros(4, 4).t()[1:3], on(lambda t: t.add_(1)), Tensor.clone),
    "expanded": Kind(lambda: torch.zeros(1).expand(4), on(lambda t: t._base.add_(1)), Tensor.clone),
    "sparse": Kind(
        lambda: torch.eye(3).to_sparse(), on(lambda t: t._values().add_(1)), lambda t: t.to_dense()
    ),
    "nested tensor": Kind(
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        on(lambda t: t.mul_(0).values().add_(1)),
        lambda t: t.values().clone(),
    ),
    "quantised": Kind(
        lambda: torch.quantize_per_tensor(torch.zeros(2**16), 0.1, 0, torch.quint8),
        on(lambda t: t.copy_(torch.ones(2**16))),
        lambda t: t.int_repr(),
    ),
    "inference tensor": Kind(
        torch.inference_mode()(lambda: torch.zeros(3)),
        torch.inference_mode()(on(lambda t: t.add_(1))),
        Tensor.clone,
    ),
    "parameter": Kind(parameter, on(lambda p: p.data.add_(1)), lambda p: p.detach().clone()),
    "requires_grad": Kind(
        parameter, on(lambda p: p.requires_grad_(False)), lambda p: p.requires_grad
    ),
    "list": Kind(lambda: [1], on(lambda v: v.append(2))),
    "deque": Kind(lambda: collections.deque([1, 2], 2), on(lambda v: v.append(3))),
    "set": Kind(lambda: {1}, on(lambda v: v.add(2))),
    "dict": Kind(lambda: {"a": 1}, on(lambda v: v.update(a=2, b=3))),
    "ordered": Kind(
        lambda: collections.OrderedDict(a=1, b=2), on(reordered), lambda v: [*v.items()]
    ),
    "default": Kind(lambda: collections.defaultdict(list), on(lambda v: v["a"].append(1))),
    "counter": Kind(lambda: collections.Counter("aab"), on(lambda v: v.update("abc"))),
    "bytearray": Kind(lambda: bytearray(b"ab"), on(lambda v: v.extend(b"c"))),
    "array": Kind(lambda: array("d", [1]), on(lambda v: v.append(2.0))),
    "NumPy array": Kind(
        lambda: np.zeros((3, 2))[:, 0], on(lambda v: v.__iadd__(1)), lambda v: v.tolist()
    ),
    "NumPy objects": Kind(
        lambda: np.array([[1], None], dtype=object), on(lambda v: v[0].append(2)), lambda v: repr(v)
    ),
    "NumPy array on a file": Kind(
        mapped,
        on(lambda v: v.__iadd__(1)),
        lambda v: v.tolist(),
    ),
    "shared number": Kind(
        lambda: multiprocessing.Value("i", 0),
        on(lambda v: setattr(v, "value", v.value + 1)),
        lambda v: v.value,
    ),
    "number": Kind(lambda: 0, lambda m, n: setattr(m, n, getattr(m, n) + 1)),
    "object": Kind(lambda: SimpleNamespace(a=1), on(lambda v: vars(v).update(a=2, b=3))),
    "slots": Kind(Slotted, on(lambda v: setattr(v, "count", 7))),
    "nested": Kind(nested, on(change_nested), read_nested),
    "metric": Kind(
        MeanMetric, on(lambda m: m.update(1.0)), lambda m: (m.update_count, m.weight.clone())
    ),
    "closure": Kind(counted, on(lambda f: f()), lambda f: f.__closure__[0].cell_contents),
    "bound method": Kind(lambda: [1].append, on(lambda f: f(2)), lambda f: list(f.__self__)),
    "partial": Kind(
        lambda: functools.partial(list.append, [1]), on(lambda f: f(2)), lambda f: list(f.args[0])
    ),
    "torch.Generator": Kind(
        torch.Generator, on(lambda g: torch.rand(2, generator=g)), lambda g: g.get_state()
    ),
    "random.Random": Kind(
        lambda: random.Random(0), on(lambda g: g.random()), lambda g: g.getstate()
    ),
    "NumPy generator": Kind(
        lambda: np.random.default_rng(0),
        on(lambda g: g.random()),
        lambda g: repr(g.bit_generator.state),
    ),
    "NumPy RandomState": Kind(
        lambda: np.random.RandomState(0), on(lambda g: g.rand()), lambda g: repr(g.get_state())
    ),
}


class Stateful(SmallNet):
    """A network whose forward changes all of the kinds of state that it is made of."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        for number, kind in enumerate(kinds):
            if KINDS[kind].register:
                self.register_buffer(
                    f"state{number}", KINDS[kind].make(), persistent=number % 2 == 0
                )
            else:
                setattr(self, f"state{number}", KINDS[kind].make())

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            for number, kind in enumerate(self.kinds):
                KINDS[kind].change(self, f"state{number}")
        return super().forward(images)

    def held(self) -> list[Any]:
        return [KINDS[kind].read(getattr(self, f"state{n}")) for n, kind in enumerate(self.kinds)]

    def identities(self) -> list[int]:
        return [
            id(getattr(self, f"state{n}"))
            for n in range(len(self.kinds))
            if self.kinds[n] != "number"
        ]


@pytest.mark.filterwarnings("ignore:.*nested tensors|.*quantize")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_state_is_put_back(kind: str) -> None:
    model = Stateful([kind])
    before, identities, rest = model.held(), model.identities(), snapshot(model)
    with isolated(model):
        model(IMAGES)
        with pytest.raises(AssertionError):  # or the case itself is broken
            assert_same(before, model.held())
    assert_same(before, model.held())
    assert identities == model.identities()
    assert_same(rest, snapshot(model))


def interrupted(model: nn.Module) -> None:
    with undisturbed(model):
        model(IMAGES)
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*nested tensors|.*quantize")
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([k for k in KINDS if k != "inference tensor"]), max_size=8),
    st.booleans(),
)
def test_any_mixture_of_state_is_put_back(kinds: list[str], fails: bool) -> None:
    model = Stateful(kinds).train()
    model.shared = [model.head.weight, model]  # type: ignore[assignment]
    before, rest = model.held(), snapshot(model)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            interrupted(model)
    else:
        GradCAM().explain(model, IMAGES, TARGETS)
    assert_same(before, model.held())
    assert_same(rest, snapshot(model))
    assert not lightning_aop.is_explaining()


# --------------------------------------------------------------------------------------------------
# modules, gradients, pending backward


def test_what_a_forward_registers_is_taken_away() -> None:
    class Growing(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            self.register_buffer("scale", torch.ones(1), persistent=False)
            self.extra = nn.Linear(1, 1)
            self.bias = nn.Parameter(torch.zeros(1))
            self.head.register_forward_hook(lambda *_: None)
            return super().forward(images)

    model = Growing()
    before = snapshot(model)
    with undisturbed(model):
        model(IMAGES)
    assert_same(before, snapshot(model))
    assert model._non_persistent_buffers_set == set()
    assert "extra" not in model._modules
    assert "bias" not in model._parameters


def test_a_lazy_layer_stays_lazy() -> None:
    model = SmallNet()
    model.head = nn.LazyLinear(5)
    with undisturbed(model):
        assert model(IMAGES).shape == (2, 5)
    assert type(model.head) is nn.LazyLinear
    assert type(model.head.weight) is nn.UninitializedParameter
    assert len(model.head._forward_pre_hooks) == 1
    assert model(IMAGES).shape == (2, 5)


def test_a_careless_method_inside_isolated() -> None:
    model = SmallNet().train()
    model(IMAGES).sum().backward()
    before = snapshot(model)
    gradients = [p.grad for p in model.parameters()]

    def careless() -> None:
        model.eval()
        model.head.register_forward_hook(lambda *_: None)
        assert all(p.grad is None for p in model.parameters())
        model(IMAGES).sum().backward()
        with torch.no_grad():
            model.head.weight.zero_()
        raise RuntimeError("after all that")

    with pytest.raises(RuntimeError, match="after all that"), isolated(model):
        careless()
    assert_same(before, snapshot(model))
    assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))


def test_settings_of_torch_are_put_back() -> None:
    before = torch.get_default_dtype(), torch.get_num_threads()
    with isolated(SmallNet()):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True)
    assert before == (torch.get_default_dtype(), torch.get_num_threads())
    assert not torch.are_deterministic_algorithms_enabled()
    torch.set_deterministic_debug_mode("warn")
    try:
        with isolated(SmallNet()):
            torch.use_deterministic_algorithms(True)
        assert torch.get_deterministic_debug_mode() == 1  # to warn
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("change", ["data", "in place"])
def test_a_pending_backward_goes_on(change: str) -> None:
    class Momentum(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                weight = self.head.weight
                (weight.data if change == "data" else weight).mul_(1.5)
            return super().forward(images)

    model, twin = Momentum().eval(), Momentum().eval()
    twin.load_state_dict(model.state_dict())
    losses = [each(IMAGES).square().sum() for each in (model, twin)]
    fast_sigcam(iterations=1).explain(model, IMAGES, TARGETS)
    for loss in losses:
        loss.backward()
    assert_same(*[[p.grad for p in each.parameters()] for each in (model, twin)])


def test_nothing_is_written_that_did_not_change() -> None:
    model = SmallNet()
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    pointers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    with undisturbed(model):
        model(IMAGES)
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]
    assert pointers == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]


def test_an_inner_block_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stateful(["list", "parameter"]).train()
    before = model.held()
    with isolated(model):
        monkeypatch.setattr("lightning_aop.model.isolation.Saved", pytest.fail)
        for part in (model, model.features):
            with undisturbed(part):
                model(IMAGES)
                assert not part.training
                assert not any(p.requires_grad for p in part.parameters())
            assert part.training
            assert all(p.requires_grad for p in part.parameters())
        assert model.state0 == [1, 2, 2]
    assert_same(before, model.held())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x * self.seen

    model = torch.jit.script(Counting()).train()
    with undisturbed(model):
        model(IMAGES)
        assert not model.training
    assert model.training
    assert model.seen.item() == 0


# --------------------------------------------------------------------------------------------------
# logs


class Logging(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()
        self.explained: list[bool] = []
        self.logged: list[str] = []

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.logged.append(name)

    def forward(self, images: Tensor) -> Tensor:
        self.log("norm", images.norm())
        self.log_dict({"a": images.mean()})  # without a Trainer it would fail
        seen.append(lightning_aop.is_explaining())
        return self.net(images)  # type: ignore[no-any-return]


seen: list[bool] = []


def test_a_forward_logs_nothing_while_it_is_explained() -> None:
    model = Logging()
    seen.clear()
    GradCAM().explain(model, IMAGES, TARGETS)
    assert seen
    assert all(seen)
    assert not model.logged
    assert not {"log", "log_dict"} & vars(model).keys()
    assert not lightning_aop.is_explaining()
    model.log("own", 1)
    assert model.logged == ["own"]


def test_is_explaining_is_known_on_other_threads() -> None:
    found = []
    with isolated(SmallNet()):
        thread = threading.Thread(target=lambda: found.append(lightning_aop.is_explaining()))
        thread.start()
        thread.join()
    assert found == [True]


# --------------------------------------------------------------------------------------------------
# what is not the model's


def test_what_cannot_be_put_back_is_named() -> None:
    model = SmallNet()
    model.extra = {"file": io.BytesIO(), "count": itertools.count()}  # type: ignore[assignment]
    model.features.jobs = queue.Queue()  # type: ignore[assignment]
    model.guarded = SimpleNamespace(lock=threading.Lock(), seen=[])  # type: ignore[assignment]
    model.noise = (random.random() for _ in range(3))  # type: ignore[assignment]
    model.solver = kiwisolver.Solver()  # type: ignore[assignment]  # of C++
    model.scale = fractions.Fraction(1, 3)  # type: ignore[assignment]  # a value
    assert foreign_state(model) == {
        "extra.file": "BytesIO",
        "extra.count": "count",
        "features.jobs": "Queue",
        "guarded": "SimpleNamespace",
        "noise": "generator",
        "solver": "Solver",
    }
    assert foreign_state(SmallNet()) == {}

    class Named(SmallNet):
        @functools.cached_property
        def names(self) -> list[str]:
            return ["ant", "bee"]

    assert foreign_state(Named()) == {}  # what it keeps is in the module's own dictionary


def test_trainers_datasets_and_optimizers_are_left_alone() -> None:
    model = SmallNet()
    data = torch.utils.data.TensorDataset(torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.others = [data, optimizer, trainer]  # type: ignore[assignment]
    with isolated(model):
        data.tensors[0].add_(1)
        optimizer.param_groups[0]["lr"] = 2.0
        trainer.fit_loop.max_epochs = 7
    assert data.tensors[0].tolist() == [1, 1]
    assert optimizer.param_groups[0]["lr"] == 2.0
    assert trainer.fit_loop.max_epochs == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_on_a_gpu_is_put_back() -> None:
    model = Stateful(["buffer through .data", "parameter", "torch.Generator", "list"]).cuda()
    model.on_the_device = torch.zeros(3, device="cuda")
    model.generator = torch.Generator("cuda")
    before, rest, rng = model.held(), snapshot(model), torch.cuda.get_rng_state()
    with isolated(model):
        model(IMAGES.cuda())
        model.on_the_device.add_(1)
        torch.rand(2, device="cuda", generator=model.generator)
        torch.rand(2, device="cuda")
    assert_same([before, rest, rng], [model.held(), snapshot(model), torch.cuda.get_rng_state()])
    assert not model.on_the_device.any()


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_made_in_inference_mode_is_explained_and_left_as_it_was(inside: bool) -> None:
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    usual = SmallNet().eval()
    with torch.inference_mode():
        model = SmallNet().eval()
        model.load_state_dict(usual.state_dict())
    assert all(parameter.is_inference() for parameter in model.parameters())
    before = [(id(p), p.requires_grad, p.clone()) for p in model.parameters()]
    for method in (GradCAM(), fast_sigcam(iterations=2)):
        with torch.inference_mode(inside):
            found = method.explain(model, images, targets)
        assert torch.equal(found, method.explain(usual, images, targets))
    after = [(id(p), p.requires_grad, p) for p in model.parameters()]
    for (was, wanted, old), (now, wants, new) in zip(before, after, strict=True):
        assert (was, wanted) == (now, wants)
        assert torch.equal(old, new)
