"""The frozen part of a model, evaluated once for each image while only what follows it is trained.

A trace of one image finds the *cut*: the latest module whose output is all that the rest of the model
needs of the image, and in which no trainable parameter had a part. Its activations are kept. From
then on an evaluation is one of the rest, the head: the modules before the cut are left out.

Nothing of it is taken on trust. What is left out gives NaN in its place, so that a connection that
leads past the cut (a U-Net's, a dense block's) shows in the logits, which in the trace have to be the
same bit for bit. And whenever explanations begin, a checksum tells whether the parameters and buffers
that the activations were computed from, and the images, are still the same bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeAlias, TypeVar
from weakref import ReferenceType, ref

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_aop.types import Images

T = TypeVar("T")
_Place: TypeAlias = tuple[str, str]  # a module and one of its parameters, buffers or tensors

_MOST_CUTS = 6  # that are tried; each costs an evaluation of what follows


@dataclass(eq=False)
class FrozenPart:
    """What is kept from one explanation to the next; empty for a model without a frozen part.

        frozen = FrozenPart()
        ...
        with frozen.kept(model, images=8):  # at each epoch
            maps = GradCAM().explain(model, images, targets)

    Inside the block, class activation maps (also as the base of `AOP`) and `model.predict` make
    use of it. Maps are the same but for rounding. The trace costs two evaluations of two images,
    once; checking costs one pass over the frozen weights, each time.

    A model is evaluated as ever where its frozen part has hooks, keeps notes in its forward, draws
    random numbers or normalises over the batch, and where it does not end with a module.

    Attributes:
        reused: how many images began at the cut so far.
    """

    reused: int = field(default=0, init=False)
    _parts: "dict[object, _Part | None]" = field(default_factory=dict, init=False, repr=False)
    _model: "ReferenceType[nn.Module] | None" = field(default=None, init=False, repr=False)
    _facts: "_Facts | None" = field(default=None, init=False, repr=False)
    _room: int = field(default=0, init=False, repr=False)

    def __reduce__(self) -> "tuple[type[FrozenPart], tuple[()]]":
        # A copy, or another process, keeps its own.
        return FrozenPart, ()

    @contextmanager
    def kept(self, model: nn.Module, images: int) -> Iterator[None]:
        """Keep activations of that many images, and use those of unchanged weights in the block.

        `model` is not wrapped (DDP, torch.compile), and no weight changes inside the block.
        """
        facts = _Facts.of(model)
        if self._of is not model or facts != self._facts:
            self._parts.clear()
        self._model, self._facts, self._room = ref(model), facts, images
        for part in self._parts.values():
            if part is not None and (now := part.fingerprint(model)) != part.made_of:
                part.activations.clear()
                part.made_of = now
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    @property
    def _of(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def _evaluate(
        self, model: nn.Module, layer: str | None, images: Images, work: Callable[[], T]
    ) -> T:
        kind = images.device.type
        key = (
            layer,
            images.shape[1:],
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        if key not in self._parts:
            assert self._facts is not None
            self._parts[key] = _trace(model, layer, images, self._facts)
        part = self._parts[key]
        if part is None:
            return work()
        keys = _checksums(images.flatten(1)).tolist()
        if all(each in part.activations for each in keys):
            values = torch.cat([part.activations[each] for each in keys])
            with part.left_out(model, values):
                result = work()
            if all(leaf.isfinite().all() for leaf in tree_leaves(result)):
                self.reused += len(images)
                return result
            self._parts[key] = None  # in other pictures, something does lead past the cut
            return work()
        outputs: list[Tensor] = []
        cut = model.get_submodule(part.cut)
        # Before other hooks, which may hand on something else in its place.
        handle = cut.register_forward_hook(
            lambda module, args, output: outputs.append(output.detach().clone()), prepend=True
        )
        try:
            result = work()
        finally:
            handle.remove()
        fits = len(outputs) == 1 and len(outputs[0]) == len(images)
        if fits and len(part.activations.keys() | set(keys)) <= self._room:
            part.activations |= {each: outputs[0][i : i + 1].clone() for i, each in enumerate(keys)}
        return result


_active: ContextVar[FrozenPart | None] = ContextVar("_active", default=None)


def evaluated(model: nn.Module, layer: str | None, images: Images, work: Callable[[], T]) -> T:
    """Return what `work` returns, which evaluates `model` once, for `images`, and may hear `layer`.

    The work is done without the model's frozen part where a `FrozenPart` is kept and knows the
    images; if its results, tensors, are not finite then, it is done once more with it.
    """
    active = _active.get()
    if active is None or active._of is not model:
        return work()
    return active._evaluate(model, layer, images, work)


@dataclass(frozen=True)
class _Facts:
    """What decides where the cut is, beside the modules' code.

    Attributes:
        modules: their identities.
        places: all tensors that the modules have.
        trainable: the parameters that require a gradient.
        hooked: the modules with hooks.
    """

    modules: tuple[int, ...]
    places: tuple[_Place, ...]
    trainable: frozenset[_Place]
    hooked: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> "_Facts":
        tensors = _tensors(model)
        modules = dict(model.named_modules())
        return cls(
            tuple(map(id, modules.values())),
            tuple(tensors),
            frozenset(
                place
                for place, tensor in tensors.items()
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad
            ),
            frozenset(
                name
                for name, module in modules.items()
                if module._forward_hooks or module._forward_pre_hooks
            ),
        )


# --------------------------------------------------------------------------------------------------
# leaving modules out


@dataclass(eq=False)
class _Part:
    """The modules up to a cut.

    Attributes:
        cut: the module whose output is kept.
        blanks: what stands for the outputs of each module that is left out, call by call, for one
            image: structures of tensors of one NaN, with the shape beside it.
        sources: what the activations are computed from.
        ran: the modules that took part, whose plain attributes (a stride) count too.
        made_of: the fingerprint of the sources, as of when the activations were kept.
        activations: those of one image each, by the image's checksum.
    """

    cut: str
    blanks: dict[str, list[Any]]
    sources: tuple[_Place, ...]
    ran: tuple[str, ...]
    made_of: object = None
    activations: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def left_out(self, model: nn.Module, values: Tensor) -> Iterator[None]:
        """Let the cut give `values` in the block, and what comes before it NaN."""

        def stand_in(outputs: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            return tree_map(lambda blank: blank.made(len(values)), next(outputs))

        # What follows may work in place, also on what it gets from the cut.
        forwards: dict[str, Callable[..., Any]] = {self.cut: lambda *_, **__: values.clone()}
        for name, outputs in self.blanks.items():
            forwards[name] = partial(stand_in, iter(outputs))
        modules = {name: model.get_submodule(name) for name in forwards}
        own = {name: vars(module).get("forward") for name, module in modules.items()}
        try:
            for name, module in modules.items():
                vars(module)["forward"] = forwards[name]
            yield
        finally:
            for name, module in modules.items():
                if own[name] is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = own[name]

    def fingerprint(self, model: nn.Module) -> object:
        """Return what is the same as long as the activations are."""
        tensors = _tensors(model)
        sources = [tensors[place] for place in self.sources]
        sums = [_checksums(tensor.detach().reshape(1, -1)) for tensor in sources]
        plain = [
            {
                name: value
                for name, value in vars(model.get_submodule(module)).items()
                if type(value) in (bool, int, float, str, tuple)
                # Lightning's notes on what it is about to call are private.
                and name != "training"
                and not name.startswith("_")
            }
            for module in self.ran
        ]
        layouts = [(tensor.shape, tensor.dtype, tensor.device) for tensor in sources]
        # One copy from the device.
        return layouts, torch.cat(sums).tolist() if sums else [], repr(plain)


@dataclass(frozen=True, eq=False)
class _Blank:
    """NaN in the shape of a tensor of a module's output."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def made(self, count: int) -> Tensor:
        return torch.full((count, *self.shape[1:]), torch.nan, dtype=self.dtype, device=self.device)


# --------------------------------------------------------------------------------------------------
# finding the cut


@dataclass(eq=False)
class _Call:
    """One call of a module in a trace; `output` is held, so that its identity stays its own."""

    name: str
    caller: "_Call | None"
    start: int
    end: int = -1
    output: Any = None


class _Trace(TorchFunctionMode):
    """Hears which modules of a model run, and where its own tensors are made use of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._places: dict[int, list[_Place]] = {}
        for place, tensor in _tensors(model).items():
            self._places.setdefault(id(tensor), []).append(place)
        self._open: list[_Call] = []
        self.clock = 0
        self.calls: list[_Call] = []
        self.used: list[tuple[int, _Place]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.clock += 1
                self.used += [(self.clock, place) for place in self._places.get(id(leaf), ())]
        return func(*args, **(kwargs or {}))

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen inside the block."""
        handles = []
        try:
            for name, module in self._model.named_modules():
                handles.append(module.register_forward_pre_hook(partial(self._started, name)))
                handles.append(module.register_forward_hook(self._ended))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _started(self, name: str, module: nn.Module, args: object) -> None:
        self.clock += 1
        caller = self._open[-1] if self._open else None
        self._open.append(_Call(name, caller, self.clock))
        self.calls.append(self._open[-1])

    def _ended(self, module: nn.Module, args: object, output: object) -> None:
        self.clock += 1
        call = self._open.pop()
        call.end, call.output = self.clock, output


def _trace(model: nn.Module, layer: str | None, images: Images, facts: _Facts) -> _Part | None:
    """Return the part of the model that can be left out, if any."""
    if not _worthwhile(model, facts.trainable):
        return None
    # Two, so that a first dimension of 2 is the batch's.
    two = images[:1].repeat(2, *[1] * (images.ndim - 1))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), two.dtype)

    def logits() -> Tensor:
        with torch.no_grad():
            output = model(two.to(dtype))
        result = getattr(output, "logits", output)
        assert isinstance(result, Tensor)
        return result

    trace = _Trace(model)
    try:
        held = _held(model)
        with trace.heard(), _random_numbers(two.device) as drawn:
            expected = logits()
        if drawn():
            return None
        now = _held(model)
        changed = {name for name in held if now[name] != held[name]}
        for cut in _cuts(trace, layer, facts.trainable):
            part = _part(model, trace, cut, facts.hooked)
            # A module that keeps notes in its forward may keep them for what follows.
            if part is not None and not changed.intersection(part.ran):
                with part.left_out(model, cut.output.detach()):
                    same = torch.equal(logits(), expected)
                if same:
                    part.made_of = part.fingerprint(model)
                    return part
    except torch.OutOfMemoryError:
        raise
    except Exception:  # such as that of a scripted module, or an assertion on what is NaN here
        return None
    return None


def _worthwhile(model: nn.Module, trainable: frozenset[_Place]) -> bool:
    """Tell whether there is anything trainable, and anything with weights that isn't."""
    return bool(trainable) and any(
        isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and place not in trainable
        for place, tensor in _tensors(model).items()
    )


def _cuts(trace: _Trace, layer: str | None, trainable: frozenset[_Place]) -> list[_Call]:
    """Return the calls that may be cuts, the latest first."""
    latest = min((time for time, place in trace.used if place in trainable), default=trace.clock)
    calls = [call for call in trace.calls if call.name == layer]
    if calls:
        latest = min(latest, calls[0].end if len(calls) == 1 else calls[0].start)
    names = [call.name for call in trace.calls]
    found: dict[int, _Call] = {}
    for call in sorted(trace.calls, key=lambda call: -call.end):
        fits = call.end <= latest and names.count(call.name) == 1 and call.caller is not None
        if fits and type(call.output) is Tensor and len(call.output) == 2:
            # A container gives what its last module gave: the container leaves out more.
            found.setdefault(id(call.output), call)
    return list(found.values())[:_MOST_CUTS]


def _part(model: nn.Module, trace: _Trace, cut: _Call, hooked: frozenset[str]) -> _Part | None:
    """Return what comes before a cut, None if it can't be left out."""
    # A module that runs again later, such as a ReLU for a whole block, stays in.
    later = {call.name for call in trace.calls if call.end > cut.end}
    out = [call for call in trace.calls if call.end <= cut.end and call.name not in later]
    blanks: dict[str, list[Any]] = {}
    for call in out:
        if call is not cut and call.caller not in out:
            leaves = tree_leaves(call.output)
            if not all(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
                return None
            if not all(x.ndim and len(x) == 2 for x in leaves):
                return None
            blanks.setdefault(call.name, []).append(
                tree_map(lambda x: _Blank(x.shape, x.dtype, x.device), call.output)
            )
    ran = tuple(dict.fromkeys(call.name for call in trace.calls if call.start <= cut.end))
    for name in {call.name for call in out}:
        module = model.get_submodule(name)
        statistics = getattr(module, "running_mean", 0)
        if name in hooked or statistics is None or isinstance(module, torch.jit.ScriptModule):
            return None
    sources = tuple(dict.fromkeys(place for time, place in trace.used if time <= cut.end))
    tensors = _tensors(model)
    if not any(tensors[place].ndim > 1 for place in sources):
        return None  # such as a normalisation at the very start
    return _Part(cut.name, blanks, sources, ran)


def _tensors(model: nn.Module) -> dict[_Place, Tensor]:
    """Return the parameters, buffers and other tensors of all modules."""
    return {
        (name, attribute): tensor
        for name, module in model.named_modules()
        for table in (module._parameters, module._buffers, vars(module))
        for attribute, tensor in table.items()
        if isinstance(tensor, Tensor)
    }


def _held(model: nn.Module) -> dict[str, list[object]]:
    """Return what can tell whether a forward changes a module's attributes or buffers."""

    def mark(value: object) -> object:
        if isinstance(value, Tensor):
            return _Same(value), value._version
        if isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            return [_Same(item) for item in items]
        return _Same(value)

    return {
        name: [
            (key, mark(value))
            for table in (vars(module), module._buffers)
            for key, value in table.items()
            if "_hooks" not in key
        ]
        for name, module in model.named_modules()
    }


@dataclass(frozen=True, eq=False)
class _Same:
    """Compares by identity, and keeps it from being given to another."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


@contextmanager
def _random_numbers(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether any were drawn in the block; give them back at its end."""
    sources = [torch] if device.type == "cpu" else [torch, getattr(torch, device.type)]
    before = [source.get_rng_state() for source in sources]
    drawn = False
    try:
        yield lambda: drawn
    finally:
        for source, state in zip(sources, before, strict=True):
            drawn = drawn or not torch.equal(source.get_rng_state(), state)
            source.set_rng_state(state)


# --------------------------------------------------------------------------------------------------
# checksums


def _checksums(rows: Shaped[Tensor, "r n"]) -> Int[Tensor, " r"]:
    """Return Σ_b (2b + 1) Σ_i w_i x_bi of the bits x of each row, in blocks b, modulo 2⁶⁴.

    The weights w are random and odd: another value of one element is seen for sure, any other change
    but for one in 2³² or so.
    """
    size = rows.element_size()
    bits = rows.contiguous().view({1: torch.uint8, 2: torch.int16}.get(size, torch.int32))
    weights = _weights(rows.device)
    total = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for b, block in enumerate(bits.split(len(weights), dim=1)):
        total += (2 * b + 1) * (block * weights[: block.shape[1]]).sum(dim=1)
    return total


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Int[Tensor, " n"]:
    # What fits a processor's cache; on other devices, few kernels.
    count = 2**16 if device.type == "cpu" else 2**20
    ends = torch.iinfo(torch.int64)
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(ends.min, ends.max, (count,), dtype=torch.int64, generator=generator)
    return (values | 1).to(device)
