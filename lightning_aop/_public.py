"""The names that `import lightning_aop` offers, each from where it is defined."""

from lightning_aop.data.augment import RandomPatchBlur
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
from lightning_aop.methods.captum import CaptumAttribution
from lightning_aop.methods.controls import CentreGaussian, EdgeDetector, RandomMap
from lightning_aop.methods.emp import EMP
from lightning_aop.methods.excitation import ExcitationBackprop
from lightning_aop.methods.greedy_ranking import GreedyRanking
from lightning_aop.methods.igos import IGOS
from lightning_aop.methods.ranked_mask import RankedMask
from lightning_aop.methods.regional_multiscale import RegionalMultiscale
from lightning_aop.methods.rise import RISE
from lightning_aop.methods.xrai import XRAI
from lightning_aop.model.isolation import is_explaining
from lightning_aop.monitor import ExplanationMonitor
from lightning_aop.monitor.explain import explain
from lightning_aop.monitor.probe import Stratified
from lightning_aop.types import ActivationMethod, Perturbation, SaliencyMethod

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
    "GreedyRanking",
    "HiResCAM",
    "LayerCAM",
    "Perturbation",
    "RandomMap",
    "RandomPatchBlur",
    "RankedMask",
    "RegionalMultiscale",
    "SaliencyMethod",
    "Stratified",
    "WGradCAM",
    "XGradCAM",
    "explain",
    "fast_sigcam",
    "is_explaining",
    "sigcam",
]
