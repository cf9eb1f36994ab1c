"""Networks put together at random from kinds of state train the same with and without the monitor.

Each part keeps state of its own kind, changes it in each forward, in whatever mode, and lets its output
depend on it, so that a single explanation that leaves a trace leads the training another way.
"""

import collections
import ctypes
import enum
import functools
import io
import random
import weakref
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from lightning_aop import ExplanationMonitor, GradCAM
from lightning_aop.monitor.explanation import Explanation, Moment

WIDTH = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of what the parts do; the monitor's own are asked for
]


# --------------------------------------------------------------------------------------------------
# the parts: [B, 8] -> [B, 8]

PARTS: dict[str, Callable[[], nn.Module]] = {}


class Part(nn.Module):
    """Shifts its input by what `step` makes of the mean and of its state."""

    def __init_subclass__(cls) -> None:
        PARTS[cls.__name__] = cls

    def __init__(self) -> None:
        super().__init__()
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def step(self, mean: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.step(x.detach().mean(0))
        return x + 0.1 * shift


class BufferInPlace(Part):
    def make(self) -> None:
        self.register_buffer("c", torch.zeros(WIDTH))

    def step(self, mean: Tensor) -> Any:
        return self.c.mul_(0.9).add_(mean).clone()


class BufferThroughData(BufferInPlace):
    def step(self, mean: Tensor) -> Any:
        self.c.data.mul_(0.9).add_(mean)
        return self.c.clone()


class BufferSet(BufferInPlace):
    def step(self, mean: Tensor) -> Any:
        self.c.data = 0.9 * self.c + mean
        return self.c.clone()


class BufferReplaced(BufferInPlace):
    def step(self, mean: Tensor) -> Any:
        self.c = 0.9 * self.c + mean
        return self.c


class BufferNotPersistent(BufferInPlace):
    def make(self) -> None:
        self.register_buffer("c", torch.zeros(WIDTH), persistent=False)


class BufferThroughNumPy(BufferInPlace):
    def step(self, mean: Tensor) -> Any:
        self.c.numpy()[...] += mean.numpy()
        return self.c.clone()


class BufferOfNumPy(BufferInPlace):
    """The array that the buffer was made of is kept."""

    def make(self) -> None:
        self.array = np.zeros(WIDTH, np.float32)
        self.register_buffer("c", torch.from_numpy(self.array))

    def step(self, mean: Tensor) -> Any:
        self.array += mean.numpy()
        return self.c.clone()


class BufferThatGrows(Part):
    def make(self) -> None:
        self.register_buffer("bank", torch.zeros(0, WIDTH))

    def step(self, mean: Tensor) -> Any:
        self.bank = torch.cat([self.bank, mean[None]])
        return self.bank.mean(0)


class BufferResized(Part):
    def make(self) -> None:
        self.register_buffer("bank", torch.zeros(1, WIDTH))

    def step(self, mean: Tensor) -> Any:
        self.bank.resize_(len(self.bank) + 1, WIDTH)[-1] = mean
        return self.bank.mean(0)


class BufferRegisteredInForward(Part):
    def make(self) -> None:
        pass

    def step(self, mean: Tensor) -> Any:
        if "first" not in self._buffers:
            self.register_buffer("first", mean.clone())
        return self.first


class LargeBuffer(Part):
    """A queue of features of 1 MiB."""

    def make(self) -> None:
        self.register_buffer("queue", torch.zeros(2**15, WIDTH))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def step(self, mean: Tensor) -> Any:
        self.queue[int(self.at)] = mean
        self.at += 1
        return self.queue[: int(self.at)].mean(0)


class LargeBufferSeldom(LargeBuffer):
    """Written in each third forward only."""

    def step(self, mean: Tensor) -> Any:
        self.at += 1
        if int(self.at) % 3 == 0:
            self.queue.data.add_(mean)
        return self.queue[7]


class LargeBufferThroughAnOldView(LargeBuffer):
    def make(self) -> None:
        super().make()
        self.view = self.queue.numpy()[5:9]

    def step(self, mean: Tensor) -> Any:
        self.view[1] += mean.numpy()
        return self.queue[6].clone()


class ParameterThroughData(Part):
    def make(self) -> None:
        self.c = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def step(self, mean: Tensor) -> Any:
        self.c.data.mul_(0.9).add_(mean)
        return self.c.clone()


class ParameterTrainedAndScaled(Part):
    def make(self) -> None:
        self.c = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.c.div_(self.c.norm() + x.detach().abs().mean())
        return x * (1 + self.c.clone())


class ParameterFrozenInForward(Part):
    def make(self) -> None:
        self.c = nn.Parameter(torch.ones(WIDTH))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if torch.is_grad_enabled():
            self.c.requires_grad_(self.calls % 3 != 0)
        return x * (1 + self.c)


class MomentumEncoder(Part):
    def make(self) -> None:
        self.query, self.key = (
            nn.Sequential(nn.Linear(WIDTH, 4096), nn.Linear(4096, WIDTH)) for _ in range(2)
        )
        self.key.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for old, new in zip(self.key.parameters(), self.query.parameters(), strict=True):
            old.data.mul_(0.9).add_(0.1 * new.data)
        return x + 0.1 * self.query(x) + 0.1 * self.key(x)


class OwnSpectralNorm(Part):
    def make(self) -> None:
        self.u = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.weight = nn.Parameter(torch.eye(WIDTH) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        v = nn.functional.normalize(self.weight.detach().t() @ self.u, dim=0)
        self.u.data = nn.functional.normalize(self.weight.detach() @ v, dim=0)
        return x @ (self.weight / (self.u @ self.weight @ v))


class CodebookOfMeans(Part):
    """Vector quantisation with a moving average."""

    def make(self) -> None:
        codes = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("counts", torch.ones(4))
        self.register_buffer("sums", codes.clone())

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        hot = nn.functional.one_hot(nearest, 4).to(x)
        self.counts.data.mul_(0.9).add_(0.1 * hot.sum(0))
        self.sums.data.mul_(0.9).add_(0.1 * hot.t() @ x.detach())
        self.codes.data.copy_(self.sums / self.counts[:, None])
        return x + 0.1 * (self.codes[nearest] - x).detach()


class TiedWeights(Part):
    def make(self) -> None:
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight
        self.also = [self.one.weight]

    def forward(self, x: Tensor) -> Tensor:
        self.also[0].data.mul_(0.99)
        return x + 0.1 * self.two(self.one(x))


class ViewsOfOneStorage(Part):
    def make(self) -> None:
        flat = torch.zeros(3 * WIDTH)
        self.register_buffer("flat", flat)
        self.register_buffer("part", flat[WIDTH : 2 * WIDTH])
        self.weight = nn.Parameter(flat[2 * WIDTH :])

    def step(self, mean: Tensor) -> Any:
        self.part.add_(mean)
        self.flat.data.mul_(0.9)
        return self.flat.view(3, WIDTH).sum(0)


class SparseComplexAndHalf(Part):
    def make(self) -> None:
        self.register_buffer("sparse", torch.eye(WIDTH).to_sparse())
        self.rows = torch.eye(WIDTH).to_sparse_csr()
        self.complex = torch.zeros(WIDTH, dtype=torch.complex64)
        self.half = torch.zeros(WIDTH, dtype=torch.bfloat16)
        self.nowhere = torch.zeros(3, device="meta")

    def step(self, mean: Tensor) -> Any:
        self.sparse._values().mul_(0.9)
        self.rows.values().mul_(0.9)
        self.complex.add_(1j * mean)
        self.half.add_(mean)
        return (
            self.sparse.to_dense().sum(0)
            + self.complex.imag
            + self.half.float()
            + self.rows.to_dense().sum(0)
        )


class PlainTensor(Part):
    def make(self) -> None:
        self.c = torch.zeros(WIDTH)
        self.c.count = [0]  # type: ignore[attr-defined]

    def step(self, mean: Tensor) -> Any:
        self.c.mul_(0.9).add_(mean)
        self.c.count[0] += 1  # type: ignore[attr-defined]
        return self.c / self.c.count[0]  # type: ignore[attr-defined]


class Storage(Part):
    def make(self) -> None:
        self.storage = torch.zeros(WIDTH).untyped_storage()

    def step(self, mean: Tensor) -> Any:
        c = torch.zeros(0).set_(self.storage)
        c.add_(mean)
        return c.clone()


class Number(Part):
    def make(self) -> None:
        self.count, self.sum = 0, 0.0

    def step(self, mean: Tensor) -> Any:
        self.count += 1
        self.sum += float(mean.sum())
        return self.sum / self.count


class Lists(Part):
    def make(self) -> None:
        self.c: list[Any] = []
        self.last: Any = collections.deque(maxlen=3)
        self.nested: list[Any] = [[0.0], ([0.0],)]

    def step(self, mean: Tensor) -> Any:
        self.c.append(mean)
        self.last.append(mean)
        self.nested[1][0][0] += float(mean[0])
        self.nested[0] = [*self.nested[0], 1.0]
        shift = torch.stack(self.c).mean(0) + torch.stack(list(self.last)).mean(0)
        return shift + self.nested[1][0][0] / sum(self.nested[0], 1.0)


class ListWithAttributes(Part):
    class Own(list):  # type: ignore[type-arg]
        total = 0.0

    def make(self) -> None:
        self.c = self.Own([1.0])

    def step(self, mean: Tensor) -> Any:
        self.c.append(float(mean.sum()))
        self.c.total += self.c[-1]
        return self.c.total / len(self.c)


class Dictionaries(Part):
    def make(self) -> None:
        self.counts: Any = collections.Counter()
        self.sums: Any = collections.defaultdict(float)
        self.order: Any = collections.OrderedDict(a=1.0, b=2.0)
        self.user: Any = collections.UserDict()
        self.chain: Any = collections.ChainMap({"a": 0.0})

    def step(self, mean: Tensor) -> Any:
        key = "high" if mean[0] > 0 else "low"
        self.counts[key] += 1
        self.sums[key] += float(mean[1])
        self.order.move_to_end(next(iter(self.order)))
        self.user[key] = self.user.get(key, 0.0) + 0.1
        self.chain["a"] += 0.1
        return (
            self.counts["high"] * self.sums["high"]
            + next(iter(self.order.values()))
            + sum(self.user.values())
            + self.chain["a"]
        )


class DefaultFactory(Part):
    """A dictionary's own settings are changed, too."""

    def make(self) -> None:
        self.c: Any = collections.defaultdict(int)

    def step(self, mean: Tensor) -> Any:
        before = self.c[len(self.c)]
        self.c.default_factory = functools.partial(int, before + 1)
        return float(before)


class Sets(Part):
    def make(self) -> None:
        self.c: set[int] = set()

    def step(self, mean: Tensor) -> Any:
        self.c.add(int(100 * float(mean.sum())))
        return float(len(self.c))


@dataclass(eq=False)
class Cell:
    values: Tensor = field(default_factory=lambda: torch.zeros(WIDTH))
    count: int = 0

    def add(self, mean: Tensor) -> Tensor:
        self.count += 1
        self.values += mean
        return self.values / self.count


@dataclass(slots=True, eq=False)
class SlottedCell:
    values: Tensor = field(default_factory=lambda: torch.zeros(WIDTH))
    count: int = 0
    add = Cell.add


class MixedCell(SlottedCell):
    """Slots of its base, and a dictionary."""

    def add(self, mean: Tensor) -> Tensor:  # type: ignore[override]
        self.more = getattr(self, "more", 0) + 1
        return Cell.add(self, mean) * self.more  # type: ignore[arg-type]


class Pair(NamedTuple):
    one: Any
    two: Any


class Frozen(NamedTuple):
    cells: frozenset[Cell]


class Objects(Part):
    def make(self) -> None:
        self.cell, self.slots, self.mixed = Cell(), SlottedCell(), MixedCell()
        self.pair = Pair(Cell(), [SlottedCell()])
        self.many = {Cell()}
        self.frozen = Frozen(frozenset([Cell()]))

    def step(self, mean: Tensor) -> Any:
        cells = [self.cell, self.slots, self.mixed, self.pair.one, self.pair.two[0]]
        return sum(c.add(mean) for c in [*cells, *self.many, *self.frozen.cells])  # type: ignore[attr-defined]


class FrozenObject(Part):
    @dataclass(frozen=True)
    class Own:
        values: Tensor
        tags: list[float]

    def make(self) -> None:
        self.c = self.Own(torch.zeros(WIDTH), [])

    def step(self, mean: Tensor) -> Any:
        self.c.values.data.add_(mean)
        self.c.tags.append(0.1)
        object.__setattr__(self.c, "values", self.c.values * 0.9)
        return self.c.values + sum(self.c.tags)


class WeakReferences(Part):
    def make(self) -> None:
        self.cell = Cell()
        self.weak, self.proxy = weakref.ref(self.cell), weakref.proxy(self.cell)

    def step(self, mean: Tensor) -> Any:
        self.proxy.count += 1
        return self.weak().add(mean)  # type: ignore[union-attr]


class WeakDictionaries(Part):
    def make(self) -> None:
        self.cell = Cell()
        self.of: Any = weakref.WeakKeyDictionary({self.cell: 0.0})
        self.by: Any = weakref.WeakValueDictionary()
        self.set: Any = weakref.WeakSet()

    def step(self, mean: Tensor) -> Any:
        self.of[self.cell] += float(mean[0])
        self.by[len(self.by)] = self.cell
        first = 0.5 if self.cell in self.set else 0.0
        self.set.add(self.cell)
        return self.of[self.cell] + len(self.by) + first


class Enumerated(Part):
    class Phase(enum.Enum):
        ONE = 1.0
        TWO = 2.0

    def make(self) -> None:
        self.phase = self.Phase.ONE

    def step(self, mean: Tensor) -> Any:
        self.phase = self.Phase.TWO if self.phase is self.Phase.ONE else self.Phase.ONE
        return self.phase.value


class Bytes(Part):
    def make(self) -> None:
        self.bytes, self.array = bytearray(3), array("d", [0.0])
        self.c = (ctypes.c_double * 2)()
        self.view = memoryview(bytearray(4))

    def step(self, mean: Tensor) -> Any:
        self.bytes[1] = (self.bytes[1] + 1) % 256
        self.array[0] += float(mean[0])
        self.array.append(1.0)
        self.c[1] += float(mean[1])
        self.view[2] = (self.view[2] + 1) % 256
        shift = self.bytes[1] + self.array[0] / len(self.array) + self.c[1]
        return shift + self.view[2]


class NumPyArrays(Part):
    def make(self) -> None:
        self.c = np.zeros((2, WIDTH), np.float32)
        self.column = np.zeros((3, 2))[:, 1]
        self.objects = np.array([[0.0], Cell()], dtype=object)
        self.record = np.zeros(2, dtype=[("a", "f4"), ("b", "i8")])
        self.masked = np.ma.masked_array([1.0, 2.0], mask=[False, True])

    def step(self, mean: Tensor) -> Any:
        self.c[1] += mean.numpy()
        self.column += 0.1
        self.objects[0].append(float(mean[0]))
        self.record["a"][1] += float(mean[2])
        self.masked.mask[0] = not self.masked.mask[0]
        self.masked.data[1] += 0.1
        shift = self.objects[1].add(mean) + torch.from_numpy(self.c.sum(0))
        shift = shift + float(self.masked.sum() or 0.0) + float(self.masked.data.sum())
        return shift + self.column.sum() + sum(self.objects[0]) + float(self.record["a"].sum())


class Generators(Part):
    def make(self) -> None:
        self.torch, self.random = torch.Generator().manual_seed(1), random.Random(2)
        self.numpy, self.old = np.random.default_rng(3), np.random.RandomState(4)
        self.bits = np.random.Philox(5)
        self.seeds = np.random.SeedSequence(6)

    def step(self, mean: Tensor) -> Any:
        drawn = self.random.random() + self.numpy.random() + self.old.rand()
        drawn += (self.bits.random_raw() % 100) / 100
        drawn += (self.seeds.spawn(1)[0].generate_state(1)[0] % 100) / 100
        return torch.randn(WIDTH, generator=self.torch) + float(drawn)


class GlobalGenerators(Part):
    def make(self) -> None:
        pass

    def step(self, mean: Tensor) -> Any:
        return torch.randn(WIDTH) + random.random() + float(np.random.rand())


class DropoutOfItsOwn(Part):
    def make(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) > 0.3)


class Metrics(Part):
    def make(self) -> None:
        self.mean = MeanMetric()
        self.several = MetricCollection({"a": MeanMetric(), "b": SumMetric()})
        self.hidden = [MeanMetric()]

    def step(self, mean: Tensor) -> Any:
        self.mean.update(mean)
        self.several(mean)
        self.hidden[0](mean)
        values = self.several.compute()
        return self.mean.compute() + values["a"] + 0.1 * values["b"] + self.hidden[0].compute()


class Closure(Part):
    def make(self) -> None:
        total, seen = 0.0, []

        def add(value: float) -> float:
            nonlocal total
            total += value
            seen.append(value)
            add.calls += 1  # type: ignore[attr-defined]
            return total / len(seen) + add.calls  # type: ignore[attr-defined]

        add.calls = 0  # type: ignore[attr-defined]
        self.add = functools.partial(add)

    def step(self, mean: Tensor) -> Any:
        return self.add(float(mean.sum()))


class DefaultArgument(Part):
    """State in what a function has for a default."""

    def make(self) -> None:
        def add(value: float, seen: list[float] = []) -> float:  # noqa: B006
            seen.append(value)
            return sum(seen)

        self.add = add

    def step(self, mean: Tensor) -> Any:
        return self.add(float(mean.sum()))


class BoundMethod(Part):
    def make(self) -> None:
        self.add = Cell().add

    def step(self, mean: Tensor) -> Any:
        return self.add(mean)


class Hook(Part):
    """A hook with state of its own, and one that a forward adds once."""

    def make(self) -> None:
        self.linear = nn.Linear(WIDTH, WIDTH)
        cell = Cell()
        self.linear.register_forward_hook(lambda m, a, y: y + cell.add(y.detach().mean(0)))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.linear._forward_hooks) == 1:
            scale = float(x.detach().mean())
            self.linear.register_forward_hook(lambda m, a, y: y + scale)
        return x + 0.1 * self.linear(x)


class IteratorOfItsOwn(Part):
    class Own:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            self.at += 1
            return self.at

    def make(self) -> None:
        self.count = self.Own()

    def step(self, mean: Tensor) -> Any:
        return 0.1 * next(self.count)


class ModuleReplaced(Part):
    def make(self) -> None:
        self.calls = 0
        self.inner: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.inner = nn.Tanh() if self.calls % 2 else nn.Identity()
        return self.inner(x)  # type: ignore[no-any-return]


class ModulesAdded(Part):
    def make(self) -> None:
        self.layers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        self.layers.append(BufferInPlace())
        for layer in self.layers:
            x = layer(x)
        return x


class ClassChanged(Part):
    class Other(nn.Tanh):
        pass

    def make(self) -> None:
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        kind = nn.Identity if type(self.inner) is self.Other else self.Other
        self.inner.__class__ = kind
        return out  # type: ignore[no-any-return]


class HiddenModule(Part):
    """A module that is registered nowhere."""

    def make(self) -> None:
        self.hidden = (BufferInPlace(), {"norm": nn.BatchNorm1d(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        norm: nn.Module = self.hidden[1]["norm"]  # type: ignore[index, assignment]
        return self.hidden[0](x) + 0.1 * norm(torch.cat([x, x]))[: len(x)]  # type: ignore[no-any-return]


class ModeSwitched(Part):
    """A norm that learns its statistics whatever the mode is said to be."""

    def make(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        self.norm(torch.cat([x, x]))
        return self.norm.eval()(x)  # type: ignore[no-any-return]


class Observers(Part):
    def make(self) -> None:
        self.fake = quantization.FakeQuantize.with_args(
            observer=quantization.MovingAverageMinMaxObserver
        )()
        self.fused = quantization.FusedMovingAvgObsFakeQuantize()
        self.histogram = quantization.HistogramObserver()

    def forward(self, x: Tensor) -> Tensor:
        self.histogram(x.detach())
        scale = self.histogram.max_val - self.histogram.min_val
        return self.fused(self.fake(x)) + 0.01 * scale  # type: ignore[no-any-return]


class StatefulRecurrence(Part):
    def make(self) -> None:
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.hidden: Any = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(WIDTH) if self.hidden is None else self.hidden
        out = self.cell(x, hidden.expand_as(x))
        self.hidden = out.detach().mean(0)
        return x + 0.1 * out


class CachedProperty(Part):
    @functools.cached_property
    def first(self) -> float:
        return self.seen

    def make(self) -> None:
        self.seen = 0.0

    def step(self, mean: Tensor) -> Any:
        self.seen = float(mean.sum())
        return self.first


class PropertyOfAnotherName(Part):
    class Own:
        __slots__ = ("__dict__", "__private", "__weakref__")

        def __init__(self) -> None:
            self.__private = 0.0

        @property
        def total(self) -> float:
            return self.__private

        def add(self, value: float) -> None:
            self.__private += value

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

        def __eq__(self, other: object) -> bool:
            raise TypeError("not to be compared")

        __hash__ = object.__hash__

    def make(self) -> None:
        self.c = self.Own()

    def step(self, mean: Tensor) -> Any:
        self.c.add(float(mean.sum()))
        return self.c.total


class SelfReferring(Part):
    def make(self) -> None:
        self.c: dict[str, Any] = {"list": []}
        self.c["self"] = self.c
        self.parent = [self]

    def step(self, mean: Tensor) -> Any:
        self.c["self"]["list"].append(float(mean.sum()))
        return sum(self.c["list"])


class ClassAttributes(Part):
    """What all objects of a class share."""

    calls = 0
    seen: list[float] = []  # noqa: RUF012

    def make(self) -> None:
        ClassAttributes.calls, ClassAttributes.seen = 0, []
        ClassAttributes.__dict__.get("late") and delattr(ClassAttributes, "late")

    def step(self, mean: Tensor, cache: list[float] = []) -> Any:  # noqa: B006
        ClassAttributes.calls += 1
        self.seen.append(float(mean[0]))
        ClassAttributes.late = getattr(ClassAttributes, "late", 0.0) + 0.1  # type: ignore[attr-defined]
        return self.calls / 10 + sum(self.seen) + ClassAttributes.late  # type: ignore[attr-defined]


class AttributesAddedLater(Part):
    """To objects that had none, after a while."""

    class Bare:
        pass

    class Slots:
        __slots__ = ("late",)

    def make(self) -> None:
        self.count = 0
        self.bare, self.slots, self.tensor = self.Bare(), self.Slots(), torch.zeros(2)

        def function() -> None:
            pass

        self.function = function
        self.all: list[Any] = [self.bare, self.slots, self.tensor, self.function]

    def step(self, mean: Tensor) -> Any:
        self.count += 1
        had = sum(hasattr(thing, "late") for thing in self.all)
        if self.count > 3:
            for thing in self.all:
                thing.late = 1
        return 0.1 * had


class LateCell(Part):
    """A variable of a closure that has no value for a while."""

    def make(self) -> None:
        count = 0

        def step() -> float:
            nonlocal count, late
            count += 1
            try:
                had = late
            except NameError:
                had = 0.0
            if count > 3:
                late = 1.0
            return had

        late: float
        self.c = step

    def step(self, mean: Tensor) -> Any:
        return self.c()


class SparseThatGrows(Part):
    def make(self) -> None:
        self.c = torch.zeros(WIDTH, WIDTH).to_sparse()
        self.at = 0

    def step(self, mean: Tensor) -> Any:
        self.at += 1
        row = torch.zeros(WIDTH, WIDTH)
        row[self.at % WIDTH] = mean
        self.c.add_(row.to_sparse())
        return self.c.to_dense().sum(0)


class Distribution(Part):
    def make(self) -> None:
        self.prior = torch.distributions.Normal(torch.zeros(WIDTH), torch.ones(WIDTH))

    def step(self, mean: Tensor) -> Any:
        self.prior.loc.add_(0.1 * mean)
        self.prior.scale = self.prior.scale * 0.9
        return self.prior.loc + self.prior.scale


PARTS |= {
    "BatchNorm": lambda: nn.BatchNorm1d(WIDTH),
    "Dropout": lambda: nn.Dropout(0.3),
    "LazyLinear": lambda: nn.LazyLinear(WIDTH),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "prepare_qat": lambda: prepared(),
    "scripted": lambda: scripted(),
    "compiled": lambda: torch.compile(BufferThroughData(), backend="eager"),
    "Identity": nn.Identity,
}


def prepared() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(model)  # type: ignore[no-any-return]


class ToScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("c", torch.zeros(WIDTH))
        self.count = 0
        self.seen: list[Tensor] = [torch.zeros(WIDTH)]

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.c.add_(x.detach().mean(0))
        self.seen.append(x.detach().mean(0))
        return x + 0.1 * self.c / self.count + 0.1 * torch.stack(self.seen).mean(0)


def scripted() -> nn.Module:
    return torch.jit.script(ToScript())  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------
# all that a network holds, as plain values


def values(thing: Any) -> Any:
    """Return what a thing is made of, to the bit; each object once."""
    return _values(thing, {})


def _values(thing: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    kind = type(thing)
    if thing is None or kind in (bool, int, float, complex, str, bytes, torch.dtype, torch.Size):
        return thing if thing == thing else "NaN"
    if isinstance(thing, (type, torch.device, enum.Enum, weakref.ReferenceType)):
        return repr(thing).split(" at ")[0]
    if kind in weakref.ProxyTypes:
        return "proxy"
    if id(thing) in seen:
        return f"object {seen[id(thing)][0]}"
    seen[id(thing)] = len(seen), thing
    inside = functools.partial(_values, seen=seen)
    if isinstance(thing, Tensor):
        return ["tensor", kind.__name__, *_of_tensor(thing), inside(vars(thing))]
    if isinstance(thing, np.ndarray):
        if thing.dtype.hasobject:
            return ["objects", *map(inside, thing.ravel())]
        mask = np.ma.getmaskarray(thing).tobytes() if isinstance(thing, np.ma.MaskedArray) else b""
        return ["array", str(thing.dtype), thing.shape, np.asarray(thing).tobytes(), mask]
    if isinstance(thing, torch.Generator):
        return thing.get_state().tolist()
    if isinstance(thing, random.Random):
        return repr(thing.getstate())
    if isinstance(thing, np.random.RandomState):
        return repr(thing.get_state())
    if isinstance(thing, (np.random.Generator, np.random.BitGenerator)):
        return repr(getattr(thing, "bit_generator", thing).state)
    if isinstance(thing, np.random.SeedSequence):
        return repr(thing.state)
    if isinstance(thing, (torch.UntypedStorage, ctypes.Array, memoryview, array, bytearray)):
        return bytes(thing)
    if isinstance(thing, torch.jit.ScriptModule):
        names = ("c", "count", "seen")  # what its class has
        return ["script", *((name, inside(thing._c.getattr(name))) for name in names)]
    held = dict(getattr(thing, "__dict__", {}))
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                held[name] = getattr(thing, name)
    if isinstance(thing, nn.Module):
        # A hook's key is a number of the process.
        held |= {k: list(v.values()) for k, v in held.items() if k.endswith("hooks") and v}
        held.pop("_compiled_call_impl", None)
    parts: list[Any] = [kind.__name__]
    if isinstance(thing, dict):
        parts += [[inside(k), inside(v)] for k, v in dict.items(thing)]
        if isinstance(thing, collections.defaultdict):
            parts.append(inside(thing.default_factory))
    elif isinstance(thing, (list, tuple, collections.deque)):
        parts += map(inside, thing)
    elif isinstance(thing, (set, frozenset)):
        parts += sorted(map(inside, thing), key=repr)
    elif isinstance(thing, functools.partial):
        parts += map(inside, (thing.func, thing.args, thing.keywords))
    elif hasattr(thing, "__func__"):
        parts += [thing.__func__.__qualname__, inside(thing.__self__)]
    elif hasattr(thing, "__code__"):
        cells = [inside(cell.cell_contents) for cell in thing.__closure__ or ()]
        parts += [thing.__qualname__, *cells, inside(thing.__defaults__)]
        if thing.__module__ != __name__:
            return parts
    elif kind.__module__.startswith(("torch._dynamo", "torch._C")):
        return parts
    return [*parts, [[name, inside(value)] for name, value in sorted(held.items())]]


def _of_tensor(tensor: Tensor) -> Iterator[Any]:
    yield from (str(tensor.dtype), str(tensor.layout), tensor.requires_grad, str(tensor.device))
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        yield "uninitialised"
        return
    yield tuple(tensor.shape)
    if tensor.device.type == "meta":
        return
    grad = tensor.grad if tensor.is_leaf else None
    yield None if grad is None else grad.numpy().tobytes()
    plain = tensor.detach()
    plain = plain.to_dense() if plain.layout is not torch.strided else plain
    if plain.layout is torch.strided:
        yield plain.stride()
    yield plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --------------------------------------------------------------------------------------------------
# training


class Net(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.ReLU(inplace=True))
        self.parts = nn.ModuleList(PARTS[name]() for name in names)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        for part in self.parts:
            x = torch.tanh(part(x))  # so that nothing overflows
        return self.head(x)  # type: ignore[no-any-return]


class Module(pl.LightningModule):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.net = Net(names)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.losses.append(float(nn.functional.cross_entropy(self(batch[0]), batch[1])))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Watch(ExplanationMonitor):
    def __init__(self, **settings: Any) -> None:
        method = GradCAM("net.features")
        super().__init__(method, probe=2, metrics=False, store=False, sinks=[self], **settings)
        self.fired = 0

    def write(self, explanation: Explanation, moment: Moment) -> None:
        self.fired += 1


def trained(names: list[str], folder: Path, *monitors: Watch) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    torch.compiler.reset()
    module = Module(names)
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(8) % 3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(monitors),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 8))
    numpy: Any = np.random.get_state()
    state: list[Any] = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return {
        "losses": module.losses,
        "net": values(module.net),
        "optimizers": values(state),
        "random": [torch.get_rng_state(), random.getstate(), numpy[1].tolist(), numpy[2]],
    }


def check(names: list[str], often: bool, folder: Path) -> None:
    monitor = Watch(every_n_train_steps=1) if often else Watch()
    without = trained(names, folder)
    assert_same(without, trained(names, folder, monitor))
    assert monitor.fired == (5 if often else 3)


def test_what_cannot_be_put_back_is_named_before_training(tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Watch):
        def on_train_start(self, *arguments: Any) -> None:
            said.append("training")
            super().on_train_start(*arguments)

        def on_fit_start(self, *arguments: Any) -> None:
            with pytest.warns(UserWarning, match="put back") as caught:
                super().on_fit_start(*arguments)
            said.extend(str(each.message) for each in caught)

    PARTS["open"] = Open
    try:
        trained(["open"], tmp_path, Listening())
    finally:
        del PARTS["open"]
    assert len(said) == 2
    assert "net.parts.0.file (BytesIO), net.parts.0.noise (generator)" in said[0]
    assert "lightning_aop.is_explaining()" in said[0]
    assert said[1] == "training"


class Open(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.file, self.noise = io.BytesIO(), (0.1 * i for i in range(9))


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_each_part(name: str, tmp_path: Path) -> None:
    check([name], True, tmp_path)


def drawn(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        parts = st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=8)
        quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        limits = settings(max_examples=examples, deadline=None, suppress_health_check=quiet)
        return limits(given(names=parts, often=st.booleans())(test))

    return decorate


@pytest.mark.wide
@drawn(10)
def test_networks_put_together_at_random(names: list[str], often: bool, tmp_path: Path) -> None:
    check(names, often, tmp_path)


@pytest.mark.slow
@drawn(200)
def test_many_networks(names: list[str], often: bool, tmp_path: Path) -> None:
    check(names, often, tmp_path)
