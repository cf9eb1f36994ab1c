"""The methods that the command line knows by name."""

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from lightning_aop.aop import AOP, Blank, fast_sigcam, sigcam
from lightning_aop.cam import GradCAM, GradCAMPlusPlus, WGradCAM
from lightning_aop.perturbation import IGOS
from lightning_aop.scores import Score
from lightning_aop.types import SaliencyMethod

MethodName: TypeAlias = Literal["sigcam", "fast_sigcam", "gradcam", "gradcam++", "wgradcam", "igos"]

METHODS: dict[str, Callable[[str | None, Score], SaliencyMethod]] = {
    "sigcam": lambda layer, score: sigcam(layer, score=score),
    "fast_sigcam": lambda layer, score: fast_sigcam(layer, score=score),
    "gradcam": lambda layer, score: GradCAM(layer),
    "gradcam++": lambda layer, score: GradCAMPlusPlus(layer),
    "wgradcam": lambda layer, score: WGradCAM(layer),
    "igos": lambda layer, score: AOP(Blank(), IGOS(score=score)),
}
"""Each is made of the target layer (None for the last) and the score F_c."""

assert set(get_args(MethodName)) == set(METHODS)
