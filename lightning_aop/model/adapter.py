"""Evaluate a user's model as images [B, C, H, W] to logits [B, K].

`find_adapter` finds the way by trying: how the images get in (a tensor, a keyword, the batch that they
came in, a network that is an attribute of the module), and what comes out (see `outputs.py`). What it
finds is a model like any other: `adapter.model(module)` goes wherever a model goes.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_aop.checks import check_batch, require_score
from lightning_aop.errors import InvalidValueError
from lightning_aop.model.batches import IMAGE_NAMES, Inputs, find_inputs, members
from lightning_aop.model.collectives import collectives_noticed
from lightning_aop.model.float16 import Raise, in_float16
from lightning_aop.model.graphs import Graphs, Work
from lightning_aop.model.isolation import (
    device_of,
    gradients_kept,
    precision_of,
    undisturbed,
    unwrap,
)
from lightning_aop.model.listening import Read, calls_in, same_images
from lightning_aop.model.outputs import (
    Expected,
    Meaning,
    OutputError,
    computed_from,
    find_meaning,
)
from lightning_aop.model.passes import kept_bytes, pass_size, seconds, uncounted
from lightning_aop.scores import Score, full_precision, softmax, value
from lightning_aop.types import Images, Targets

__all__ = [
    "Adapter",
    "AdapterError",
    "Classifier",
    "NoGradientError",
    "explaining",
    "find_adapter",
    "predict",
]

if TYPE_CHECKING:
    _Logits: TypeAlias = Float[Tensor, "b k"]
else:
    _Logits = Any  # as for `scores.Score`: a configuration could name no function otherwise

LogitsFunction: TypeAlias = Callable[[Any, Images], _Logits]
"""The user's own way from a module, of the user's own class, and images to logits."""


class AdapterError(InvalidValueError):
    """No way from images to logits was found."""


class NoGradientError(InvalidValueError):
    """A model that can't be differentiated, by a method that has to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            f"{name_of(model)} has no gradient from its images to its logits, as where it computes in "
            "NumPy: use a method that needs none (RISE, LIME, RegionalMultiscale)"
        )


@dataclass(eq=False)
class Classifier:
    """The class scores F_c of a model, evaluated with its inputs checked and its outputs in float32.

    Made by `explaining`; `highest` is the largest target, known on the host, so that a class out of
    range is an error message and not a failed assertion on the device.

    Attributes:
        model: maps images to logits.
        highest: the largest target.
        graphs: the graphs of this explanation.
        channels_last: the images go in with their channels last in memory. The weights stay as they are.
        raises: gradients are raised inside a model in float16, and true again at the images; those of
            values inside it are so after `lowered`.
    """

    model: nn.Module
    highest: int
    graphs: Graphs = field(default_factory=Graphs)
    channels_last: bool = False
    raises: bool = True
    _raise: Raise = field(default_factory=Raise, init=False)

    def logits(self, images: Images) -> Float[Tensor, "b k"]:
        """Evaluate the model in its own dtype and return logits in float32 or wider."""
        dtype, self._raise = self._dtype, Raise()
        raises = self.raises and in_float16(self.model, images.device.type)
        if raises and images.requires_grad:
            images = self._raise.leaving(images)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        output = self.model(images if dtype is None else images.to(dtype))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidValueError(
                f"{name_of(self.model)} must map images [B, C, H, W] to logits [B, K], got "
                f"{got} for {len(images)} images: wrap it in a module whose forward returns the "
                "logits, as find_adapter(module, batch).model(module) does"
            )
        if self.highest >= logits.shape[1]:
            raise InvalidValueError(
                f"targets must lie in 0..{logits.shape[1] - 1}, the classes of "
                f"{name_of(self.model)}, got {self.highest}"
            )
        logits = full_precision(logits)
        return self._raise.entering(logits) if raises else logits

    def lowered(self, gradient: Float[Tensor, "b *more"]) -> Float[Tensor, "b *more"]:
        """Return the gradient of some of the model's values, from the last pass, as it truly is."""
        return self._raise.lowered(gradient)

    def scores(self, images: Images, targets: Targets, score: Score) -> Float[Tensor, " b"]:
        """Return F_c of each image; raise TypeError for a score that is no function."""
        require_score(score)
        logits = self.logits(images)
        if torch.is_grad_enabled() and images.requires_grad and not logits.requires_grad:
            raise NoGradientError(self.model)
        return score(logits, targets)

    def pass_size(self, wanted: int | None, rows: int, images: Images, rounds: int = 1) -> int:
        """Return how many of so many images like these to take through the model in one pass.

        Of more than go through at once anyway, in all rounds, an accelerator is shown a few, once for
        each model and kind of images: what an image takes of the memory, and in half precision, which
        order of the channels is faster. These count as no evaluations.
        """
        return pass_size(wanted, rows, images, lambda: self._probed(images), rounds)

    def _probed(self, images: Images) -> int | None:
        """Return the bytes that an image takes in a pass, and choose the order of the channels.

        None where a forward exchanges something: all processes need as many passes then, whatever
        memory each of them has.
        """
        device = images.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        kind = images.shape[1:], images.dtype, self._dtype, autocast
        # By the user's own module, of which each explanation may make a model anew.
        known = _probes.setdefault(_own(self.model), {})
        if kind not in known:
            exchanges: set[str] = set()
            with uncounted(), torch.enable_grad(), collectives_noticed(exchanges):
                # A difference, for no image's is what is kept once: autocast's copies of the weights.
                one, three = (
                    kept_bytes(partial(self.logits, some.requires_grad_()), self.model)
                    for some in (images[:1].clone(), images[:1].repeat(3, 1, 1, 1))
                )
            if exchanges:
                known[kind] = None, False
            else:
                with uncounted():
                    faster = self._is_half(device) and self._faster_channels_last(images)
                known[kind] = (three - one) // 2, faster
        found, self.channels_last = known[kind]
        return found

    @property
    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    def _is_half(self, device: str) -> bool:
        half = (torch.float16, torch.bfloat16)
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device) in half
        return any(p.dtype in half for p in self.model.parameters())

    def _faster_channels_last(self, images: Images) -> bool:
        """Time a pass in either order; a model that takes its features in one order only keeps it."""
        some = images[:1].repeat(32, 1, 1, 1)
        times = []
        with torch.no_grad():
            for order in (False, True):
                tried = Classifier(self.model, self.highest, channels_last=order)
                try:
                    times.append(seconds(partial(tried.logits, some), images.device))
                except RuntimeError:
                    return False
        return times[1] < 0.95 * times[0]

    def repeated(self, work: Work, times: int) -> Work:
        """Return some work on tensors alone as it is best done so many times in this explanation."""
        return self.graphs.repeated(work, times)


_probes: "WeakKeyDictionary[nn.Module, dict[object, tuple[int | None, bool]]]" = WeakKeyDictionary()
"""By model and kind of images: the bytes of an image, and whether channels last are faster."""


@contextmanager
def explaining(
    model: nn.Module, images: Images, targets: Targets, seed: int = 0
) -> Iterator[tuple[Classifier, Images, Targets]]:
    """Check the batch and open `undisturbed`; yield the classifier and the batch on its device.

    The yielded tensors are the caller's values, usable by autograd even where the caller's own were
    made in inference mode; the caller's tensors are never written.
    """
    check_batch(images, targets)
    precision, model = precision_of(model), unwrap(model)
    with undisturbed(model, seed), precision:
        device = device_of(model)
        targets = targets.detach().clone().to(device)
        low, high = (int(value) for value in torch.stack(targets.aminmax()).tolist())
        if low < 0:
            raise InvalidValueError(f"targets must be class indices of 0 or more, got {low}")
        with closing(Graphs.on(device)) as graphs:
            x = full_precision(images.detach().clone().to(device))
            yield Classifier(model, high, graphs), x, targets


def predict(
    model: nn.Module, images: Images, eval_batch_size: int | None = None
) -> Float[Tensor, "b k"]:
    """Return the model's logits in eval mode, leaving it undisturbed."""
    anything = torch.zeros(len(images), dtype=torch.long, device=images.device)
    with explaining(model, images, anything) as (classifier, x, _), torch.no_grad():
        size = classifier.pass_size(eval_batch_size, len(x), x)
        return torch.cat([classifier.logits(part) for part in x.split(size)])


# --------------------------------------------------------------------------------------------------
# from any module to logits


@dataclass(frozen=True)
class Adapter:
    """The way from a user's module and images to logits [B, K], as it was found.

    Attributes:
        logits: the module and images [B, C, H, W] to logits [B, K], differentiable.
        description: how, in words.
        score: the class score that fits: `scores.softmax`, `scores.sigmoid` or `scores.value`.
        classes: K.
        plain: whether the module itself maps images to logits.
        names: what the K columns are, where they are no classes.
        head: the key of the labels that the output has, where a batch has several.
        sources: the modules in the user's whose outputs are these logits, the outermost first, and how
            they are read.
        takes: the modules in the user's that are given the images as they are.
    """

    logits: LogitsFunction
    description: str
    score: Score
    classes: int
    plain: bool = False
    names: Sequence[str] | None = None
    head: str | None = None
    sources: Mapping[str, Read] = field(default_factory=dict, repr=False)
    takes: Collection[str] = field(default=(), repr=False)

    def __call__(self, module: nn.Module, images: Images) -> Float[Tensor, "b k"]:
        """Return the logits of the module."""
        return self.logits(module, images)

    def model(self, module: nn.Module) -> nn.Module:
        """Return the module as a model that maps images to logits: itself where it does so."""
        return module if self.plain else Adapted(unwrap(module), self)


class Adapted(nn.Module):
    """A user's module as a model that maps images [B, C, H, W] to logits [B, K].

    Its submodules, parameters and buffers are those of the user's module, under the same names.
    Nothing is registered on that module.
    """

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        # Not as a submodule, which would put a prefix before all names.
        vars(self)["module"] = module
        self.adapter = adapter
        self.training = module.training

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        """Return the logits of the module."""
        module: nn.Module = vars(self)["module"]
        return self.adapter.logits(module, images)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Go through the user's module and its submodules."""
        module: nn.Module = vars(self)["module"]
        yield from module.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the user's module, by which `apply`, `to` and `train` get to all of it."""
        yield "module", vars(self)["module"]

    def get_submodule(self, target: str) -> nn.Module:
        """Return a submodule of the user's module."""
        module: nn.Module = vars(self)["module"]
        return module.get_submodule(target)


def _own(model: nn.Module) -> nn.Module:
    """Return the user's module of an adapted one, and any other as it is."""
    own: nn.Module = vars(model)["module"] if isinstance(model, Adapted) else model
    return own


def name_of(model: nn.Module) -> str:
    """Return the name of a model's class; of an adapted one, that of the user's."""
    return type(_own(model)).__name__


def find_adapter(
    module: nn.Module,
    batch: Any,
    expected: Expected | None = None,
    logits: LogitsFunction | None = None,
) -> Adapter:
    """Find how a module maps images to logits, by trying it on a batch.

    The module is left undisturbed. Of ways that fit, the first counts: the images as the only
    argument, by keyword, the whole batch with the images in it, what else the forward asks for by
    the names or the order in the batch, the same of the part of the batch that holds the images, and
    then networks that are attributes of the module. Costs one evaluation of the batch for each way that
    is tried.

    Args:
        module: the user's module, on the device of the batch.
        batch: a batch as the module's steps get it, or the `Inputs` found in one.
        expected: what the labels say of the outputs.
        logits: the user's own way, which takes the place of what would be found.

    Raises:
        AdapterError: there is none, or its outputs don't fit the labels.
        BatchError: the batch has no images.
    """
    module = unwrap(module)
    inputs = batch if isinstance(batch, Inputs) else find_inputs(batch)
    expected = replace(
        expected or Expected(), trusted=logits is not None, images=tuple(inputs.images.shape[1:])
    )
    if len(inputs.images) == 1:
        # Of one image it can't be told which dimension is the batch's.
        inputs = Inputs(
            inputs.with_images(inputs.images.repeat(2, 1, 1, 1)),
            inputs.path,
            inputs.form,
            inputs.images.repeat(2, 1, 1, 1),
        )
    ways = [*_ways(module, inputs), *_prepared(module, inputs)]
    if logits is not None:
        ways = [_given(logits)]
    failures: list[str] = []
    with undisturbed(module):
        for way in ways:
            try:
                return _tried(way, module, inputs, expected)
            except (torch.OutOfMemoryError, KeyboardInterrupt):
                raise
            except OutputError as error:
                failures.append(f"{way.description} {error}")
            except Exception as error:
                text = (str(error).strip().splitlines() or [""])[0][:160]
                failures.append(f"{way.description} raised {type(error).__name__}: {text}")
    name = type(module).__name__
    if logits is not None:
        raise AdapterError(f"{failures[0]}: logits=fn must return logits [B, K] of {name}")
    # What gave an output is closer to the mark than what raised an error.
    told = sorted(failures, key=lambda text: " raised " in text)[0]
    or_labels = "; or read_batch=fn with fn(batch) -> (images, labels), where the labels are others"
    raise AdapterError(
        f"no logits of {name} found: {told}. Set logits=fn, a function "
        f"fn(module, images) that returns logits [B, K]{_example(module, inputs, expected)}"
        f"{or_labels if 'labels go up' in told else ''}"
    )


def _example(module: nn.Module, inputs: Inputs, expected: Expected) -> str:
    """Return a function of what the module is made of that gives logits, empty where none is found."""
    names = [name for name, child in module.named_children() if list(child.parameters())]
    first, last = names[:1], names[-1:]
    calls = [f"module.{b}(module.{a}(images))" for a, b in zip(first, last, strict=True) if a != b]
    calls += [f"module.{name}(images)" for name in names]
    with undisturbed(module):
        for call in calls:
            # The names are those of attributes, and of numbers there is no such expression.
            with suppress(Exception):
                code = f"lambda module, images: {call}"
                _tried(_given(partial(_rows, eval(code, {}))), module, inputs, expected)
                return f", such as {code}"
    return ""


def _rows(logits: LogitsFunction, module: nn.Module, images: Images) -> Tensor:
    """Return logits that are rows; raise OutputError for maps, which are logits of pixels."""
    output: Tensor = logits(module, images)
    if output.ndim != 2:
        raise OutputError(f"gives {list(output.shape)}, not [B, K]")
    return output


@dataclass(frozen=True)
class _Way:
    """A way into a module: `call` takes it, images [B, C, H, W], and whether integers must be so."""

    description: str
    call: Callable[[nn.Module, Images, bool], Any]
    trusted: bool = False  # the user's own
    through: bool = False  # with gradients where the forward computes none


def _with_gradients(way: _Way) -> _Way:
    """Return a way on which a forward has gradients where it does without, as for frozen layers."""

    def call(module: nn.Module, images: Images, exact: bool) -> Any:
        with gradients_kept():
            return way.call(module, images, exact)

    described = f"{way.description}, with gradients where it computes none,"
    return replace(way, description=described, call=call, through=True)


def _tried(way: _Way, module: nn.Module, inputs: Inputs, expected: Expected) -> Adapter:
    """Return the adapter of a way; raise OutputError where it leads to no logits."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    images = inputs.images.detach().to(device_of(module), dtype, copy=True).requires_grad_()
    count, exact = len(images), False
    with _idle_heads(module) as idle, calls_in(module) as inside:
        given = images.clone()
        output = way.call(module, given, False)
    if given._version:  # it has written into them
        own = way.call
        way = replace(way, call=lambda module, x, exact: own(module, x.clone(), exact))
    meaning = find_meaning(output, count, expected)
    if not computed_from(meaning.read(output, count), given):
        if way.through:
            raise OutputError("has no gradient")
        try:
            return _tried(_with_gradients(way), module, inputs, expected)
        except torch.OutOfMemoryError:
            raise
        except (OutputError, RuntimeError, TypeError):  # such as of what NumPy computes
            pass
    if inputs.form.integer:
        # A forward may ask for the dtype, and scale integers only.
        with calls_in(module) as inside_then:
            of_integers = way.call(module, images, True)
        found = find_meaning(of_integers, count, expected)
        values, wanted = meaning.read(output, count), found.read(of_integers, count)
        if values.shape != wanted.shape or not torch.allclose(values, wanted, 1e-3, 1e-3):
            meaning, exact, output, inside = found, True, of_integers, inside_then
    head = next((n for n, size in idle.items() if size == meaning.classes), None)
    # As many outputs as classes are no features, though another layer may take them, such as one that
    # calibrates them.
    counted = expected.highest + 1 if expected.kind == "class" else None
    if head and meaning.classes not in (expected.classes, counted) and not way.trusted:
        raise OutputError(
            f"gives {meaning.classes} outputs an image, which '{head}' seems to take for features, as "
            f"in lambda module, images: module.{head}(module(images))"
        )
    some = 2 if count > 2 else 1  # a norm by the batch refuses a single image
    with torch.no_grad():
        of_some = way.call(module, images[:some], exact)
    try:
        meaning.read(of_some, some)
    except RuntimeError as error:  # another size
        raise OutputError(f"gives other outputs for {some} images than for {count}") from error
    form = inputs.form.described
    logits = meaning.read(output, count)
    return Adapter(
        partial(_logits, way, meaning, exact),
        f"{way.description}{' with ' * bool(form)}{form} gives {meaning.description}",
        meaning.score,
        meaning.classes,
        plain=way is _DIRECT and not form and logits is output,
        names=meaning.names,
        head=meaning.head,
        sources=_sources(module, inside, logits, meaning, expected),
        takes=[] if form else [name for name, args, _ in inside if same_images(args, images)],
    )


def _sources(
    module: nn.Module,
    inside: Sequence[tuple[str, Any, Any]],
    logits: Float[Tensor, "b k"],
    meaning: Meaning,
    expected: Expected,
) -> dict[str, Read]:
    """Return whose outputs mean the same as the logits, which a probability does, too."""
    found: dict[str, Read] = {}
    if meaning.score is value:
        return found
    wanted, count = _comparable(logits, meaning.score), len(logits)

    for name, _, output in inside:
        for whole in (True, False):
            with suppress(Exception):  # most outputs are no logits
                read = (meaning if whole else find_meaning(output, count, expected)).read
                its = _comparable(read(output, count), meaning.score)
                if its.shape == wanted.shape and torch.allclose(its, wanted, 1e-2, 1e-2):
                    found.setdefault(name, read)
    return {name: found[name] for name, _ in module.named_modules() if name in found}


def _comparable(logits: Float[Tensor, "b k"], score: Score) -> Float[Tensor, "b k"]:
    """Return what two outputs that say the same have in common, down to where rounding begins."""
    wide = full_precision(logits.detach())
    return (wide.log_softmax(dim=1) if score is softmax else wide).clamp(-12, 12)


def _logits(
    way: _Way, meaning: Meaning, exact: bool, module: nn.Module, images: Images
) -> Float[Tensor, "b k"]:
    return full_precision(meaning.read(way.call(module, images, exact), len(images)))


@contextmanager
def _idle_heads(module: nn.Module) -> Iterator[dict[str, int]]:
    """Yield the linear layers that don't run in the block, with the number of their inputs."""
    idle = {name: m.in_features for name, m in module.named_modules() if isinstance(m, nn.Linear)}

    def runs(name: str, layer: nn.Module, inputs: object) -> None:
        idle.pop(name, None)

    handles = [
        module.get_submodule(name).register_forward_pre_hook(partial(runs, name)) for name in idle
    ]
    try:
        yield idle
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------------------------------
# ways into a module


_BATCH_NAMES = ("batch", "batch_data", "sample", "samples", "data", "inputs", "batched_inputs")
_NETWORKS = ("model", "net", "network", "classifier", "module", "cnn", "resnet", "vit", "backbone")
_BODIES = ("backbone", "encoder", "feature_extractor", "features", "body", "trunk", "model", "stem")
_HEADS = ("head", "classifier", "fc", "linear", "cls_head", "decoder", "head_cls", "clf")


def _ways(module: nn.Module, inputs: Inputs) -> list[_Way]:
    """Return the ways to try, the likeliest first."""
    if _has_forward(module):
        return _ways_of_forward(module, inputs)
    children = {name: m for name, m in module.named_children() if list(m.parameters())}
    pairs = [(b, h) for b in _BODIES for h in _HEADS if b in children and h in children]
    networks = [name for name in _NETWORKS if name in children]
    if len(children) == 1:
        networks = list(children)
    return [
        *(_through(body, head, inputs) for body, head in pairs if body != head),
        *(_attribute(name, inputs) for name in networks),
    ] or [_DIRECT]


def _prepared(module: nn.Module, inputs: Inputs) -> list[_Way]:
    """Return the ways for a step that scales bytes, or puts the channels first, before it calls."""
    form = inputs.form
    if form.listed or not (form.bytes or form.channels_last):
        return []
    made = "images" + ".permute(0, 3, 1, 2)" * form.channels_last + ".float() / 255" * form.bytes
    plain = replace(inputs, form=replace(form, bytes=False, channels_last=False))
    ways = _ways(module, plain)
    return [replace(way, description=way.description.replace("images", made)) for way in ways]


def _has_forward(module: nn.Module) -> bool:
    own = getattr(type(module).forward, "__qualname__", "")
    unimplemented = own in ("_forward_unimplemented", "LightningModule.forward")
    return not unimplemented or "forward" in vars(module)


def _ways_of_forward(module: nn.Module, inputs: Inputs, name: str = "batch") -> list[_Way]:
    """Return the ways into a forward of what a batch, or the part that is so named, holds."""
    direct = _DIRECT if not inputs.form.described else _positional(inputs)
    whole = _Way(f"forward({name})", lambda m, x, exact: m(inputs.with_images(x, exact)))
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # such as a scripted module's
        return [direct, whole]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, p in parameters.items() if p.kind not in kinds]
    required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    first = names[0] if names else ""
    of_images = next((name for name in names if name in IMAGE_NAMES), first)
    ways = [direct]
    if _is_named(inputs.batch) and (
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        or {str(key) for key in inputs.batch}.issubset(names)
    ):
        ways.append(
            _Way(f"forward(**{name})", lambda m, x, exact: m(**inputs.with_images(x, exact)))
        )
    if of_images != first:
        keyword = _Way(
            f"forward({of_images}=images)",
            lambda m, x, exact: m(**{of_images: inputs.form.outside(x, exact)}),
        )
        ways.insert(0, keyword)
    if not inputs.bare:
        if first in _BATCH_NAMES:
            ways.insert(0, whole)
        else:
            ways.append(whole)
        ways = [*_with_others(required, of_images, inputs, name), *ways]
    if len(inputs.path) > 1:
        key = inputs.path[0]
        by_key = isinstance(inputs.batch, Mapping) or isinstance(key, int)
        tried = {way.description for way in ways}
        part = f"{name}[{key!r}]" if by_key else f"{name}.{key}"
        others = _ways_of_forward(module, inputs.part, part)
        ways += [way for way in others if way.description not in tried]
    return ways


def _is_named(batch: Any) -> bool:
    return isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch)


def _with_others(required: list[str], of_images: str, inputs: Inputs, name: str) -> list[_Way]:
    """Return the ways that give what else a forward requires, from the batch."""
    others = [each for each in required if each != of_images]
    if not others:
        return []
    of = "the batch" if name == "batch" else name
    names = [key for key, _ in members(inputs.batch)]
    if not isinstance(inputs.batch, (tuple, list)) and {*map(str, names)}.issuperset(others):

        def by_name(module: nn.Module, images: Images, exact: bool) -> Any:
            rest = {each: inputs.value(each, images) for each in others}
            return module(**{of_images: inputs.form.outside(images, exact)}, **rest)

        return [_Way(f"forward({of_images}=images, {', '.join(others)} of {of})", by_name)]

    def by_place(start: int, module: nn.Module, images: Images, exact: bool) -> Any:
        values = [value for _, value in members(inputs.with_images(images, exact))]
        return module(*values[start : start + len(required)])

    # The images may stand where the forward has them: after the labels, for example.
    place = required.index(of_images) if of_images in required else 0
    starts = [names.index(inputs.path[0]) - place, 0]
    if of_images not in IMAGE_NAMES:
        starts.reverse()
    return [
        _Way(f"forward({', '.join(required)}) of {of}{f'[{start}:]' * (start > 0)}", call)
        for start in dict.fromkeys(starts)
        if 0 <= start <= len(names) - len(required)
        for call in [partial(by_place, start)]
    ]


def _positional(inputs: Inputs) -> _Way:
    return _Way("forward(images)", lambda m, x, exact: m(inputs.form.outside(x, exact)))


def _attribute(name: str, inputs: Inputs) -> _Way:
    def call(module: nn.Module, images: Images, exact: bool) -> Any:
        return getattr(module, name)(inputs.form.outside(images, exact))

    return _Way(f"{name}(images)", call)


def _through(body: str, head: str, inputs: Inputs) -> _Way:
    def call(module: nn.Module, images: Images, exact: bool) -> Any:
        features = getattr(module, body)(inputs.form.outside(images, exact))
        last = getattr(module, head)
        # As steps do between a convolutional body and a linear head, where it can be meant in one way.
        if (
            isinstance(features, Tensor)
            and features.ndim == 4
            and isinstance(_first(last), nn.Linear)
        ):
            features = features.flatten(1)
        return last(features)

    return _Way(f"{head}({body}(images))", call)


def _first(module: nn.Module) -> nn.Module:
    """Return the first layer of a sequence."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module


def _given(logits: LogitsFunction) -> _Way:
    return _Way("logits=fn", lambda module, images, exact: logits(module, images), True)


_DIRECT = _Way("forward(images)", lambda module, images, exact: module(images))
