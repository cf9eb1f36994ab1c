"""An activation stage of your own: GradCAM with only the channels that speak for the class."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_aop import AOP, RankedMask
from lightning_aop.methods import GradientWeightedMap


@dataclass(frozen=True)
class PositiveGradCAM(GradientWeightedMap):
    """w_k = ReLU(mean(g_k))."""

    def weights(
        self, activations: Float[Tensor, "b k i j"], gradients: Float[Tensor, "b k i j"]
    ) -> Float[Tensor, "b k 1 1"]:
        """Return the mean gradient of each channel, or 0 where it is negative."""
        return gradients.mean(dim=(2, 3), keepdim=True).relu()


method = AOP(PositiveGradCAM(), RankedMask(), threshold=0.0, scale=1.0, stretch=False)
