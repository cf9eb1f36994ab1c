"""The methods that the command line knows by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias, get_args

from lightning_aop.errors import InvalidValueError, did_you_mean
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
from lightning_aop.methods.greedy_ranking import GreedyRanking
from lightning_aop.methods.igos import IGOS
from lightning_aop.methods.regional_multiscale import RegionalMultiscale
from lightning_aop.methods.rise import RISE
from lightning_aop.methods.xrai import XRAI
from lightning_aop.scores import Score, sigmoid, softmax
from lightning_aop.types import ActivationMethod, SaliencyMethod

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
    "regional_multiscale",
    "rise",
    "greedy_ranking",
    "random",
    "centre",
    "edges",
]


class Row(NamedTuple):
    """A method that has a name: its cost, and how it is made.

    Attributes:
        evaluations: of the model, for one image; a forward with its backward counts as two.
        build: makes the method for a target layer (None for the last) and a class score.
    """

    evaluations: str
    build: Callable[[str | None, Score], SaliencyMethod]


METHODS: dict[str, Row] = {
    "sigcam": Row("about 720", lambda layer, score: sigcam(layer, score=score)),
    "fast_sigcam": Row("39", lambda layer, score: fast_sigcam(layer, score=score)),
    "gradcam+igos": Row("about 720", lambda layer, score: AOP(GradCAM(layer), IGOS(score=score))),
    "gradcam+emp": Row("1,002", lambda layer, score: AOP(GradCAM(layer), EMP(score=score))),
    "igos": Row("about 720", lambda layer, score: AOP(Blank(), IGOS(score=score))),
    "emp": Row("1,000", lambda layer, score: AOP(Blank(), EMP(score=score))),
    "cam": Row("1", lambda layer, score: CAM(layer)),
    "gradcam": Row("2", lambda layer, score: GradCAM(layer)),
    "wgradcam": Row("2", lambda layer, score: WGradCAM(layer)),
    "gradcam++": Row("2", lambda layer, score: GradCAMPlusPlus(layer)),
    "xgradcam": Row("2", lambda layer, score: XGradCAM(layer)),
    "hirescam": Row("2", lambda layer, score: HiResCAM(layer)),
    "layercam": Row("2", lambda layer, score: LayerCAM(layer)),
    "excitation_backprop": Row("2", lambda layer, score: ExcitationBackprop(layer)),
    "gradient": Row("2", lambda layer, score: attribution.gradient()),
    "input_x_gradient": Row("2", lambda layer, score: attribution.input_x_gradient()),
    "integrated_gradients": Row("100", lambda layer, score: attribution.integrated_gradients()),
    "smoothgrad": Row("100", lambda layer, score: attribution.smoothgrad()),
    "vargrad": Row("100", lambda layer, score: attribution.vargrad()),
    "guided_backprop": Row("2", lambda layer, score: attribution.guided_backprop()),
    "deeplift": Row("4", lambda layer, score: attribution.deeplift()),
    "lime": Row("1,000", lambda layer, score: attribution.lime(score=score)),
    "xrai": Row("398", lambda layer, score: XRAI(score=score)),
    "fast_xrai": Row("398", lambda layer, score: XRAI(score=score, fast=True)),
    "regional_multiscale": Row("about 3,400", lambda layer, score: RegionalMultiscale(score=score)),
    "rise": Row("4,000", lambda layer, score: RISE(score=score)),
    "greedy_ranking": Row("2,448", lambda layer, score: GreedyRanking(score=score)),
    "random": Row("0", lambda layer, score: RandomMap()),
    "centre": Row("0", lambda layer, score: CentreGaussian()),
    "edges": Row("0", lambda layer, score: EdgeDetector()),
}
"""The one table of names. A new one is a row here, and a word in `MethodName`."""

assert set(get_args(MethodName)) == set(METHODS)


def make_method(
    name: str, target_layer: str | None = None, score: Score = softmax, option: str = "method"
) -> SaliencyMethod:
    """Return the method of a name.

    Args:
        name: one of `METHODS`.
        target_layer: of the methods that take one; None for the last feature map.
        score: of the methods that take one.
        option: where the name comes from, for the message.

    Raises:
        InvalidValueError: there is no such method.
    """
    if name not in METHODS:
        raise InvalidValueError(
            f"{option} {name}: there is no such method{did_you_mean(name, METHODS)}; there are "
            f"{', '.join(METHODS)}"
        )
    return METHODS[name].build(target_layer, score)


def coco_method(name: str) -> SaliencyMethod:
    """Return a method with the paper's settings for COCO: a sigmoid score, θ = 0.6 and λ = 0.25.

    θ and λ take the place of those for ImageNet, AOP's defaults, wherever an activation map starts the
    perturbation. A method with a θ and λ of its own, such as `fast_sigcam`, keeps them.
    """
    method = make_method(name, score=sigmoid)
    if (
        isinstance(method, AOP)
        and isinstance(method.activation, ActivationMethod)
        and (method.threshold, method.scale) == (AOP.threshold, AOP.scale)
    ):
        return replace(method, threshold=0.6, scale=0.25)
    return method


def method_list() -> str:
    """Return the names with their costs, for the help of a command."""
    names = ", ".join(f"{name} ({row.evaluations})" for name, row in METHODS.items())
    return f"{names}; in brackets the model evaluations per image"


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
