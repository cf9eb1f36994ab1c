"""Which output of a model is its last feature map, and how to capture it."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_aop.errors import InvalidValueError, NonFiniteScoreError
from lightning_aop.model.adapter import Classifier, NoGradientError, name_of
from lightning_aop.model.isolation import hooked, undisturbed, unwrap
from lightning_aop.model.outputs import computed_from
from lightning_aop.scores import full_precision
from lightning_aop.types import Images

__all__ = [
    "Capture",
    "FeatureMap",
    "TargetLayerError",
    "capture",
    "find_feature_map",
    "find_target_layer",
]


class TargetLayerError(InvalidValueError):
    """The layer to look at is missing, ambiguous, or no feature map."""


Reshape: TypeAlias = Callable[[Tensor], Tensor]
"""Turns a layer's output into feature maps [B, C, h, w]: tokens, or maps with the channels last."""


def _first_of(output: object) -> object:
    """Return a layer's output, or the first of a tuple, as blocks with attention give it."""
    return output[0] if isinstance(output, tuple) and output else output


def _with_first(output: object, first: Tensor) -> object:
    """Return an output with another tensor in the place of the one that `_first_of` returns."""
    if not isinstance(output, tuple):
        return first
    every = (first, *output[1:])
    make = getattr(output, "_make", tuple)  # of a named tuple
    return make(every)


class Capture:
    """The output of a layer in the last forward, as the rest of the model saw it."""

    def __init__(self, name: str, size: tuple[int, int], reshape: Reshape | None = None) -> None:
        self.name = name
        self._size = size
        self._reshape = reshape
        self._activation: Tensor | None = None
        self._again = False  # whether it is of the forward that runs now

    def _hook(self, module: nn.Module, args: object, output: object) -> object:
        first = _first_of(output)
        if not isinstance(first, Tensor):
            raise TargetLayerError(
                f"target layer '{self.name}' gives {type(output).__name__}, not a feature map "
                "[B, C, h, w]: name a convolutional layer"
            )
        before = self._activation if self._again and torch.is_grad_enabled() else None
        # A block that is applied to its own output is looked at where it ends.
        if before is not None and not (first.requires_grad and computed_from(first, before)):
            warnings.warn(
                f"target layer '{self.name}' runs several times in a forward, on an input of its own "
                "each, as of a flipped or another image: the map is of the last time alone; use a "
                "method that needs no layer (RISE, LIME, XRAI)",
                stacklevel=2,
            )
        self._again = True
        # The graph starts here: a frozen backbone has none, a trainable one needs none below. The
        # clone may be overwritten by an in-place ReLU; it then holds, values and gradient alike,
        # what the head really gets.
        self._activation = first.detach().requires_grad_().clone()
        return _with_first(output, self._activation)

    def _ended(self, module: nn.Module, args: object, output: object) -> None:
        self._again = False

    def activation(self, images: int) -> Float[Tensor, "b k i j"]:
        """Return A of so many images in float32."""
        if self._activation is None:
            raise TargetLayerError(
                f"target layer '{self.name}' did not run in the model's forward: name a layer that "
                "does"
            )
        return self._maps(self._activation, images)

    def activation_and_gradient(
        self, scores: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b k i j"], Float[Tensor, "b k i j"]]:
        """Return A and ∂(sum of scores)/∂A in float32."""
        activation = self.activation(len(scores))
        assert self._activation is not None
        gradient = None
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores.sum(), self._activation, allow_unused=True)
        if gradient is None:
            raise TargetLayerError(
                f"the class score does not depend on target layer '{self.name}': name a layer "
                "between the image and the logits"
            )
        if len(activation) != len(scores):
            raise TargetLayerError(
                f"target layer '{self.name}' gives {len(activation)} maps for {len(scores)} images"
            )
        return activation, self._maps(gradient, len(scores))

    def _maps(self, output: Tensor, images: int) -> Float[Tensor, "b k i j"]:
        output = output.detach()
        maps = self._reshape(output) if self._reshape else _as_maps(output, images, self._size)
        if maps.ndim != 4:
            raise TargetLayerError(
                f"target layer '{self.name}' gives {list(output.shape)}, not a feature map "
                "[B, C, h, w]: name a convolutional layer, or give reshape, a function that turns "
                "its output into one"
            )
        return full_precision(maps)


@contextmanager
def capture(
    model: nn.Module,
    target_layer: str | nn.Module,
    size: tuple[int, int],
    reshape: Reshape | None = None,
) -> Iterator[Capture]:
    """Hook `target_layer` of `model` for the duration of the block.

    `size` is the images' height and width, by which tokens and maps with the channels last are told
    where `reshape` doesn't say what to do with them.
    """
    name, layer = named_layer(model, target_layer)
    captured = Capture(name, size, reshape)
    handles = [hooked(layer, captured._hook), hooked(model, captured._ended)]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Layout:
    """How cells lie in an output: [B, C, h, w], [B, h, w, C], or [B, prefix + h·w + suffix, C]."""

    grid: tuple[int, int]
    channels_last: bool = False
    prefix: int = 0  # tokens that stand for no place: class and register tokens
    suffix: int = 0  # likewise, at the end
    batch: int = 0  # the dimension of the images: 1 where PyTorch's attention keeps its default

    def __call__(self, output: Tensor) -> Tensor:
        """Return feature maps [B, C, h, w]."""
        output = output.movedim(self.batch, 0)
        if output.ndim == 3:
            h, w = self.grid
            output = output[:, self.prefix : self.prefix + h * w].unflatten(1, self.grid)
        return output.permute(0, 3, 1, 2) if self.channels_last else output


def _layouts(shape: Sequence[int], size: tuple[int, int]) -> Iterator[tuple[_Layout, bool]]:
    """Yield the layouts that an output of this shape can have, and whether each fits the image.

    Maps fit with about the image's proportions, tokens with a grid of square patches. Tokens that
    stand for no place come first, or last, and are a quarter and 128 at most.
    """
    if len(shape) == 4:
        for layout in (_Layout((shape[2], shape[3])), _Layout((shape[1], shape[2]), True)):
            yield layout, _proportionate(layout.grid, size)
    elif len(shape) == 3 and shape[2] > 1:
        for prefix in range(min(shape[1] // 4, 128) + 1):
            count = shape[1] - prefix
            sides = [h for h in range(1, math.isqrt(count) + 1) if count % h == 0]
            for h in sorted({*sides, *(count // h for h in sides)}):
                grid = (h, count // h)
                fits = _patches(grid, size)
                yield _Layout(grid, True, prefix), fits
                if fits and prefix:
                    yield _Layout(grid, True, suffix=prefix), fits


def _of_images(output: Tensor, images: int) -> list[int]:
    """Return the dimensions that can be that of the images: the first, or the second of tokens."""
    return [d for d in range(1 + (output.ndim == 3)) if output.shape[d] == images]


def _as_maps(output: Tensor, images: int, size: tuple[int, int]) -> Tensor:
    """Return feature maps [B, C, h, w] by the first layout that fits the image, else the output."""
    for batch in _of_images(output, images):
        for layout, fits in _layouts(output.movedim(batch, 0).shape, size):
            if fits:
                return replace(layout, batch=batch)(output)
    return output


def _patches(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Tell whether an image of this size has just this grid of square patches of some side."""
    h, w = grid
    shortest, longest = max(size[0] / (h + 1), size[1] / (w + 1)), min(size[0] / h, size[1] / w)
    return h * w > 1 and shortest < longest


def _proportionate(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Tell whether a grid has about the proportions of an image of this size."""
    (h, w), (height, width) = grid, size
    return h * w > 1 and h * width <= 2 * w * height and w * height <= 2 * h * width


def named_layer(model: nn.Module, target_layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of a layer given by either; raise TargetLayerError if missing."""
    modules = dict(model.named_modules())
    if isinstance(target_layer, str):
        if target_layer in modules:
            return target_layer, modules[target_layer]
        maps = [name for name, m in modules.items() if isinstance(m, nn.Conv2d)]
        raise TargetLayerError(
            f"{name_of(model)} has no layer '{target_layer}'; its last convolutions are "
            f"{', '.join(maps[-3:]) or 'none'} (all names: dict(model.named_modules()))"
        )
    target_layer = unwrap(target_layer)
    for name, module in modules.items():
        if module is target_layer:
            return name, module
    raise TargetLayerError(
        f"the target layer given, a {type(target_layer).__name__}, is no submodule of "
        f"{name_of(model)}: give one of its own layers, or a name"
    )


@dataclass(frozen=True)
class FeatureMap:
    """The last feature map of a model, for images of one size.

    Attributes:
        layer: the name of the layer that gives it.
        grid: its height and width in cells.
        reshape: turns the layer's output into feature maps [B, C, h, w].
    """

    layer: str
    grid: tuple[int, int]
    reshape: Reshape


# The identity of all submodules, and the feature map found among them for each size of image. Kept
# outside the model, so that nothing is left on it.
_found: "WeakKeyDictionary[nn.Module, tuple[int, dict[torch.Size, FeatureMap]]]"
_found = WeakKeyDictionary()


def find_target_layer(model: nn.Module, images: Images) -> str:
    """Return the name of the layer that gives the last feature map; see `find_feature_map`."""
    return find_feature_map(model, images).layer


def find_feature_map(model: nn.Module, images: Images) -> FeatureMap:
    """Return the last feature map before the classifier, for images of this size.

    The network itself is asked: an image of noise, and four copies of it with other noise in one
    quarter, go through once. Of the modules' outputs the last is taken that

    - changes where the image was changed, which also shows its layout: channels first or last, or
      tokens, of which the first or the last may stand for no place, before or after the batch;
    - carries all that the logits hear of the image: no skip connection leads around it;
    - is heard at its cells, not at a class token alone, and through a weight: the scores of a
      classifier that is a convolution are no feature map.

    A module that pools to a fixed size, or is called several times, is not taken, and a grid of one cell
    only where there is no finer one among the later layers. This is `layer4.2`
    of ResNet50, `features.norm5` of DenseNet201, `Mixed_7c` of Inception v3 and `features.36` of
    VGG19, the layers of the paper. In a vision transformer it is the final norm where the tokens are
    pooled, and `norm1` of the last block where a class token is classified.

    Costs one evaluation of five images, a second one where the model refuses values outside the range of
    the images. The answer is remembered for each size of image, as long as
    the model's modules stay the same. It doesn't depend on what the images show.

    Raises:
        TargetLayerError: no layer gives such a map.
        NoGradientError: the model can't be differentiated.
        NonFiniteScoreError: the model gives NaN or infinity.
    """
    model = unwrap(model)
    structure = hash(tuple(id(module) for module in model.modules()))
    known = _found.get(model)
    if known is None or known[0] != structure:
        known = _found[model] = (structure, {})
    size, of_size = images.shape[1:], known[1]
    if size not in of_size:
        with undisturbed(model):
            of_size[size] = _ask(model, images)
    return of_size[size]


_Edge: TypeAlias = tuple[Node, int]
"""The node that made a tensor in the graph, and which of the node's outputs it is."""


@dataclass(frozen=True, eq=False)
class _Output:
    """What a module gave, and was given first; `node` is where it is in the graph."""

    name: str
    module: nn.Module
    given: object
    tensor: Tensor
    node: _Edge


def _ask(model: nn.Module, images: Images) -> FeatureMap:
    noise, other = torch.randn(2, *images.shape[1:], dtype=images.dtype)
    try:
        # So much contrast also makes places differ where attention is still even.
        return _found_by(model, images, noise, 4 * other)
    except (InvalidValueError, torch.OutOfMemoryError):  # another image would not help
        raise
    except Exception:  # a forward may refuse values that no image has
        low, high = (float(end) for end in images.aminmax())
        if low == high:
            raise
        noise, other = (low + (high - low) * (n > 0).to(n.dtype) for n in (noise, other))
        return _found_by(model, images, noise, other)


def _found_by(
    model: nn.Module, images: Images, noise: Float[Tensor, "c h w"], other: Float[Tensor, "c h w"]
) -> FeatureMap:
    height, width = images.shape[2:]
    lower, right = torch.arange(height) >= height // 2, torch.arange(width) >= width // 2
    quarters = torch.stack([(lower == i)[:, None] & (right == j) for i in (0, 1) for j in (0, 1)])
    # In another order than the cells, so that [B, N, D] and [N, B, D] differ where N is five, too.
    quarters = quarters.roll(1, 0)
    asked = torch.cat([noise[None], torch.where(quarters[:, None], other, noise)])
    asked, quarters = asked.to(images.device).requires_grad_(), quarters.to(images.device)
    for parameter in model.parameters():  # so that the graph shows where weights come in
        parameter.requires_grad_(parameter.ndim >= 2 and parameter.is_floating_point())
    with _statistics_of_batch(model):
        outputs, sources = _record(model, asked)
    logits = sources[0]
    if not logits.requires_grad:
        raise NoGradientError(model)
    weights = len(_leaves(logits)) - 1  # without the image
    small: FeatureMap | None = None
    scores: FeatureMap | None = None
    for output in reversed(outputs):
        after = _leaves(logits, output.node)
        if any(leaf is asked for leaf in after):
            continue
        layout = _layout(output.tensor.detach(), quarters)
        if layout is None or not _heard(output.tensor, layout, sources):
            continue
        if len(after) > max(_MOST * weights, _FEW):
            break
        name = _normalised(output, layout, outputs, sources)
        found = FeatureMap(name, layout.grid, layout)
        if not after:
            scores = scores or found
        elif _is_projection(output, outputs):
            continue
        elif max(layout.grid) == 1:
            small = small or found
        else:
            return found
    if last := small or scores:  # a network of one convolution has nothing but its scores
        return last
    if not logits.isfinite().all():
        raise NonFiniteScoreError(
            f"{name_of(model)} gives NaN or infinity: check the model's weights for NaN (a diverged "
            "training?)"
        )
    raise TargetLayerError(
        f"{name_of(model)} has no layer that gives a feature map of images of {height} x {width} "
        "(one that changes where the image changes, carries all that reaches the logits, and comes "
        "late enough to say something about the class): use a method that needs no layer (RISE, "
        "LIME, XRAI), or name one as target_layer, and give reshape, a function that turns its "
        "output into [B, C, h, w]"
    )


@contextmanager
def _statistics_of_batch(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch in the block where running statistics have not been learnt yet.

    By those that a layer begins with, signals may fade away to nothing. What has been learnt is used,
    and nothing is written.
    """
    norms = [
        norm
        for norm in model.modules()
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
        and norm.running_mean is not None
        and norm.running_var is not None
        and not norm.running_mean.any()
        and bool((norm.running_var == 1).all())
    ]
    own = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, training, tracking in own:
            norm.training, norm.track_running_stats = training, tracking


def _record(model: nn.Module, images: Images) -> tuple[list[_Output], list[Tensor]]:
    """Return the modules' outputs in the order in which they were made, and what tells who is heard.

    That is the logits, and what the last module with a weight is given: a classifier whose weights
    are still zero hears nothing.
    """
    recorded: list[_Output] = []
    calls: dict[str, int] = {}
    head: list[Tensor] = []

    def ended(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            first = _first_of(output)
            if (
                isinstance(first, Tensor)
                and first.ndim in (3, 4)
                and _of_images(first, len(images))
                and first.grad_fn is not None
                and not isinstance(module, _TO_A_FIXED_SIZE)
            ):
                given = next(iter(args), None)
                recorded.append(
                    _Output(name, module, given, first, (first.grad_fn, first.output_nr))
                )

        return hook

    def started(module: nn.Module, args: tuple[object, ...]) -> None:
        head[:] = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(hooked(module, ended(name)))
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if any(p.ndim >= 2 for p in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(started))
        logits = Classifier(model, -1).logits(images)
    finally:
        for handle in handles:
            handle.remove()
    # One output may be that of several modules: a block, and the stage that it ends.
    outputs: dict[_Edge, _Output] = {}
    for output in recorded:
        if output.name and calls[output.name] == 1:
            outputs.setdefault(output.node, output)
    return list(outputs.values()), [logits, *head]


def _is_projection(output: _Output, outputs: Sequence[_Output]) -> bool:
    """Tell whether tokens are only projected here, as to the keys and values of a pooling attention.

    All that this output carries is in what was projected, which comes next.
    """
    if not isinstance(output.module, nn.Linear) or not isinstance(output.given, Tensor):
        return False
    # What is given may be without the tokens that stand for no place.
    projected = output.given.untyped_storage().data_ptr()
    return any(each.tensor.untyped_storage().data_ptr() == projected for each in outputs)


_TO_A_FIXED_SIZE = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
)
_MOST = 0.75  # of the weights; a map before so many says little about the class,
_FEW = 4  # unless they are as few as those of a classifier after a single convolution


def _leaves(logits: Tensor, cut: _Edge | None = None) -> list[Tensor]:
    """Return the image and the weights that the logits come from where the graph is cut at a tensor."""
    leaves: list[Tensor] = []
    seen: set[Node] = set()
    ahead: list[tuple[Node | None, int]] = [(logits.grad_fn, logits.output_nr)]
    while ahead:
        edge = ahead.pop()
        node = edge[0]
        if node is None or edge == cut or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        ahead.extend(node.next_functions)
    return leaves


def _layout(output: Tensor, quarters: Bool[Tensor, "4 h w"]) -> _Layout | None:
    """Return the layout in which an output changes where the image was changed.

    In networks that have not learnt anything yet every cell may hear nearly as much of all of the
    image. There maps whose proportions fit the image are taken at their word, if nothing speaks
    against it, and tokens if they are a little better than chance, which those that stand for no
    place, such as a Perceiver's latents, are not.
    """
    size = (quarters.shape[1], quarters.shape[2])
    best: dict[bool, tuple[tuple[float, int], _Layout]] = {}
    for batch in _of_images(output, len(quarters) + 1):
        given = output.movedim(batch, 0)
        change = (given[1:] - given[:1]).float()
        for layout, fits in _layouts(given.shape, size):
            if not fits and min(layout.grid) < 2:
                continue
            place = _locality(layout(change), quarters)
            rank = (round(place, 1), -layout.prefix - layout.suffix)
            least = (_NOT_ANYWHERE if output.ndim == 3 else _NOT_ELSEWHERE) if fits else _THERE
            if place >= least and (fits not in best or rank > best[fits][0]):
                best[fits] = (rank, replace(layout, batch=batch))
    chosen = best.get(True) or best.get(False)
    return None if chosen is None else chosen[1]


# Of `_locality`, which is 4 for changes in the right place alone, and 1 for changes everywhere.
_NOT_ELSEWHERE, _NOT_ANYWHERE, _THERE = 0.9, 1.05, 1.5


def _locality(change: Float[Tensor, "4 c i j"], quarters: Bool[Tensor, "4 h w"]) -> float:
    """Return how much more of the change lies in its own quarter than of other copies' changes.

    What changes alike everywhere, as all cells of an attention hear the same, says nothing of places.
    """
    change = (change - change.mean(dim=(2, 3), keepdim=True)).abs().mean(dim=1)
    share = change / change.sum(dim=(1, 2), keepdim=True)
    grid = (change.shape[1], change.shape[2])
    where = F.adaptive_avg_pool2d(quarters[:, None].float(), grid)[:, 0]
    ratio = (where * share).sum(dim=(1, 2)) / (where * share.mean(dim=0)).sum(dim=(1, 2))
    return float(ratio.nan_to_num(0.0).mean())


def _heard(output: Tensor, layout: _Layout, sources: Sequence[Tensor]) -> bool:
    """Tell whether the first of the sources that hears anything hears a quarter of the cells."""
    for source in sources:
        weights = torch.randn(source.shape, dtype=source.dtype).to(source.device)
        (gradient,) = torch.autograd.grad(
            source, output, weights, retain_graph=True, allow_unused=True
        )
        if gradient is not None and gradient.any():
            heard = layout(gradient).ne(0)
            cells = heard.any(dim=1).any(dim=0)
            # Of a maximum over all cells each channel is heard at its highest.
            highest = bool(heard.sum(dim=(2, 3)).max() <= 1)
            return bool(cells.sum() > 1 if highest else cells.float().mean() >= 0.25)
    return False


def _normalised(
    output: _Output, layout: _Layout, outputs: Sequence[_Output], sources: Sequence[Tensor]
) -> str:
    """Return the name of the norm through which alone the output's cells are heard, or its own.

    In a transformer's last block the class token hears the patches through the norm, and nobody
    hears what leads around it. What a norm is given has a gradient at right angles to it, and
    methods that multiply the two would see nothing.
    """
    for norm in outputs[outputs.index(output) + 1 :]:
        if (
            norm.tensor.shape == output.tensor.shape
            and "norm" in type(norm.module).__name__.lower()
            and _heard(norm.tensor, layout, sources)
        ):
            handle = norm.tensor.register_hook(torch.zeros_like)
            try:
                if not _heard(output.tensor, layout, sources):
                    return norm.name
            finally:
                handle.remove()
    return output.name


def _cloned(module: nn.Module, args: object, output: object) -> object:
    first = _first_of(output)
    return _with_first(output, first.clone()) if isinstance(first, Tensor) else output


@contextmanager
def not_overwritten(model: nn.Module, name: str) -> Iterator[None]:
    """Hand on a copy of a layer's output, which what comes after may write into."""
    layer = model.get_submodule(name)
    with hooked(layer, lambda module, args, output: output.clone()):
        yield


def separate_activations(model: nn.Module, images: Images) -> None:
    """Give every call of a weightless module a module of its own, working out of place.

    Methods that replace the backward of a module take it to be called once, and can't have its
    output overwritten; a ResNet has one in-place ReLU for a whole block. For use inside
    `undisturbed`, which puts everything back. Costs one evaluation of one image.
    """
    calls: dict[nn.Module, int] = {}

    def called(module: nn.Module, args: object) -> None:
        calls[module] = calls.get(module, 0) + 1

    handles = []
    try:
        for module in model.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
            if not [*module.parameters(), *module.children()] and module is not model:
                handles.append(module.register_forward_pre_hook(called))
        with torch.no_grad():
            Classifier(model, -1).logits(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    separated = {m: _OneForEachCall(m, count) for m, count in calls.items() if count > 1}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in separated:
                parent._modules[name] = separated[child]


class _OneForEachCall(nn.Module):
    """Copies of a module, which take turns."""

    def __init__(self, module: nn.Module, calls: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(calls))
        self.turn = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self.copies[self.turn]
        self.turn = (self.turn + 1) % len(self.copies)
        return chosen(*args, **kwargs)
