"""The shapes that all modules share, and the two protocols that a method fulfils."""

from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = [
    "ActivationMethod",
    "CoarseMaps",
    "Images",
    "Maps",
    "Perturbation",
    "SaliencyMethod",
    "Targets",
]

Images: TypeAlias = Float[Tensor, "b c h w"]
"""A batch as the model takes it: normalised the way the model was trained."""

Maps: TypeAlias = Float[Tensor, "b h w"]
"""Saliency in [0, 1] at the images' size, 1 = most salient."""

CoarseMaps: TypeAlias = Float[Tensor, "b i j"]
"""Saliency in [0, 1] at any resolution: a layer's, or a mask's."""

Targets: TypeAlias = Int[Tensor, " b"]
"""The class that is explained, one per image. An image with several classes appears once for each."""


@runtime_checkable
class SaliencyMethod(Protocol):
    """Anything that says where the evidence for a class lies."""

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return one map in [0, 1] for each (image, class) pair, at the images' size."""
        ...


@runtime_checkable
class ActivationMethod(SaliencyMethod, Protocol):
    """A saliency method whose map has a resolution of its own, which a second stage can start from."""

    def activation_map(self, model: nn.Module, images: Images, targets: Targets) -> CoarseMaps:
        """Return one map in [0, 1] for each pair, at the resolution of the layer."""
        ...


@runtime_checkable
class Perturbation(Protocol):
    """Anything that refines a starting map by perturbing the image and watching the score."""

    def refine(self, model: nn.Module, images: Images, targets: Targets, start: CoarseMaps) -> Maps:
        """Return the refined saliency in [0, 1] at the images' size."""
        ...
