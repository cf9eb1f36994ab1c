"""The sanity check of Adebayo et al. (2018): do the maps change with the weights?"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_aop.checks import check_batch
from lightning_aop.errors import InvalidValueError
from lightning_aop.metrics.similarity import rank_correlation, require_room, ssim
from lightning_aop.model.adapter import explaining, name_of
from lightning_aop.model.isolation import holding, undisturbed, unwrap
from lightning_aop.scores import full_precision
from lightning_aop.types import Images, Maps, SaliencyMethod, Targets

__all__ = ["RandomizedLayer", "parameter_randomization"]

Mode: TypeAlias = Literal["cascading", "independent"]
"""Whether a layer joins those randomised before it, or is the only one."""


@dataclass(frozen=True)
class RandomizedLayer:
    """What became of the maps when a layer was randomised.

    Attributes:
        layer: the layer's name: the last one randomised (cascading), or the only one (independent).
        rank_correlation: Spearman's, in [-1, 1], with the original map; on the CPU.
        ssim: the structural similarity in [-1, 1] to the original map; on the CPU.
        maps: the maps of the randomised network, on the images' device.
        original: the maps of the network as it is, the same tensor in every step.
    """

    layer: str
    rank_correlation: Float[Tensor, " b"]
    ssim: Float[Tensor, " b"]
    maps: Maps
    original: Maps


def parameter_randomization(
    model: nn.Module,
    images: Images,
    targets: Targets,
    method: SaliencyMethod,
    *,
    mode: Mode = "cascading",
    layers: Sequence[str] | None = None,
    seed: int = 0,
    skip: Collection[str] = (),
) -> Iterator[RandomizedLayer]:
    """Give layers random weights, and compare the maps with those of the network as it is.

    One step for each layer of `weighted_layers`, from the output to the input: "cascading" keeps the
    layers before it randomised, "independent" puts them back. The similarities of a method that explains
    the network fall with the first steps; those of one that ignores it stay at 1.

    Weights and biases are drawn as the layer's own `reset_parameters` does it, where a layer has
    none from a normal distribution with the mean 0 and the standard deviation that the trained
    weights have. Each layer is drawn from `seed` and its own name, on the CPU in float32 or wider:
    the same weights in both modes, whatever the other layers, on every device.

    BatchNorm and all other normalisation layers stay as they are, since activations would explode
    without what they have learnt. So do vectors and single numbers (gains, class tokens, layer
    scales) of modules without `reset_parameters`.

    The model itself holds its own weights whenever a step is handed out, also if the rest is never
    asked for: random ones take their place only while the method runs, and nothing is written to
    the parameters. (A deep copy can do less: a LightningModule that keeps a loss or any other
    tensor with a graph can't be copied, and a target layer given as a module would be missing from
    it.) It must not be trained between the steps.

    Cost: (layers + 1) × the method's own, and one evaluation of one image to detect the layers.
    Memory: a copy of the randomised weights, in the end of all of them.

    Args:
        model: the classifier, wrapped or compiled or not.
        images: the batch to explain, of 11 × 11 pixels or more.
        targets: the class to explain in each image, the same all along.
        method: what is put to the test.
        mode: "cascading" or "independent".
        layers: only these, in this order; each must be one of `weighted_layers`.
        seed: one seed gives one result.
        skip: of these no step is wanted, as they are known from a run that was stopped.

    Returns:
        An iterator that does one step at a time, so that its caller can show the progress, keep what
        there is, and stop.

    Raises:
        ValueError: at once, if a setting or a layer is unknown or the images are too small.
    """
    if mode not in get_args(Mode):
        raise InvalidValueError(
            f"parameter_randomization: mode must be 'cascading' or 'independent', got {mode!r}"
        )
    check_batch(images, targets)
    require_room((images.shape[2], images.shape[3]))
    known = _owned_weights(model, images)
    chosen = list(known) if layers is None else list(layers)
    for name in chosen:
        if name not in known:
            raise InvalidValueError(
                f"parameter_randomization: layers names '{name}', which is no layer of "
                f"{name_of(unwrap(model))} whose weights are randomised; those are "
                f"{', '.join(known) or 'none'}"
            )
    if len(set(chosen)) < len(chosen):
        raise InvalidValueError(
            f"parameter_randomization: layers names a layer twice, got {chosen}"
        )

    def steps() -> Iterator[RandomizedLayer]:
        if set(chosen) <= set(skip):
            return
        network = unwrap(model)
        original = method.explain(network, images, targets).detach().to(images.device)
        drawn: dict[nn.Parameter, nn.Parameter] = {}
        for name in chosen:
            fresh = _draw(network.get_submodule(name), known[name], _layer_seed(seed, name))
            drawn = {**drawn, **fresh} if mode == "cascading" else fresh
            if name in skip:
                continue
            with holding(network, drawn):
                maps = method.explain(network, images, targets).detach().to(images.device)
            yield RandomizedLayer(
                name,
                rank_correlation(original, maps).cpu(),
                ssim(original, maps).cpu(),
                maps,
                original,
            )

    return steps()


def weighted_layers(model: nn.Module, images: Images) -> list[str]:
    """Return the names of the layers that can be randomised, from the output to the input.

    Those are the modules that own a weight of two or more dimensions (convolution, linear,
    attention, embedding), normalisation excepted, and that one forward of the first image makes use
    of, in the order of their last use. A weight that several layers share belongs to one of them.
    Scripted submodules (torch.jit) are not seen. The name of the model itself is "".

    Cost: one evaluation of one image.
    """
    return list(_owned_weights(model, images))


_NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _owned_weights(model: nn.Module, images: Images) -> dict[str, list[nn.Parameter]]:
    """Return the parameters to draw for each layer, from the output to the input."""
    network = unwrap(model)
    anything = torch.zeros(1, dtype=torch.long)
    uses = _LastUses()
    with explaining(network, images[:1], anything) as (classifier, x, _), torch.no_grad(), uses:
        classifier.logits(x)
    # A weight that other layers share has the time of the last of them, so the earliest one counts.
    used = {
        name: min(times)
        for name, module in network.named_modules()
        if (times := [uses.times[p] for p in _weights(module) if p in uses.times])
    }
    # Turned round and not sorted in reverse: of two layers with one weight, the later name is kept.
    names = sorted(used, key=used.__getitem__)[::-1]
    owned: dict[str, list[nn.Parameter]] = {}
    taken: set[nn.Parameter] = set()
    for name in names:
        module = network.get_submodule(name)
        if any(p not in taken for p in _weights(module)):
            owned[name] = [p for p in _own(module) if p not in taken]
            taken.update(owned[name])
    return owned


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None and p.is_floating_point()]


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that make a module a layer with weights."""
    if isinstance(module, _NORMALISATION):
        return []
    if _initialisation(module) is None:
        return [p for p in _own(module) if _is_matrix(p)]
    return [p for p in _own(module) if p.ndim >= 2]


def _is_matrix(parameter: Tensor) -> bool:
    """Return whether it is weights, not a class token [1, 1, C] or a layer's scale [C, 1, 1]."""
    return sum(length > 1 for length in parameter.shape) >= 2


def _initialisation(module: nn.Module) -> Callable[[], object] | None:
    # The one with an underscore is that of torch's attention.
    for name in ("reset_parameters", "_reset_parameters"):
        function: Callable[[], object] | None = getattr(module, name, None)
        if callable(function):
            return function
    return None


class _LastUses(TorchFunctionMode):
    """The time at which each parameter was last given to a function of torch.

    Not by hooks: attention never calls the projection that it owns, only uses its weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[nn.Parameter, int] = {}
        self._clock = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors([result])):  # what asks for a shape or a dtype is no use
            for tensor in _tensors([*args, *(kwargs or {}).values()]):
                if isinstance(tensor, nn.Parameter):
                    self._clock += 1
                    self.times[tensor] = self._clock
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _layer_seed(seed: int, name: str) -> int:
    """Return a seed for the layer that is the same in every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _draw(
    module: nn.Module, owned: Sequence[nn.Parameter], seed: int
) -> dict[nn.Parameter, nn.Parameter]:
    """Return a new parameter in place of each of those that `module` owns, which it leaves alone."""
    initialise = _initialisation(module)
    names = {p: name for name, p in module._parameters.items() if p is not None}
    requires_grad = {p: p.requires_grad for p in owned}
    drawn = {}
    with undisturbed(module, seed), torch.no_grad():
        before = {p: full_precision(p.detach()).cpu() for p in owned}
        after: dict[nn.Parameter, Tensor] = dict(before)
        if initialise is not None:
            with holding(module, _spare(module)):
                initialise()
                after = {p: getattr(module, names[p]).detach().cpu() for p in owned}
        for p in owned:
            value = after[p]
            # There is no initialisation, or it writes to what is computed of the weight (weight_norm).
            if _is_matrix(p) and torch.equal(value, before[p]):
                value = torch.randn(p.shape, dtype=value.dtype) * value.std(correction=0)
            drawn[p] = nn.Parameter(torch.empty_like(p).copy_(value), requires_grad[p])
    return drawn


def _spare(module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Return copies to write to, on the CPU and in float32 or wider, for all of a module.

    Of the submodules, too, since an initialisation may go on to theirs; and of tensors that are plain
    attributes (weight_norm's weight), which `undisturbed` puts back.
    """
    for each in module.modules():
        for name, value in list(vars(each).items()):
            if isinstance(value, Tensor):
                vars(each)[name] = value.detach().clone()
    return {
        p: nn.Parameter(
            (full_precision(p.detach()) if p.is_floating_point() else p.detach()).to(
                "cpu", copy=True
            ),
            requires_grad=False,
        )
        for p in module.parameters()
    }
