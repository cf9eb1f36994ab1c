"""The methods that the command line knows by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from lightning_aop.methods import captum as attribution
from lightning_aop.methods.aop import AOP, Blank, fast_sigcam, sigcam
from lightning_aop.methods.cam import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    WGradCAM,
    XGradCAM,
)
from lightning_aop.methods.controls import CentreGaussian, EdgeDetector, RandomMap
from lightning_aop.methods.emp import EMP
from lightning_aop.methods.excitation import ExcitationBackprop
from lightning_aop.methods.igos import IGOS
from lightning_aop.methods.rise import RISE
from lightning_aop.methods.xrai import XRAI
from lightning_aop.scores import Score, sigmoid
from lightning_aop.types import SaliencyMethod

MethodName: TypeAlias = Literal[
    "sigcam",
    "fast_sigcam",
    "gradcam+igos",
    "gradcam+emp",
    "igos",
    "emp",
    "cam",
    "gradcam",
    "wgradcam",
    "gradcam++",
    "xgradcam",
    "hirescam",
    "layercam",
    "excitation_backprop",
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smoothgrad",
    "vargrad",
    "guided_backprop",
    "deeplift",
    "lime",
    "xrai",
    "fast_xrai",
    "rise",
    "random",
    "centre",
    "edges",
]

METHODS: dict[str, Callable[[str | None, Score], SaliencyMethod]] = {
    "sigcam": lambda layer, score: sigcam(layer, score=score),
    "fast_sigcam": lambda layer, score: fast_sigcam(layer, score=score),
    "gradcam+igos": lambda layer, score: AOP(GradCAM(layer), IGOS(score=score)),
    "gradcam+emp": lambda layer, score: AOP(GradCAM(layer), EMP(score=score)),
    "igos": lambda layer, score: AOP(Blank(), IGOS(score=score)),
    "emp": lambda layer, score: AOP(Blank(), EMP(score=score)),
    "cam": lambda layer, score: CAM(layer),
    "gradcam": lambda layer, score: GradCAM(layer),
    "wgradcam": lambda layer, score: WGradCAM(layer),
    "gradcam++": lambda layer, score: GradCAMPlusPlus(layer),
    "xgradcam": lambda layer, score: XGradCAM(layer),
    "hirescam": lambda layer, score: HiResCAM(layer),
    "layercam": lambda layer, score: LayerCAM(layer),
    "excitation_backprop": lambda layer, score: ExcitationBackprop(layer),
    "gradient": lambda layer, score: attribution.gradient(),
    "input_x_gradient": lambda layer, score: attribution.input_x_gradient(),
    "integrated_gradients": lambda layer, score: attribution.integrated_gradients(),
    "smoothgrad": lambda layer, score: attribution.smoothgrad(),
    "vargrad": lambda layer, score: attribution.vargrad(),
    "guided_backprop": lambda layer, score: attribution.guided_backprop(),
    "deeplift": lambda layer, score: attribution.deeplift(),
    "lime": lambda layer, score: attribution.lime(score=score),
    "xrai": lambda layer, score: XRAI(score=score),
    "fast_xrai": lambda layer, score: XRAI(score=score, fast=True),
    "rise": lambda layer, score: RISE(score=score),
    "random": lambda layer, score: RandomMap(),
    "centre": lambda layer, score: CentreGaussian(),
    "edges": lambda layer, score: EdgeDetector(),
}
"""Each is made of the target layer (None for the last) and the score F_c."""

assert set(get_args(MethodName)) == set(METHODS)


def coco_method(name: MethodName) -> SaliencyMethod:
    """Return a method with the paper's settings for COCO: θ = 0.6, λ = 0.25, a sigmoid score."""
    method = METHODS[name](None, sigmoid)
    if name in ("sigcam", "gradcam+igos", "gradcam+emp"):
        assert isinstance(method, AOP)
        return replace(method, threshold=0.6, scale=0.25)
    return method


FIGURE_5: tuple[MethodName, ...] = (
    "guided_backprop",
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smoothgrad",
    "gradcam",
    "gradcam++",
    "xrai",
    "igos",
    "sigcam",
)
"""The columns of the paper's Figure 5."""
