"""Class activation maps: a weighted sum of a layer's feature maps, M = ReLU(Σ_k w_k A_k).

The methods differ in one formula, the weight w_k of a channel (of each of its cells, in HiResCAM and
LayerCAM), computed from the activations A and the gradients g = ∂z_c/∂A of the class logit. Each map
is min-max normalised at the layer's own resolution (paper, Eq. 3 and 4); one without any positive
evidence stays zero.

Cost: one forward and one backward pass per image (2 evaluations; CAM has no backward), the backward only
down to the layer; plus one evaluation of five images where the layer has to be detected, in a model or
at a size of images not seen before.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite
from lightning_aop.model.adapter import Classifier, explaining, name_of
from lightning_aop.model.layers import (
    Capture,
    Reshape,
    TargetLayerError,
    capture,
    find_feature_map,
    named_layer,
)
from lightning_aop.ops import min_max, resize
from lightning_aop.scores import Score, logit
from lightning_aop.types import CoarseMaps, Images, Maps, Targets

__all__ = [
    "CAM",
    "ActivationMap",
    "GradCAM",
    "GradCAMPlusPlus",
    "GradientWeightedMap",
    "HiResCAM",
    "LayerCAM",
    "WGradCAM",
    "XGradCAM",
]


@dataclass(frozen=True)
class ActivationMap(ABC):
    """What the activation maps share: everything but the formula.

    A method that needs more than the layer's activations and gradients derives from this class and
    gives `_evidence`; for others there is `GradientWeightedMap`.

    Attributes:
        target_layer: the layer whose feature map is looked at: a name as in `model.named_modules()`,
            a module, or None for the last feature map before the classifier.
        eval_batch_size: the number of images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
        reshape: a function that turns the layer's output into feature maps [B, C, h, w]. Without it,
            maps with the channels last (Swin) and tokens (vision transformers; class and register
            tokens first) are known by the images' proportions.
    """

    target_layer: str | nn.Module | None = None
    eval_batch_size: int | None = None
    reshape: Reshape | None = None

    def __post_init__(self) -> None:
        require_counts(type(self).__name__, eval_batch_size=self.eval_batch_size)

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 2

    @abstractmethod
    def _evidence(
        self, classifier: Classifier, captured: Capture, images: Images, targets: Targets
    ) -> tuple[Float[Tensor, "b i j"], Float[Tensor, " b"]]:
        """Return Σ_k w_k A_k, and the logit."""

    @final
    def activation_map(self, model: nn.Module, images: Images, targets: Targets) -> CoarseMaps:
        """Return the maps [B, h, w] in [0, 1] at the layer's resolution."""
        with explaining(model, images, targets) as (classifier, x, t):
            layer, reshape = self.target_layer, self.reshape
            if layer is None:
                found = find_feature_map(classifier.model, x)
                layer, reshape = found.layer, reshape or found.reshape
            name, _ = named_layer(classifier.model, layer)
            maps, logits = [], []
            size = (x.shape[2], x.shape[3])
            with capture(classifier.model, name, size, reshape) as captured:
                at_once = classifier.pass_size(self.eval_batch_size, len(x), x)
                passes = (each.split(at_once) for each in (x, t))
                for part, classes in zip(*passes, strict=True):
                    evidence, scores = self._evidence(classifier, captured, part, classes)
                    maps.append(evidence.relu())
                    logits.append(scores.detach())
            require_finite(torch.cat(logits), t, "the logit")
            height, width = maps[0].shape[1:]
            if height * width == 1 or (self.target_layer is None and max(height, width) <= 2):
                warnings.warn(
                    f"the feature map of '{name}' is {height} x {width} for images of {size[0]} x "
                    f"{size[1]}, which hardly says where: use larger images, or name an earlier "
                    "layer as target_layer",
                    stacklevel=2,
                )
            return min_max(torch.cat(maps))

    @final
    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return the maps [B, H, W] in [0, 1], upsampled bilinearly to the images' size."""
        height, width = images.shape[-2:]
        return resize(self.activation_map(model, images, targets), (height, width))


@dataclass(frozen=True)
class GradientWeightedMap(ActivationMap):
    """The maps whose weights come from gradients: derive from it and give `weights`.

    This class finds the layer, sets and removes the hooks and modes, splits the batch into chunks, and
    normalises and upsamples the map.

    Attributes:
        score: what takes the place of the class logit z_c, such as `scores.contrast()`.
    """

    score: Score = logit

    @abstractmethod
    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k #i #j"]:
        """Return w_k, one number for each channel [B, K, 1, 1] or for each of its cells [B, K, h, w].

        Both arguments are the layer's [B, K, h, w], in float32 or wider.
        """

    @final
    def _evidence(
        self, classifier: Classifier, captured: Capture, images: Images, targets: Targets
    ) -> tuple[Float[Tensor, "b i j"], Float[Tensor, " b"]]:
        scores = classifier.scores(images, targets, self.score)
        a, g = captured.activation_and_gradient(scores)
        # Not einsum, which autocast would compute in half precision.
        return (self.weights(a, classifier.lowered(g)) * a).sum(dim=1), scores


@dataclass(frozen=True)
class CAM(ActivationMap):
    """w_k = the classifier's weight of channel k (Zhou et al. 2016), without a backward.

    For networks of feature maps, global average pooling and one linear layer, such as ResNets; there
    GradCAM is the same up to a factor, which the min-max drops. Whether a network is one of them is
    not taken on trust: the mean of Σ_k w_k A_k plus the bias must be the logit.

    Raises:
        TargetLayerError: the network does more than pool and weigh after the layer.
    """

    _TOLERANCE: ClassVar[float] = 1e-2  # of the logit's own size; half precision needs as much

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return 1

    def _evidence(
        self, classifier: Classifier, captured: Capture, images: Images, targets: Targets
    ) -> tuple[Float[Tensor, "b i j"], Float[Tensor, " b"]]:
        with torch.no_grad():
            logits = classifier.logits(images)
        scores = logit(logits, targets)
        a = captured.activation(len(images))
        linear = [m for m in classifier.model.modules() if isinstance(m, nn.Linear)]
        fits = [
            m for m in linear if (m.out_features, m.in_features) == (logits.shape[1], a.shape[1])
        ]
        for head in fits:
            weights = head.weight.detach().to(a.dtype)[targets]
            evidence = (weights[:, :, None, None] * a).sum(dim=1)
            bias = 0.0 if head.bias is None else head.bias.detach().to(a.dtype)[targets]
            allowed = self._TOLERANCE * (evidence.abs().mean(dim=(1, 2)) + scores.abs())
            if ((evidence.mean(dim=(1, 2)) + bias - scores).abs() <= allowed).all():
                return evidence, scores
        raise TargetLayerError(
            f"CAM needs global average pooling and one linear layer after '{captured.name}', and "
            f"{name_of(classifier.model)} does something else there: use GradCAM, which is the "
            "same where CAM applies"
        )


@dataclass(frozen=True)
class GradCAM(GradientWeightedMap):
    """w_k = mean(g_k) (Selvaraju et al. 2017; paper, Eq. 1)."""

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k 1 1"]:
        """Return the mean gradient of each channel."""
        return gradients.mean(dim=(2, 3), keepdim=True)


@dataclass(frozen=True)
class WGradCAM(GradientWeightedMap):
    """w_k = mean(g_k · A_k): the feature map weighs its own gradient (paper, Eq. 2)."""

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k 1 1"]:
        """Return the mean gradient × activation of each channel."""
        return (gradients * activations).mean(dim=(2, 3), keepdim=True)


@dataclass(frozen=True)
class GradCAMPlusPlus(GradientWeightedMap):
    """w_k = Σ ReLU(g) · g² / (2g² + (ΣA) · g³) (Chattopadhyay et al. 2018).

    The closed form for a score that is the exponential of the logit, whose own positive factor
    drops out in the min-max.
    """

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k 1 1"]:
        """Return the weighted sum of the positive gradients of each channel."""
        total = activations.sum(dim=(2, 3), keepdim=True)
        # g² / (2g² + ΣA g³) = 1 / (2 + ΣA g), without the underflow of g³ where gradients are small.
        denominator = 2 + total * gradients
        alpha = torch.where(denominator != 0, 1 / denominator, 0.0)
        return (alpha * gradients.relu()).sum(dim=(2, 3), keepdim=True)


@dataclass(frozen=True)
class XGradCAM(GradientWeightedMap):
    """w_k = Σ(g_k · A_k) / ΣA_k: the gradient's mean, weighted by the activation (Fu et al. 2020).

    A channel whose activations sum to zero weighs nothing.
    """

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k 1 1"]:
        """Return the activation-weighted mean gradient of each channel."""
        total = activations.sum(dim=(2, 3), keepdim=True)
        weighted = (gradients * activations).sum(dim=(2, 3), keepdim=True)
        return torch.where(total != 0, weighted / total, 0.0)


@dataclass(frozen=True)
class HiResCAM(GradientWeightedMap):
    """w = g, cell by cell (Draelos and Carin 2020): the map's sum is what the linearised head adds."""

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k i j"]:
        """Return the gradients."""
        return gradients


@dataclass(frozen=True)
class LayerCAM(GradientWeightedMap):
    """w = ReLU(g), cell by cell (Jiang et al. 2021); also of use at earlier, finer layers."""

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k i j"]:
        """Return the positive gradients."""
        return gradients.relu()
