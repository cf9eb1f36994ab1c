"""Excitation backprop: a probability that walks from the class down to a layer, winner by winner.

Autograd walks, with the rules of the method in place of the derivatives of some functions. The rules
are put in by the functions' own names while the model runs (`torch.overrides`), so that it doesn't
matter whether a network calls a module, a function or an operator, and neither is touched.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from lightning_aop.checks import require_finite
from lightning_aop.methods.cam import ActivationMap
from lightning_aop.model.adapter import Classifier
from lightning_aop.model.layers import Capture, not_overwritten
from lightning_aop.scores import full_precision, logit
from lightning_aop.types import Images, Targets


@dataclass(frozen=True)
class ExcitationBackprop(ActivationMap):
    """Excitation backprop (Zhang et al. 2018, Top-Down Neural Attention by Excitation Backprop).

    A signal of one starts at the class logit. Each layer hands it on to its inputs in proportion to
    what they added to the output through positive weights, p_in = x ⊙ Wᵀ(p_out / (W x)) with W the
    positive part of the weights and no bias. The map is the signal at the target layer, summed over
    the channels; what is negative becomes zero, and the map is min-max normalised to [0, 1]. With inputs
    and weights that are nowhere negative, the sum of the signal is one at every layer.

    The rules, which are those of the package TorchRay:

    - convolutions (transposed ones too) and `linear`: the formula above;
    - average pooling, fixed, adaptive or by `mean`: the same, with its own weights;
    - batch norm: passes the signal as it is;
    - the sum of two activations: x / (x + y) of the signal goes to x and the rest to y, and nothing
      where the sum is zero;
    - everything else, such as ReLU, max pooling, dropout, concatenation and matrix products: the
      ordinary derivative.

    Made for networks whose activations are nowhere negative, such as VGG or SqueezeNet. Like TorchRay
    it does nothing about others. Where layers are given negative inputs (after SiLU, GELU or
    hard-swish; the normalised image itself) or a negative activation is added to another (the batch
    norm before the sum in a ResNet), shares are negative, or larger than the whole: the more such
    layers lie between the target layer and the class, the less a map means. Normalisations other than
    batch norm, and products of activations such as squeeze-and-excitation, have no rule of their own.
    The last feature map is coarse: name an earlier layer for a finer map.

    Functions inside TorchScript are not seen: they keep their ordinary derivatives.

    Cost per image: one forward and one backward (2 evaluations), with one more forward of each layer
    inside that backward; one more evaluation of five images where the layer has to be detected.
    Memory is that of a whole backward, whatever the layer.

    Attributes:
        target_layer: the layer at which the signal is read: a name as in `model.named_modules()`, a
            module, or None for the last feature map before the classifier.
        eval_batch_size: the number of images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
        reshape: a function that turns the layer's output into feature maps [B, C, h, w], for layers
            of another shape, as in the class activation maps.
    """

    def _evidence(
        self, classifier: Classifier, captured: Capture, images: Images, targets: Targets
    ) -> tuple[Float[Tensor, "b i j"], Float[Tensor, " b"]]:
        # What needs a gradient tells activations, also those on a branch beside the layer, from
        # constants. The clone may be overwritten by the model, a leaf may not.
        traced = images.detach().requires_grad_().clone()
        # Sums are often written into the output of a layer: the signal is wanted before that.
        with not_overwritten(classifier.model, captured.name), _Rules():
            scores = classifier.scores(traced, targets, logit)
        signal = classifier.lowered(captured.activation_and_gradient(scores)[1])
        if scores.isfinite().all():  # else the logit is to blame, which is looked at for all passes
            require_finite(signal, targets, "the excitation signal (images counted in their pass)")
        return signal.sum(dim=1), scores


# --------------------------------------------------------------------------------------------------
# the rules

_Linear: TypeAlias = Callable[[Tensor], Tensor]

_EPSILON = 1e-20


class _Shared(Function):
    """A linear layer, whose signal goes to the inputs by what each adds to the output.

    `positive` is the layer without a bias and without its negative weights, in float32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Linear, positive: _Linear, keep: bool) -> Tensor:
        ctx.positive = positive
        # Autograd itself keeps the inputs of some layers only: the others may be overwritten later.
        ctx.save_for_backward(x.clone() if keep else x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(signal.device.type, enabled=False):
            x = full_precision(saved).detach().requires_grad_()
            output = ctx.positive(x)
            share = signal / (output.detach() + _EPSILON)
            (back,) = torch.autograd.grad(output, x, share)
        # Autograd casts to the input's dtype.
        return x.detach() * back, None, None, None


class _Passed(Function):
    """A function of which the signal takes no notice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: _Linear) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
        return signal, None


class _Sum(Function):
    """x + alpha·y, whose signal goes to both by what each adds; written into x if so asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: float, inplace: bool) -> Tensor:
        first, second = full_precision(x), full_precision(y) * alpha
        total = first + second
        # The shares and not the terms, which may be overwritten later, as autograd expects neither.
        ctx.save_for_backward(*(torch.where(total != 0, t / total, 0.0) for t in (first, second)))
        if inplace:
            ctx.mark_dirty(x)
            return x.add_(y, alpha=alpha)
        return torch.add(x, y, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor, None, None]:
        first, second = (share * signal for share in ctx.saved_tensors)
        return first, second, None, None


def _weighted(
    function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, rest = given.pop("input"), given.pop("weight"), args[3:]
    bias = given.pop("bias", None)

    def layer(x: Tensor) -> Tensor:
        return function(x, weight, bias, *rest, **given)

    def positive(x: Tensor) -> Tensor:
        return function(x, weight.detach().clamp_min(0).to(x.dtype), None, *rest, **given)

    return _Shared.apply(x, layer, positive, False)


def _averaged(
    function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    x, layer = _unary(function, args, kwargs)
    return _Shared.apply(x, layer, layer, True)


def _passed(function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _Passed.apply(*_unary(function, args, kwargs))


def _unary(
    function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, _Linear]:
    """Return the first argument, and the function of it that the others make."""
    others = dict(kwargs)
    x, *rest = args or [others.pop("input")]
    return x, lambda x: function(x, *rest, **others)


def _added(function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = {**dict(zip(("input", "other"), args, strict=False)), **kwargs}
    x, y = given["input"], given["other"]
    if not all(isinstance(term, Tensor) and term.requires_grad for term in (x, y)):
        return function(*args, **kwargs)
    return _Sum.apply(x, y, given.get("alpha", 1), function is Tensor.add_)


_Rule: TypeAlias = Callable[[Callable[..., Tensor], Sequence[Any], Mapping[str, Any]], Any]


def _rules() -> Iterable[tuple[Callable[..., Any], _Rule]]:
    for n in (1, 2, 3):
        yield getattr(F, f"conv{n}d"), _weighted
        yield getattr(F, f"conv_transpose{n}d"), _weighted
        yield getattr(F, f"avg_pool{n}d"), _averaged
        yield getattr(F, f"adaptive_avg_pool{n}d"), _averaged
    yield F.linear, _weighted
    for mean in (torch.mean, Tensor.mean):
        yield mean, _averaged
    for norm in (F.batch_norm, torch.batch_norm):
        yield norm, _passed
    for add in (torch.add, Tensor.add, Tensor.add_):  # operators are among them
        yield add, _added


_RULE_OF: dict[Callable[..., Any], _Rule] = dict(_rules())


class _Rules(TorchFunctionMode):
    """Replaces the derivatives of all functions that have a rule, for the forward in its block."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = _RULE_OF.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(func, args, kwargs or {})
