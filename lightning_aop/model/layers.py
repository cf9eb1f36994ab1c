"""Which output of a model is its last feature map, and how to capture it."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_aop.errors import InvalidValueError
from lightning_aop.model.adapter import Classifier
from lightning_aop.model.isolation import undisturbed, unwrap
from lightning_aop.scores import full_precision
from lightning_aop.types import Images

__all__ = ["Capture", "TargetLayerError", "capture", "find_target_layer"]


class TargetLayerError(InvalidValueError):
    """The layer to look at is missing, ambiguous, or no feature map."""


Reshape: TypeAlias = Callable[[Tensor], Tensor]
"""Turns a layer's output into feature maps [B, C, h, w]: tokens, or maps with the channels last."""


class Capture:
    """The output of a layer in the last forward, as the rest of the model saw it."""

    def __init__(self, name: str, reshape: Reshape) -> None:
        self.name = name
        self._reshape = reshape
        self._activation: Tensor | None = None

    def _hook(self, module: nn.Module, args: object, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise TargetLayerError(
                f"target layer '{self.name}' gives {type(output).__name__}, not a feature map "
                "[B, C, h, w]: name a convolutional layer"
            )
        # The graph starts here: a frozen backbone has none, a trainable one needs none below. The
        # clone may be overwritten by an in-place ReLU; it then holds, values and gradient alike,
        # what the head really gets.
        self._activation = output.detach().requires_grad_().clone()
        return self._activation

    def activation(self) -> Float[Tensor, "b k i j"]:
        """Return A in float32."""
        if self._activation is None:
            raise TargetLayerError(
                f"target layer '{self.name}' did not run in the model's forward: name a layer that "
                "does"
            )
        return self._maps(self._activation)

    def activation_and_gradient(
        self, scores: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b k i j"], Float[Tensor, "b k i j"]]:
        """Return A and ∂(sum of scores)/∂A in float32."""
        activation = self.activation()
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
        return activation, self._maps(gradient)

    def _maps(self, output: Tensor) -> Float[Tensor, "b k i j"]:
        maps = self._reshape(output.detach())
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
    captured = Capture(name, reshape or partial(_as_maps, size=size))
    handle = layer.register_forward_hook(captured._hook)
    try:
        yield captured
    finally:
        handle.remove()


def _as_maps(output: Tensor, size: tuple[int, int]) -> Tensor:
    """Return feature maps [B, C, h, w] from maps, maps with the channels last, or tokens.

    Of tokens [B, N, C], the first may belong to no place (class and register tokens): as many as
    leave a grid with the image's proportions, a quarter at most. What fits none of these is returned
    as it is.
    """
    if output.ndim == 4:
        channels_last = _proportionate(output.shape[1:3], size) and not _proportionate(
            output.shape[2:], size
        )
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.ndim == 3:
        for prefix in range(output.shape[1] // 4 + 1):
            count = output.shape[1] - prefix
            for h in range(1, count + 1):
                if count % h == 0 and _patches((h, count // h), size):
                    tokens = output[:, prefix:]
                    return tokens.reshape(len(tokens), h, count // h, -1).permute(0, 3, 1, 2)
    return output


def _patches(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Tell whether a picture of this size has just this grid of square patches of some side."""
    h, w = grid
    shortest, longest = max(size[0] / (h + 1), size[1] / (w + 1)), min(size[0] / h, size[1] / w)
    return h * w > 1 and shortest < longest


def _proportionate(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Tell whether a grid has about the proportions of a picture of this size."""
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
            f"{type(model).__name__} has no layer '{target_layer}'; its last convolutions are "
            f"{', '.join(maps[-3:]) or 'none'} (all names: dict(model.named_modules()))"
        )
    target_layer = unwrap(target_layer)
    for name, module in modules.items():
        if module is target_layer:
            return name, module
    raise TargetLayerError(
        f"the target layer given, a {type(target_layer).__name__}, is no submodule of "
        f"{type(model).__name__}: give one of its own layers, or a name"
    )


# A layer's name, with the identity of all submodules that it was found among. Kept outside the
# model, so that nothing is left on it.
_found: "WeakKeyDictionary[nn.Module, tuple[int, str]]" = WeakKeyDictionary()


def find_target_layer(model: nn.Module, images: Images) -> str:
    """Return the name of the layer that gives the last feature map before the classifier.

    Found by tracing one forward of the first image: the last [B, C, h, w] output that the final
    weighted layer (the classifier, linear or 1 × 1 convolution) still comes after, pooling to a
    fixed size excluded. This is `layer4.2` of ResNet50, `features.norm5` of DenseNet201, `Mixed_7c`
    of Inception v3 and `features.36` of VGG19, the layers of the paper.

    A transformer has its last map where the work begins. There it is the last normalisation whose
    output has one token for each patch of the image, and whose patches the classifier still hears:
    `norm1` of the last block in a vision transformer with a class token, after which only that token
    counts, and the final norm where the tokens are pooled.

    The trace is one more evaluation of one image, three where the model works on tokens; its result
    is remembered as long as the model's modules stay the same.

    Raises:
        TargetLayerError: the model has neither convolutions nor such tokens.
    """
    model = unwrap(model)
    structure = hash(tuple(id(module) for module in model.modules()))
    known = _found.get(model)
    if known is None or known[0] != structure:
        with undisturbed(model):
            name = _trace(model, images[:1].detach().clone())
        known = _found[model] = (structure, name)
    return known[1]


_NO_FEATURE_MAP = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Softmax)


@dataclass(frozen=True)
class _Output:
    """One module's output during a trace; `tensor` is held, so that its identity stays its own."""

    time: int
    name: str
    tensor: Tensor
    version: int
    rejected: bool

    def is_map(self, images: Images) -> bool:
        """Tell a feature map [B, C, h, w] by its proportions: channels-last ones don't have them."""
        if self.tensor.ndim != 4 or self.rejected:
            return False
        return _proportionate(self.tensor.shape[2:], images.shape[2:])

    @property
    def is_tokens(self) -> bool:
        """Tell positions in rows, [B, N, C] or [B, h, w, C], which are no map by `is_map`."""
        shape = self.tensor.shape
        if len(shape) == 4:
            return shape[1] * shape[2] > 1 and shape[3] > 1 and not self.rejected
        return len(shape) == 3 and shape[1] > 1


def _trace(model: nn.Module, images: Images) -> str:
    outputs: list[_Output] = []
    weighted: list[int] = []  # the times at which a layer with a weight matrix starts
    calls: dict[str, int] = {}
    clock = iter(range(sys.maxsize))
    convolution = False

    def started(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            nonlocal convolution
            calls[name] = calls.get(name, 0) + 1
            convolution = convolution or isinstance(module, nn.Conv2d)
            if any(p.ndim >= 2 for p in module.parameters(recurse=False)):
                weighted.append(next(clock))

        return hook

    def ended(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and convolution:
                # Pooled to a fixed size, or attention: no feature map. A dropout in eval mode hands
                # on the very tensor that it was given.
                rejected = isinstance(module, _NO_FEATURE_MAP) or any(
                    o.rejected and o.tensor is output for o in outputs
                )
                outputs.append(_Output(next(clock), name, output, output._version, rejected))

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(started(name)))
            handles.append(module.register_forward_hook(ended(name)))
        with torch.no_grad():
            Classifier(model, -1).logits(images)
    finally:
        for handle in handles:
            handle.remove()

    classifier = weighted[-1] if weighted else sys.maxsize
    maps = [o for o in outputs if o.is_map(images)]
    # A network of one convolution has nothing before its classifier: then the map is its output.
    before = [o for o in maps if o.time < classifier] or maps
    if not before:
        raise TargetLayerError(
            f"{type(model).__name__} has no convolutional feature map: activation maps need one; "
            "name a layer that gives [B, C, h, w] as target_layer, or use a method without one"
        )
    last = before[-1]
    after = [time for time in weighted if time > last.time]
    tokens = any(o.is_tokens for o in outputs if o.time > last.time and not o.is_map(images))
    if tokens and len(after) > len(weighted) / 2:
        found = _trace_tokens(model, images)
        if found is not None:
            return found
        raise TargetLayerError(
            f"{type(model).__name__} works on tokens after '{last.name}': {len(after)} of its "
            f"{len(weighted)} weighted layers come later, so this map says little; name a layer as "
            "target_layer, and give reshape, a function that turns its output into [B, C, h, w]"
        )
    same = [o for o in outputs if o.tensor is last.tensor and o.version == last.version]
    # A module that is called several times (one ReLU for a whole block) is heard several times.
    return next((o for o in same if calls[o.name] == 1), same[0]).name


def _trace_tokens(model: nn.Module, images: Images) -> str | None:
    """Return the last normalisation layer with a token for each patch that the classifier hears."""
    size = (images.shape[2], images.shape[3])
    outputs: list[tuple[str, Tensor]] = []
    heard: list[Tensor] = []  # what the last layer with a weight matrix was given

    def ended(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and _as_maps(output, size).ndim == 4:
                outputs.append((name, output))

        return hook

    def started(module: nn.Module, args: tuple[object, ...]) -> None:
        heard[:] = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    handles = []
    try:
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                handles.append(module.register_forward_hook(ended(name)))
            if any(p.ndim >= 2 for p in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(started))
        with torch.enable_grad():
            logits = Classifier(model, -1).logits(images.clone().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    # Not the logits: a head that starts at zero hears nothing yet. Random weights, since the plain
    # sum of what a LayerNorm gives doesn't depend on what it was given.
    sources = heard or [logits]
    weights = [torch.randn_like(source) for source in sources]
    gradients = torch.autograd.grad(
        sources, [output for _, output in outputs], weights, allow_unused=True
    )
    for (name, _), gradient in zip(reversed(outputs), reversed(gradients), strict=True):
        if gradient is not None and _as_maps(gradient, size).any():
            return name
    return None


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
