"""Class activation maps: a weighted sum of a layer's feature maps, M = ReLU(Σ_k w_k A_k).

The methods differ in one formula, the weight w_k of a channel, computed from the activations A and
the gradients g = ∂z_c/∂A of the class logit. Each map is min-max normalised at the layer's own
resolution (paper, Eq. 3 and 4); one without any positive evidence stays zero.

Cost: one forward and one backward an image (2 evaluations), the backward only down to the layer;
plus one evaluation of one image where the layer has to be found in a model not seen before.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_aop.checks import require_finite, require_positive
from lightning_aop.ops import min_max, resize
from lightning_aop.probing import capture, explaining, find_target_layer
from lightning_aop.scores import logit
from lightning_aop.types import CoarseMaps, Images, Maps, Targets


@dataclass(frozen=True)
class _ClassActivationMap(ABC):
    """What the activation maps share: everything but the weights.

    Attributes:
        target_layer: the layer whose feature map is looked at: a name as in `model.named_modules()`,
            a module, or None for the last feature map before the classifier.
        eval_batch_size: the number of images in one pass of the model, which bounds the memory.
    """

    target_layer: str | nn.Module | None = None
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        require_positive(type(self).__name__, eval_batch_size=self.eval_batch_size)

    @abstractmethod
    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k"]:
        """Return w_k of each channel."""

    @final
    def activation_map(self, model: nn.Module, images: Images, targets: Targets) -> CoarseMaps:
        """Return the maps [B, h, w] in [0, 1] at the layer's resolution."""
        with explaining(model, images, targets) as (classifier, x, t):
            layer = self.target_layer
            if layer is None:
                layer = find_target_layer(classifier.model, x)
            maps, logits = [], []
            with capture(classifier.model, layer) as captured:
                for part, classes in zip(
                    x.split(self.eval_batch_size), t.split(self.eval_batch_size), strict=True
                ):
                    scores = classifier.scores(part, classes, logit)
                    a, g = captured.activation_and_gradient(scores)
                    # Not einsum, which autocast would compute in half precision.
                    maps.append((self.weights(a, g)[:, :, None, None] * a).sum(dim=1).relu())
                    logits.append(scores.detach())
            require_finite(torch.cat(logits), t, "the logit")
            return min_max(torch.cat(maps))

    @final
    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return the maps [B, H, W] in [0, 1], enlarged bilinearly to the images' size."""
        height, width = images.shape[-2:]
        return resize(self.activation_map(model, images, targets), (height, width))


@dataclass(frozen=True)
class GradCAM(_ClassActivationMap):
    """w_k = mean(g_k) (Selvaraju et al. 2017; paper, Eq. 1)."""

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k"]:
        """Return the mean gradient of each channel."""
        return gradients.mean(dim=(2, 3))


@dataclass(frozen=True)
class WGradCAM(_ClassActivationMap):
    """w_k = mean(g_k · A_k): the feature map weighs its own gradient (paper, Eq. 2)."""

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k"]:
        """Return the mean gradient × activation of each channel."""
        return (gradients * activations).mean(dim=(2, 3))


@dataclass(frozen=True)
class GradCAMPlusPlus(_ClassActivationMap):
    """w_k = Σ ReLU(g) · g² / (2g² + (ΣA) · g³) (Chattopadhyay et al. 2018).

    The closed form for a score that is the exponential of the logit, whose own positive factor
    drops out in the min-max.
    """

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k"]:
        """Return the weighted sum of the positive gradients of each channel."""
        total = activations.sum(dim=(2, 3), keepdim=True)
        # g² / (2g² + ΣA g³) = 1 / (2 + ΣA g), without the underflow of g³ where gradients are small.
        denominator = 2 + total * gradients
        alpha = torch.where(denominator != 0, 1 / denominator, 0.0)
        return (alpha * gradients.relu()).sum(dim=(2, 3))
