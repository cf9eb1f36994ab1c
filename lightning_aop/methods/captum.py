"""Captum's attribution methods as saliency methods: gradients, DeepLift, LIME and all the others.

`CaptumAttribution` takes any of them by name; the functions below it are those that the paper names,
with their usual settings. Captum is an optional package: pip install "lightning-aop[methods]".
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite, require_positive
from lightning_aop.errors import InvalidValueError, MissingPackageError
from lightning_aop.methods.superpixels import superpixels
from lightning_aop.model.adapter import Classifier, explaining, name_of
from lightning_aop.model.isolation import isolated_rng
from lightning_aop.model.layers import named_layer, separate_activations
from lightning_aop.model.passes import pass_size
from lightning_aop.ops import min_max, resize
from lightning_aop.scores import Score, logit, softmax
from lightning_aop.types import Images, Maps, Targets

__all__ = [
    "CaptumAttribution",
    "deeplift",
    "gradient",
    "guided_backprop",
    "input_x_gradient",
    "integrated_gradients",
    "lime",
    "smoothgrad",
    "vargrad",
]

_MISSING = 'captum is not installed: install it with pip install "lightning-aop[methods]"'

# Methods that replace the backward of modules; see `model.layers.separate_activations`.
_RULES = ("Guided", "Deconvolution", "DeepLift", "LRP")
_OF_RELU = ("Guided", "Deconvolution")


@dataclass(frozen=True)
class CaptumAttribution:
    """Any attribution method of captum that works on images, by the name of its class.

    The map of an image is the largest |attribution| over the channels of each pixel, or its largest
    positive one, min-max normalised; the attributions of a layer are upsampled bilinearly first.

    Around captum: nothing is left on the model, also after an error; frozen models, `no_grad` and
    `inference_mode` work; passes are filled up to `eval_batch_size` and never exceed it (a DeepLift
    pass holds as many baselines again); a method that draws random numbers or many samples works on
    one image at a time, from `seed`, so that no image depends on its batch. Modules that a forward
    calls several times, like the one ReLU of a ResNet's block, are distinguished for methods with rules
    for modules. Such rules hear nothing of activations that are called as functions, and guided
    backprop changes `nn.ReLU` alone: it warns where there is none.

    Cost: captum's own number of evaluations, one more of one image for methods with such rules.

    Attributes:
        method: the name of a class in `captum.attr`, such as "IntegratedGradients" or "Occlusion".
        arguments: for its `attribute()`: `{"n_steps": 20}`. Lists become tuples, as captum wants.
        settings: for its constructor: `{"multiply_by_inputs": False}`.
        layer: the name of the layer, for methods that need one: "LayerGradCam", "GuidedGradCam".
        noise_tunnel: arguments of captum's NoiseTunnel around the method: `{"nt_type": "vargrad"}`.
            `stdevs` is a share of the image's range, from its smallest to its largest value, 0.15
            by default.
        superpixels: of so many SLIC superpixels each is one feature, for methods that switch features
            off: "Lime", "KernelShap", "FeatureAblation". 0 leaves each pixel a feature.
        sign: "absolute" counts evidence for and against the class, "positive" that for it.
        score: F_c; the logit, or `softmax` or `sigmoid`.
        seed: one seed gives one answer.
        eval_batch_size: images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.

    Raises:
        ImportError: captum is not installed.
        ValueError: captum has no such method, or it doesn't take these arguments.
    """

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer: str | None = None
    noise_tunnel: Mapping[str, Any] | None = None
    superpixels: int = 0
    sign: Literal["absolute", "positive"] = "absolute"
    score: Score = logit
    seed: int = 0
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_counts("CaptumAttribution", eval_batch_size=self.eval_batch_size)
        if self.sign not in ("absolute", "positive"):
            raise InvalidValueError(
                f"CaptumAttribution: sign must be 'absolute' or 'positive', got {self.sign!r}"
            )
        wanted = inspect.signature(self._class().attribute).parameters
        for name in self.arguments:
            if name not in wanted and "kwargs" not in wanted:
                raise InvalidValueError(
                    f"CaptumAttribution: {self.method}.attribute() takes no argument {name!r}; it "
                    f"takes {', '.join(list(wanted)[1:])}"
                )
        if self.superpixels and "feature_mask" not in wanted:
            raise InvalidValueError(
                f"CaptumAttribution: {self.method} has no features to switch off; leave superpixels "
                f"at 0, got {self.superpixels}"
            )

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return the maps [B, H, W] in [0, 1].

        Raises:
            TargetLayerError: the model has no layer of this name.
        """
        with (
            explaining(model, images, targets, self.seed) as (classifier, x, t),
            _one_precision(self.method, x.device.type),
            _quiet(),
        ):
            if self.method.startswith(_OF_RELU) and not any(
                isinstance(m, nn.ReLU) for m in classifier.model.modules()
            ):
                warnings.warn(
                    f"{name_of(classifier.model)} has no nn.ReLU module, which is all that "
                    f"{self.method} changes: its map is that of the plain gradient",
                    stacklevel=2,
                )
            require_finite(x, t, "the image")  # whose gradients may be finite all the same
            if any(rule in self.method for rule in _RULES):
                separate_activations(classifier.model, x)
            attribute, together = self._prepared(classifier)
            found = []
            for part, classes in zip(x.split(together), t.split(together), strict=True):
                with isolated_rng(x.device, self.seed):
                    found.append(attribute(part, classes))
            attribution = torch.cat(found)
            require_finite(attribution, t, f"the attribution of {self.method}")
            if self.sign == "absolute":
                attribution = attribution.abs()
            maps = resize(attribution.amax(dim=1), (x.shape[2], x.shape[3]))
            return min_max(maps.clamp_min(0)).to(x.dtype)

    def _class(self) -> Any:
        try:
            import captum.attr
        except ImportError as error:
            raise MissingPackageError(_MISSING) from error
        found = getattr(captum.attr, self.method, None)
        if not (isinstance(found, type) and issubclass(found, captum.attr.Attribution)):
            some = [n for n, v in vars(captum.attr).items() if hasattr(v, "attribute")]
            raise InvalidValueError(
                f"CaptumAttribution: captum has no method {self.method!r}; it has "
                f"{', '.join(sorted(some))}"
            )
        return found

    def _prepared(
        self, classifier: Classifier
    ) -> tuple[Callable[[Images, Targets], Float[Tensor, "n k i j"]], int]:
        """Return the function that attributes, and how many images it may be given at once."""
        import captum.attr

        # Gradients of a layer are out of reach here, where they could be lowered again.
        classifier.raises = self.layer is None
        network = _Scored(classifier, self.score)
        settings = dict(self.settings)
        kind = self._class()
        if self.layer is not None:
            settings["layer"] = named_layer(classifier.model, self.layer)[1]
        method = kind(network, **settings)
        arguments = {name: _tuples(value) for name, value in self.arguments.items()}
        takes = inspect.signature(kind.attribute).parameters
        together = pass_size(self.eval_batch_size)
        for batching in ("internal_batch_size", "perturbations_per_eval"):
            if batching in takes:
                arguments.setdefault(batching, together)
        if self.noise_tunnel is not None or {"perturbations_per_eval", "n_samples"} & set(takes):
            together = 1
        if self.noise_tunnel is not None:
            method = captum.attr.NoiseTunnel(method)
            arguments.setdefault("nt_samples_batch_size", pass_size(self.eval_batch_size))
            arguments |= self.noise_tunnel

        def attribute(images: Images, targets: Targets) -> Float[Tensor, "n k i j"]:
            own = dict(arguments)
            if self.noise_tunnel is not None:
                own["stdevs"] = own.get("stdevs", 0.15) * (images.max() - images.min()).item()
            if self.superpixels:
                pixels = images[0].movedim(0, -1).cpu().numpy()
                labels = torch.from_numpy(superpixels(pixels, [self.superpixels])[0])
                labels = labels.unique(return_inverse=True)[1]  # captum counts on 0, 1, 2, …
                own["feature_mask"] = labels.to(images.device)[None, None]
            found = method.attribute(
                images.clone().requires_grad_(), additional_forward_args=(targets,), **own
            )
            if not isinstance(found, Tensor) or found.ndim != 4:
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise InvalidValueError(
                    f"CaptumAttribution: {self.method} must give attributions [B, C, h, w], got {got}"
                )
            return found.detach()

        return attribute, together


class _Scored(nn.Module):
    """The class score of each image, as the module that captum wants to hold of."""

    def __init__(self, classifier: Classifier, score: Score) -> None:
        super().__init__()
        self.network = classifier.model  # so that captum finds the modules
        self.classifier, self.score = classifier, score

    def forward(self, images: Images, targets: Targets) -> Float[Tensor, " b"]:
        return self.classifier.scores(images, targets, self.score)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _one_precision(method: str, device: str) -> AbstractContextManager[object]:
    """Switch autocast off for DeepLift, which multiplies values of before and behind a module."""
    if "DeepLift" in method and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep captum from warning of what is done on purpose: its hooks, and gradients of the input."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting (forward|backward)")
        warnings.filterwarnings(
            "ignore", message="Input Tensor . did not already require gradients"
        )
        yield


# --------------------------------------------------------------------------------------------------
# those that the paper names


def gradient(eval_batch_size: int | None = None) -> CaptumAttribution:
    """Return the vanilla gradient, |∂z_c/∂x| (Simonyan, Vedaldi and Zisserman 2014).

    Costs 2 evaluations per image.
    """
    return CaptumAttribution("Saliency", {"abs": False}, eval_batch_size=eval_batch_size)


def input_x_gradient(eval_batch_size: int | None = None) -> CaptumAttribution:
    """Return |x · ∂z_c/∂x| (Shrikumar et al. 2016), for 2 evaluations per image.

    x is the normalised image: a pixel of the data's mean colour gets nothing.
    """
    return CaptumAttribution("InputXGradient", eval_batch_size=eval_batch_size)


def integrated_gradients(steps: int = 50, eval_batch_size: int | None = None) -> CaptumAttribution:
    """Return integrated gradients from the mean image (Sundararajan, Taly and Yan 2017).

    Costs 2·`steps` evaluations per image. The points are those of Gauss-Legendre quadrature.
    """
    return CaptumAttribution(
        "IntegratedGradients", {"n_steps": steps}, eval_batch_size=eval_batch_size
    )


def smoothgrad(
    samples: int = 50, noise: float = 0.15, seed: int = 0, eval_batch_size: int | None = None
) -> CaptumAttribution:
    """Return the mean gradient over noisy copies of the image (Smilkov et al. 2017).

    Costs 2·`samples` evaluations per image.

    Args:
        samples: noisy copies of an image.
        noise: standard deviation, as a share of the image's range; the paper takes 0.1 to 0.2.
        seed: one seed gives one answer.
        eval_batch_size: images in one pass of the model; None for the usual number.
    """
    return _in_noise("smoothgrad", samples, noise, seed, eval_batch_size)


def vargrad(
    samples: int = 50, noise: float = 0.15, seed: int = 0, eval_batch_size: int | None = None
) -> CaptumAttribution:
    """Return the variance of the gradient over noisy copies of the image (Adebayo et al. 2018).

    Costs 2·`samples` evaluations per image.

    Args:
        samples: noisy copies of an image.
        noise: standard deviation, as a share of the image's range.
        seed: one seed gives one answer.
        eval_batch_size: images in one pass of the model; None for the usual number.
    """
    return _in_noise("vargrad", samples, noise, seed, eval_batch_size)


def _in_noise(
    kind: str, samples: int, noise: float, seed: int, eval_batch_size: int | None
) -> CaptumAttribution:
    require_counts(kind, samples=samples)
    require_positive(kind, noise=noise)
    return CaptumAttribution(
        "Saliency",
        {"abs": False},
        noise_tunnel={"nt_type": kind, "nt_samples": samples, "stdevs": noise},
        seed=seed,
        eval_batch_size=eval_batch_size,
    )


def guided_backprop(eval_batch_size: int | None = None) -> CaptumAttribution:
    """Return guided backprop (Springenberg et al. 2015), for 2 evaluations per image, and one more.

    The gradient, with negative signals stopped at each ReLU. It looks like the objects' edges, for
    one class as for another: compare it with `EdgeDetector`, and run the sanity checks.
    """
    return CaptumAttribution("GuidedBackprop", eval_batch_size=eval_batch_size)


def deeplift(eval_batch_size: int | None = None) -> CaptumAttribution:
    """Return DeepLift's rescale rule, against the mean image (Shrikumar, Greenside and Kundaje 2017).

    Costs 4 evaluations per image, and one more: the baseline goes through the network beside it.
    """
    return CaptumAttribution("DeepLift", eval_batch_size=eval_batch_size)


def lime(
    samples: int = 1000,
    superpixels: int = 50,
    score: Score = softmax,
    seed: int = 0,
    eval_batch_size: int | None = None,
) -> CaptumAttribution:
    """Return LIME over superpixels (Ribeiro, Singh and Guestrin 2016).

    A ridge regression of the score on which superpixels are switched on, the samples weighted by their
    likeness to the image; switched off is the mean colour. Superpixels that speak for the class are
    shown. Costs `samples` forward passes per image.

    Args:
        samples: images with random superpixels switched off.
        superpixels: how many SLIC is asked for.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        seed: one seed gives one answer.
        eval_batch_size: images in one pass of the model; None for the usual number.
    """
    require_counts("lime", samples=samples, superpixels=superpixels)
    try:
        from captum._utils.models.linear_model import SkLearnRidge
        from captum.attr._core.lime import get_exp_kernel_similarity_function
    except ImportError as error:
        raise MissingPackageError(_MISSING) from error
    return CaptumAttribution(
        "Lime",
        {"n_samples": samples},
        {
            "interpretable_model": SkLearnRidge(alpha=1.0),
            "similarity_func": get_exp_kernel_similarity_function("cosine", kernel_width=0.25),
        },
        superpixels=superpixels,
        sign="positive",
        score=score,
        seed=seed,
        eval_batch_size=eval_batch_size,
    )
