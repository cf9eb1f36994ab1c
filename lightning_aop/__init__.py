"""See, while a model trains in PyTorch Lightning, what it looks at and whether that can be trusted."""

from lightning_aop.aop import AOP, Blank, fast_sigcam, sigcam
from lightning_aop.attribution import CaptumAttribution
from lightning_aop.cam import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    WGradCAM,
    XGradCAM,
)
from lightning_aop.controls import CentreGaussian, EdgeDetector, RandomMap
from lightning_aop.excitation import ExcitationBackprop
from lightning_aop.monitor import ExplanationMonitor
from lightning_aop.perturbation import EMP, IGOS, RankedMask
from lightning_aop.regions import RISE, XRAI
from lightning_aop.types import ActivationMethod, Perturbation, SaliencyMethod

__version__ = "0.1.0"

__all__ = [
    "AOP",
    "CAM",
    "EMP",
    "IGOS",
    "RISE",
    "XRAI",
    "ActivationMethod",
    "Blank",
    "CaptumAttribution",
    "CentreGaussian",
    "EdgeDetector",
    "ExcitationBackprop",
    "ExplanationMonitor",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "Perturbation",
    "RandomMap",
    "RankedMask",
    "SaliencyMethod",
    "WGradCAM",
    "XGradCAM",
    "fast_sigcam",
    "sigcam",
]
