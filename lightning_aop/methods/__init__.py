"""The saliency methods: one file each, and `names`, the table by which the command line knows them."""

from lightning_aop.methods.aop import AOP, Blank, fast_sigcam, sigcam
from lightning_aop.methods.cam import (
    CAM,
    ActivationMap,
    GradCAM,
    GradCAMPlusPlus,
    GradientWeightedMap,
    HiResCAM,
    LayerCAM,
    WGradCAM,
    XGradCAM,
)
from lightning_aop.methods.captum import (
    CaptumAttribution,
    deeplift,
    gradient,
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
    lime,
    smoothgrad,
    vargrad,
)
from lightning_aop.methods.controls import CentreGaussian, EdgeDetector, RandomMap
from lightning_aop.methods.emp import EMP
from lightning_aop.methods.excitation import ExcitationBackprop
from lightning_aop.methods.greedy_ranking import GreedyRanking
from lightning_aop.methods.igos import IGOS, ArmijoSearch
from lightning_aop.methods.ranked_mask import RankedMask
from lightning_aop.methods.regional_multiscale import RegionalMultiscale
from lightning_aop.methods.rise import RISE
from lightning_aop.methods.xrai import XRAI

__all__ = [
    "AOP",
    "CAM",
    "EMP",
    "IGOS",
    "RISE",
    "XRAI",
    "ActivationMap",
    "ArmijoSearch",
    "Blank",
    "CaptumAttribution",
    "CentreGaussian",
    "EdgeDetector",
    "ExcitationBackprop",
    "GradCAM",
    "GradCAMPlusPlus",
    "GradientWeightedMap",
    "GreedyRanking",
    "HiResCAM",
    "LayerCAM",
    "RandomMap",
    "RankedMask",
    "RegionalMultiscale",
    "WGradCAM",
    "XGradCAM",
    "deeplift",
    "fast_sigcam",
    "gradient",
    "guided_backprop",
    "input_x_gradient",
    "integrated_gradients",
    "lime",
    "sigcam",
    "smoothgrad",
    "vargrad",
]
